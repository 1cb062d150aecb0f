"""nano/packing.py, who computes what: balanced ranks and micro-batches against all possibilities;
the gradients of any split are one."""

import io
import itertools
import json
import random
import subprocess

import pytest
import torch
from conftest import ROOT, environment, single_rank, torchrun
from PIL import Image

import model
import toy
from nano import packing
from nano.data import Record
from nano.rollout import Sample

RANKS = 4

# These ranks are started once. A case is a budget of tokens and knobs of load_sharded.
SCRIPT = """
import json, sys
import torch
sys.path[:0] = [ROOT, ROOT + "/tests"]
import torch.distributed as dist
import model
from nano import packing, run
from test_balance import case, groups_of, told

folder, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
run.start_ranks()
rank, world = dist.get_rank(), dist.get_world_size()
processor = packing.Processor(folder)

asked = []
def encode(number):
    asked.append(number)
    return packing.Prompt(str(number), [1] * number, None, None, None, None, number)
own = groups_of(range(rank, 12, world), encode)
asked.clear()
groups = packing.balance(own, 64, encode)
moved = [g[0].prompt.number for g in groups if g[0].prompt.number % world != rank]
assert sorted(asked) == moved, (asked, moved)
json.dump(told(groups), open(f"{out}/groups-{rank}.json", "w"))

mine = case(processor)[rank::world]
tokens = run.all_sum({"n": sum(len(ids) for _, ids in mine)})["n"]
for i, (budget, knobs) in enumerate(cases):
    policy = model.load_sharded(folder, "cpu", **knobs)
    for part in packing.micro_batches([len(p.ids) + len(ids) for p, ids in mine], budget, 64):
        batch = packing.pack(mine[part] or [packing.blank(processor)])
        (-policy(batch)[0].sum() / tokens * world).backward()
    trained = [(n, p) for n, p in policy.named_parameters() if p.grad is not None]
    grads = {model.clean_name(n): model.full(p.grad) for n, p in trained}
    if rank == 0:
        torch.save(grads, f"{out}/{i}.pt")
dist.barrier()
dist.destroy_process_group()
"""
CASES = [
    (10**6, {}),
    # A rank has a micro-batch without an image while the others encode one.
    (90, {"activation_checkpointing": True}),
    (200, {"shard_size": 1}),  # HSDP: four copies of the weights
    (300, {"shard_size": 2}),
    (400, {"freeze_vision": True}),
]


def case(processor):
    """Nine sequences of uneven length: three share a prompt, and one has no image, so that a
    micro-batch without one comes about. They are the same in every process."""
    rng = random.Random(4)
    records = toy.problems(4, 0, "b")
    for record, size in zip(records, [(56, 84), (28, 28), (140, 56)]):
        out = io.BytesIO()
        noise = rng.randbytes(3 * size[0] * size[1])
        Image.frombytes("RGB", size, noise).save(out, "PNG")
        record.images = [out.getvalue()]
    records.append(Record("none", "Add 2 and 3 .", "5", []))
    prompts = [packing.encode(r, processor) for r in records]
    prompts = [prompts[i] for i in (0, 0, 0, 1, 2, 3, 4, 4, 1)]
    return [(p, [rng.randint(10, 400) for _ in range(rng.choice([1, 5, 40, 90]))]) for p in prompts]


def groups_of(numbers, encode):
    """Three Samples for each question; later questions have longer prompts and answers."""
    groups = []
    for number in numbers:
        prompt, group = encode(number), []
        for i in range(3):
            ids = [number, i] * (1 + number * number)
            logprobs = [-number - i / 10] * len(ids)
            sample = Sample(prompt, ids, logprobs, "stop", f"{number} {i}", score=[number])
            sample.reward, sample.advantage, sample.weight = i, [number] * len(ids), 1 / len(ids)
            group.append(sample)
        groups.append(group)
    return groups


def told(groups):
    """All that a Sample carries, as plain values."""
    return [[vars(s) | {"prompt": [s.prompt.record, s.prompt.number]} for s in g] for g in groups]


@pytest.fixture(scope="module")
def one_by_one(tiny):
    """Gradients of the mean over tokens, each sequence alone in its batch, without sharding."""
    policy, processor = model.load(tiny)
    sequences = case(processor)
    tokens = sum(len(ids) for _, ids in sequences)
    for sequence in sequences:
        (-policy(packing.pack([sequence]))[0].sum() / tokens).backward()
    return {n: p.grad for n, p in policy.named_parameters()}


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    """The folder with what the ranks of the script have written."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(f"ROOT = {str(ROOT)!r}\n" + SCRIPT)
    call = [*torchrun(RANKS), str(folder / "script.py"), tiny, str(folder), json.dumps(CASES)]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gradients_do_not_depend_on_ranks_shards_and_micro_batches(number, ranks, one_by_one):
    frozen = CASES[number][1].get("freeze_vision")
    want = {n: g for n, g in one_by_one.items() if not (frozen and ".visual." in n)}
    grads = torch.load(ranks / f"{number}.pt")
    assert grads.keys() == want.keys()
    for name in want:
        error = (grads[name] - want[name]).abs().max()
        assert error <= 1e-5 * max(1, want[name].abs().max()), name


def test_balanced_groups_come_whole_once_and_with_their_prompt(ranks):
    """Nothing that a Sample carries is lost on the way, and the work is nearly even afterwards."""
    parts = [json.load(open(ranks / f"groups-{rank}.json")) for rank in range(RANKS)]
    groups = [group for part in parts for group in part]

    def encode(number):
        return packing.Prompt(str(number), [1] * number, None, None, None, None, number)

    before = groups_of(range(12), encode)
    assert sorted(groups, key=lambda g: g[0]["prompt"][1]) == told(before)
    for part in parts:  # in the order of the questions, so that a resume packs the same rows
        numbers = [group[0]["prompt"][1] for group in part]
        assert numbers == sorted(numbers)

    def loads(shares):
        return [
            sum(packing.work(n + len(s.ids), 64) for n in share for s in before[n])
            for share in shares
        ]

    after = loads([[group[0]["prompt"][1] for group in part] for part in parts])
    first = loads([range(rank, 12, RANKS) for rank in range(RANKS)])
    assert max(after) < max(first)


def test_one_rank_keeps_its_groups():
    single_rank()
    groups = [["a"], ["b"]]
    assert packing.balance(groups, 64, None) is groups


def test_batches_hold_every_sample_once_with_its_numbers(tiny):
    """A batch's fields are those of its tokens, whatever the budget; nothing but tokens counts."""
    single_rank()
    processor = packing.Processor(tiny)
    samples = []
    for i, (prompt, ids) in enumerate(case(processor)):
        logprobs = [-i - t / 100 for t in range(len(ids))]
        samples.append(Sample(prompt, ids, logprobs, "stop", ""))
        samples[-1].advantage = float(i) if i % 2 else logprobs
        samples[-1].weight = i / 10
    for budget in (1, 150, 10**6):
        made = packing.batches(samples, budget, 64, processor)
        sizes = [len(s.prompt.ids) + len(s.ids) for s in samples]
        assert len(made) == {1: len(samples), 10**6: 1}.get(budget, len(made))
        assert all(len(b.ids) <= max(budget, *sizes) for b in made)
        want = dict(labels=[], logprobs=[], advantages=[], weights=[])
        for s in samples:
            many = isinstance(s.advantage, list)
            want["labels"] += s.ids
            want["logprobs"] += s.logprobs
            want["advantages"] += s.advantage if many else [s.advantage] * len(s.ids)
            want["weights"] += [s.weight] * len(s.ids)
        for name, values in want.items():
            got = torch.cat([getattr(b, name) for b in made]).tolist()
            assert got == pytest.approx(values), (budget, name)
    (empty,) = packing.batches([], 100, 64, processor)
    assert len(empty.labels) == len(empty.weights) == 0


def test_micro_batches_are_the_best_cut_within_the_budget():
    """In order, with nothing lost, as few as the budget allows, and of all such cuts the one whose
    dearest slice is cheapest."""
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
    assert packing.rebalance([0.0, 0.0], [0, 1], 2) == [0, 1]  # all records of a step are broken


def test_attention_doubles_the_price_of_a_token_at_12_widths():
    """A count of FLOPs: 12 width^2 weights a layer, a causal attention's scores and sums."""
    for width, tokens in [(64, 100), (3584, 8192)]:
        attention = sum(2 * 2 * width * (i + 1) for i in range(tokens))
        products = 2 * 12 * width * width * tokens
        want = (attention + products) / products
        assert packing.work(tokens, width) / tokens == pytest.approx(want, rel=1e-3 + 1 / tokens)
