"""sft.py: its loss and its schedule against transformers, its runs against each other."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, single_rank
from test_grpo import kill_all
from transformers import AutoModelForImageTextToText, get_cosine_schedule_with_warmup

import model
import sft
import toy
from nano import data, packing, run, steps


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """right chains of the toy's reasoner, as records with images in a parquet file"""
    import base64

    path, records = tmp_path_factory.mktemp("chains") / "chains.parquet", toy.problems(50, 9, "s")
    for r in records:
        url = "data:image/png;base64," + base64.b64encode(r.images[0]).decode()
        ask = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": f"description {r.problem} Reasoning :"},
        ]
        told = toy.MLLM().chat([{"role": "user", "content": ask}])
        r.response = (
            toy.Reasoner().chat([{"role": "user", "content": f"{told} {r.problem}"}])
            + " <answer> 1 </answer>"
        )
    data.write_parquet(path, records)
    return path


def command(out, chains, ranks=1, **flags):
    flags = (
        dict(
            model=ROOT / "toy" / "base",
            data=chains,
            out=out,
            epochs=2,
            batch_size=8,
            save_every=100,
            lr=1e-4,
        )
        | flags
    )
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
    return [
        *launch,
        str(ROOT / "sft.py"),
        "--recipe",
        "toy",
        *[w for k, v in flags.items() for w in (f"--{k}", str(v))],
    ]


def run_sft(*args, **flags):
    done = subprocess.run(
        command(*args, **flags),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_here(out, chains, **flags):
    """the same in this process, on one rank: quicker, since nothing is imported again"""
    if dist.is_initialized():
        dist.destroy_process_group()
    while run.locks:
        run.locks.pop().close()
    sft.main(run.parse_config(sft.Config, sft.RECIPES, command(out, chains, **flags)[2:]))


def log_of(out):
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if k not in ("tokens_per_s", "t_data", "t_total", "mem_peak")
        }
        for line in open(out / "log.jsonl")
    ]


def weights_of(out):
    from safetensors.torch import load_file

    return load_file(out / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, chains):
    out = tmp_path_factory.mktemp("one")
    run_here(out, chains)
    return out


def test_first_loss_is_that_of_transformers_one_by_one(one_rank, chains):
    """no packing, transformers' own forward; mean over response tokens"""
    records, _ = data.read(chains)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    loss, _, count = one_by_one(ROOT / "toy" / "base", [records[i] for i in order[:8]])
    first = log_of(one_rank)[0]
    assert first["tokens"] == count and first["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_loss_falls_and_every_epoch_covers_all(one_rank):
    rows = log_of(one_rank)
    assert [r["step"] for r in rows] == list(range(1, 15)) and rows[-1]["loss"] < rows[0][
        "loss"
    ] - 0.3
    assert sum(r["tokens"] for r in rows[:7]) == sum(r["tokens"] for r in rows[7:])


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_the_schedule_is_the_cosine_of_transformers():
    config = sft.Config(lr=3e-4, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    optimizer.step()
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(99):
        theirs.step()  # it starts at a rate of 0; ours is one warm-up step ahead
        if step < 9:
            assert sft.learning_rate(step, 100, config) == pytest.approx(
                optimizer.param_groups[0]["lr"]
            )
    assert sft.learning_rate(10, 100, config) == pytest.approx(3e-4) and sft.learning_rate(
        55, 100, config
    ) == pytest.approx(1.5e-4)
    assert sft.learning_rate(99, 100, config) < 3e-6


def test_two_ranks_are_one_rank(one_rank, chains, tmp_path):
    run_sft(tmp_path, chains, ranks=2, micro_tokens=300, workers=1)
    for a, b in zip(log_of(one_rank), log_of(tmp_path), strict=True):
        assert all(a[k] == b[k] or a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) for k in a), (
            a,
            b,
        )
    a, b = weights_of(one_rank), weights_of(tmp_path)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


def test_only_how_may_change_on_resume(one_rank, chains, tmp_path):
    out = shutil.copytree(one_rank, tmp_path / "out")
    for changed in ({"lr": 2e-4}, {"epochs": 3}, {"weight_decay": 0.1}):
        name = next(iter(changed))
        with pytest.raises(SystemExit, match=f"holds a run with {name} = "):
            run_here(out, chains, **changed)
    run_here(out, chains, micro_tokens=300, save_every=7)  # nothing is left to do
    assert log_of(out) == log_of(one_rank)


def test_files_without_a_record_to_train_on_are_named(chains, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps(dict(id="a", problem="1 + 1", answer="2")) + "\n")
    for flags in (dict(data=empty), dict(eval_data=empty)):
        with pytest.raises(SystemExit, match="empty.jsonl: no record with a response"):
            run_here(tmp_path / "out", chains, **flags)
    with pytest.raises(SystemExit, match="holdout 50 leaves none of 50 records"):
        run_here(tmp_path / "other", chains, holdout=50)


def test_held_out_records_of_a_file_of_their_own(chains, tmp_path):
    config = sft.Config(data=str(chains), eval_data=str(chains), holdout=7)
    spans, held = steps.shelve(config, tmp_path / "records.pkl")
    want = [r.id for r in data.read(chains)[0]]
    for which in (spans, held):
        part = steps.Steps(tmp_path / "records.pkl", which, None, config, 128)
        assert [part.record(i).id for i in range(len(which))] == want


def test_killed_in_mid_epoch_and_resumed_is_uninterrupted(one_rank, chains, tmp_path):
    """with worker processes before and after, without them in the run that is compared"""
    p = subprocess.Popen(
        command(tmp_path, chains, workers=2, save_every=3),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = tmp_path / "log.jsonl", time.time() + 120
    while (
        p.poll() is None
        and time.time() < deadline
        and not (log.exists() and log.read_bytes().count(b"\n") >= 5)
    ):
        time.sleep(0.01)
    kill_all(str(tmp_path))
    p.wait()
    assert p.returncode == -signal.SIGKILL and not (tmp_path / "final").exists()
    assert "resumed after step" in run_sft(tmp_path, chains, workers=2, save_every=3)
    assert log_of(tmp_path) == log_of(one_rank)
    a, b = weights_of(one_rank), weights_of(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a)


def one_by_one(folder, records):
    """loss per response token, share of first choices: transformers' forward on each alone"""
    processor = packing.Processor(folder)
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    total, right, count = 0.0, 0, 0
    for record in records:
        prompt, ids = steps.encode([record], processor, sft.Config(), data.Problems())[0]
        row = torch.tensor([prompt.ids + ids])
        images = (
            {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid}
            if record.images
            else {}
        )
        kinds = (row == processor.image_token).int()
        with torch.no_grad():
            logits = hf(
                input_ids=row,
                mm_token_type_ids=kinds,
                attention_mask=torch.ones_like(row),
                **images,
            ).logits
        banned = processor.banned_ids(logits.shape[-1])
        logits, ids = (
            logits[0, len(prompt.ids) - 1 : -1].double().index_fill(1, banned, -1e30),
            torch.tensor(ids),
        )
        total += torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item()
        right, count = right + (logits.argmax(-1) == ids).sum().item(), count + len(ids)
    return total / count, right / count, count


def test_held_out_loss_and_accuracy_are_those_of_transformers(chains, tmp_path):
    """two ranks; in the last of the batches of the held-out records one of them has nothing"""
    run_sft(tmp_path, chains, ranks=2, workers=1, epochs=1, holdout=9, eval_every=4)
    rows = log_of(tmp_path)
    everything = data.read(chains)[0]
    out = steps.hold_out([set(r.images) for r in everything], 9, 0)
    records, held = ([r for r, o in zip(everything, out) if o == which] for which in (False, True))
    assert (
        len(held) == 9 and len(records) == 41 and not {r.id for r in held} & {r.id for r in records}
    )
    assert [r["step"] for r in rows if "eval_loss" in r] == [4, 6]
    loss, accuracy, _ = one_by_one(tmp_path / "final", held)
    assert rows[-1]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert rows[-1]["eval_accuracy"] == pytest.approx(accuracy, abs=0.002) and 0 < accuracy < 1
    assert sum(r["tokens"] for r in rows) == one_by_one(tmp_path / "final", records)[2]


def test_qwen3_vl_trains(chains, tmp_path):
    folder = toy.random_relative(tmp_path / "qwen3", "qwen3_vl")
    run_here(tmp_path / "out", chains, model=folder, epochs=1, lr=3e-3, freeze_vision=False)
    rows, records = log_of(tmp_path / "out"), data.read(chains)[0]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    assert rows[0]["loss"] == pytest.approx(
        one_by_one(folder, [records[i] for i in order[:8]])[0], rel=1e-4
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert one_by_one(tmp_path / "out" / "final", records[:8])[0] < rows[0]["loss"] - 0.5


@pytest.fixture(scope="module")
def real_chains(real, tmp_path_factory):
    """200 real problems with pictures; the response is made up around the true answer"""
    found = [
        r for name in ("geometry3k", "mathvision") for r in data.read(real / name)[0] if r.images
    ][:200]
    path = tmp_path_factory.mktemp("real") / "data.jsonl"
    with open(path, "w") as f:
        for r in found:
            chain = f"<think>\nI look at the picture. It says {r.answer}.\n</think>\n"
            response = f"{chain}<answer>{r.answer}</answer>"
            images = [str(pathlib.Path(i).resolve()) for i in r.images]
            f.write(json.dumps(vars(r) | {"images": images, "response": response}) + "\n")
    return path


def test_200_real_records_the_loss_falls(real_chains, tiny, tmp_path):
    run_here(tmp_path, real_chains, model=tiny, epochs=1, lr=3e-3, freeze_vision=False, workers=1)
    rows = log_of(tmp_path)
    assert len(rows) == 25 and sum(r["left_out"] for r in rows) == 0
    assert rows[0]["loss"] > 5.5 and sum(r["loss"] for r in rows[-5:]) / 5 < 3


def test_packed_loss_is_the_unpacked_loss(real_chains, tiny):
    single_rank()
    policy, processor = model.load(tiny)
    sequences = steps.encode(
        data.read(real_chains)[0][:80], processor, sft.Config(), data.Problems()
    )
    loss = {}
    for micro_tokens in (16384, 1000, 1):  # a row of 1 token holds no two sequences
        config = sft.Config(micro_tokens=micro_tokens)
        made = SimpleNamespace(processor=processor, config=config, width=128)
        parts = list(steps.batches(sequences, made, "cpu"))
        with torch.no_grad():
            logprobs = torch.cat([policy(batch)[0] for batch in parts])
        loss[micro_tokens] = -logprobs.double().mean().item()
    assert len(sequences) == 80 == len(parts) and len(logprobs) == sum(
        len(ids) for _, ids in sequences
    )
    assert max(loss.values()) - min(loss.values()) < 1e-5


def test_questions_about_one_picture_are_held_out_together():
    held = steps.hold_out([{f"{i // 2}.png"} for i in range(20)], 4, 0)
    assert 4 < sum(held) <= 8 and held[::2] == held[1::2]


def test_answers_without_chains(tiny):
    processor = packing.Processor(tiny)
    record = data.Record(
        "a", "x", "B", [], response="<think>\nWait, B.\n</think>\n<answer>Final Answer:B</answer>"
    )
    ids = steps.response_ids(record, processor, drop_chains=True)
    assert processor.tokenizer.decode(ids) == "<answer>Final Answer:B</answer><|im_end|>"


def test_vision_r1_cold_as_downloaded_trains(real, tiny, tmp_path):
    """both files; one picture is not there, another cut short; two ranks with workers"""
    cold = shutil.copytree(
        real / "formats" / "vision_r1_cold", tmp_path / "cold", copy_function=shutil.copy
    )
    lost, cut = sorted((cold / "mulberry_images").rglob("*.png"))[:2]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:500])
    said = run_sft(
        tmp_path / "out", cold, ranks=2, workers=1, model=tiny, batch_size=4, micro_tokens=1000
    )
    assert "1 x missing image" in said and str(lost) in said and "3 x several exchanges" in said
    assert "11 records, 0 held out; 2 epochs of 3 steps" in said and f"broken image ({cut}" in said
    rows = log_of(tmp_path / "out")
    assert [sum(r["left_out"] for r in epoch) for epoch in (rows[:3], rows[3:])] == [1, 1]
    assert all(r["loss"] < 8 for r in rows) and rows[0]["mfu"] is None
    assert not list((tmp_path / "out").glob("*.pkl"))


def test_strict_stops_at_the_first_bad_picture(chains, tmp_path):
    records, _ = data.read(chains)
    records[3].images = [records[3].images[0][:200]]
    data.write_parquet(tmp_path / "cut.parquet", records[:8])
    with pytest.raises(SystemExit, match=f"id {records[3].id}: broken image"):
        run_here(tmp_path / "out", tmp_path / "cut.parquet", strict=True, workers=1)


def test_overlong_and_broken_records_are_reported_and_left_out(tiny, pictures):
    processor, problems = packing.Processor(tiny), data.Problems()
    for r in pictures:
        r.response = "<think> a </think> <answer> 1 </answer>"
    pictures[0].images = [pictures[0].images[0][:200]]
    pictures[1].response = "so " * 300
    kept = steps.encode(pictures, processor, sft.Config(cutoff=120), problems)
    assert {p.id: p.kind for p in problems} == {
        "t-0": "broken image",
        "t-1": "sequence too long",
    } and len(kept) == len(pictures) - 2
