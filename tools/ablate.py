"""The paper's tables in miniature, on the toy: Tables 3, 5, 6 and what its reviewers asked for.

    python -m tools.ablate                          all rows, 3 seeds -> runs/ablate/tables.md
    python -m tools.ablate --quick                  four rows, 1 seed: under 20 minutes on 2 cores
    python -m tools.ablate --rows long,vision-r1 --seeds 5
    python -m tools.ablate --map [scale,lr,again]   where PTST beats Long: grids of settings

A limit of 96 tokens stands for 4K: it is about CI's mean length, as in the paper (3,566). All rows
train equally many steps, but for those with a third stage or with equal tokens. The learning rate
was chosen on Long (NOTES.md). A row is a chain of commands of the four stages, which anybody can
give by hand; what rows share runs once, and a killed run goes on with the same command.
"""

import argparse
import ctypes
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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import reward
import toy
from nano.data import write_parquet
from nano.run import for_people, read_log

matplotlib.use("Agg")
HERE = Path(__file__).resolve().parents[1]
THREADS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ENVIRONMENT = os.environ | THREADS | dict(PYTHONPATH=str(HERE))


@dataclass
class Setting:
    """What all arms of an ablation share: they differ in their stages and their start alone."""

    steps: int = 60  # of a stage; the paper has 100
    questions: int = 8  # per step
    lr: float = 3e-5
    hard: float = 0.5  # share of RL and test problems with a smudged cell: there, thinking pays
    again: float = toy.Reasoner.again  # how readily the reasoner of the cold start looks again
    scale: int = 96  # the limit that stands for 4K
    cold: int = 10_000  # problems for the cold start; they keep the default of `hard`
    test: int = 2_000  # held-out problems, the same for all rows and seeds


# Where RL starts, and its stages as (limit in units of `scale`, group, share of `steps`).
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
    "long-tokens": ("ci", ((4, 4, 2), (4, 4, 2.6))),  # It goes on where Long ends.
    "answers": ("answers", ()),
    "pseudo": ("pseudo", ()),
    "pseudo-ptst": ("pseudo", ((1, 16, 1), (2, 8, 1))),
}
# For each table its rows: the row, its name, and the paper's average accuracy (mean length).
TABLES = {
    "Table 3: the models": [
        ("base", "base model", "49.6"),
        ("zero", "Vision-R1-Zero", "50.7 (1,285)"),
        ("ci", "Vision-R1-CI", "44.5 (3,566)"),
        ("long", "Vision-R1-Long", "47.7 (3,107)"),
        ("vision-r1", "Vision-R1", "55.4 (2,057)"),
    ],
    "Table 5: the stages": [
        ("short", "4K x 16, 4K x 16", "54.3"),
        ("double", "4K x 16, 8K x 16", "55.3"),
        ("three-stage", "4K x 16, 6K x 12, 8K x 8", "55.1"),
        ("long", "16K x 4, 16K x 4", "47.7"),
        ("long-16", "16K x 16, 16K x 16", "47.9"),
        ("vision-r1", "4K x 16, 8K x 8", "55.4"),
    ],
    "Table 6: the cold start": [
        ("zero", "Zero", "50.7"),
        ("zero-ptst", "Zero + PTST", "51.8"),
        ("zero-sft-ptst", "Zero + SFT + PTST", "39.8"),
        ("vision-r1", "Vision-R1", "55.4"),
    ],
    "What the reviewers asked for": [
        ("medium", "fixed medium length: 8K x 8", ""),
        ("group-8", "constant group: 4K x 8, 8K x 8", ""),
        ("group-up", "growing group: 4K x 8, 8K x 16", ""),
        ("double", "longer, the same group: 4K x 16, 8K x 16", "55.3"),
        ("third", "a third stage: + 16K x 4", ""),
        ("short-4", "ours: few samples at the short limit, 4K x 4", ""),
        (
            "long-tokens",
            "ours: Long for as many tokens as Vision-R1 samples, 2.3 times the steps",
            "",
        ),
        ("pseudo", "cold start on the pseudo-CoT alone", ""),
        ("pseudo-ptst", "the same, then PTST", ""),
        ("answers", "cold start without chains", ""),
        ("zero-sft-ptst", "the same, then PTST", "39.8"),
        ("vision-r1", "Vision-R1", "55.4"),
    ],
}
QUICK = ("zero", "ci", "long", "vision-r1")
EVALS = (("t1", 1.0), ("greedy", 0.0))  # name, temperature
ARMS = ("long", "vision-r1")
MAP = {  # lever: (its name in the picture, its values around the tables' setting)
    "scale": ("first limit of PTST (tokens)", (64, Setting.scale, 128)),
    "lr": ("learning rate", (1e-5, Setting.lr, 1e-4)),
    "again": ("strength of overthinking", (0.3, Setting.again, 0.75)),
}
MAP_HARD = (0.1, Setting.hard, 0.9)


# -------------------------------------------------------------------------------------------------
# from rows to commands


@dataclass
class Task:
    """A command. It is finished when its folder holds task.json with the key of this task."""

    out: Path
    command: list[str]  # a script of this repository and its arguments
    needs: list["Task"]
    parent: Path | None  # a GRPO run that this one continues; its folder is copied first

    @property
    def key(self) -> int:
        """A number that changes with the command and with all commands that it rests on."""
        return zlib.crc32(repr((self.command, [task.key for task in self.needs])).encode())

    def finished(self) -> dict:
        """What a finished command has left in the folder, be it this one or another."""
        file = self.out / "task.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def done(self) -> bool:
        return self.finished().get("key") == self.key


def stages_text(stages: tuple, setting: Setting) -> str:
    """Write stages of ROWS as grpo.py takes them: "96x16x60,192x8x60"."""
    return ",".join(
        f"{int(limit * setting.scale)}x{group}x{round(share * setting.steps)}"
        for limit, group, share in stages
    )


def shared(start: str, stages: tuple) -> tuple:
    """Return the longest beginning of these stages that another row has too, from this start."""
    others = [other for kind, other in ROWS.values() if kind == start]
    for n in range(len(stages) - 1, 0, -1):
        if sum(other[:n] == stages[:n] for other in others) > 1:
            return stages[:n]
    return ()


class Plan:
    """The tasks of rows, by folder. What several rows need is planned once, and comes first."""

    def __init__(self, root: str | Path, setting: Setting):
        self.root, self.setting, self.tasks = Path(root), setting, {}
        self.of_start, self.of_run = self.tag("again"), self.tag("again", "hard", "lr", "scale")

    def tag(self, *fields: str) -> str:
        """Name what sets a folder apart where these fields have other values than the default."""
        values = {name: getattr(self.setting, name) for name in fields}
        changed = {name: v for name, v in values.items() if v != getattr(Setting, name)}
        return "".join(f"-{name}-{value:g}" for name, value in changed.items())

    def add(self, out: Path, words: list, parent: Path | None = None) -> Path:
        """Add a command, which needs those whose folders it reads or continues."""
        command = [str(word) for word in words]
        read = [f"{word}/" for word in [parent, *command] if word != str(out)]
        tasks = self.tasks.values()
        needs = [t for t in tasks if any(word.startswith(f"{t.out}/") for word in read)]
        self.tasks.setdefault(out, Task(out, command, needs, parent))
        return out

    def stage(self, script: str, out: Path, flags: dict, switches: str = "", parent=None) -> Path:
        words = [script, "--recipe", "toy", "--out", out, *switches.split()]
        for name, value in flags.items():
            words += [f"--{name}", value]
        return self.add(out, words, parent)

    def problems(self, name: str, n: int, hard: float) -> Path:
        tag = self.tag("hard") if name != "cold" else ""
        words = ["tools/ablate.py", "draw", self.root / "data" / (name + tag), n, name, hard]
        return self.add(words[2], words) / "problems.parquet"

    def start(self, kind: str, seed: int) -> str:
        """Plan the model that RL starts from -> its folder."""
        if kind == "base":
            return "toy:base"
        pseudo = kind == "pseudo"
        teachers = f"toy:teachers?again={self.setting.again}"
        drawn = self.problems("cold", self.setting.cold, Setting.hard)
        bridged = self.root / f"cold-{'pseudo' if pseudo else 'chains'}{self.of_start}"
        switches = "--pseudo_cot_only --min_chars 5" if pseudo else ""
        flags = dict(data=drawn, mllm_url=teachers, reasoner_url=teachers)
        self.stage("cold_start.py", bridged, flags, switches)
        # The filter drops four in ten chains but no pseudo-CoT, of which three epochs are as many
        # steps as five epochs of the chains.
        switches = {"answers": "--drop_chains", "pseudo": "--epochs 3"}.get(kind, "")
        out = self.root / f"seed-{seed}" / f"sft-{kind}{self.of_start}"
        self.stage("sft.py", out, dict(data=bridged / "cold.jsonl", seed=seed), switches)
        return str(out / "final")

    def grpo(self, kind: str, stages: tuple, seed: int) -> Path:
        """Plan a run of these stages. It goes on from a run of those that another row shares."""
        before, text = shared(kind, stages), stages_text(stages, self.setting)
        parent = self.grpo(kind, before, seed) if before else None
        drawn = self.problems("rl", 6000, self.setting.hard)
        flags = dict(model=self.start(kind, seed), data=drawn, stages=text, seed=seed)
        flags |= dict(questions=self.setting.questions, lr=self.setting.lr)
        flags |= dict(save_every=self.setting.steps, keep=1)
        if kind in ("base", "answers"):  # R1-Zero's reward and system prompt
            flags |= dict(format_weight=1, system_prompt=toy.ZERO_PROMPT)
        name = f"rl-{kind}-{text.replace(',', '-')}{self.of_run}"
        out = self.root / f"seed-{seed}" / name
        return self.stage("grpo.py", out, flags, "--no_preflight", parent)

    def row(self, row: str, seed: int, evals: tuple) -> dict:
        """Plan a row -> {"rl": folder or None, name of each evaluation: folder}."""
        kind, stages = ROWS[row]
        rl = self.grpo(kind, stages, seed) if stages else None
        model = str(rl / "final") if rl else self.start(kind, seed)
        drawn = self.problems("test", self.setting.test, self.setting.hard)
        prompt = toy.ZERO_PROMPT if kind in ("base", "answers") else ""
        flags = dict(model=model, data=drawn, limit=0, system_prompt=prompt)
        flags |= dict(max_len=4 * self.setting.scale)
        folder = self.root if row == "base" else self.root / f"seed-{seed}"
        runs = {"rl": rl}
        for how, temperature in evals:
            out = folder / f"eval-{rl.name if rl else kind + self.of_run}-{how}"
            runs[how] = self.stage("eval.py", out, flags | dict(temperature=temperature))
        return runs


def plan(rows: Iterable, seeds: list[int], root: str | Path, setting: Setting, evals=EVALS):
    """Plan rows -> (tasks by folder, the folders of each (row, seed)). The base has one seed."""
    planned, runs = Plan(root, setting), {}
    for row in rows:
        for seed in seeds[:1] if row == "base" else seeds:
            runs[row, seed] = planned.row(row, seed, evals)
    return planned.tasks, runs


# -------------------------------------------------------------------------------------------------
# running the commands


def end_with_us() -> None:
    """Let the kernel end a command when this process is killed, so that none runs on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG.


def begin(task: Task) -> subprocess.Popen:
    """Start a command in a process with one thread; a run that goes on gets its parent's folder."""
    task.out.mkdir(parents=True, exist_ok=True)
    if task.parent and not (task.out / "checkpoints").exists():
        for name in ("log.jsonl", "samples.jsonl", "config.json"):
            shutil.copy(task.parent / name, task.out / name)
        shutil.copytree(task.parent / "checkpoints", task.out / "copying", dirs_exist_ok=True)
        (task.out / "copying").rename(task.out / "checkpoints")  # It is never there by half.
    command = [sys.executable, HERE / task.command[0], *task.command[1:]]
    with open(task.out / "output.txt", "a") as output:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, **pipes, env=ENVIRONMENT, preexec_fn=end_with_us)


def end(task: Task, status: int, wall: float, cpu: float) -> None:
    """Write task.json of a command that has ended. Every try of it counts in its time."""
    with open(task.out / "tries.jsonl", "a") as file:
        file.write(json.dumps(dict(wall=round(wall, 1), cpu=round(cpu, 1))) + "\n")
    if status:
        tail = (task.out / "output.txt").read_text(errors="replace").splitlines()[-12:]
        command = shlex.join(["python", *task.command])
        raise ValueError("\n".join([command, f"ended with status {status}:", *tail]))
    tries = [json.loads(line) for line in (task.out / "tries.jsonl").read_text().splitlines()]
    times = {key: round(sum(each[key] for each in tries), 1) for key in ("wall", "cpu")}
    row = dict(command=task.command, key=task.key, **times)
    (task.out / "task.tmp").write_text(json.dumps(row) + "\n")
    (task.out / "task.tmp").replace(task.out / "task.json")


def run_all(tasks: dict[Path, Task], jobs: int) -> None:
    """Run every unfinished task after those that it needs, `jobs` at a time."""
    for task in tasks.values():
        if task.finished() and not task.done():
            raise ValueError(
                f"{task.out} holds a run of another setting, or of other data or another start; "
                "choose another --out, or remove it:\n"
                f"  was {shlex.join(task.finished()['command'])}\n  now {shlex.join(task.command)}"
            )
    todo, running = [task for task in tasks.values() if not task.done()], {}
    left = len(todo)
    print(f"{len(tasks)} commands, {len(tasks) - left} of them finished before; {jobs} at a time")
    try:
        while todo or running:
            ready = [task for task in todo if all(need.done() for need in task.needs)]
            for task in ready[: jobs - len(running)]:
                todo.remove(task)
                process = begin(task)
                running[process.pid] = task, process, time.time()
            pid, status, used = os.wait4(-1, 0)
            if pid in running:
                task, process, began = running.pop(pid)
                process.returncode = os.waitstatus_to_exitcode(status)
                wall, cpu = time.time() - began, used.ru_utime + used.ru_stime
                end(task, process.returncode, wall, cpu)
                left -= 1
                print(f"{len(tasks) - left:4d}/{len(tasks)}  {wall:6.0f} s  {task.out}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


# -------------------------------------------------------------------------------------------------
# results

# Student's 97.5 % points by degrees of freedom. Beyond 15 the last one is a little wide.
_QUANTILES = "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145"
T_975 = [float(quantile) for quantile in f"{_QUANTILES} 2.131".split()]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Average values, one per seed -> (mean, half of the 95 % t interval; nan with one seed)."""
    values = list(values)
    if len(values) == 1:
        return float(values[0]), math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), T_975[min(len(values) - 1, 15) - 1] * error


def percent(values: Iterable[float], sign: str = "") -> str:
    mean, half = interval(100 * value for value in values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def difference(pairs: list[tuple]) -> str:
    """Compare right answers to the same questions, a pair of arrays (N,) per seed."""
    between = [a - b for a, b in pairs]
    if len(between) != 1:
        return percent([each.mean() for each in between], "+") if between else ""
    # With one seed the interval is over questions (q).
    half = 1.96 * between[0].std(ddof=1) / math.sqrt(len(between[0]))
    return f"{100 * between[0].mean():+.1f} ± {100 * half:.1f} q"


def read_answers(folder: Path) -> dict[str, np.ndarray]:
    """Read an evaluation as columns (N,), in one order of the questions."""
    lines = (folder / "responses.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["id"])
    columns = {name: [row[name] for row in rows] for name in ("format_ok", "length", "source")}
    columns["right"] = [float(row["right"]) for row in rows]
    columns["cut"] = [row["finish"] == "length" for row in rows]
    columns["hard"] = ["smudged" in row["source"] for row in rows]
    columns["looks"] = [len(re.findall("Wait ,|Hmm ,", row["completion"])) for row in rows]
    columns["alone"] = [
        reward.score(row["completion"], row["answer"], None, row["finish"] == "length", 1.0).correct
        for row in rows
    ]
    return {name: np.array(column) for name, column in columns.items()}


def measure(run: dict, tasks: dict[Path, Task]) -> dict:
    """Measure one row and seed. What RL cost and saw includes the stages that it shares."""
    log = read_log(run["rl"]) if run["rl"] else []
    cpu, folder = 0, run["rl"]
    while folder:
        cpu, folder = cpu + tasks[folder].finished()["cpu"], tasks[folder].parent
    groups = sum(row["tokens"] / row["len_mean"] / row["group_size"] for row in log)
    useful = 1 - sum(row["zero_var_groups"] for row in log) / groups if log else math.nan
    answers = {how: read_answers(run[how]) for how in ("t1", "greedy")}
    return answers | dict(tokens=sum(row["tokens"] for row in log), cpu=cpu, useful=useful)


def average(values: Iterable[np.ndarray], form: str = "{:.1f}") -> str:
    """Write the mean over seeds of the means of these arrays; an empty array has none."""
    means = [np.mean(each) for each in values if np.size(each)]
    return form.format(np.mean(means)) if means else "none"


HEAD = (
    "| | paper: accuracy (length) | seeds | T=1 % | on smudged, on clear | minus Vision-R1 "
    "| greedy % (length) | length: right, wrong | cut % | tokens sampled "
    "| groups with a signal % | RL, CPU s |"
)
LOOKS = """### Accuracy by how often a chain looks again

T=1, all seeds together; in brackets the share of the problems of that kind; a chain chooses \
itself how often it looks. Last, how much longer wrong chains are than right ones of the same \
level and kind (mean over seeds).

| | clear: never | once | twice | more often | smudged: never | once | twice | more often \
| wrong minus right, tokens |"""


def table(title: str, found: dict) -> str:
    """Write one table from the results by (row, seed)."""
    lines = [f"### {title}\n\n{HEAD}\n" + "|---" * 12 + "|"]
    for row, name, paper in TABLES[title]:
        of = {seed: result for (other, seed), result in found.items() if other == row}
        if not of:
            continue
        t1, greedy = ([result[how] for result in of.values()] for how in ("t1", "greedy"))
        accuracy = percent([a["right"].mean() for a in t1])
        if np.mean([a["format_ok"].mean() for a in t1]) < 0.5:
            accuracy += f" (answer alone {average(100 * a['alone'] for a in t1)})"
        pairs = []
        for (other, seed), best in found.items():
            if other == "vision-r1" != row and (row == "base" or seed in of):
                mine = of[0 if row == "base" else seed]
                pairs.append((mine["t1"]["right"], best["t1"]["right"]))
        hard, clear = ([100 * a["right"][a["hard"] == kind] for a in t1] for kind in (True, False))
        right, wrong = ([a["length"][a["right"] == kind] for a in t1] for kind in (1, 0))
        best = percent([a["right"].mean() for a in greedy])
        useful = average([100 * result["useful"] for result in of.values()], "{:.0f}")
        cells = [
            *(name, paper, str(len(of)), accuracy),
            f"{average(hard)}, {average(clear)}",
            difference(pairs),
            f"{best} ({average(a['length'] for a in greedy)})",
            f"{average(a['length'] for a in t1)}: {average(right)}, {average(wrong)}",
            average(100 * a["cut"] for a in t1),
            average([result["tokens"] / 1e3 for result in of.values()], "{:,.0f}K"),
            useful.replace("nan", ""),
            average([result["cpu"] for result in of.values()], "{:,.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 1 else ""


def overlong(t1: dict) -> float:
    """Return how much longer wrong chains are than right ones of the same level and kind."""
    between, weights = [], []
    for source in set(t1["source"]):
        of = t1["source"] == source
        right, wrong = (t1["length"][of & (t1["right"] == kind)] for kind in (1, 0))
        if len(right) and len(wrong):
            between.append(wrong.mean() - right.mean())
            weights.append(len(wrong))
    return float(np.average(between, weights=weights)) if between else math.nan


def looks_table(found: dict) -> str:
    """Write the accuracy at T=1, and the share of chains, by how often a chain looks again."""
    lines = []
    for row, name, _ in TABLES["Table 3: the models"][2:]:
        of = [result["t1"] for (other, _), result in found.items() if other == row]
        if not of:
            continue
        together = {key: np.concatenate([t1[key] for t1 in of]) for key in of[0]}
        cells = [name]
        for hard in (False, True):
            kind = together["hard"] == hard
            for n in range(4):
                right = together["right"][kind & (np.minimum(together["looks"], 3) == n)]
                share = f" ({100 * len(right) / max(1, kind.sum()):.0f} %)"
                cells.append(f"{100 * right.mean():.1f}{share}" if len(right) else "none")
        cells.append(f"{np.mean([overlong(t1) for t1 in of]):+.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([LOOKS, "|---" * 10 + "|", *lines]) if lines else ""


def tables(found: dict, setting: Setting) -> str:
    """Write all tables of which more than Vision-R1's own row was run."""
    s = setting
    texts = [
        f"Seeds of SFT and RL; {s.test:,} held-out problems, the same for all; mean ± half of the "
        "95 % t interval over seeds, differences paired by seed and question (with one seed: over "
        f"questions, q). A limit of {s.scale} stands for 4K, {s.steps} steps a stage, "
        f"{s.questions} questions a step, lr {s.lr:g}, {s.hard:.0%} of the problems with a smudged "
        "cell."
    ]
    for title, lines in TABLES.items():
        if len({row for row, *_ in lines} & {row for row, _ in found}) > 1:
            texts.append(table(title, found))
    return "\n\n".join([*texts, looks_table(found)]).strip() + "\n"


def draw_figure(runs: dict, root: Path) -> None:
    """Draw Fig. 1 from means over seeds, and the right and wrong chains of CI."""
    folders = []
    for row, name in (("zero", "Zero"), ("long", "Long"), ("vision-r1", "Vision-R1"), ("ci", "CI")):
        of = [run for (other, _), run in runs.items() if other == row]
        if not of:
            continue
        folders.append(root / "figure" / name)
        folders[-1].mkdir(parents=True, exist_ok=True)
        if row == "ci":
            text = "".join((run["t1"] / "responses.jsonl").read_text() for run in of)
            (folders[-1] / "responses.jsonl").write_text(text)
            continue
        with open(folders[-1] / "log.jsonl", "w") as file:
            for rows in zip(*(read_log(run["rl"]) for run in of)):
                step = {key: rows[0][key] for key in ("step", "stage", "max_len", "group_size")}
                for key in ("len_mean", "accuracy", "reward", "tokens"):
                    step[key] = float(np.mean([row[key] for row in rows]))
                file.write(json.dumps(step) + "\n")
    command = [sys.executable, HERE / "tools" / "plot.py", *folders, "--out", root / "figure.png"]
    subprocess.run(command, env=ENVIRONMENT, check=True)


def draw_map(levers: list[str], seeds: list[int], jobs: int, root: Path) -> None:
    """Compare PTST with Long for each lever against the share of hard problems -> map.md, .png."""
    cells = [
        (lever, value, hard) for lever in levers for value in MAP[lever][1] for hard in MAP_HARD
    ]
    runs, tasks, between = {}, {}, {}
    for lever, value, hard in cells:
        setting = replace(Setting(), **{lever: value, "hard": hard})
        more, runs[lever, value, hard] = plan(ARMS, seeds, root, setting, EVALS[:1])
        tasks = more | tasks
    run_all(tasks, jobs)
    text = "| lever | value | smudged | Long %: T=1, length | PTST %: T=1, length | PTST - Long |\n"
    text += "|---" * 6 + "|\n"
    for cell in cells:
        arms = [[read_answers(runs[cell][arm, seed]["t1"]) for seed in seeds] for arm in ARMS]
        between[cell] = difference([(ptst["right"], long["right"]) for long, ptst in zip(*arms)])
        words = [cell[0], f"{cell[1]:g}", f"{cell[2]:.0%}"]
        for arm in arms:
            accuracy = percent([answers["right"].mean() for answers in arm])
            words.append(f"{accuracy}, {average(answers['length'] for answers in arm)}")
        text += f"| {' | '.join([*words, between[cell]])} |\n"
    (root / "map.md").write_text(text)
    points = {cell: float(words.split()[0]) for cell, words in between.items()}
    most = max(4, *map(abs, points.values()))  # one scale for all levers
    look = dict(figsize=(4.2 * len(levers), 3.6), dpi=160, layout="constrained")
    fig, axes = plt.subplots(1, len(levers), squeeze=False, **look)
    for ax, lever in zip(axes[0], levers):
        label, values = MAP[lever]
        grid = [[points[lever, value, hard] for hard in MAP_HARD] for value in values]
        ax.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for i, value in enumerate(values):
            for j, hard in enumerate(MAP_HARD):
                mean, _, half, *_ = between[lever, value, hard].split()
                sure = abs(float(mean)) > float(half)  # The interval leaves 0 out.
                style = dict(weight="bold" if sure else "normal", ha="center", va="center")
                colour = "white" if abs(float(mean)) > 0.7 * most else "black"
                ax.text(j, i, f"{mean}\n± {half}", color=colour, **style)
        ax.set_xticks(range(len(MAP_HARD)), [f"{hard:.0%}" for hard in MAP_HARD])
        ax.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set_xlabel("RL and test problems with a smudged cell")
        ax.set_ylabel(label)
    title = "PTST minus Long, points of accuracy at T=1 (blue: PTST ahead; bold: 0 is outside)"
    fig.suptitle(textwrap.fill(title, 50 * len(levers)), fontsize=11)
    fig.savefig(root / "map.png")
    print(f"{text}wrote {root / 'map.md'} and map.png")


def ablate(rows: list[str], seeds: list[int], jobs: int, root: Path) -> None:
    """Plan, run and report. What earlier calls have finished is reported too."""
    setting, began = Setting(), time.time()
    run_all(plan(rows, seeds, root, setting)[0], jobs)
    tasks, runs = plan(ROWS, range(max(10, len(seeds))), root, setting)
    done = {
        key: run for key, run in runs.items() if all(tasks[run[how]].done() for how, _ in EVALS)
    }
    found = {key: measure(run, tasks) for key, run in done.items()}
    times = [task.finished() for task in tasks.values() if task.done()]
    wall, cpu = (sum(each[key] for each in times) for key in ("wall", "cpu"))
    text = tables(found, setting)
    text += (
        f"\n{len(times)} commands: {wall / 60:.0f} minutes of one core, {cpu / 3600:.1f} CPU hours."
    )
    (root / "tables.md").write_text(text + "\n")
    print(f"\n{text}\nthis call: {time.time() - began:.0f} s\nwrote {root / 'tables.md'}")
    if {row for row, _ in found} & {"zero", "long", "vision-r1"}:
        draw_figure(done, root)


def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
    """Split a list of names with commas between; a ValueError names those that do not exist."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise ValueError(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


def main():
    if sys.argv[1:2] == ["draw"]:  # a task of its own: draw OUT N NAME HARD
        out, n, name, hard = sys.argv[2:]
        write_parquet(Path(out) / "problems.parquet", toy.problems(int(n), 0, name, float(hard)))
        return
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)} (all)")
    parser.add_argument("--seeds", type=int, help="default 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help=f"the rows {', '.join(QUICK)}")
    parser.add_argument("--map", nargs="?", const=",".join(MAP), help=f"of {', '.join(MAP)} (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    args = parser.parse_args()
    seeds = list(range(args.seeds or (1 if args.quick else 3)))
    for number in (signal.SIGTERM, signal.SIGHUP):  # `run_all` then stops its commands too.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with for_people():
        if args.map:
            draw_map(chosen(args.map, MAP, "lever"), seeds, args.jobs, args.out)
        else:
            rows = args.rows or ",".join(QUICK if args.quick else ROWS)
            ablate(chosen(rows, ROWS, "row"), seeds, args.jobs, args.out)


if __name__ == "__main__":
    main()
