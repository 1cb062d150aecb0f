"""Where is the answer in a response? Rules do what most benchmarks leave to a language model.

They read responses of any form; reward.extract_answer reads the strict one. Only the last 20,000
characters are searched, and every repeated part of a pattern is bounded, so that the search stays
linear on hostile text.
"""

import re
from functools import lru_cache

from answers.equal import value
from answers.parse import Unparsable, parse
from answers.text import clean, core_text, letter_text, letters, number_words
from nano import data
from reward import verdict as reward_verdict

SHORT = 80  # characters of what may be an answer as a whole
LONGEST = 20_000  # characters that are searched, counted from the end
NO_OPTION = (None, "")

NUMBER = re.compile(r"-?(?:\d[\d,]{0,60}\.?\d{0,60}|\.\d{1,60})(?:[eE][-+]?\d{1,3}(?!\d))?")
# An inequality, or two values at once, is no number.
DOUBT = re.compile(r"[<>≤≥≠|]|\\(?:neq?|leq?|geq?|not|pm)\b|±")

_KEYS = re.compile(r"answer|option|choice|result|答案|选项", re.I)
_SAYS = re.compile(
    r"(?:answer|option|choice|result)(?: to [^.\n]{1,60})?\*{0,2}\s{0,3}"
    r"(?:is|are|should be|would be|must be|:|：|=)"
    r"[\s:*]{0,6}(?:option|choice|approximately)?\s{0,3}|(?:答案|选项)\s{0,3}(?:是|为|：|:)\s{0,3}",
    re.I,
)
_MARKED = re.compile(
    r"\(([A-Ja-j])\)|\*\*([A-J])[.:)]?\*\*|\b(?:[Oo]ption|[Cc]hoice|选)\s{0,3}([A-J])\b"
)
_NONE = re.compile(r"\W{0,9}(?:not|none|neither|no)\b", re.I)  # "not (A)", "none of the options"


def statements(text):
    """What a response calls its answer, the last one first."""
    found = []
    for tail in (text[-2000:], text):  # Most say it at the end; some say it first and explain then.
        for key in _KEYS.finditer(tail):
            if says := _SAYS.match(tail, key.start()):
                line = tail[says.end() : says.end() + 400].partition("\n")[0]
                sentence = re.split(r"(?<=[^\d\s])\.\s|\.\s(?=[A-Z])|。", line)[0]
                found.append(sentence.strip().rstrip("."))
        if found:
            break
    return found[:-20:-1]


@lru_cache(16)
def candidates(text: str) -> list[str]:
    """Where the answer may stand: a short text as a whole, boxes, statements, the last sentence."""
    text = text.strip()[-LONGEST:]
    if "</answer>" in text:
        text = text[: text.rindex("</answer>")].rpartition("<answer>")[2].strip()
    boxed = data.boxes(text)[-1:]
    if len(text) <= SHORT and "\n" not in text and not boxed:
        return [*statements(text)[:1], text]
    line = text[-2000:].rpartition("\n")[2]
    last = re.split(r"(?<=[^\d\s])[.。]\s*(?=\S)|(?<=\d)[.。]\s+|。", line)[-1].strip()
    return [*boxed, *filter(None, statements(text)), last]


def option_index(letter, choices):
    """The number of the option that this capital letter names, or None."""
    return next((k for k in range(len(choices)) if letter == chr(65 + k)), None)


def option_of(text, choices):
    """(number, how) of the one option that a short text names, or NO_OPTION."""
    text = text[-1000:]
    if _NONE.match(text):
        return NO_OPTION
    core = core_text(text)
    named = letters(core) or ()
    if len(named) == 1 and core.upper() not in (choice.upper() for choice in choices):
        k = option_index(*named, choices)
        return NO_OPTION if k is None else (k, "the letter")
    if core in choices:
        return choices.index(core), "the option's text"
    if beside := letter_text(core, strict=False):
        k = option_index(beside[0], choices)
        if k is not None:
            return k, "letter and text"
    marked = {m[m.lastindex].upper() for m in _MARKED.finditer(text)}
    k = option_index(*marked, choices) if len(marked) == 1 else None
    if k is not None:
        return k, "the letter"
    same = [k for k, c in enumerate(choices) if len(core) < 200 and reward_verdict(core, c)[0]]
    return (same[0], "the option's value") if len(same) == 1 else NO_OPTION


def find_option(text: str, choices: list[str]) -> tuple[int | None, str]:
    """(number, how) of the option that a response chooses, or NO_OPTION."""
    parts = candidates(text)
    for part in parts:
        k, how = option_of(part, choices)
        if k is not None:
            return k, how
    marked = [m[m.lastindex].upper() for m in _MARKED.finditer(text[-LONGEST:])]
    k = option_index(marked[-1], choices) if marked and len(text) > SHORT else None
    if k is not None:
        return k, "the last letter in brackets"
    last, held = parts[-1].lower(), []
    for k, choice in enumerate(choices):
        alone = rf"(?<![\w.\\]){re.escape(choice.lower())}(?![\w]|\.\d)"
        if choice.strip() and not _NONE.match(last) and re.search(alone, last):
            held.append(k)
    return (held[0], "the only option in the last sentence") if len(held) == 1 else NO_OPTION


def number_of(text):
    """The one number that a text gives: `14`, `x = 3`, `$1,234.5`, `3/4`, `45°`, `five apples`."""
    if len(text) > 400:
        return None
    text = core_text(text).replace("\\,", "").replace("\\$", "").replace("\\%", "%")
    if text.count("=") == 1 and not DOUBT.search(text):
        text = text.rsplit("=", 1)[-1]
    if re.search(r"\d.*(\\approx|≈)", text):
        return None
    text = re.sub(r"\\approx|≈|^\s*approximately", "", text)
    if DOUBT.search(text) or len(text) > 200:
        return None
    if re.search(r"\\d?frac|\\sqrt|√|π|\\pi|\d\s*[/^*]\s*\d", text):
        return math_value(text)
    powers = r"\^\{?(?:\\circ|[23])\}?|(?<=[a-z])[23]\b"  # of a unit
    found = NUMBER.findall(re.sub(powers, "", number_words(text)))
    values = {float(x.replace(",", "")) for x in found}
    return values.pop() if len(values) == 1 else None


def find_number(text: str) -> float | None:
    """The number that a response gives as its answer, at worst the last of a long last sentence."""
    for part in candidates(text):
        x = number_of(part)
        if x is not None:
            return x
    last = candidates(text)[-1].rstrip(".")
    unsure = DOUBT.search(last) or re.search(r"\b(?:n?either|or|not)\b", last)
    found = [] if unsure or len(last) <= SHORT / 2 else NUMBER.findall(last)
    return float(found[-1].replace(",", "")) if found else None


@lru_cache(10_000)
def math_value(text: str) -> float | None:
    """The real number that a piece of LaTeX stands for, with or without a unit."""
    try:
        x = value(parse(clean(text[:1000])))
        return None if isinstance(x, complex) else float(x)
    except (Unparsable, ArithmeticError, ValueError, TypeError, RecursionError):
        return None


def edit_distance(a, b):
    """Levenshtein's distance of two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def can_infer(text, choices):
    """VLMEvalKit's rule: the one letter among the words, else the one option whose text occurs."""
    split = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [k for k in range(len(choices)) if chr(65 + k) in split]
    if len(found) != 1 and len(text) <= 2 * sum(map(len, choices)):
        found = [k for k, c in enumerate(choices) if c.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def written_choices(question):
    """The options in a question's text, written `A:...`, `A. ...` or `(A) ...`; [] without any."""
    mark, options = r"\(?([{}-H])(?:\)|[:：.．])", []
    pattern = rf"(?<![A-Za-z]){mark.format('A')}\s*(.*?)(?=[\s;,]{mark.format('B')}|\n\n|$)"
    for letter, text, _ in re.findall(pattern, question[-3000:], re.S):
        if letter == chr(65 + len(options)):
            options.append(text.strip().strip(";,. \n"))
    return options if len(options) > 1 else []
