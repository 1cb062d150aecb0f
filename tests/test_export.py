"""tools.export against final/ and transformers; tools.choose against eval.py and plain numpy."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, alone
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import eval as evaluation
import grpo
import model
import toy
from nano.data import write_parquet
from tools import choose, export


@pytest.fixture(scope="module")
def trained(problem_file, tmp_path_factory):
    """Four steps, of which three checkpoints are kept."""
    out = tmp_path_factory.mktemp("trained")
    flags = SMALL | dict(data=problem_file, out=out, stages="16x8x2,24x4x2", save_every=1, keep=3)
    alone(grpo, **flags | dict(lr=1e-3))
    return out


@pytest.mark.parametrize("limit", [export.FILE_BYTES, 300_000])
def test_the_last_checkpoint_is_final_bit_by_bit(trained, tmp_path, limit):
    """Settings and processor too. In many files it is the same model, also for transformers."""
    out = tmp_path / "model"
    export.export(trained, out, limit=limit)
    final = load_file(trained / "final" / "model.safetensors")
    files = sorted(out.glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    assert all(len(p) == 1 or sum(w.nbytes for w in p.values()) <= limit for p in parts)
    assert (len(files) > 3) == (limit < 10**6)
    found = {k: w for part in parts for k, w in part.items()}
    assert found.keys() == final.keys()
    assert all(torch.equal(found[k], final[k]) and found[k].dtype == final[k].dtype for k in final)
    for file in (trained / "final").iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    a, b = (AutoModelForImageTextToText.from_pretrained(p) for p in (out, trained / "final"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    model.load(str(out))


def test_a_checkpoint_of_an_earlier_step_in_another_type(trained, tmp_path):
    export.export(trained, tmp_path / "three", 3, dtype="bfloat16")
    export.export(trained, tmp_path / "four", 4)
    three = load_file(tmp_path / "three" / "model.safetensors")
    four = load_file(tmp_path / "four" / "model.safetensors")
    assert {w.dtype for w in three.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "three" / "config.json").read_text())["dtype"] == "bfloat16"
    moved = [(three[k].float() - four[k]).abs().max().item() for k in four]
    assert 1e-4 < max(moved) < 0.1


def test_adapters_of_a_checkpoint_are_merged_as_in_final(problem_file, tmp_path):
    """Their checkpoints hold nothing else: the rest is read where the run began."""
    run_folder = tmp_path / "run"
    flags = SMALL | dict(data=problem_file, out=run_folder, stages="16x8x2", lora_rank=4, lr=1e-2)
    alone(grpo, **flags)
    export.export(run_folder, tmp_path / "model", limit=300_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    found = {k: w for file in files for k, w in load_file(file).items()}
    final = load_file(run_folder / "final" / "model.safetensors")
    assert found.keys() == final.keys()
    assert all(torch.equal(found[k], final[k]) for k in final)
    start = load_file(SMALL["model"] / "model.safetensors")
    changed = [k for k in final if not torch.equal(final[k], start[k].to(final[k].dtype))]
    assert changed
    assert not any("visual" in name or "norm" in name for name in changed)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(trained, tiny, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of step 1, only of .2, 3, 4."):
        export.export(trained, tmp_path / "x", 1)
    shutil.copytree(trained, tmp_path / "copy")
    file = next((tmp_path / "copy" / "checkpoints" / "step-000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not as it was written.*--step"):
        export.export(tmp_path / "copy", tmp_path / "x")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match="no checkpoints in it"):
        export.export(tmp_path, tmp_path / "x")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished, ignore=shutil.ignore_patterns("final"))
    with pytest.raises(ValueError, match="nowhere.*--model"):
        export.export(unfinished, tmp_path / "x", start="nowhere")
    shutil.rmtree(unfinished)
    with pytest.raises(ValueError, match="is there already"):
        export.export(trained, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cut_export_leaves_nothing_under_the_final_name(trained, tmp_path, monkeypatch):
    """On an error its files go. After SIGKILL they have another name, and the next try works."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            export.export(trained, tmp_path / "model")
    assert not list(tmp_path.iterdir())

    if not (child := os.fork()):
        export.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        export.export(trained, tmp_path / "model")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["writing-model"]
    export.export(trained, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -------------------------------------------------------------------------------------------------
# choose


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "problems.parquet"
    write_parquet(path, toy.problems(24, 3, "asked"))
    return ["--data", str(path), "--temperature", "1", "--max_len", "24"]


def test_choose_evaluates_each_checkpoint_once_and_goes_on(trained, asked, monkeypatch):
    calls = []

    def here(call, check):
        """eval.py in this process, which saves the imports."""
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt  # stopped between the two
        assert call[:2] == [sys.executable, str(ROOT / "eval.py")]
        flags = [word.removeprefix("--") for word in call[2:]]
        alone(evaluation, **dict(zip(flags[::2], flags[1::2], strict=True)))

    monkeypatch.setattr(choose.subprocess, "run", here)
    with pytest.raises(KeyboardInterrupt):
        choose.choose(trained, 2, 1, 1, "", asked)
    text = choose.choose(trained, 2, 1, 1, "", asked)
    assert len(calls) == 3
    assert choose.choose(trained, 2, 1, 1, "", asked) == text
    assert len(calls) == 3
    out = trained / "choose"
    assert not list(out.glob("*-model"))
    assert (out / "choose.png").stat().st_size > 10_000
    each = [json.loads((out / f"step-00000{n}" / "report.json").read_text()) for n in (3, 4)]
    values = [100 * one["all"]["accuracy"] for one in each]
    for step, value in zip((3, 4), values):
        assert f"| step {step} | {value:.1f} (" in text
    best = 3 if values[0] >= values[1] else 4
    assert f"best of 2: step {best}, {max(values):.1f} %" in text
    assert f"mean: {np.mean(values):.1f} (" in text
    assert f"checkpoints {np.std(values, ddof=1):.1f}, from {min(values):.1f}" in text
    with pytest.raises(ValueError, match="other flags.*--out"):
        choose.choose(trained, 2, 1, 1, "", [*asked, "--limit", "3"])
    with pytest.raises(ValueError, match="last 2 steps whose number is a multiple of 7"):
        choose.choose(trained, 2, 7, 1, "", asked)


def rows_of(right: np.ndarray, bench=None):
    return [
        dict(id=f"{bench}-{i}", sample=0, right=bool(r))
        | (dict(bench=bench, meta={}) if bench else {})
        for i, r in enumerate(right)
    ]


def test_the_best_of_equal_checkpoints_is_better_by_luck_alone():
    """Ten checkpoints that are right with the same chance: the choice is above the mean, and on
    questions that did not choose it is not."""
    generator, gains, held_out = np.random.default_rng(0), [], []
    for _ in range(20):
        rows = {s: rows_of(generator.random(300) < 0.5) for s in range(10)}
        s = choose.summary(rows)
        values = [np.mean([r["right"] for r in part]) for part in rows.values()]
        assert s["best"] == int(np.argmax(values))
        assert s["mean"]["value"] == pytest.approx(np.mean(values))
        assert s["std"] == pytest.approx(np.std(values, ddof=1))
        gains.append(max(values) - 0.5)
        held_out.append(s["chosen"] - 0.5)
    assert np.mean(gains) > 0.035
    assert abs(np.mean(held_out)) < 0.02
    # A checkpoint that is truly better stays so on the other half.
    rows[10] = rows_of(generator.random(300) < 0.7)
    better = choose.summary(rows)
    assert better["best"] == 10
    assert better["chosen"] == pytest.approx(0.7, abs=0.05)


def test_benchmarks_count_alike_whatever_their_size():
    generator = np.random.default_rng(1)
    rows, want = {}, []
    for step in (5, 10):
        large, small = generator.random(300) < 0.8, generator.random(20) < 0.3
        rows[step] = rows_of(large, "mathvista") + rows_of(small, "chartqa")
        want.append((large.mean() + small.mean()) / 2)
    s = choose.summary(rows)
    assert [one["value"] for one in s["each"]] == pytest.approx(want)
    assert s["mean"]["value"] == pytest.approx(np.mean(want))
    assert s["mean"]["low"] < s["mean"]["value"] < s["mean"]["high"]
    assert min(want) <= s["chosen"] <= max(want)
