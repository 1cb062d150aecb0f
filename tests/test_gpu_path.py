"""The GPU's path, on the CPU: bf16 over float32 masters, the GPU's attention with a strict stand-in
for the kernel. Each case is a process of its own, since transformers remembers attention names.
"""

import subprocess
import sys

import pytest
from conftest import ROOT, environment

PRELUDE = f"""
import copy, sys, types
sys.path[:0] = [{str(ROOT)!r}]
import torch
import torch.nn.functional as F
import torch.nn.attention
import nano.device

nano.device.forced = True


def varlen_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    \"\"\"What the flash attention kernel computes, and refuses.\"\"\"
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16), q.dtype
    assert all(x.is_contiguous() and x.shape[-1] % 8 == 0 for x in (q, k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths_q), max(lengths_k)) and type(max_q) is int
    assert min(lengths_q) > 0 and (enable_gqa or q.shape[1] == k.shape[1])
    outs = []
    for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        mask = None
        if window_size == (-1, 0):  # causal, aligned at the bottom right
            mask = torch.ones(len(a), len(b), dtype=torch.bool).tril(len(b) - len(a))
        a, b, c = (x.transpose(0, 1)[None].float() for x in (a, b, c))
        out = F.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outs)


sys.modules["torch.nn.attention.varlen"] = types.SimpleNamespace(varlen_attn=varlen_attn)
import torch.distributed as dist
import model, toy
from nano import budget, packing, run
from nano.rollout import TorchEngine

run.start_ranks()
folder = sys.argv[1]
"""

FORWARD = """
frozen, checkpointing = sys.argv[2] == "True", sys.argv[3] == "True"
policy = model.load_sharded(
    folder, "cpu", freeze_vision=frozen, activation_checkpointing=checkpointing
)
reference = model.load_sharded(folder, "cpu", torch.bfloat16, freeze_vision=True)
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
        torch.save((logprobs.detach(), low), sys.argv[4])
norm = model.clip_gradients(policy, 1.0)
assert 0 < norm < float("inf")
optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
model.rehearse(policy, optimizer, packing.pack(shared), reference=reference)
assert budget.shape(policy.hf.config).params > 1e6
"""

SAMPLE = """
whole, _ = model.load(folder, dtype=torch.float32)
embed = whole.visual.patch_embed
pixels = torch.randn(7, embed.proj.weight[0].numel())
conv = type(embed).forward(embed, pixels)
assert embed(pixels).shape == conv.shape and torch.allclose(embed(pixels), conv, atol=1e-5)

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
"""


def passes(script, *words):
    call = [sys.executable, "-c", PRELUDE + script, *map(str, words)]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("frozen, checkpointing", [(True, False), (False, True)])
def test_logprobs_are_those_of_float32_up_to_rounding(tiny, tmp_path, frozen, checkpointing):
    import torch

    import model
    import toy
    from nano import packing

    passes(FORWARD, tiny, frozen, checkpointing, tmp_path / "logprobs.pt")
    logprobs, low = torch.load(tmp_path / "logprobs.pt")
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
