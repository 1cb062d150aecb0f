"""reward.py: is an answer right? The hard formatting result reward of Vision-R1 (HFRRF, Sec. 3.4) and its parts.

  score(completion, gold)      -> reward 1.0 only if the format <think></think><answer></answer> AND the answer are right
  extract_answer(completion)   -> what stands in <answer>, or None if the format is wrong
  is_equiv(pred, gold)         -> do two answers say the same? To change the reward, edit `judge`.
  python reward.py "3\\sqrt{2}" "\\sqrt{18}"    explains a verdict       python reward.py audit samples.jsonl
Nothing a model wrote is evaluated as code: mathparse.py reads it with its own bounded parser and compares numbers.
"""
import atexit, json, os, re, select, subprocess, sys, threading, time
from collections import Counter, OrderedDict
from fractions import Fraction
from typing import NamedTuple

import mathparse as mp
from mathparse import DEGREE, PERCENT, Unparsable, clean, contains, parse, value, variables

TIME_LIMIT, MEMORY_LIMIT, SLOW_CHARS = 5.0, 512 * 2**20, 400  # seconds and bytes per worker; longer answers go to a worker
_counts, _lock = Counter(), threading.Lock()


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
    if (m := _FINAL.match(text[:80])):
        text = text[m.end():].strip()
        text = text[:-2].strip() if text.endswith("**") and text.count("**") % 2 else text
    for _ in range(4):
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


# ---- 2. text: letters, words, times, dates -----------------------------------------------------------------------------
_PREFIX = re.compile(r"(?:(?:so|thus|hence|therefore|\\therefore)\b[,:]?\s*)?(?:(?:the\s+)?(?:final\s+|correct\s+|best\s+)?(?:answer|result|solution)\s*(?:is|:|=|are)\s*:?\s*"
                     r"|(?:正确)?(?:答案|结果)(?:是|为|:)*\s*|故?应?选择?(?:项)?:?\s*(?=\(?[A-J])|(?:approximately|approx\.?|about|around|roughly|约|大约)\s*(?=[\d\\$.-])|≈\s*|\\approx\s*)", re.I)
_LETTER = re.compile(r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|选项)\s*(?:is|:)?\s*)?[\[({]?\s*([A-Ja-j])\s*[\])}]?\s*[.:,]?$", re.I)
_LETTER_TEXT = re.compile(r"(?:(?:option|choice)\s*)?(?:[\[(]([A-J])[\])]\s*[:.]?|([A-J])\s*[).:、]\s+|([A-J])\s*[).:、](?=\S)|([A-J])\s+(?=\())\s*(.+)$", re.S)
_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|and|&|\n|\s)?\s*\(?[A-J]\)?)+$")
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::\d\d)?\s*(?:([ap])\.?\s?m\.?|(o'?clock))?$", re.I)
_MONTHS = "january february march april may june july august september october november december".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_ABBREV = {d[:3]: d for d in _DAYS + _MONTHS} | {"tues": "tuesday", "thur": "thursday", "thurs": "thursday", "sept": "september", "&": "and"}
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_NUMBER = {w: i for i, w in enumerate(_ONES)} | {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_ORDINAL = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6,
            "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}
_HAN = dict(zip("零一二三四五六七八九十两", [*range(11), 2]))


def core_text(s):
    """An answer without what surrounds it: `The answer is`, stars, dollars' outer boxes, a full stop."""
    s = unwrap(s)
    for _ in range(3):
        m = _PREFIX.match(s[:200])
        if not m or not m[0]:
            break
        s = unwrap(s[m.end():])
    return s[:-1].rstrip() if s[-1:] in (".", "。") and len(s) > 1 else s


def letters(t):
    """The set of choice letters that a text consists of, else None: B, (B), B., "A and C", "C\\nD"."""
    if m := _LETTER.match(t):
        return {m[1].upper()}
    return set(re.findall("[A-J]", t)) if len(t) < 60 and _LETTERS.match(t) and not t.isalpha() or (1 < len(t) < 5 and re.fullmatch("[A-E]+", t) and list(t) == sorted(set(t))) else None


def letter_text(t):
    """("B", "54") for `B: 54`, `(B) 54`, `B. 54`, `B (54)`; None for other texts and for lists of options."""
    m = _LETTER_TEXT.match(t)
    if not m or re.search(r"(?:^|\s)\(?[A-J](?:[).:]|$)", m[5]) or re.search(r"\bor\b|\bnot\b", m[5]):
        return None
    text = m[5].strip()
    return (m[1] or m[2] or m[3] or m[4]), (text[1:-1] if m[4] and text.endswith(")") else text)


def number_words(t):
    """`twenty-one` -> 21, `three quarters` -> 3/4, `five apples` -> 5 apples; other texts unchanged."""
    if t in _HAN:
        return str(_HAN[t])
    words = re.split(r"[\s-]+", t.lower().strip())
    if not words or len(words) > 12 or (words[0] not in _NUMBER and words[0] not in ("a", "an", "half", "dozen")):
        return t
    total, part, k, seen = 0, 0, 0, False
    while k < len(words):
        w = words[k]
        if w in _NUMBER:
            part, seen = part + _NUMBER[w], True
        elif w in ("a", "an") and words[k + 1:k + 2] and words[k + 1] in {**_ORDINAL, **mp.SCALES, "dozen": 12}:
            part, seen = 1, True
        elif w == "hundred" and seen:
            part *= 100
        elif w == "dozen":
            part, seen = max(part, 1) * 12, True
        elif w in mp.SCALES and seen:
            total, part = total + part * mp.SCALES[w], 0
        elif not (w == "and" and seen and words[k + 1:k + 2] and words[k + 1] in _NUMBER):
            break
        k += 1
    if k < len(words) and words[k] in _ORDINAL and (seen or words[k] == "half"):
        return f"{total + part or 1}/{_ORDINAL[words[k]]} {' '.join(words[k + 1:])}".strip()
    return f"{total + part} {' '.join(words[k:])}".strip() if seen else t


def words(t):
    """Words without case, articles, punctuation: what names and phrases are compared by."""
    t = re.sub(r"\\[a-zA-Z]+|[{}$*_\"]", " ", t).lower().replace("&", " and ")
    t = re.sub(r"(?<=\w)'s\b|'", "", re.sub(r"(?<=[a-z])-(?=[a-z])", " ", t))
    t = re.sub(r"(?<=[a-z])\.(?=[a-z]\b)", "", t)  # p.m. -> pm.
    out = [w.strip(".,;:!?()[]") for w in t.split()]
    return " ".join(_ABBREV.get(w, str(_NUMBER.get(w, w))) for w in out if w and w not in ("a", "an", "the"))


def clock(t):
    """(minutes since midnight or noon, 0 am / 1 pm / None) of a time of day, else None."""
    m = _TIME.match(t.strip())
    if not m or not (m[2] or m[3] or m[4]) or int(m[1]) > 24 or int(m[2] or 0) > 59:
        return None
    half = None if not m[3] else int(m[3].lower() == "p")
    hour = int(m[1])
    if hour > 12 or (half is not None and hour <= 12):  # 14:10, 2:10 pm: 24-hour reading
        return (hour if hour > 12 else hour % 12 + 12 * half) * 60 + int(m[2] or 0), True
    return hour * 60 + int(m[2] or 0), False


def date(t):
    """(year, month, day) of a written date, missing parts 0; None if it is no date with a day and a month."""
    if m := re.fullmatch(r"(\d{4})[-/年.](\d{1,2})[-/月.](\d{1,2})日?", t):
        return int(m[1]), int(m[2]), int(m[3])
    if m := re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", t):
        return int(m[3]), int(m[1]), int(m[2])
    parts = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=\d)(st|nd|rd|th)\b|\bof\b|\bthe\b", "", t.lower()))
    months = [_MONTHS.index(_ABBREV.get(p, p)) + 1 for p in parts if _ABBREV.get(p, p) in _MONTHS]
    nums = [int(p) for p in parts if p.isdigit() and len(p) <= 4]
    if len(months) != 1 or len(parts) != 1 + len(nums) or not 1 <= len(nums) <= 2:
        return None
    day, year = ([n for n in nums if n <= 31] + [0])[0], ([n for n in nums if n > 31] + [0])[0]
    return (year, months[0], day) if day and len(nums) == (1 if not year else 2) else None


# ---- 3. comparing trees ----------------------------------------------------------------------------------------------
def close(x, y):
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-3)


def resolution(node):
    """Unit of the last written decimal place of a decimal (5.40, 1.5*10^3, 2.5 million), else None."""
    if node[0] == "n":
        return node[2]
    if node[0] == "*":
        ulps = [resolution(k) for k in node[1]]
        if sum(u is not None for u in ulps) == 1 and not variables(node):
            rest = [value(k) for k, u in zip(node[1], ulps) if u is None]
            if all(isinstance(r, (int, Fraction)) for r in rest):
                out = next(u for u in ulps if u is not None)
                for r in rest:
                    out *= abs(r)
                return out
    return None


def same_number(a, b):
    """Equal exactly (1e-9 for irrational numbers), or one is a decimal of at least 4 significant digits to which the
    other, more exact one rounds: 166.67 for 166.6667, 0.3333 for 1/3, but 0.33 is no third and 3.14 is not pi."""
    x, y = value(a), value(b)
    if isinstance(x, (int, Fraction)) and isinstance(y, (int, Fraction)):
        if x == y:
            return True
    elif close(x, y):
        return True
    if isinstance(x, complex) or isinstance(y, complex):
        return False
    u, v = resolution(a), resolution(b)
    if u is None and v is None or u == v:
        return False
    if u is None or (v is not None and v > u):
        x, y, u, v = y, x, v, u  # x is the coarser decimal, u its last place
    return abs(x) >= 1000 * u and abs(x - y) <= u / 2 * (1 + Fraction(1, 10**9) if isinstance(y, (int, Fraction)) else 1.000001)


def same_expr(a, b):
    """Numbers by same_number; expressions with variables by their values at points (mathparse.samples)."""
    if (inf := [n for n in (a, b) if contains(n, "c", "inf")]):
        return len(inf) == 2 and infinite(a) == infinite(b) != 0
    names = variables(a) | variables(b)
    if not names:
        return same_number(a, b)
    if len(names) > 12:
        return False
    seen = 0
    for x, y in mp.samples((a, b), names):
        if not close(x, y):
            return False
        seen += 1
    return seen >= 3


def infinite(node):
    """1 or -1 for plus or minus infinity written as such, else 0."""
    if node[0] == "*" and len(node[1]) == 2 and node[1][0] == ("n", -1, None):
        return -infinite(node[1][1])
    return int(node == ("c", "inf"))


def split_unit(node):
    """(number, unit or None); generic `units` say nothing."""
    if node[0] != "q":
        return node, None
    dims = tuple(d for d in node[2][1] if d[0] != "unit")
    return node[1], (node[2] if dims else None)


def same_quantity(a, b):
    """A unit in one of the two is no reason for wrong, a different unit is; 100 cm = 1 m, 50% = 0.5 = 50, 90 deg = pi/2."""
    (x, ua), (y, ub) = split_unit(a), split_unit(b)
    if ua == ub:
        return same_expr(x, y)
    if ua and ub:
        return ua[1] == ub[1] and same_expr(scaled(x, ua[0]), scaled(y, ub[0]))
    if ub:
        x, y, ua, ub = y, x, ub, ua
    if ua == PERCENT:
        return same_expr(x, y) or same_expr(scaled(x, Fraction(1, 100)), y)
    if ua == DEGREE and contains(y, "c", "pi"):
        return same_expr(("/", mp.times(x, ("c", "pi")), ("n", 180, None)), y)
    return same_expr(x, y)


def scaled(node, factor):
    return node if factor == 1 else ("*", (("n", mp.small(factor), None), node))


def unname(node):
    """`x = 5` -> ("x", 5), `f(x) = x+1` -> ("f", x+1), `x in S` -> ("x", S), others -> ("", node). In a chain of equal
    numbers any stands for all; 6 = 5 is no number, 10/3 ~ 3.33 is one if it rounds so."""
    if node[0] != "rel" or not set(node[2]) <= {"=", "~", "in"}:
        return "", node
    parts, ops, name = list(node[1]), list(node[2]), ""
    for end in (0, -1):
        p, rest = parts[end], parts[1:] if end == 0 else parts[:-1]
        head = p if p[0] == "v" else p[1][0] if p[0] == "*" and len(p[1]) == 2 and p[1][1][0] == "v" and p[1][0][0] == "v" and p[1][0][1][:1] in "fghpqyPFGRSVAC" else None
        if head and len(parts) > 1 and all(head[1] not in variables(r) for r in rest) and (end == 0 or len(parts) == 2) and (p[0] == "v" or p[1][1][1] in set().union(*map(variables, rest))):
            name = head[1]
            parts, ops = rest, ops[1:] if end == 0 else ops[:-1]
            break
    if "in" in ops or (not name and len(parts) == len(node[1]) and any(variables(p) for p in parts)):
        return "", node
    for p, q, op in zip(parts, parts[1:], ops):
        if not (same_quantity(p, q) or (op == "~" and rounds_to(p, q))):
            return "", node
    return name, parts[0]


def rounds_to(p, q):
    """Is q a decimal that p rounds to?"""
    p, q = split_unit(p)[0], split_unit(q)[0]
    u = resolution(q)
    return u is not None and abs(value(p) - value(q)) <= u / 2 * 1.000001


def several(node):
    """The members of a list, a set or a plus-minus, else None."""
    if node[0] == "seq" and node[1] in ("", "{"):
        out = [m for k in node[3] for m in (several(k) if contains(k, "pm") else None) or [k]]
        return out
    if contains(node, "pm") and node[0] in "+*/^fpmrelq":
        if node[0] == "rel":
            name, inner = (node[1][0], node[1][-1]) if node[2] == ("=",) else (None, None)
            return [("rel", (name, m), ("=",)) for m in several(inner) or []] if name else None
        if node[0] == "q":
            return [("q", m, node[2]) for m in several(node[1])]
        return [mp.choose_sign(node, 1), mp.choose_sign(node, -1)]
    return None


def matched(xs, ys):
    """The same members in any order."""
    ys = list(ys)
    for x in xs:
        k = next((k for k, y in enumerate(ys) if same(x, y)), None)
        if k is None:
            return False
        ys.pop(k)
    return not ys


def unique(xs):
    out = []
    for x in xs:
        if not any(same(x, y) for y in out):
            out.append(x)
    return out


_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def intervals(node):
    """A set of reals as a list of (low, closed, high, closed) sorted by low, else None."""
    inf, minus = ("c", "inf"), ("*", (("n", -1, None), ("c", "inf")))
    if node == ("w", "reals"):
        return [(minus, False, inf, False)]
    if node[0] == "seq" and node[1] and node[1] != "{" and len(node[3]) == 2:
        return [(node[3][0], node[1] == "[", node[3][1], node[2] == "]")]
    if node[0] == "seq" and node[1] == "" and node[4] == "or" or node[:2] == ("set", "\\cup"):
        parts = [intervals(k) for k in mp.kids(node)]
        return None if None in parts else sorted(sum(parts, []), key=lambda p: float("-inf") if infinite(p[0]) else value(p[0]))
    if node[0] == "rel" and node[2] == ("in",):
        return intervals(node[1][1])
    if node[:2] == ("set", "\\setminus") and node[2] == ("w", "reals") and node[3][0] == "seq" and len(node[3][3]) == 1:
        return [(minus, False, node[3][3][0], False), (node[3][3][0], False, inf, False)]
    if node[0] != "rel":
        return None
    at = [k for k, p in enumerate(node[1]) if p[0] == "v"]
    if len(at) != 1 or any(variables(p) for k, p in enumerate(node[1]) if k != at[0]):
        return None
    if node[2] == ("!=",):
        return [(minus, False, node[1][1 - at[0]], False), (node[1][1 - at[0]], False, inf, False)]
    if not set(node[2]) <= set(_FLIP) or len(node[2]) > 2 or (len(node[2]) == 2 and (at[0] != 1 or node[2][0][0] != node[2][1][0])):
        return None
    low, lc, high, hc = minus, False, inf, False
    for k, op in enumerate(node[2]):  # each operator bounds the variable from one side
        other = node[1][k] if at[0] == k + 1 else node[1][k + 1]
        op = _FLIP[op] if at[0] == k + 1 else op
        if op[0] == "<":
            high, hc = other, op == "<="
        else:
            low, lc = other, op == ">="
    return [(low, lc, high, hc)]


def same_relation(a, b):
    """Two equations or inequalities: left minus right agree up to a factor (a positive one for inequalities)."""
    if len(a[1]) != 2 or len(b[1]) != 2:
        return len(a[1]) == len(b[1]) and a[2] == b[2] and all(same(x, y) for x, y in zip(a[1], b[1]))
    (p, q), (r, s), opa, opb = a[1], b[1], a[2][0], b[2][0]
    if opa[0] == ">":
        p, q, opa = q, p, _FLIP[opa]
    if opb[0] == ">":
        r, s, opb = s, r, _FLIP[opb]
    if opa != opb or opa == "in":
        return False
    ratios = []
    for x, y in mp.samples((("+", (p, mp.negate(q))), ("+", (r, mp.negate(s)))), variables(a) | variables(b)):
        if (abs(x) < 1e-9) != (abs(y) < 1e-9):
            return False
        if abs(y) >= 1e-9:
            ratios.append(x / y)
    return len(ratios) >= 3 and all(close(r, ratios[0]) for r in ratios) and (opa in ("=", "~", "!=") or ratios[0] > 0)


def rows(node):
    """A matrix, or nested brackets, as a list of rows."""
    if node[0] == "mat":
        return [list(r) for r in node[1]]
    if node[0] == "seq" and node[1] in ("(", "[") and all(k[0] == "seq" and k[1] in ("(", "[") for k in node[3]) and node[3]:
        return [list(k[3]) for k in node[3]]
    return None


def same(a, b):
    """Do two trees mean the same answer?"""
    if a == b:
        return True
    (na, x), (nb, y) = unname(a), unname(b)
    if (na or nb) and not (x[0] == "rel" or y[0] == "rel"):
        if na and nb and na != nb and len(na) < 4 and len(nb) < 4:
            return a[0] == b[0] == "rel" and same_relation(a, b)
        return same(x, y) or (a[0] == b[0] == "rel" and same_relation(a, b))
    a, b = x, y
    if a[0] == b[0] == "ratio":
        return len(a[1]) == len(b[1]) and all(same_expr(mp.times(p, b[1][0]), mp.times(q, a[1][0])) for p, q in zip(a[1], b[1]))
    if "ratio" in (a[0], b[0]):
        r, o = (a, b) if a[0] == "ratio" else (b, a)
        return len(r[1]) == 2 and o[0] not in ("seq", "rel", "set", "mat") and same_quantity(("/", *r[1]), o)
    if a[0] == b[0] == "rel":
        (ia, ib) = intervals(a), intervals(b)
        if not (ia and ib):
            return same_relation(a, b)
    if rows(a) and rows(b) and (a[0] == "mat" or b[0] == "mat"):
        ra, rb = rows(a), rows(b)
        return len(ra) == len(rb) and all(len(p) == len(q) and all(map(same, p, q)) for p, q in zip(ra, rb))
    if "mat" in (a[0], b[0]):
        m, o = (a, b) if a[0] == "mat" else (b, a)
        flat = [k for r in m[1] for k in r]
        return o[0] == "seq" and o[1] == "(" and (len(m[1]) == 1 or all(len(r) == 1 for r in m[1])) and len(flat) == len(o[3]) and all(map(same, flat, o[3]))
    if {a[0], b[0]} & {"rel", "set", "w"} or (a[0] == b[0] == "seq" and a[1] and b[1] and len(a[3]) == 2 and a[1] + a[2] != b[1] + b[2]) or \
            (a[0] == b[0] == "seq" and "or" in (a[4], b[4])):
        ia, ib = intervals(a), intervals(b)
        if ia and ib:
            return len(ia) == len(ib) and all(p[1] == q[1] and p[3] == q[3] and same(p[0], q[0]) and same(p[2], q[2]) for p, q in zip(ia, ib))
        if {a[0], b[0]} & {"set", "w"}:
            return a[:2] == b[:2] and a[0] == "set" and same(a[2], b[2]) and same(a[3], b[3])
        if "rel" in (a[0], b[0]) and not (several(a) and several(b)):
            return False
    if a[0] == b[0] == "seq" and ("(" in (a[1], b[1]) or a[1] == b[1] == "["):
        if len(a[3]) != len(b[3]) or "{" in (a[1], b[1]) or (a[1] and b[1] and len(a[3]) == 2 and a[1] + a[2] != b[1] + b[2]):
            return False
        named = [sorted(s[3], key=lambda k: str(unname(k)[0])) if all(unname(k)[0] for k in s[3]) else s[3] for s in (a, b)]
        return all(map(same, *named))  # points keep their order; x = 1, y = 2 is the point (1, 2)
    ma, mb = several(a), several(b)
    if a[0] == "seq" and a[1] == "[":
        ma = list(a[3])
    if b[0] == "seq" and b[1] == "[":
        mb = list(b[3])
    if ma is not None or mb is not None:
        ma, mb = [a] if ma is None else ma, [b] if mb is None else mb
        if (a[0] == "seq" and (a[1] == "{" or a[4] == "or")) or (b[0] == "seq" and (b[1] == "{" or b[4] == "or")) or "seq" not in (a[0], b[0]):
            ma, mb = unique(ma), unique(mb)
        if len(ma) > 60 or len(ma) != len(mb) or (len(ma) == 1 and (ma[0] is a and mb[0] is b)):
            return False
        return matched(ma, mb)
    if "seq" in (a[0], b[0]):
        return False
    return same_quantity(a, b)


# ---- 4. the verdict --------------------------------------------------------------------------------------------------
def judge(pred, gold, choices=None, log=None):
    """(right?, why) for two answers. The function to edit for another notion of "right". log collects steps in words."""
    say = log.append if log is not None else lambda text: None
    if not isinstance(pred, str) or not isinstance(gold, str) or len(pred) > 4 * mp.MAX_CHARS or len(gold) > 4 * mp.MAX_CHARS:
        return False, "unparsable"
    p, g = core_text(pred), core_text(gold)
    say(f"without wrappers: {p!r} and {g!r}")
    if not p or not g:
        return False, "wrong"
    if p == g:
        say("the same text")
        return True, "ok"
    if choices and not all(len(c.strip()) == 1 and c.strip().isalpha() for c in choices):
        return judge_choice(p, g, [core_text(str(c)) for c in choices], say)
    return judge_text(p, g, say)


def judge_choice(p, g, choices, say):
    """With options at hand: letter against letter, text against the letter's text."""
    def index(t):
        if (ls := letters(t)) and len(ls) == 1 and t not in choices:
            return (k, "") if (k := ord(min(ls)) - 65) < len(choices) else None
        if (lt := letter_text(t)) and ord(lt[0]) - 65 < len(choices):
            return ord(lt[0]) - 65, lt[1]
        return None
    ip, ig = index(p), index(g)
    say(f"options: {choices}; the two name {ip} and {ig}")
    if ip and ip[1] and not judge_text(ip[1], choices[ip[0]], say)[0]:
        return False, "wrong"  # "B: 54" where B is 45
    if ip and ig:
        return (True, "ok") if ip[0] == ig[0] or choices[ip[0]] == choices[ig[0]] else (False, "wrong")
    if ip:
        return judge_text(choices[ip[0]], g, say)
    return judge_text(p, choices[ig[0]] if ig else g, say)


def judge_text(p, g, say):
    p, g = (mp.unicode_plain(t) if not t.isascii() else t for t in (p, g))
    lp, lg = letters(p), letters(g)
    if lp and lg and (lp == lg or len(lp | lg) > 0 and (p + g).isupper()):
        say(f"choice letters {lp} and {lg}")
        return (lp == lg, "ok" if lp == lg else "wrong")
    tp, tg = letter_text(p), letter_text(g)
    if tp and (tg or lg) and not (tp and tg and tp[0] != tg[0]):
        if lg or judge_text(tp[1], tg[1], say)[0]:
            ok = {tp[0]} == (lg or {tg[0]})
            return ok, "ok" if ok else "wrong"
    if tg and lp:
        return lp == {tg[0]}, "ok" if lp == {tg[0]} else "wrong"
    if tp and not tg and len(tp[0]) == 1 and (tp[0] + "." in p[:3] or p[0] in "([" or ":" in p[:3]):
        p = tp[1]  # "B. 54" against "54"
    elif tg and not tp and (g[0] in "([" or g[1:2] in ".:"):
        g = tg[1]
    wp, wg = words(p), words(g)
    if wp and wp == wg and re.search("[a-z]{2}|[^\x00-\x7f]", wp) and not re.search(r"[\\^_/*+=<>|]|\d\s*-", p + g):
        say("the same words")
        return True, "ok"
    if wg in ("yes", "no", "true", "false") or wp in ("yes", "no", "true", "false"):
        first = re.match(r"(yes|no|true|false)\b\s*[,.;:-]", p, re.I)
        ok = bool(first and first[1].lower() == wg and not re.search(r"\b(?:or|maybe|not sure|yes|no)\b", wp[len(first[1]):]))
        return ok, "ok" if ok else "wrong"
    cp, cg = clock(p), clock(g)
    if cp and cg:
        say(f"times {cp} and {cg} (minutes)")
        ok = cp == cg or (cp[1] != cg[1] and p[-1].isdigit() != g[-1].isdigit() and (cp[0] - cg[0]) % 720 == 0 and min(cp[0], cg[0]) < 780)
        return ok, "ok" if ok else "wrong"
    dp, dg = date(p), date(g)
    if dp and dg:
        return dp == dg, "ok" if dp == dg else "wrong"
    return judge_math(number_words(p), number_words(g), say)


def judge_math(p, g, say):
    trees = []
    for t in (p, g):
        try:
            trees.append(parse(clean(t)))
        except Unparsable as e:
            trees.append(None)
            say(f"{t[:80]!r}: no mathematics ({e})")
    say(f"trees: {trees[0]} and {trees[1]}")
    if None not in trees:
        try:
            ok = same(*trees)
        except (ArithmeticError, ValueError, TypeError) as e:
            say(f"no value: {e}")
            ok = False
        if not ok and "," in p and "," in g:  # (1,234) may be a point
            try:
                ok = same(parse(clean(p), False), parse(clean(g), False))
            except (ArithmeticError, ValueError, TypeError):
                ok = False
        return (ok, "ok" if ok else "wrong")
    if same_word_list(p, g):
        return True, "ok"
    squeeze = [re.sub(r"\s+|\\[,;!: ]", "", clean(t)) for t in (p, g)]
    if squeeze[0] == squeeze[1]:
        return True, "ok"
    return False, "unparsable" if trees[0] is None and trees[1] is not None else "wrong"


def same_word_list(p, g):
    """[Gambia, Niger] = Niger and Gambia: names in any order."""
    out = []
    for t in (p, g):
        parts = re.split(r"\s*(?:,|;|\band\b|&)\s*", clean(t).strip("[](){} "))
        out.append(sorted(w for w in map(words, parts) if w))
    return out[0] == out[1] and len(out[0]) > 1 and all(re.fullmatch(r"[\w .'%-]+", w) for w in out[0])


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


_cache = OrderedDict()


def remember(key, out):
    with _lock:
        _cache[key] = out
        if len(_cache) > 50_000:
            _cache.popitem(last=False)


# ---- 5. rewards ------------------------------------------------------------------------------------------------------
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


# ---- 6. workers: plain subprocesses with a wall-clock and a memory limit -----------------------------------------------
class Worker:
    """`python reward.py --worker`: JSON lines in and out. Started by exec, so it inherits neither threads nor process
    groups and never imports the caller; it ends when its pipe closes or its own alarm rings."""

    def __init__(self):
        self.proc = subprocess.Popen([sys.executable, "-E", os.path.abspath(__file__), "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, env={k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"})

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
        self.proc.wait()
        self.proc.stdin.close(), self.proc.stdout.close()


_idle = []


def lend(keys, workers):
    """Judges keys in worker processes -> {key: verdict}; one thread per worker."""
    todo, out = list(reversed(keys)), {}

    def run():
        with _lock:
            worker = _idle.pop() if _idle else None
        while True:
            with _lock:
                key = todo.pop() if todo else None
            if key is None:
                break
            worker = worker or Worker()
            begun = time.monotonic()
            got = worker.ask(tuple(x[:4 * mp.MAX_CHARS + 1] if isinstance(x, str) else x for x in key), TIME_LIMIT)
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


# ---- 7. command line -------------------------------------------------------------------------------------------------
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
