"""The arithmetic of nano/budget.py and tools/cost.py against what torch counts and allocates on
tiny models, against naive loops, and against numbers worked out by hand."""

import io
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, single_rank
from PIL import Image
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

import grpo
import model
import sft
import toy
from nano import budget, data, packing, rollout
from nano.logprobs import token_logprobs
from tools import cost

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
STATES = ("master weights, float32", "gradients, float32", "AdamW's m and v")
SEVEN = budget.shape(budget.published_config("qwen2.5-vl-7b"))


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp(request.param))
    if request.param == "qwen2_5_vl":
        toy.random_model(path, max_pixels=64 * 28 * 28)
    else:
        toy.random_relative(path, request.param)
    return path


def build(path, checkpointing=False, length=400):
    """A policy whose vision blocks attend by windows where its family has them, and two sequences.

    One has an image that does not fill its windows. Both are equally long, so that the CPU's
    attention pads nothing.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "qwen2_5_vl":
        config.vision_config.fullatt_block_indexes = [1]
    policy, processor = model.wrap(AutoModelForImageTextToText.from_config(config), path)
    if checkpointing:  # as model.shard does
        units = set(policy.blocks())
        apply_activation_checkpointing(policy, check_fn=units.__contains__)
    picture = io.BytesIO()
    Image.effect_noise((250, 130), 80).convert("RGB").save(picture, "PNG")
    sequences = []
    for mark, images in (("<image>", [picture.getvalue()]), ("", [])):
        prompt = packing.encode(data.Record("", mark + "Add .", "7", images), processor)
        sequences.append((prompt, [10 + i % 400 for i in range(length - len(prompt.ids))]))
    return policy, packing.pack(sequences), [length] * 2


def square(s, lengths):
    """FLOPs of attention over the whole square, as torch counts it"""
    return sum(4 * n * n for n in lengths) * s.query * s.text.num_hidden_layers


def test_parameter_counts():
    """The files on the hub have so many: the sum of the tensors' sizes in their headers."""
    want = {
        "qwen2-vl-2b": 2208985600,
        "qwen2.5-vl-3b": 3754622976,
        "qwen2.5-vl-7b": 8292166656,
        "qwen2.5-vl-32b": 33452718336,
        "qwen2.5-vl-72b": 73410777344,
    }
    for name in budget.PUBLISHED:
        assert budget.shape(budget.published_config(name)).params == want.pop(name)
    assert not want


def test_forward_flops_are_those_that_torch_counts(path):
    policy, batch, lengths = build(path)
    s = budget.shape(policy.hf.config)
    assert s.params == sum(p.numel() for p in policy.parameters())
    assert s.vision_params == sum(p.numel() for p in policy.hf.model.visual.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        policy(batch)
    ours = budget.flops(s, lengths, len(batch.labels), batch.image_grid.tolist())
    total = ours.text + square(s, lengths) + ours.head + ours.vision
    assert total == pytest.approx(counter.get_total_flops(), rel=1e-9)
    seen = sum(i + 1 for n in lengths for i in range(n))  # query i sees i + 1 keys
    assert ours.attention == 4 * s.query * seen * s.text.num_hidden_layers


@pytest.mark.parametrize("frozen", [False, True])
def test_training_flops(path, frozen):
    """Torch's counter counts two things more: the half of the attention that a causal kernel skips,
    and the logits that token_logprobs makes again in its backward."""
    policy, batch, lengths = build(path)
    policy.hf.model.visual.requires_grad_(not frozen)
    s = budget.shape(policy.hf.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    ours = budget.flops(s, lengths, len(batch.labels), batch.image_grid.tolist())
    counted = counter.get_total_flops() - 3 * (square(s, lengths) - ours.attention) - ours.head
    # torch's counter does not see addmm_ into the head's gradient
    counted += 2 * len(batch.labels) * s.head_matrix
    # the gradient of the pixels is not made: 1 of the patch embedding's 3
    assert ours.training(frozen) == pytest.approx(counted, rel=0.01 if frozen else 0.02)


def test_windows():
    def vision(*grid):
        return budget.flops(SEVEN, [], 0, [grid]).vision

    by_hand = 2 * (
        2048 * (32 * (1280 * 3840 + 1280**2 + 3 * 1280 * 3420) + 1176 * 1280)
        + 512 * (5120**2 + 5120 * 3584)
    )
    full = 4 * 1280 * (4 * 2048**2 + 28 * 2048 * 64)  # windows of 8 x 8 patches
    assert vision(1, 32, 64) == by_hand + full
    # 20 x 12 patches are cut to 2 x 1 whole windows, 2 of 8 x 4, 1 of 4 x 8 and 1 of 4 x 4
    pairs = 2 * 64**2 + 2 * 32**2 + 32**2 + 16**2
    assert vision(1, 20, 12) == by_hand * 240 / 2048 + 4 * 1280 * (4 * 240**2 + 28 * pairs)
    assert vision(3, 20, 12) == 3 * vision(1, 20, 12)  # frames do not see each other


# ---- memory


class Live(TorchDispatchMode):
    """Counts the bytes of the storages made inside that are alive, and the most of them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in given:
                    self.alive.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_step_holds_at_its_peak(path, checkpointing):
    policy, batch, lengths = build(path, checkpointing, 600)
    s = budget.shape(policy.hf.config)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    with Live() as live:
        policy(batch)[0].sum().backward()
    ours = budget.activations(s, sum(lengths), len(batch.pixel_values), False, checkpointing)
    assert 0.8 * live.peak < ours < 1.1 * live.peak


class Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys and values as they are, and the output."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            .transpose(1, 2)
            .contiguous()
        )
        ctx.save_for_backward(q, k, v, out)
        return out


class Norm(torch.autograd.Function):
    """Keeps what a fused RMSNorm keeps: its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x * weight


def test_activations_in_bf16_with_flash_attention(path):
    """The GPU's formula is tried on the CPU, with kernels that keep what the GPU's would."""
    policy, batch, lengths = build(path, length=600)
    s = budget.shape(policy.hf.config)
    for norm in (m for m in policy.modules() if type(m).__name__.endswith("RMSNorm")):
        norm.forward = lambda x, norm=norm: Norm.apply(x, norm.weight)
    own = {p.untyped_storage().data_ptr() for p in policy.bfloat16().parameters()}
    AttentionInterface.register("packed", lambda m, q, k, v, *_, **__: (Flash.apply(q, k, v), None))
    kept = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            result = policy(batch)
    finally:
        AttentionInterface.register("packed", model.packed_attention)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    ours = budget.activations(s, sum(lengths), len(batch.pixel_values), True, False)
    assert result and ours == pytest.approx(real, rel=0.15)


def tile(s, tokens, **settings):
    found = budget.memory(s, tokens, **settings)
    return next(item.bytes for item in found if item.name == "a tile of logits")


def test_the_tile_of_logits_by_hand():
    """Logits are float32, and a GPU holds their bf16 gradient beside them. The docstring of
    token_logprobs has the sizes: 2^27 logits on a GPU and 2^22 on a CPU, but at least 2048 or 1024
    columns."""
    assert tile(SEVEN, 16384) == 0.75 * 2**30
    assert tile(SEVEN, 2**18) == 2**18 * 2048 * 6
    assert tile(SEVEN, 100) == 100 * 152064 * 6  # the whole vocabulary
    assert tile(SEVEN, 1000, cuda=False) == 16 * 2**20
    assert tile(SEVEN, 8192, cuda=False) == 8192 * 1024 * 4
    assert tile(SEVEN, 10, cuda=False) == 10 * 152064 * 4


@pytest.mark.parametrize("tokens, vocab", [(1000, 20000), (8000, 20000), (400, 5000)])
@pytest.mark.parametrize("cuda", [False, True])
def test_the_tile_of_logits_is_what_the_backward_holds(tokens, vocab, cuda):
    """The backward makes the tile and two gradients. `cuda` is bf16 and the width that a GPU would
    take, here on the CPU."""
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    width = max(2048, 2**27 // tokens // 256 * 256) if cuda else None
    loss = token_logprobs(hidden, weight, torch.zeros(tokens).long(), width=width)[0].sum()
    with Live() as live:
        loss.backward()
    shape = budget.Shape(**vars(SEVEN) | {"text": AutoConfig.for_model("qwen2_vl").text_config})
    shape.text.vocab_size = vocab
    gradients = hidden.nbytes + weight.nbytes + 4 * hidden.numel()  # hidden's also in float32
    assert live.peak - gradients == pytest.approx(tile(shape, tokens, cuda=cuda), rel=0.1)


def test_states_of_a_real_step(tmp_path):
    """Masters, gradients, AdamW, replica and KV cache agree to the byte on the CPU."""
    toy.random_model(tmp_path)
    policy, batch, _ = build(str(tmp_path))
    s = budget.shape(policy.hf.config)
    policy(batch)[0].sum().backward()
    optimizer = torch.optim.AdamW(policy.parameters())
    optimizer.step()
    cache = rollout.KVCache(policy.hf.model.language_model.config, 5, 70, "cpu", torch.float32)
    cache.reserve(70)
    real = [
        sum(p.nbytes for p in policy.parameters()),
        sum(p.grad.nbytes for p in policy.parameters()),
        sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.ndim),
    ]
    settings = dict(cuda=False, reference="", replica=True, rows=5, row_tokens=70)
    items = {item.name: item.bytes for item in budget.memory(s, 800, **settings)}
    assert [items[name] for name in STATES] == real
    copied = sum(p.nbytes for p in model.replica(policy).parameters())
    assert items["replica to sample from"] == copied
    assert items["KV cache of 5 x 70 tokens"] == sum(layer.nbytes for layer in cache.layers)


def test_sharding_and_offload():
    def memory(**settings):
        return {i.name: i.bytes for i in budget.memory(SEVEN, 16384, 2048, **settings)}

    one, eight = memory(), memory(world=8)
    for name in STATES:
        assert one[name] == 8 * eight[name]
    assert memory(world=16, shard_size=8) == eight  # HSDP: a replica per node
    assert not set(STATES) & set(memory(offload=True))
    assert "reference, float32" not in memory(reference="cpu")
    assert memory(reference="bfloat16")["reference, bfloat16"] < one["reference, float32"]
    frozen = memory(frozen_vision=True)
    assert one["gradients, float32"] - frozen["gradients, float32"] == 4 * SEVEN.vision_params
    name = "activations of 16384 tokens"
    assert memory(activation_checkpointing=True)[name] < one[name] / 10
    kept = [memory(activation_checkpointing=share)[name] for share in (0.25, 0.5, 0.75)]
    steps = {round(a - b) for a, b in zip(kept, kept[1:])}
    assert one[name] > kept[0] > kept[1] and len(steps) == 1  # each block less takes as much away


def test_preflight_and_out_of_memory():
    h100 = 80e9
    settings = dict(world=8, replica=True, rows=64, row_tokens=4736)
    items = budget.memory(SEVEN, 16384, **settings)
    text = budget.preflight(items, h100)
    assert "this will not fit" in text and all(item.name in text for item in items)
    assert sum(item.bytes for item in items if item.when != "sampling") == budget.peak(items)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.31 GiB. GPU 0 has a total capacity of 79.1 GiB of "
        "which 1 GiB is free. Of the allocated memory 70 GiB is allocated by PyTorch, and 3.52 GiB "
        "is reserved by PyTorch but unallocated."
    )
    lines = budget.explain_oom(error, items, h100).splitlines()
    assert "2.31 GiB" in lines[0] and "expandable_segments" in lines[-1]
    assert "activation_checkpointing, or micro_tokens (now 16384" in lines[1]
    sizes = [float(line.split()[0]) for line in lines[1:-3]]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    text = "\n".join(lines)
    assert "max_rows" in text and "kl_coef 0" in text and "--freeze_vision" in text
    items = budget.memory(SEVEN, 16384, world=8, activation_checkpointing=True)
    assert "fit" not in budget.preflight(items, h100)
    assert "GPU" not in budget.preflight(items).splitlines()[-1]


def test_announced_memory_explains_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: print("before", kind.__name__))
    said = []
    budget.announce(budget.memory(SEVEN, 800, cuda=False), torch.device("cpu"), said.append)
    assert "at the peak" in said[0]
    sys.excepthook(KeyError, KeyError(), None)
    assert capsys.readouterr().out == "before KeyError\n"


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)
def test_mfu(name, tera):
    assert budget.mfu(tera * 1e12, 2.0, name) == pytest.approx(0.5)
    assert (
        budget.mfu(1e12, 1.0, torch.device("cpu")) is None
        and budget.mfu(1e12, 1.0, "GeForce 256") is None
    )
    assert (
        budget.gpu("NVIDIA A100-SXM4-40GB").bandwidth
        < budget.gpu("NVIDIA A100-SXM4-80GB").bandwidth
    )


# ---- tools/cost.py

ASSUMED = {flag: default for flag, (default, _) in cost.ASSUMED.items()}
RECIPE = dict(
    questions=128, micro_tokens=16384, minibatches=1, epochs=1, kl_coef=0.01, freeze_vision=False
)


def price(stage=(4096, 16, 100), gpus=8, **changes):
    assumed = ASSUMED | {flag: changes.pop(flag) for flag in ASSUMED if flag in changes}
    return cost.cost(SEVEN, stage, RECIPE | changes, budget.gpu("H100"), gpus, assumed)


@pytest.mark.parametrize("share", [0.6, 1])
def test_sampling_step_by_step(share):
    """7B on 8 H100, 128 questions x 16 answers of 2048 tokens: 256 rows decode together on each
    GPU, and every step reads the weights and what each row has so far"""
    weights = 2 * (28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584)
    read = sum(weights + 256 * (640 + t) * 2 * 28 * 2 * 512 for t in range(2048))
    _, seconds = price(mfu=0.45, **{"bandwidth-share": share})["sampling"]
    assert seconds == pytest.approx(read / 3.35e12 / share, rel=0.01)
    # half as many rows at a time read the weights twice as often
    _, half = price(**{"bandwidth-share": share, "rows": 128})["sampling"]
    assert half - seconds == pytest.approx(2048 * weights / 3.35e12 / share, rel=0.01)


def test_sampling_is_bound_by_arithmetic_where_the_bandwidth_is_large():
    flops, seconds = price(mfu=0.01)["sampling"]
    assert seconds == pytest.approx(flops / 8 / 989e12 / 0.01)


def test_passes_of_a_step():
    """6 FLOPs a weight and token in training: 2048 answers, 2688 text tokens, attention on top"""
    parts = price()
    assert set(parts) == {"sampling", "reference", "training"}
    tokens, matrices = 2048 * 2688, 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    attention = 4 * 28 * 3584 * 2688 / 2  # of a token, on average
    head = 2048 * 2048 * 152064 * 3584 * 6
    text = tokens * (6 * matrices + 3 * attention) + head
    assert 1 < parts["training"][0] / text < 1.06  # the rest is the vision tower
    assert parts["training"][1] == pytest.approx(parts["training"][0] / 8 / 989e12 / 0.3)
    assert parts["training"][0] == pytest.approx(3 * parts["reference"][0])
    assert set(price(minibatches=4, kl_coef=0)) == {"sampling", "old", "training"}
    assert set(price(epochs=2)) == {"sampling", "reference", "old", "training"}
    assert price(freeze_vision=True)["training"][0] < parts["training"][0]
    assert price(gpus=16)["training"][1] == parts["training"][1] / 2


def test_models_by_name(tmp_path):
    assert cost.find_shape("runs/vision-r1-ci-7b/final")[1] == "qwen2.5-vl-7b, published shape"
    assert "qwen2-vl-2b" in cost.find_shape("Qwen/Qwen2-VL-2B")[1]
    toy.random_model(tmp_path)
    assert cost.find_shape(str(tmp_path))[0].text.num_hidden_layers == 3
    for model_name in ("toy:ci", "runs/zero-sft/final", "Qwen/Qwen3-VL-7B"):
        with pytest.raises(ValueError, match=f"{model_name}: no config.json"):
            cost.find_shape(model_name)
    with pytest.raises(ValueError, match="llama"):
        budget.shape(AutoConfig.for_model("llama"))


def test_command_line():
    command = [sys.executable, "-m", "tools.cost"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "8.29 G parameters, 8 x H100" in done.stdout and "512 questions" in done.stdout
    for flag, value in ASSUMED.items():  # every assumption is visible
        assert f"{flag} {value:g}" in done.stdout
    assert "8Kx8x100" in done.stdout and "old " in done.stdout
    assert "3.36 G tokens sampled" in done.stdout  # 200 x 512 x 16 x 2048
    for flags in (["--gpu", "GeForce256"], ["--recipe", "vision-r2"], ["--mfu", "0"]):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_start_that_cannot_fit_is_refused_and_names_the_knob(tiny, monkeypatch):
    single_rank()
    policy, _ = model.load(tiny)
    card = SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(budget.sys, "excepthook", budget.sys.excepthook)
    config = grpo.Config(engine="vllm", vllm_memory=0.5)
    said = []
    table = (policy, torch.device("cuda"), said.append, 1000, 64)
    with pytest.raises(SystemExit, match=r"will not fit; .*: .* \(or --force\)"):
        budget.announce_run(config, *table)
    assert "this will not fit" in said[0]
    config.force = True
    budget.announce_run(config, *table)


@pytest.mark.parametrize(
    "stage, recipe, size, gpus",
    [
        (grpo, "vision-r1-3b", "3b", 1),
        (grpo, "vision-r1-7b", "7b", 8),
        (grpo, "vision-r1-32b", "32b", 32),
        (grpo, "vision-r1-72b", "72b", 64),
        (sft, "vision-r1-ci-3b", "3b", 1),
        (sft, "vision-r1-ci-7b", "7b", 8),
        (sft, "vision-r1-ci-32b", "32b", 32),
        (sft, "vision-r1-ci-72b", "72b", 64),
    ],
)
def test_the_papers_recipes_fit_gpus_of_80_gb(stage, recipe, size, gpus):
    config, card = stage.Config(**stage.RECIPES[recipe]), 79.1 * budget.GIB
    settings = dict(world=gpus, activation_checkpointing=True, frozen_vision=config.freeze_vision)
    settings |= dict(reference="", offload=config.offload in (True, "all"))
    if stage is grpo:
        settings["reference"] = "bfloat16" if config.offload == "none" else "cpu"
        settings["vllm_bytes"] = config.vllm_memory * card
        assert config.engine == "vllm"
    s = budget.shape(budget.published_config(f"qwen2.5-vl-{size}"))
    tokens, patches = config.micro_tokens or 20480, 4 * 4096
    assert budget.peak(budget.memory(s, tokens, patches, **settings)) < 0.95 * card
