"""The GPU's path, on the CPU: bf16 over float32 masters, the GPU's attention with a strict stand-in
for the kernel. Each case is a process of its own, since transformers remembers attention names.
"""

import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, alone, environment, torchrun

import grpo
import model
import toy
from nano import packing

PRELUDE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]
import json
from dataclasses import replace
from pathlib import Path
import torch
import stand_in

stand_in.install()
import torch.distributed as dist
import grpo, model, nano.device, sft, toy
from nano import budget, packing, run
from nano.rollout import TorchEngine

folder = sys.argv[1]
"""

FORWARD = """
run.start_ranks()
frozen, checkpointing, offload, shard_size = map(int, sys.argv[2:6])
policy = model.load_sharded(
    folder,
    "cpu",
    freeze_vision=bool(frozen),
    activation_checkpointing=bool(checkpointing),
    shard_size=shard_size,
)
knobs = dict(freeze_vision=True, offload=bool(offload))
reference = model.load_sharded(folder, "cpu", torch.bfloat16, **knobs)
processor = packing.Processor(folder)
prompts = [packing.encode(record, processor) for record in toy.problems(3, 0, "t")]
if frozen:
    model.encode_once(policy, prompts, "cpu")
    assert prompts[0].features[0][0].dtype == torch.bfloat16
answers = [[20, 21, 22], [23], [24, 25, 26, 27]]
shared = [(prompts[0], answers[0]), (prompts[0], answers[1]), (prompts[1], answers[2])]
for sequences in (shared, [packing.blank(processor)]):
    batch = packing.pack(sequences)
    logprobs, _ = policy(batch)
    with torch.no_grad():
        low, _ = reference(batch)
    logprobs.sum().backward()
    if len(logprobs):
        torch.save((logprobs.detach(), low), sys.argv[6])
norm = model.clip_gradients(policy, 1.0)
assert 0 < norm < float("inf")
optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
model.rehearse(policy, optimizer, packing.pack(shared), reference=reference)
assert budget.shape(policy.hf.config).params > 1e6
"""

SAMPLE = """
run.start_ranks()
whole, _ = model.load(folder, dtype=torch.float32)
for part, x in (
    (whole.visual.patch_embed, torch.randn(7, whole.visual.patch_embed.proj.weight[0].numel())),
    (whole.hf.model.language_model.norm, torch.randn(7, 128)),
):
    theirs = type(part).forward(part, x)
    assert part(x).shape == theirs.shape and torch.allclose(part(x), theirs, atol=1e-5)

policy = model.load_sharded(folder, "cpu")
engine = TorchEngine(model.replica(policy), packing.Processor(folder))
engine.sync(policy)
prompts = [packing.encode(record, engine.processor) for record in toy.problems(3, 0, "t")]
groups = engine.generate(prompts, 2, 8, [(0, i) for i in range(3)])
with torch.no_grad():
    pairs = [(s.prompt, s.ids) for group in groups for s in group]
    mine, _ = policy(packing.pack(pairs))
theirs = torch.tensor([x for group in groups for s in group for x in s.logprobs])
assert (mine - theirs).abs().max() < 0.1, (mine - theirs).abs().max()
model.export(policy, engine.processor, sys.argv[2])
assert model.load(sys.argv[2])

# What vLLM gets: all weights once, whole, in bf16, in small lists. vLLM itself is not needed here.
import types
from unittest.mock import MagicMock
for name in (
    "vllm",
    "vllm.distributed.weight_transfer",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.model_loader",
    "vllm.v1.sample.logits_processor",
    "vllm.v1.worker.gpu.sample.logits_processor",
):
    sys.modules[name] = MagicMock()
    for kind in ("LogitsProcessor", "WeightTransferEngine"):
        setattr(sys.modules[name], kind, type(kind, (), {}))
from nano.vllm_engine import buckets

lists = list(buckets(policy, torch.bfloat16, 50_000))
sent = {name: tensor for bucket in lists for name, tensor in bucket}
want = dict(whole.hf.named_parameters())
assert sent.keys() == want.keys() and sum(map(len, lists)) == len(want) and len(lists) > 3
for name, tensor in sent.items():
    assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, want[name].bfloat16()), name
"""

STAGES = """
problems, out = sys.argv[2], Path(sys.argv[3])
own = ["--preflight", "True", "--seed", "1", "--micro_tokens", "600", *sys.argv[4:]]


def stage(module, name, *flags):
    words = ["--recipe", "toy", "--data", problems, "--out", str(out / name), *own, *flags]
    module.main(run.parse_config(module.Config, module.RECIPES, words))
    if dist.is_initialized():
        dist.destroy_process_group()
    return [json.loads(line) for line in open(out / name / "log.jsonl")]


tune = ("--batch_size", "10", "--epochs", "1", "--model", folder)
low = stage(sft, "sft", *tune)
more = ("--stages", "12x4x2", "--questions", "4", "--lr", "1e-3")
rows = stage(grpo, "grpo", "--model", str(out / "sft" / "final"), *more)
assert max(row["logprob_gap"] for row in rows) < 0.03
assert all(0 < row["grad_norm"] < 1e4 for row in rows if row["zero_var_groups"] < 4)
nano.device.forced = False
exact = stage(sft, "exact", *tune)
assert len(exact) == len(low) == 4
for one, other in zip(low, exact):
    assert abs(one["loss"] - other["loss"]) < 0.03, (one["loss"], other["loss"])
"""


def passes(script, *words, ranks=1, file=None):
    call = [sys.executable, "-c", PRELUDE + script]
    if ranks > 1:
        file.write_text(PRELUDE + script)
        call = [*torchrun(ranks), str(file)]
    call += map(str, words)
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "frozen, checkpointing, offload, ranks", [(1, 0, 0, 1), (0, 1, 1, 1), (0, 1, 0, 2)]
)
def test_logprobs_are_those_of_float32_up_to_rounding(
    tiny, tmp_path, frozen, checkpointing, offload, ranks
):
    """With two ranks each has a copy of its own (HSDP)."""
    file = tmp_path / "logprobs.pt"
    words = (tiny, frozen, checkpointing, offload, ranks // 2, file)
    passes(FORWARD, *words, ranks=ranks, file=tmp_path / "script.py")
    logprobs, low = torch.load(file)
    policy, processor = model.load(tiny)
    prompts = [packing.encode(record, processor) for record in toy.problems(3, 0, "t")]
    answers = [[20, 21, 22], [23], [24, 25, 26, 27]]
    shared = [(prompts[0], answers[0]), (prompts[0], answers[1]), (prompts[1], answers[2])]
    with torch.no_grad():
        want, _ = policy(packing.pack(shared))
    assert (logprobs - want).abs().max() < 0.03
    assert (low - want).abs().max() < 0.03


def test_the_replica_samples_what_the_trainer_sees_and_the_export_loads(tiny, tmp_path):
    passes(SAMPLE, tiny, tmp_path / "export")


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze_vision", "True"],
        ["--freeze_vision", "False", "--activation_checkpointing", "True"],
        ["--lora_rank", "4", "--lora_vision", "True", "--activation_checkpointing", "True"],
    ],
)
def test_sft_and_grpo_take_their_steps(tiny, problem_file, tmp_path, flags):
    passes(STAGES, tiny, problem_file, tmp_path, *flags)


# ---- what a step holds on the device, seen on the CPU


@pytest.mark.parametrize("minibatches", [1, 2])
def test_one_micro_batch_at_a_time_is_on_the_device_and_the_first_has_no_old_pass(
    problem_file, tmp_path, monkeypatch, minibatches
):
    moved, alive, waiting = [], [], []
    forward, cut = model.Policy.forward, packing.batches

    def to(batch, device):
        copy = replace(batch)
        moved.append(weakref.ref(copy))
        alive.append(sum(ref() is not None for ref in moved))
        return copy

    def counted(policy, batch, *more):
        trained = any(p.requires_grad for p in policy.parameters())
        passes_of["old" if trained else "reference"] += not torch.is_grad_enabled()
        passes_of["update"] += torch.is_grad_enabled()
        return forward(policy, batch, *more)

    passes_of = Counter()
    monkeypatch.setattr(packing.Batch, "to", to)
    monkeypatch.setattr(model.Policy, "forward", counted)
    monkeypatch.setattr(packing, "batches", lambda *a: waiting.append(cut(*a)) or waiting[-1])
    small = dict(recipe="toy-zero", model=ROOT / "toy" / "base", data=problem_file)
    small |= dict(stages="8x4x1", questions=4, micro_tokens=150, preflight=False)
    alone(grpo, out=tmp_path / "run", minibatches=minibatches, **small)
    sizes = [len(part) for part in waiting]
    assert len(sizes) == minibatches and min(sizes) > 1
    assert len(moved) == 2 * sum(sizes) and max(alive) <= 3
    assert passes_of == dict(reference=sum(sizes), update=sum(sizes), old=sum(sizes[1:]))


def test_the_rehearsed_row_is_as_full_as_a_micro_batch(problem_file, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(model, "rehearse", lambda policy, optimizer, batch, *_: rows.append(batch))
    small = dict(recipe="toy-zero", model=ROOT / "toy" / "base", data=problem_file)
    alone(grpo, out=tmp_path / "run", stages="8x4x1", questions=8, micro_tokens=500, **small)
    lengths = rows[0].packing.lengths
    assert max(lengths) < 150 and 500 - max(lengths) < sum(lengths) <= 500
