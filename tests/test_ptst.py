"""ptst.py: which stages it reads, the stage of a step, the paper's schedules; the figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from nano.run import read_log
from ptst import (
    SCHEDULES,
    Stage,
    agree,
    budget_note,
    format_stages,
    parse,
    stage_at,
    token_budget,
    total_steps,
    total_tokens,
)
from tools import plot


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "4Kx16x100,8Kx8x100",
        " 4k x 16 x 100 , 8K×8×100\n",
        "4096x16x100,8192X8x100",
        ["4Kx16x100", "8Kx8x100"],
        [(4096, 16, 100), (8192, 8, 100)],
        ((4096, 16, 100), [8192, 8, 100]),
        [Stage(4096, 16, 100), "8Kx8x100"],
    ],
)
def test_parse(text):
    stages = parse(text)
    assert stages == [(4096, 16, 100), (8192, 8, 100)] and all(isinstance(s, Stage) for s in stages)
    assert stages[1].max_len == 8192 and stages[1].group_size == 8 and stages[1].steps == 100


@pytest.mark.parametrize(
    "stages",
    [
        *SCHEDULES.values(),
        [Stage(64, 4, 2), Stage(128, 2, 2)],
        [Stage(1, 2, 1)],
        [Stage(1536, 2, 1)],
    ],
)
def test_format_is_the_inverse_of_parse(stages):
    assert parse(format_stages(stages)) == stages
    assert parse(json.loads(json.dumps(stages))) == stages  # config.json holds lists


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "stage 1"),
        ([], "no stages"),
        ("4Kx16x100,", "stage 2 .''"),
        ("4Kx16x100,,8Kx8x100", "stage 2 .''"),
        ("4Kx16x100,8Kx8", "stage 2 .'8Kx8'.*such as 4Kx16x100"),
        ("4Kx16x100x2", "stage 1 .'4Kx16x100x2'"),
        ("fourx16x100", "stage 1 .'fourx16x100'"),
        ("4Mx16x100", "stage 1"),
        ("4Kx16x1e2", "stage 1"),
        ("4Kx16Kx100", "stage 1"),
        ("4Kxx100", "stage 1"),
        ("4Kx-16x100", "stage 1"),
        ("0x16x100", "max_len is 0.*at least 1"),
        ("4Kx16x0", "steps is 0.*at least 1"),
        ("4Kx1x100", "group_size is 1.*group of one"),
        ("4Kx0x100", "group_size is 0.*at least 2"),
        ([(4096, 16, 100), (8192, 8)], r"stage 2 .\(8192, 8\)"),
        ([(4096.0, 16, 100)], "stage 1 .*whole max_len"),
        ([(4096, 16, True)], "stage 1 .*whole max_len"),
        ([(4096, -16, 100)], "group_size is -16.*at least 2"),
        ([4096, 16, 100], "stage 1 .4096"),
    ],
)
def test_parse_errors_name_the_part(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_known_by_its_name(name):
    assert parse(name) == parse(f" {name} ") == parse(format_stages(SCHEDULES[name]))


def test_the_nearest_schedule_is_named():
    with pytest.raises(ValueError, match="or one by name: vision-r1-long"):
        parse("vision-r1-lang")


def test_stage_at_covers_every_step_once():
    stages = [(4096, 16, 3), (8192, 8, 2), (16384, 4, 1)]
    assert [stage_at(stages, step)[0] for step in range(total_steps(stages))] == [0, 0, 0, 1, 1, 2]
    assert stage_at(stages, 4) == (1, Stage(8192, 8, 2))
    for step in (-1, 6, 100):
        with pytest.raises(ValueError, match=f"step {step} is not in 4Kx16x3,.*0 to 5"):
            stage_at(stages, step)


def test_budgets():
    stages = SCHEDULES["vision-r1"]
    assert [token_budget(s) for s in stages] == [65536, 65536]  # Sec. 3.4: 64K tokens per question
    assert total_tokens(stages) == 200 * 65536
    assert budget_note(stages) == ""
    assert "64K, 72K, 64K" in budget_note(parse("4Kx16x100,6Kx12x100,8Kx8x100"))


def test_schedules_of_the_paper():
    known = {name: format_stages(stages) for name, stages in SCHEDULES.items()}
    for name in ("vision-r1", "zero-ptst", "zero-sft-ptst"):  # App. A
        assert known[name] == "4Kx16x100,8Kx8x100"
    assert known["vision-r1-zero"] == "4Kx16x300" and known["vision-r1-long"] == "16Kx4x300"
    assert known["three-stage"] == "4Kx16x100,8Kx8x100,16Kx4x100"
    table5 = [
        tuple((s.max_len // 1024, s.group_size) for s in stages)
        for name, stages in SCHEDULES.items()
        if name.startswith("table5")
    ]
    assert table5 == [
        ((4, 16), (4, 16)),
        ((4, 16), (8, 16)),
        ((4, 16), (6, 12), (8, 8)),
        ((16, 4), (16, 4)),
        ((16, 16), (16, 16)),
    ]


def test_table():
    text = run("ptst.py").stdout
    assert all(name in text for name in SCHEDULES) and "13,107,200" in text
    text = run("ptst.py", "three-stage", "64x4x2,128x4x2").stdout.splitlines()[1:]
    assert text[0].split() == ["three-stage", "4Kx16x100,8Kx8x100,16Kx4x100", "19,660,800"] + [
        "64K,",
        "64K,",
        "64K",
    ]
    assert text[1].split()[1:] == ["64x4x2,128x4x2", "1,536", "256,", "512"]


def test_errors_of_the_command_line_have_no_traceback():
    for word, hint in [("vision-r1-lnog", "vision-r1-long"), ("4Kx16", "such as 4Kx16x100")]:
        done = run("ptst.py", word)
        assert done.returncode == 1 and word in done.stderr and hint in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["plot", "cost", "ablate"])
def test_an_old_command_says_where_it_went_without_torch(word):
    block = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = [sys.argv[1], 'x'];"
    done = run("-c", block + "runpy.run_path('ptst.py', run_name='__main__')", word)
    assert done.returncode == 2 and f"python -m tools.{word}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_schedules_agree_as_far_as_a_run_has_come():
    one, two = parse("96x16x60"), parse("96x16x60,192x8x60")
    assert agree(one, two, 60)  # A run goes on with one stage more.
    assert agree(parse("96x16x60,96x16x60"), parse("96x16x120"), 120)  # It is written otherwise.
    assert agree(two, parse("96x16x120"), 60) and not agree(two, parse("96x16x120"), 61)
    assert agree(one, parse("96x8x60"), 0) and not agree(one, parse("96x8x60"), 1)
    assert not agree(one, parse("96x16x40"), 50)  # That schedule has fewer steps than were done.


# ---- plot


def log(folder: Path, stages, tail="", **fields) -> str:
    folder.mkdir(parents=True)
    rows, step = [], 0
    for index, (length, group, steps) in enumerate(stages):
        for _ in range(steps):
            step += 1
            rows.append(
                {
                    "step": step,
                    "stage": index,
                    "max_len": length,
                    "group_size": group,
                    "reward": 0.1 + step / 100,
                    "accuracy": 0.1 + step / 90,
                    "len_mean": length / 2,
                    "len_correct": None,
                    "len_wrong": length / 2,
                    "tokens": length * group,
                    **fields,
                }
            )
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return str(folder)


def colours(path, at_x: float) -> tuple:
    """The background of the first panel at a fraction of the picture's width."""
    im = Image.open(path).convert("RGB")
    left, top, bottom = int(im.width * at_x), int(im.height * 0.1), int(im.height * 0.35)
    return max(im.crop((left, top, left + 4, bottom)).getcolors(100_000))[1]


def test_plot_shades_the_stages(tmp_path):
    log(tmp_path / "run", [(64, 4, 30), (128, 2, 30)])
    path = tmp_path / "run/curves.png"
    assert str(path) in run("-m", "tools.plot", str(tmp_path / "run")).stdout
    assert Image.open(path).size == (1760, 1088)
    first, second = colours(path, 0.10), colours(path, 0.28)
    assert first != second and (255, 255, 255) not in (first, second)


def test_plot_several_runs(tmp_path):
    a = log(tmp_path / "a/run", [(64, 4, 5), (128, 2, 5)])
    b = log(tmp_path / "b/run", [(256, 4, 50)])
    path = plot.plot([a, b], str(tmp_path / "new/two.png"))
    assert path == tmp_path / "new/two.png"
    assert not list(tmp_path.rglob("curves.png"))
    assert colours(path, 0.28) == (255, 255, 255)  # The stages differ: there are no bands.


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """A call that gives the axes of the last figure of `plot`, by title and x label."""
    monkeypatch.chdir(tmp_path)  # a figure of several runs belongs to none of them
    kept = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    return lambda: {(ax.get_title(loc="left"), ax.get_xlabel()): ax for ax in kept[-1].axes}


def chains(folder: Path, name: str, rows: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / name).write_text("".join(lines) + '{"why": "ok", "len')
    return str(folder)


def test_plot_over_tokens_sampled(tmp_path, figure):
    a = log(tmp_path / "a", [(64, 4, 3), (128, 2, 2)], tokens=100)
    b = log(tmp_path / "b", [(64, 4, 3), (128, 2, 2)], tokens=300)
    plot.plot([a, b])
    axes = figure()
    lines = axes["Mean length (tokens)", "tokens sampled"].lines
    curves = [line for line in lines if len(line.get_xdata()) == 5]
    at = [list(line.get_xdata()) for line in curves]
    assert at == [[100, 200, 300, 400, 500], [300, 600, 900, 1200, 1500]]
    assert [list(line.get_ydata()) for line in curves] == [[32, 32, 32, 64, 64]] * 2
    lines = axes["Accuracy (%)", "tokens sampled"].lines
    borders = [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 2]
    assert borders == [350, 1050]  # Here each run's second stage begins.
    # Over the steps the stages are the same: there are bands and no borders.
    steps = axes["Mean length (tokens)", "step"]
    assert [text.get_text() for text in steps.texts] == ["64 × 4", "128 × 2"]
    assert all(len(line.get_xdata()) == 5 for line in steps.lines)


def test_plot_right_and_wrong_chains(tmp_path, figure):
    """Fig. 1 (A): the quartiles are computed by hand; a truncated chain is a wrong one."""
    one = log(tmp_path / "run", [(64, 4, 3)])
    rows = [{"why": "ok", "length": n} for n in range(1, 102)]
    rows += [{"why": "wrong", "length": 10}, {"why": "truncated", "length": 20}]
    chains(tmp_path / "run", "samples.jsonl", [*rows, {"why": "format", "length": 60}])
    rows = [{"right": n % 2 == 0, "why": "", "length": n} for n in range(40)]
    ci = chains(tmp_path / "ci", "responses.jsonl", rows)
    assert plot.read_chains(one) == (list(range(1, 102)), [10, 20, 60])
    plot.plot([one, ci])
    assert [path.parent for path in tmp_path.rglob("curves.png")] == [tmp_path]
    title = "Right and wrong chains (tokens)"
    ax = figure()[title, ""]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["run\nright", "run\nwrong", "ci\nright", "ci\nwrong"]
    sides = [patch.get_path().vertices[:, 0] for patch in ax.patches]
    boxes = [(side.min(), side.max()) for side in sides]
    assert boxes == [(26, 76), (15, 40), (9.5, 28.5), (10.5, 29.5)]
    path = plot.plot([ci])  # An evaluation alone has this panel alone.
    assert path == tmp_path / "ci" / "curves.png" and list(figure()) == [(title, "")]


def test_half_written_line_is_skipped_with_a_notice(tmp_path, capsys):
    folder = log(tmp_path / "run", [(64, 4, 3)], tail='{"step": 4, "sta')
    assert [r["step"] for r in read_log(folder)] == [1, 2, 3]
    assert "log.jsonl:4: skipped a half-written line" in capsys.readouterr().err


def test_a_step_logged_twice_counts_once(tmp_path):
    folder = log(tmp_path / "run", [(64, 4, 3)])
    again = {"step": 2, "stage": 0, "max_len": 64, "group_size": 4, "len_mean": 7.0, "tokens": 1}
    with open(f"{folder}/log.jsonl", "a") as f:
        f.write(json.dumps(again) + "\n")
    assert [(r["step"], r["len_mean"]) for r in read_log(folder)] == [(1, 32), (2, 7), (3, 32)]


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no such file.*grpo.py"),
        ("", "it is empty"),
        ('{"st', "it is empty"),
        ('{"step": 1, "loss": 0.3}\n', "lacks.*grpo.py"),
    ],
)
def test_plot_of_no_log(tmp_path, text, words):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        plot.plot([str(tmp_path)])
    done = run("-m", "tools.plot", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "curves.png").exists()
