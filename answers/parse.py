"""mathparse.py: reads the text of an answer into a small tree; mathequal.py then tells whether two trees mean the same.

Sections: 1 tokens, 2 parser. Nothing that was read is ever evaluated as code: the parser knows an allow-list of names and
raises Unparsable on all else; length, tokens, nesting and digits have limits, so that a call costs milliseconds.
A tree is a Node(tag, data, kids):  n (value, last place)   v name   c pi|e|i|inf   + * / ^ ratio   f function's name
  pm sign   q unit   rel operators   set union's sign   w reals|integers...   seq (opener, closer, and|or|matrix|"")
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from answers.text import CURRENCIES, DEGREE, NO_NOUN, PERCENT, POWER_WORDS, SCALES, UNITS, unit_key

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 2000, 600, 24, 400


class Unparsable(ValueError):
    """The text is no mathematics that this parser knows, or it is larger than its limits."""


class Node(NamedTuple):
    tag: str
    data: object = None
    kids: tuple = ()


# ---- 1. tokens -------------------------------------------------------------------------------------------------------
_TOKEN = re.compile(
    r"(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?"  # 1,234.5 and 1 234.5
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)"
    r"|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<op><=|>=|!=|/=|==|[-+*/^_=<>()\[\]{},;:!%|'&#~])"
    r"|(?P<sp>\s+)|(?P<bad>.)",
    re.S,
)
FUNCTIONS = {
    n: n
    for n in "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log lg exp abs".split()
}
FUNCTIONS |= dict(
    zip(
        "asin acos atan tg ctg cosec arctg".split(),
        "arcsin arccos arctan tan cot csc arctan".split(),
    )
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi "
    "chi psi omega ell Gamma Delta Theta Lambda Sigma Phi Psi Omega".split()
)
_RELATIONS = {
    t: to
    for to, texts in {
        "=": "= == \\equiv",
        "<": "<",
        ">": ">",
        "<=": "<= \\le \\leq \\leqslant",
        ">=": ">= \\ge \\geq \\geqslant",
        "!=": "!= /= \\ne \\neq",
        "~": "\\approx \\simeq \\doteq \\sim \\cong",
        "in": "\\in",
    }.items()
    for t in texts.split()
}
_SEPARATORS = {
    t: word
    for word, texts in {
        "": ", ; \\newline",
        "and": "and \\land \\wedge",
        "or": "or \\lor \\vee",
    }.items()
    for t in texts.split()
}
_SET_SIGNS = {
    "\\cup": "\\cup",
    "U": "\\cup",
    "\\cap": "\\cap",
    "\\setminus": "\\setminus",
    "\\backslash": "\\setminus",
}
_POSTFIX, _SUM_SIGNS = {"!", "%", "\\deg", "\\degC", "\\degF", "'"}, {"+", "-", "\\pm", "\\mp"}
_CLOSERS = {
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}",),
    "\\{": ("\\}",),
    "\\langle": ("\\rangle",),
}
_FENCES = {"\\{\\}": "{}", "\\langle\\rangle": "()"}
_ENDS = {*_SEPARATORS, *_RELATIONS, ")", "]", "}", "\\}", "\\rangle", ".", "\\deg", ""}
_EMPTY = Node("seq", ("{", "}", ""))
_CONSTANTS = {
    "pi": Node("c", "pi"),
    **dict.fromkeys("infinity inf oo infty".split(), Node("c", "inf")),
}
_SYMBOLS = {
    **_CONSTANTS,
    "R": Node("w", "reals"),
    "Z": Node("w", "integers"),
    "N": Node("w", "naturals"),
    "Q": Node("w", "rationals"),
    "emptyset": _EMPTY,
    "varnothing": _EMPTY,
}
_ATOMS = (
    {
        "\\" + c
        for c in (
            "frac sqrt binom dbinom tbinom pi infty begin { emptyset varnothing usd eur gbp cny "
            "R Z N Q"
        ).split()
    }
    | {"\\" + f for f in FUNCTIONS}
    | {"\\" + g for g in _GREEK}
)


def tokenize(s, thousands=True):
    """Text -> list of (kind, text). thousands=False reads 1,234 as two numbers."""
    if len(s) > MAX_CHARS:
        raise Unparsable("too long")
    toks = []
    for m in _TOKEN.finditer(s):
        kind, text = m.lastgroup, m[0]
        if kind == "bad":
            raise Unparsable(f"unknown sign {text!r}")
        if kind == "num" and not thousands and ("," in text or " " in text):
            toks += [("op" if t == "," else "num", t) for t in re.findall(r"\d+(?:\.\d+)?|,", text)]
        elif kind != "sp":
            toks.append((kind, text))
        if len(toks) > MAX_TOKENS or (kind == "num" and len(text) > MAX_DIGITS):
            raise Unparsable("too many tokens or digits")
    return toks


def num(value, ulp=None):
    """Exact number; ulp is the unit of the last decimal place if it was written as a decimal."""
    return Node("n", (value, ulp))


def number(text):
    """Literal -> number."""
    text = text.replace(",", "").replace(" ", "").lower()
    if text.isdigit():
        return num(int(text))
    mantissa, _, exponent = text.partition("e")
    scale, decimals = Fraction(10) ** int(exponent or 0), len(mantissa.partition(".")[2])
    value = Fraction(mantissa.rstrip(".")) * scale
    return num(
        int(value) if value.denominator == 1 else value, scale / 10**decimals if decimals else None
    )


# ---- 2. parser -------------------------------------------------------------------------------------------------------
def fail(why):
    raise Unparsable(why)


def negate(a):
    if a.tag == "n":
        return num(-a.data[0], a.data[1])
    return (
        Node("q", a.data, (negate(a.kids[0]),)) if a.tag == "q" else Node("*", None, (num(-1), a))
    )


def times(a, b):
    return Node("*", None, (a.kids if a.tag == "*" else (a,)) + (b,))


def letter(c):
    return Node("c" if c in ("e", "i") else "v", c)


def variables(node):
    """Names of the free variables of a tree."""
    return {node.data} if node.tag == "v" else set().union(*map(variables, node.kids))


class Parser:
    """Recursive descent; one method per level of precedence, loosest first. Every method returns a Node."""

    def __init__(self, toks):
        self.toks, self.i, self.depth, self.bars = toks + [("end", "")] * 4, 0, 0, 0

    def take(self, *texts):
        text = self.toks[self.i][1]
        if text in texts:  # the end is "", which nobody asks for
            self.i += 1
            return text
        return None

    def need(self, *texts):
        return self.take(*texts) or fail(
            f"expected {' or '.join(texts)}, found {self.toks[self.i][1] or 'the end'!r}"
        )

    def deeper(self, parse, *args):
        """Runs a method one level deeper."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            fail("nested too deeply")
        node = parse(*args)
        self.depth -= 1
        return node

    def whole(self):
        self.take("=")  # "= 5"
        node = self.items()
        while self.take(".", "\\newline", ";", ":"):
            pass
        return (
            node if self.toks[self.i][0] == "end" else fail(f"cannot read {self.toks[self.i][1]!r}")
        )

    def items(self, opener=""):
        """Relations separated by commas, "and", "or"; one item without brackets is itself."""
        out, word = [self.relation()], ""
        while (sep := self.toks[self.i][1]) in _SEPARATORS:
            self.i += 1
            if sep in (",", ";"):
                sep = self.take("and", "or") or sep  # "1, 2, and 3"
            if self.toks[self.i][0] == "end":
                break
            word = "or" if "or" in (word, _SEPARATORS[sep]) else word or _SEPARATORS[sep]
            out.append(self.relation())
        if not opener:
            return out[0] if len(out) == 1 else Node("seq", ("", "", word), tuple(out))
        fence = opener + self.need(*_CLOSERS[opener])
        return Node("seq", (*_FENCES.get(fence, fence), word), tuple(out))

    def relation(self):
        nodes, ops, j = [], [], self.i
        while (
            self.toks[j][0] == "word"
            and len(self.toks[j][1]) > 1
            and self.toks[j][1] not in FUNCTIONS
        ):
            j += 1
        if j > self.i and self.toks[j][1] in (
            "=",
            ":",
            "is",
            "\\approx",
        ):  # "Area = 5 cm^2", "range: [0, 1]"
            label = " ".join(text for _, text in self.toks[self.i : j])
            self.i = j + 1
            self.take("=")
            nodes, ops = [Node("v", label if len(label) < 4 else label.lower())], ["="]
        nodes.append(self.union())
        while op := _RELATIONS.get(self.toks[self.i][1]):
            self.i += 1
            ops.append(op)
            nodes.append(self.union())
        return Node("rel", tuple(ops), tuple(nodes)) if ops else nodes[0]

    def union(self):
        node, n = self.ratio(), 0
        while n < MAX_DEPTH and (op := _SET_SIGNS.get(self.toks[self.i][1])):
            self.i, n = self.i + 1, n + 1
            node = Node("set", op, (node, self.ratio()))
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.toks[self.i][1] == ":" and self.toks[self.i + 1][0] != "end" and len(parts) < 9:
            self.i += 1
            parts.append(self.sum())
        return (
            parts[0]
            if len(parts) == 1
            else Node("/" if len(parts) == 2 else "ratio", None, tuple(parts))
        )

    def sum(self):
        return self.deeper(self.terms)

    def terms(self):
        terms = []
        while not terms or self.toks[self.i][1] in _SUM_SIGNS:
            sign, pm = 1, 0
            while (op := self.toks[self.i][1]) in _SUM_SIGNS:
                self.i += 1
                sign = -sign if op == "-" else sign
                pm = {"\\pm": 1, "\\mp": -1}.get(op, pm)
            term = self.quantity()
            term = Node("pm", pm, (term,)) if pm else term
            terms.append(negate(term) if sign < 0 else term)
        return terms[0] if len(terms) == 1 else Node("+", None, tuple(terms))

    def quantity(self):
        """A product; 3 hours 20 minutes and 3 hours and 20 minutes are one quantity."""
        node = self.term()
        while node.tag == "q":
            start, (kind, text) = self.i, self.toks[self.i]
            if not (
                kind == "num"
                or (
                    text == "and"
                    and self.toks[self.i + 1][0] == "num"
                    and self.toks[self.i + 2][1] in UNITS
                )
            ):
                break
            self.take("and")
            more = self.term()
            if more.tag != "q" or more.data[1] != node.data[1] or more.data[0] >= node.data[0]:
                self.i = start if text == "and" else fail("two numbers side by side")
                break
            first = times(num(node.data[0] / more.data[0]), node.kids[0])
            node = Node("q", more.data, (Node("+", None, (first, more.kids[0])),))
        return node

    def term(self):
        node, n = self.power(), 0
        while text := self.toks[self.i][1]:
            if text in ("*", "\\cdot", "\\times", "\\ast"):
                self.i += 1
                node = times(node, self.signed())
            elif n < MAX_DEPTH and text in ("/", "\\div"):
                self.i, n = self.i + 1, n + 1
                node = Node("/", None, (node, self.signed()))
            elif unit := self.unit(node):
                node = Node("q", unit, (node,))
            elif text in SCALES and not variables(node):
                self.i += 1
                node = times(node, num(SCALES[text]))
            elif self.starts_factor(node):
                node = times(node, self.power())
            else:
                break
        return node

    def signed(self, mixed=True):
        sign = self.take("-", "+")
        return negate(self.power(mixed)) if sign == "-" else self.power(mixed)

    def starts_factor(self, left):
        kind, text = self.toks[self.i]
        if kind == "word":
            return text not in ("and", "or") and not (text == "U" and left.tag in ("seq", "set"))
        if kind == "num":  # (2)3 and \sqrt{2} 3, but neither 5 6 nor x 2
            return self.toks[self.i - 1][1] in (")", "}", "]", "!")
        return (
            text in _ATOMS
            if kind == "cmd"
            else text in ("(", "[", "{") or (text == "|" and not self.bars)
        )

    def power(self, mixed=True):
        node = self.postfix(self.atom(mixed))
        return (
            self.postfix(Node("^", None, (node, self.deeper(self.signed, False))))
            if self.take("^")
            else node
        )

    def postfix(self, node):
        for _ in range(4):
            op = self.toks[self.i][1]
            if op not in _POSTFIX:
                break
            self.i += 1
            if op == "!":
                node = Node("f", "factorial", (node,))
            elif op == "%":
                node = Node("q", PERCENT, (node,))
            elif op in ("\\degC", "\\degF"):
                node = Node("q", (Fraction(1), ((op[1:], 1),)), (node,))
            elif op == "\\deg":
                node = Node("q", self.degrees(), (node,))
            else:
                node = Node("v", node.data + "'") if node.tag == "v" else fail("stray '")
        return node

    def degrees(self):
        """After the sign: C and F are temperatures, T and E belong to bearings."""
        scale = self.take("C", "F", "T", "E") if self.toks[self.i + 1][1] in _ENDS else None
        return (Fraction(1), (("deg" + scale, 1),)) if scale in ("C", "F") else DEGREE

    def atom(self, mixed=True):
        kind, text = self.toks[self.i]
        self.i += 1
        if kind == "num":
            if self.toks[self.i][1] == "_":  # 1101_2, in another base: a name
                return Node("v", text + self.subscript())
            return self.mixed(number(text)) if mixed else number(text)
        if kind == "word":
            return self.word(text)
        if text == "|" and self.bars < 3:
            self.bars += 1
            node = self.sum()
            self.need("|")
            self.bars -= 1
            return Node("f", "abs", (node,))
        if text in _CLOSERS:
            return self.bracket(text)
        return (
            self.command(text)
            if kind == "cmd"
            else fail(f"cannot read {text or 'an empty answer'!r}")
        )

    def bracket(self, opener):
        """( expr ) is expr; several items stay a sequence; {x | x > 5} is what its condition says."""
        if opener == "\\{" and self.take("\\}"):
            return _EMPTY
        k = self.i + (3 if self.toks[self.i + 1][1] == "\\in" else 1)
        if (
            opener in ("{", "\\{")
            and self.toks[self.i][0] == "word"
            and self.toks[k][1] in ("|", ":")
        ):
            self.i = k + 1
            node = self.items()
            self.need(*_CLOSERS[opener])
            return node
        seq = self.items(opener)
        alike = seq.data[0] + seq.data[1] in ("()", "[]") or opener == "{"
        return seq.kids[0] if len(seq.kids) == 1 and alike else seq

    def mixed(self, node):
        """6\\frac12 and 6 1/2 are six and a half."""
        if not self.toks[self.i - 1][1].isdigit():
            return node
        (kind, text), (_, slash), (kind_2, text_2) = self.toks[self.i : self.i + 3]
        if (
            kind == kind_2 == "num"
            and slash == "/"
            and (text + text_2).isdigit()
            and 0 < int(text) < int(text_2)
        ):
            self.i += 3
            return num(node.data[0] + Fraction(int(text), int(text_2)))
        if not self.take("\\frac"):
            return node
        part = self.command("\\frac")
        top, bottom = (k.data[0] if k.tag == "n" else None for k in part.kids)
        proper = isinstance(top, int) and isinstance(bottom, int) and 0 <= top < bottom
        return num(node.data[0] + Fraction(top, bottom)) if proper else times(node, part)

    def word(self, w):
        low, (kind, nxt) = w.lower(), self.toks[self.i]
        if w in FUNCTIONS or (low in FUNCTIONS and len(w) > 2):
            return self.function(FUNCTIONS[low])
        if low == "sqrt":
            return self.command("\\sqrt")
        if low in _CONSTANTS:
            return _CONSTANTS[low]
        if w in UNITS and len(w) > 2 and kind == "num":  # USD 5
            return Node("q", UNITS[w], (self.postfix(self.atom()),))
        if len(w) == 1:
            return letter(w) if w in "ei" else Node("v", w + self.subscript())
        if w.isupper() and len(w) <= 4:  # a segment, an angle: AB, ABC
            return Node("v", w)
        prose = kind == "word" and len(nxt) > 1 and nxt not in FUNCTIONS and nxt not in _ENDS
        if len(w) > 3 or not w.islower() or prose:
            fail(f"unknown word {w!r}")
        if nxt in ("^", "_", "'", "!"):  # xy^2 is x times y^2
            self.i -= 1
            self.toks[self.i] = ("word", w[-1])
            w = w[:-1]
        return Node("*", None, tuple(map(letter, w))) if len(w) > 1 else letter(w)

    def subscript(self):
        if not self.take("_"):
            return ""
        text, braced = "_", self.take("{")
        while self.toks[self.i][1] not in ("}", "") and len(text) < 20 and (braced or text == "_"):
            text += self.toks[self.i][1]
            self.i += 1
        if braced:
            self.need("}")
        return text

    def function(self, name):
        base = self.argument() if name == "log" and self.take("_") else None
        exponent = None
        if self.take("^"):
            exponent = negate(self.power()) if self.take("-") else self.postfix(self.atom())
        if self.toks[self.i][1] in ("(", "[", "{"):
            arg = self.atom()
            args = arg.kids if arg.tag == "seq" else (arg,)
        else:
            args = (self.bare_argument(),)
        if exponent == num(-1) and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        node = Node("f", name, args + ((base,) if base else ()))
        return Node("^", None, (node, exponent)) if exponent else node

    def bare_argument(self):
        """sin 2x + 1: the argument is 2x."""
        arg = self.power()
        while self.starts_factor(arg) and not self.unit(arg, peek=True):
            if (text := self.toks[self.i][1]) in ("(", "[") or text.lstrip("\\") in FUNCTIONS:
                break
            arg = times(arg, self.power())
        return arg

    def argument(self):
        """One LaTeX argument: a group, a digit, or one atom. \\frac12 has two of one digit."""
        kind, text = self.toks[self.i]
        if kind == "num" and len(text) > 1 and text.isdigit():
            self.toks[self.i] = ("num", text[1:])
            return number(text[0])
        return negate(self.atom()) if self.take("-") else self.atom()

    def command(self, command):
        name = command[1:]
        if name in ("frac", "binom", "dbinom", "tbinom"):
            args = (self.argument(), self.argument())
            return Node("/", None, args) if name == "frac" else Node("f", "binom", args)
        if name == "sqrt":
            index = num(2)
            if self.take("["):
                index = self.sum()
                self.need("]")
            return Node("^", None, (self.atom(mixed=False), Node("/", None, (num(1), index))))
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in _SYMBOLS:
            return _SYMBOLS[name]
        if name in _GREEK:
            return Node("v", name + self.subscript())
        if command in CURRENCIES:
            return Node("q", UNITS[name], (self.postfix(self.atom()),))
        return self.matrix() if name == "begin" else fail(f"unknown command {command!r}")

    def matrix(self):
        """Rows of cells, as a sequence of sequences."""
        rows = [[]]
        while not self.take("\\end"):
            if self.take("\\newline"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.sum())
        return Node(
            "seq",
            ("[", "]", "matrix"),
            tuple(Node("seq", ("[", "]", ""), tuple(r)) for r in rows if r),
        )

    def unit(self, left, peek=False):
        """(factor, dimensions) of a unit that ends the item: cm, m^2, km/h, square metres, "apples"; None if there is none."""
        kind, text = self.toks[self.i]
        if text in CURRENCIES and self.toks[self.i + 1][1] in _ENDS:  # 1,000.99$
            self.i += not peek
            return UNITS[text[1:]]
        if (
            kind != "word"
            or text in SCALES
            or text == "and"
            or text.lower() in FUNCTIONS
            or (len(text) < 3 and unit_key(text) not in UNITS and text not in POWER_WORDS)
        ):
            return None
        j, factor, dims, sign, nouns, numeric = (
            self.i,
            Fraction(1),
            Counter(),
            1,
            0,
            not variables(left),
        )
        while part := self.unit_part(j, numeric):
            f, base, power, known, j = part
            factor, nouns = factor * f ** (power * sign), nouns + (not known)
            for name, p in base:
                dims[name] += p * power * sign
            (kind, text), word_next = self.toks[j], self.toks[j + 1][0] == "word"
            if text in _ENDS or (kind == "num" and known):
                if nouns > 2:  # a sentence
                    return None
                self.i = self.i if peek else j
                return factor, tuple(sorted(dims.items()))
            if text in ("/", "per", "a") and word_next:
                sign, j = -1, j + 1
            elif text in ("*", "\\cdot") and word_next:
                j += 1
            elif kind != "word":
                return None
        return None

    def unit_part(self, j, numeric):
        """(factor, dimensions, power, is it a known unit, next token) of one name with its power, else None."""
        power = 1
        while (text := self.toks[j][1]) in ("sq", "square", "cu", "cubic"):
            power, j = POWER_WORDS[text], j + 1
        kind, known = self.toks[j][0], unit_key(text) in UNITS and (len(text) > 1 or numeric)
        if kind != "word" or not (
            known or (len(text) > 2 and not text.isupper() and text.lower() not in NO_NOUN)
        ):
            return None  # a noun counts as a unit: 5 apples
        f, base = (
            UNITS[unit_key(text)]
            if known
            else (Fraction(1), ((re.sub(r"(?<=..)(?:s|\Bes)$", "", text.lower()), 1),))
        )
        j += 1
        if self.toks[j][1] in ("squared", "cubed"):
            return f, base, POWER_WORDS[self.toks[j][1]], known, j + 1
        if self.toks[j][1] != "^":
            return f, base, power, known, j
        m = re.match(
            r"\^(\{?)(-?[1-3])(?!\d)(\}?)", "".join(text for _, text in self.toks[j : j + 5])
        )
        return (
            (f, base, int(m[2]), known, j + 1 + len(m[1] + m[2] + m[3]))
            if m and len(m[1]) == len(m[3])
            else None
        )


@lru_cache(maxsize=8192)
def parse(text, thousands=True):
    """Cleaned text -> tree, or Unparsable."""
    return Parser(tokenize(text, thousands)).whole()
