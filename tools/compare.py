"""Two runs of eval.py on the same questions: paired differences with a significance test.

python -m tools.compare RUN_A RUN_B      two folders of eval.py, or files like responses.jsonl
python -m tools.compare A0,A1,A2 B0,B1,B2      the same two variants with several seeds each
"""

import sys
from math import comb

import numpy as np

from benchmarks import report
from nano import run


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test: so many questions are right in just one of two."""
    n = only_a + only_b
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(rows_a: list[dict], rows_b: list[dict], key: str = "right") -> dict:
    """The paired difference of accuracy, B - A, over the questions of both, with interval and p."""
    a, b = report.by_question(rows_a), report.by_question(rows_b)
    same = [id for id in a if id in b]
    if not same:
        raise ValueError("the two runs have no question in common")
    x, y = (np.array([np.mean([r[key] for r in rows[id]]) for id in same]) for rows in (a, b))
    clusters = [str(report.cluster(a[id][0])) for id in same]
    spread = report.bootstrap(y - x, clusters)
    low, high = np.quantile(spread, [0.025, 0.975])
    if len(set(clusters)) == len(clusters) and {*x, *y} <= {0.0, 1.0}:
        test, p = "McNemar, exact", mcnemar(int((x > y).sum()), int((y > x).sum()))
    else:  # There are several samples, or questions that belong together.
        beyond = min(np.mean(spread <= 0), np.mean(spread >= 0))
        test, p = "paired bootstrap", min(1.0, 2 * max(beyond, 1 / len(spread)))
    numbers = dict(a=x.mean(), b=y.mean(), difference=(y - x).mean(), low=low, high=high, p=p)
    return dict(n=len(same), test=test) | {k: float(v) for k, v in numbers.items()}


def compare_runs(path_a, path_b) -> str:
    """A Markdown table: for every benchmark of both runs the difference by both rules."""
    runs = [report.read_run(path) for path in (path_a, path_b)]
    lines = [["", "n", "A %", "B %", "B - A (95 %)", "p", "test"]]
    for bench in dict.fromkeys(r.get("bench", "all") for r in runs[0]):
        pair = [[r for r in rows if r.get("bench", "all") == bench] for rows in runs]
        ways = [(bench, report.counted, "right")]
        if bench != "all":
            ways.append((f"{bench}, the paper's rules", report.fork_rows, "fork_right"))
        for words, keep, key in ways if pair[1] else []:
            c = compare(*map(keep, pair), key)
            interval = "{difference:+.1%} ({low:+.1%} to {high:+.1%})".format(**c).replace("%", "")
            shares = [report.percent(c[which]) for which in "ab"]
            lines.append([words, c["n"], *shares, interval, f"{c['p']:.2g}", c["test"]])
    return f"A: {path_a}\nB: {path_b}\n{report.markdown(*lines)}"


def over_seeds(a: list[str], b: list[str]) -> str:
    """A Markdown table of two variants, run k of one beside run k of the other: one seed each.

    The interval of the difference is Student's over the seeds.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} runs beside {len(b)}: each seed needs a run of both variants")
    pairs = [[report.counted(report.read_run(path)) for path in pair] for pair in zip(a, b)]
    found = [compare(*pair) for pair in pairs]
    lines = [["", "n", "A %", "B %", "B - A", "tokens an answer, A", "B"]]
    for number, (pair, c) in enumerate(zip(pairs, found)):
        lengths = [f"{np.mean([row['length'] for row in rows]):.1f}" for rows in pair]
        shares = [report.percent(c[which]) for which in "ab"]
        change = f"{100 * c['difference']:+.1f} ({100 * c['low']:+.1f} to {100 * c['high']:+.1f})"
        lines.append([f"pair {number}", c["n"], *shares, change, *lengths])
    mean, half = report.interval([100 * c["difference"] for c in found])
    shares = [report.percent(np.mean([c[which] for c in found])) for which in "ab"]
    lines.append(["mean (95 % t over pairs)", "", *shares, f"{mean:+.1f} ± {half:.1f}", "", ""])
    return report.markdown(*lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tools.compare RUN_A RUN_B")
    runs = [word.split(",") for word in sys.argv[1:]]
    with run.for_people():
        print(compare_runs(*sys.argv[1:]) if max(map(len, runs)) == 1 else over_seeds(*runs))
