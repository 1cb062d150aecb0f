"""Progressive Thinking Suppression Training, the stage list (paper Sec. 3.4, Eq. 2).

In stage s every answer is cut at L_s tokens and every question is answered G_s times. Training starts short, which
suppresses overthinking, and is then allowed to think longer; L_s x G_s stays at 64K tokens per question in the paper.
  stages = [(4096, 16, 100), (8192, 8, 100)]           as grpo.py has it: (max_len, group_size, steps)
  stages = parse("4Kx16x100,8Kx8x100")                 the same as text, K = 1024 tokens
  python ptst.py [NAME or STAGES ...] [--questions N]  schedules with their token budgets
  python ptst.py plot RUN... [--out FILE.png]          Fig. 1: lengths and accuracy over steps and tokens, right and wrong chains
  python ptst.py cost --recipe vision-r1-7b --gpus 8   tokens, FLOPs and GPU hours of a recipe, before it is run
  python ptst.py ablate [--quick] [--rows ...]         the paper's tables in miniature, on the toy (ablate.py)
"""

import argparse
import contextlib
import difflib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

FORM = "expected LENGTHxGROUPxSTEPS such as 4Kx16x100 (K = 1024 tokens), stages separated by commas"


class Stage(NamedTuple):
    max_len: int  # L_s of Eq. 2: tokens of an answer, at most
    group_size: int  # G_s: answers per question
    steps: int  # optimisation steps of the stage


def parse(stages: str | list) -> list[Stage]:
    """Text "4Kx16x100,8Kx8x100", or a list of tuples or of such parts, -> stages. ValueError names the wrong part."""
    parts = stages.split(",") if isinstance(stages, str) else list(stages)
    if not parts or parts == [""]:
        raise ValueError(f"no stages given; {FORM}")
    return [_stage(part, f"stage {i}") for i, part in enumerate(parts, 1)]


def _stage(part, where: str) -> Stage:
    where = f"{where} ({part.strip() if isinstance(part, str) else part!r})"
    fields = re.split("[xX×*]", re.sub(r"\s", "", part)) if isinstance(part, str) else part
    if not isinstance(fields, (list, tuple)) or len(fields) != 3:
        found = (
            "nothing"
            if fields == [""]
            else f"{len(fields)} parts"
            if isinstance(fields, (list, tuple))
            else "no tuple"
        )
        raise ValueError(f"{where}: {found} where max_len, group_size and steps should be; {FORM}")
    numbers = []
    for name, field in zip(Stage._fields, fields):
        if isinstance(field, str) and re.fullmatch(
            r"-?\d+" + "k?" * (name == "max_len"), field, re.A | re.I
        ):
            field = int(field.rstrip("kK")) * (1024 if field[-1] in "kK" else 1)
        least = 2 if name == "group_size" else 1
        if isinstance(field, bool) or not isinstance(field, int):
            raise ValueError(f"{where}: {name} is {field!r}, not a whole number; {FORM}")
        if field < least:
            why = "; an answer has no advantage in a group of one (Eq. 1)" if field == 1 else ""
            raise ValueError(f"{where}: {name} is {field}, it must be at least {least}{why}")
        numbers.append(field)
    return Stage(*numbers)


def format_stages(stages: list) -> str:
    """The inverse of parse: "4Kx16x100,8Kx8x100"."""
    return ",".join(f"{tokens(length)}x{group}x{steps}" for length, group, steps in stages)


def tokens(n: int) -> str:
    """4096 -> "4K"; what is no multiple of 1024 stays as it is."""
    return f"{n // 1024}K" if n and n % 1024 == 0 else str(n)


def total_steps(stages: list) -> int:
    return sum(steps for _, _, steps in stages)


def stage_at(stages: list, step: int) -> tuple[int, Stage]:
    """(index of the stage, stage) of a step, both counted from 0; ValueError outside the schedule."""
    end = 0
    for index, stage in enumerate(stages):
        end += stage[2]
        if 0 <= step < end:
            return index, Stage(*stage)
    raise ValueError(
        f"step {step} is not in {format_stages(stages)}: it has the steps 0 to {end - 1}"
    )


def agree(before: list, now: list, steps: int) -> bool:
    """Whether both schedules have the same limit and group in each of the first `steps` steps, and have so many."""
    if min(total_steps(before), total_steps(now)) < steps:
        return False
    return all(stage_at(before, step)[1][:2] == stage_at(now, step)[1][:2] for step in range(steps))


def token_budget(stage: tuple) -> int:
    """Tokens one question may cost in a step of this stage: L_s x G_s."""
    return stage[0] * stage[1]


def total_tokens(stages: list, questions: int = 1) -> int:
    """Tokens of a whole run with `questions` per step if every answer reached its limit: the most it can generate."""
    return sum(steps * questions * length * group for length, group, steps in stages)


def budget_note(stages: list) -> str:
    """A line for the console where L x G changes between stages, else "". Ablations do that: it is no error."""
    budgets = [tokens(token_budget(s)) for s in stages]
    if len(set(budgets)) == 1:
        return ""
    return f"note: L x G is not constant: {', '.join(budgets)} tokens per question (Sec. 3.4 keeps it, at 64K)"


# ---- the paper's schedules. 4Kx16 and the like are always the paper's; the origin says whose the steps are.

_PAPER = {
    "vision-r1": ("4Kx16x100,8Kx8x100", "Sec. 3.4, App. A; Table 5, last row"),
    "vision-r1-zero": ("4Kx16x300", "App. A"),
    "vision-r1-long": ("16Kx4x300", "App. A"),
    "zero-ptst": ("4Kx16x100,8Kx8x100", "App. A, Table 6: Zero with the stages"),
    "zero-sft-ptst": ("4Kx16x100,8Kx8x100", "App. A, Table 6: SFT without chains, then the stages"),
    "three-stage": (
        "4Kx16x100,8Kx8x100,16Kx4x100",
        "Sec. 3.4: the third stage brought no real gain",
    ),
    # Table 5 gives lengths and groups but no steps: 100 per stage is ours, after Sec. 3.4
    "table5-4kx16-4kx16": ("4Kx16x100,4Kx16x100", "Table 5, row 1; steps ours"),
    "table5-4kx16-8kx16": ("4Kx16x100,8Kx16x100", "Table 5, row 2; steps ours"),
    "table5-4kx16-6kx12-8kx8": ("4Kx16x100,6Kx12x100,8Kx8x100", "Table 5, row 3; steps ours"),
    "table5-16kx4-16kx4": (
        "16Kx4x100,16Kx4x100",
        "Table 5, row 4 (47.7, as vision-r1-long's 300); steps ours",
    ),
    "table5-16kx16-16kx16": ("16Kx16x100,16Kx16x100", "Table 5, row 5; steps ours"),
}
SCHEDULES: dict[str, list[Stage]] = {name: parse(text) for name, (text, _) in _PAPER.items()}
ORIGIN: dict[str, str] = {name: origin for name, (_, origin) in _PAPER.items()}


def schedule(text: str) -> list[Stage]:
    """A name of SCHEDULES, or stages as parse takes them. ValueError names the nearest schedule."""
    if text in SCHEDULES:
        return SCHEDULES[text]
    if re.match(r"\s*-?\d", text) or not text.strip():
        return parse(text)
    near = difflib.get_close_matches(text, SCHEDULES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"unknown schedule {text!r}: {hint}known are {', '.join(SCHEDULES)}; or stages: {FORM}"
    )


def _big(n: int) -> str:
    """6710886400 -> "6.71 G", in powers of 1000."""
    power = next(p for p in (9, 6, 3, 0) if n >= 10**p or p == 0)
    return f"{n / 10**power:.3g} {' KMG'[power // 3]}".strip()


def print_table(names: list[str], questions: int):
    """One line per schedule: stages, steps, tokens per question and step, and of the whole run."""
    rows = [
        (
            "schedule",
            "stages (L x G x steps)",
            "steps",
            "tokens/question",
            "run, 1 question a step",
            f"{questions} a step",
            "from",
        )
    ]
    for name in names:
        stages = schedule(name)
        budgets = [tokens(token_budget(s)) for s in stages]
        rows.append(
            (
                name if name in SCHEDULES else "(yours)",
                format_stages(stages),
                str(total_steps(stages)),
                budgets[0] if len(set(budgets)) == 1 else ", ".join(budgets) + " *",
                _big(total_tokens(stages)),
                _big(total_tokens(stages, questions)),
                ORIGIN.get(name, ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for i, cells in enumerate(rows):
        print(
            "  ".join(
                c.rjust(w) if k in (2, 4, 5) else c.ljust(w)
                for k, (c, w) in enumerate(zip(cells, widths))
            ).rstrip()
        )
        if i == 0:
            print("  ".join("-" * w for w in widths))
    print(
        "\nThe most tokens that can be generated: every answer at its limit. K = 1024 in stages, else K, M, G = 10^3, 10^6, 10^9."
    )
    if any(row[3].endswith("*") for row in rows):
        print("* L x G is not constant over the stages (Sec. 3.4 keeps it, at 64K).")


# ---- curves: the miniature of the paper's Fig. 1

COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe and Ito: safe for colour-blind eyes
GREY, RIGHT, WRONG = "#555555", COLOURS[2], COLOURS[1]


def read_log(run: str) -> list[dict]:
    """The steps in RUN/log.jsonl in order; of a step logged twice (after a resume) the last. ValueError if there are none."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; RUN is the folder that grpo.py wrote with --out, it holds log.jsonl"
        )
    steps, found = {}, "it is empty; has the first step ended?"
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:  # the run is writing it just now, or was killed while it did
            print(f"{path}:{n}: skipped a half-written line", file=sys.stderr)
            continue
        if (
            isinstance(row, dict)
            and {"step", "stage", "max_len", "group_size", "len_mean", "tokens"} <= row.keys()
        ):
            steps[row["step"]] = row
        elif row:
            found = f"no line has step, stage, max_len, group_size, len_mean, tokens (line {n}: {str(list(row))[1:-1]}); is it a grpo.py run?"
    if not steps:
        raise ValueError(f"{path}: {found}")
    return [steps[step] for step in sorted(steps)]


def _column(rows: list[dict], key: str, scale: float = 1.0) -> list[float]:
    """One field over the steps; null (no right answer in a step has no length) becomes a gap."""
    return [math.nan if row.get(key) is None else row[key] * scale for row in rows]


def _smooth(values: list[float], width: int) -> list[float]:
    """Centred mean over `width` steps (odd), gaps left out; the ends use what there is."""
    windows = [
        [v for v in values[max(0, i - width // 2) : i + width // 2 + 1] if v == v]
        for i in range(len(values))
    ]
    return [sum(w) / len(w) if w else math.nan for w in windows]


def read_chains(run: str) -> tuple[list, list]:
    """Lengths of the right and of the wrong answers in samples.jsonl (grpo.py) or responses.jsonl (eval.py), none if there is neither.

    A chain cut at the limit is a wrong one, as in the reward. samples.jsonl holds a few questions of each step, not all."""
    folder, lengths = Path(run) if Path(run).is_dir() else Path(run).parent, ([], [])
    path = folder / (
        "responses.jsonl" if (folder / "responses.jsonl").is_file() else "samples.jsonl"
    )
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # half-written
            row = json.loads(line)
            lengths[not row.get("right", row.get("why") == "ok")].append(row["length"])
    return lengths


def _spans(rows: list[dict], xs: list) -> list[tuple]:
    """(begin, end, max_len, group_size) of each stage in the log, on the axis whose values are xs."""
    edges = [xs[0] - 0.5, *((a + b) / 2 for a, b in zip(xs, xs[1:])), xs[-1] + 0.5]
    begins = [
        i
        for i, row in enumerate(rows)
        if i == 0 or any(row[k] != rows[i - 1][k] for k in ("stage", "max_len", "group_size"))
    ]
    return [
        (edges[i], edges[j], rows[i]["max_len"], rows[i]["group_size"])
        for i, j in zip(begins, [*begins[1:], len(rows)])
    ]


def plot(runs: list[str], out: str | None = None) -> Path:
    """Fig. 1 of one or more runs: length, accuracy and reward over the steps of log.jsonl; length and accuracy over the tokens
    sampled until then, the fair axis between group sizes; lengths of right and wrong chains (Fig. 1 A), also of eval.py's runs.

    Returns the path of the PNG (RUN/curves.png of the first by default)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [
        Path(run).resolve().parent.name if Path(run).is_file() else Path(run).resolve().name
        for run in runs
    ]
    names = runs if len(set(names)) < len(names) else names
    chains = [read_chains(run) for run in runs]
    logs = [
        [] if (Path(run) / "responses.jsonl").is_file() else read_log(run) for run in runs
    ]  # an evaluation has no steps
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
        }
    )
    wide = any(logs)
    fig, axes = plt.subplots(
        1 + wide,
        1 + 2 * wide,
        figsize=(11, 6.8) if wide else (7, 1.6 + 0.7 * len(runs)),
        dpi=160,
        layout="constrained",
        squeeze=False,
    )
    panels = [
        ("len_mean", "Mean length (tokens)", 1, "step"),
        ("accuracy", "Accuracy (%)", 100, "step"),
        ("reward", "Reward", 1, "step"),
        ("len_mean", "Mean length (tokens)", 1, "tokens"),
        ("accuracy", "Accuracy (%)", 100, "tokens"),
    ]
    curves = [
        (
            name,
            log,
            list(itertools.accumulate(row["tokens"] for row in log)),
            COLOURS[i % len(COLOURS)],
            ["-", "--", ":"][i // len(COLOURS) % 3],
        )
        for i, (name, log) in enumerate(zip(names, logs))
        if log
    ]
    width = (
        max(map(len, logs)) // 40 * 2 + 1
    )  # a twentieth of the run, odd; runs under 40 steps stay as they are
    for ax, panel in zip(axes.flat, panels if wide else []):
        _curves(ax, *panel, curves, width, matplotlib.ticker)
    _chains(
        axes.flat[-1], names, chains, pad=22 if wide and len(runs) == 1 else 6
    )  # level with its neighbours'
    if wide:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if width > 1:
            handles.append(plt.Line2D([], [], color=GREY, lw=0.8, alpha=0.5))
            labels.append(f"single steps (thick: mean of {width})")
        fig.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2 if max(map(len, labels)) > 40 else 4,
            frameon=False,
        )
    path = (
        Path(out)
        if out
        else (Path(runs[0]) if Path(runs[0]).is_dir() else Path(runs[0]).parent) / "curves.png"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)
    return path


def _curves(
    ax, key: str, title: str, scale: float, axis: str, curves: list[tuple], width: int, ticker
):
    """One field of each run's log over steps or over tokens sampled, with the stages: shaded where all runs share them, else a
    dotted line in the run's colour where a stage begins."""
    spans = [
        _spans(log, xs if axis == "tokens" else [row["step"] for row in log])
        for _, log, xs, *_ in curves
    ]
    longest = max(spans, key=lambda own: own[-1][1])
    alike = all(
        [(x, *rest) for x, _, *rest in own] == [(x, *rest) for x, _, *rest in longest][: len(own)]
        for own in spans
    )
    for (name, log, xs, colour, style), own in zip(curves, spans):
        xs, values = (
            xs if axis == "tokens" else [row["step"] for row in log],
            _column(log, key, scale),
        )
        if len(curves) > 1 and not alike:
            name += f" ({', '.join(f'{tokens(s[2])} × {s[3]}' for s in own)})"
        if width > 1:  # the raw steps, pale, behind their mean
            ax.plot(xs, values, color=colour, lw=0.8, alpha=0.3)
        ax.plot(
            xs,
            _smooth(values, width),
            style,
            color=colour,
            lw=2.2,
            label=name if len(curves) > 1 else "all answers",
            marker="o" if len(log) < 20 else None,
            ms=4,
            zorder=3,
        )
        for begin, *_ in own[1:] if not alike else []:
            ax.axvline(begin, color=colour, lw=1, ls=(0, (2, 3)))
        if key == "len_mean" and len(curves) == 1:
            for extra, label, colour in (
                ("len_correct", "right answers", RIGHT),
                ("len_wrong", "wrong answers", WRONG),
            ):
                ax.plot(xs, _smooth(_column(log, extra), width), color=colour, lw=1.2, label=label)
    if key == "len_mean":
        ax.set_ylim(bottom=0)
    ax.margins(y=0.12)
    ax.set_title(title, fontsize=11, pad=22 if alike else 6)
    ax.set_xlabel("step" if axis == "step" else "tokens sampled", color=GREY)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda x, _: _big(int(x)) if axis == "tokens" else f"{x:g}")
    )
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,g}"))
    ax.grid(axis="y", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlim(min(own[0][0] for own in spans), longest[-1][1])
    for i, (begin, end, length, group) in enumerate(longest if alike else []):
        ax.axvspan(begin, end, color=["#EFF4F9", "#FBF3E6", "#EEF6F0"][i % 3], lw=0, zorder=0)
        if end - begin >= (longest[-1][1] - longest[0][0]) / 6:
            ax.annotate(
                f"{tokens(length)} × {group}",
                ((begin + end) / 2, 1),
                (0, 4),
                ("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=GREY,
            )


def _chains(ax, names: list[str], chains: list[tuple], pad: int):
    """Fig. 1 (A): two boxes a run, right above wrong: the middle half with its median, whiskers from 5 to 95 %, the mean as a dot."""
    alone = len(names) == 1
    found = [
        (f"{kind}, {len(lengths):,}" if alone else f"{name}\n{kind}", lengths, colour, kind)
        for i, (name, run) in enumerate(zip(names, chains))
        for kind, lengths, colour in zip(
            ("right", "wrong"), run, (RIGHT, WRONG) if alone else [COLOURS[i % len(COLOURS)]] * 2
        )
        if lengths
    ]
    ax.set_title("Right and wrong chains (tokens)", fontsize=11, pad=pad)
    if not found:
        ax.text(
            0.5,
            0.5,
            "no samples.jsonl or responses.jsonl",
            transform=ax.transAxes,
            ha="center",
            color=GREY,
        )
        return ax.set_axis_off()
    boxes = ax.boxplot(
        [f[1] for f in found],
        orientation="horizontal",
        widths=0.6,
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        tick_labels=[f[0] for f in found],
        medianprops={"color": "black"},
        meanprops={"marker": "o", "ms": 5, "mfc": "white", "mec": "black"},
    )
    for box, (*_, colour, kind) in zip(boxes["boxes"], found):
        box.set(facecolor=colour, alpha=0.85 if kind == "right" else 0.35)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.grid(axis="x", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)


def cost(argv: list[str]):
    """The cost subcommand: the stages of a recipe of grpo.py, priced by budget.py. Both are imported here: they need torch."""
    import dataclasses

    import grpo
    from nano import budget

    parser = argparse.ArgumentParser(
        prog="ptst.py cost",
        description=budget.cost.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        default="vision-r1-7b",
        choices=list(grpo.RECIPES),
        metavar="NAME",
        help="of grpo.py (default vision-r1-7b)",
    )
    parser.add_argument(
        "--model", help="folder or name that tells the shape (default: the recipe's)"
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N")
    parser.add_argument(
        "--gpu",
        default="H100",
        metavar="NAME",
        help=f"one of {', '.join(g.name for g in budget.GPUS)}",
    )
    parser.add_argument(
        "--questions", type=int, metavar="N", help="questions per step (default: the recipe's)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.45,
        help="model FLOPs utilization of the passes (default 0.45)",
    )
    parser.add_argument(
        "--bandwidth-share",
        type=float,
        default=0.6,
        help="of the memory's bandwidth, in generation (default 0.6)",
    )
    parser.add_argument(
        "--mean-fill",
        type=float,
        default=0.5,
        help="mean length of an answer over its limit (default 0.5)",
    )
    parser.add_argument("--image-tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of text (default 128)")
    args = parser.parse_args(argv)
    recipe = dataclasses.asdict(grpo.Config()) | grpo.RECIPES[args.recipe]
    device, questions = budget.gpu(args.gpu), args.questions or recipe["questions"]
    if device is None:
        parser.error(
            f"--gpu {args.gpu}: its peak is not known here; known are {', '.join(g.name for g in budget.GPUS)}"
        )
    config, source = budget.find_config(args.model or recipe["model"])
    shape = budget.shape(config)
    own = {
        k: recipe[k] for k in ("minibatches", "kl_coef", "micro_tokens", "activation_checkpointing")
    }
    assumed = {
        k: getattr(args, k)
        for k in ("mfu", "bandwidth_share", "mean_fill", "image_tokens", "prompt_tokens")
    }
    print(
        f"{args.recipe}: {source}, {shape.params / 1e9:.2f} G parameters; {args.gpus} x {device.name}; {questions} questions a step"
    )
    print("assumed: " + ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in assumed.items()))
    print(
        budget.report(
            shape,
            parse(recipe["stages"]),
            device,
            args.gpus,
            questions=questions,
            frozen_vision=recipe["freeze_vision"],
            **own,
            **assumed,
        )
    )


def main(argv: list[str]):
    if argv[:1] == ["cost"]:
        return cost(argv[1:])
    if argv[:1] == ["ablate"]:
        from tools import ablate  # needs the toy, nothing else here does

        return ablate.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="ptst.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if argv[:1] == ["plot"]:
        parser.prog += " plot"
        parser.add_argument(
            "runs",
            nargs="+",
            metavar="RUN",
            help="folder of a grpo.py run (log.jsonl), or of an eval.py run (responses.jsonl)",
        )
        parser.add_argument(
            "--out", metavar="FILE.png", help="default: curves.png in the first RUN"
        )
        args = parser.parse_args(argv[1:])
        return print(f"wrote {plot(args.runs, args.out)}")
    parser.add_argument(
        "schedules", nargs="*", metavar="NAME or STAGES", help="default: all of the paper's"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=512,
        metavar="N",
        help="questions per step (default 512: EasyR1's rollout batch)",
    )
    args = parser.parse_args(argv)
    if args.questions < 1:
        parser.error(f"--questions is {args.questions}, it must be at least 1")
    print_table(args.schedules or list(SCHEDULES), args.questions)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:  # ours: written for people, the traceback adds nothing
        sys.exit(f"ptst.py: {error}")
