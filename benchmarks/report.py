"""From scored answers to numbers: what each benchmark reports, intervals, pass@k, majority votes, tables, paired comparisons.

A row is a line of responses.jsonl (eval.py): id, sample, right, given, ...; of a benchmark also bench, tags, meta and fork_right.
Every interval is a 95 % bootstrap over whole clusters (a question with its samples, a seed with its variants, an image with
its questions); where all scores agree and a bootstrap has no width, it is Wilson's.
"""

import json
import re
from collections import Counter, defaultdict
from math import comb
from pathlib import Path

import numpy as np

# ---- what a benchmark reports -------------------------------------------------------------------------------------------

NAMES = {
    "geometry reasoning": "GEO",
    "algebraic reasoning": "ALG",
    "arithmetic reasoning": "ARI",
    "logical reasoning": "LOG",
    "numeric commonsense": "NUM",
    "scientific reasoning": "SCI",
    "statistical reasoning": "STA",
    "figure question answering": "FQA",
    "geometry problem solving": "GPS",
    "math word problem": "MWP",
    "textbook question answering": "TQA",
    "visual question answering": "VQA",
}
TAGS = {
    "mathvista": ("task", "skills", "source", "grade"),
    "mathverse": ("problem_version", "subject", "subfield"),
    "mm-math": ("difficult", "year", "knowledge"),
    "dynamath": ("subject", "knowledge_level", "level"),
    "mathvision": ("subject", "level"),
    "mmstar": ("category",),
    "chartqa": ("human_or_machine", "split"),
    "mme": ("category",),
    "hallusionbench": ("category", "subcategory"),
}
VERSIONS = (
    "Text Dominant",
    "Text Lite",
    "Vision Intensive",
    "Vision Dominant",
    "Vision Only",
)  # text only stands beside them
REASONING = (
    "code_reasoning",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
)  # of MME; the rest is perception


def tags(bench, meta):
    """the subsets that a question belongs to, by the names of the paper's table"""
    out = []
    for key in TAGS[bench]:
        values = meta.get(key)
        values = (
            list(values.values())
            if isinstance(values, dict)
            else values
            if isinstance(values, list)
            else [values]
        )
        if (
            key == "skills" and isinstance(values[0], str) and values[0].startswith("[")
        ):  # the TSV holds the list as text
            values = re.findall(r"'([^']+)'", values[0])
        for v in values:
            v = (
                {0: "human", 1: "augmented"}.get(v, v)
                if key == "human_or_machine"
                else f"level {v}"
                if key == "level"
                else v
            )
            out += [NAMES.get(str(v), str(v))] if v not in (None, "", "level None") else []
    return list(dict.fromkeys(out))


def place(row):
    """(category, set, figure, question) of a HallusionBench row, from its fields or from VLMEvalKit's index"""
    m = row["meta"]
    if "figure_id" in m:
        return (
            f"{m.get('category')}_{m.get('subcategory')}",
            str(m.get("set_id")),
            str(m["figure_id"]),
            str(m.get("question_id")),
        )
    return (str(m.get("l2-category", m.get("category"))), *str(m["index"]).split("_")[-3:])


def cluster(row):
    """what a row's score is not independent of: its problem, seed, image or set of figures"""
    bench, m = row.get("bench"), row.get("meta", {})
    if bench == "hallusionbench":
        return "/".join(place(row)[:2])
    key = {
        "mathverse": "problem_index",
        "dynamath": "seed",
        "mme": "question_id" if "question_id" in m else "image_path",
    }.get(bench)
    return str(m.get(key, row["id"]))


def metrics(bench, rows, key="right"):
    """rows -> {metric: [(weight, scores, clusters), ...]}: a metric is the sum of weight x mean(scores) over these groups"""

    def mean(part, weight=1.0):
        return weight, [float(r[key]) for r in part], [cluster(r) for r in part]

    def together(unit, part, weight=1.0):
        """a unit (image, seed, figure) counts when all of its questions are right"""
        groups = defaultdict(list)
        for r in part:
            groups[unit(r), r["sample"]].append(r)
        return (
            weight,
            [float(all(r[key] for r in g)) for g in groups.values()],
            [cluster(g[0]) for g in groups.values()],
        )

    by_tag = defaultdict(list)
    for r in rows:
        for tag in r.get("tags", ()):
            by_tag[tag].append(r)
    if bench == "mme":  # accuracy + accuracy+ of every subtask, each out of 100
        parts = {
            c: [mean(part, 100.0), together(cluster, part, 100.0)]
            for c, part in sorted(by_tag.items())
        }
        named = {
            "SUM": list(parts),
            "perception": [c for c in parts if c not in REASONING],
            "reasoning": [c for c in parts if c in REASONING],
        }
        return {
            k: [group for c in cs for group in parts[c]] for k, cs in named.items() if cs
        } | parts
    out = {"ALL": [mean(rows)]}
    if bench == "mathverse" and (versions := [by_tag[v] for v in VERSIONS if by_tag.get(v)]):
        out = {"ALL": [mean(part, 1 / len(versions)) for part in versions]}
    if bench == "dynamath":
        out = {"average": [mean(rows)], "worst case": [together(cluster, rows)]}
    if bench == "hallusionbench":
        shown = [
            r for r in rows if not (place(r)[0].startswith("VS") and place(r)[2] == "0")
        ]  # VS, figure 0: no figure at all
        parts = {
            "aAcc": mean(rows),
            "fAcc": together(lambda r: place(r)[:3], shown),
            "qAcc": together(lambda r: (*place(r)[:2], place(r)[3]), rows),
        }
        parts = {k: g for k, g in parts.items() if g[1]}
        out = {"mean": [(1 / len(parts), *g[1:]) for g in parts.values()]} | {
            k: [g] for k, g in parts.items()
        }
    return out | {tag: [mean(part)] for tag, part in sorted(by_tag.items())}


# ---- statistics -----------------------------------------------------------------------------------------------------------


def bootstrap(scores, clusters, seed=0, draws=2000):
    """means of resamples (draws,): clusters are drawn with replacement, what is in one stays together"""
    _, number = np.unique(clusters, return_inverse=True)
    total, count = np.bincount(number, scores), np.bincount(number)  # (Q,)
    picks = np.random.default_rng(seed).integers(len(total), size=(draws, len(total)))
    return total[picks].sum(1) / count[picks].sum(1)


def wilson(right, n, z=1.959964):
    """Wilson's 95 % interval of a proportion"""
    centre, half = (
        (right / n + z * z / 2 / n),
        z * np.sqrt(right / n * (1 - right / n) / n + z * z / 4 / n / n),
    )
    return [
        max(0.0, float((centre - half) / (1 + z * z / n))),
        min(1.0, float((centre + half) / (1 + z * z / n))),
    ]


def estimate(groups):
    """[(weight, scores, clusters), ...] -> {value, low, high, n}; groups are drawn with one seed each, independently"""
    value = sum(weight * np.mean(scores) for weight, scores, _ in groups)
    spread = sum(
        weight * bootstrap(scores, clusters, seed)
        for seed, (weight, scores, clusters) in enumerate(groups)
    )
    low, high = np.quantile(spread, [0.025, 0.975])
    if all(len(set(scores)) == 1 for _, scores, _ in groups):
        n = len({c for _, _, clusters in groups for c in clusters})
        ends = [wilson(np.mean(scores) * n, n) for _, scores, _ in groups]
        low, high = (sum(g[0] * e[i] for g, e in zip(groups, ends)) for i in (0, 1))
    return dict(
        value=float(value), low=float(low), high=float(high), n=sum(len(g[1]) for g in groups)
    )


def pass_at_k(n, right, k):
    """unbiased: the chance that k of the n samples, drawn without replacement, hold a right one (Chen et al. 2021)"""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(rows):
    """is the answer that most samples of one question give right? the first of several as frequent; no answer has no vote"""
    votes = Counter(str(r["given"]).strip().lower() for r in rows if r["given"] is not None)
    best = votes.most_common(1)[0][0] if votes else None
    return any(
        r["right"]
        for r in rows
        if r["given"] is not None and str(r["given"]).strip().lower() == best
    )


def by_question(rows):
    questions = defaultdict(list)
    for r in rows:
        if not r.get("resampled"):
            questions[r["id"]].append(r)
    return questions


def summarize(rows):
    """responses -> accuracy with its interval, mean length (tokens), format rate, share cut at the limit, pass@k, majority"""
    rows = [r for r in rows if not r.get("resampled")]
    right = np.array([float(r["right"]) for r in rows])
    mean = lambda key: float(np.mean([r[key] for r in rows]))
    e = estimate([(1.0, right, [cluster(r) for r in rows])])
    out = dict(
        n=len(rows),
        accuracy=e["value"],
        low=e["low"],
        high=e["high"],
        length=mean("length"),
        format_rate=mean("format_ok"),
        truncated=float(np.mean([r["finish"] == "length" for r in rows])),
    )
    questions = by_question(rows).values()
    n = min(map(len, questions))
    if n > 1:
        ks = sorted({*(2**i for i in range(1, n.bit_length()) if 2**i <= n), n})
        out["pass@k"] = {
            k: float(np.mean([pass_at_k(len(q), sum(r["right"] for r in q), k) for q in questions]))
            for k in ks
        }
        out["majority"] = float(np.mean([majority(q) for q in questions]))
    return out


def fork_rows(rows):
    """one row per question as the paper's fork keeps it: the first of at most five draws that closes its answer"""
    questions = defaultdict(list)
    for r in rows:
        questions[r["id"]].append(r)
    return [
        next((r for r in q[:5] if "</answer>" in r["completion"]), q[:5][-1]) | {"sample": 0}
        for q in questions.values()
    ]


def bench_report(bench, rows, full):
    """all that is said about one benchmark; `full`: its number of questions when complete"""
    plain = [r for r in rows if not r.get("resampled")]
    kept = fork_rows(rows)
    return summarize(rows) | dict(
        questions=len(by_question(rows)),
        full=full,
        strict={k: estimate(g) for k, g in metrics(bench, plain).items()},
        fork={k: estimate(g) for k, g in metrics(bench, kept, "fork_right").items()},
        training=float(np.mean([r["training_right"] for r in plain])),
        undecided=dict(
            strict=sum(not r["decided"] for r in plain),
            fork=sum(not r["fork_decided"] for r in kept),
        ),
        judged=dict(
            strict=sum("judged" in r for r in plain), fork=sum("fork_judged" in r for r in kept)
        ),
        resampled=sum(bool(r.get("resampled")) for r in rows),
        interval="95 % bootstrap over clusters; Wilson where all scores agree",
    )


# ---- tables ---------------------------------------------------------------------------------------------------------------

# Table 1 and Table 2 of the paper (arXiv 2503.06749v4)
COLUMNS = {
    "GEO": ("mathvista", "GEO"),
    "ALG": ("mathvista", "ALG"),
    "GPS": ("mathvista", "GPS"),
    "MWP": ("mathvista", "MWP"),
    "MathVista": ("mathvista", "ALL"),
    "MathVerse": ("mathverse", "ALL"),
    "MM-Math": ("mm-math", "ALL"),
    "DynaMath": ("dynamath", "average"),
    "MMStar": ("mmstar", "ALL"),
    "ChartQA": ("chartqa", "ALL"),
    "MME": ("mme", "SUM"),
    "HallBench": ("hallusionbench", "mean"),
}
PAPER = {
    "Qwen2.5-VL-7B (Table 1)": [66.9, 68.7, 66.8, 76.9, 68.1, 46.7, 34.1, 50.7],
    "Vision-R1-7B (Table 1)": [80.3, 79.0, 83.2, 80.6, 73.5, 52.4, 40.2, 56.3],
    "Vision-R1-32B (Table 1)": [85.8, 82.6, 88.0, 78.5, 76.4, 62.1, 55.3, 65.6],
    "Vision-R1-72B (Table 1)": [88.3, 86.8, 89.4, 79.6, 78.2, 63.2, 59.3, 66.4],
    "Vision-R1-LlamaV-CI-11B (Table 2)": [
        None,
        None,
        None,
        None,
        62.7,
        27.1,
        26.1,
        None,
        61.4,
        83.9,
        2190,
        49.5,
    ],
}


def table(reports):
    """[(name, summary)] -> lines of a Markdown table"""
    more = [k for k in ("pass@k", "majority") if any(k in s for _, s in reports)]
    lines = [
        "| | accuracy % (95 % interval) | mean length | format % | cut % | answers |"
        + "".join(f" {k} |" for k in more)
    ]
    lines.append("|---" * (6 + len(more)) + "|")
    for name, s in reports:
        cells = [
            ", ".join(f"{k}: {100 * v:.1f}" for k, v in s["pass@k"].items())
            if k == "pass@k"
            else f"{100 * s[k]:.1f}"
            for k in more
            if k in s
        ]
        lines.append(
            f"| {name} | {100 * s['accuracy']:.1f} ({100 * s['low']:.1f} - {100 * s['high']:.1f}) | {s['length']:.1f} | "
            f"{100 * s['format_rate']:.1f} | {100 * s['truncated']:.1f} | {s['n']} |"
            + "".join(f" {c} |" for c in cells)
        )
    return "\n".join(lines)


def paper_table(name, report):
    """the paper's table: its own rows, ours by the strict score, ours by the rules of its evaluation"""
    columns = {c: at for c, at in COLUMNS.items() if at[0] in report}
    lines = ["| % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, values in PAPER.items():
        cells = dict(zip(COLUMNS, values))
        if any(cells.get(c) is not None for c in columns):
            lines.append(
                f"| {row} | "
                + " | ".join("" if cells.get(c) is None else str(cells[c]) for c in columns)
                + " |"
            )
    for how, words in (
        ("strict", "strict: format required"),
        ("fork", "the paper's rules"),
    ):
        cells = [report[bench][how].get(metric) for bench, metric in columns.values()]
        lines.append(
            f"| {name}, {words} | "
            + " | ".join(cell(bench, e) for (bench, _), e in zip(columns.values(), cells))
            + " |"
        )
    return "\n".join(lines)


def cell(bench, e):
    scale = 1 if bench == "mme" else 100
    return (
        ""
        if e is None
        else f"{scale * e['value']:.1f} ({scale * e['low']:.1f} - {scale * e['high']:.1f})"
    )


def bench_tables(name, report, titles):
    """Markdown for people: the paper's table, then every benchmark with its subsets"""
    text = [paper_table(name, report), ""]
    for bench, s in report.items():
        text.append(
            f"## {titles[bench]}: {s['questions']} of {s['full']} questions, {s['n']} answers\n"
        )
        more = "".join(f", pass@{k} {100 * v:.1f} %" for k, v in s.get("pass@k", {}).items())
        more += f", majority vote {100 * s['majority']:.1f} %" if "majority" in s else ""
        text.append(
            f"mean length {s['length']:.1f} tokens, format {100 * s['format_rate']:.1f} %, cut {100 * s['truncated']:.1f} %{more}; "
            f"by the training reward {100 * s['training']:.1f} %. Undecided by rule: {s['undecided']['strict']} strict, {s['undecided']['fork']} "
            f"fork; judged: {s['judged']['strict']} and {s['judged']['fork']}; resampled draws: {s['resampled']}.\n"
        )
        text += ["| | strict | the paper's rules | n |", "|---|---|---|---|"]
        for metric, e in s["strict"].items():
            text.append(
                f"| {metric} | {cell(bench, e)} | {cell(bench, s['fork'].get(metric))} | {e['n']} |"
            )
        text.append("")
    return "\n".join(
        text
        + [
            "Intervals: 95 %, bootstrap over questions with all that belongs to them; Wilson's where all scores agree."
        ]
    )


# ---- two runs on the same questions -----------------------------------------------------------------------------------------


def mcnemar(only_a, only_b):
    """exact two-sided p of McNemar's test: of the questions that just one of two gets right, so many by each"""
    n = only_a + only_b
    return (
        min(1.0, 2 * sum(comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n) if n else 1.0
    )


def compare(rows_a, rows_b, key="right"):
    """paired difference of accuracy, B - A, over the questions of both: {n, a, b, difference, low, high, p, test}"""
    a, b = by_question(rows_a), by_question(rows_b)
    same = [id for id in a if id in b]
    if not same:
        raise ValueError("the two runs have no question in common")
    x, y = (np.array([np.mean([r[key] for r in rows[id]]) for id in same]) for rows in (a, b))
    groups = [str(cluster(a[id][0])) for id in same]
    spread = bootstrap(y - x, groups)
    low, high = np.quantile(spread, [0.025, 0.975])
    if len(set(groups)) == len(groups) and {*x, *y} <= {0.0, 1.0}:
        test, p = "McNemar, exact", mcnemar(int((x > y).sum()), int((y > x).sum()))
    else:  # several samples, or questions that belong together
        test, p = (
            "paired bootstrap",
            min(1.0, 2 * max(min(np.mean(spread <= 0), np.mean(spread >= 0)), 1 / len(spread))),
        )
    return dict(
        n=len(same),
        a=float(x.mean()),
        b=float(y.mean()),
        difference=float((y - x).mean()),
        low=float(low),
        high=float(high),
        p=float(p),
        test=test,
    )


def read_run(path):
    path = Path(path) / "responses.jsonl" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run of eval.py has a responses.jsonl")
    return [json.loads(line) for line in open(path, encoding="utf-8") if line.strip()]


def compare_runs(path_a, path_b):
    """prints, for every benchmark that two runs share, the paired difference B - A with its interval and p"""
    runs = [read_run(p) for p in (path_a, path_b)]
    benches = dict.fromkeys(r.get("bench", "all") for r in runs[0])
    lines = ["| | n | A % | B % | B - A (95 %) | p | test |", "|---|---|---|---|---|---|---|"]
    for bench in benches:
        a, b = ([r for r in rows if r.get("bench", "all") == bench] for rows in runs)
        if not b:
            continue
        for key, words in [("right", bench), ("fork_right", f"{bench}, the paper's rules")][
            : 1 if bench == "all" else 2
        ]:
            pair = (a, b) if key == "right" else (fork_rows(a), fork_rows(b))
            pair = (
                [[r | {"resampled": False} for r in rows] for rows in pair]
                if key != "right"
                else pair
            )
            c = compare(*pair, key)
            lines.append(
                f"| {words} | {c['n']} | {100 * c['a']:.1f} | {100 * c['b']:.1f} | {100 * c['difference']:+.1f} "
                f"({100 * c['low']:+.1f} to {100 * c['high']:+.1f}) | {c['p']:.2g} | {c['test']} |"
            )
    print(f"A: {path_a}\nB: {path_b}\n" + "\n".join(lines))
