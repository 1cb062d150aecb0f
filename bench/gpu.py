"""What to run first on a machine with a GPU: python bench/gpu.py

  python bench/gpu.py [--out FOLDER] [--only WORD]     20 minutes on one GPU
  python bench/gpu.py --cpu                            a rehearsal at tiny sizes, without a GPU

Each check runs in a process of its own, and a check that fails does not stop the others. The table
of all checks goes to gpu-report.md, ready to be pasted into an issue, and to gpu-report.json. What
the machine lacks (vLLM, TRL, Liger's kernels) is a row `left out` with the reason.

With --cpu the GPU's path runs on the CPU, with a strict stand-in for flash attention (stand_in.py):
the figures mean nothing there, but the command itself works when it is needed.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or no child could use CUDA
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stand_in
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText

import grpo
import model
import nano.device
import toy
from nano import budget, data, logprobs, packing, rollout, run

ROOT = Path(__file__).resolve().parents[1]
CPU = "--cpu" in sys.argv
DEVICE = torch.device("cpu" if CPU else "cuda")
TIME_LIMIT = 600 if CPU else 300  # seconds that a check may take
# Rounding: of a bf16 product's result, of a tiny bf16 model's log-probabilities against float32.
BF16, MODEL_BF16 = 2e-2, 0.1
# Sizes of the checks: what a GPU computes, and the rehearsal.
TOKENS, VOCAB, HIDDEN = (64, 500, 64) if CPU else (8192, 152064, 3584)
ROW, IMAGE, ANSWER = (512, 16, 100) if CPU else (20480, 512, 2000)  # tokens of a micro-batch, ...
LAYERS = {"3b": 36, "7b": 8}  # of the 7B eight layers and their optimizer fit beside the rest


class LeftOut(Exception):
    """This machine lacks what a check needs."""


def need(package: str):
    if not importlib.util.find_spec(package):
        raise LeftOut(f"{package} is not installed")


def seconds(call, repeats: int = 3) -> float:
    """The shortest wall time of a call, after one that warms up."""
    best = float("inf")
    for i in range(1 if CPU else repeats + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - began) if i or CPU else best
    return best


def wait():
    if not CPU:
        torch.cuda.synchronize()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest value (where all are next to 0: over 0.001)."""
    want = want.to(got.device, torch.float32)
    return ((got.float() - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()


def close(errors: dict[str, float], limit: float):
    """A row from named errors -> (passed, figure, expected)."""
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return all(error < limit for error in errors.values()), told, f"< {limit:g}"


def versus(ours, theirs, repeats: int = 3):
    """A row of an A/B: milliseconds of our way and of the other. Slower is told, but no fault."""
    a, b = seconds(ours, repeats), seconds(theirs, repeats)
    return True, f"{1e3 * a:.2f} ms, without {1e3 * b:.2f} ms: {b / a:.2f}x", "> 1x"


# -------------------------------------------------------------------------------------------------
# the machine and its libraries


def machine():
    """Name, memory, versions; and the memory of CUDA grows in place (fewer fragments)."""
    names = ("torch", "triton", "transformers", "vllm", "trl", "liger-kernel", "flash-attn-3")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    name = f"{platform.machine()} CPU, a rehearsal"
    if not CPU:
        part = torch.cuda.get_device_properties(0)
        name = f"{part.name}, {part.total_memory / budget.GIB:.1f} GiB, CUDA {torch.version.cuda}"
    yield True, f"{name}; Python {platform.python_version()}, {', '.join(versions)}", ""
    if CPU:
        raise LeftOut("needs CUDA")
    run.start_ranks()
    block = torch.empty(2**26, device=DEVICE)
    grows = any(part.get("is_expandable") for part in torch.cuda.memory_snapshot())
    yield grows and len(block) > 0, f"expandable: {grows}", "expandable: True"


def signatures():
    """The calls that the GPU's path makes exist with the names that it uses."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.attention.varlen import varlen_attn

    missing = []
    for call, names in (
        (varlen_attn, "cu_seq_q cu_seq_k max_q max_k scale window_size"),
        (fully_shard, "mesh mp_policy offload_policy ignored_params"),
        (torch.optim.AdamW, "fused"),
    ):
        have = inspect.signature(call).parameters
        missing += [f"{call.__name__}: {name}" for name in names.split() if name not in have]
    gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    told = f"varlen_attn has {'an' if gqa else 'no'} enable_gqa"
    yield not missing, ", ".join([told, *(f"missing {name}" for name in missing)]), "none missing"


# -------------------------------------------------------------------------------------------------
# kernels, against float32


def kernels():
    """token_logprobs in bf16, forward and backward, against the full logits in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE).bfloat16()
    weight = (torch.randn(VOCAB, HIDDEN, device=DEVICE) / HIDDEN**0.5).bfloat16()
    labels = torch.randint(4, VOCAB, (TOKENS,), device=DEVICE)
    banned = torch.tensor([0, 3], device=DEVICE)
    few = min(TOKENS, 256)
    for fused in (False, True):
        if fused and not logprobs.fused_runs(DEVICE):
            raise LeftOut("Triton's kernels do not run here: plain torch takes their place")
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprob, entropy = logprobs.token_logprobs(h, w, labels, 0.7, banned, fused=fused)
        logprob[:few].sum().backward()
        exact = hidden[:few].double().requires_grad_()
        logits = (exact @ weight.double().t() / 0.7).index_fill(1, banned, -torch.inf)
        p = logits.log_softmax(-1)
        want = p.gather(1, labels[:few, None])[:, 0]
        want.sum().backward()
        own = -torch.where(p > -1e9, p.exp() * p, 0.0).sum(-1)
        errors = {"log-probability": relative(logprob[:few], want.detach())}
        errors["entropy"] = relative(entropy[:few], own.detach())
        errors["d hidden"] = relative(h.grad[:few], exact.grad)
        yield close(errors, BF16)


def whole_attention(q, k, v, pieces, causal):
    """Attention of each piece by its definition: q (1, h, T, d), k, v (1, kv, T, d) in float32.

    `pieces`: (places of the queries, places of the keys); the last query is at the last key.
    """
    out = torch.zeros_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for at, keys in pieces:
        scores = q[:, :, at] @ k[:, :, keys].transpose(2, 3) / q.shape[-1] ** 0.5
        if causal:
            seen = torch.ones(len(at), len(keys), dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~seen.tril(len(keys) - len(at)), -torch.inf)
        out[:, :, at] = scores.softmax(-1) @ v[:, :, keys]
    return out.transpose(1, 2)  # (1, T, h, d)


def both_ways(attend, pieces, heads, kv, size, causal):
    """Our attention in bf16 against the definition in float32, forward and backward -> errors."""
    torch.manual_seed(0)
    total = 1 + max(int(at.max()) for at, _ in pieces)
    shapes = [(1, n, total, size) for n in (heads, kv, kv)]
    low = [torch.randn(s, device=DEVICE).bfloat16().requires_grad_() for s in shapes]
    high = [x.detach().float().requires_grad_() for x in low]
    out, want = attend(*low), whole_attention(*high, pieces, causal)
    turn = torch.randn_like(want)
    (out.float() * turn).sum().backward()
    (want * turn).sum().backward()
    pairs = zip(("out", "dq", "dk", "dv"), (out, *(x.grad for x in low)))
    return {
        name: relative(got.detach(), ref.detach())
        for (name, got), ref in zip(pairs, (want, *(x.grad for x in high)))
    }


def attention(size: int):
    """Packed attention: a shared prompt, pieces of one token, a sequence alone; a blank batch."""
    prompt, longest = (7, 20) if CPU else (300, 1500)
    for lengths, after in (
        ([prompt, 1, longest, 5, 1, prompt], [None, 0, 0, 0, None, None]),
        ([1], [None]),
    ):
        places = torch.arange(sum(lengths)).split(lengths)
        pieces = [
            (at, at if a is None else torch.cat([places[a], at])) for at, a in zip(places, after)
        ]
        layout = packing.Packing(lengths, after, DEVICE)

        def attend(q, k, v, layout=layout):
            return model.packed_attention(None, q, k, v, None, size**-0.5, layout)[0]

        yield close(both_ways(attend, pieces, 8, 2, size, True), BF16)


def vision(size: int):
    """The tower's attention: each image sees itself, in both directions."""
    lengths = [4, 16, 24] if CPU else [4, 64, 1024, 4096]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE)
    pieces = [(at, at) for at in torch.arange(sum(lengths)).split(lengths)]

    def attend(q, k, v):
        return model.vision_attention(None, q, k, v, None, size**-0.5, ends, max(lengths))[0]

    yield close(both_ways(attend, pieces, 4, 4, size, False), BF16)


# -------------------------------------------------------------------------------------------------
# the model, and the stages


def conversations(processor, answers=(40, 1, 25)):
    """Three toy questions: two answers share one, one has a question of its own."""
    prompts = [packing.encode(record, processor) for record in toy.problems(3, 0, "t")]
    ids = [[20 + i % 90 for i in range(n)] for n in answers]
    return [(prompts[0], ids[0]), (prompts[0], ids[1]), (prompts[1], ids[2])]


def sharded(**knobs):
    """The toy's model, sharded and in bf16, against the same on the CPU in float32."""
    nano.device.forced = False
    exact, processor = model.load(str(toy.BASE))
    batch = packing.pack(conversations(processor))
    want = exact(batch)[0].detach()
    nano.device.forced = CPU
    run.start_ranks()
    policy = model.load_sharded(str(toy.BASE), DEVICE, activation_checkpointing=True, **knobs)
    got, _ = policy(batch.to(DEVICE))
    got.sum().backward()
    norm = model.clip_gradients(policy, 1.0)
    errors = (got.detach().cpu() - want).abs()
    ok = errors.mean() < MODEL_BF16 and 0 < norm < float("inf")
    told = f"mean {errors.mean():.1e}, largest {errors.max():.1e}, gradient {norm:.0f}"
    yield ok, told, f"mean < {MODEL_BF16}, a finite gradient"


def toy_data(folder: Path) -> str:
    """Toy problems with a right answer each."""
    records = toy.problems(24 if CPU else 480, 5, "g")
    for record in records:
        sentence = f"I add them one by one . {record.answer}"
        record.response = f"<think> {sentence} </think> <answer> {record.answer} </answer>"
    data.write_parquet(folder / "toy.parquet", records)
    return str(folder / "toy.parquet")


def stages(folder: Path):
    """The toy from SFT to evaluation, each stage as a user calls it."""
    file, few = toy_data(folder), CPU
    base = ["--recipe", "toy", "--data", file]

    def call(script, *flags):
        command = [sys.executable, str(ROOT / script), *base, "--out", str(folder / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        if done.returncode:
            raise RuntimeError(f"{script}: {done.stderr[-1500:]}")
        return [json.loads(line) for line in open(folder / script / "log.jsonl")]

    size = ["--batch_size", "12", "--epochs", "1"] if few else ["--epochs", "3"]
    rows = call("sft.py", "--model", str(toy.BASE), *size)
    losses = f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f} in {len(rows)} steps"
    yield rows[-1]["loss"] < rows[0]["loss"], losses, "falls"
    steps, start = ("16x2x2" if few else "64x16x10"), str(folder / "sft.py" / "final")
    rows = call("grpo.py", "--model", start, "--stages", steps, "--questions", "2" if few else "8")
    gap = max(row["logprob_gap"] for row in rows)
    told = f"gap to the sampler {gap:.1e}, reward {rows[-1]['reward']:.2f}, {len(rows)} steps"
    yield gap < 0.05, told, "gap < 0.05"
    final = str(folder / "grpo.py" / "final")
    length = ["--max_len", "16", "--limit", "4"] if few else ["--max_len", "64", "--limit", "100"]
    rows = call("eval.py", "--model", final, *length)
    told = f"accuracy {rows[-1]['accuracy']:.2f}, format {rows[-1]['format_rate']:.2f}"
    yield 0 <= rows[-1]["accuracy"] <= 1, told, "ends"


def environment():
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if CPU else {}
    return os.environ | hidden | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}


# -------------------------------------------------------------------------------------------------
# the width of 3B and 7B


def published(size: str, layers: int):
    """The published config of a size with fewer layers; in the rehearsal also narrow."""
    config = budget.published_config(f"qwen2.5-vl-{size}")
    text, tower = config.text_config, config.vision_config
    text.num_hidden_layers, mrope = layers, [16, 24, 24]
    if CPU:
        text.num_hidden_layers, text.vocab_size, text.intermediate_size, mrope = (
            2,
            600,
            128,
            [4, 6, 6],
        )
        text.hidden_size = tower.out_hidden_size = 64
        text.num_attention_heads, text.num_key_value_heads = 2, 1
        tower.depth, tower.hidden_size, tower.intermediate_size, tower.num_heads = 2, 64, 128, 2
        tower.fullatt_block_indexes = [1]
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = dict(rope_type="default", rope_theta=1e6, mrope_section=mrope)
    return config


def random_policy(size: str, layers: int, **knobs):
    """A random model of this width as in training -> policy, processor."""
    if not dist.is_initialized():
        run.start_ranks()
    config, processor = published(size, layers), packing.Processor(str(toy.BASE))
    config.image_token_id = processor.image_token
    torch.manual_seed(0)
    with DEVICE:
        kind = dict(dtype=torch.float32, attn_implementation="sdpa")
        hf = AutoModelForImageTextToText.from_config(config, **kind)
    policy, _ = model.wrap(hf, str(toy.BASE), DEVICE)
    return model.shard(policy, DEVICE, **knobs), processor


def row_of_answers(processor):
    """A micro-batch as training packs it: answers to few questions, a picture each."""
    side = int(IMAGE**0.5) * 28
    pixels = {"shortest_edge": 28 * 28, "longest_edge": IMAGE * 28 * 28}
    processor.image_processor.size = pixels
    file, sequences = io.BytesIO(), []
    Image.effect_noise((side, side), 80).convert("RGB").save(file, "PNG")
    record = data.Record("q", "<image>Describe the picture .", "7", [file.getvalue()])
    while len(sequences) * ANSWER + IMAGE < ROW:
        if len(sequences) % 8 == 0:
            prompt = packing.encode(record, processor)
        sequences.append((prompt, [20 + i % 90 for i in range(ANSWER)]))
    batch = packing.pack(sequences[:-1], DEVICE)
    ones = torch.ones(len(batch.labels), device=DEVICE)
    batch.logprobs, batch.ref_logprobs = -ones, -ones
    batch.advantages, batch.weights = ones, ones / len(ones)
    return batch


def update(policy, batch, optimizer):
    """A GRPO update by Eq. 1 on one micro-batch."""
    loss, _ = grpo.policy_loss(policy(batch)[0], batch, grpo.Config())
    loss.backward()
    model.clip_gradients(policy, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def width(size: str):
    """Log-probabilities and an update: time, MFU, peak memory against nano/budget.py's table."""
    layers = LAYERS[size]
    if not CPU:
        room = torch.cuda.get_device_properties(0).total_memory / (80 * 1e9)
        layers = max(2, int(layers * min(1, room)))
    policy, processor = random_policy(size, layers, activation_checkpointing=True)
    batch = row_of_answers(processor)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    s = budget.shape(policy.hf.config)
    grids = batch.image_grid.tolist()
    flops = budget.flops(s, batch.packing.lengths, len(batch.labels), grids)

    def forward():
        with torch.no_grad():
            policy(batch)

    for call, count in (
        (forward, flops.forward),
        (functools.partial(update, policy, batch, optimizer), flops.training()),
    ):
        if not CPU:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(call)
        share = None if CPU else budget.mfu(count, took, DEVICE)
        told = f"{layers} layers, {len(batch.ids)} tokens: {took:.3f} s"
        told += ", its peak FLOPs are not known" if share is None else f", MFU {share:.0%}"
        yield True, told, "MFU 30 %"
    patches = int(batch.image_grid.prod(-1).sum())
    knobs = dict(cuda=not CPU, activation_checkpointing=True, reference="")
    want = budget.peak(budget.memory(s, len(batch.ids), patches, **knobs)) / budget.GIB
    if CPU:
        raise LeftOut(f"needs CUDA; the table says {want:.3f} GiB")
    got = torch.cuda.max_memory_allocated() / budget.GIB
    yield abs(got / want - 1) < 0.2, f"{got:.1f} GiB", f"{want:.1f} GiB within 20 %"


# -------------------------------------------------------------------------------------------------
# each speed item against doing without it


def gated(width_of_mlp):
    torch.manual_seed(0)
    x = torch.randn(TOKENS, width_of_mlp, device=DEVICE, dtype=torch.bfloat16)
    return x.requires_grad_(), torch.randn_like(x).requires_grad_()


def norms():
    """F.rms_norm against transformers' four element-wise kernels, forward and backward."""
    hf = AutoModelForImageTextToText.from_config(published("3b", 1), attn_implementation="sdpa")
    norm = hf.model.language_model.norm.to(DEVICE, torch.bfloat16)
    x = torch.randn(TOKENS, len(norm.weight), device=DEVICE).bfloat16().requires_grad_()
    error = relative(model.fast_norm(norm, x).detach(), norm(x).detach().float())
    ok, told, expected = versus(
        lambda: model.fast_norm(norm, x).sum().backward(), lambda: norm(x).sum().backward()
    )
    yield ok and error < BF16, f"{told}, difference {error:.1e}", expected


def patch_embedding():
    """One product against a Conv3d, forward and backward."""
    hf = AutoModelForImageTextToText.from_config(published("3b", 1), attn_implementation="sdpa")
    embed = hf.model.visual.patch_embed.to(DEVICE, torch.bfloat16)
    patches = torch.randn(TOKENS, embed.proj.weight[0].numel(), device=DEVICE)
    error = relative(model.linear_patches(embed, patches).detach(), embed(patches).detach().float())
    ok, told, expected = versus(
        lambda: model.linear_patches(embed, patches).sum().backward(),
        lambda: embed(patches).sum().backward(),
    )
    yield ok and error < BF16, f"{told}, difference {error:.1e}", expected


def fused_adamw():
    """AdamW in one kernel against one for each operation."""

    def stepper(fused):
        parameters = [
            torch.nn.Parameter(torch.zeros(HIDDEN, HIDDEN, device=DEVICE)) for _ in "1234"
        ]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return torch.optim.AdamW(parameters, fused=fused).step

    yield versus(stepper(True), stepper(False))


def cast_before_gather():
    """The weights for the sampler: in bf16 before they are gathered, against after."""
    policy, _ = random_policy("3b", 4)

    def early():
        for _ in model.full_weights(policy, torch.bfloat16):
            pass

    def late():
        for _, whole in model.full_weights(policy):
            whole.bfloat16()

    yield versus(early, late)


def training(**knobs):
    """An update at 7B's width with a setting, against the paper's recipe without it."""
    if CPU and knobs.get("compile"):
        raise LeftOut("compiling for a CPU takes a minute; tests/test_model.py does it")
    took = {}
    for name, more in (("with", knobs), ("without", {})):
        policy, processor = random_policy("7b", 4, **{"activation_checkpointing": True} | more)
        batch = row_of_answers(processor)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
        took[name] = seconds(functools.partial(update, policy, batch, optimizer))
        del policy, optimizer
    ratio = took["without"] / took["with"]
    yield True, f"{took['with']:.3f} s, without {took['without']:.3f} s: {ratio:.2f}x", "> 1x"


def old_pass():
    """What leaving out the old pass saves of a step with one epoch: one forward of five."""
    policy, processor = random_policy("7b", 4, activation_checkpointing=True)
    batch = row_of_answers(processor)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)

    def with_pass():
        with torch.no_grad():
            policy(batch)
        update(policy, batch, optimizer)

    yield versus(functools.partial(update, policy, batch, optimizer), with_pass)


def pictures():
    """Pictures prepared by threads, against one by one."""
    processor = packing.Processor(str(toy.BASE))
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2**20}
    side = 56 if CPU else 1024
    file = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(file, "PNG")
    records = [data.Record("q", "<image>Look .", "7", [file.getvalue()])] * (4 if CPU else 16)

    def threads():
        ahead = packing.Ahead(processor)
        ahead.start(dict(enumerate(records)))
        for i, record in enumerate(records):
            ahead.take(i, record)

    def serial():
        for record in records:
            packing.image_patches(record, processor)

    yield versus(threads, serial, 1)


def liger():
    """Liger's SwiGLU against transformers' (measure before it is chosen)."""
    need("liger_kernel")
    if CPU:
        raise LeftOut("needs CUDA")
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    a, b = gated(18944)
    yield versus(
        lambda: LigerSiLUMulFunction.apply(a, b).sum().backward(),
        lambda: (F.silu(a) * b).sum().backward(),
    )


def flash_attention_3():
    """FA3's kernels behind the same call, on GPUs of the Hopper family."""
    need("flash_attn_interface")
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    layout = packing.Packing([ROW // 4] * 4, None, DEVICE)
    q = torch.randn(1, 28, ROW // 4 * 4, 128, device=DEVICE, dtype=torch.bfloat16)
    k = q[:, :4].contiguous()

    def attend():
        model.packed_attention(None, q, k, k, None, 128**-0.5, layout)

    slow = seconds(attend)
    activate_flash_attention_impl("FA3")
    fast = seconds(attend)
    restore_flash_attention_impl()
    yield True, f"{1e3 * fast:.2f} ms, FA2 {1e3 * slow:.2f} ms: {slow / fast:.2f}x", "> 1x"


# -------------------------------------------------------------------------------------------------
# beside vLLM and TRL


def vllm():
    """vLLM in the training process, on the toy's model: what it frees, syncs, sees and samples."""
    need("vllm")
    run.start_ranks()
    from nano.vllm_engine import VLLMEngine

    nano.device.forced = False  # vLLM's CPU build computes in float32
    policy, processor = model.load(str(toy.BASE), DEVICE)
    model.shard(policy, DEVICE)
    free = (lambda: 0) if CPU else (lambda: torch.cuda.mem_get_info()[0] / budget.GIB)
    before = free()
    engine = VLLMEngine(str(toy.BASE), processor, 1024, DEVICE, memory=0.5)
    kept = before - free()
    yield kept < 4, f"asleep it keeps {kept:.1f} of {before:.1f} GiB", "< 4 GiB"
    engine.sync(policy)  # the first one compiles, and checks the probe
    limit = 1e-3 if CPU else 0.1
    yield engine.gap < limit, f"{engine.gap:.1e}", f"< {limit}"
    prompts = [packing.encode(record, processor) for record in toy.problems(8, 0, "t")]
    seeds, length = [(0, i) for i in range(8)], 16 if CPU else 512
    groups = engine.generate(prompts, 16, length, seeds)
    took = seconds(lambda: engine.sync(policy), 1)
    yield True, f"{took:.2f} s with the wake-up", ""
    pairs = [(sample.prompt, sample.ids) for group in groups for sample in group]
    with torch.no_grad():
        mine, _ = policy(packing.pack(pairs, DEVICE))
    theirs = torch.tensor([x for group in groups for sample in group for x in sample.logprobs])
    gap = (mine.cpu() - theirs).abs().mean().item()
    yield gap < limit, f"{gap:.1e}", f"< {limit}"
    own = rollout.TorchEngine(model.replica(policy), processor)
    own.sync(policy)
    rates = []
    for sample in (engine.sample, own.generate):
        began = time.perf_counter()
        groups = sample(prompts, 16, length, [(1, i) for i in range(8)])
        tokens = sum(answer.length for group in groups for answer in group)
        rates.append(tokens / (time.perf_counter() - began))
    yield True, "{:.0f} tokens/s, TorchEngine {:.0f}".format(*rates), ""
    engine.close()


def trl():
    """A whole GRPO step beside TRL's (bench/grpo_step.py)."""
    need("trl")
    size = ["--size", "tiny", "--completion", "16" if CPU else "128", "--rounds", "1"]
    command = [sys.executable, str(ROOT / "bench" / "grpo_step.py"), *size, "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    told = [line for line in done.stdout.splitlines() if line.startswith("TRL / ours")]
    yield True, "; ".join(told), "> 1x"


# -------------------------------------------------------------------------------------------------
# the table of checks, and the report

HERE = "sharded bf16 log-probabilities against the CPU's"
CHECKS = [  # a function, and the names of the rows that it yields in their order
    (machine, "machine", "CUDA's memory grows in place"),
    (signatures, "signatures"),
    (kernels, "log-prob kernels, plain torch", "log-prob kernels, Triton"),
    (
        functools.partial(attention, 80),
        "packed attention, head size 80",
        "blank batch, head size 80",
    ),
    (
        functools.partial(attention, 128),
        "packed attention, head size 128",
        "blank batch, head size 128",
    ),
    (functools.partial(vision, 80), "vision attention, head size 80"),
    (functools.partial(vision, 128), "vision attention, head size 128"),
    (sharded, HERE),
    (functools.partial(sharded, freeze_vision=True), f"{HERE}, frozen tower"),
    (functools.partial(sharded, offload=True), f"{HERE}, offloaded"),
    (stages, "toy SFT", "toy GRPO", "toy evaluation"),
    (functools.partial(width, "3b"), "3B log-probabilities", "3B update", "3B peak memory"),
    (
        functools.partial(width, "7b"),
        "7B-wide log-probabilities",
        "7B-wide update",
        "7B-wide peak memory",
    ),
    (norms, "A/B: fused RMSNorm"),
    (patch_embedding, "A/B: patch embedding as a product"),
    (fused_adamw, "A/B: fused AdamW"),
    (cast_before_gather, "A/B: cast before gather"),
    (old_pass, "A/B: no old pass"),
    (functools.partial(training, activation_checkpointing=False), "A/B: nothing recomputed"),
    (functools.partial(training, compile=True), "A/B: compiled MLPs"),
    (pictures, "A/B: pictures ahead"),
    (liger, "A/B: Liger's SwiGLU"),
    (flash_attention_3, "A/B: FlashAttention-3"),
    (vllm, "vLLM: sleep", "vLLM: probe", "vLLM: sync", "vLLM: rollouts", "vLLM: tokens/s"),
    (trl, "TRL beside it"),
]


def child(check, pipe):
    """Runs a check and sends its rows, then why it ended early (or None)."""
    if not CPU:
        torch.cuda.set_device(0)
    elif check is not signatures:  # the kernel's own signature is what is looked at there
        stand_in.install()
    log = os.open(os.environ["GPU_REPORT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)  # what the stages print is not part of the table
    os.dup2(log, 2)
    ended = None
    try:
        inner = getattr(check, "func", check)
        with tempfile.TemporaryDirectory() as folder:
            for row in check(*([Path(folder)] if inner is stages else [])):
                pipe.send(row)
    except LeftOut as reason:
        ended = ("left out", str(reason))
    except BaseException as error:  # also SystemExit: all of it belongs into the report
        traceback.print_exc()
        ended = ("failed", f"{type(error).__name__}: {error}"[:600])
    pipe.send(ended)
    pipe.close()
    os._exit(0)  # no clean-up of what a failed check may have left


def outcomes(check, names) -> list[dict]:
    """A row for each name, whatever becomes of the check."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(check, theirs))
    process.start()
    theirs.close()
    rows, ended, deadline = [], None, time.monotonic() + TIME_LIMIT
    try:
        while ours.poll(max(0, deadline - time.monotonic())):
            row = ours.recv()
            if row is None or len(row) == 2:
                ended = row
                break
            rows.append(row)
        else:
            ended = ("failed", f"no end after {TIME_LIMIT} s")
    except EOFError:
        ended = ("failed", "the process died (out of memory?)")
    process.kill()
    process.join()
    found = []
    for name, (good, figure, expected) in zip(names, rows):
        result = "ok" if good else "failed"
        found.append(dict(check=name, result=result, figure=figure, expected=expected))
    result, why = ended or ("failed", "the check gave no figure")
    for name in names[len(rows) :]:
        found.append(dict(check=name, result=result, figure=why, expected=""))
    return found


def table(rows: list[dict]) -> str:
    lines = ["| check | result | figure | expected |", "|---|---|---|---|"]
    for row in rows:
        cells = [str(row[k]).replace("|", "/").replace("\n", " ") for k in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="a rehearsal at tiny sizes")
    parser.add_argument("--out", default=".", help="folder of gpu-report.md and gpu-report.json")
    parser.add_argument("--only", default="", help="the checks whose name has this word")
    args = parser.parse_args()
    if not CPU and not torch.cuda.is_available():
        sys.exit("error: no GPU is here; python bench/gpu.py --cpu rehearses without one")
    out, rows, began = Path(args.out), [], time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["GPU_REPORT_LOG"] = str((out / "gpu-report.log").absolute())
    (out / "gpu-report.log").unlink(missing_ok=True)
    for check, *names in CHECKS:
        if args.only.lower() not in " ".join(names).lower():
            continue
        for row in outcomes(check, names):
            rows.append(row)
            print(" | ".join(str(cell) for cell in row.values() if cell), flush=True)
    minutes = (time.monotonic() - began) / 60
    count = {r: sum(row["result"] == r for row in rows) for r in ("ok", "failed", "left out")}
    summary = ", ".join(f"{n} {r}" for r, n in count.items()) + f" in {minutes:.1f} minutes"
    title = f"bench/gpu.py{' --cpu' * CPU}, {time.strftime('%Y-%m-%d')}: {summary}"
    (out / "gpu-report.json").write_text(json.dumps(dict(title=title, rows=rows), indent=1) + "\n")
    (out / "gpu-report.md").write_text(f"{title}\n\n{table(rows)}\n")
    print(f"{title}\nthe report: {out / 'gpu-report.md'}; what the checks printed: gpu-report.log")
    sys.exit(count["failed"] > 0)


if __name__ == "__main__":
    main()
