"""who computes what (packing.py): balanced ranks and micro-batches, against all possibilities; gradients of any split are one."""

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, single_rank

import model
import toy
from nano import packing

# four ranks, started once; every case is a budget of tokens and knobs of load_sharded
GRADIENTS = """
import json, sys
import torch
sys.path[:0] = [ROOT, ROOT + "/tests"]
import torch.distributed as dist
import model
from nano import packing, run
from test_balance import case

folder, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
run.start_ranks()
rank, world = dist.get_rank(), dist.get_world_size()
processor = model.Processor(folder)
mine = case(processor)[rank::world]
tokens = run.all_sum({"n": sum(len(ids) for _, ids in mine)})["n"]
for i, (budget, knobs) in enumerate(cases):
    policy = model.load_sharded(folder, "cpu", **knobs)
    for part in packing.micro_batches([len(p.ids) + len(ids) for p, ids in mine], budget, 64):
        batch = packing.pack(mine[part] or [packing.blank(processor)])
        (-policy(batch)[0].sum() / tokens * world).backward()
    grads = {model.clean_name(n): model.full(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(grads, f"{out}/{i}.pt")
dist.barrier()
dist.destroy_process_group()
"""
CASES = [
    (10**6, {}),
    (
        90,
        {"activation_checkpointing": True},
    ),  # a rank has a micro-batch without an image while the others encode one
    (200, {"shard_size": 1}),  # HSDP: four copies of the weights
    (300, {"shard_size": 2}),
    (400, {"freeze_vision": True}),
]


def case(processor):
    """9 sequences of uneven length: three share a prompt, one has no image, so that a micro-batch without one comes about"""
    import io

    from PIL import Image

    from nano.data import Record

    rng = random.Random(4)
    records = toy.problems(4, 0, "b")
    for record, size in zip(records, [(56, 84), (28, 28), (140, 56)]):
        out = io.BytesIO()
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(
            out, "PNG"
        )  # the same in every process
        record.images = [out.getvalue()]
    records.append(Record("none", "Add 2 and 3 .", "5", []))
    torch.manual_seed(0)
    prompts = [packing.encode(r, processor) for r in records]
    prompts = [prompts[i] for i in (0, 0, 0, 1, 2, 3, 4, 4, 1)]
    return [(p, [rng.randint(10, 400) for _ in range(rng.choice([1, 5, 40, 90]))]) for p in prompts]


@pytest.fixture(scope="module")
def one_by_one(tiny):
    """gradients of the mean over tokens, each sequence alone in its batch, no sharding"""
    policy, processor = model.load(tiny)
    sequences = case(processor)
    tokens = sum(len(ids) for _, ids in sequences)
    for sequence in sequences:
        (-policy(packing.pack([sequence]))[0].sum() / tokens).backward()
    return {n: p.grad for n, p in policy.named_parameters()}


def test_gradients_do_not_depend_on_ranks_shards_and_micro_batches(tiny, tmp_path, one_by_one):
    script = tmp_path / "gradients.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n" + GRADIENTS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
        str(script),
        tiny,
        str(tmp_path),
        json.dumps(CASES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr  # whole: the reason comes first
    for i, (_, knobs) in enumerate(CASES):
        grads = torch.load(tmp_path / f"{i}.pt")
        want = {
            n: g
            for n, g in one_by_one.items()
            if not (knobs.get("freeze_vision") and ".visual." in n)
        }
        assert grads.keys() == want.keys()
        for name in want:
            assert (grads[name] - want[name]).abs().max() <= 1e-5 * max(
                1, want[name].abs().max()
            ), (knobs, name)


def test_micro_batches_are_the_best_cut_within_the_budget():
    """in order, nothing lost, as few as the budget allows, and of all such cuts the one whose dearest slice is cheapest"""
    single_rank()
    rng = random.Random(0)
    for _ in range(60):
        n, width = rng.randint(1, 8), rng.choice([1, 4, 1000])
        lengths, budget = [rng.randint(1, 100) for _ in range(n)], rng.randint(80, 250)
        slices = packing.micro_batches(lengths, budget, width)
        assert [i for s in slices for i in range(n)[s]] == list(range(n))
        possible = {}
        for cuts in itertools.product([0, 1], repeat=n - 1):
            ends = [i + 1 for i, c in enumerate(cuts) if c] + [n]
            parts = [lengths[a:b] for a, b in zip([0, *ends], ends)]
            if all(len(p) == 1 or sum(p) <= budget for p in parts):
                dearest = max(sum(packing.work(x, width) for x in p) for p in parts)
                possible[len(parts)] = min(dearest, possible.get(len(parts), dearest))
        assert len(slices) == min(possible)
        dearest = max(sum(packing.work(x, width) for x in lengths[s]) for s in slices)
        assert dearest == pytest.approx(possible[min(possible)], rel=1e-6)
    assert packing.micro_batches([], 100, 1) == [slice(0, 0)]


def test_ranks_get_nearly_the_same_work_and_few_groups_move():
    rng = random.Random(1)
    for _ in range(50):
        ranks = rng.choice([2, 4, 8])
        owners = [i % ranks for i in range(16 * ranks)]
        costs = [rng.lognormvariate(0, 0.5) for _ in owners]
        new = packing.rebalance(costs, owners, ranks)
        loads = [sum(c for c, o in zip(costs, new) if o == r) for r in range(ranks)]
        assert max(loads) / (sum(costs) / ranks) < 1.06
        assert sum(a != b for a, b in zip(owners, new)) <= len(owners) / 4
    assert packing.rebalance([3.0, 3.0], [0, 1], 2) == [0, 1]
    assert packing.rebalance([1.0] * 4, [0, 0, 0, 0], 2).count(1) == 2
    assert packing.rebalance([], [], 3) == []


def test_attention_doubles_the_price_of_a_token_at_12_widths():
    """work() against a count of FLOPs: 12 width^2 weights per layer, and the scores and sums of a causal attention"""
    for width, tokens in [(64, 100), (3584, 8192)]:
        attention = sum(2 * 2 * width * (i + 1) for i in range(tokens))
        products = 2 * 12 * width * width * tokens
        assert packing.work(tokens, width) / tokens == pytest.approx(
            (attention + products) / products, rel=1e-3 + 1 / tokens
        )
