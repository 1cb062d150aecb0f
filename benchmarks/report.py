"""From scored answers to numbers: what each benchmark reports, intervals, pass@k, majority, tables.

A row is a line of responses.jsonl (eval.py). Every interval is a 95 % bootstrap over whole clusters
(a question with its samples, a seed with its variants, an image with its questions). Where all
scores agree, a bootstrap has no width, and the interval is Wilson's.
"""

import json
import math
from collections import Counter, defaultdict
from math import comb
from operator import itemgetter
from pathlib import Path

import numpy as np

# The overall score of MathVerse; Text Only stands beside them.
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
# The subtasks of MME's cognition score; the rest is perception.
REASONING = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}


# Student's 97.5 % points by degrees of freedom. Beyond 15 the last one is a little wide.
_QUANTILES = "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145"
T_975 = [float(quantile) for quantile in f"{_QUANTILES} 2.131".split()]


def interval(values: list[float]) -> tuple[float, float]:
    """Average values, one per seed -> (mean, half of the 95 % t interval; nan with one seed)."""
    if len(values) == 1:
        return float(values[0]), math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), T_975[min(len(values) - 1, 15) - 1] * error


def grouped(rows, keys) -> dict[object, list[dict]]:
    """The rows that belong to each key; `keys(row)` is a list."""
    found = defaultdict(list)
    for row in rows:
        for key in keys(row):
            found[key].append(row)
    return found


def by_question(rows):
    return grouped(rows, lambda row: [row["id"]])


def counted(rows):
    """The rows without the further draws, which only the rules of the paper's fork count."""
    return [r for r in rows if not r.get("resampled")]


def place(row):
    """(category, set, figure, question) of a HallusionBench row, or of VLMEvalKit's index."""
    meta = row["meta"]
    if "figure_id" not in meta:
        category = meta.get("l2-category", meta.get("category"))
        return (str(category), *str(meta["index"]).split("_")[-3:])
    category = f"{meta.get('category')}_{meta.get('subcategory')}"
    return (category, *(str(meta.get(key)) for key in ("set_id", "figure_id", "question_id")))


def cluster(row):
    """What a row's score is not independent of: its problem, seed, image or set of figures."""
    bench, meta = row.get("bench"), row.get("meta", {})
    if bench == "hallusionbench":
        return "/".join(place(row)[:2])
    image = "question_id" if "question_id" in meta else "image_path"
    key = {"mathverse": "problem_index", "dynamath": "seed", "mme": image}.get(bench)
    return str(meta.get(key, row["id"]))


def share(rows, key, unit=itemgetter("id"), weight=1.0):
    """A part of a metric, (weight, scores, clusters): a unit counts when all of it is right."""
    units = grouped(rows, lambda row: [(unit(row), row["sample"])]).values()
    scores = [float(all(row[key] for row in part)) for part in units]
    return weight, scores, [cluster(part[0]) for part in units]


def metrics(bench: str, rows: list[dict], key: str = "right") -> dict[str, list]:
    """{metric: [(weight, scores, clusters), ...]}: a metric is the sum of weight * mean(scores)."""
    by_tag = dict(sorted(grouped(rows, lambda row: row.get("tags", ())).items()))
    if bench == "mme":  # accuracy and accuracy+ (both questions of an image) of every subtask
        units, found = (itemgetter("id"), cluster), {"SUM": [], "perception": [], "reasoning": []}
        subtasks = {t: [share(part, key, u, 100.0) for u in units] for t, part in by_tag.items()}
        for tag, parts in subtasks.items():
            found["SUM"] += parts
            found["reasoning" if tag in REASONING else "perception"] += parts
        return {name: parts for name, parts in found.items() if parts} | subtasks
    found = {"ALL": [share(rows, key)]}
    if bench == "mathverse" and (versions := [by_tag[v] for v in VERSIONS if v in by_tag]):
        found = {"ALL": [share(part, key, weight=1 / len(versions)) for part in versions]}
    if bench == "dynamath":
        found = {"average": [share(rows, key)], "worst case": [share(rows, key, cluster)]}
    if bench == "hallusionbench":
        # Figure 0 of category VS is no figure at all.
        figures = [r for r in rows if not (place(r)[0].startswith("VS") and place(r)[2] == "0")]
        three = {
            "aAcc": share(rows, key),
            "fAcc": share(figures, key, lambda row: place(row)[:3]),
            "qAcc": share(rows, key, lambda row: (*place(row)[:2], place(row)[3])),
        }
        three = {name: part for name, part in three.items() if part[1]}
        found = {"mean": [(1 / len(three), *part[1:]) for part in three.values()]}
        found |= {name: [part] for name, part in three.items()}
    return found | {tag: [share(part, key)] for tag, part in by_tag.items()}


def bootstrap(scores, clusters, seed=0, draws=2000):
    """(draws,) means of resamples: clusters are drawn with replacement, each as a whole."""
    _, number = np.unique(clusters, return_inverse=True)
    total, count = np.bincount(number, scores), np.bincount(number)  # (Q,)
    picks = np.random.default_rng(seed).integers(len(total), size=(draws, len(total)))
    return total[picks].sum(1) / count[picks].sum(1)


def wilson(right: float, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's 95 % interval of a proportion."""
    p = right / n
    centre = p + z * z / 2 / n
    half = z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return [max(0.0, float(low)), min(1.0, float(high))]


def estimate(parts: list[tuple]) -> dict[str, float]:
    """{value, low, high, n} of a metric; each part is resampled with a seed of its own."""
    value = sum(weight * np.mean(scores) for weight, scores, _ in parts)
    spread = sum(w * bootstrap(*part, seed) for seed, (w, *part) in enumerate(parts))
    low, high = np.quantile(spread, [0.025, 0.975])
    if all(len(set(scores)) == 1 for _, scores, _ in parts):
        n = len({c for _, _, clusters in parts for c in clusters})
        ends = [(weight, wilson(np.mean(scores) * n, n)) for weight, scores, _ in parts]
        low, high = (sum(weight * end[i] for weight, end in ends) for i in (0, 1))
    n = sum(len(scores) for _, scores, _ in parts)
    return dict(value=float(value), low=float(low), high=float(high), n=n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold a right one (Chen et al.)."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(rows: list[dict]) -> bool:
    """Is the most frequent answer right? No answer has no vote; the first of several wins."""
    votes = [(str(r["given"]).strip().lower(), r["right"]) for r in rows if r["given"] is not None]
    counts = Counter(answer for answer, _ in votes)
    return (max(counts, key=counts.get, default=None), True) in votes


def summarize(rows: list[dict]) -> dict:
    """Accuracy with its interval, mean length in tokens, rates, and pass@k of several samples."""
    rows = counted(rows)
    found = estimate([share(rows, "right")])
    summary = dict(n=len(rows), accuracy=found["value"], low=found["low"], high=found["high"])
    means = {"length": [r["length"] for r in rows], "format_rate": [r["format_ok"] for r in rows]}
    means["truncated"] = [r["finish"] == "length" for r in rows]
    summary |= {name: float(np.mean(values)) for name, values in means.items()}
    questions = by_question(rows).values()
    n = min(map(len, questions))
    if n > 1:
        right = [(len(q), sum(r["right"] for r in q)) for q in questions]
        ks = sorted({*(2**i for i in range(1, n.bit_length())), n})
        summary["pass@k"] = {k: float(np.mean([pass_at_k(*q, k) for q in right])) for k in ks}
        summary["majority"] = float(np.mean([majority(q) for q in questions]))
    return summary


def fork_rows(rows):
    """The row of a question that the paper's fork keeps: of five draws the first that is closed."""
    kept = []
    for draws in by_question(rows).values():
        closed = [r for r in draws[:5] if "</answer>" in r["completion"]]
        kept.append((closed or draws[:5][-1:])[0] | {"sample": 0})
    return kept


def bench_report(bench: str, rows: list[dict], full: int) -> dict:
    """All that is said about one benchmark of `full` questions."""
    plain, kept = counted(rows), fork_rows(rows)
    report = summarize(rows) | dict(questions=len(kept), full=full, undecided={}, judged={})
    report["training"] = float(np.mean([r["training_right"] for r in plain]))
    report["resampled"] = len(rows) - len(plain)
    for how, which, part in (("strict", "", plain), ("fork", "fork_", kept)):
        found = metrics(bench, part, f"{which}right")
        report[how] = {metric: estimate(groups) for metric, groups in found.items()}
        report["undecided"][how] = sum(not r[f"{which}decided"] for r in part)
        report["judged"][how] = sum(f"{which}judged" in r for r in part)
    return report


def read_run(path: str | Path) -> list[dict]:
    """The rows of a run of eval.py: its folder, or a file like its responses.jsonl."""
    path = Path(path) / "responses.jsonl" if Path(path).is_dir() else Path(path)
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


# Tables 1 and 2 of the paper (arXiv 2503.06749v4): benchmark and metric of each column, its rows.
# AVG is the mean of MathVista, MathVerse and MM-Math in Tables 3, 5 and 6; Vision-Only is of the
# authors' repository.
COLUMNS = """
    GEO mathvista GEO; ALG mathvista ALG; GPS mathvista GPS; MWP mathvista MWP;
    MathVista mathvista ALL; MathVerse mathverse ALL;
    Vision-Only mathverse Vision Only; MM-Math mm-math ALL; AVG AVG mean;
    DynaMath dynamath average; MMStar mmstar ALL; ChartQA chartqa ALL; MME mme SUM;
    HallBench hallusionbench mean
"""
COLUMNS = [column.split(maxsplit=2) for column in COLUMNS.split(";")]
COLUMNS = {name: (bench, metric.strip()) for name, bench, metric in COLUMNS}
PAPER = {
    "Qwen2.5-VL-7B (Table 1)": "66.9 68.7 66.8 76.9 68.1 46.7 - 34.1 49.6 50.7",
    "Vision-R1-7B (Table 1)": "80.3 79.0 83.2 80.6 73.5 52.4 46.7 40.2 55.4 56.3",
    "Vision-R1-32B (Table 1)": "85.8 82.6 88.0 78.5 76.4 62.1 - 55.3 - 65.6",
    "Vision-R1-72B (Table 1)": "88.3 86.8 89.4 79.6 78.2 63.2 - 59.3 - 66.4",
    "Vision-R1-LlamaV-CI-11B (Table 2)": "- - - - 62.7 27.1 - 26.1 - - 61.4 83.9 2190 49.5",
    "Vision-R1-Zero (Table 3)": "- - - - - - - - 50.7",
    "Vision-R1-CI (Table 3)": "- - - - - - - - 44.5",
    "Vision-R1-Long (Table 3)": "- - - - - - - - 47.7",
    "Zero+PTST (Table 6)": "- - - - - - - - 51.8",
    "Zero+SFT+PTST (Table 6)": "- - - - - - - - 39.8",
}


def average(found: list[dict]) -> dict:
    """The mean of metrics of different questions: the squares of their intervals' arms add up."""
    mean = {"value": np.mean([f["value"] for f in found])}
    for end, sign in (("low", -1), ("high", 1)):
        arm = np.hypot.reduce([f[end] - f["value"] for f in found]) / len(found)
        mean[end] = mean["value"] + sign * arm
    return mean


def markdown(*rows):
    lines = ["|" + "".join(f" {c} |" if c != "" else " |" for c in row) for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def percent(x):
    return f"{100 * x:.1f}"


def cell(found, bench="", value="value"):
    """A metric with its interval; MME's scores are points and no shares."""
    if not found:
        return ""
    numbers = [found[key] * (1 if bench == "mme" else 100) for key in (value, "low", "high")]
    return "{:.1f} ({:.1f} - {:.1f})".format(*numbers)


def facts(s):
    """What is said about a summary beside its accuracy, by name."""
    found = {"mean length": f"{s['length']:.1f}", "format %": percent(s["format_rate"])}
    found |= {"cut %": percent(s["truncated"]), "answers": s["n"]}
    if "pass@k" in s:
        found["pass@k"] = ", ".join(f"{k}: {percent(v)}" for k, v in s["pass@k"].items())
        found["majority"] = percent(s["majority"])
    return found


def table(reports: list[tuple[str, dict]]) -> str:
    """A Markdown table of (name, summary)."""
    columns = dict.fromkeys(column for _, s in reports for column in facts(s))
    rows = [
        [name, cell(s, value="accuracy"), *(facts(s).get(column, "") for column in columns)]
        for name, s in reports
    ]
    return markdown(["", "accuracy % (95 % interval)", *columns], *rows)


def paper_table(name, report):
    """The paper's own rows, then ours by both scores. AVG stands there when its three do."""
    if {"mathvista", "mathverse", "mm-math"} <= report.keys():
        three = [report[bench] for bench in ("mathvista", "mathverse", "mm-math")]
        both = {how: average([part[how]["ALL"] for part in three]) for how in ("strict", "fork")}
        report = report | {"AVG": {how: {"mean": mean} for how, mean in both.items()}}
    columns = {column: at for column, at in COLUMNS.items() if at[0] in report}
    rows = [["%", *columns]]
    for model, line in PAPER.items():
        values = dict(zip(COLUMNS, line.replace("-", "").split(" ")))
        cells = [values.get(column, "") for column in columns]
        rows += [[model, *cells]] if any(cells) else []
    for how, words in (("strict", "strict: format required"), ("fork", "the paper's rules")):
        cells = [cell(report[bench][how].get(metric), bench) for bench, metric in columns.values()]
        rows.append([f"{name}, {words}", *cells])
    return markdown(*rows)


def bench_tables(name: str, report: dict, titles: dict[str, str]) -> str:
    """The paper's table, then every benchmark with its subsets."""
    text = [paper_table(name, report), ""]
    for bench, s in report.items():
        undecided, judged = s["undecided"], s["judged"]
        said = ", ".join(f"{name} {value}" for name, value in facts(s).items())
        text.append(
            f"## {titles[bench]}: {s['questions']} of {s['full']} questions\n\n{said}; "
            f"by the training reward {percent(s['training'])} %. "
            f"Undecided by rule: {undecided['strict']} strict, {undecided['fork']} fork; "
            f"judged: {judged['strict']} and {judged['fork']}; "
            f"resampled draws: {s['resampled']}.\n"
        )
        rows = [["", "strict", "the paper's rules", "n"]]
        for metric, strict in s["strict"].items():
            fork = cell(s["fork"].get(metric), bench)
            rows.append([metric, cell(strict, bench), fork, strict["n"]])
        text += [markdown(*rows), ""]
    how = "bootstrap over questions with all that belongs to them; Wilson's where all scores agree."
    return "\n".join([*text, f"Intervals: 95 %, {how}"])
