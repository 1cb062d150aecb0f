"""Evaluate the last checkpoints of a run: the best one, and what choosing it is worth.

  python -m tools.choose RUN --data FILE | --bench NAME,... [--last 50] [--every 5] [--ranks 8] ...

The paper takes the best of every fifth step of the last 50 (Tables 5, 6). Each checkpoint is
exported, handed to eval.py with all further flags, and removed. Beside the best stand the mean, the
spread, and the best one's accuracy on questions that did not choose it: by chance alone the best of
ten is above the mean. Called again, it goes on where it stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import report
from nano import checkpoint, run
from tools.export import export

EVAL = Path(__file__).resolve().parents[1] / "eval.py"


def evaluate(folder: Path, step: int, out: Path, ranks: int, flags: list[str]) -> list[dict]:
    """The rows of one checkpoint, by eval.py in a process of its own; done ones are read."""
    if not (out / "report.json").exists():
        model = out.with_name(f"{out.name}-model")
        if not model.exists():
            export(folder, model, step)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        call = [sys.executable, *(launch if ranks > 1 else []), str(EVAL), *flags]
        call += ["--name", f"step {step}", "--model", str(model), "--out", str(out)]
        subprocess.run(call, check=True)
        shutil.rmtree(model)
    return sorted(report.counted(report.read_run(out)), key=lambda r: (r["id"], r["sample"]))


def metric(rows: list[dict]) -> list[tuple]:
    """The mean over the benchmarks of the share of right answers, as parts of report.estimate."""
    benches = report.grouped(rows, lambda row: [row.get("bench")])
    return [report.share(part, "right", weight=1 / len(benches)) for part in benches.values()]


def held_out_choice(scores: np.ndarray, weights, clusters, draws: int = 500) -> float:
    """One half of the questions chooses the best row of scores (steps, questions), the other half
    scores it: the mean over random halves, in which clusters stay together."""
    _, number = np.unique(clusters, return_inverse=True)
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        half = generator.permutation(number.max() + 1)[number] % 2 == 0
        best = (scores @ (weights * half)).argmax()
        found.append(np.average(scores[best], weights=weights * ~half))
    return float(np.mean(found))


def summary(rows: dict[int, list[dict]]) -> dict:
    """{steps, each: [estimate], best: step, chosen, mean: estimate, std} of {step: rows}."""
    metrics = [metric(part) for part in rows.values()]
    each = [report.estimate(parts) for parts in metrics]
    values = [one["value"] for one in each]
    columns = list(zip(*metrics))  # of each benchmark the parts of all steps
    means = [(c[0][0], np.mean([scores for _, scores, _ in c], 0), c[0][2]) for c in columns]
    scores = np.concatenate([np.array([s for _, s, _ in column]) for column in columns], 1)
    weights = np.concatenate([np.full(len(c[0][1]), c[0][0] / len(c[0][1])) for c in columns])
    clusters = [f"{i} {name}" for i, column in enumerate(columns) for name in column[0][2]]
    best = max(rows, key=dict(zip(rows, values)).get)
    chosen = held_out_choice(scores, weights, clusters)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    mean = report.estimate(means)
    return dict(steps=list(rows), each=each, best=best, chosen=chosen, mean=mean, std=spread)


def draw(s: dict, path: Path):
    """Accuracy over the steps with its intervals, the mean, and the best."""
    values, low, high = (
        100 * np.array([e[k] for e in s["each"]]) for k in ("value", "low", "high")
    )
    figure = Figure(figsize=(7, 3.6), dpi=160, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="accuracy (%)")
    error = np.abs([values - low, high - values])
    axes.errorbar(s["steps"], values, error, fmt="o", color="#0072B2", label="checkpoint, 95 %")
    mean = [100 * s["mean"][k] for k in ("value", "low", "high")]
    axes.axhline(mean[0], color="#555555", lw=1, label=f"mean {mean[0]:.1f}")
    axes.axhspan(*mean[1:], color="#555555", alpha=0.12, lw=0)
    top = values[s["steps"].index(s["best"])]
    axes.plot(s["best"], top, "*", color="#D55E00", ms=14, label=f"best {top:.1f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def choose(folder, last: int, every: int, ranks: int, out: str, flags: list[str]) -> str:
    """Evaluates, draws RUN/choose/choose.png -> the table and what follows from it."""
    folder, out = Path(folder), Path(out or Path(folder) / "choose")
    kept = [int(path.name.removeprefix("step-")) for path in checkpoint.finished(folder)]
    steps = [step for step in kept if step > kept[-1] - last and step % every == 0]
    if not steps:
        wanted = f"last {last} steps whose number is a multiple of {every}"
        raise ValueError(f"{folder}: no checkpoint among the {wanted}")
    asked = out / "flags.json"
    if asked.exists() and json.loads(asked.read_text()) != flags:
        raise ValueError(f"{out} holds answers to other flags ({asked}): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(flags) + "\n")
    rows = {s: evaluate(folder, s, out / f"step-{s:06d}", ranks, flags) for s in steps}
    s = summary(rows)
    draw(s, out / "choose.png")
    lines = [(f"step {n}", report.summarize(rows[n]) | e) for n, e in zip(steps, s["each"])]
    lines = [(name, line | dict(accuracy=line["value"])) for name, line in lines]
    values, mean = [100 * e["value"] for e in s["each"]], report.cell(s["mean"])
    text = f"""{report.table(lines)}

best of {len(steps)}: step {s["best"]}, {max(values):.1f} %; on questions that did not choose it: \
{100 * s["chosen"]:.1f} %
mean: {mean} %; standard deviation of the checkpoints {100 * s["std"]:.1f}, from {min(values):.1f} \
to {max(values):.1f}
drawn: {out / "choose.png"}; the model: python -m tools.export {folder} OUT --step {s["best"]}"""
    (out / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.choose", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--last", type=int, default=50, help="steps from which to choose (50)")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints (5)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of eval.py")
    parser.add_argument("--out", default="", help="folder (default: RUN/choose)")
    args, flags = parser.parse_known_args()
    if not any(flag.split("=")[0] in ("--data", "--bench") for flag in flags):
        parser.error("say --data or --bench, and what else eval.py is to know")
    with run.for_people():
        print(choose(args.run, args.last, args.every, args.ranks, args.out, flags))
