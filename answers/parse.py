"""Reads the text of an answer into a small tree; equal.py tells whether two trees mean the same.

Nothing that was read is ever evaluated as code: the parser knows an allow-list of names and raises
Unparsable on all else. Length, tokens, nesting and digits have limits, so that a call costs
milliseconds. A tree is a Node(tag, data, kids), by tag:
  n (value, last decimal place)   v name   c pi|e|i|inf   + * / ^ ratio   f name of a function
  pm sign   q unit   rel operators   set \\cup|\\cap|\\setminus   w reals|integers|...
  seq (opener, closer, and|or|matrix|"")
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from answers.text import DEGREE, NO_NOUN, PERCENT, POWER_WORDS, SCALES, UNITS, pairs, unit_key

MAX_CHARS, MAX_TOKENS, MAX_DIGITS = 2000, 600, 400
MAX_DEPTH, MAX_UNITS = 32, 8  # nested brackets, quotients in a row; names in one unit


class Unparsable(ValueError):
    """The text is no mathematics that this parser knows, or it is larger than its limits."""


class Node(NamedTuple):
    tag: str
    data: object = None
    kids: tuple = ()


LABEL = "label "  # before the words of a label


# ---- 1. tokens ---------------------------------------------------------------------------------
_TOKEN = re.compile(
    r"(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"  # 1,234.5
    r"|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?"  # 1 234.5
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)"
    r"|(?P<name>\\[A-Za-z]+|\\.|[A-Za-z]+)"
    r"|(?P<op><=|>=|!=|/=|==|[-+*/^_=<>()\[\]{},;:!%|'&#~])|(?P<sp>\s+)|(?P<bad>.)",
    re.S,
)
_SAME_NAME = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arcsinh arccosh arctanh "
    "ln log lg exp abs gcd lcm"
).split()
SERIES = "lim sum prod int".split()
FUNCTIONS = {name: name for name in _SAME_NAME} | pairs(
    "floor lfloor ceil lceil arsinh arcsinh arcosh arccosh artanh arctanh det abs "
    "asin arcsin acos arccos atan arctan tg tan ctg cot cosec csc arctg arctan"
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega ell Gamma Delta Theta Lambda Sigma Phi Psi Omega".split()
)
_RELATIONS = pairs(r"""
 = = == = \equiv = < < > > <= <= \le <= \leq <= \leqslant <= >= >= \ge >= \geq >= \geqslant >= != !=
 /= != \ne != \neq != \approx ~ \simeq ~ \doteq ~ \sim ~ \cong cong \in in \notin notin \to to""")
_SEPARATORS = dict.fromkeys([",", ";", "\\newline"], "")
_SEPARATORS |= pairs("and and \\land and \\wedge and or or \\lor or \\vee or")
_SET_SIGNS = pairs("\\cup \\cup U \\cup \\cap \\cap \\setminus \\setminus \\backslash \\setminus")
_SUM_SIGNS = {"+", "-", "\\pm", "\\mp"}
_CURRENCIES = {"\\usd", "\\eur", "\\gbp", "\\cny"}
_CLOSERS = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "\\{": ("\\}",)}
_CLOSERS["\\langle"] = ("\\rangle",)
_FENCES = {"\\{\\}": "{}", "\\langle\\rangle": "()"}
_ENDS = {*_SEPARATORS, *_RELATIONS, ")", "]", "}", "\\}", "\\rangle", ".", "\\deg", ""}
_NO_PROSE = {*FUNCTIONS, *_ENDS}
_EMPTY = Node("seq", ("{", "}", ""))
_CONSTANTS = {"pi": Node("c", "pi")}
_CONSTANTS |= dict.fromkeys("infinity inf oo infty".split(), Node("c", "inf"))
_SYMBOLS = _CONSTANTS | {"emptyset": _EMPTY, "varnothing": _EMPTY}
_SYMBOLS |= {c: Node("w", w) for c, w in pairs("R reals Z integers N naturals Q rationals").items()}
_ATOMS = "frac sqrt binom dbinom tbinom pi infty begin { R Z N Q lfloor lceil".split()
_ATOMS = {
    "\\" + name for name in {*_ATOMS, *_SYMBOLS, *SERIES, *FUNCTIONS, *_GREEK, "max", "min"}
} | _CURRENCIES
_TEMPERATURES = {c: (Fraction(1), (("deg" + c, 1),)) for c in "CF"}
_POSTFIX = {"!", "%", "\\deg", "\\degC", "\\degF", "'"}


def tokenize(s: str, thousands: bool = True) -> list[str]:
    """Without `thousands`, 1,234 are two numbers."""
    if len(s) > MAX_CHARS:
        fail("too long")
    tokens = []
    for m in _TOKEN.finditer(s):
        kind, text = m.lastgroup, m[0]
        if kind == "bad":
            fail(f"unknown sign {text!r}")
        if kind == "num" and not thousands and ("," in text or " " in text):
            tokens += re.findall(r"\d+(?:\.\d+)?|,", text)
        elif kind != "sp":
            tokens.append(text)
        if len(tokens) > MAX_TOKENS or (kind == "num" and len(text) > MAX_DIGITS):
            fail("too many tokens or digits")
    return tokens


def is_number(token: str) -> bool:
    return token[:1].isdigit() or token[:1] == "."


def fail(why: str):
    raise Unparsable(why)


# ---- 2. parts of trees -------------------------------------------------------------------------
def num(value: int | Fraction, place: Fraction | None = None) -> Node:
    """An exact number; place is the unit of its last decimal place if it was written so."""
    return Node("n", (value, place))


def number(text: str) -> Node:
    """A literal: 5, 1,234.5, .5, 1e-3."""
    text = text.replace(",", "").replace(" ", "")
    if text.isdigit():
        return num(int(text))
    mantissa, _, exponent = text.lower().partition("e")
    value, decimals = Fraction(text), len(mantissa.partition(".")[2])
    place = Fraction(10) ** (int(exponent or 0) - decimals) if decimals else None
    return num(int(value) if value.denominator == 1 else value, place)


def negate(a: Node) -> Node:
    if a.tag == "n":
        return num(-a.data[0], a.data[1])
    if a.tag == "q":
        return Node("q", a.data, (negate(a.kids[0]),))
    return Node("*", None, (num(-1), a))


def times(a: Node, b: Node) -> Node:
    return Node("*", None, (a.kids if a.tag == "*" else (a,)) + (b,))


def letter(c: str) -> Node:
    return Node("c" if c in ("e", "i") else "v", c)


def parts(node: Node) -> list[Node]:
    """All nodes of a tree."""
    found = [node]
    for part in found:  # the list grows while it is read
        found += part.kids
    return found


def variables(node: Node) -> set[str]:
    """Names of the free variables of a tree."""
    return {part.data for part in parts(node) if part.tag == "v"}


# ---- 3. the parser -----------------------------------------------------------------------------
class Parser:
    """Recursive descent; one method per level of precedence, loosest first, returns a Node."""

    def __init__(self, tokens):
        self.texts = tokens + [""] * 4
        self.i = self.depth = self.bars = 0  # next token, nesting, open |

    def take(self, *texts):
        """The next token if it is one of these; the end is "", which nobody asks for."""
        text = self.texts[self.i]
        if text in texts:
            self.i += 1
            return text
        return None

    def need(self, *texts):
        found = self.texts[self.i] or "the end"
        return self.take(*texts) or fail(f"expected {' or '.join(texts)}, found {found!r}")

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
        return node if not self.texts[self.i] else fail(f"cannot read {self.texts[self.i]!r}")

    def items(self, opener=""):
        """Relations separated by commas, "and", "or"; one item without brackets is itself."""
        out, word, groups = [self.relation()], "", []
        while (separator := self.texts[self.i]) in _SEPARATORS:
            self.i += 1
            if separator in (",", ";"):
                separator = self.take("and", "or") or separator  # "1, 2, and 3"
            if not self.texts[self.i]:
                break
            if separator == ";":
                groups, out = [*groups, out], []
            kind = _SEPARATORS[separator]
            word = "or" if "or" in (word, kind) else word or kind
            out.append(self.relation())
        groups.append(out)
        if groups[1:] and {*map(len, groups)} == {len(out)} != {1}:  # p=5, q=2; p=7, q=2
            out = [Node("seq", ("(", ")", ""), tuple(group)) for group in groups]
        else:
            out = sum(groups, [])
        if not opener:
            return out[0] if len(out) == 1 else Node("seq", ("", "", word), tuple(out))
        fence = opener + self.need(*_CLOSERS[opener])
        return Node("seq", (*_FENCES.get(fence, fence), word), tuple(out))

    def relation(self):
        label = self.label()
        nodes, ops = ([Node("v", label)], ["="]) if label else ([], [])
        nodes.append(self.union())
        while op := _RELATIONS.get(self.texts[self.i]):
            self.i += 1
            ops.append(op)
            nodes.append(self.union())
        if self.take("\\pmod"):  # of both sides
            modulus = self.atom()
            nodes = [Node("f", "mod", (node, modulus)) for node in nodes]
        return Node("rel", tuple(ops), tuple(nodes)) if ops else nodes[0]

    def label(self):
        """The words before the sign in "Area = 5 cm^2" and "range: [0, 1]", else None."""
        j = self.i
        while self.texts[j].isalpha() and len(self.texts[j]) > 1 and self.texts[j] not in FUNCTIONS:
            j += 1
        ratio = self.texts[j] == ":" and self.texts[self.i].isupper()  # AB : BC
        if j == self.i or self.texts[j] not in ("=", ":", "\\approx") or ratio:
            return None
        label = " ".join(self.texts[self.i : j])
        if self.texts[j] == ":" and NO_NOUN & {*label.lower().split()}:
            fail("no label")  # "not: 5", "lambda: 5"
        self.i = j + 1
        self.take("=")
        return label if len(label) < 4 else LABEL + label.lower()

    def union(self):
        node, n = self.ratio(), 0
        while n < MAX_DEPTH and (op := _SET_SIGNS.get(self.texts[self.i])):
            self.i, n = self.i + 1, n + 1
            node = Node("set", op, (node, self.ratio()))
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.texts[self.i] == ":" and self.texts[self.i + 1] and len(parts) < 9:
            self.i += 1
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        return Node("/" if len(parts) == 2 else "ratio", None, tuple(parts))

    def sum(self):
        terms = []
        while not terms or self.texts[self.i] in _SUM_SIGNS:
            sign, plus_minus = 1, 0
            while (op := self.texts[self.i]) in _SUM_SIGNS:
                self.i += 1
                sign = -sign if op == "-" else sign
                plus_minus = {"\\pm": 1, "\\mp": -1}.get(op, plus_minus)
            term = self.quantity()
            term = Node("pm", plus_minus, (term,)) if plus_minus else term
            if sign < 0 and not terms and term[:2] == ("f", "mod"):  # -1 mod 4 is 3
                term, sign = Node("f", "mod", (negate(term.kids[0]), term.kids[1])), 1
            if sign < 0 and terms and (terms[0].tag == "w" or terms[0].data == _EMPTY.data):
                return Node("set", "\\setminus", (terms[0], term))  # {1, 2} - {2}
            terms.append(negate(term) if sign < 0 else term)
        return terms[0] if len(terms) == 1 else Node("+", None, tuple(terms))

    def quantity(self):
        """A product; 3 hours 20 minutes and 3 hours and 20 minutes are one quantity."""
        node = self.term()
        while node.tag == "q":
            start, joined = self.i, self.texts[self.i] == "and"
            number_next = is_number(self.texts[self.i + joined])
            if not number_next or (joined and self.texts[self.i + 2] not in UNITS):
                break
            self.i += joined
            more = self.term()
            if more.tag != "q" or more.data[1] != node.data[1] or more.data[0] >= node.data[0]:
                self.i = start if joined else fail("two numbers side by side")
                break
            first = times(num(node.data[0] / more.data[0]), node.kids[0])
            node = Node("q", more.data, (Node("+", None, (first, more.kids[0])),))
        return node

    def term(self):
        node, n = self.power(), 0
        while text := self.texts[self.i]:
            if text in ("*", "\\cdot", "\\times", "\\ast"):
                self.i += 1
                node = times(node, self.signed())
            elif n < MAX_DEPTH and text in ("/", "\\div"):
                self.i, n = self.i + 1, n + 1
                node = Node("/", None, (node, self.signed()))
            elif self.take("\\bmod"):
                node = Node("f", "mod", (node, self.signed()))
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
        text = self.texts[self.i]
        if text.isalpha():
            return text not in ("and", "or") and not (text == "U" and left.tag in ("seq", "set"))
        if is_number(text):  # (2)3 and \sqrt{2} 3, but neither 5 6 nor x 2
            power = self.texts[self.i - 2] == self.texts[self.i + 1] == "^"  # 2^6 3^5
            return power or self.texts[self.i - 1] in (")", "}", "]", "!")
        if text[:1] == "\\":
            return text in _ATOMS
        return text in ("(", "[", "{") or (text == "|" and not self.bars)

    def power(self, mixed=True):
        node = self.postfix(self.atom(mixed))
        if not self.take("^"):
            return node
        return self.postfix(Node("^", None, (node, self.deeper(self.signed, False))))

    def postfix(self, node):
        for _ in range(4):
            op = self.texts[self.i]
            if op not in _POSTFIX:
                break
            self.i += 1
            if op == "'":
                node = Node("v", node.data + "'") if node.tag == "v" else fail("stray '")
            elif op == "!":
                node = Node("f", "factorial", (node,))
            else:
                scale = op[4:]  # of \degC
                if op == "\\deg" and self.texts[self.i + 1] in _ENDS:
                    scale = self.take("C", "F", "T", "E")  # T and E belong to bearings
                unit = PERCENT if op == "%" else _TEMPERATURES.get(scale, DEGREE)
                node = Node("q", unit, (node,))
        return node

    def atom(self, mixed=True):
        return self.deeper(self.any_atom, mixed)

    def any_atom(self, mixed):
        text = self.texts[self.i]
        self.i += 1
        if is_number(text):
            if self.texts[self.i] == "_":  # 1101_2, in another base: a name
                return Node("v", text + self.subscript())
            return self.mixed(number(text)) if mixed else number(text)
        if text.isalpha():
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
            self.command(text) if text[:1] == "\\" else fail(f"cannot read {text or 'nothing'!r}")
        )

    def bracket(self, opener):
        """(expr) is expr; several items stay a sequence; {x | x > 5} is its condition."""
        if opener == "\\{" and self.take("\\}"):
            return _EMPTY
        k = self.i + (3 if self.texts[self.i + 1] == "\\in" else 1)
        if "{" in opener and self.texts[self.i].isalpha() and self.texts[k] in ("|", ":"):
            self.i = k + 1
            node = self.items()
            self.need(*_CLOSERS[opener])
            return node
        seq = self.items(opener)
        alike = seq.data[0] + seq.data[1] in ("()", "[]") or opener == "{"
        return seq.kids[0] if len(seq.kids) == 1 and alike else seq

    def mixed(self, node):
        """6\\frac12 and 6 1/2 are six and a half."""
        whole, slash = node.data[0], self.texts[self.i + 1] == "/"
        if not self.texts[self.i - 1].isdigit():
            return node
        top, bottom = self.texts[self.i], self.texts[self.i + 2]
        if slash and top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom):
            self.i += 3
            return num(whole + Fraction(int(top), int(bottom)))
        if not self.take("\\frac"):
            return node
        part = self.command("\\frac")
        top, bottom = (k.data[0] if k.tag == "n" else None for k in part.kids)
        proper = isinstance(top, int) and isinstance(bottom, int) and 0 <= top < bottom
        return num(whole + Fraction(top, bottom)) if proper else times(node, part)

    def word(self, w):
        low, following = w.lower(), self.texts[self.i]
        if w in FUNCTIONS or (low in FUNCTIONS and len(w) > 2):
            return self.function(FUNCTIONS[low])
        if low == "sqrt":
            return self.command("\\sqrt")
        if low in _CONSTANTS:
            return _CONSTANTS[low]
        if w in UNITS and len(w) > 2 and is_number(following):  # USD 5
            return Node("q", UNITS[w], (self.postfix(self.atom()),))
        if len(w) == 1:
            return letter(w) if w in "ei" else Node("v", w + self.subscript())
        if w.isupper() and len(w) <= 4:  # a segment, an angle: AB, ABC
            return Node("v", w)
        prose = following.isalpha() and len(following) > 1 and following not in _NO_PROSE
        if len(w) > 3 or not w.islower() or prose:
            fail(f"unknown word {w!r}")
        if following in ("^", "_", "'", "!"):  # xy^2 is x times y^2
            self.i -= 1
            self.texts[self.i] = w[-1]
            w = w[:-1]
        return Node("*", None, tuple(map(letter, w))) if len(w) > 1 else letter(w)

    def subscript(self):
        if not self.take("_"):
            return ""
        text, braced = "_", self.take("{")
        while self.texts[self.i] not in ("}", "") and len(text) < 20 and (braced or text == "_"):
            text += self.texts[self.i]
            self.i += 1
        if braced:
            self.need("}")
        return text

    def function(self, name):
        base = self.argument() if name == "log" and self.take("_") else None
        exponent = None
        if self.take("^"):
            exponent = negate(self.power()) if self.take("-") else self.postfix(self.atom())
        if self.texts[self.i] in ("(", "[", "{", "\\{"):
            arg = self.atom()
            args = arg.kids if arg.tag == "seq" and arg.data[2] != "matrix" else (arg,)
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
            text = self.texts[self.i]
            if text in ("(", "[") or text.lstrip("\\") in FUNCTIONS:
                break
            arg = times(arg, self.power())
        return arg

    def argument(self):
        """One LaTeX argument: a group, a digit, or one atom. \\frac12 has two of one digit."""
        text = self.texts[self.i]
        if len(text) > 1 and text.isdigit():
            self.texts[self.i] = text[1:]
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
        if name in FUNCTIONS or name in ("max", "min"):  # the words max and min are a program
            return self.function(FUNCTIONS.get(name, name))
        if name in ("lfloor", "lceil"):
            arg = self.sum()
            self.need("\\r" + name[1:])
            return Node("f", name[1:], (arg,))
        if name in SERIES:  # \sum_{k=1}^{n} of a product
            bounds = [self.argument() if self.take(sign) else num(0) for sign in "_^"]
            return Node("f", name, (*bounds, self.deeper(self.term)))
        if name in _SYMBOLS:
            return _SYMBOLS[name]
        if name in _GREEK:
            if name == "Delta" and len(self.texts[self.i]) == 1 and self.texts[self.i].isalpha():
                name, self.i = f"{name} {self.texts[self.i]}", self.i + 1  # a difference of x
            return Node("v", name + self.subscript())
        if command in _CURRENCIES:
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
        rows = tuple(Node("seq", ("[", "]", ""), tuple(row)) for row in rows if row)
        return Node("seq", ("[", "]", "matrix"), rows)

    def unit(self, left, peek=False):
        """(factor, dimensions) of a unit that ends the item, as cm, m^2, km/h, "apples", else None.

        Only a unit is consumed, and with `peek` not even that."""
        start = self.i
        unit = self.any_unit(not variables(left))
        if peek or unit is None:
            self.i = start
        return unit

    def any_unit(self, numeric):
        text = self.texts[self.i]
        if text in _CURRENCIES and self.texts[self.i + 1] in _ENDS:  # 1,000.99$
            self.i += 1
            return UNITS[text[1:]]
        short = len(text) < 3 and unit_key(text) not in UNITS and text not in POWER_WORDS
        if short or text in SCALES or text == "and" or text.lower() in FUNCTIONS:
            return None
        factor, dims, sign, nouns = Fraction(1), Counter(), 1, 0
        for _ in range(MAX_UNITS):
            part = self.unit_part(numeric)
            if part is None:
                return None
            (scale, base), power, known = part
            factor, nouns = factor * scale ** (power * sign), nouns + (not known)
            for name, p in base:
                dims[name] += p * power * sign
            text = self.texts[self.i]
            if text in _ENDS or (is_number(text) and known):
                return (factor, tuple(sorted(dims.items()))) if nouns < 3 else None  # no sentence
            if self.texts[self.i + 1].isalpha() and self.take("/", "per", "a"):
                sign = -1
            elif self.texts[self.i + 1].isalpha() and self.take("*", "\\cdot"):
                continue
            elif not text.isalpha():
                return None
        return None

    def unit_part(self, numeric):
        """(unit, power, is it a known one) of one name with its power, else None."""
        power = 1
        while word := self.take("sq", "square", "cu", "cubic"):
            power = POWER_WORDS[word]
        text = self.texts[self.i]
        known = unit_key(text) in UNITS and (len(text) > 1 or numeric)
        noun = len(text) > 2 and not text.isupper() and text.lower() not in NO_NOUN
        if not text.isalpha() or not (known or noun):
            return None
        if known:
            unit = UNITS[unit_key(text)]
        else:  # 5 apples: a noun counts as a unit
            unit = Fraction(1), ((re.sub(r"(?<=..)(?:s|\Bes)$", "", text.lower()), 1),)
        self.i += 1
        if word := self.take("squared", "cubed"):
            power = POWER_WORDS[word]
        elif self.texts[self.i] == "^":
            following = "".join(self.texts[self.i : self.i + 5])
            m = re.match(r"\^(\{?)(-?[1-3])(?!\d)(\}?)", following)
            if not m or len(m[1]) != len(m[3]):
                return None
            power, self.i = int(m[2]), self.i + len(m[0])
        return unit, power, known


@lru_cache(maxsize=8192)
def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a cleaned text; raises Unparsable."""
    return Parser(tokenize(text, thousands)).whole()
