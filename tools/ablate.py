"""The paper's tables in miniature, on the toy: Tables 3, 5, 6 and what its reviewers asked for.

    python -m tools.ablate                          all rows, 3 seeds -> runs/ablate/tables.md
    python -m tools.ablate --quick                  four rows, 1 seed: under 20 minutes on 2 cores
    python -m tools.ablate --rows long,vision-r1 --seeds 5
    python -m tools.ablate --map [scale,lr,again]   where PTST beats Long: grids of settings

A limit of 96 tokens stands for 4K: it is about CI's mean length, as in the paper (3,566). The
learning rate was chosen on Long (NOTES.md). A row is a chain of commands of the four stages, which
anybody can give by hand; what rows share runs once, and a killed run goes on when called again.
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
from benchmarks.report import interval
from nano.data import write_parquet
from nano.run import for_people, read_log
from tools import plot

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

    def tag(self, *fields: str) -> str:
        """Name those of the fields that differ from the default, for the name of a folder."""
        values = ((name, getattr(self, name)) for name in fields)
        return "".join(f"-{k}-{value:g}" for k, value in values if value != getattr(Setting, k))


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
_TABLES = """
Table 3: the models
base | base model | 49.6
zero | Vision-R1-Zero | 50.7 (1,285)
ci | Vision-R1-CI | 44.5 (3,566)
long | Vision-R1-Long | 47.7 (3,107)
vision-r1 | Vision-R1 | 55.4 (2,057)

Table 5: the stages
short | 4K x 16, 4K x 16 | 54.3
double | 4K x 16, 8K x 16 | 55.3
three-stage | 4K x 16, 6K x 12, 8K x 8 | 55.1
long | 16K x 4, 16K x 4 | 47.7
long-16 | 16K x 16, 16K x 16 | 47.9
vision-r1 | 4K x 16, 8K x 8 | 55.4

Table 6: the cold start
zero | Zero | 50.7
zero-ptst | Zero + PTST | 51.8
zero-sft-ptst | Zero + SFT + PTST | 39.8
vision-r1 | Vision-R1 | 55.4

What the reviewers asked for
medium | fixed medium length: 8K x 8 |
group-8 | constant group: 4K x 8, 8K x 8 |
group-up | growing group: 4K x 8, 8K x 16 |
double | longer, the same group: 4K x 16, 8K x 16 | 55.3
third | a third stage: + 16K x 4 |
short-4 | ours: few samples at the short limit, 4K x 4 |
long-tokens | ours: Long for as many tokens as Vision-R1 samples, 2.3 times the steps |
pseudo | cold start on the pseudo-CoT alone |
pseudo-ptst | the same, then PTST |
answers | cold start without chains |
zero-sft-ptst | the same, then PTST | 39.8
vision-r1 | Vision-R1 | 55.4
"""
TABLES = {}
for _block in _TABLES.strip().split("\n\n"):
    _title, *_rows = _block.splitlines()
    TABLES[_title] = [[cell.strip() for cell in row.split("|")] for row in _rows]
QUICK = ("zero", "ci", "long", "vision-r1")
EVALS = (("t1", 1.0), ("greedy", 0.0))  # name, temperature
ARMS = ("long", "vision-r1")
MAP = {  # lever: (its name in the picture, its values around the tables' setting)
    "scale": ("first limit of PTST (tokens)", (64, Setting.scale, 128)),
    "lr": ("learning rate", (1e-5, Setting.lr, 1e-4)),
    "again": ("strength of overthinking", (0.3, Setting.again, 0.75)),
}
MAP_HARD = (0.1, Setting.hard, 0.9)
VARIED = ("again", "hard", "lr", "scale")  # what the map varies


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
    scale, steps = setting.scale, setting.steps
    return ",".join(
        f"{int(l * scale)}x{group}x{round(share * steps)}" for l, group, share in stages
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

    def add(self, script: str, out: Path, flags: dict, switches: str = "", parent=None) -> Path:
        """Add a command of a stage, which needs those whose folders it reads or continues."""
        words = [script, "--recipe", "toy", "--out", out, *switches.split()]
        for name, value in flags.items():
            words += [f"--{name}", value]
        read = [f"{word}/" for word in [parent, *words] if word != out]
        tasks = self.tasks.values()
        needs = [t for t in tasks if any(word.startswith(f"{t.out}/") for word in read)]
        self.tasks.setdefault(out, Task(out, [str(word) for word in words], needs, parent))
        return out

    def problems(self, name: str, n: int) -> Path:
        setting = Setting() if name == "cold" else self.setting
        out = self.root / "data" / (name + setting.tag("hard"))
        words = ["tools.ablate", "draw", str(out), str(n), name, str(setting.hard)]
        self.tasks.setdefault(out, Task(out, words, [], None))
        return out / "problems.parquet"

    def start(self, kind: str, seed: int) -> str:
        """Plan the model that RL starts from -> its folder."""
        if kind == "base":
            return "toy:base"
        what, tag = "pseudo" if kind == "pseudo" else "chains", self.setting.tag("again")
        teachers = f"toy:teachers?again={self.setting.again}"
        flags = dict(data=self.problems("cold", self.setting.cold))
        flags |= dict(mllm_url=teachers, reasoner_url=teachers)
        switches = "--pseudo_cot_only --min_chars 5" if kind == "pseudo" else ""
        cold = self.add("cold_start.py", self.root / f"cold-{what}{tag}", flags, switches)
        # The filter drops four in ten chains but no pseudo-CoT, of which three epochs are as many
        # steps as five epochs of the chains.
        switches = {"answers": "--drop_chains", "pseudo": "--epochs 3"}.get(kind, "")
        out = self.root / f"seed-{seed}" / f"sft-{kind}{tag}"
        self.add("sft.py", out, dict(data=cold / "cold.jsonl", seed=seed), switches)
        return str(out / "final")

    def grpo(self, kind: str, stages: tuple, seed: int) -> Path:
        """Plan a run of these stages. It goes on from a run of those that another row shares."""
        before, text = shared(kind, stages), stages_text(stages, self.setting)
        parent = self.grpo(kind, before, seed) if before else None
        drawn = self.problems("rl", 6000)
        flags = dict(model=self.start(kind, seed), data=drawn, stages=text, seed=seed)
        flags |= dict(questions=self.setting.questions, lr=self.setting.lr)
        flags |= dict(save_every=self.setting.steps, keep=1)
        if kind in ("base", "answers"):  # R1-Zero's reward and system prompt
            flags |= dict(format_weight=1, system_prompt=toy.ZERO_PROMPT)
        name = f"rl-{kind}-{text.replace(',', '-')}{self.setting.tag(*VARIED)}"
        out = self.root / f"seed-{seed}" / name
        return self.add("grpo.py", out, flags, "--no_preflight", parent)

    def row(self, row: str, seed: int, evals: tuple) -> dict:
        """Plan a row -> {"rl": folder or None, name of each evaluation: folder}."""
        kind, stages = ROWS[row]
        rl = self.grpo(kind, stages, seed) if stages else None
        name = rl.name if rl else kind + self.setting.tag(*VARIED)
        flags = dict(model=rl / "final" if rl else self.start(kind, seed))
        flags |= dict(data=self.problems("test", self.setting.test), limit=0)
        flags |= dict(system_prompt=toy.ZERO_PROMPT if kind in ("base", "answers") else "")
        flags |= dict(max_len=4 * self.setting.scale)
        folder = self.root if row == "base" else self.root / f"seed-{seed}"
        runs = {"rl": rl}
        for how, temperature in evals:
            flags["temperature"] = temperature
            runs[how] = self.add("eval.py", folder / f"eval-{name}-{how}", flags)
        return runs


def plan(rows: Iterable, seeds: Iterable, root: str | Path, setting: Setting, evals=EVALS):
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
    if task.parent and not task.out.exists():
        part = task.out.with_name(f"copying-{task.out.name}")  # A folder is never there by half.
        own = shutil.ignore_patterns("final", "*.txt", "task.json")
        shutil.copytree(task.parent, part, ignore=own, dirs_exist_ok=True)
        part.rename(task.out)
    task.out.mkdir(parents=True, exist_ok=True)
    script, *words = task.command
    # A tool must not run as a file: the files beside it would hide modules of Python.
    start = [HERE / script] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *start, *words]
    with open(task.out / "output.txt", "a") as output:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, **pipes, env=ENVIRONMENT, preexec_fn=end_with_us)


def end(task: Task, status: int, wall: float, cpu: float) -> None:
    """Write task.json of a command that has ended. Every try of it counts in its time."""
    tries = task.out / "tries.txt"
    with open(tries, "a") as file:
        file.write(f"{wall:.1f} {cpu:.1f}\n")
    if status:
        tail = (task.out / "output.txt").read_text(errors="replace").splitlines()[-12:]
        command = shlex.join(["python", *task.command])
        raise ValueError("\n".join([command, f"ended with status {status}:", *tail]))
    wall, cpu = np.loadtxt(tries, ndmin=2).sum(0).round(1).tolist()
    row = dict(command=task.command, key=task.key, wall=wall, cpu=cpu)
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
    ended = len(tasks) - len(todo)
    print(f"{len(tasks)} commands, {ended} of them finished before; {jobs} at a time")
    try:
        while todo or running:
            ready = [task for task in todo if all(need.done() for need in task.needs)]
            for task in ready[: jobs - len(running)]:
                todo.remove(task)
                process = begin(task)
                running[process.pid] = task, process, time.time()
            pid, status, used = os.wait4(-1, 0)  # It tells the CPU time of this child alone.
            task, process, began = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.time() - began
            end(task, process.returncode, wall, used.ru_utime + used.ru_stime)
            ended += 1
            print(f"{ended:4d}/{len(tasks)}  {wall:6.0f} s  {task.out}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


# -------------------------------------------------------------------------------------------------
# results


def percent(arrays: list[np.ndarray], sign: str = "") -> str:
    """Write the mean over seeds of the means of these arrays in percent, with its interval."""
    mean, half = interval([100 * array.mean() for array in arrays])
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def difference(pairs: list[tuple]) -> str:
    """Compare right answers to the same questions, a pair of arrays (N,) per seed."""
    between = [a - b for a, b in pairs]
    if len(between) != 1:
        return percent(between, "+") if between else ""
    # With one seed the interval is over questions (q).
    half = 1.96 * between[0].std(ddof=1) / math.sqrt(len(between[0]))
    return f"{100 * between[0].mean():+.1f} ± {100 * half:.1f} q"


def average(values: Iterable[np.ndarray], form: str = ".1f") -> str:
    """Write the mean over seeds of the means of these arrays; an empty array has none."""
    means = [np.mean(each) for each in values if np.size(each)]
    return format(np.mean(means), form) if means else "none"


def markdown(head: str, lines: list[list[str]]) -> str:
    """Write a table under this line of titles."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def read_answers(folder: Path) -> dict[str, np.ndarray]:
    """Read an evaluation as columns (N,), in one order of the questions."""
    lines = (folder / "responses.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["id"])
    for row in rows:
        row["cut"], row["hard"] = row["finish"] == "length", "smudged" in row["source"]
        row["looks"] = len(re.findall("Wait ,|Hmm ,", row["completion"]))
        score = reward.score(row["completion"], row["answer"], None, row["cut"], 1.0)
        row["right"], row["alone"] = float(row["right"]), score.correct
    names = "right alone format_ok length cut hard looks source".split()
    return {name: np.array([row[name] for row in rows]) for name in names}


def measure(run: dict, tasks: dict[Path, Task]) -> dict:
    """Measure one row and seed. What RL cost and saw includes the stages that it shares."""
    log = read_log(run["rl"]) if run["rl"] else []
    cpu, folder = 0, run["rl"]
    while folder:
        cpu, folder = cpu + tasks[folder].finished()["cpu"], tasks[folder].parent
    groups = sum(row["tokens"] / row["len_mean"] / row["group_size"] for row in log)
    useful = 1 - sum(row["zero_var_groups"] for row in log) / groups if log else math.nan
    answers = {how: read_answers(run[how]) for how, _ in EVALS}
    return answers | dict(tokens=sum(row["tokens"] for row in log), cpu=cpu, useful=useful)


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


def of_row(found: dict, row: str) -> dict:
    """Return what was found, or ran, of a row, by seed."""
    return {seed: result for (other, seed), result in found.items() if other == row}


def table(title: str, found: dict) -> str:
    """Write one table from the results by (row, seed)."""
    lines, best = [], of_row(found, "vision-r1")
    for row, name, paper in TABLES[title]:
        of = of_row(found, row)
        if not of:
            continue
        t1, greedy = ([result[how] for result in of.values()] for how in ("t1", "greedy"))
        accuracy = percent([a["right"] for a in t1])
        if np.mean([a["format_ok"].mean() for a in t1]) < 0.5:
            accuracy += f" (answer alone {average(100 * a['alone'] for a in t1)})"
        mine = dict.fromkeys(best, of[0]) if row == "base" else of
        seeds = [seed for seed in best if seed in mine and row != "vision-r1"]
        hard, clear = ([100 * a["right"][a["hard"] == kind] for a in t1] for kind in (True, False))
        right, wrong = ([a["length"][a["right"] == kind] for a in t1] for kind in (1, 0))
        length = average(a["length"] for a in greedy)
        useful = average([100 * result["useful"] for result in of.values()], ".0f")
        cells = [name, paper, str(len(of)), accuracy, f"{average(hard)}, {average(clear)}"]
        cells += [difference([(mine[s]["t1"]["right"], best[s]["t1"]["right"]) for s in seeds])]
        cells += [f"{percent([a['right'] for a in greedy])} ({length})"]
        cells += [f"{average(a['length'] for a in t1)}: {average(right)}, {average(wrong)}"]
        cells += [average(100 * a["cut"] for a in t1)]
        cells += [average([result["tokens"] / 1e3 for result in of.values()], ",.0f") + "K"]
        cells += [useful.replace("nan", "")]
        cells += [average([result["cpu"] for result in of.values()], ",.0f")]
        lines.append(cells)
    return f"### {title}\n\n{markdown(HEAD, lines)}"


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
        of = [result["t1"] for result in of_row(found, row).values()]
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
        lines.append([*cells, f"{np.mean([overlong(t1) for t1 in of]):+.1f}"])
    return markdown(LOOKS, lines) if lines else ""


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
        of, folder = list(of_row(runs, row).values()), root / "figure" / name
        if not of:
            continue
        folders.append(str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if row == "ci":
            text = "".join((run["t1"] / "responses.jsonl").read_text() for run in of)
            (folder / "responses.jsonl").write_text(text)
            continue
        text = ""
        for rows in zip(*(read_log(run["rl"]) for run in of)):
            names = ("len_mean", "accuracy", "reward", "tokens")
            means = {key: float(np.mean([row[key] for row in rows])) for key in names}
            text += json.dumps(rows[0] | dict(len_correct=None, len_wrong=None) | means) + "\n"
        (folder / "log.jsonl").write_text(text)
    plot.plot(folders, str(root / "figure.png"))


def draw_map(levers: list[str], seeds: list[int], jobs: int, root: Path) -> None:
    """Compare PTST with Long for each lever against the share of hard problems -> map.md, .png."""
    runs, tasks, between, lines = {}, {}, {}, []
    for cell in [(lever, v, hard) for lever in levers for v in MAP[lever][1] for hard in MAP_HARD]:
        setting = replace(Setting(), **{cell[0]: cell[1], "hard": cell[2]})
        more, runs[cell] = plan(ARMS, seeds, root, setting, EVALS[:1])
        tasks = more | tasks
    run_all(tasks, jobs)
    for cell in runs:
        arms = [[read_answers(runs[cell][arm, seed]["t1"]) for seed in seeds] for arm in ARMS]
        between[cell] = difference([(ptst["right"], long["right"]) for long, ptst in zip(*arms)])
        cells = [cell[0], f"{cell[1]:g}", f"{cell[2]:.0%}"]
        for arm in arms:
            cells.append(
                f"{percent([a['right'] for a in arm])}, {average(a['length'] for a in arm)}"
            )
        lines.append([*cells, between[cell]])
    head = "| lever | value | smudged | Long %: T=1, length | PTST %: T=1, length | PTST - Long |"
    text = markdown(head, lines) + "\n"
    (root / "map.md").write_text(text)
    fig, axes = plt.subplots(1, len(levers), squeeze=False, layout="constrained")
    fig.set_size_inches(5 * len(levers), 4)
    points = {cell: float(words.split()[0]) for cell, words in between.items()}
    most = 2 * max(4, *map(abs, points.values()))  # one scale for all levers, pale enough for words
    for ax, lever in zip(axes[0], levers):
        label, values = MAP[lever]
        grid = [[(lever, value, hard) for hard in MAP_HARD] for value in values]
        colours = [[points[cell] for cell in row] for row in grid]
        ax.imshow(colours, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for i, row in enumerate(grid):
            for j, cell in enumerate(row):
                ax.text(j, i, between[cell], ha="center", va="center")
        ax.set_xticks(range(len(MAP_HARD)), [f"{hard:.0%}" for hard in MAP_HARD])
        ax.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set(xlabel="RL and test problems with a smudged cell", ylabel=label)
    fig.suptitle("PTST minus Long, points at T=1 (blue: PTST ahead)")
    fig.savefig(root / "map.png", dpi=160)
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
    text = (
        tables(found, setting) + f"\n{len(times)} commands: {wall / 60:.0f} minutes of one core, "
    )
    text += f"{cpu / 3600:.1f} CPU hours."
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.ablate", None, __doc__, formatter_class=raw)
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
