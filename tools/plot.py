"""Draw Fig. 1 of the paper for runs of your own: `python -m tools.plot RUN... [--out FILE.png]`.

Length, accuracy and reward stand over the steps; length and accuracy also stand over the tokens
sampled, which is the fair axis between group sizes. The last panel shows the lengths of right and
wrong chains (Fig. 1 A). RUN is a folder of grpo.py, or one of eval.py, which has that panel alone.
"""

import argparse
import contextlib
import json
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

import ptst
from nano.run import for_people, read_log

# Okabe and Ito's colours can be told apart by colour-blind eyes too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
RIGHT, WRONG, GREY = "#009E73", "#D55E00", "#555555"
BANDS = ["#EFF4F9", "#FBF3E6", "#EEF6F0"]  # backgrounds of the stages
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
STYLE |= {"axes.titleweight": "bold", "axes.axisbelow": True, "grid.color": "#DDDDDD"}
PANELS = [  # field of log.jsonl, title, scale, horizontal axis
    ("len_mean", "Mean length (tokens)", 1, "step"),
    ("accuracy", "Accuracy (%)", 100, "step"),
    ("reward", "Reward", 1, "step"),
    ("len_mean", "Mean length (tokens)", 1, "tokens sampled"),
    ("accuracy", "Accuracy (%)", 100, "tokens sampled"),
]
HELD_OUT = {"len_mean": "eval_len", "accuracy": "eval_accuracy"}  # by validation, over the steps
MEANS = dict(marker="o", mfc="white", mec="black")
BOXES = dict(orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False, showmeans=True)
BOXES |= dict(patch_artist=True, medianprops=dict(color="black"), meanprops=MEANS)


class Curve(NamedTuple):
    name: str
    log: list[dict]  # a row for each step
    at: dict[str, list]  # horizontal axis -> where each step stands on it
    colour: str
    exams: list[dict]  # the rows with a validation; step 0 is before the first


def read_chains(run: str) -> tuple[list, list]:
    """Return the lengths of right and of wrong answers that a run wrote, none without its file.

    An answer cut at the limit is wrong. samples.jsonl has a few questions of each step, not all.
    """
    evaluated = Path(run) / "responses.jsonl"
    path = evaluated if evaluated.is_file() else Path(run) / "samples.jsonl"
    right, wrong = [], []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # A half-written line is left out.
            row = json.loads(line)
            lengths = right if row.get("right", row.get("why") == "ok") else wrong
            lengths.append(row["length"])
    return right, wrong


def read_exams(run: str) -> list[dict]:
    """Return the rows of a log that have a validation."""
    path, rows = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run), []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # A half-written line is left out.
            rows.append(json.loads(line))
    return [row for row in rows if "eval_accuracy" in row]


def smooth(log: list[dict], key: str, scale: float, width: int) -> np.ndarray:
    """Average a field over `width` steps around each (odd). No value, such as null, is a gap."""
    values = scale * np.array([row.get(key) for row in log], float)  # None becomes nan.
    padded = np.pad(values, width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)  # (steps, width)
    return np.ma.masked_invalid(windows).mean(axis=1).filled(np.nan)


def spans(log: list[dict], at: list) -> list[tuple]:
    """Find the stages of a log -> (begin, end, "max_len × group_size") on a horizontal axis."""
    edges = [at[0] - 0.5, *((a + b) / 2 for a, b in zip(at, at[1:])), at[-1] + 0.5]
    limits = [ptst.tokens(row["max_len"]) for row in log]
    stages = [(row["stage"], f"{limit} × {row['group_size']}") for row, limit in zip(log, limits)]
    begins = [i for i in range(len(log)) if i == 0 or stages[i] != stages[i - 1]]
    ends = [*begins[1:], len(log)]
    return [(edges[i], edges[j], stages[i][1]) for i, j in zip(begins, ends)]


def draw_curves(ax, panel: tuple, curves: list[Curve], width: int) -> None:
    """Draw one field of every run; shade the stages if all runs share them, else mark them."""
    key, title, scale, axis = panel
    stages = [spans(curve.log, curve.at[axis]) for curve in curves]
    longest = max(stages, key=lambda own: own[-1][1])
    begins = [[(begin, stage) for begin, _, stage in own] for own in [longest, *stages]]
    shared = all(begins[0][: len(own)] == own for own in begins)
    for curve, own in zip(curves, stages):
        at, name = curve.at[axis], curve.name if len(curves) > 1 else "all answers"
        if not shared:
            name += f" ({', '.join(stage for _, _, stage in own)})"
            for begin, _, _ in own[1:]:
                ax.axvline(begin, color=curve.colour, lw=1, ls=(0, (2, 3)))
        if width > 1:  # The single steps stand behind their mean.
            ax.plot(at, smooth(curve.log, key, scale, 1), color=curve.colour, lw=0.8, alpha=0.3)
        mean = smooth(curve.log, key, scale, width)
        ax.plot(at, mean, color=curve.colour, lw=2.2, label=name)
        if axis == "step" and key in HELD_OUT and curve.exams:
            steps = [row["step"] for row in curve.exams]
            means = [scale * row[HELD_OUT[key]] for row in curve.exams]
            label = f"{curve.name}: held out" if len(curves) > 1 else "held-out problems"
            how = dict(color=curve.colour, ms=5, lw=1, mec="white", clip_on=False)
            ax.plot(steps, means, "D-", label=label, **how)
        if key == "len_mean" and len(curves) == 1:
            kinds = [("len_correct", "right answers", RIGHT), ("len_wrong", "wrong answers", WRONG)]
            for field, label, colour in kinds:
                ax.plot(at, smooth(curve.log, field, 1, width), color=colour, lw=1.2, label=label)
    if key == "len_mean":
        ax.set_ylim(bottom=0)
    ax.set_title(title, pad=22 if shared else 6)
    ax.set_xlabel(axis)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if axis != "step":
        ax.xaxis.set_major_formatter(EngFormatter())
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.grid(axis="y")
    left, right = min(own[0][0] for own in stages), longest[-1][1]
    if axis == "step" and any(curve.exams for curve in curves):
        left = -0.5  # The first validation is before the first step.
    ax.set_xlim(left, right)
    for i, (begin, end, stage) in enumerate(longest if shared else []):
        ax.axvspan(begin, end, color=BANDS[i % 3], lw=0, zorder=0)
        if end - begin >= (right - left) / 6:  # Else there is no room for words.
            place = ax.get_xaxis_transform()
            ax.text((begin + end) / 2, 1.02, stage, transform=place, ha="center", color=GREY)


def draw_chains(ax, names: list[str], chains: list[tuple], pad: int) -> None:
    """Draw Fig. 1 (A), two boxes for each run: quartiles and median, 5 to 95 %, the mean a dot."""
    ax.set_title("Right and wrong chains (tokens)", pad=pad)
    found = []
    for i, (name, lengths) in enumerate(zip(names, chains)):
        colours = (RIGHT, WRONG) if len(names) == 1 else [COLOURS[i % len(COLOURS)]] * 2
        for kind, values, colour, alpha in zip(("right", "wrong"), lengths, colours, (0.85, 0.35)):
            label = f"{kind}, {len(values):,}" if len(names) == 1 else f"{name}\n{kind}"
            found += [(label, values, colour, alpha)] if values else []
    if not found:
        ax.set_title("No samples.jsonl or responses.jsonl")
        return ax.set_axis_off()
    labels, values, colours, alphas = zip(*found)
    boxes = ax.boxplot(values, tick_labels=labels, **BOXES)
    for box, colour, alpha in zip(boxes["boxes"], colours, alphas):
        box.set(facecolor=colour, alpha=alpha)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.grid(axis="x")


def plot(runs: list[str], out: str = "") -> Path:
    """Draw the figure of one or more runs -> the PNG, curves.png in a single run or here."""
    names = [Path(run).resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else runs
    chains = [read_chains(run) for run in runs]
    curves = []
    for i, (name, run) in enumerate(zip(names, runs)):
        if not (Path(run) / "responses.jsonl").is_file():  # An evaluation has no steps.
            log = read_log(run)
            sampled = list(accumulate(row["tokens"] for row in log))
            at = {"step": [row["step"] for row in log], "tokens sampled": sampled}
            curves.append(Curve(name, log, at, COLOURS[i % len(COLOURS)], read_exams(run)))
    plt.rcParams.update(STYLE)
    if curves:
        fig, axes = plt.subplots(2, 3, figsize=(11, 6.8), dpi=160, layout="constrained")
        # The width of the mean is a twentieth of the run and odd; short runs stay as they are.
        width = max(len(curve.log) for curve in curves) // 40 * 2 + 1
        for ax, panel in zip(axes.flat, PANELS):
            draw_curves(ax, panel, curves, width)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if width > 1:
            handles.append(plt.Line2D([], [], color=GREY, lw=0.8, alpha=0.5))
            labels.append(f"single steps (thick: mean of {width})")
        columns = 2 if max(map(len, labels)) > 40 else 4
        fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        last = axes.flat[-1]
    else:
        height = 1.6 + 0.7 * len(runs)
        fig, last = plt.subplots(figsize=(7, height), dpi=160, layout="constrained")
    draw_chains(last, names, chains, pad=22 if curves and len(runs) == 1 else 6)
    path = Path(out or "curves.png") if out or len(runs) > 1 else Path(runs[0]) / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="", metavar="FILE.png")
    args = parser.parse_args()
    with for_people():
        print(f"wrote {plot(args.runs, args.out)}")
