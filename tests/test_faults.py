"""Faults, injected for real: signals, full and read-only disks, flipped bits, truncated files,
foreign pickles, weights that are no numbers. What happens is said, and nothing good is lost."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    alone,
    command,
    environment,
    kill_all,
    log_of,
    single_rank,
    start,
    torchrun,
    wait_for,
    weights_of,
    words,
)
from safetensors.torch import load_file

import grpo
import model
import sft
from nano import checkpoint, kept, run, steps
from nano.data import Record

# -------------------------------------------------------------------------------------------------
# checkpoints


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 and 2 of a small layer -> (folder of the run, weights of each)."""
    single_rank()
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer, weights = torch.optim.AdamW(layer.parameters(), lr=0.1), {}
    for step in (1, 2):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        checkpoint.save(tmp_path, step, layer, optimizer, keep=2)
        weights[step] = layer.weight.detach().clone()
    return tmp_path, weights


def load(out):
    layer = torch.nn.Linear(3, 2)
    step = checkpoint.load(out, layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
    return step, layer.weight.detach()


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of the last number
    path.write_bytes(content)


def truncate(path: Path):
    os.truncate(path, path.stat().st_size - 5)


def another(path: Path):
    path.with_name("more.safetensors").write_bytes(path.read_bytes())


def no_sums(path: Path):
    path.with_name("checksums.json").write_text('{"x": [1')


@pytest.mark.parametrize(
    "harm, words",
    [
        (flip, "shard.*safetensors is not as it was written"),
        (truncate, "shard.*safetensors is not as it was written"),
        (os.unlink, "shard.*safetensors is missing"),
        (another, "more.safetensors does not belong to it"),
        (no_sums, "checksums.json is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(saved, harm, words, capsys):
    out, weights = saved
    assert load(out)[0] == 2
    newest = checkpoint.finished(out)[-1]
    (file,) = newest.glob("*.safetensors")
    harm(file)
    step, weight = load(out)
    assert step == 1 and torch.equal(weight, weights[1])
    said = capsys.readouterr().out
    assert str(newest) in said
    assert re.search(words, said)
    # What is saved from here on must not push out the good one in favour of the damaged one.
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    os.rename(newest, newest.with_name("step-000009"))
    checkpoint.save(out, 3, layer, optimizer, keep=1)
    assert load(out)[0] == 3


def test_when_no_checkpoint_is_whole_the_run_does_not_start_over_by_itself(saved):
    out, _ = saved
    for folder in checkpoint.finished(out):
        flip(next(folder.glob("*.safetensors")))
    with pytest.raises(SystemExit, match="none of 2 can be used.*--no_resume"):
        load(out)
    assert len(checkpoint.finished(out)) == 2


class Foreign:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_no_pickle_is_ever_loaded(saved, tmp_path):
    """Pickles lie wherever torch, DCP or an older version would have looked for one."""
    out, weights = saved
    marker = tmp_path / "executed"
    poison = pickle.dumps(Foreign(str(marker)))
    folder = checkpoint.finished(out)[-1]
    names = (".metadata", "__0_0.distcp", "state.pt", "optimizer.bin", "pytorch_model.bin")
    for place in (folder, out):
        for name in (*names, "records.pkl"):
            (place / name).write_bytes(poison)
    step, weight = load(out)
    assert step == 2 and torch.equal(weight, weights[2])
    next(folder.glob("*.safetensors")).write_bytes(poison)  # with a checksum that fits
    sums = checkpoint.checksums(folder.glob("*.safetensors"))
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(BaseException, match="(?i)header"):
        load(out)
    assert not marker.exists()
    pickle.loads(poison)
    assert marker.exists()  # the poison works


def test_the_records_of_sft_are_no_pickle_and_come_back_whole():
    record = Record(
        "a", "<image>x\ud800\n", "1", [b"\x00\n\xff", "p.png", b""], "f", "<think>", ["A"]
    )
    record.meta = {"n": float("inf"), "l": [1]}
    raw = steps.to_bytes(record)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(raw)
    assert steps.from_bytes(raw) == record


# -------------------------------------------------------------------------------------------------
# numbers that are none


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(2))


def test_an_update_that_is_not_finite_is_not_taken_and_the_third_in_a_row_ends_the_run(capsys):
    single_rank()
    policy = Two()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)

    def update(gradient, loss=0.0):
        policy.a.grad = torch.tensor([gradient, 1.0])
        return model.update(policy, optimizer, 1.0, loss)

    checkpoint.refused = 0
    assert update(3.0) == pytest.approx(10**0.5)
    before, state = policy.a.detach().clone(), optimizer.state[policy.a]["step"].item()
    assert np.isnan(update(float("inf"))) and np.isnan(update(1.0, float("nan")))
    assert torch.equal(policy.a, before) and optimizer.state[policy.a]["step"] == state
    assert policy.a.grad is None
    assert "an update is not taken: loss nan" in capsys.readouterr().out
    assert update(1.0) > 0 and not torch.equal(policy.a, before)  # the count begins anew
    update(float("nan")), update(float("nan"))
    with pytest.raises(SystemExit, match="three updates in a row.*--lr is too high"):
        update(float("nan"))
    checkpoint.refused = 0


def test_weights_that_are_not_finite_are_not_saved(saved):
    out, weights = saved
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer.weight.data[1, 2] = float("nan")
    with pytest.raises(SystemExit, match="some weights are not finite"):
        checkpoint.save(out, 3, layer, optimizer, keep=1)
    with pytest.raises(SystemExit, match="some weights are not finite"):
        model.export(layer, None, out / "final")
    assert not (out / "final").exists() and not list(out.glob("checkpoints/writing-*"))
    step, weight = load(out)
    assert step == 2 and torch.equal(weight, weights[2])


@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(stage, problem_file, tmp_path):
    """The first update is finite and ruins the weights; then nothing more is taken or saved."""
    flags = dict(model=ROOT / "toy" / "base", data=problem_file, out=tmp_path, lr=1e7)
    if stage is grpo:
        flags = SMALL | flags | dict(stages="16x4x9", questions=4, save_every=1, keep=1)
    else:
        flags |= dict(recipe="toy", warmup_ratio=0.0, batch_size=4, save_every=1)
    with pytest.raises(SystemExit, match="three updates in a row"):
        alone(stage, **flags)
    rows = log_of(tmp_path)
    refused = [row["refused_updates"] for row in rows]
    assert refused[-2:] == [1, 1] and 0 in refused
    assert not (tmp_path / "final").exists()
    last = max(row["step"] for row in rows if not row["refused_updates"])
    assert [folder.name for folder in checkpoint.finished(tmp_path)] == [f"step-{last:06d}"]
    (file,) = checkpoint.finished(tmp_path)[-1].glob("*.safetensors")
    weights = load_file(file)
    assert all(weight.isfinite().all() for weight in weights.values())
    checkpoint.refused = 0


# -------------------------------------------------------------------------------------------------
# signals


@pytest.fixture(scope="module")
def uninterrupted(problem_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    alone(grpo, **SMALL, data=problem_file, out=out)
    return out


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def signalled(call, out, number, after: int, said, who=lambda process: process.pid) -> int:
    """Starts a run, sends the signal after so many lines of its log -> its exit code."""
    process = start(call, said)
    try:
        wait_for(lambda: lines(out / "log.jsonl") >= after or process.poll() is not None, 120)
        assert process.poll() is None, said.read_text()
        os.kill(who(process), number)
        return process.wait(120)
    finally:
        kill_all(str(out))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_finishes_its_step_saves_and_goes_on(
    number, code, problem_file, tmp_path, uninterrupted
):
    """SIGTERM stops one rank, Ctrl-C two: there rank 0 alone gets it, torchrun has nothing to do
    with it. save_every is far away: what is saved is saved because of the signal."""
    out, said = tmp_path / "run", tmp_path / "said.txt"
    ranks = 1 if number == signal.SIGTERM else 2

    def owner(process):
        return process.pid if ranks == 1 else int((out / ".lock").read_text().split()[0])

    call = command(out, problem_file, ranks=ranks, save_every=100)
    found = signalled(call, out, number, 2, said, owner)
    text = said.read_text()
    assert found == (code if ranks == 1 else 1), text  # torchrun's own code is 1
    assert f"stopped by {signal.Signals(number).name}: step" in text
    if ranks == 2:
        assert text.count(f"exitcode  : {code}") == 2, text
        assert "stopping rank" not in text
    done = lines(out / "log.jsonl")
    assert 2 <= done < 6
    assert [folder.name for folder in checkpoint.finished(out)] == [f"step-{done:06d}"]
    alone(grpo, **SMALL | dict(save_every=100), data=problem_file, out=out)
    if ranks == 1:  # two ranks sum in another order
        assert log_of(out) == log_of(uninterrupted)
        a, b = weights_of(out), weights_of(uninterrupted)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_torchrun_that_is_told_to_stop_stops_its_ranks_with_their_work_saved(
    problem_file, tmp_path
):
    """sft with two workers: they get torchrun's signal too, and must not die of it."""
    out, said = tmp_path / "run", tmp_path / "said.txt"
    flags = dict(recipe="toy", model=ROOT / "toy" / "base", data=problem_file, out=out)
    flags |= dict(batch_size=4, workers=1, save_every=1000, epochs=50)
    call = [*torchrun(2), str(ROOT / "sft.py"), *words(flags)]
    assert signalled(call, out, signal.SIGTERM, 3, said) == 1
    text = said.read_text()
    done = lines(out / "log.jsonl")
    assert "stopped by SIGTERM: step" in text and "stopping rank" not in text, text
    assert [folder.name for folder in checkpoint.finished(out)] == [f"step-{done:06d}"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_cold_start_that_is_told_to_stop_says_that_it_goes_on(
    number, code, problem_file, tmp_path
):
    """No server is there: it would wait for ever."""
    out, said = tmp_path / "run", tmp_path / "said.txt"
    flags = dict(recipe="vision-r1-cold", data=problem_file, out=out)
    flags |= {f"{who}_url": "http://127.0.0.1:1/v1" for who in ("mllm", "reasoner")}
    call = [sys.executable, str(ROOT / "cold_start.py"), *words(flags)]
    assert signalled(call, out, number, 1, said) == code
    assert "goes on from the finished calls" in said.read_text()
    assert "Traceback" not in said.read_text()


SCRIPT = """
import sys, time, os
sys.path.insert(0, {root!r})
from nano import run

def main(config):
    run.start_ranks()
    run.working = {working}
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)

run.guard(main, None)
"""


@pytest.mark.parametrize("working", [False, True])
def test_a_second_signal_and_one_before_the_first_step_end_at_once(working, tmp_path):
    script, said = tmp_path / "sleeps.py", tmp_path / "said.txt"
    script.write_text(SCRIPT.format(root=str(ROOT), working=working))
    process = start([sys.executable, str(script)], said)
    wait_for(lambda: "ready" in said.read_text(), 60)
    process.send_signal(signal.SIGINT)
    if working:
        wait_for(lambda: "told to stop" in said.read_text(), 10)
        process.send_signal(signal.SIGINT)  # an echo
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "stopped at once: it was told to" in said.read_text()
    assert "Traceback" not in said.read_text()


# -------------------------------------------------------------------------------------------------
# disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted: root is needed")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def ends_in_a_sentence(call, words: str, **env):
    """The run ends with 1 and this sentence, without a traceback."""
    done = subprocess.run(call, env=environment(**env), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return done.stdout + done.stderr


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    small_disk, problem_file
):
    """A checkpoint has 8.5 MB: the second one fits, the third does not."""
    out = small_disk / "run"
    call = command(out, problem_file, stages="16x4x4", questions=4, save_every=1)
    ends_in_a_sentence(call, "the disk is full")
    assert [folder.name for folder in checkpoint.finished(out)] == ["step-000001", "step-000002"]
    assert not list(out.glob("checkpoints/writing-*"))  # its room is given back
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    alone(
        grpo, **SMALL | dict(stages="16x4x4", questions=4, save_every=1), data=problem_file, out=out
    )
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ends_in_a_sentence(call, "it cannot be written to")


def test_debug_keeps_the_traceback():
    call = [sys.executable, str(ROOT / "grpo.py"), "--model", "no/such/folder", "--debug"]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no such folder" in done.stderr


# -------------------------------------------------------------------------------------------------
# junk in the run's own files


@pytest.mark.parametrize("junk", [b"\xff\x00{", b"[1, 2]", b"null", b"", b'{"lr": 1'])
def test_junk_in_config_json_is_a_sentence(junk, tmp_path):
    (tmp_path / "config.json").write_bytes(junk)
    with pytest.raises(SystemExit, match="config.json is damaged.*--no_resume"):
        run.read_settings(tmp_path / "config.json")


def test_junk_in_the_log_is_left_out_and_said(tmp_path, capsys):
    single_rank()
    junk = [b"\xff\xfe\x00", b"[1]", b"null", b'{"step": "x"}', b"{", b'"step"']
    rows = [json.dumps({"step": step}).encode() for step in (1, 2)]
    whole = b"\n".join([rows[0], *junk, rows[1]]) + b"\n"
    (tmp_path / "log.jsonl").write_bytes(whole)
    run.cut_after_step(tmp_path / "log.jsonl", 5)
    assert log_of(tmp_path) == [{"step": 1}, {"step": 2}]
    assert "6 damaged lines" in capsys.readouterr().out
    assert (tmp_path / "log.damaged").read_bytes() == whole


# -------------------------------------------------------------------------------------------------
# models that are missing


@pytest.mark.parametrize(
    "name, words",
    [
        ("runs/vision-r1-ci-7b/final", "sft.py --recipe vision-r1-ci-7b"),
        ("runs/vision-r1-zero/final", "grpo.py --recipe vision-r1-zero"),
        ("./no/folder/here", "no such folder"),
        ("no/such-model", "hf download no/such-model"),
        ("toy", "no config.json in it"),
    ],
)
def test_a_missing_model_says_what_to_do(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    single_rank()
    with pytest.raises(ValueError, match=words):
        run.find_model(name)


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_no_pickle_of_a_model_folder_is_read(name, good, tmp_path, monkeypatch):
    """Not one that runs a program, nor a good one: neither is even opened."""
    single_rank()
    folder, marker = tmp_path / "foreign", tmp_path / "executed"
    shutil.copytree(ROOT / "toy" / "base", folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if "-of-" in name:
        index = dict(metadata={}, weight_map=dict.fromkeys(weights, name))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if good:
        torch.save(weights, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Foreign(str(marker))))
    opened, open_ = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a) or open_(*a, **k))
    with pytest.raises(ValueError, match=r"no \*.safetensors in it. Weights in a pickle .*convert"):
        run.find_model(str(folder))
    with pytest.raises(OSError, match="model.safetensors"):
        model.load(str(folder))
    with pytest.raises(ValueError, match="weights are not in its"):
        model.load_sharded(str(folder), torch.device("cpu"))
    assert not marker.exists() and not opened
    if not good:
        pickle.loads((folder / name).read_bytes())
        assert marker.exists()  # the poison works


# -------------------------------------------------------------------------------------------------
# the answers of an evaluation


def test_a_fingerprint_sees_every_file_and_every_byte(tmp_path):
    single_rank()
    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = {checkpoint.fingerprint(tmp_path)}
    stamp = (tmp_path / "model.safetensors").stat()
    content = bytearray(10**6)
    content[500_000] = 1
    (tmp_path / "model.safetensors").write_bytes(content)  # the same size and time
    os.utime(tmp_path / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    found.add(checkpoint.fingerprint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("[]")
    found.add(checkpoint.fingerprint(tmp_path))
    (tmp_path / "notes.md").write_text("no part of a model")
    found.add(checkpoint.fingerprint(tmp_path))
    assert len(found) == 3


@pytest.mark.parametrize(
    "change",
    [
        dict(problem="<image>Why?"),
        dict(answer="5"),
        dict(system="Be brief."),
        dict(choices=["4", "5"]),
        dict(images=[b"another"]),
        dict(meta={"precision": 1}),
    ],
)
def test_an_answer_belongs_to_one_question(change, tmp_path):
    settings = dict(temperature=0.6)
    record = Record("q", "<image>What?", "4", [b"picture"], choices=["4", "6"])
    (tmp_path / "picture.png").write_bytes(b"picture")
    one = kept.asked(record, settings)
    moved = Record("q2", "<image>What?", "4", [str(tmp_path / "picture.png")], choices=["4", "6"])
    assert kept.asked(moved, settings) == one  # the same picture elsewhere
    assert kept.asked(record, dict(temperature=0.7)) != one
    assert kept.asked(Record(**vars(record) | change), settings) != one


def test_answers_that_do_not_belong_are_set_aside_and_said(tmp_path):
    records = [Record(f"q{k}", f"What is {k}?", str(k), []) for k in range(6)]
    path, said = tmp_path / "responses.jsonl", []

    def row(k, sample=0, **more):
        base = dict(id=f"q{k}", sample=sample, weights="w", asked=kept.asked(records[k], {}))
        return json.dumps(base | more).encode() + b"\n"

    good = row(0) + row(1, more=1) + row(1, 1)
    other = row(2, weights="v") + row(3, asked="x") + b'\xff"garbled\n' + row(4, more=1)
    path.write_bytes(other[: len(row(2))] + good + other[len(row(2)) :] + row(5)[:-1])
    rows = kept.read(path, "w", records, {}, said.append)
    assert [(r["id"], r["sample"]) for r in rows] == [("q0", 0), ("q1", 0), ("q1", 1)]
    assert path.read_bytes() == good
    for reason in ("1 of another model", "1 to another question", "1 of half", "2 damaged"):
        assert reason in said[0]
    assert lines(tmp_path / "stale-responses.jsonl") == 5
    assert kept.read(path, "w", records, {}, said.append) == rows and len(said) == 1
