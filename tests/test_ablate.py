"""tools/ablate.py: the arms differ in their stages and their start alone, what they share runs
once, and a run that goes on is the uninterrupted run. Which arm wins is asserted nowhere."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import ptst
from benchmarks import report
from tools import ablate


def words(task):
    """Returns {flag: value} of a command."""
    found = dict(zip(task.command, [*task.command[1:], None]))
    return {k: v for k, v in found.items() if k.startswith("--")}


def of_stage(tasks, stage):
    return [t for t in tasks.values() if t.command[0].endswith(stage)]


def test_the_rows_are_the_papers_with_shorter_limits():
    setting = ablate.Setting()
    for name, paper in {
        "zero": "vision-r1-zero",
        "long": "vision-r1-long",
        "vision-r1": "vision-r1",
        "zero-ptst": "zero-ptst",
        "third": "three-stage",
        "short": "table5-4kx16-4kx16",
        "double": "table5-4kx16-8kx16",
        "three-stage": "table5-4kx16-6kx12-8kx8",
        "long-16": "table5-16kx16-16kx16",
    }.items():
        ours = ptst.parse(ablate.stages_text(ablate.ROWS[name][1], setting))
        theirs = ptst.SCHEDULES[paper]
        # One stage of 200 steps and two alike of 100 are the same.
        mine = dict.fromkeys((s.max_len, s.group_size) for s in ours)
        scaled = (s.max_len * setting.scale // 4096 for s in theirs)
        assert list(mine) == list(dict.fromkeys(zip(scaled, (s.group_size for s in theirs)))), name
        if len(ours) == len(theirs) > 1:  # The shares of the steps are the same as well.
            assert len({t.steps / o.steps for o, t in zip(ours, theirs)}) == 1
        assert ptst.total_steps(ours) == (180 if name == "third" else 120)
    constant = "zero long vision-r1 third zero-ptst zero-sft-ptst pseudo-ptst medium"
    for name in constant.split():
        stages = ptst.parse(ablate.stages_text(ablate.ROWS[name][1], setting))
        assert {ptst.token_budget(s) for s in stages} == {16 * setting.scale}
    assert {row for table in ablate.TABLES.values() for row, *_ in table} == set(ablate.ROWS)
    facts = ROOT.parent / "shared" / "paper.md"
    if facts.exists():  # the figures beside ours are the paper's
        facts = facts.read_text()
        for table in ablate.TABLES.values():
            for _, name, paper in table:
                for number in re.findall(r"[\d.]+", paper.replace(",", "")):
                    assert re.search(rf"(?<![\d.]){number}(?![\d.]\d)", facts), name


def test_all_arms_share_everything_but_stages_and_start(tmp_path):
    tasks, runs = ablate.plan(list(ablate.ROWS), [0, 1], tmp_path, ablate.Setting())
    for seed in "01":
        arms = [words(t) for t in of_stage(tasks, "grpo.py") if words(t)["--seed"] == seed]
        assert len(arms) >= 13
        own = ("--stages", "--out", "--model", "--format_weight", "--system_prompt")
        rest = [sorted((k, v) for k, v in arm.items() if k not in own) for arm in arms]
        assert all(other == rest[0] for other in rest)
        assert {arm["--recipe"] for arm in arms} == {"toy"}
        starts = {}
        for task in of_stage(tasks, "grpo.py"):
            arm, kind = words(task), task.out.name.split("-")[1]
            if arm["--seed"] == seed:
                starts.setdefault(kind, set()).add(arm["--model"])
            zero = kind in ("base", "answers")  # format + result; all the others have HFRRF
            assert arm.get("--format_weight") == ("1" if zero else None)
            assert ("--system_prompt" in arm) == zero
        assert set(starts) == {"base", "ci", "answers", "pseudo"}
        assert all(len(models) == 1 for models in starts.values())
    evals = [words(t) for t in of_stage(tasks, "eval.py")]
    assert len({(e["--data"], e["--limit"], e["--max_len"]) for e in evals}) == 1
    for (row, seed), run in runs.items():
        assert run["rl"] is None or words(tasks[run["t1"]])["--model"] == str(run["rl"] / "final")
        assert row == "base" or f"seed-{seed}" in str(run["t1"])


def test_what_rows_share_runs_once_and_comes_first(tmp_path):
    tasks, _ = ablate.plan(list(ablate.ROWS), [0], tmp_path, ablate.Setting())
    assert len(of_stage(tasks, "cold_start.py")) == 2 and len(of_stage(tasks, "sft.py")) == 3
    by_stages = {}
    for task in of_stage(tasks, "grpo.py"):
        if "rl-ci" in task.out.name:
            assert words(task)["--stages"] not in by_stages
            by_stages[words(task)["--stages"]] = task
    assert "96x16x60" in by_stages and len(by_stages) == 12 + 2  # rows, and two first stages
    assert by_stages["96x16x60,192x8x60"].parent == by_stages["96x16x60"].out
    assert by_stages["96x16x60,192x8x60,384x4x60"].parent == by_stages["96x16x60,192x8x60"].out
    for t in tasks.values():  # files that a command reads are made by what it waits for
        made = [n.out for n in t.needs] + ([t.parent] if t.parent else [])
        read = [v for k, v in words(t).items() if k in ("--model", "--data") and str(tmp_path) in v]
        assert all(any(v.startswith(str(m)) for m in made) for v in read)


def test_the_interval_is_students():
    """The density of Student's t, integrated between -q and q, is .95."""
    for degrees, q in enumerate(report.T_975, 1):
        c = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        x = np.linspace(-q, q, 200_001)
        density = c * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        assert abs(np.trapezoid(density, x) - 0.95) < 1e-4
    mean, half = report.interval([1.0, 2.0, 4.0])  # The variance is 7/3.
    assert math.isclose(mean, 7 / 3)
    assert math.isclose(half, 4.303 * math.sqrt(7 / 3) / math.sqrt(3))
    assert math.isnan(report.interval([1.0])[1])


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    tasks, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting())
    task = of_stage(tasks, "grpo.py")[0]
    task.out.mkdir(parents=True)
    other = {"command": [*task.command, "--kl_coef", "0"], "key": 0}
    (task.out / "task.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another setting"):
        ablate.run_all(tasks, 1)


def test_what_rests_on_other_data_is_another_run(tmp_path):
    """A finished row counts as one only while all that it was made from is as planned."""
    first, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting())
    for task in first.values():
        task.out.mkdir(parents=True)
        (task.out / "task.json").write_text(json.dumps({"command": task.command, "key": task.key}))
    again, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting())
    assert all(task.done() for task in again.values())
    later, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting(cold=20_000))
    left = {task.out.name for task in later.values() if task.done()}
    assert left == {"rl", "test"}  # drawn without regard to the cold start
    with pytest.raises(ValueError, match="of other data"):
        ablate.run_all({out: task for out, task in later.items() if out.name.startswith("rl-")}, 1)


def script(tmp_path, name, text, needs=()):
    """A task whose command is a script of this text."""
    (tmp_path / f"{name}.py").write_text(text)
    return ablate.Task(tmp_path / name, [str(tmp_path / f"{name}.py")], list(needs), None)


def run(*tasks):
    ablate.run_all({task.out: task for task in tasks}, 2)


def test_a_command_that_fails_ends_the_run_with_its_last_words(tmp_path):
    task = script(tmp_path, "a", "print('no such digit'); raise SystemExit(3)")
    after = script(tmp_path, "b", "", [task])
    with pytest.raises(ValueError, match="(?s)status 3.*no such digit"):
        run(task, after)
    assert not task.done() and not after.out.exists()


def test_every_try_of_a_command_counts_in_its_time(tmp_path):
    flag = tmp_path / "tried"
    task = script(
        tmp_path,
        "a",
        f"import pathlib, time\ntime.sleep(.3)\nflag = pathlib.Path({str(flag)!r})\n"
        "tried = flag.exists()\nflag.touch()\nraise SystemExit(not tried)",
    )
    with pytest.raises(ValueError, match="status 1"):
        run(task)
    assert not task.done()
    run(task)
    assert task.done() and 0.6 <= task.finished()["wall"] < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_command_outlives_the_run(tmp_path, number):
    """A killed run leaves none of its commands behind, whatever the signal."""
    task = script(
        tmp_path,
        "a",
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text("
        "str(os.getpid()))\ntime.sleep(60)",
    )
    code = (
        "import pathlib, signal, sys\nfrom tools import ablate\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"out = pathlib.Path({str(task.out)!r})\n"
        f"ablate.run_all({{out: ablate.Task(out, {task.command!r}, [], None)}}, 1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.time() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.time() < until and parent.poll() is None
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(number)
    parent.wait(30)
    alive = True
    while alive and time.time() < until:
        try:
            state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
        except OSError:
            state = "X"
        alive = state not in "ZX"
        time.sleep(0.05)
    assert not alive


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two rows in earnest, with a few problems and steps."""
    root = tmp_path_factory.mktemp("ablate")
    setting = ablate.Setting(steps=2, questions=2, cold=48, test=12)
    tasks, runs = ablate.plan(["ci", "vision-r1"], [0], root, setting)
    ablate.run_all(tasks, 2)
    return SimpleNamespace(root=root, setting=setting, tasks=tasks, runs=runs)


def test_a_run_that_continues_a_shared_stage_is_the_uninterrupted_run(small):
    task = small.tasks[small.runs["vision-r1", 0]["rl"]]
    assert task.parent
    out = small.root / "at-once"
    command = [str(out) if word == str(task.out) else word for word in task.command]
    command[0] = ROOT / command[0]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    logs = []
    for folder in (task.out, out):
        rows = [json.loads(line) for line in open(folder / "log.jsonl")]
        timed = ("t_", "mem", "tokens_per_s")
        logs.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows])
    assert logs[0] == logs[1]
    assert [(r["max_len"], r["group_size"]) for r in logs[0]] == [(96, 16)] * 2 + [(192, 8)] * 2


def test_a_cut_answer_earns_nothing_and_only_the_format_with_the_answer_does(small):
    rows = [json.loads(line) for line in open(small.runs["vision-r1", 0]["rl"] / "samples.jsonl")]
    assert rows and any(row["finish"] == "length" for row in rows)
    assert all(row["reward"] == 0 for row in rows if row["finish"] == "length")
    form = re.compile(
        r"<think>((?!</?think>|</?answer>).)*</think>\s*<answer>\s*(\d+)\s*</answer>", re.S
    )
    for row in rows:
        found = form.fullmatch(row["completion"].strip())
        right = bool(found) and row["finish"] != "length" and found[2] == row["answer"]
        assert row["reward"] == float(right) and row["length"] <= row["max_len"]


def test_tables_from_a_finished_run_and_nothing_runs_twice(small, capsys):
    before = {out: task.finished() for out, task in small.tasks.items()}
    ablate.run_all(small.tasks, 2)
    assert f"{len(small.tasks)} of them finished before" in capsys.readouterr().out
    assert before == {out: task.finished() for out, task in small.tasks.items()}
    found = {key: ablate.measure(run, small.tasks) for key, run in small.runs.items()}
    text = ablate.tables(found, small.setting)
    line = next(line for line in text.splitlines() if line.startswith("| Vision-R1 |"))
    run = small.runs["vision-r1", 0]
    right = [json.loads(row)["right"] for row in open(run["t1"] / "responses.jsonl")]
    assert len(right) == 12 and f"| {100 * sum(right) / 12:.1f} |" in line
    log = [json.loads(row) for row in open(run["rl"] / "log.jsonl")]
    assert found["vision-r1", 0]["tokens"] == sum(row["tokens"] for row in log)
    assert "| Vision-R1-CI | 44.5 (3,566) | 1 |" in text and "Zero" not in text
    ablate.draw_figure(small.runs, small.root)
    assert (small.root / "figure.png").stat().st_size > 5000


def test_differences_are_paired_by_seed():
    def result(right):
        answers = dict(
            right=np.array(right, float),
            length=np.arange(1.0, 5),
            cut=np.zeros(4, bool),
            hard=np.array([True, False] * 2),
            format_ok=np.ones(4),
            alone=np.array(right, float),
        )
        return dict(t1=answers, greedy=answers, tokens=1000, cpu=10, useful=0.5)

    found = {
        ("base", 0): result([0, 0, 0, 1]),
        ("ci", 0): result([1, 0, 0, 0]),
        ("ci", 1): result([1, 1, 0, 0]),
        ("long", 1): result([1, 1, 1, 0]),
        ("vision-r1", 0): result([1, 1, 0, 0]),
        ("vision-r1", 1): result([1, 1, 1, 1]),
    }
    lines = ablate.table("Table 3: the models", found).splitlines()[4:]
    cells = {}
    for line in lines:
        name, *values = (cell.strip() for cell in line.split("|")[1:-1])
        cells[name] = values
    assert cells["Vision-R1"][4] == "" and cells["Vision-R1"][1] == "2"
    # One seed has both: over the questions 0 0 0 -1, 1.96 x .5 / 2.
    assert cells["Vision-R1-Long"][4] == "-25.0 ± 49.0 q"
    assert cells["Vision-R1-CI"][4] == "-37.5 ± 158.8"  # -25 and -50; 12.706 x 12.5
    assert cells["base model"][4] == "-50.0 ± 317.6"  # 25 against 50 and 100
    # Smudged: 1 of 2 both times; clear: 0 and 1 of 2.
    assert cells["Vision-R1-CI"][3] == "50.0, 25.0"


def test_looks_are_counted_and_their_chains_averaged_by_hand(tmp_path):
    chains = [
        "so 4 .",
        "so 4 . Wait , again so 4 .",
        "so 4 . Hmm , maybe so 5 . Wait , so 4 .",
        "Waiting Hmm so 4 .",
    ]
    rows = [
        dict(
            id=str(i),
            right=i != 1,
            length=9 + 4 * i,
            finish="stop",
            source="level 2" + ", smudged" * (i == 2),
            answer="4",
            format_ok=False,
            completion=f"<think> {c} </think>",
        )
        for i, c in enumerate(chains)
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ablate.read_answers(tmp_path)
    assert answers["looks"].tolist() == [0, 1, 2, 0]
    line = ablate.looks_table({("ci", 0): dict(t1=answers)}).splitlines()[-1]
    clear, smudged = "100.0 (67 %) | 0.0 (33 %) | none | none", "none | none | 100.0 (100 %) | none"
    assert line == f"| Vision-R1-CI | {clear} | {smudged} | -2.0 |"  # 13 against 9 and 21


def test_the_map_has_a_cell_for_each_setting_and_shares_the_tables_runs(tmp_path, monkeypatch):
    planned = {}
    monkeypatch.setattr(ablate, "run_all", lambda tasks, *_: planned.update(tasks))

    def answers(folder):
        """Makes up an evaluation: the runs are not made here."""
        long = "384x4" in str(folder) or "x4x120" in folder.name
        hard = float(re.search(r"hard-([\d.]+)", folder.name)[1]) if "hard-" in folder.name else 0.5
        right = 0.5 if long else 0.5 + hard / 10
        return dict(right=np.array([right] * 4), length=np.array([9.0]))

    monkeypatch.setattr(ablate, "read_answers", answers)
    ablate.draw_map(["scale", "lr"], [0, 1], 1, tmp_path)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "map.md").read_text().splitlines()[2:]]
    assert len(rows) == 2 * 3 * 3 and (tmp_path / "map.png").stat().st_size > 5000
    for _, _, hard, _, _, more in rows:
        assert more.strip() == f"+{float(hard.strip()[:-1]) / 10:.1f} ± 0.0"
    tables, _ = ablate.plan(ablate.ARMS, [0, 1], tmp_path, ablate.Setting(), ablate.EVALS[:1])
    assert set(tables) <= set(planned)
    assert all(planned[out].command == tables[out].command for out in tables)
    assert len({str(t.command) for t in planned.values()}) == len(planned)


@pytest.mark.parametrize("flags", [["--rows", "lnog"], ["--map", "temperature"]])
def test_a_wrong_name_ends_with_one_line(tmp_path, flags):
    command = [sys.executable, "-m", "tools.ablate", "--out", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "there are" in done.stderr and "Traceback" not in done.stderr
