"""Is an answer right? The hard formatting result reward of Vision-R1 (HFRRF, Sec. 3.4).

1. Format: the completion is exactly <think>...</think><answer>...</answer> (`extract_answer`).
2. Verdict: the answer says the same as the gold one (`judge`; mathematics, options, words, times).
3. Reward: 1.0 if both are right, else 0.0 (`score`).

`python reward.py "3\\sqrt{2}" "\\sqrt{18}"` explains a verdict. Nothing that a model wrote is
evaluated as code: answers/ reads it with its own parser, whose limits bound the time of a verdict.
"""

import sys
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from answers.judge import mute, same_answer, same_option
from answers.parse import MAX_CHARS
from answers.text import braced, core_text, letters, unwrap

LONGEST = 4000  # characters of an answer; without what surrounds it, MAX_CHARS
_counts = Counter()


# ---- reward: what GRPO learns from ---------------------------------------------------------------
class Score(NamedTuple):
    reward: float
    why: str  # ok, format, truncated, wrong, unparsable
    format_ok: bool
    correct: bool
    answer: str | None


def score(
    completion: str,
    gold: str,
    choices: list[str] | None = None,
    truncated: bool = False,
    format_weight: float = 0.0,
) -> Score:
    """The reward of one completion, and why.

    `truncated`: it hit the length limit, so that no answer was closed. `format_weight` 0 is HFRRF;
    w > 0 gives (w * format + result) / (1 + w), so that 1 is the 1:1 of Vision-R1-Zero (App. A)
    on a scale from 0 to 1, where the answer counts without the format, too."""
    answer = None if truncated else extract_answer(completion)
    format_ok = answer is not None
    if format_weight and not format_ok and not truncated:
        answer = loose_answer(completion)
    correct, why = False, "format"
    if answer is not None:
        correct, why = verdict(answer, str(gold), choices)
    if format_weight:
        reward = (format_weight * format_ok + correct) / (1 + format_weight)
    else:
        reward = float(format_ok and correct)
    if not format_ok:
        why = "truncated" if truncated else "format"
    return Score(reward, why, format_ok, correct, answer)


# ---- format --------------------------------------------------------------------------------------
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(completion: str) -> str | None:
    """Text of <answer> if the completion is exactly <think>..</think> <answer>..</answer>.

    Each tag stands there once. White space may stand between the two blocks and at the end, but not
    before <think>: the strict reading of the format. `Final Answer:` and an outer \\boxed{} are
    taken off; an empty answer is a wrong format. Linear in the length."""
    if not isinstance(completion, str) or not completion.startswith("<think>"):
        return None
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return None
    body = completion.rstrip()
    end, start = completion.find("</think>"), completion.find("<answer>")
    if not body.endswith("</answer>") or end > start:
        return None
    if completion[end + len("</think>") : start].strip():
        return None
    return unwrap(body[start + len("<answer>") : -len("</answer>")]) or None


def loose_answer(completion: str) -> str | None:
    """The last <answer> block, else the last \\boxed{}, else None, for the 1:1 reward."""
    if not isinstance(completion, str):
        return None
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return unwrap(completion[start + len("<answer>") : end]) or None
    inner = braced(completion, at + 6) if (at := completion.rfind("\\boxed{")) >= 0 else None
    return (inner[0].strip() or None) if inner else None


# ---- verdict -------------------------------------------------------------------------------------
def judge(pred: str, gold: str, choices: list[str] | None = None, say=mute) -> tuple[bool, str]:
    """(right?, why). The function to edit for another notion of "right".

    `say` is called with each step in words."""
    p, g = core_text(pred), core_text(gold)
    say(f"without wrappers: {p!r} and {g!r}")
    options = [core_text(str(choice)) for choice in choices or []]
    bare_letters = all(letters(text) == {chr(65 + k)} for k, text in enumerate(options))
    if not p or not g:
        right = False
    elif p == g:
        say("the same text")
        right = True
    elif max(len(p), len(g)) > MAX_CHARS:
        right = None if len(p) > MAX_CHARS else False
    elif bare_letters:  # no options, or options that lie in the image
        right = same_answer(p, g, say)
    else:
        right = same_option(p, g, options, say)
    return bool(right), "unparsable" if right is None else "ok" if right else "wrong"


def verdict(pred: str, gold: str, choices: list[str] | None = None) -> tuple[bool, str]:
    """judge() with a limit on the length and a cache. It never raises."""
    if (
        not isinstance(pred, str)
        or not isinstance(gold, str)
        or max(len(pred), len(gold)) > LONGEST
    ):
        return False, "unparsable"
    return cached_verdict(pred, gold, tuple(choices) if choices else None)


@lru_cache(maxsize=50_000)
def cached_verdict(pred: str, gold: str, choices: tuple[str, ...] | None) -> tuple[bool, str]:
    try:
        return judge(pred, gold, choices)
    except Exception as e:  # a bug of ours must not stop a training run; stats() shows it
        _counts["crashes"] += 1
        _counts[f"crash {type(e).__name__}"] += 1
        return False, "unparsable"


def is_equiv(pred: str, gold: str, choices: list[str] | None = None) -> bool:
    """Do two answers say the same? Never raises."""
    return verdict(pred, gold, choices)[0]


def stats() -> dict[str, int]:
    """Counts of our own faults since the import; the log of GRPO shows them beside the reward."""
    return {"crashes": 0, **_counts}


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "audit":
        print(f"this is now `python -m tools.agree {sys.argv[2]}`", file=sys.stderr)
        sys.exit(2)
    if len(sys.argv) < 3:
        sys.exit("usage: python reward.py PREDICTION GOLD [CHOICE ...]")
    right, why = judge(sys.argv[1], sys.argv[2], sys.argv[3:], say=print)
    print(f"verdict: {'equal' if right else 'not equal'} ({why})")


if __name__ == "__main__":
    main()
