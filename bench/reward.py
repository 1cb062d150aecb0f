"""Benchmark of the reward: python bench/reward.py [--peers]

Prints the time of is_equiv over the table of cases on one core (cold: parse caches cleared before
every call; warm: as in training, where golds repeat), the agreement with the table, and the time of
8,192 completions of 2,000 tokens. --peers: math-verify over the same cases, if it is installed.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward as R
from answers.parse import parse
from answers.text import clean

CASES = Path(__file__).resolve().parents[1] / "tests" / "reward_cases.txt"


def cases():
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            verdict, pred, gold, _, *options = [x.strip() for x in line.split(" ¦ ")]
            choices = options[0].split(" / ") if options else None
            yield verdict.startswith("yes"), pred, gold, choices


def no_verdicts():
    R.cached_verdict.cache_clear()


def no_caches():
    for function in (R.cached_verdict, parse, clean):
        function.cache_clear()


def report(name, call, rows, forget):
    """Prints the seconds of the calls, and the share of verdicts as in the table."""
    times, right = [], 0
    for want, pred, gold, choices in rows:
        forget()
        begun = time.perf_counter()
        got = call(pred, gold, choices)
        times.append(time.perf_counter() - begun)
        right += got == want
    times.sort()
    middle, mean, late = statistics.median(times), statistics.mean(times), times[-len(times) // 100]
    print(
        f"{name:24s} median {middle * 1e6:9.1f} us   mean {mean * 1e6:9.1f} us   "
        f"p99 {late * 1e6:10.1f} us   agrees with the table {right / len(rows):6.1%}"
    )


def math_verify(rows):
    try:
        from math_verify import parse, verify
    except ImportError:
        print("math-verify is not installed: pip install math-verify")
        return

    def call(pred, gold, choices):
        return bool(verify(parse(f"${gold}$"), parse(f"${pred}$")))

    call("1", "1", None)  # its imports
    report("math-verify", call, [row for row in rows if not row[3]], no_verdicts)


def many(name, answers, golds):
    """Prints the time to score completions of about 2,000 tokens each."""
    no_caches()
    sentence = "Okay, let's see. The angle at the centre is twice the angle at the circumference. "
    chain = sentence * 100
    completions = [f"<think>{chain}</think>\n<answer>{answer}</answer>" for answer in answers]
    begun = time.perf_counter()
    scores = [R.score(text, gold) for text, gold in zip(completions, golds)]
    seconds, mean = time.perf_counter() - begun, statistics.mean(s.reward for s in scores)
    print(
        f"{len(scores):,} completions of {len(chain):,} characters, {name}: {seconds:.2f} s, "
        f"mean reward {mean:.3f}   {R.stats()}"
    )


def main():
    rows = list(cases()) * 3
    R.is_equiv("1", "2")
    report("is_equiv, cold", R.is_equiv, rows, no_caches)
    report("is_equiv, parse cached", R.is_equiv, rows, no_verdicts)
    if "--peers" in sys.argv:
        math_verify(rows[: len(rows) // 3])
    pairs = [row for row in rows if not row[3]]
    pairs = [pairs[k % len(pairs)] for k in range(8192)]
    many("answers of the table", [row[1] for row in pairs], [row[2] for row in pairs])
    different = [f"{k}+\\sqrt{{{k % 97}}}" for k in range(8192)]
    golds = [f"{k}+\\frac{{{k % 89}}}{{7}}" for k in range(8192)]
    many("all expressions different", different, golds)


if __name__ == "__main__":
    main()
