"""budget.py held against what torch counts and allocates on tiny models, against naive loops, and a table computed by hand."""

import io
import weakref

import pytest
import torch
from PIL import Image
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

import model
import ptst
import toy
from nano import budget, data, packing, rollout

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
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
    """a policy whose vision blocks attend by windows where the family has them, and two equally long sequences, one
    with an image that does not fill its windows: equal, so that the CPU's attention pads nothing"""
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "qwen2_5_vl":
        config.vision_config.fullatt_block_indexes = [1]
    policy, processor = model.wrap(AutoModelForImageTextToText.from_config(config), path)
    if checkpointing:  # as model.shard does
        units = set(model.blocks(policy))
        apply_activation_checkpointing(policy, check_fn=lambda m: m in units)
    picture = io.BytesIO()
    Image.effect_noise((250, 130), 80).convert("RGB").save(picture, "PNG")
    prompts = [
        packing.encode(data.Record("", m + "Add .", "7", i), processor)
        for m, i in [("<image>", [picture.getvalue()]), ("", [])]
    ]
    return (
        policy,
        packing.pack([(p, [10 + i % 400 for i in range(length - len(p.ids))]) for p in prompts]),
        [length] * 2,
    )


def square(s, lengths):
    """FLOPs of attention over the whole square, as torch counts it"""
    return sum(4 * n * n for n in lengths) * s.query * s.text.num_hidden_layers


def test_parameter_counts():
    """of the files on the hub: the sum of the tensors' sizes in each checkpoint's safetensors headers"""
    want = {
        "qwen2-vl-2b": 2208985600,
        "qwen2-vl-7b": 8291375616,
        "qwen2.5-vl-3b": 3754622976,
        "qwen2.5-vl-7b": 8292166656,
        "qwen2.5-vl-32b": 33452718336,
        "qwen2.5-vl-72b": 73410777344,
        "qwen3-vl-8b": 8767123696,
    }
    assert {
        name: budget.shape(budget.published_config(name)).params for name in budget.PUBLISHED
    } == want


def test_forward_flops_are_those_that_torch_counts(path):
    policy, batch, lengths = build(path)
    s = budget.shape(policy.hf.config)
    assert s.params == sum(p.numel() for p in policy.parameters())
    assert s.vision_params == sum(p.numel() for p in policy.hf.model.visual.parameters())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch)
    ours = budget.flops(s, lengths, len(batch.labels), batch.image_grid.tolist())
    assert ours.text + square(s, lengths) + ours.head + ours.vision == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )
    naive = (
        sum(4 * s.query * (i + 1) for n in lengths for i in range(n)) * s.text.num_hidden_layers
    )  # query i sees i + 1 keys
    assert ours.attention == naive


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_flops(path, checkpointing):
    policy, batch, lengths = build(path, checkpointing)
    s = budget.shape(policy.hf.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    ours = budget.flops(s, lengths, len(batch.labels), batch.image_grid.tolist())
    again = square(s, lengths) - ours.attention  # the half that a causal kernel skips
    counted = counter.get_total_flops() - (4 if checkpointing else 3) * again
    counted += (
        2 * len(batch.labels) * s.vocab * s.hidden
    )  # addmm_ into the head's gradient, which torch's counter does not see
    if not checkpointing:  # the pixels' own gradient is not made: 1 of the patch embedding's 3
        assert ours.hardware() == pytest.approx(counted, rel=0.02)
        assert ours.training() == 3 * ours.forward == pytest.approx(counted - ours.head, rel=0.02)
    else:  # torch stops making a block again before its last matmul
        assert 0.9 * ours.hardware(True) < counted < ours.hardware(True)


def test_frozen_vision_costs_one_forward(tmp_path):
    toy.random_model(tmp_path)
    policy, batch, lengths = build(str(tmp_path))
    policy.hf.model.visual.requires_grad_(False)
    s = budget.shape(policy.hf.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    ours = budget.flops(s, lengths, len(batch.labels), batch.image_grid.tolist())
    counted = (
        counter.get_total_flops()
        - 3 * (square(s, lengths) - ours.attention)
        + 2 * len(batch.labels) * s.vocab * s.hidden
    )
    assert ours.hardware(frozen_vision=True) == pytest.approx(counted, rel=0.01)


def test_windows_with_and_without_a_grid():
    whole = budget.flops(SEVEN, [], 0, [(1, 32, 64)])
    assert whole == budget.flops(SEVEN, [], 0, [2048])  # full windows of 8 x 8 patches
    assert (
        budget.flops(SEVEN, [], 0, [(1, 20, 12)]).vision < budget.flops(SEVEN, [], 0, [240]).vision
    )  # cut ones
    by_hand = 2 * (
        2048 * (32 * (1280 * 3840 + 1280**2 + 3 * 1280 * 3420) + 1176 * 1280)
        + 512 * (5120**2 + 5120 * 3584)
    )
    assert whole.vision == by_hand + 4 * 1280 * (4 * 2048**2 + 28 * 2048 * 64)


# ---- memory


class Live(TorchDispatchMode):
    """bytes of the storages made inside that are alive, and the most of them"""

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
    """keeps what flash attention keeps: queries, keys and values as they are, and the output"""

    @staticmethod
    def forward(ctx, q, k, v):
        out = (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            .transpose(1, 2)
            .contiguous()
        )
        ctx.save_for_backward(q, k, v, out)
        return out


def test_activations_in_bf16_with_flash_attention(path):
    """the GPU's formula, on the CPU: bf16 weights and an attention that keeps what flash attention would"""
    policy, batch, lengths = build(path, length=600)
    s = budget.shape(policy.hf.config)
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
    assert result and budget.activations(s, sum(lengths), len(batch.pixel_values)) == pytest.approx(
        real, rel=0.15
    )


def test_states_of_a_real_step(tmp_path):
    """masters, gradients, AdamW, replica and KV cache of the CPU, to the byte"""
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
    items = {
        i.name: i.bytes
        for i in budget.memory(
            s, 800, cuda=False, reference="", replica=True, rows=5, row_tokens=70
        )
    }
    assert [
        items[k] for k in ("master weights, float32", "gradients, float32", "AdamW's m and v")
    ] == real
    assert items["replica to sample from"] == sum(
        p.nbytes for p in model.replica(policy).parameters()
    )
    assert items["KV cache, 5 rows x 70 tokens"] == sum(layer.nbytes for layer in cache.kv)


def test_sharding_and_offload():
    def memory(**settings):
        return {i.name: i.bytes for i in budget.memory(SEVEN, 16384, 2048, **settings)}

    one, eight = memory(), memory(world=8)
    for name in ("master weights, float32", "gradients, float32", "AdamW's m and v"):
        assert one[name] == 8 * eight[name]
    assert memory(world=16, shard_size=8) == eight | {}  # HSDP: a replica per node
    assert "AdamW's m and v" not in memory(offload=True) and "reference, float32" not in memory(
        reference="cpu"
    )
    assert memory(reference="bfloat16")["reference, bfloat16"] < memory()["reference, float32"]
    frozen = memory(frozen_vision=True)
    assert one["gradients, float32"] - frozen["gradients, float32"] == 4 * SEVEN.vision_params
    assert (
        memory(activation_checkpointing=True)["activations of 16384 tokens"]
        < one["activations of 16384 tokens"] / 10
    )


def test_preflight_and_out_of_memory():
    h100 = budget.gpu("H100")
    items = budget.memory(SEVEN, 16384, world=8, replica=True, rows=64, row_tokens=4736)
    text = budget.preflight(items, h100.memory)
    assert "this will not fit" in text and all(i.name in text for i in items)
    assert sum(i.bytes for i in items if i.when != "sampling") == budget.peak(items)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.31 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB "
        "is free. Of the allocated memory 70 GiB is allocated by PyTorch, and 3.52 GiB is reserved by PyTorch but unallocated."
    )
    lines = budget.explain_oom(error, items, h100.memory, "training").splitlines()
    assert (
        "2.31 GiB" in lines[0]
        and "activation_checkpointing, or micro_tokens (now 16384" in lines[1]
    )
    sizes = [float(line.split()[0]) for line in lines[1:-2]]
    assert sizes == sorted(sizes, reverse=True) and "expandable_segments" in lines[-1]
    text = budget.explain_oom(error, items, None, "sampling")
    assert "max_rows (now 64)" in text and "micro_tokens" not in text and "kl_coef 0" in text
    items = budget.memory(SEVEN, 16384, world=8, activation_checkpointing=True)
    assert (
        "fit" not in budget.preflight(items, h100.memory)
        and "GPU" not in budget.preflight(items).splitlines()[-1]
    )


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


# ---- time


@pytest.mark.parametrize("shares, want", [((1, 1), (35, 10, 31)), ((0.45, 0.6), (59, 23, 68))])
def test_the_floor_of_a_step(shares, want):
    """worked out apart from this code: 7B, 8 x H100, 128 prompts x 16 answers, limit 4K, mean 2K, 512 + 128 prompt tokens, on-policy"""
    mfu, bandwidth = shares
    c = budget.cost(
        SEVEN,
        (4096, 16, 100),
        budget.gpu("H100"),
        8,
        questions=128,
        mfu=mfu,
        bandwidth_share=bandwidth,
    )
    assert [c["rollout_s"], c["reference_s"], c["training_s"]] == pytest.approx(want, rel=0.1)
    assert c["old_s"] == 0 and c["tokens"] == 128 * 16 * 2048 and c["rows"] == 256
    if mfu == 1:
        assert [c["weights_s"], c["kv_s"]] == pytest.approx([17, 18], rel=0.05)
    # decoding step by step, and what it reads
    lengths = torch.linspace(0.5, 255.5, 256) / 256 * 4096
    weights = keys = 0
    for t in range(4096):
        live = (lengths > t).sum().item()
        weights += (
            2
            * (28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584)
            * (live > 0)
        )
        keys += live * (640 + t) * 2 * 28 * 2 * 512
    assert [c["weights_s"], c["kv_s"]] == pytest.approx(
        [x / 3.35e12 / bandwidth for x in (weights, keys)], rel=0.01
    )


def test_rows_that_do_not_fit_wait():
    """against a loop in which a finished row makes room for the next, in an order of chance"""
    c = budget.cost(SEVEN, (8192, 8, 1), budget.gpu("H100"), 8, questions=1024)
    rows, waiting = round(c["rows"]), budget.answer_lengths(8192, 0.5, 1024)
    assert 150 < rows < 250 and c["split"] == 1
    torch.manual_seed(0)
    waiting = [waiting[i] for i in torch.randperm(1024)]
    live, t = [], 0
    while waiting or live:
        live = [left - 1 for left in live if left > 1]
        while waiting and len(live) < rows:
            live.append(waiting.pop())
        t += 1
    assert c["weights_s"] == pytest.approx(t * 2 * 7.07e9 / 3.35e12 / 0.6, rel=0.1)


@pytest.mark.parametrize("fill", [0.25, 0.5, 1.0])
def test_mean_of_the_answers(fill):
    lengths = budget.answer_lengths(4096, fill, 1000)
    assert sum(lengths) / 1000 == pytest.approx(4096 * fill, rel=0.01) and max(lengths) <= 4096
    with pytest.raises(ValueError, match="mean-fill"):
        budget.answer_lengths(4096, 0)


def test_large_models_are_split_or_refused():
    s = budget.shape(budget.find_config("runs/vision-r1-ci-72b/final")[0])
    c = budget.cost(s, (4096, 16, 100), budget.gpu("H100"), 32)
    assert (
        c["split"] == 8
        and c["old_s"] == 0
        and budget.cost(s, (4096, 16, 100), budget.gpu("H100"), 32, minibatches=4)["old_s"] > 0
    )
    with pytest.raises(ValueError, match="2 x 4090 cannot hold the 147 GB"):
        budget.cost(s, (4096, 16, 100), budget.gpu("4090"), 2)


def test_models_by_name(tmp_path):
    assert budget.find_config("runs/vision-r1-ci-7b/final")[1] == "qwen2.5-vl-7b, published shape"
    assert "qwen2-vl-2b" in budget.find_config("Qwen/Qwen2-VL-2B")[1]
    assert "qwen3-vl-8b" in budget.find_config("Qwen/Qwen3-VL-8B-Instruct")[1]
    toy.random_model(tmp_path)
    assert budget.find_config(str(tmp_path))[0].text_config.num_hidden_layers == 3
    with pytest.raises(ValueError, match="toy:ci: no config.json there"):
        budget.find_config("toy:ci")
    with pytest.raises(ValueError, match="llama"):
        budget.shape(AutoConfig.for_model("llama"))


def test_command_line(capsys):
    ptst.main(["cost", "--recipe", "vision-r1-7b", "--gpus", "8", "--mean-fill", "0.5"])
    text = capsys.readouterr().out
    assert (
        "8 x H100" in text
        and "8.29 G parameters" in text
        and "512 questions" in text
        and "published shape" in text
    )
    assert (
        "stage 2: 8192 x 8, 100 steps" in text
        and "old " in text
        and "3.36 G tokens sampled" in text
    )  # 200 x 512 x 16 x 2048
    for flags in (
        ["--gpu", "GeForce256"],
        ["--recipe", "vision-r2"],
        ["--mfu", "0"],
        ["--gpus", "0"],
    ):
        with pytest.raises((SystemExit, ValueError)):
            ptst.main(["cost", *flags])
