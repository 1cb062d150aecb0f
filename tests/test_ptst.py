"""ptst.py: parsing of stages, which stage a step is in, the paper's schedules, and the curves of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ptst
from ptst import (
    SCHEDULES,
    Stage,
    budget_note,
    format_stages,
    parse,
    schedule,
    stage_at,
    token_budget,
    total_steps,
    total_tokens,
)


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
        [("4K", 16, 100), (8192, 8, 100)],
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
    assert (
        parse(format_stages(stages)) == stages == parse(json.loads(json.dumps(stages)))
    )  # config.json holds lists


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no stages"),
        ([], "no stages"),
        ("4Kx16x100,", "stage 2.*nothing"),
        ("4Kx16x100,,8Kx8x100", "stage 2.*nothing"),
        ("4Kx16x100,8Kx8", "stage 2 .'8Kx8'.*2 parts.*4Kx16x100"),
        ("4Kx16x100x2", "stage 1.*4 parts"),
        ("fourx16x100", "max_len is 'four'.*4Kx16x100"),
        ("4Mx16x100", "max_len is '4M'"),
        ("4Kx16x1e2", "steps is '1e2'"),
        ("4Kx16Kx100", "group_size is '16K'"),
        ("4Kxx100", "group_size is ''"),
        ("0x16x100", "max_len is 0.*at least 1"),
        ("4Kx16x0", "steps is 0.*at least 1"),
        ("4Kx-16x100", "group_size is -16"),
        ("4Kx1x100", "group_size is 1.*group of one"),
        ("4Kx0x100", "group_size is 0.*at least 2"),
        ([(4096, 16, 100), (8192, 8)], r"stage 2 .\(8192, 8\).*2 parts"),
        ([(4096.0, 16, 100)], "max_len is 4096.0"),
        ([(4096, 16, True)], "steps is True"),
        ([4096, 16, 100], "stage 1 .4096.*no tuple"),
    ],
)
def test_parse_errors_name_the_part(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


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
    assert total_tokens(stages) == 200 * 65536 and total_tokens(stages, 512) == 512 * 200 * 65536
    assert budget_note(stages) == "" and "64K, 72K, 64K" in budget_note(
        parse("4Kx16x100,6Kx12x100,8Kx8x100")
    )


def test_schedules_of_the_paper():
    known = {name: format_stages(stages) for name, stages in SCHEDULES.items()}
    assert (
        known["vision-r1"] == known["zero-ptst"] == known["zero-sft-ptst"] == "4Kx16x100,8Kx8x100"
    )  # App. A
    assert known["vision-r1-zero"] == "4Kx16x300" and known["vision-r1-long"] == "16Kx4x300"
    assert known["three-stage"] == "4Kx16x100,8Kx8x100,16Kx4x100"
    table5 = {
        tuple((s.max_len // 1024, s.group_size) for s in stages)
        for name, stages in SCHEDULES.items()
        if len(stages) > 1
    }
    assert {
        ((4, 16), (4, 16)),
        ((4, 16), (8, 16)),
        ((4, 16), (6, 12), (8, 8)),
        ((16, 4), (16, 4)),
        ((16, 16), (16, 16)),
        ((4, 16), (8, 8)),
    } <= table5
    assert set(ptst.ORIGIN) == set(SCHEDULES)
    assert all(
        ("steps ours" in ptst.ORIGIN[name]) == name.startswith("table5") for name in SCHEDULES
    )


def test_schedule_by_name_or_text():
    assert schedule("three-stage") == SCHEDULES["three-stage"] and schedule("64x4x2") == [
        (64, 4, 2)
    ]
    with pytest.raises(
        ValueError, match="unknown schedule 'vision-r1-lnog': did you mean vision-r1-long?"
    ):
        schedule("vision-r1-lnog")
    with pytest.raises(ValueError, match="stage 1"):
        schedule("4Kx16")


def test_table(capsys):
    ptst.main([])
    text = capsys.readouterr().out
    assert all(name in text for name in SCHEDULES) and "512 a step" in text and "6.71 G" in text
    ptst.main(["64x4x2,128x4x2", "--questions", "8"])
    assert (
        "256, 512 *" in (text := capsys.readouterr().out)
        and "not constant" in text
        and "vision-r1" not in text
    )


def test_command_line_errors_have_no_traceback():
    done = subprocess.run(
        [sys.executable, ROOT / "ptst.py", "vision-r2"], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "did you mean vision-r1" in done.stderr
        and "Traceback" not in done.stderr
    )


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
    strip = im.crop(
        (
            int(im.width * at_x),
            int(im.height * 0.1),
            int(im.width * at_x) + 4,
            int(im.height * 0.35),
        )
    )
    return max(strip.getcolors(100_000))[1]


def test_plot_shades_the_stages(tmp_path, capsys):
    run = log(tmp_path / "run", [(64, 4, 30), (128, 2, 30)])
    ptst.main(["plot", run])
    path = tmp_path / "run/curves.png"
    assert str(path) in capsys.readouterr().out
    assert Image.open(path).size == (1760, 1088)
    first, second = colours(path, 0.10), colours(path, 0.28)
    assert first != second and (255, 255, 255) not in (first, second)


def test_plot_several_runs(tmp_path):
    a, b = (
        log(tmp_path / "a/run", [(64, 4, 5), (128, 2, 5)]),
        log(tmp_path / "b/run", [(256, 4, 50)]),
    )
    path = ptst.plot([a, b + "/log.jsonl"], str(tmp_path / "new/two.png"))
    assert path == tmp_path / "new/two.png" and colours(path, 0.28) == (
        255,
        255,
        255,
    )  # different stages: no bands


@pytest.fixture
def figure(monkeypatch):
    """plot's figure, which it would have closed: figure() gives the axes by title and x label"""
    kept = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    return lambda: {(ax.get_title(loc="left"), ax.get_xlabel()): ax for ax in kept[-1].axes}


def chains(folder: Path, name: str, rows: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"why": "ok", "len'
    )
    return str(folder)


def test_plot_over_tokens_sampled(tmp_path, figure):
    a, b = (
        log(tmp_path / "a", [(64, 4, 3), (128, 2, 2)], tokens=100),
        log(tmp_path / "b", [(64, 4, 3), (128, 2, 2)], tokens=300),
    )
    ptst.plot([a, b])
    axes = figure()
    lines = [
        line
        for line in axes["Mean length (tokens)", "tokens sampled"].lines
        if line.get_label() in ("a", "b") or len(line.get_xdata()) == 5
    ]
    assert [list(line.get_xdata()) for line in lines] == [
        [100, 200, 300, 400, 500],
        [300, 600, 900, 1200, 1500],
    ]
    assert [list(line.get_ydata()) for line in lines] == [[32, 32, 32, 64, 64]] * 2
    borders = [
        line.get_xdata()[0]
        for line in axes["Accuracy (%)", "tokens sampled"].lines
        if len(line.get_xdata()) == 2
    ]
    assert borders == [350, 1050]  # where each run's second stage begins
    steps = axes[
        "Mean length (tokens)", "step"
    ]  # the stages are the same over the steps: bands, and no borders
    assert [text.get_text() for text in steps.texts] == ["64 × 4", "128 × 2"] and all(
        len(line.get_xdata()) == 5 for line in steps.lines
    )


def test_plot_right_and_wrong_chains(tmp_path, figure):
    """Fig. 1 (A): quartiles by hand; a truncated chain is a wrong one"""
    run = log(tmp_path / "run", [(64, 4, 3)])
    chains(
        tmp_path / "run",
        "samples.jsonl",
        [{"why": "ok", "length": n} for n in range(1, 102)]
        + [{"why": w, "length": n} for n, w in [(10, "wrong"), (20, "truncated"), (60, "format")]],
    )
    chains(
        tmp_path / "ci",
        "responses.jsonl",
        [{"right": n % 2 == 0, "why": "", "length": n} for n in range(40)],
    )
    assert ptst.read_chains(run) == (list(range(1, 102)), [10, 20, 60])
    ptst.plot([run, str(tmp_path / "ci")])
    ax = figure()["Right and wrong chains (tokens)", ""]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "run\nright",
        "run\nwrong",
        "ci\nright",
        "ci\nwrong",
    ]
    boxes = [
        (patch.get_path().vertices[:, 0].min(), patch.get_path().vertices[:, 0].max())
        for patch in ax.patches
    ]
    assert boxes[:2] == [(26, 76), (15, 40)] and boxes[2:] == [(9.5, 28.5), (10.5, 29.5)]
    path = ptst.plot([str(tmp_path / "ci")])  # an evaluation alone: this panel alone
    assert path == tmp_path / "ci" / "curves.png" and list(figure()) == [
        ("Right and wrong chains (tokens)", "")
    ]


def test_half_written_line_is_skipped_with_a_notice(tmp_path, capsys):
    run = log(tmp_path / "run", [(64, 4, 3)], tail='{"step": 4, "sta')
    assert [r["step"] for r in ptst.read_log(run)] == [1, 2, 3]
    assert "log.jsonl:4: skipped a half-written line" in capsys.readouterr().err


def test_a_step_logged_twice_counts_once(tmp_path):
    run = log(tmp_path / "run", [(64, 4, 3)])
    again = {"step": 2, "stage": 0, "max_len": 64, "group_size": 4, "len_mean": 7.0, "tokens": 1}
    with open(f"{run}/log.jsonl", "a") as f:
        f.write(json.dumps(again) + "\n")
    assert [(r["step"], r["len_mean"]) for r in ptst.read_log(run)] == [(1, 32), (2, 7), (3, 32)]


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no such file.*grpo.py"),
        ("", "it is empty"),
        ('{"st', "it is empty"),
        ('{"step": 1, "loss": 0.3}\n', "no line has.*'step', 'loss'.*grpo.py"),
    ],
)
def test_plot_of_no_log(tmp_path, text, words):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        ptst.plot([str(tmp_path)])
    assert not (tmp_path / "curves.png").exists()


def test_schedules_agree_as_far_as_a_run_has_come():
    parse = ptst.parse
    assert ptst.agree(
        parse("96x16x60"), parse("96x16x60,192x8x60"), 60
    )  # goes on with one stage more
    assert ptst.agree(
        parse("96x16x60,96x16x60"), parse("96x16x120"), 120
    )  # the same steps, written otherwise
    assert not ptst.agree(parse("96x16x60,192x8x60"), parse("96x16x120"), 61) and ptst.agree(
        parse("96x16x60,192x8x60"), parse("96x16x120"), 60
    )
    assert not ptst.agree(parse("96x16x60"), parse("96x8x60"), 1) and ptst.agree(
        parse("96x16x60"), parse("96x8x60"), 0
    )
    assert not ptst.agree(parse("96x16x60"), parse("96x16x40"), 50)  # fewer steps than were done
