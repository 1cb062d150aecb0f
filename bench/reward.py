"""Benchmark of the reward: python bench/reward.py [--peers]

Prints the median and mean time of is_equiv over the table of cases on one core (cold: parse caches cleared before every
call; warm: as in training, where golds repeat), the agreement with the table, and the time of a batch of 8,192
completions of 2,000 tokens. --peers: math-verify over the same cases in the same run, if it is installed.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reward as R
from answers import parse as mp
from answers import text as mt


def cases():
    for line in (ROOT / "tests" / "reward_cases.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            verdict, pred, gold, source, *options = [x.strip() for x in line.split(" ¦ ")]
            yield (
                verdict.startswith("yes"),
                pred,
                gold,
                options[0].split(" / ") if options else None,
            )


def timed(call, rows, forget=lambda: None):
    """Seconds of each call, and the share of verdicts as in the table."""
    times, right = [], 0
    for want, pred, gold, choices in rows:
        forget()
        begun = time.perf_counter()
        got = call(pred, gold, choices)
        times.append(time.perf_counter() - begun)
        right += got == want
    return times, right / len(rows)


def report(name, times, right):
    times = sorted(times)
    print(
        f"{name:24s} median {statistics.median(times) * 1e6:9.1f} us   mean {statistics.mean(times) * 1e6:9.1f} us   "
        f"p99 {times[int(len(times) * 0.99)] * 1e6:10.1f} us   agrees with the table {right:6.1%}"
    )


def forget():
    R._cache.clear(), mp.parse.cache_clear(), mt.clean.cache_clear()


def math_verify(rows):
    try:
        from math_verify import parse, verify
    except ImportError:
        return print("math-verify is not installed: pip install math-verify")
    call = lambda pred, gold, choices: bool(verify(parse(f"${gold}$"), parse(f"${pred}$")))
    call("1", "1", None)  # its imports
    report("math-verify", *timed(call, [r for r in rows if not r[3]]))


def main():
    rows = list(cases()) * 3
    R.is_equiv("1", "2")
    report("is_equiv, cold", *timed(R.is_equiv, rows, forget))
    report("is_equiv, parse cached", *timed(R.is_equiv, rows, R._cache.clear))
    if "--peers" in sys.argv:
        math_verify(rows[: len(rows) // 3])
    pairs = [r for r in rows if not r[3]]
    chain = (
        "Okay, let's see. The angle at the centre is twice the angle at the circumference. " * 100
    )  # about 2,000 tokens
    for workers in (0, 2):
        forget()
        completions = [
            f"<think>{chain}{k}</think>\n<answer>{pairs[k % len(pairs)][1]}</answer>"
            for k in range(8192)
        ]
        golds = [pairs[k % len(pairs)][2] for k in range(8192)]
        begun = time.perf_counter()
        scores = R.reward_batch(completions, golds, workers=workers)
        seconds, mean = time.perf_counter() - begun, sum(s.reward for s in scores) / 8192
        print(
            f"8,192 completions of {len(chain):,} characters, workers={workers}: {seconds:.2f} s, mean reward {mean:.3f}"
        )
    forget()
    completions = [
        f"<think>{chain}</think><answer>{k}+\\sqrt{{{k % 97}}}</answer>" for k in range(8192)
    ]
    begun = time.perf_counter()
    R.reward_batch(completions, [f"{k}+\\frac{{{k % 89}}}{{7}}" for k in range(8192)])
    print(
        f"8,192 completions with 8,192 different expressions: {time.perf_counter() - begun:.2f} s   {R.stats()}"
    )


if __name__ == "__main__":
    main()
