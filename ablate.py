"""The paper's tables in miniature: every row of Tables 3, 5 and 6 and the rows that its reviewers asked for, on the toy.

  python ptst.py ablate                          all rows, 3 seeds: tables (Markdown) and a figure in runs/ablate
  python ptst.py ablate --quick                  Zero, CI, Long and Vision-R1, one seed: under 20 minutes on 2 cores
  python ptst.py ablate --rows long,vision-r1 --seeds 5
  python ptst.py ablate --map [scale,lr,again]   where PTST beats Long: grids of settings, a heat map

A limit of 96 tokens stands for 4K: about CI's mean length, as in the paper (3,566). All rows train the same number of steps but
the one with a third stage. All arms share everything but their stages and their start: reward, learning rate, questions, data.
The learning rate was chosen on Long alone (NOTES.md). A row is a chain of commands of the four stages, which anybody can
give by hand; what two rows share (cold start, SFT, a first stage) runs once; a killed run goes on with the same command.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import ptst
import toy
from report import read_run

HERE = Path(__file__).resolve().parent


@dataclass
class Setting:
    """what all arms of an ablation share"""

    steps: int = 60  # of a stage; the paper: 100
    questions: int = 8  # a step
    lr: float = 3e-5  # chosen on Long
    hard: float = 0.5  # share of RL and test problems with a smudged cell: there, thinking longer pays
    again: float = toy.Reasoner.again  # strength of overthinking: how readily the reasoner of the cold start looks again
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
    "answers": ("answers", ()),
    "pseudo": ("pseudo", ()),
    "pseudo-ptst": ("pseudo", ((1, 16, 1), (2, 8, 1))),
}
# title -> (row, its name, the paper's average accuracy, the paper's mean length)
TABLES = {
    "Table 3: the models": [
        ("base", "base model", 49.6, None), ("zero", "Vision-R1-Zero", 50.7, 1285), ("ci", "Vision-R1-CI", 44.5, 3566),
        ("long", "Vision-R1-Long", 47.7, 3107), ("vision-r1", "Vision-R1", 55.4, 2057)],
    "Table 5: the stages": [
        ("short", "4K x 16, 4K x 16", 54.3, None), ("double", "4K x 16, 8K x 16", 55.3, None),
        ("three-stage", "4K x 16, 6K x 12, 8K x 8", 55.1, None), ("long", "16K x 4, 16K x 4", 47.7, None),
        ("long-16", "16K x 16, 16K x 16", 47.9, None), ("vision-r1", "4K x 16, 8K x 8", 55.4, None)],
    "Table 6: the cold start": [
        ("zero", "Zero", 50.7, None), ("zero-ptst", "Zero + PTST", 51.8, None), ("zero-sft-ptst", "Zero + SFT + PTST", 39.8, None),
        ("vision-r1", "Vision-R1", 55.4, None)],
    "What the reviewers asked for": [
        ("medium", "fixed medium length: 8K x 8", None, None), ("group-8", "constant group: 4K x 8, 8K x 8", None, None),
        ("group-up", "growing group: 4K x 8, 8K x 16", None, None), ("double", "longer, the same group: 4K x 16, 8K x 16", 55.3, None),
        ("third", "a third stage: + 16K x 4", None, None), ("pseudo", "cold start on the pseudo-CoT alone", None, None),
        ("pseudo-ptst", "the same, then PTST", None, None), ("answers", "cold start without chains", None, None),
        ("zero-sft-ptst", "the same, then PTST", 39.8, None), ("vision-r1", "Vision-R1", 55.4, None)],
}  # fmt: skip
QUICK = ("zero", "ci", "long", "vision-r1")
MAP = {"scale": (64, 96, 128), "lr": (1e-5, 3e-5, 1e-4), "again": (0.3, 0.6, 0.75)}  # levers, each against `hard`, around the tables' setting
MAP_HARD = (0.1, 0.5, 0.9)

# -----------------------------------------------------------------------------------------------------------------
# from rows to commands


@dataclass
class Task:
    """one command of a stage; it is finished when its folder holds task.json with the same command"""

    out: Path
    command: list  # of python's arguments
    needs: list  # tasks
    parent: Path | None = None  # a GRPO run that this one continues: its folder is copied first

    def done(self):
        try:
            return json.loads((self.out / "task.json").read_text())
        except FileNotFoundError:
            return None


def text_of(stages, setting):
    """stages of ROWS as grpo.py takes them: "96x16x60,192x8x60" """
    return ",".join(f"{int(length * setting.scale)}x{group}x{round(share * setting.steps)}" for length, group, share in stages)


def shared(kind, stages):
    """the longest beginning of these stages that another row has too, from the same start"""
    parts = [stages[:n] for n in range(len(stages) - 1, 0, -1)]
    rows = [other for start, other in ROWS.values() if start == kind]
    return next((part for part in parts if sum(other[: len(part)] == part for other in rows) > 1), ())


def tag(setting, names):
    """what sets a folder's name apart where these fields are not the default"""
    return "".join(f"-{name}-{getattr(setting, name):g}" for name in names if getattr(setting, name) != getattr(Setting, name))


def plan(rows, seeds, root, setting, temperatures=(("t1", 1.0), ("greedy", 0.0))):
    """tasks of these rows by folder, and (row, seed) -> {"t1": folder, "greedy": folder, "rl": folder or None}"""
    tasks, runs, data = {}, {}, Path(root) / "data"
    of_start, of_run = tag(setting, ["again"]), tag(setting, ["again", "hard", "lr", "scale"])

    def task(out, command, needs, parent=None):
        return tasks.setdefault(out, Task(out, [str(word) for word in command], needs, parent))

    def problems(name, n):
        out, hard = data / (name + tag(setting, ["hard"] if name != "cold" else [])), setting.hard if name != "cold" else Setting.hard
        return task(out, [HERE / "ablate.py", "draw", out, n, name, hard], [])

    def cold(kind):
        drawn, out = problems("cold", setting.cold), Path(root) / f"cold-{kind}{of_start}"
        flags = ["--pseudo_cot_only", "--min_chars", 5] if kind == "pseudo" else []
        url = ["--mllm_url", f"toy:teachers?again={setting.again}", "--reasoner_url", f"toy:teachers?again={setting.again}"]
        return task(out, [HERE / "cold_start.py", "--recipe", "toy", "--data", drawn.out / "problems.parquet", "--out", out, *url, *flags], [drawn])

    def start(kind, seed):
        """the model that RL starts from -> (folder, needs)"""
        if kind == "base":
            return toy.find("toy:base"), []
        bridged, out = cold("pseudo" if kind == "pseudo" else "chains"), Path(root) / f"seed-{seed}" / f"sft-{kind}{of_start}"
        # the filter drops four in ten chains and no pseudo-CoT, of which three epochs are as many steps as five of the others
        flags = {"answers": ["--drop_chains"], "pseudo": ["--epochs", 3]}.get(kind, [])
        sft = task(out, [HERE / "sft.py", "--recipe", "toy", "--data", bridged.out / "cold.jsonl", "--seed", seed, "--out", out, *flags], [bridged])
        return str(out / "final"), [sft]

    def grpo(kind, stages, seed):
        """the run of these stages, which continues the run of those that another row shares -> its task"""
        model, needs = start(kind, seed)
        drawn, out = problems("rl", 6000), Path(root) / f"seed-{seed}" / f"rl-{kind}-{text_of(stages, setting).replace(',', '-')}{of_run}"
        before = grpo(kind, shared(kind, stages), seed) if shared(kind, stages) else None
        zero = ["--format_weight", 1, "--system_prompt", toy.ZERO_PROMPT] if kind in ("base", "answers") else []
        return task(out, [HERE / "grpo.py", "--recipe", "toy", "--model", model, "--data", drawn.out / "problems.parquet", "--stages", text_of(stages, setting),
                          "--questions", setting.questions, "--lr", setting.lr, "--seed", seed, "--save_every", setting.steps, "--keep", 1,
                          "--no_preflight", "--out", out, *zero], [*needs, drawn] + ([before] if before else []), before and before.out)  # fmt: skip

    for row in rows:
        kind, stages = ROWS[row]
        for seed in seeds if kind != "base" or stages else seeds[:1]:
            model, needs = start(kind, seed)
            rl = None
            if stages:
                rl = grpo(kind, stages, seed)
                model, needs = str(rl.out / "final"), [rl]
            drawn, asked = problems("test", setting.test), toy.ZERO_PROMPT if kind in ("base", "answers") else ""
            runs[row, seed] = {"rl": rl and rl.out}
            for how, temperature in temperatures:
                name = f"eval-{rl.out.name if rl else kind + of_run}-{how}"
                out = Path(root) / (f"seed-{seed}" if kind != "base" or stages else "") / name
                command = [HERE / "eval.py", "--recipe", "toy", "--model", model, "--data", drawn.out / "problems.parquet", "--limit", 0, "--temperature",
                           temperature, "--max_len", 4 * setting.scale, "--system_prompt", asked, "--out", out]  # fmt: skip
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
        process = subprocess.Popen([sys.executable, *task.command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)
        stop_with_us.append(process)
        _, status, used = os.wait4(process.pid, 0)
    with open(task.out / "tries.jsonl", "a") as tries:  # of a command that was stopped and went on, every try counts
        tries.write(json.dumps(dict(wall=round(time.time() - began, 1), cpu=round(used.ru_utime + used.ru_stime, 1))) + "\n")
    if status:
        tail = "".join((task.out / "output.txt").read_text(errors="replace").splitlines(True)[-12:])
        return f"{shlex.join(['python', *task.command])}\nended with status {os.waitstatus_to_exitcode(status)}:\n{tail}"
    each = [json.loads(line) for line in (task.out / "tries.jsonl").read_text().splitlines()]
    row = dict(command=task.command, **{key: round(sum(t[key] for t in each), 1) for key in ("wall", "cpu")})
    (task.out / "task.json").write_text(json.dumps(row) + "\n")
    return None


stop_with_us = []  # processes


def run_all(tasks, jobs, say):
    """every unfinished task after those that it needs, `jobs` at a time, the longest chains first"""
    for task in tasks.values():
        before = task.done()
        if before and before["command"] != task.command:
            raise ValueError(f"{task.out} holds a run of another setting; choose another --out, or remove it:\n  was {shlex.join(before['command'])}\n"
                             f"  now {shlex.join(task.command)}")  # fmt: skip
    todo = {out: task for out, task in tasks.items() if not task.done()}
    say(f"{len(tasks)} commands, {len(tasks) - len(todo)} of them finished before; {jobs} at a time")
    depth = {}

    def below(out):  # how long a chain hangs on it
        if out not in depth:
            depth[out] = 1 + max((below(t.out) for t in tasks.values() if any(n.out == out for n in t.needs)), default=0)
        return depth[out]

    order, running, stop = sorted(todo, key=lambda out: -below(out)), {}, []
    pool = ThreadPoolExecutor(jobs)
    try:
        while order or running:
            for out in [out for out in order if not any(n.out in order or n.out in running.values() for n in todo[out].needs)][: jobs - len(running)]:
                order.remove(out)
                running[pool.submit(run_task, todo[out], stop)] = out
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                out = running.pop(future)
                if error := future.result():
                    raise ValueError(error)
                used = todo[out].done()
                say(f"{len(tasks) - len(order) - len(running):4d}/{len(tasks)}  {used['wall']:6.0f} s  {out}")
    finally:
        stop.append(True)
        for process in stop_with_us:
            if process.poll() is None:
                process.terminate()
        pool.shutdown()


# -----------------------------------------------------------------------------------------------------------------
# results

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's, by degrees of freedom


def interval(values):
    """values, one a seed -> (mean, half of the 95 % t interval; nan with one seed)"""
    n, values = len(values), list(values)
    return float(np.mean(values)), T_975.get(n - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def read_answers(folder):
    """an evaluation -> right, length, cut, hard and looks after the first, (N,) each, in one order of the questions"""
    rows = sorted(read_run(folder), key=lambda row: row["id"])
    hard = np.array(["smudged" in row["source"] for row in rows])
    return dict(right=np.array([float(row["right"]) for row in rows]), length=np.array([float(row["length"]) for row in rows]),
                cut=np.array([row["finish"] == "length" for row in rows]), hard=hard,
                looks=np.array([len(re.findall(r"Wait ,|Hmm ,", row["completion"])) for row in rows]))  # fmt: skip


def measure(run, tasks):
    """one row and seed -> its numbers; tokens and CPU seconds are those of RL, of shared stages too"""
    t1, greedy = read_answers(run["t1"]), read_answers(run["greedy"])
    log = ptst.read_log(run["rl"]) if run["rl"] else []
    cpu, folder = 0, run["rl"]
    while folder:
        cpu, folder = cpu + tasks[folder].done()["cpu"], tasks[folder].parent
    return dict(t1=t1, greedy=greedy, tokens=sum(row["tokens"] for row in log), cpu=cpu)


def percent(values, signed=False):
    mean, half = interval([100 * v for v in values])
    return f"{mean:{'+' * signed}.1f}" + (f" ± {half:.1f}" if half == half else "")


def table_rows(title, found):
    """Markdown lines of one table: accuracy, paired difference to Vision-R1, length, tokens, time, and the paper's numbers"""
    lines = [f"### {title}", "", "| | paper: accuracy (length) | seeds | T=1 % | on smudged, on clear | minus Vision-R1 | greedy % | length: right, wrong | cut % | tokens sampled | RL, CPU s |",
             "|---" * 11 + "|"]  # fmt: skip
    for row, name, accuracy, length in TABLES[title]:
        of = {seed: result for (r, seed), result in found.items() if r == row}
        if not of:
            continue
        mean = lambda f, of=of: float(np.mean([f(r) for r in of.values()]))
        t1 = {seed: r["t1"]["right"].mean() for seed, r in of.items()}
        best = {seed: r["t1"]["right"].mean() for (r_, seed), r in found.items() if r_ == "vision-r1" and row != r_ and (row == "base" or seed in of)}
        apart = percent([t1[0 if row == "base" else seed] - best[seed] for seed in best], True) if best else ""
        kinds = [mean(lambda r, h=h: r["t1"]["right"][r["t1"]["hard"] == h].mean()) for h in (True, False)]
        chains = [[r["t1"]["length"][r["t1"]["right"] == right].mean() for r in of.values() if (r["t1"]["right"] == right).any()] for right in (1, 0)]
        lengths = ", ".join(f"{np.mean(each):.1f}" if each else "none" for each in chains)
        paper = "" if accuracy is None else f"{accuracy}" + (f" ({length:,})" if length else "")
        lines.append(f"| {name} | {paper} | {len(of)} | {percent(t1.values())} | {100 * kinds[0]:.1f}, {100 * kinds[1]:.1f} | {apart} | {percent([r['greedy']['right'].mean() for r in of.values()])} | "
                     f"{mean(lambda r: r['t1']['length'].mean()):.1f}: {lengths} | {100 * mean(lambda r: r['t1']['cut'].mean()):.1f} | "
                     f"{mean(lambda r: r['tokens']) / 1e3:,.0f}K | {mean(lambda r: r['cpu']):,.0f} |")  # fmt: skip
    return [*lines, ""]


def looks_table(found):
    """accuracy at T=1 (and the share of chains) by how often a chain looks again: the first look helps where a cell is smudged"""
    lines = ["### What another look is worth", "", "accuracy % at T=1 of the chains that look again so often, all seeds together, and their share of the problems of that kind", "",
             "| | clear: never | once | twice | more often | smudged: never | once | twice | more often |", "|---" * 9 + "|"]  # fmt: skip
    for row, name in (("ci", "Vision-R1-CI"), ("long", "Vision-R1-Long"), ("vision-r1", "Vision-R1")):
        of = [r["t1"] for (r_, _), r in found.items() if r_ == row]
        if of:
            right, hard, looks = (np.concatenate([t1[key] for t1 in of]) for key in ("right", "hard", "looks"))
            chosen = [(hard == h) & (np.minimum(looks, 3) == n) for h in (False, True) for n in range(4)]
            share = [100 * at.sum() / (hard == (i > 3)).sum() for i, at in enumerate(chosen)]
            cells = [f"{100 * right[at].mean():.1f} ({part:.0f} %)" if at.any() else "none" for at, part in zip(chosen, share)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 6 else []


def tables(found, setting):
    text = [f"Seeds of SFT and RL; {setting.test:,} held-out problems, the same for all; mean ± half of the 95 % t interval over seeds, differences paired by seed and question. A limit of {setting.scale} "
            f"stands for 4K, {setting.steps} steps a stage, {setting.questions} questions a step, lr {setting.lr:g}, {setting.hard:.0%} of the problems with a smudged cell.", ""]  # fmt: skip
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
            logs = [ptst.read_log(run["rl"]) for run in of]
            mean = lambda key, rows: rows[0][key] if isinstance(rows[0][key], int) and key != "tokens" else np.mean([r[key] for r in rows if r[key] is not None] or np.nan)
            steps = [{key: mean(key, rows) for key in rows[0]} for rows in zip(*logs)]
            steps = [{k: None if v != v else v for k, v in step.items()} for step in steps]
            (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        elif of:
            (folder / "responses.jsonl").write_text("".join((run["t1"] / "responses.jsonl").read_text() for run in of))
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
        more, runs[lever, value, hard] = plan(("long", "vision-r1"), seeds, config.out, replace(Setting(), **{lever: value, "hard": hard}), (("t1", 1.0),))
        tasks = more | tasks
    run_all(tasks, config.jobs, lambda line: print(line, flush=True))
    lines, apart = ["| lever | value | smudged | Long %: T=1, length | PTST %: T=1, length | PTST - Long |", "|---" * 6 + "|"], {}
    for lever, value, hard in cells:
        read = lambda row, at=runs[lever, value, hard]: [read_answers(at[row, s]["t1"]) for s in seeds]
        long, staged = ([r["right"].mean() for r in read(row)] for row in ("long", "vision-r1"))
        length = [np.mean([r["length"].mean() for r in read(row)]) for row in ("long", "vision-r1")]
        apart[lever, value, hard] = percent([b - a for a, b in zip(long, staged)], True)
        lines.append(f"| {lever} | {value:g} | {hard:.0%} | {percent(long)}, {length[0]:.1f} | {percent(staged)}, {length[1]:.1f} | {apart[lever, value, hard]} |")
    fig, axes = plt.subplots(1, len(levers), figsize=(4.2 * len(levers), 3.4), dpi=160, layout="constrained", squeeze=False)
    for ax, lever in zip(axes[0], levers):
        grid = [[float(apart[lever, value, hard].split()[0]) for hard in MAP_HARD] for value in MAP[lever]]
        ax.imshow(grid, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
        for i, value in enumerate(MAP[lever]):
            for j, hard in enumerate(MAP_HARD):
                ax.text(j, i, apart[lever, value, hard].replace(" ± ", "\n± "), ha="center", va="center", color="white" if abs(grid[i][j]) > 8 else "black")
        ax.set_xticks(range(len(MAP_HARD)), [f"{hard:.0%}" for hard in MAP_HARD])
        ax.set_yticks(range(len(MAP[lever])), [f"{value:g}" for value in MAP[lever]])
        ax.set_xlabel("problems with a smudged cell")
        ax.set_ylabel({"scale": "first limit of PTST (tokens)", "lr": "learning rate", "again": "strength of overthinking"}[lever])
    fig.suptitle("PTST minus Long, points of accuracy at T=1 (blue: PTST ahead)", fontsize=11)
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
    known, everything = plan(list(ROWS), range(max(10, config.seeds)), config.out, setting)  # what earlier calls finished is reported too
    found = {key: measure(run, known) for key, run in everything.items() if all(known[run[how]].done() for how in ("t1", "greedy"))}
    text = tables(found, setting)
    times = [task.done() for task in known.values() if task.done()]
    text += f"\n{len(times)} commands: {sum(t['wall'] for t in times) / 60:.0f} minutes of one core, {sum(t['cpu'] for t in times) / 3600:.1f} CPU hours."
    (Path(config.out) / "tables.md").write_text(text + "\n")
    print(f"\n{text}\nthis call: {time.time() - began:.0f} s\nwrote {Path(config.out) / 'tables.md'}")
    if {row for row, _ in found} & {"zero", "long", "vision-r1"}:
        print(f"wrote {draw_figure({key: everything[key] for key in found}, Path(config.out))}")


def main(argv):
    parser = argparse.ArgumentParser(prog="ptst.py ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"separated by commas, of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, help="default 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help=f"the rows {', '.join(QUICK)}")
    parser.add_argument("--map", nargs="?", const=",".join(MAP), metavar="LEVERS", help=f"where PTST beats Long: {', '.join(MAP)} (default all), each against the share of hard problems")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time, a thread each (default: the cores)")
    parser.add_argument("--out", default="runs/ablate")
    config = parser.parse_args(argv)
    config.seeds = config.seeds or (1 if config.quick else 3)
    draw_map(config) if config.map else ablate(config)


if __name__ == "__main__":  # one task of its own: draw OUT N NAME HARD
    from data import write_parquet

    _, out, n, name, hard = sys.argv[1:]
    write_parquet(Path(out) / "problems.parquet", toy.problems(int(n), 0, name, float(hard)))
