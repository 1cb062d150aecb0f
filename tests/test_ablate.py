"""ablate.py: the arms differ in their stages and their start alone, what they share runs once, and a run that continues
another is the uninterrupted run. Which arm wins is asserted nowhere."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import ptst
from tools import ablate


def words(task):
    """--flag -> value of a command"""
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
        ours = ptst.parse(ablate.text_of(ablate.ROWS[name][1], setting))
        in_order = lambda pairs: list(
            dict.fromkeys(pairs)
        )  # one stage of 200 steps and two alike of 100 are the same
        theirs = in_order(
            (s.max_len * setting.scale // 4096, s.group_size) for s in ptst.SCHEDULES[paper]
        )
        assert in_order((s.max_len, s.group_size) for s in ours) == theirs, name
        if len(ours) == len(ptst.SCHEDULES[paper]) > 1:  # shares of the steps as well
            assert (
                len(
                    {theirs.steps / mine.steps for mine, theirs in zip(ours, ptst.SCHEDULES[paper])}
                )
                == 1
            )
        assert ptst.total_steps(ours) == (180 if name == "third" else 120)
    for name in (
        "zero",
        "long",
        "vision-r1",
        "third",
        "zero-ptst",
        "zero-sft-ptst",
        "pseudo-ptst",
        "medium",
    ):
        assert {
            ptst.token_budget(s) for s in ptst.parse(ablate.text_of(ablate.ROWS[name][1], setting))
        } == {16 * setting.scale}
    assert {row for table in ablate.TABLES.values() for row, *_ in table} == set(ablate.ROWS)
    facts = ROOT.parent / "shared" / "paper.md"
    if facts.exists():  # the figures beside ours are the paper's
        facts = facts.read_text()
        for table in ablate.TABLES.values():
            for _, name, accuracy, length in table:
                assert all(
                    re.search(rf"(?<![\d.]){x}(?![\d.]\d)", facts) for x in (accuracy, length) if x
                ), name


def test_all_arms_share_everything_but_stages_and_start(tmp_path):
    tasks, runs = ablate.plan(list(ablate.ROWS), [0, 1], tmp_path, ablate.Setting())
    for seed in "01":
        arms = [words(t) for t in of_stage(tasks, "grpo.py") if words(t)["--seed"] == seed]
        assert len(arms) >= 13
        own = ("--stages", "--out", "--model", "--format_weight", "--system_prompt")
        assert (
            len({tuple((k, v) for k, v in sorted(arm.items()) if k not in own) for arm in arms})
            == 1
        )
        starts = {}
        for t in of_stage(tasks, "grpo.py"):
            if words(t)["--seed"] == seed:
                starts.setdefault(t.out.name.split("-")[1], set()).add(words(t)["--model"])
            zero = t.out.name.split("-")[1] in (
                "base",
                "answers",
            )  # format + result; all the others HFRRF
            assert (
                words(t).get("--format_weight") == ("1" if zero else None)
                and ("--system_prompt" in words(t)) == zero
            )
        assert set(starts) == {"base", "ci", "answers", "pseudo"} and all(
            len(s) == 1 for s in starts.values()
        )
    evals = [words(t) for t in of_stage(tasks, "eval.py")]
    assert len({(e["--data"], e["--limit"], e["--max_len"]) for e in evals}) == 1
    for (row, seed), run in runs.items():
        assert run["rl"] is None or words(tasks[run["t1"]])["--model"] == str(run["rl"] / "final")
        assert row == "base" or f"seed-{seed}" in str(run["t1"])


def test_what_rows_share_runs_once_and_comes_first(tmp_path):
    tasks, _ = ablate.plan(list(ablate.ROWS), [0], tmp_path, ablate.Setting())
    assert len(of_stage(tasks, "cold_start.py")) == 2 and len(of_stage(tasks, "sft.py")) == 3
    stages = [words(t)["--stages"] for t in of_stage(tasks, "grpo.py") if "rl-ci" in t.out.name]
    assert (
        stages.count("96x16x60") == 1 and len(stages) == len(set(stages)) == 12 + 2
    )  # rows, and two first stages
    by_stages = {
        words(t)["--stages"]: t for t in of_stage(tasks, "grpo.py") if "rl-ci" in t.out.name
    }
    assert by_stages["96x16x60,192x8x60"].parent == by_stages["96x16x60"].out
    assert by_stages["96x16x60,192x8x60,384x4x60"].parent == by_stages["96x16x60,192x8x60"].out
    for t in tasks.values():  # files that a command reads are made by what it waits for
        made = [n.out for n in t.needs] + ([t.parent] if t.parent else [])
        read = [v for k, v in words(t).items() if k in ("--model", "--data") and str(tmp_path) in v]
        assert all(any(v.startswith(str(m)) for m in made) for v in read)


def test_the_interval_is_students():
    """the density of Student's t between -q and q, integrated, is .95"""
    for degrees, q in enumerate(ablate.T_975, 1):
        c = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        x = np.linspace(-q, q, 200_001)
        assert abs(np.trapezoid(c * (1 + x * x / degrees) ** (-(degrees + 1) / 2), x) - 0.95) < 1e-4
    mean, half = ablate.interval([1.0, 2.0, 4.0])
    assert math.isclose(mean, 7 / 3) and math.isclose(
        half, 4.303 * math.sqrt(7 / 3) / math.sqrt(3)
    )  # variance 7/3
    assert math.isnan(ablate.interval([1.0])[1])


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    def say(_):
        raise AssertionError("nothing may run")

    tasks, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting())
    task = of_stage(tasks, "grpo.py")[0]
    task.out.mkdir(parents=True)
    (task.out / "task.json").write_text(
        json.dumps({"command": [*task.command, "--kl_coef", "0"], "key": 0})
    )
    with pytest.raises(ValueError, match="another setting"):
        ablate.run_all(tasks, 1, say)


def test_what_rests_on_other_data_is_another_run(tmp_path):
    """a finished row counts as one only while all that it was made from is as planned"""
    first, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting())
    for task in first.values():
        task.out.mkdir(parents=True)
        (task.out / "task.json").write_text(json.dumps({"command": task.command, "key": task.key}))
    assert all(
        task.done() for task in ablate.plan(["long"], [0], tmp_path, ablate.Setting())[0].values()
    )
    later, _ = ablate.plan(["long"], [0], tmp_path, ablate.Setting(cold=20_000))
    left = {task.out.name for task in later.values() if task.done()}
    assert left == {"rl", "test"}  # drawn without regard to the cold start
    with pytest.raises(ValueError, match="of other data"):
        ablate.run_all(
            {out: task for out, task in later.items() if out.name.startswith("rl-")},
            1,
            lambda _: None,
        )


def script(path, text):
    path.write_text(text)
    return str(path)


def test_a_command_that_fails_ends_the_run_with_its_last_words(tmp_path):
    task = ablate.Task(
        tmp_path / "a",
        [script(tmp_path / "a.py", "print('no such digit'); raise SystemExit(3)")],
        [],
    )
    after = ablate.Task(tmp_path / "b", [script(tmp_path / "b.py", "")], [task])
    with pytest.raises(ValueError, match="(?s)status 3.*no such digit"):
        ablate.run_all({t.out: t for t in (task, after)}, 2, lambda _: None)
    assert not task.done() and not after.out.exists()


def test_every_try_of_a_command_counts_in_its_time(tmp_path):
    flag = tmp_path / "tried"
    work = f"import os, time; time.sleep(.3); tried = os.path.exists({str(flag)!r}); open({str(flag)!r}, 'w'); raise SystemExit(not tried)"
    task = ablate.Task(tmp_path / "a", [script(tmp_path / "work.py", work)], [])
    for _ in range(2):
        try:
            ablate.run_all({task.out: task}, 1, lambda _: None)
        except ValueError:
            assert not task.done()
    assert 0.6 <= task.done()["wall"] < 10


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """three rows in earnest, a few problems and steps"""
    root = tmp_path_factory.mktemp("ablate")
    setting = ablate.Setting(steps=2, questions=2, cold=48, test=12)
    tasks, runs = ablate.plan(["ci", "vision-r1"], [0], root, setting)
    said = []
    ablate.run_all(tasks, 2, said.append)
    return SimpleNamespace(root=root, setting=setting, tasks=tasks, runs=runs, said=said)


def test_a_run_that_continues_a_shared_stage_is_the_uninterrupted_run(small):
    task = small.tasks[small.runs["vision-r1", 0]["rl"]]
    assert task.parent
    out = small.root / "at-once"
    subprocess.run(
        [
            sys.executable,
            ROOT / task.command[0],
            *[str(out) if word == str(task.out) else word for word in task.command[1:]],
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (task.out, out)]
    strip = lambda rows: [
        {k: v for k, v in row.items() if not k.startswith(("t_", "mem"))} for row in rows
    ]
    assert strip(logs[0]) == strip(logs[1])
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
        assert row["reward"] == float(
            bool(found) and row["finish"] != "length" and found[2] == row["answer"]
        )
        assert row["length"] <= row["max_len"]


def test_tables_from_a_finished_run_and_nothing_runs_twice(small):
    before = {out: task.done() for out, task in small.tasks.items()}
    ablate.run_all(small.tasks, 2, lambda line: small.said.append(line))
    assert "0 of them" in small.said[0] and f"{len(small.tasks)} of them" in small.said[-1]
    assert before == {out: task.done() for out, task in small.tasks.items()}
    found = {key: ablate.measure(run, small.tasks) for key, run in small.runs.items()}
    text = ablate.tables(found, small.setting)
    line = next(line for line in text.splitlines() if line.startswith("| Vision-R1 |"))
    answers = [
        json.loads(row) for row in open(small.runs["vision-r1", 0]["t1"] / "responses.jsonl")
    ]
    assert len(answers) == 12 and f"| {100 * sum(r['right'] for r in answers) / 12:.1f} |" in line
    log = [json.loads(row) for row in open(small.runs["vision-r1", 0]["rl"] / "log.jsonl")]
    assert found["vision-r1", 0]["tokens"] == sum(row["tokens"] for row in log)
    assert "| Vision-R1-CI | 44.5 (3,566) | 1 |" in text and "Zero" not in text


def test_differences_are_paired_by_seed():
    def result(right):
        answers = dict(
            right=np.array(right, float),
            length=np.arange(1.0, 5),
            cut=np.zeros(4, bool),
            hard=np.array([True, False] * 2),
            format=np.ones(4),
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
    cells = {
        line.split("|")[1].strip(): line.split("|")
        for line in ablate.table_rows("Table 3: the models", found)[4:-1]
    }
    assert cells["Vision-R1"][6].strip() == "" and cells["Vision-R1"][3].strip() == "2"
    assert (
        cells["Vision-R1-Long"][6].strip() == "-25.0 ± 49.0 q"
    )  # one seed has both: over questions 0 0 0 -1, 1.96 x .5 / 2
    assert cells["Vision-R1-CI"][6].strip() == "-37.5 ± 158.8"  # -25 and -50; 12.706 x 12.5
    assert cells["base model"][6].strip() == "-50.0 ± 317.6"  # 25 against 50 and 100
    assert (
        cells["Vision-R1-CI"][5].strip() == "50.0, 25.0"
    )  # smudged: 1 of 2 both times; clear: 0 and 1 of 2


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
    line = ablate.looks_table({("ci", 0): dict(t1=answers)})[-2]
    assert (
        line
        == "| Vision-R1-CI | 100.0 (67 %) | 0.0 (33 %) | none | none | none | none | 100.0 (100 %) | none | -2.0 |"
    )  # 13 against 9 and 21


def test_the_map_has_a_cell_for_each_setting_and_shares_the_tables_runs(tmp_path, monkeypatch):
    planned = {}
    monkeypatch.setattr(ablate, "run_all", lambda tasks, *_: planned.update(tasks))

    def answers(folder):
        long = "384x4" in str(folder) or "x4x120" in folder.name
        hard = float(re.search(r"hard-([\d.]+)", folder.name)[1]) if "hard-" in folder.name else 0.5
        return dict(
            right=np.array([0.5 if long else 0.5 + hard / 10] * 4), length=np.array([9.0])
        )  # made up: the runs are not made here

    monkeypatch.setattr(ablate, "read_answers", answers)
    ablate.draw_map(SimpleNamespace(map="scale,lr", seeds=2, jobs=1, out=str(tmp_path)))
    rows = [line.split("|")[1:-1] for line in (tmp_path / "map.md").read_text().splitlines()[2:]]
    assert len(rows) == 2 * 3 * 3 and (tmp_path / "map.png").stat().st_size > 5000
    for lever, value, hard, _, _, apart in rows:
        assert apart.strip() == f"+{float(hard.strip()[:-1]) / 10:.1f} ± 0.0"
    tables, _ = ablate.plan(
        ("long", "vision-r1"), [0, 1], tmp_path, ablate.Setting(), (("t1", 1.0),)
    )
    assert set(tables) <= set(planned) and all(
        planned[out].command == tables[out].command for out in tables
    )
    assert len({str(t.command) for t in planned.values()}) == len(planned)
