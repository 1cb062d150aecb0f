"""reward.py: is an answer right? The hard formatting result reward of Vision-R1 (HFRRF, Sec. 3.4) and its parts.

  score(completion, gold)      -> reward 1.0 only if the format <think></think><answer></answer> AND the answer are right
  extract_answer(completion)   -> what stands in <answer>, or None if the format is wrong
  is_equiv(pred, gold)         -> do two answers say the same? To change the reward, edit `judge`.
  python reward.py "3\\sqrt{2}" "\\sqrt{18}"    explains a verdict       python reward.py audit samples.jsonl
Nothing a model wrote is evaluated as code: mathtext.py cleans the text, mathparse.py reads it with its own bounded parser,
mathequal.py compares the trees.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from typing import NamedTuple

from answers.equal import same, same_number
from answers.parse import Unparsable, number, parse
from answers.text import (
    PHRASE_LATEX,
    TEXT,
    braced,
    clean,
    clock,
    core_text,
    date,
    letter_text,
    letters,
    number_words,
    same_clock,
    same_word_list,
    unwrap,
    words,
)

TIME_LIMIT, MEMORY_LIMIT = 5.0, 512 * 2**20  # seconds and bytes of a worker
SLOW_CHARS, LONGEST = 400, 4000  # what a worker judges, what is no answer
_counts, _cache, _lock = Counter(), OrderedDict(), threading.Lock()
_idle = []  # workers that wait for work


# ---- 1. format -------------------------------------------------------------------------------------------------------
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(completion):
    """Text of <answer> if the completion is exactly <think>...</think> <answer>...</answer>, else None (Sec. 3.4).

    White space may stand between the two and at the end, but not before <think>: the strict reading of the format.
    `Final Answer:` and an outer \\boxed{} are taken off; an empty answer is a wrong format. Linear in the length."""
    if not isinstance(completion, str) or not completion.startswith("<think>"):
        return None
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return None
    body = completion.rstrip()
    end, start = completion.find("</think>"), completion.find("<answer>")
    if not body.endswith("</answer>") or end > start or completion[end + 8 : start].strip():
        return None
    return unwrap(body[start + 8 : -9]) or None


def loose_answer(completion):
    """For the format + result reward of Vision-R1-Zero: the last <answer> block, else the last \\boxed{}, else None."""
    if not isinstance(completion, str):
        return None
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return unwrap(completion[start + 8 : end]) or None
    at = completion.rfind("\\boxed{")
    inner = braced(completion, at + 6) if at >= 0 else None
    return (inner[0].strip() or None) if inner else None


# ---- 2. the verdict --------------------------------------------------------------------------------------------------
_NUMERAL = re.compile(r"-?\d{1,300}(?:\.\d{1,99})?")
_COMMA = re.compile(r"^-?(?:\d+,(?!\d{3}$)|0,)\d+$")  # a decimal comma
_WORDY = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|[^\x00-\x7f]")
_NO_WORDS = re.compile(r"[\\^_*']|\d\s*-\s*\d|[\[(].*,.*[\])]")
_ORDER = re.compile(r"\d+(?:\s*-\s*\d+){2,}|[A-Z](?:\s*-\s*[A-Z]){2,}")
_YES_NO = re.compile(r"(yes|no|true|false)\b\s*[,.;:-]", re.I)  # "Yes, it is possible."


def judge(pred, gold, choices=None, log=None):
    """(right?, why) for two answers. The function to edit for another notion of "right". log collects steps in words."""
    say = log.append if log is not None else mute
    if (
        not isinstance(pred, str)
        or not isinstance(gold, str)
        or max(len(pred), len(gold)) > LONGEST
    ):
        return False, "unparsable"
    p, g = core_text(pred), core_text(gold)
    say(f"without wrappers: {p!r} and {g!r}")
    if not p or not g:
        return False, "wrong"
    if p == g:
        say("the same text")
        return True, "ok"
    options = [core_text(str(c)) for c in choices or []]
    if options and not all(letters(c) == {chr(65 + k)} for k, c in enumerate(options)):
        return judge_choice(p, g, options, say)
    return judge_text(p, g, say)


def mute(text):
    """Where nobody reads the steps."""


def said(ok):
    return bool(ok), "ok" if ok else "wrong"


def judge_choice(p, g, choices, say):
    """With options at hand: letter against letter, text against the letter's text."""

    def option(t):
        """(number of the option that a text names, what it says beside the letter), or None."""
        if t in choices:
            return choices.index(t), ""
        named = letters(t)
        letter, text = (
            (min(named), "")
            if named and len(named) == 1
            else letter_text(t, strict=False) or ("", "")
        )
        k = ord(letter) - 65 if letter else -1
        return (k, text) if 0 <= k < len(choices) else None

    at_p, at_g = option(p), option(g)
    say(f"options: {choices}; the two name {at_p} and {at_g}")
    if at_p and at_p[1] and not judge_text(at_p[1], choices[at_p[0]], say)[0]:
        return False, "wrong"  # "B: 54" where B is 45
    if at_p and at_g:
        return said(at_p[0] == at_g[0] or choices[at_p[0]] == choices[at_g[0]])
    return judge_text(choices[at_p[0]] if at_p else p, choices[at_g[0]] if at_g else g, say)


def judge_text(p, g, say):
    """By kind, the simple ones first: numerals, letters, words, times, dates, orders; the rest is mathematics."""
    p, g = (TEXT.sub(r" \1 ", t).replace("~", " ").strip() if "\\" in t else t for t in (p, g))
    if _NUMERAL.fullmatch(p) and _NUMERAL.fullmatch(g):  # most answers
        return said(same_number(number(p), number(g)))
    out, p, g = judge_letters(p, g, say)
    if out:
        return out
    if _WORDY.search(p) or _WORDY.search(g):
        out, p, g = judge_words(p, g, say)
        if out:
            return out
    if (cp := clock(p)) and (cg := clock(g)):
        say(f"times of day: {cp} and {cg}")
        return said(same_clock(cp, cg))
    if (dp := date(p)) and (dg := date(g)):
        say(f"dates: {dp} and {dg}")
        return said(dp == dg)
    if _ORDER.fullmatch(p) and _ORDER.fullmatch(g):
        return said(
            re.findall(r"\w+", p) == re.findall(r"\w+", g)
        )  # 5-4-2-3-1 is an order, no difference
    return judge_math(number_words(p), number_words(g), say)


def judge_letters(p, g, say):
    """Choice letters without options at hand: (verdict, ...), or (None, the two texts without their letters)."""
    lp, lg, tp, tg = letters(p), letters(g), letter_text(p), letter_text(g)
    if (lp or tp) and (lg or tg):
        say(f"letters: {lp or tp} and {lg or tg}")
    if lp and lg and (lp == lg or (p + g).isupper()):
        return said(lp == lg), p, g
    if (tp and lg) or (lp and tg):
        return said(({tp[0]} if tp else lp) == (lg if tp else {tg[0]})), p, g
    if tp and tg:
        return said(tp[0] == tg[0] and judge_text(tp[1], tg[1], say)[0]), p, g
    return None, tp[1] if tp else p, tg[1] if tg else g  # "B. 54" against "54"


def judge_words(p, g, say):
    """Phrases, names, yes and no: (verdict, ...), or (None, the two texts; a phrase like "all real numbers" as LaTeX)."""
    both = _WORDY.search(p) and _WORDY.search(g)
    wp, wg = (words(p), words(g)) if both else ("", "")
    if (
        both
        and wp == wg
        and re.search("[a-z]{2}|[^\x00-\x7f]", wp)
        and not _NO_WORDS.search(p + " " + g)
    ):
        say("the same words")
        return said(True), p, g
    if {wp, wg} & {"yes", "no", "true", "false"}:
        first = _YES_NO.match(p)
        clear = first and not re.search(r"\b(?:or|maybe|not sure|yes|no)\b", wp[len(first[1]) :])
        return said(clear and first[1].lower() == wg), p, g
    phrases = [PHRASE_LATEX.get(words(t), t) if _WORDY.search(t) else t for t in (p, g)]
    if phrases != [p, g]:
        return None, *phrases
    prose = all(re.fullmatch("[a-z ]{2,}", w) for w in (wp, wg))
    if (
        prose
        and not clock(p)
        and not all(re.search("[xyz]", w) and max(map(len, w.split())) < 4 for w in (wp, wg))
    ):
        return said(wp == wg or same_word_list(p, g)), p, g  # words are no products: act is not cat
    return None, p, g


def judge_math(p, g, say):
    """Trees by mathparse; what is no mathematics on both sides may still be the same list of names, or the same text."""
    trees = [read(t, say) for t in (p, g)]
    if None in trees:
        squeezed = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", clean(t)) for t in (p, g)]
        ok = same_word_list(p, g) or squeezed[0] == squeezed[1]
        return ok, "ok" if ok else "unparsable" if trees[0] is None and trees[
            1
        ] is not None else "wrong"
    ok = agree(trees, say)
    if not ok and "," in p + g:  # 1,22 may be 1.22, and (1,234) a point
        p, g = (
            _COMMA.sub(lambda m: m[0].replace(",", "."), t) if "." in o and "," not in o else t
            for t, o in ((p, g), (g, p))
        )
        point = [t.lstrip("\\left ")[:1] in "([{" and "," in p and "," in g for t in (p, g)]
        ok = agree([read(t, say, thousands=not pt) for t, pt in zip((p, g), point)], say)
    return said(ok)


def read(text, say, thousands=True):
    try:
        tree = parse(clean(text), thousands)
    except Unparsable as e:
        return say(f"{text[:80]!r} is no mathematics: {e}")
    if say is not mute:
        say(f"{text[:80]!r} reads {show(tree)}")
    return tree


def show(node):
    """A tree as text for people."""
    tag, data, kids = node
    if not kids:
        return str(data[0] if tag == "n" else data)
    inside = [show(k) for k in kids]
    if tag in ("+", "*", "/", "^", "ratio", "set"):
        return "(" + f" {data or tag} ".join(inside) + ")"
    if tag == "q":
        inside.append(" ".join(f"{name}^{p}" for name, p in data[1]))
    if tag == "rel":
        inside = [x for pair in zip(inside, data + ("",)) for x in pair]
    return (
        (data if tag == "f" else "" if tag in ("q", "rel") else tag) + "(" + " ".join(inside) + ")"
    )


def agree(trees, say):
    try:
        return None not in trees and same(*trees)
    except (
        ArithmeticError,
        ValueError,
        TypeError,
    ) as e:  # 1/0, a number beyond the limits, an interval in a sum
        say(f"no value: {e}")
        return False


def is_equiv(pred, gold, choices=None):
    """Do two answers say the same? Never raises; bounded by construction (mathparse), so it may run in-process."""
    return verdict(pred, gold, tuple(choices) if choices else None)[0]


def verdict(pred, gold, choices=None):
    """judge() behind a cache of (answer, gold, options), with every exception counted instead of raised."""
    key = (pred, gold, choices)
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    try:
        out = judge(pred, gold, choices)
    except (
        Exception,
        RecursionError,
    ) as e:  # a bug of ours must not stop a training run; stats() shows it
        _counts["crashes"] += 1
        _counts[f"crash {type(e).__name__}"] += 1
        out = (False, "unparsable")
    remember(key, out)
    return out


def remember(key, out):
    with _lock:
        if isinstance(key[0], str) and len(key[0]) + len(key[1]) < LONGEST:
            _cache[key] = out
        if len(_cache) > 50_000:
            _cache.popitem(last=False)


# ---- 3. rewards ------------------------------------------------------------------------------------------------------
class Score(NamedTuple):
    reward: float
    why: str  # ok, format, truncated, wrong, unparsable, timeout
    format_ok: bool
    correct: bool
    answer: str | None


def prepare(completion, truncated, format_weight):
    """(answer to judge or None, is the format right)."""
    answer = None if truncated else extract_answer(completion)
    return (
        (answer, True)
        if answer is not None
        else (loose_answer(completion) if format_weight and not truncated else None, False)
    )


def settle(answer, format_ok, truncated, out, format_weight):
    """Score from the parts. format_weight 0: HFRRF (Sec. 3.4). w > 0: (w * format + result) / (1 + w), so 1 is the 1:1 of
    Vision-R1-Zero on a scale from 0 to 1."""
    correct, why = out
    good = (
        (format_weight * format_ok + correct) / (1 + format_weight)
        if format_weight
        else float(format_ok and correct)
    )
    return Score(
        good,
        "truncated" if truncated else why if format_ok else "format",
        format_ok,
        correct,
        answer,
    )


def score(completion, gold, choices=None, truncated=False, format_weight=0.0):
    """Reward of one completion and why. truncated: the rollout hit its length limit, so that no answer was closed."""
    answer, format_ok = prepare(completion, truncated, format_weight)
    out = (
        verdict(answer, str(gold), tuple(choices) if choices else None)
        if answer is not None
        else (False, "format")
    )
    return settle(answer, format_ok, truncated, out, format_weight)


def reward(completion, gold, **kw):
    """score(...).reward"""
    return score(completion, gold, **kw).reward


def reward_batch(completions, golds, choices=None, truncated=None, format_weight=0.0, workers=0):
    """Scores of many completions. workers=0 judges in-process and lends only what may be slow to a worker process;
    workers=n lends everything that is not cached to n of them. A timeout costs that answer its reward and is counted."""
    n = len(completions)
    if (
        len(golds) != n
        or (choices is not None and len(choices) != n)
        or (truncated is not None and len(truncated) != n)
    ):
        raise ValueError(
            f"reward_batch: {n} completions but {len(golds)} golds (choices and truncated must have as many, too)"
        )
    truncated = truncated or [False] * n
    parts, out, slow = [], {}, {}
    for i in range(n):
        ch = tuple(choices[i]) if choices and choices[i] else None
        answer, ok = prepare(completions[i], truncated[i], format_weight)
        key = None if answer is None else (answer, str(golds[i]), ch)
        parts.append((answer, ok, key))
        if key is None or key in out or key in slow:
            continue
        if key in _cache or not (workers or len(key[0]) + len(key[1]) > SLOW_CHARS):
            out[key] = verdict(*key)
        else:
            slow[key] = None
    out.update(lend(list(slow), max(1, workers)) if slow else {})
    verdicts = [out[key] if key else (False, "format") for _, _, key in parts]
    return [
        settle(a, ok, t, v, format_weight) for (a, ok, _), t, v in zip(parts, truncated, verdicts)
    ]


def stats():
    """Counts since the import: timeouts, crashes, worker restarts. Log it beside the reward."""
    return {"timeouts": 0, "crashes": 0, "restarts": 0, **_counts}


# ---- 4. workers: plain subprocesses with a wall-clock and a memory limit -----------------------------------------------
class Worker:
    """`python reward.py --worker`: JSON lines in and out. Started by exec, so it inherits neither threads nor process
    groups and never imports the caller; it ends when its pipe closes or its own alarm rings."""

    def __init__(self):
        pipe = subprocess.PIPE
        command = [sys.executable, "-E", os.path.abspath(__file__), "--worker"]
        self.proc = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        if select.select([self.proc.stdout], [], [], 60)[
            0
        ]:  # a slow start on a busy machine is not a slow answer
            self.proc.stdout.readline()

    def ask(self, key, limit):
        """(right?, why), or None if the worker died or was too slow."""
        try:
            self.proc.stdin.write((json.dumps(key) + "\n").encode())
            self.proc.stdin.flush()
            ready, _, _ = select.select([self.proc.stdout], [], [], limit)
            line = self.proc.stdout.readline() if ready else b""
            return tuple(json.loads(line)) if line else None
        except (OSError, ValueError):
            return None

    def stop(self):
        self.proc.kill()
        self.proc.communicate()  # closes the pipes


def lend(keys, workers):
    """Judges keys in worker processes -> {key: verdict}; one thread per worker."""
    todo, out = list(reversed(keys)), {}

    def run():
        worker = None
        while todo:
            with _lock:
                key = todo.pop() if todo else None
                worker = worker or (_idle.pop() if _idle else None)
            if key is None:
                break
            worker = worker or Worker()
            begun = time.monotonic()  # after its start
            got = worker.ask(
                tuple(x[: LONGEST + 1] if isinstance(x, str) else x for x in key), TIME_LIMIT
            )
            if got is None:  # replaced by the next need
                late = time.monotonic() - begun >= TIME_LIMIT
                with _lock:
                    _counts["timeouts" if late else "crashes"] += 1
                    _counts["restarts"] += 1
                worker.stop()
                worker = None
            else:
                remember(key, got)
            out[key] = got or (False, "timeout")
        if worker:
            with _lock:
                _idle.append(worker)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(keys)))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


@atexit.register
def close_workers():
    while _idle:
        _idle.pop().stop()


def serve():
    """The worker's loop. The alarm kills it (default action) even if the parent is gone while it works."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(TIME_LIMIT) + 1)
        pred, gold, choices = json.loads(line)
        print(json.dumps(verdict(pred, gold, tuple(choices) if choices else None)), flush=True)
        signal.alarm(0)


# ---- 5. command line -------------------------------------------------------------------------------------------------
def audit_official(rows):
    """Released answers with a benchmark's own verdict (gt_answer, correct): agreement, and every disagreement."""
    given = [str(r.get("prediction", r.get("extracted"))) for r in rows]
    mine = [is_equiv(text, r["gt_answer"], r.get("choices")) for text, r in zip(given, rows)]
    differ = [(text, r) for text, r, verdict in zip(given, rows, mine) if verdict != r["correct"]]
    print(
        f"{len(rows)} answers, {1 - len(differ) / len(rows):.2%} judged as officially; the others:"
    )
    for text, r in differ:
        print(
            f"  {r['item_id']}: {text!r} against {r['gt_answer']!r}, officially {'right' if r['correct'] else 'wrong'}"
        )


def audit(path):
    """Re-scores a samples file; prints the shares of the reasons and the cases that a person should look at."""
    with open(path, encoding="utf-8") as f:
        samples = [json.loads(line) for line in f if line.strip()]
    if samples and "gt_answer" in samples[0]:
        return audit_official(samples)
    cut = [s.get("why") == "truncated" or bool(s.get("truncated")) for s in samples]
    new = [
        score(s.get("completion") or "", str(s.get("answer")), s.get("choices"), t)
        for s, t in zip(samples, cut)
    ]
    print(
        f"{len(samples)} samples, mean reward {sum(r.reward for r in new) / max(1, len(new)):.3f}"
    )
    for why, k in Counter(r.why for r in new).most_common():
        print(f"  {why:10s} {k:6d}  {k / len(new):6.1%}")
    pairs = list(zip(samples, new))
    look = [
        (f"reward was {s['reward']}", s, r)
        for s, r in pairs
        if abs(s.get("reward", r.reward) - r.reward) > 1e-6
    ]
    look += [(r.why, s, r) for s, r in pairs if r.why in ("unparsable", "timeout")]
    far = [
        (s, r) for s, r in pairs if r.correct and len(r.answer) > 3 * len(str(s.get("answer"))) + 20
    ]
    look += [("right but far from the gold's text", s, r) for s, r in far]
    print(f"{len(look)} to look at" + (", the first 40:" if len(look) > 40 else ":"))
    for why, s, r in look[:40]:
        print(f"  [{why}] {r.answer!r} against {s.get('answer')!r} -> {r.why}")


def main():
    if sys.argv[1:] == ["--worker"]:
        return serve()
    if len(sys.argv) == 3 and sys.argv[1] == "audit":
        return audit(sys.argv[2])
    if len(sys.argv) < 3:
        sys.exit(
            "usage: python reward.py PREDICTION GOLD [CHOICE ...]   or   python reward.py audit samples.jsonl"
        )
    log = []
    ok, why = judge(sys.argv[1], sys.argv[2], sys.argv[3:] or None, log)
    print("\n".join(log + [f"verdict: {'equal' if ok else 'not equal'} ({why})"]))


if __name__ == "__main__":
    main()
