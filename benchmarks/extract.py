"""Where is the answer in a response? Rules in place of the language models that most benchmarks use to extract it.

  find_option(text, choices)   -> (number of the option that a response chooses, how it was found) or (None, "")
  find_number(text)            -> the number that a response gives, or None
  candidates(text)             -> the parts of a response where the answer may stand, the likeliest first
They are for responses of any form; the strict training format is reward.extract_answer. Only the last 20,000 characters
are searched and every pattern is bounded. Left out: reading a chain that never says what its answer is.
"""

import functools
import re

from answers.equal import value
from answers.parse import Unparsable, parse
from answers.text import clean, core_text, letter_text, letters, number_words
from nano import data
from reward import verdict as reward_verdict

# each repeated part is bounded, so that the search stays linear on hostile text
_KEYS = re.compile(r"answer|option|choice|result|答案|选项", re.I)
_SAYS = re.compile(
    r"(?:answer|option|choice|result)(?: to [^.\n]{1,60})?\*{0,2}\s{0,3}(?:is|are|should be|would be|must be|:|：|=)"
    r"[\s:*]{0,6}(?:option|choice|approximately)?\s{0,3}|(?:答案|选项)\s{0,3}(?:是|为|：|:)\s{0,3}",
    re.I,
)
_MARKED = re.compile(
    r"\(([A-Ja-j])\)|\*\*([A-J])[.:)]?\*\*|\b(?:[Oo]ption|[Cc]hoice|选)\s{0,3}([A-J])\b"
)
_NONE = re.compile(r"\W{0,9}(?:not|none|neither|no)\b", re.I)  # "not (A)", "none of the options"
NUMBER = re.compile(r"-?(?:\d[\d,]{0,60}\.?\d{0,60}|\.\d{1,60})(?:[eE][-+]?\d{1,3}(?!\d))?")
DOUBT = re.compile(
    r"[<>≤≥≠|]|\\(?:neq?|leq?|geq?|not|pm)\b|±"
)  # an inequality or two values at once is no number
SHORT, LONGEST = (
    80,
    20_000,
)  # characters: of what may be an answer as a whole, of what is searched (the end of it)


def statements(text):
    """what a response calls its answer, the last one first: after `the answer is`, `Final Answer:` ..., up to the line's end"""
    out = []
    for tail in (text[-2000:], text):  # most say it at the end; some say it first and explain then
        for key in _KEYS.finditer(tail):
            if m := _SAYS.match(tail, key.start()):
                line = tail[m.end() : m.end() + 400].partition("\n")[0]
                out.append(
                    re.split(r"(?<=[^\d\s])\.\s|\.\s(?=[A-Z])|。", line)[0].strip().rstrip(".")
                )
        if out or len(text) <= 2000:
            break
    return out[:-20:-1]


@functools.lru_cache(16)
def candidates(text):
    """where the answer may stand, the likeliest first: the text itself if it is short, boxes, statements, the last sentence"""
    text = text.strip()[-LONGEST:]
    if "</answer>" in text:  # in whatever form: the strict one is reward.extract_answer's business
        text = text[: text.rindex("</answer>")].rpartition("<answer>")[2].strip()
    boxed = data.boxes(text)[-1:]
    if len(text) <= SHORT and "\n" not in text and not boxed:
        return [*statements(text)[:1], text]
    line = text[-2000:].rpartition("\n")[2]
    last = re.split(r"(?<=[^\d\s])[.。]\s*(?=\S)|(?<=\d)[.。]\s+|。", line)[-1].strip()
    return [*boxed, *(s for s in statements(text) if s), last]


def option_of(text, choices):
    """(number of the one option that a short text names, in words how), or (None, "")"""
    text = text[-1000:]
    if _NONE.match(text):
        return None, ""
    core = core_text(text)
    named = letters(core)
    if named and len(named) == 1 and core.upper() not in (c.upper() for c in choices):
        k = ord(min(named)) - 65
        return (k, "the letter") if k < len(choices) else (None, "")
    if core in choices:
        return choices.index(core), "the option's text"
    at = letter_text(core, strict=False)
    if at and ord(at[0]) - 65 < len(choices):
        return ord(at[0]) - 65, "letter and text"
    marked = {next(filter(None, m)).upper() for m in _MARKED.findall(text)}
    if len(marked) == 1 and ord(min(marked)) - 65 < len(choices):
        return ord(min(marked)) - 65, "the letter"
    same = [k for k, c in enumerate(choices) if len(core) < 200 and reward_verdict(core, c)[0]]
    return (same[0], "the option's value") if len(same) == 1 else (None, "")


def find_option(text, choices):
    """(option's number, how it was found), or (None, "")"""
    for part in candidates(text):
        k, how = option_of(part, choices)
        if k is not None:
            return k, how
    tail = text[-LONGEST:]
    marked = list(_MARKED.finditer(tail))
    if (
        marked
        and len(text) > SHORT
        and (k := ord(next(filter(None, marked[-1].groups())).upper()) - 65) < len(choices)
    ):
        return k, "the last letter in brackets"
    last = candidates(text)[-1].lower()
    alone = lambda c: re.search(rf"(?<![\w.\\]){re.escape(c.lower())}(?![\w]|\.\d)", last)
    held = [k for k, c in enumerate(choices) if c.strip() and not _NONE.match(last) and alone(c)]
    return (held[0], "the only option in the last sentence") if len(held) == 1 else (None, "")


def number_of(text):
    """float of a text that gives one number: `14`, `x = 3`, `$1,234.5`, `3/4`, `45°`, `five apples`; None if it is not one"""
    if len(text) > 400:
        return None
    text = core_text(text).replace("\\,", "").replace("\\$", "").replace("\\%", "%")
    text = text.rsplit("=", 1)[-1] if text.count("=") == 1 and not DOUBT.search(text) else text
    text = (
        re.sub(r"\\approx|≈|^\s*approximately", "", text)
        if not re.search(r"\d.*(\\approx|≈)", text)
        else text
    )
    if DOUBT.search(text) or len(text) > 200 or "≈" in text or "\\approx" in text:
        return None
    if re.search(r"\\d?frac|\\sqrt|√|π|\\pi|\d\s*[/^*]\s*\d", text):
        return math_value(text)
    found = NUMBER.findall(
        re.sub(r"\^\{?(?:\\circ|[23])\}?|(?<=[a-z])[23]\b", "", number_words(text))
    )
    found = {float(x.replace(",", "")) for x in found if x.replace(",", "") not in ("", "-")}
    return found.pop() if len(found) == 1 else None


@functools.lru_cache(16)
def find_number(text):
    """the number that a response gives as its answer, or None"""
    parts = candidates(text)
    for part in parts:
        x = number_of(part)
        if x is not None:
            return x
    last = parts[-1].rstrip(".")
    guess = (
        len(last) > SHORT / 2
        and not DOUBT.search(last)
        and not re.search(r"\b(?:n?either|or|not)\b", last)
    )
    found = NUMBER.findall(last) if guess else []
    return float(found[-1].replace(",", "")) if found and found[-1].replace(",", "") else None


@functools.lru_cache(10_000)
def math_value(text):
    """the real number that a piece of LaTeX stands for, units and all; None if there is none"""
    try:
        x = value(parse(clean(text[:1000])))
        return None if isinstance(x, complex) else float(x)
    except (Unparsable, ArithmeticError, ValueError, TypeError, RecursionError):
        return None


def nearest(text, choices):
    """the option nearest by edit distance, the first of several: the authors' last resort"""

    def distance(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        return row[-1]

    return min(range(len(choices)), key=lambda k: distance(text, choices[k]))


def can_infer(text, choices):
    """VLMEvalKit's rule for options: the one letter among the words, else the one option whose text occurs -> number or None"""
    split = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [k for k in range(len(choices)) if chr(65 + k) in split]
    if len(named) == 1:
        return named[0]
    if len(text) > 2 * sum(map(len, choices)):
        return None
    held = [k for k, c in enumerate(choices) if c.lower() in text.lower()]
    return held[0] if len(held) == 1 else None


def written_choices(question):
    """the options that stand in a question's text (`A:...` or `A. ...` or `(A) ...`), [] if there are none"""
    found = re.findall(
        r"(?<![A-Za-z])\(?([A-H])(?:\)|[:：.．])\s*(.*?)(?=(?:[\s;,]\(?[B-H](?:\)|[:：.．]))|\n\n|$)",
        question[-3000:],
        re.S,
    )
    options = []
    for letter, text in found:
        if letter == chr(65 + len(options)):
            options.append(text.strip().strip(";,. \n"))
    return options if len(options) > 1 else []
