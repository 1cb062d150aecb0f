"""The paper's tables in miniature: every row of Tables 3, 5 and 6 and the rows that its reviewers asked for, on the toy.

  python ptst.py ablate                          all rows, 3 seeds: tables (Markdown) and a figure in runs/ablate
  python ptst.py ablate --quick                  Zero, CI, Long and Vision-R1, one seed: under 20 minutes on 2 cores
  python ptst.py ablate --rows long,vision-r1 --seeds 5
  python ptst.py ablate --map [scale,lr,again]   where PTST beats Long: grids of settings, a heat map

A limit of 96 tokens stands for 4K: about CI's mean length, as in the paper (3,566). All rows train the same number of steps but
the ones with a third stage and with equal tokens. All arms share everything but their stages and their start: reward, learning rate, questions, data.
The learning rate was chosen on Long (NOTES.md). A row is a chain of commands of the four stages, which anybody can
give by hand; what two rows share (cold start, SFT, a first stage) runs once; a killed run goes on with the same command.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np

import ptst
import reward
import toy
from benchmarks.report import read_run

HERE = Path(__file__).resolve().parents[1]


@dataclass
class Setting:
    """what all arms of an ablation share"""

    steps: int = 60  # of a stage; the paper: 100
    questions: int = 8  # a step
    lr: float = 3e-5  # chosen on Long, not on an arm with stages
    hard: float = 0.5  # share of RL and test problems, not of the cold start's, with a smudged cell: there, thinking longer pays
    again: float = (
        toy.Reasoner.again
    )  # strength of overthinking: how readily the reasoner of the cold start looks again
    scale: int = 96  # the limit that stands for 4K
    cold: int = 10_000  # problems for the cold start
    test: int = 2_000  # held-out problems, the same for all rows and seeds


# name -> where RL starts, stages as (limit in units of `scale`, group, share of `steps`); () = no RL
ROWS = {
    "base": ("base", ()),
    "zero": ("base", ((1, 16, 2),)),
    "ci": ("ci", ()),
    "long": ("ci", ((4, 4, 2),)),
    "vision-r1": ("ci", ((1, 16, 1), (2, 8, 1))),
    "short": ("ci", ((1, 16, 1), (1, 16, 1))),
    "double": ("ci", ((1, 16, 1), (2, 16, 1))),
    "three-stage": ("ci", ((1, 16, 2 / 3), (1.5, 12, 2 / 3), (2, 8, 2 / 3))),
    "long-16": ("ci", ((4, 16, 2),)),
    "zero-ptst": ("base", ((1, 16, 1), (2, 8, 1))),
    "zero-sft-ptst": ("answers", ((1, 16, 1), (2, 8, 1))),
    "medium": ("ci", ((2, 8, 2),)),
    "group-8": ("ci", ((1, 8, 1), (2, 8, 1))),
    "group-up": ("ci", ((1, 8, 1), (2, 16, 1))),
    "third": ("ci", ((1, 16, 1), (2, 8, 1), (4, 4, 1))),
    "short-4": ("ci", ((1, 4, 2),)),
    "long-tokens": ("ci", ((4, 4, 2), (4, 4, 2.6))),  # goes on where Long ends
    "answers": ("answers", ()),
    "pseudo": ("pseudo", ()),
    "pseudo-ptst": ("pseudo", ((1, 16, 1), (2, 8, 1))),
}
# title -> (row, its name, the paper's average accuracy, the paper's mean length)
TABLES = {
    "Table 3: the models": [
        ("base", "base model", 49.6, None),
        ("zero", "Vision-R1-Zero", 50.7, 1285),
        ("ci", "Vision-R1-CI", 44.5, 3566),
        ("long", "Vision-R1-Long", 47.7, 3107),
        ("vision-r1", "Vision-R1", 55.4, 2057),
    ],
    "Table 5: the stages": [
        ("short", "4K x 16, 4K x 16", 54.3, None),
        ("double", "4K x 16, 8K x 16", 55.3, None),
        ("three-stage", "4K x 16, 6K x 12, 8K x 8", 55.1, None),
        ("long", "16K x 4, 16K x 4", 47.7, None),
        ("long-16", "16K x 16, 16K x 16", 47.9, None),
        ("vision-r1", "4K x 16, 8K x 8", 55.4, None),
    ],
    "Table 6: the cold start": [
        ("zero", "Zero", 50.7, None),
        ("zero-ptst", "Zero + PTST", 51.8, None),
        ("zero-sft-ptst", "Zero + SFT + PTST", 39.8, None),
        ("vision-r1", "Vision-R1", 55.4, None),
    ],
    "What the reviewers asked for": [
        ("medium", "fixed medium length: 8K x 8", None, None),
        ("group-8", "constant group: 4K x 8, 8K x 8", None, None),
        ("group-up", "growing group: 4K x 8, 8K x 16", None, None),
        ("double", "longer, the same group: 4K x 16, 8K x 16", 55.3, None),
        ("third", "a third stage: + 16K x 4", None, None),
        ("short-4", "ours: few samples at the short limit, 4K x 4", None, None),
        (
            "long-tokens",
            "ours: Long for as many tokens as Vision-R1 samples, 2.3 times the steps",
            None,
            None,
        ),
        ("pseudo", "cold start on the pseudo-CoT alone", None, None),
        ("pseudo-ptst", "the same, then PTST", None, None),
        ("answers", "cold start without chains", None, None),
        ("zero-sft-ptst", "the same, then PTST", 39.8, None),
        ("vision-r1", "Vision-R1", 55.4, None),
    ],
}
QUICK = ("zero", "ci", "long", "vision-r1")
# levers, each against `hard`, around the tables' setting
MAP = {
    "scale": (64, Setting.scale, 128),
    "lr": (1e-5, Setting.lr, 1e-4),
    "again": (0.3, Setting.again, 0.75),
}
MAP_HARD = (0.1, Setting.hard, 0.9)

# -----------------------------------------------------------------------------------------------------------------
# from rows to commands


@dataclass
class Task:
    """one command of a stage; it is finished when its folder holds task.json with the same key"""

    out: Path
    command: list  # a script of this folder and its arguments
    needs: list  # tasks
    parent: Path | None = None  # a GRPO run that this one continues: its folder is copied first

    @property
    def key(self):
        """a number that changes with the command and with those of all tasks that it rests on"""
        return zlib.crc32(repr((self.command, [task.key for task in self.needs])).encode())

    def finished(self):
        """what is written in the folder, of this command or of another; None = nothing"""
        file = self.out / "task.json"
        return json.loads(file.read_text()) if file.exists() else None

    def done(self):
        found = self.finished()
        return found if found and found["key"] == self.key else None


def text_of(stages, setting):
    """stages of ROWS as grpo.py takes them: "96x16x60,192x8x60" """
    return ",".join(
        f"{int(length * setting.scale)}x{group}x{round(share * setting.steps)}"
        for length, group, share in stages
    )


def shared(kind, stages):
    """the longest beginning of these stages that another row has too, from the same start"""
    parts = [stages[:n] for n in range(len(stages) - 1, 0, -1)]
    rows = [other for start, other in ROWS.values() if start == kind]
    return next(
        (part for part in parts if sum(other[: len(part)] == part for other in rows) > 1), ()
    )


def tag(setting, names):
    """what sets a folder's name apart where these fields are not the default"""
    return "".join(
        f"-{name}-{getattr(setting, name):g}"
        for name in names
        if getattr(setting, name) != getattr(Setting, name)
    )


def plan(rows, seeds, root, setting, temperatures=(("t1", 1.0), ("greedy", 0.0))):
    """tasks of these rows by folder, and (row, seed) -> {"t1": folder, "greedy": folder, "rl": folder or None}"""
    tasks, runs, data = {}, {}, Path(root) / "data"
    of_start, of_run = tag(setting, ["again"]), tag(setting, ["again", "hard", "lr", "scale"])

    def task(out, command, needs, parent=None):
        return tasks.setdefault(out, Task(out, [str(word) for word in command], needs, parent))

    def problems(name, n):
        out, hard = (
            data / (name + tag(setting, ["hard"] if name != "cold" else [])),
            setting.hard if name != "cold" else Setting.hard,
        )
        return task(out, ["ablate.py", "draw", out, n, name, hard], [])

    def cold(kind):
        drawn, out = problems("cold", setting.cold), Path(root) / f"cold-{kind}{of_start}"
        flags = ["--pseudo_cot_only", "--min_chars", 5] if kind == "pseudo" else []
        url = [
            "--mllm_url",
            f"toy:teachers?again={setting.again}",
            "--reasoner_url",
            f"toy:teachers?again={setting.again}",
        ]
        return task(
            out,
            [
                "cold_start.py",
                "--recipe",
                "toy",
                "--data",
                drawn.out / "problems.parquet",
                "--out",
                out,
                *url,
                *flags,
            ],
            [drawn],
        )

    def start(kind, seed):
        """the model that RL starts from -> (folder, needs)"""
        if kind == "base":
            return "toy:base", []
        bridged, out = (
            cold("pseudo" if kind == "pseudo" else "chains"),
            Path(root) / f"seed-{seed}" / f"sft-{kind}{of_start}",
        )
        # the filter drops four in ten chains and no pseudo-CoT, of which three epochs are as many steps as five of the others
        flags = {"answers": ["--drop_chains"], "pseudo": ["--epochs", 3]}.get(kind, [])
        sft = task(
            out,
            [
                "sft.py",
                "--recipe",
                "toy",
                "--data",
                bridged.out / "cold.jsonl",
                "--seed",
                seed,
                "--out",
                out,
                *flags,
            ],
            [bridged],
        )
        return str(out / "final"), [sft]

    def grpo(kind, stages, seed):
        """the run of these stages, which continues the run of those that another row shares -> its task"""
        model, needs = start(kind, seed)
        drawn, out = (
            problems("rl", 6000),
            Path(root)
            / f"seed-{seed}"
            / f"rl-{kind}-{text_of(stages, setting).replace(',', '-')}{of_run}",
        )
        before = grpo(kind, shared(kind, stages), seed) if shared(kind, stages) else None
        zero = (
            ["--format_weight", 1, "--system_prompt", toy.ZERO_PROMPT]
            if kind in ("base", "answers")
            else []
        )
        return task(
            out,
            [
                "grpo.py",
                "--recipe",
                "toy",
                "--model",
                model,
                "--data",
                drawn.out / "problems.parquet",
                "--stages",
                text_of(stages, setting),
                "--questions",
                setting.questions,
                "--lr",
                setting.lr,
                "--seed",
                seed,
                "--save_every",
                setting.steps,
                "--keep",
                1,
                "--no_preflight",
                "--out",
                out,
                *zero,
            ],
            [*needs, drawn] + ([before] if before else []),
            before and before.out,
        )

    for row in rows:
        kind, stages = ROWS[row]
        for seed in seeds if kind != "base" or stages else seeds[:1]:
            model, needs = start(kind, seed)
            rl = None
            if stages:
                rl = grpo(kind, stages, seed)
                model, needs = str(rl.out / "final"), [rl]
            drawn, asked = (
                problems("test", setting.test),
                toy.ZERO_PROMPT if kind in ("base", "answers") else "",
            )
            runs[row, seed] = {"rl": rl and rl.out}
            for how, temperature in temperatures:
                name = f"eval-{rl.out.name if rl else kind + of_run}-{how}"
                out = Path(root) / (f"seed-{seed}" if kind != "base" or stages else "") / name
                command = [
                    "eval.py",
                    "--recipe",
                    "toy",
                    "--model",
                    model,
                    "--data",
                    drawn.out / "problems.parquet",
                    "--limit",
                    0,
                    "--temperature",
                    temperature,
                    "--max_len",
                    4 * setting.scale,
                    "--system_prompt",
                    asked,
                    "--out",
                    out,
                ]
                runs[row, seed][how] = task(out, command, [*needs, drawn]).out
    return tasks, runs


def run_task(task, stop):
    """the command in a process with one thread; its time goes to task.json. -> an error for people, or None"""
    if stop:
        return None
    task.out.mkdir(parents=True, exist_ok=True)
    if task.parent and not (task.out / "checkpoints").exists():
        for name in ("log.jsonl", "samples.jsonl", "config.json"):
            shutil.copy(task.parent / name, task.out / name)
        shutil.copytree(task.parent / "checkpoints", task.out / "copying", dirs_exist_ok=True)
        (task.out / "copying").rename(task.out / "checkpoints")  # never half there
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with open(task.out / "output.txt", "a") as output:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, HERE / task.command[0], *task.command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
        )
        stop_with_us.append(process)
        _, status, used = os.wait4(process.pid, 0)
    with open(
        task.out / "tries.jsonl", "a"
    ) as tries:  # of a command that was stopped and went on, every try counts
        tries.write(
            json.dumps(
                dict(
                    wall=round(time.time() - began, 1), cpu=round(used.ru_utime + used.ru_stime, 1)
                )
            )
            + "\n"
        )
    if status:
        tail = "".join((task.out / "output.txt").read_text(errors="replace").splitlines(True)[-12:])
        return f"{shlex.join(['python', *task.command])}\nended with status {os.waitstatus_to_exitcode(status)}:\n{tail}"
    each = [json.loads(line) for line in (task.out / "tries.jsonl").read_text().splitlines()]
    row = dict(
        command=task.command,
        key=task.key,
        **{key: round(sum(t[key] for t in each), 1) for key in ("wall", "cpu")},
    )
    (task.out / "task.tmp").write_text(json.dumps(row) + "\n")
    (task.out / "task.tmp").replace(task.out / "task.json")
    return None


stop_with_us = []  # processes


def run_all(tasks, jobs, say):
    """every unfinished task after those that it needs, `jobs` at a time, the longest chains first"""
    for task in tasks.values():
        before = task.finished()
        if before and before["key"] != task.key:
            raise ValueError(
                f"{task.out} holds a run of another setting, or of other data or another start; choose another --out, or remove it:\n"
                f"  was {shlex.join(before['command'])}\n  now {shlex.join(task.command)}"
            )
    todo = {out: task for out, task in tasks.items() if not task.done()}
    say(
        f"{len(tasks)} commands, {len(tasks) - len(todo)} of them finished before; {jobs} at a time"
    )
    below = dict.fromkeys(
        tasks, 0
    )  # how long a chain hangs on each; what a task needs was planned before it
    for task in reversed(tasks.values()):
        for need in task.needs:
            below[need.out] = max(below[need.out], below[task.out] + 1)
    order = TopologicalSorter(
        {out: [n.out for n in task.needs if n.out in todo] for out, task in todo.items()}
    )
    order.prepare()
    ready, running, left, stop = [], {}, len(todo), []
    pool = ThreadPoolExecutor(jobs)
    try:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()], key=lambda out: -below[out])
            while ready and len(running) < jobs:
                out = ready.pop(0)
                running[pool.submit(run_task, todo[out], stop)] = out
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                out = running.pop(future)
                if error := future.result():
                    raise ValueError(error)
                order.done(out)
                left -= 1
                say(
                    f"{len(tasks) - left:4d}/{len(tasks)}  {todo[out].done()['wall']:6.0f} s  {out}"
                )
    finally:
        stop.append(True)
        for process in stop_with_us:
            if process.poll() is None:
                process.terminate()
        pool.shutdown()


# -----------------------------------------------------------------------------------------------------------------
# results

# Student's 97.5 % points by degrees of freedom; beyond 15 the last is a little wide
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


def interval(values):
    """values, one a seed -> (mean, half of the 95 % t interval; nan with one seed)"""
    n, values = len(values), list(values)
    return float(np.mean(values)), T_975[min(n - 1, 15) - 1] * float(
        np.std(values, ddof=1)
    ) / math.sqrt(n) if n > 1 else math.nan


def percent(values, signed=False):
    mean, half = interval([100 * v for v in values])
    return f"{mean:{'+' * signed}.1f}" + (f" ± {half:.1f}" if half == half else "")


def difference(pairs):
    """[(right, right of the other)] on the same questions, one a seed -> text; of one seed the interval is over questions (q)"""
    apart = [a - b for a, b in pairs]
    if len(apart) != 1:
        return percent([each.mean() for each in apart], True) if apart else ""
    return f"{100 * apart[0].mean():+.1f} ± {196 * apart[0].std(ddof=1) / math.sqrt(len(apart[0])):.1f} q"


def read_answers(folder):
    """an evaluation -> right, format, length, cut, hard, looks after the first and source, (N,) each, in one order of the questions"""
    rows = sorted(read_run(folder), key=lambda row: row["id"])
    column = lambda f, kind=float: np.array([f(row) for row in rows], kind)
    return dict(
        right=column(lambda row: row["right"]),
        format=column(lambda row: row["format_ok"]),
        length=column(lambda row: row["length"]),
        cut=column(lambda row: row["finish"] == "length", bool),
        hard=column(lambda row: "smudged" in row["source"], bool),
        looks=column(lambda row: len(re.findall(r"Wait ,|Hmm ,", row["completion"]))),
        source=column(lambda row: row["source"], str),
        alone=column(
            lambda row: (
                reward.score(
                    row["completion"], row["answer"], None, row["finish"] == "length", 1.0
                ).correct
            )
        ),
    )


def measure(run, tasks):
    """one row and seed -> its numbers; tokens, CPU seconds and groups with a signal are those of RL, of shared stages too"""
    t1, greedy = read_answers(run["t1"]), read_answers(run["greedy"])
    log = ptst.read_log(run["rl"]) if run["rl"] else []
    cpu, folder = 0, run["rl"]
    while folder:
        cpu, folder = cpu + tasks[folder].done()["cpu"], tasks[folder].parent
    groups = sum(row["tokens"] / row["len_mean"] / row["group_size"] for row in log)
    useful = 1 - sum(row["zero_var_groups"] for row in log) / groups if log else math.nan
    return dict(
        t1=t1, greedy=greedy, tokens=sum(row["tokens"] for row in log), cpu=cpu, useful=useful
    )


def table_rows(title, found):
    """Markdown lines of one table: accuracy, paired difference to Vision-R1, length, tokens, time, and the paper's numbers"""
    lines = [
        f"### {title}",
        "",
        "| | paper: accuracy (length) | seeds | T=1 % | on smudged, on clear | minus Vision-R1 | greedy % (length) | length: right, wrong | cut % "
        "| tokens sampled | groups with a signal % | RL, CPU s |",
        "|---" * 12 + "|",
    ]
    for row, name, accuracy, length in TABLES[title]:
        of = {seed: result for (r, seed), result in found.items() if r == row}
        if not of:
            continue
        mean = lambda f, of=of: float(np.mean([f(r) for r in of.values()]))
        right = {seed: r["t1"]["right"] for seed, r in of.items()}
        best = {
            seed: r["t1"]["right"]
            for (r_, seed), r in found.items()
            if r_ == "vision-r1" and row != r_ and (row == "base" or seed in of)
        }
        apart = difference([(right[0 if row == "base" else seed], best[seed]) for seed in best])
        kinds = [
            mean(lambda r, h=h: r["t1"]["right"][r["t1"]["hard"] == h].mean())
            for h in (True, False)
        ]
        chains = [
            [
                r["t1"]["length"][r["t1"]["right"] == right].mean()
                for r in of.values()
                if (r["t1"]["right"] == right).any()
            ]
            for right in (1, 0)
        ]
        lengths = ", ".join(f"{np.mean(each):.1f}" if each else "none" for each in chains)
        paper = "" if accuracy is None else f"{accuracy}" + (f" ({length:,})" if length else "")
        loose = (
            f" (answer alone {100 * mean(lambda r: r['t1']['alone'].mean()):.1f})"
            if mean(lambda r: r["t1"]["format"].mean()) < 0.5
            else ""
        )
        trained = (
            ""
            if any(math.isnan(r["useful"]) for r in of.values())
            else f"{100 * mean(lambda r: r['useful']):.0f}"
        )
        lines.append(
            f"| {name} | {paper} | {len(of)} | {percent([r.mean() for r in right.values()])}{loose} | {100 * kinds[0]:.1f}, {100 * kinds[1]:.1f} | {apart} "
            f"| {percent([r['greedy']['right'].mean() for r in of.values()])} ({mean(lambda r: r['greedy']['length'].mean()):.1f}) "
            f"| {mean(lambda r: r['t1']['length'].mean()):.1f}: {lengths} | {100 * mean(lambda r: r['t1']['cut'].mean()):.1f} "
            f"| {mean(lambda r: r['tokens']) / 1e3:,.0f}K | {trained} | {mean(lambda r: r['cpu']):,.0f} |"
        )
    return [*lines, ""]


def overlong(t1):
    """wrong chains' length minus right chains' of the same level and kind, tokens, weighted by the wrong ones; nan without any"""
    apart, weights = [], []
    for source in set(t1["source"]):
        right, wrong = (t1["length"][(t1["source"] == source) & (t1["right"] == r)] for r in (1, 0))
        if len(right) and len(wrong):
            apart.append(wrong.mean() - right.mean())
            weights.append(len(wrong))
    return float(np.average(apart, weights=weights)) if apart else math.nan


def looks_table(found):
    """accuracy at T=1 (and the share of chains) by how often a chain looks again, as it chose itself"""
    lines = [
        "### Accuracy by how often a chain looks again",
        "",
        "T=1, all seeds together; in brackets the share of the problems of that kind; a chain chooses itself how often it looks. Last, how much longer "
        "wrong chains are than right ones of the same level and kind (mean over seeds).",
        "",
        "| | clear: never | once | twice | more often | smudged: never | once | twice | more often | wrong minus right, tokens |",
        "|---" * 10 + "|",
    ]
    for row, name in (
        ("ci", "Vision-R1-CI"),
        ("long", "Vision-R1-Long"),
        ("vision-r1", "Vision-R1"),
    ):
        of = [r["t1"] for (r_, _), r in found.items() if r_ == row]
        if of:
            right, hard, looks = (
                np.concatenate([t1[key] for t1 in of]) for key in ("right", "hard", "looks")
            )
            chosen = [
                (hard == h) & (np.minimum(looks, 3) == n) for h in (False, True) for n in range(4)
            ]
            share = [100 * at.sum() / (hard == (i > 3)).sum() for i, at in enumerate(chosen)]
            cells = [
                f"{100 * right[at].mean():.1f} ({part:.0f} %)" if at.any() else "none"
                for at, part in zip(chosen, share)
            ]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {np.mean([overlong(t1) for t1 in of]):+.1f} |"
            )
    return [*lines, ""] if len(lines) > 6 else []


def tables(found, setting):
    text = [
        f"Seeds of SFT and RL; {setting.test:,} held-out problems, the same for all; mean ± half of the 95 % t interval over seeds, differences paired by seed and question (with one seed: over questions, q). A limit of {setting.scale} "
        f"stands for 4K, {setting.steps} steps a stage, {setting.questions} questions a step, lr {setting.lr:g}, {setting.hard:.0%} of the problems with a smudged cell.",
        "",
    ]
    for title in TABLES:
        rows = table_rows(title, found)
        text += rows if len(rows) > 6 else []  # more than Vision-R1 itself
    text += looks_table(found)
    return "\n".join(text)


def draw_figure(runs, root):
    """Fig. 1's panels from means over seeds: length, accuracy and reward over steps, over tokens; right and wrong chains of CI"""
    names = {"zero": "Zero", "long": "Long", "vision-r1": "Vision-R1", "ci": "CI"}
    folders = []
    for row, name in names.items():
        of = [run for (of_row, _), run in runs.items() if of_row == row]
        folder = root / "figure" / name
        folder.mkdir(parents=True, exist_ok=True)
        if of and of[0]["rl"]:
            fixed, averaged = (
                ("step", "stage", "max_len", "group_size"),
                ("len_mean", "accuracy", "reward", "tokens"),
            )
            steps = [
                {k: rows[0][k] for k in fixed}
                | {k: float(np.mean([row[k] for row in rows])) for k in averaged}
                for rows in zip(*[ptst.read_log(run["rl"]) for run in of])
            ]
            (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        elif of:
            (folder / "responses.jsonl").write_text(
                "".join((run["t1"] / "responses.jsonl").read_text() for run in of)
            )
        folders += [str(folder)] * bool(of)
    return ptst.plot(folders, str(root / "figure.png"))


def draw_map(config):
    """PTST minus Long at equal steps, T=1, for each lever against the share of hard problems -> map.md, map.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levers, seeds, tasks, runs = config.map.split(","), list(range(config.seeds)), {}, {}
    if unknown := set(levers) - set(MAP):
        raise ValueError(f"no lever {', '.join(sorted(unknown))}; there are {', '.join(MAP)}")
    cells = [(lever, value, hard) for lever in levers for value in MAP[lever] for hard in MAP_HARD]
    for lever, value, hard in cells:
        more, runs[lever, value, hard] = plan(
            ("long", "vision-r1"),
            seeds,
            config.out,
            replace(Setting(), **{lever: value, "hard": hard}),
            (("t1", 1.0),),
        )
        tasks = more | tasks
    run_all(tasks, config.jobs, lambda line: print(line, flush=True))
    lines, apart = (
        [
            "| lever | value | smudged | Long %: T=1, length | PTST %: T=1, length | PTST - Long |",
            "|---" * 6 + "|",
        ],
        {},
    )
    for lever, value, hard in cells:
        long, staged = (
            [read_answers(runs[lever, value, hard][row, seed]["t1"]) for seed in seeds]
            for row in ("long", "vision-r1")
        )
        cell = [
            f"{percent([r['right'].mean() for r in arm])}, {np.mean([r['length'].mean() for r in arm]):.1f}"
            for arm in (long, staged)
        ]
        apart[lever, value, hard] = difference(
            [(b["right"], a["right"]) for a, b in zip(long, staged)]
        )
        lines.append(
            f"| {lever} | {value:g} | {hard:.0%} | {cell[0]} | {cell[1]} | {apart[lever, value, hard]} |"
        )
    fig, axes = plt.subplots(
        1,
        len(levers),
        figsize=(4.2 * len(levers), 3.6),
        dpi=160,
        layout="constrained",
        squeeze=False,
    )
    points = {cell: float(text.split()[0]) for cell, text in apart.items()}
    most = max(4, *map(abs, points.values()))  # one scale for all levers
    for ax, lever in zip(axes[0], levers):
        ax.imshow(
            [[points[lever, value, hard] for hard in MAP_HARD] for value in MAP[lever]],
            cmap="RdBu",
            vmin=-most,
            vmax=most,
            aspect="auto",
        )
        for i, value in enumerate(MAP[lever]):
            for j, hard in enumerate(MAP_HARD):
                text, point = (
                    apart[lever, value, hard].removesuffix(" q"),
                    points[lever, value, hard],
                )
                sure = abs(point) > float(text.split()[-1])  # the interval leaves 0 out
                ax.text(
                    j,
                    i,
                    text.replace(" ± ", "\n± "),
                    ha="center",
                    va="center",
                    color="white" if abs(point) > 0.7 * most else "black",
                    weight="bold" if sure else "normal",
                )
        ax.set_xticks(range(len(MAP_HARD)), [f"{hard:.0%}" for hard in MAP_HARD])
        ax.set_yticks(range(len(MAP[lever])), [f"{value:g}" for value in MAP[lever]])
        ax.set_xlabel("RL and test problems with a smudged cell")
        ax.set_ylabel(
            {
                "scale": "first limit of PTST (tokens)",
                "lr": "learning rate",
                "again": "strength of overthinking",
            }[lever]
        )
    title = "PTST minus Long, points of accuracy at T=1 (blue: PTST ahead; bold: the 95 % interval leaves 0 out)"
    fig.suptitle(textwrap.fill(title, 50 * len(levers)), fontsize=11)
    fig.savefig(Path(config.out) / "map.png")
    (Path(config.out) / "map.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + f"\nwrote {Path(config.out) / 'map.md'} and map.png")


def ablate(config):
    """the whole command: plan, run, report"""
    seeds, setting = list(range(config.seeds)), Setting()
    rows = config.rows.split(",") if config.rows else QUICK if config.quick else list(ROWS)
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    tasks, _ = plan(rows, seeds, config.out, setting)
    began = time.time()
    run_all(tasks, config.jobs, lambda line: print(line, flush=True))
    known, everything = plan(
        list(ROWS), range(max(10, config.seeds)), config.out, setting
    )  # what earlier calls finished is reported too
    found = {
        key: measure(run, known)
        for key, run in everything.items()
        if all(known[run[how]].done() for how in ("t1", "greedy"))
    }
    text = tables(found, setting)
    times = [task.done() for task in known.values() if task.done()]
    text += f"\n{len(times)} commands: {sum(t['wall'] for t in times) / 60:.0f} minutes of one core, {sum(t['cpu'] for t in times) / 3600:.1f} CPU hours."
    (Path(config.out) / "tables.md").write_text(text + "\n")
    print(
        f"\n{text}\nthis call: {time.time() - began:.0f} s\nwrote {Path(config.out) / 'tables.md'}"
    )
    if {row for row, _ in found} & {"zero", "long", "vision-r1"}:
        print(f"wrote {draw_figure({key: everything[key] for key in found}, Path(config.out))}")


def main(argv):
    parser = argparse.ArgumentParser(
        prog="ptst.py ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", help=f"separated by commas, of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, help="default 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help=f"the rows {', '.join(QUICK)}")
    parser.add_argument(
        "--map",
        nargs="?",
        const=",".join(MAP),
        metavar="LEVERS",
        help=f"where PTST beats Long: {', '.join(MAP)} (default all), each against the share of hard problems",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="commands at a time, a thread each (default: the cores)",
    )
    parser.add_argument("--out", default="runs/ablate")
    config = parser.parse_args(argv)
    config.seeds = config.seeds or (1 if config.quick else 3)
    for signum in (signal.SIGTERM, signal.SIGHUP):  # so that run_all stops its commands too
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    draw_map(config) if config.map else ablate(config)


if __name__ == "__main__":  # one task of its own: draw OUT N NAME HARD
    from nano.data import write_parquet

    _, out, n, name, hard = sys.argv[1:]
    write_parquet(Path(out) / "problems.parquet", toy.problems(int(n), 0, name, float(hard)))
