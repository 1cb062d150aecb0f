"""Do two answers, freed of what surrounds them, say the same? One function for each kind of answer.

Each returns True, False, or None where the prediction is no mathematics; `say` collects the steps.
"""

import re
from collections.abc import Callable

from answers import text as T
from answers.equal import equivalent, same_number
from answers.parse import Node, Unparsable, number, parse
from answers.text import clean, letter_text, letters, words

_NUMERAL = re.compile(r"-?\d{1,300}(?:\.\d{1,99})?")
_COMMA = re.compile(r"^-?(?:\d+,(?!\d{3}$)|0,)\d+$")  # a decimal comma
_WORDY = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|[^\x00-\x7f]")
_NO_WORDS = re.compile(r"[\\^_*']|\d\s*-\s*\d|[\[(].*,.*[\])]")
_ORDER = re.compile(r"\d+(?:\s*-\s*\d+){2,}|[A-Z](?:\s*-\s*[A-Z]){2,}")
_YES_NO = re.compile(r"(yes|no|true|false)\b\s*[,.;:-]", re.I)  # "Yes, it is possible."
_UNSURE = re.compile(r"\b(?:or|maybe|not sure|yes|no)\b")


def mute(step: str) -> None:
    """Where nobody reads the steps."""


def named_option(t: str, options: list[str]) -> tuple[int, str] | None:
    """(number of the option that a text names, what it says beside the letter), or None."""
    if t in options:
        return options.index(t), ""
    named = letters(t)
    if named and len(named) == 1:
        letter, text = min(named), ""
    else:
        letter, text = letter_text(t, strict=False) or ("@", "")
    k = ord(letter) - ord("A")
    return (k, text) if 0 <= k < len(options) else None


def same_option(p: str, g: str, options: list[str], say: Callable) -> bool | None:
    """With options at hand: letter against letter, text against the letter's text."""
    at_p, at_g = named_option(p, options), named_option(g, options)
    say(f"options: {options}; the two name {at_p} and {at_g}")
    if at_p and at_p[1] and not same_answer(at_p[1], options[at_p[0]], say):
        return False  # "B: 54" where B is 45
    p, g = options[at_p[0]] if at_p else p, options[at_g[0]] if at_g else g
    return p == g if at_p and at_g else same_answer(p, g, say)


def same_answer(p: str, g: str, say: Callable = mute) -> bool | None:
    """By kind, the simple ones first: numerals, letters, words, times, dates, mathematics."""
    p, g = (T.TEXT.sub(r" \1 ", t).replace("~", " ").strip() if "\\" in t else t for t in (p, g))
    if _NUMERAL.fullmatch(p) and _NUMERAL.fullmatch(g):  # most answers
        return same_number(number(p), number(g))
    right, p, g = same_letters(p, g, say)
    if right is None and (_WORDY.search(p) or _WORDY.search(g)):
        right, p, g = same_words(p, g, say)
    if right is not None:
        return right
    for kind, read, same in (("times", T.clock, T.same_clock), ("dates", T.date, tuple.__eq__)):
        if (first := read(p)) and (second := read(g)):
            say(f"{kind}: {first} and {second}")
            return same(first, second)
    if _ORDER.fullmatch(p) and _ORDER.fullmatch(g):  # 5-4-2-3-1 is an order, no difference
        return re.findall(r"\w+", p) == re.findall(r"\w+", g)
    return same_math(T.number_words(p), T.number_words(g), say)


def same_letters(p: str, g: str, say: Callable) -> tuple[bool | None, str, str]:
    """Choice letters without options: (verdict, ...), or (None, the texts without letters)."""
    lp, lg, tp, tg = letters(p), letters(g), letter_text(p), letter_text(g)
    if (lp or tp) and (lg or tg):
        say(f"letters: {lp or tp} and {lg or tg}")
    right = None
    if lp and lg and (lp == lg or (p + g).isupper()):
        right = lp == lg
    elif (tp and lg) or (lp and tg):
        right = ({tp[0]} if tp else lp) == (lg if tp else {tg[0]})
    elif tp and tg:
        right = tp[0] == tg[0] and bool(same_answer(tp[1], tg[1], say))
    return right, tp[1] if tp else p, tg[1] if tg else g  # "B. 54" against "54"


def same_words(p: str, g: str, say: Callable) -> tuple[bool | None, str, str]:
    """Phrases, names, yes and no: (verdict, ...), or (None, texts with phrases as LaTeX)."""
    both = _WORDY.search(p) and _WORDY.search(g)
    wp, wg = (words(p), words(g)) if both else ("", "")
    if both and wp == wg and re.search("[a-z]{2}|[^\x00-\x7f]", wp):
        if not _NO_WORDS.search(p + " " + g):
            say("the same words")
            return True, p, g
    if {wp, wg} & {"yes", "no", "true", "false"}:
        first = _YES_NO.match(p)
        clear = first and not _UNSURE.search(wp[len(first[1]) :])
        return bool(clear and first[1].lower() == wg), p, g
    phrases = [T.PHRASE_LATEX.get(words(t), t) if _WORDY.search(t) else t for t in (p, g)]
    if phrases != [p, g]:
        return None, *phrases
    if T.clock(p) or not all(re.fullmatch("[a-z ]{2,}", w) for w in (wp, wg)):
        return None, p, g
    if all(re.search("[xyz]", w) and max(map(len, w.split())) < 4 for w in (wp, wg)):
        return None, p, g  # a product of variables
    return wp == wg or T.same_word_list(p, g), p, g  # words are no products: act is not cat


def same_math(p: str, g: str, say: Callable) -> bool | None:
    """Trees; what is no mathematics may still be the same list of names, or the same text."""
    trees = [read(t, say) for t in (p, g)]
    if None in trees:
        squeezed = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", clean(t)) for t in (p, g)]
        if T.same_word_list(p, g) or squeezed[0] == squeezed[1]:
            return True
        return None if trees[0] is None and trees[1] is not None else False
    if agree(trees, say):
        return True
    if "," not in p + g:
        return False
    trees = []
    for t, other in ((p, g), (g, p)):  # 1,22 may be 1.22, and (1,234) a point
        if "." in other and "," not in other and _COMMA.match(t):
            t = t.replace(",", ".")
        point = t.lstrip("\\left ")[:1] in ("(", "[", "{") and "," in p and "," in g
        trees.append(read(t, say, thousands=not point))
    return agree(trees, say)


def read(text: str, say: Callable, thousands: bool = True) -> Node | None:
    try:
        tree = parse(clean(text), thousands)
    except Unparsable as e:
        say(f"{text[:80]!r} is no mathematics: {e}")
        return None
    if say is not mute:
        say(f"{text[:80]!r} reads {show(tree)}")
    return tree


def agree(trees: list[Node | None], say: Callable) -> bool:
    try:
        return None not in trees and equivalent(*trees)
    except (ArithmeticError, ValueError, TypeError) as e:  # 1/0, an interval in a sum
        say(f"no value: {e}")
        return False


def show(node: Node) -> str:
    """A tree as text for people: +(x, *(2, y))."""
    name = node.tag if node.tag in "+*/^" or node.data is None else node.data
    if node.tag == "n":
        return str(node.data[0])
    return f"{name}({', '.join(map(show, node.kids))})" if node.kids else str(name)
