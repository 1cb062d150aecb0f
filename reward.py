"""reward.py: is an answer right? The hard formatting result reward of Vision-R1 (HFRRF, Sec. 3.4) and its parts.

  score(completion, gold)      -> reward 1.0 only if the format <think></think><answer></answer> AND the answer are right
  extract_answer(completion)   -> what stands in <answer>, or None if the format is wrong
  is_equiv(pred, gold)         -> do two answers say the same? To change the reward, edit `judge`.
  python reward.py "3\\sqrt{2}" "\\sqrt{18}"    explains a verdict       python reward.py audit samples.jsonl
Nothing a model wrote is evaluated as code: mathparse.py reads it with its own bounded parser and compares numbers.
"""
import atexit, json, os, re, select, subprocess, sys, threading, time
from collections import Counter, OrderedDict
from typing import NamedTuple

import mathparse as mp
from mathparse import PHRASE, Unparsable, clean, clock, date, number_words, parse, same, same_word_list, words

TIME_LIMIT, MEMORY_LIMIT, SLOW_CHARS, LONGEST = 5.0, 512 * 2**20, 400, 4000  # seconds and bytes of a worker, what goes to one, what is no answer
_counts, _cache, _lock = Counter(), OrderedDict(), threading.Lock()
_idle = []  # workers that wait for work


# ---- 1. format -------------------------------------------------------------------------------------------------------
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FINAL = re.compile(r"[\s*]*final\s+answer[\s*]*[:：][\s*]*", re.I)


def extract_answer(completion):
    """Text of <answer> if the completion is exactly <think>...</think> <answer>...</answer>, else None (Sec. 3.4).

    White space may stand between the two and at the end. `Final Answer:` and an outer \\boxed{} are taken off; an empty
    answer is a wrong format. Counting and finding only: linear in the length."""
    if not isinstance(completion, str) or not completion.startswith("<think>") or any(completion.count(t) != 1 for t in _TAGS):
        return None
    body = completion.rstrip()
    end, start = completion.find("</think>"), completion.find("<answer>")
    if not body.endswith("</answer>") or end > start or completion[end + 8:start].strip():
        return None
    return unwrap(body[start + 8:-9]) or None


def unwrap(text):
    """Takes off `Final Answer:`, bold stars, and one or more \\boxed{} around the whole."""
    text = text.strip()
    for _ in range(4):
        if m := _FINAL.match(text[:80]):
            text = text[m.end():].strip()
            text = text[:-2].strip() if text.endswith("**") and text.count("**") % 2 else text
        core = text.strip("$ \n.").removeprefix("\\(").removeprefix("\\[").removesuffix("\\)").removesuffix("\\]").strip()
        core = core[2:-2].strip() if core.startswith("**") and core.endswith("**") and len(core) > 4 else core
        if not core.startswith(("\\boxed", "\\fbox")) or (inner := braced(core, core.find("{"))) is None or inner[1] != len(core):
            break
        text = inner[0].strip()
    return text


def braced(text, start):
    """(content, end) of the balanced {...} that opens at `start`, else None. Linear."""
    if start < 0 or text[start:start + 1] != "{":
        return None
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return text[start + 1:m.start()], m.end()
    return None


def loose_answer(completion):
    """For the format + result reward of Vision-R1-Zero: the last <answer> block, else the last \\boxed{}, else None."""
    if not isinstance(completion, str):
        return None
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return unwrap(completion[start + 8:end]) or None
    at = completion.rfind("\\boxed{")
    inner = braced(completion, at + 6) if at >= 0 else None
    return (inner[0].strip() or None) if inner else None


# ---- 2. text: what surrounds an answer, choice letters ----------------------------------------------------------------
_PREFIX = re.compile("|".join([  # what may stand before an answer
    r"(?:so|thus|hence|therefore|\\therefore)\b[,:]?\s+", r"≈\s*|\\approx\s*|#+\s*|\*\*final answer\*\*:?\s*",
    r"(?:the\s+)?(?:final\s+|correct\s+|best\s+)?(?:answer|result|solution)\s*(?:(?:is|:|=|are)\s*:?\s*|(?=[$\\\d]))",
    r"(?:[A-Za-z]+\s+){0,8}?(?:is|equals)\s+(?:equal\s+to\s+)?(?:about\s+|approximately\s+)?(?=[-\d$\\(.])",
    r"(?:approximately|approx\.?|about|around|roughly|约|大约)\s*(?=[\d\\$.-])", r"(?:正确)?(?:答案|结果)(?:是|为|:)*\s*", r"故?应?选择?(?:项)?:?\s*(?=\(?[A-J])"]), re.I)
_LETTER = re.compile(r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|选项)\s*(?:is|:)?\s*)?[\[({]?\s*([A-Ja-j])\s*[\])}]?\s*[.:,]?$", re.I)
_LETTER_TEXT = re.compile(r"(?:(?:option|choice)\s*)?(?:[\[(]([A-J])[\])]\s*[:.]?|([A-J])\s*[).:、]\s+|([A-J])\s*[).:、](?=\S)|([A-J])\s+(?=\())\s*(.+)$", re.S)
_LETTERS = re.compile(r"(?:\([A-J]\)|[A-J])(?:\s*(?:,|;|and|&)?\s*(?:\([A-J]\)|[A-J]))+$")
_NO_WORDS, _ORDER = re.compile(r"[\\^_*']|\d\s*-\s*\d|[\[(].*,.*[\])]"), re.compile(r"\d+(?:\s*-\s*\d+){2,}|[A-Z](?:\s*-\s*[A-Z]){2,}")
_COMMA = re.compile(r"^-?(?:\d+,(?!\d{3}$)|0,)\d+$")  # a decimal comma
_NUMERAL, _WORDY = re.compile(r"-?\d{1,300}(?:\.\d{1,99})?"), re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|[^\x00-\x7f]")


def core_text(s):
    """An answer without what surrounds it: `The answer is`, stars, dollars' outer boxes, a full stop."""
    s = s.partition("I hope it is correct")[0]
    s = unwrap(bare(s))
    s = s if s.isascii() else mp.unicode_plain(re.sub(r"(?<![A-Za-z])([A-J])、(?![A-J]\b)", r"\1: ", s))
    for _ in range(4):
        m = _PREFIX.match(s[:200])
        if not m or not m[0] or re.search(r"\b(?:not|no|if|or|never)\b", m[0]):
            break
        s = unwrap(bare(s[m.end():]))
    if s.count("\\boxed{") == 1 and not re.search(r"\b(?:or|not)\b", s) and (inner := braced(s, s.find("\\boxed{") + 6)):
        s = inner[0].strip()  # a sentence with one box in it
    return bare(s[:-1].rstrip() if s[-1:] == "." and len(s) > 1 else s)


def bare(s):
    """Without one pair of $...$, \\(...\\) or \\[...\\] around the whole."""
    s = s.strip()
    if s[:1] == "$" == s[-1:] and s.strip("$").count("$") == 0:
        return s.strip("$").strip()
    return s[2:-2].strip() if s[:2] + s[-2:] in ("\\(\\)", "\\[\\]") and s.count(s[:2]) == 1 else s


def letters(t):
    """The set of choice letters that a text consists of, else None: B, (B), B., "A and C", "C\\nD"."""
    if m := _LETTER.match(t):
        return {m[1].upper()}
    listed = len(t) < 60 and not t.isalpha() and _LETTERS.match(t)
    glued = 1 < len(t) < 5 and re.fullmatch("[A-E]+", t) and list(t) == sorted(set(t))  # BD
    return set(re.findall("[A-J]", t)) if listed or glued else None


def letter_text(t, strict=True):
    """("B", "54") for `B: 54`, `(B) 54`, `B. 54`, `B (54)`; None for other texts and for lists of options."""
    m = _LETTER_TEXT.match(t)
    if not m or strict and re.search(r"(?:^|\s)\(?[A-J](?:[).:]|$)|\b(?:or|not)\b", m[5]):
        return None
    text = m[5].strip()
    return (m[1] or m[2] or m[3] or m[4]), (text[1:-1] if m[4] and text.endswith(")") else text)


# ---- 3. the verdict --------------------------------------------------------------------------------------------------
def judge(pred, gold, choices=None, log=None):
    """(right?, why) for two answers. The function to edit for another notion of "right". log collects steps in words."""
    say = log.append if log is not None else mute
    if not isinstance(pred, str) or not isinstance(gold, str) or max(len(pred), len(gold)) > LONGEST:
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
    def index(t):
        if t in choices:
            return choices.index(t), ""
        if (ls := letters(t)) and len(ls) == 1:
            return (k, "") if (k := ord(min(ls)) - 65) < len(choices) else None
        lt = letter_text(t, strict=False)
        return (ord(lt[0]) - 65, lt[1]) if lt and ord(lt[0]) - 65 < len(choices) else None
    ip, ig = index(p), index(g)
    say(f"options: {choices}; the two name {ip} and {ig}")
    if ip and ip[1] and not judge_text(ip[1], choices[ip[0]], say)[0]:
        return False, "wrong"  # "B: 54" where B is 45
    if ip and ig:
        return said(ip[0] == ig[0] or choices[ip[0]] == choices[ig[0]])
    return judge_text(choices[ip[0]] if ip else p, choices[ig[0]] if ig else g, say)


def judge_text(p, g, say):
    """By kind, the simple ones first: numerals, letters, words, yes and no, times, dates; the rest is mathematics."""
    p, g = (mp.TEXT.sub(r" \1 ", t).replace("~", " ").strip() if "\\" in t else t for t in (p, g))
    if _NUMERAL.fullmatch(p) and _NUMERAL.fullmatch(g):  # most answers
        return said(mp.same_number(mp.number(p), mp.number(g)))
    out, p, g = judge_letters(p, g, say)
    if out:
        return out
    wp, wg = (words(p), words(g)) if _WORDY.search(p) and _WORDY.search(g) else ("", "")
    if wp and wp == wg and re.search("[a-z]{2}|[^\x00-\x7f]", wp) and not _NO_WORDS.search(p + " " + g):
        say("the same words")
        return True, "ok"
    if {wp, wg} & {"yes", "no", "true", "false"}:
        first = re.match(r"(yes|no|true|false)\b\s*[,.;:-]", p, re.I)  # "Yes, it is possible."
        return said(first and first[1].lower() == wg and not re.search(r"\b(?:or|maybe|not sure|yes|no)\b", wp[len(first[1]):]))
    for read in (clock, date):
        if (rp := read(p)) and (rg := read(g)):
            say(f"{read.__name__}: {rp} and {rg}")
            return said(rp == rg or (read is clock and mp.same_hour(p, g, rp, rg)))
    if {words(t) for t in (p, g) if _WORDY.search(t)} & set(PHRASE):  # all real numbers
        p, g = (PHRASE.get(words(t), t) for t in (p, g))
    elif all(re.fullmatch("[a-z ]{2,}", w) for w in (wp, wg)) and not all(re.search("[xyz]", w) and max(map(len, w.split())) < 4 for w in (wp, wg)):
        return said(wp == wg or same_word_list(p, g))  # words are no products: act is not cat
    if all(_ORDER.fullmatch(t) for t in (p, g)):
        return said(re.findall(r"\w+", p) == re.findall(r"\w+", g))  # 5-4-2-3-1 is an order, no difference
    return judge_math(number_words(p), number_words(g), say)


def judge_letters(p, g, say):
    """Choice letters without options at hand: (verdict, ...), or (None, the two texts without their letters)."""
    lp, lg, tp, tg = letters(p), letters(g), letter_text(p), letter_text(g)
    say(f"letters: {lp or tp} and {lg or tg}") if (lp or tp) and (lg or tg) else None
    if lp and lg and (lp == lg or (p + g).isupper()):
        return said(lp == lg), p, g
    if (tp and lg) or (lp and tg):
        return said(({tp[0]} if tp else lp) == (lg if tp else {tg[0]})), p, g
    if tp and tg:
        return said(tp[0] == tg[0] and judge_text(tp[1], tg[1], say)[0]), p, g
    return None, tp[1] if tp else p, tg[1] if tg else g  # "B. 54" against "54"


def judge_math(p, g, say):
    """Trees by mathparse; what is no mathematics on both sides may still be the same list of names, or the same text."""
    trees = [read(t, say) for t in (p, g)]
    if None in trees:
        squeeze = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", clean(t)) for t in (p, g)]
        ok = same_word_list(p, g) or squeeze[0] == squeeze[1]
        return ok, "ok" if ok else "unparsable" if trees[0] is None and trees[1] is not None else "wrong"
    ok = agree(trees, say)
    if not ok and "," in p + g:  # 1,22 may be 1.22, and (1,234) a point
        p, g = (_COMMA.sub(lambda m: m[0].replace(",", "."), t) if "." in o and "," not in o else t for t, o in ((p, g), (g, p)))
        ok = agree([read(t, say, t.lstrip("\\left ")[:1] not in "([{" or "," not in p or "," not in g) for t in (p, g)], say)
    return said(ok)


def read(text, say, thousands=True):
    try:
        tree = parse(clean(text), thousands)
    except Unparsable as e:
        return say(f"{text[:80]!r} is no mathematics: {e}")
    if say is not mute:
        say(f"{text[:80]!r} reads {mp.show(tree)}")
    return tree


def agree(trees, say):
    try:
        return None not in trees and same(*trees)
    except (ArithmeticError, ValueError, TypeError) as e:  # 1/0, a number beyond the limits, an interval in a sum
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
    except (Exception, RecursionError) as e:  # a bug of ours must not stop a training run; stats() shows it
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


# ---- 4. rewards ------------------------------------------------------------------------------------------------------
class Score(NamedTuple):
    reward: float
    why: str  # ok, format, truncated, wrong, unparsable, timeout
    format_ok: bool
    correct: bool
    answer: str | None


def prepare(completion, truncated, format_weight):
    """(answer to judge or None, is the format right)."""
    answer = None if truncated else extract_answer(completion)
    return (answer, True) if answer is not None else (loose_answer(completion) if format_weight else None, False)


def settle(answer, format_ok, truncated, out, format_weight):
    """Score from the parts. format_weight 0: HFRRF (Sec. 3.4). w > 0: (w * format + result) / (1 + w), so 1 is the 1:1 of
    Vision-R1-Zero on a scale from 0 to 1."""
    correct, why = out
    good = (format_weight * format_ok + correct) / (1 + format_weight) if format_weight else float(format_ok and correct)
    return Score(good, "truncated" if truncated else why if format_ok else "format", format_ok, correct, answer)


def score(completion, gold, choices=None, truncated=False, format_weight=0.0):
    """Reward of one completion and why. truncated: the rollout hit its length limit, so that no answer was closed."""
    answer, format_ok = prepare(completion, truncated, format_weight)
    out = verdict(answer, str(gold), tuple(choices) if choices else None) if answer is not None else (False, "format")
    return settle(answer, format_ok, truncated, out, format_weight)


def reward(completion, gold, **kw):
    """score(...).reward"""
    return score(completion, gold, **kw).reward


def reward_batch(completions, golds, choices=None, truncated=None, format_weight=0.0, workers=0):
    """Scores of many completions. workers=0 judges in-process and lends only what may be slow to a worker process;
    workers=n lends everything that is not cached to n of them. A timeout costs that answer its reward and is counted."""
    n = len(completions)
    if len(golds) != n or (choices is not None and len(choices) != n) or (truncated is not None and len(truncated) != n):
        raise ValueError(f"reward_batch: {n} completions but {len(golds)} golds (choices and truncated must have as many, too)")
    parts, out, slow = [], {}, {}
    for i in range(n):
        ch = tuple(choices[i]) if choices and choices[i] else None
        answer, ok = prepare(completions[i], bool(truncated and truncated[i]), format_weight)
        key = None if answer is None else (answer, str(golds[i]), ch)
        parts.append((answer, ok, key))
        if key is None or key in out or key in slow:
            continue
        if key in _cache or not (workers or len(key[0]) + len(key[1]) > SLOW_CHARS):
            out[key] = verdict(*key)
        else:
            slow[key] = None
    out.update(lend(list(slow), max(1, workers)) if slow else {})
    return [settle(a, ok, bool(truncated and truncated[i]), out[k] if k else (False, "format"), format_weight) for i, (a, ok, k) in enumerate(parts)]


def stats():
    """Counts since the import: timeouts, crashes, worker restarts. Log it beside the reward."""
    return {"timeouts": 0, "crashes": 0, "restarts": 0, **_counts}


# ---- 5. workers: plain subprocesses with a wall-clock and a memory limit -----------------------------------------------
class Worker:
    """`python reward.py --worker`: JSON lines in and out. Started by exec, so it inherits neither threads nor process
    groups and never imports the caller; it ends when its pipe closes or its own alarm rings."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.proc = subprocess.Popen([sys.executable, "-E", os.path.abspath(__file__), "--worker"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

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
            begun = time.monotonic()
            got = worker.ask(tuple(x[:LONGEST + 1] if isinstance(x, str) else x for x in key), TIME_LIMIT)
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
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for line in sys.stdin:
        signal.alarm(int(TIME_LIMIT) + 1)
        pred, gold, choices = json.loads(line)
        print(json.dumps(verdict(pred, gold, tuple(choices) if choices else None)), flush=True)
        signal.alarm(0)


# ---- 6. command line -------------------------------------------------------------------------------------------------
def audit(path):
    """Re-scores a samples file; prints the shares of the reasons and the cases that a person should look at."""
    with open(path, encoding="utf-8") as f:
        samples = [json.loads(line) for line in f if line.strip()]
    new = [score(s.get("completion") or "", str(s.get("answer")), s.get("choices"), s.get("why") == "truncated" or bool(s.get("truncated"))) for s in samples]
    print(f"{len(samples)} samples, mean reward {sum(r.reward for r in new) / max(1, len(new)):.3f}")
    for why, k in Counter(r.why for r in new).most_common():
        print(f"  {why:10s} {k:6d}  {k / len(new):6.1%}")
    look = [("reward was %s" % s["reward"], s, r) for s, r in zip(samples, new) if "reward" in s and abs(s["reward"] - r.reward) > 1e-6]
    look += [(r.why, s, r) for s, r in zip(samples, new) if r.why in ("unparsable", "timeout")]
    look += [("right but far from the gold's text", s, r) for s, r in zip(samples, new) if r.correct and len(r.answer) > 3 * len(str(s.get("answer"))) + 20]
    print(f"{len(look)} to look at" + (", the first 40:" if len(look) > 40 else ":"))
    for why, s, r in look[:40]:
        print(f"  [{why}] {r.answer!r} against {s.get('answer')!r} -> {r.why}")


def main():
    if sys.argv[1:] == ["--worker"]:
        return serve()
    if len(sys.argv) == 3 and sys.argv[1] == "audit":
        return audit(sys.argv[2])
    if len(sys.argv) < 3:
        sys.exit('usage: python reward.py PREDICTION GOLD [CHOICE ...]   or   python reward.py audit samples.jsonl')
    log = []
    ok, why = judge(sys.argv[1], sys.argv[2], sys.argv[3:] or None, log)
    print("\n".join(log + [f"verdict: {'equal' if ok else 'not equal'} ({why})"]))


if __name__ == "__main__":
    main()
