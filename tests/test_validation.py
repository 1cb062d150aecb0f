"""Validation within grpo.py, against eval.py on the finished model and against runs without it."""

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, alone, command, log_of, run_grpo, single_rank, weights_of
from test_grpo import killed_after

import eval as evaluation
import grpo
import toy
from benchmarks.validate import under
from nano import checkpoint, data, run, steps
from nano.data import write_parquet
from tools import plot

PLAIN = ("step", "accuracy", "low", "high", "format", "len", "cut", "accuracy_stage", "cut_stage")
EXAM = dict(eval_every=2, eval_temperature="1,0", eval_top_p=1.0, eval_max_len=0)


@pytest.fixture(scope="module")
def held_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("held") / "held.parquet"
    write_parquet(path, toy.problems(30, 11, "held"))
    return path


@pytest.fixture(scope="module")
def validated(problem_file, held_file, tmp_path_factory):
    """A run of six steps with four validations."""
    out = tmp_path_factory.mktemp("validated")
    flags = SMALL | dict(data=problem_file, eval_data=held_file, keep_best=True, **EXAM)
    with redirect_stdout(io.StringIO()) as said:
        alone(grpo, **flags, out=out)
    return out, said.getvalue()


def trained_on(rows):
    """The log without what validation adds to it."""
    rows = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]
    return [row for row in rows if row["step"]]


def test_validation_comes_before_the_first_step_and_after_the_last(validated):
    out, said = validated
    rows = [row for row in log_of(out) if "eval_accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        for end in ("", "_t0"):
            assert {f"eval_{name}{end}" for name in PLAIN[1:]} <= row.keys()
            assert 0 <= row[f"eval_low{end}"] <= row[f"eval_accuracy{end}"]
            assert row[f"eval_accuracy{end}"] <= row[f"eval_high{end}"] <= 1
            assert row[f"eval_accuracy_stage{end}"] <= row[f"eval_accuracy{end}"]
            assert row[f"eval_cut_stage{end}"] >= row[f"eval_cut{end}"]
    assert said.count("30 held out, T=1: accuracy") == said.count("held out, greedy") == 4
    assert [row["step"] for row in run.read_log(out)] == [1, 2, 3, 4, 5, 6]


def test_the_curves_show_validation_from_step_0_on(validated, tmp_path, monkeypatch):
    out, _ = validated
    kept = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    plot.plot([str(out)], str(tmp_path / "curves.png"))
    rows = [row for row in log_of(out) if "eval_accuracy" in row]
    for title, key, scale in (("Accuracy (%)", "eval_accuracy", 100), ("Mean len", "eval_len", 1)):
        axes = [ax for ax in kept[0].axes if ax.get_title(loc="left").startswith(title)]
        lines = [
            line for ax in axes for line in ax.lines if line.get_label() == "held-out problems"
        ]
        assert [list(line.get_xdata()) for line in lines] == [[0, 2, 4, 6]]
        assert list(lines[0].get_ydata()) == pytest.approx([scale * row[key] for row in rows])
        assert axes[0].get_xlim()[0] < 0


@pytest.mark.parametrize("temperature, end", [(1.0, ""), (0.0, "_t0")])
def test_the_last_validation_is_what_eval_says_of_the_finished_model(
    validated, held_file, tmp_path, temperature, end
):
    """The same answers: each number agrees to the digits that the log keeps."""
    out, _ = validated
    flags = dict(recipe="toy", model=out / "final", data=held_file, out=tmp_path, max_len=24)
    flags |= dict(system_prompt=toy.ZERO_PROMPT, seed=SMALL["seed"], temperature=temperature)
    alone(evaluation, **flags)
    report = json.loads((tmp_path / "report.json").read_text())["all"]
    row, want = log_of(out)[-1], ("accuracy", "low", "high", "format_rate", "length", "truncated")
    for name, field in zip(PLAIN[1:], want):
        assert row[f"eval_{name}{end}"] == pytest.approx(report[field], rel=1e-5), name


def test_the_stages_limit_is_an_evaluation_at_that_limit(validated, held_file, tmp_path):
    """The model after step 2 of stage 1 (16 tokens) is not kept, that of step 0 is the start."""
    out, _ = validated
    base = SMALL["model"]
    flags = dict(recipe="toy", model=base, data=held_file, out=tmp_path, max_len=16)
    flags |= dict(system_prompt=toy.ZERO_PROMPT, seed=SMALL["seed"], temperature=1.0)
    alone(evaluation, **flags)
    report = json.loads((tmp_path / "report.json").read_text())["all"]
    first = log_of(out)[0]
    assert first["eval_accuracy_stage"] == pytest.approx(report["accuracy"], rel=1e-5)
    assert first["eval_cut_stage"] == pytest.approx(report["truncated"], rel=1e-5)


def test_an_answer_longer_than_the_limit_is_cut_and_wrong():
    row = dict(right=True, format_ok=True, length=17, finish="stop")
    assert under(row, 17) == row
    assert under(row, 16) == dict(right=False, format_ok=False, length=17, finish="length")


def test_training_does_not_see_validation(validated, problem_file, tmp_path):
    out, _ = validated
    alone(grpo, **SMALL, data=problem_file, out=tmp_path)
    assert trained_on(log_of(tmp_path)) == trained_on(log_of(out))
    assert (tmp_path / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()
    a, b = weights_of(tmp_path), weights_of(out)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_killed_and_resumed_validates_as_uninterrupted(
    validated, problem_file, held_file, tmp_path
):
    """It is killed before its first checkpoint with step 0 in the log, then after it."""
    out, _ = validated
    flags = dict(eval_data=held_file, keep_best=True, **EXAM)
    killed_after(command(tmp_path, problem_file, **flags), tmp_path, 1)
    for _ in range(2):
        alone(grpo, **SMALL | dict(data=problem_file, out=tmp_path) | flags)
        assert log_of(tmp_path) == log_of(out)
        shutil.rmtree(checkpoint.finished(tmp_path)[-1])  # step 6 is done once more


def test_two_ranks_validate_as_one(validated, problem_file, held_file, tmp_path):
    out, _ = validated
    flags = dict(eval_data=held_file, stages="16x8x1,24x4x1", **EXAM)
    run_grpo(tmp_path, problem_file, ranks=2, **flags)
    one, two = log_of(out)[0], log_of(tmp_path)[0]
    assert one == two


def test_the_best_checkpoint_is_never_thrown_away(tmp_path):
    single_rank()
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    log = run.Log(tmp_path, grpo.Config(), -1)
    accuracies = [(0, 0.9), (1, 0.2), (2, 0.7), (3, None), (4, 0.7), (5, 0.1)]
    for step, accuracy in accuracies:
        log.write(dict(step=step) | ({} if accuracy is None else dict(eval_accuracy=accuracy)))
        best = checkpoint.best_step(tmp_path)
        if step:
            checkpoint.save(tmp_path, step, layer, optimizer, keep=1, best=best)
    assert best == 2
    kept = [path.name for path in checkpoint.finished(tmp_path)]
    assert kept == ["step-000002", "step-000005"]


def test_keep_best_saves_the_checkpoint_that_is_the_best(validated):
    out, _ = validated
    rows = [row for row in log_of(out) if row["step"] and "eval_accuracy" in row]
    best = max(rows, key=lambda row: row["eval_accuracy"])["step"]
    assert f"step-{best:06d}" in {path.name for path in checkpoint.finished(out)}


def test_held_out_problems_share_no_picture_with_the_others():
    records = toy.problems(20, 0, "h")
    records += [replace(record, id=f"again-{i}") for i, record in enumerate(records[:10])]
    kept, held = steps.split(records, 5, seed=0)
    assert len(kept) + len(held) == 30
    assert len(held) >= 5
    assert not {r.images[0] for r in kept} & {r.images[0] for r in held}
    assert steps.split(records, 0, seed=0) == (records, [])
    with pytest.raises(ValueError, match="--holdout 20 leaves none of 20"):
        steps.split(records[:20], 20, seed=0)


def test_holdout_is_never_trained_on(problem_file, tmp_path):
    flags = SMALL | dict(data=problem_file, out=tmp_path, holdout=30, stages="8x2x2", questions=4)
    alone(grpo, **flags | dict(sample_questions=4, eval_every=1))
    asked = {json.loads(line)["id"] for line in open(tmp_path / "samples.jsonl")}
    _, held = steps.split(data.read(problem_file)[0], 30, SMALL["seed"])
    assert held
    assert not asked & {record.id for record in held}
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(keep_best=True), "--keep_best needs --eval_data or --holdout"),
        (dict(eval_temperature="0.6,greedy"), "--eval_temperature 0.6,greedy: numbers"),
    ],
)
def test_what_cannot_be_validated_ends_with_one_line(flags, words, problem_file, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {words}"):
        alone(grpo, **SMALL | dict(data=problem_file, out=tmp_path) | flags)
