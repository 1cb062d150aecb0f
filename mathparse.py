"""mathparse.py: from the text of an answer to a small tree, and from the tree to numbers.

A tokenizer and a recursive-descent parser for what answers to school and competition mathematics hold: LaTeX and
plain text, units, lists, intervals, matrices, relations. Nothing that was read is ever evaluated as code: the parser
knows an allow-list of names and fails (`Unparsable`) on everything else. It is bounded by construction: length, number
of tokens, nesting, digits and exponents all have limits, so that a call costs milliseconds whatever a model wrote.

Algebra needs no computer algebra system here: two expressions are equal if they agree at fixed random points
(Schwartz-Zippel), which is fast, and cannot hang. Trees are plain tuples whose first item says what they are:
  ("n", value, ulp)  number; ulp = unit of the last decimal place when written as a decimal, else None
  ("v", name)  ("c", "pi"|"e"|"i"|"inf")  ("+", terms)  ("*", factors)  ("/", a, b)  ("^", a, b)  ("pm", a, sign)
  ("f", name, args)  ("q", a, unit) quantity with a unit  ("seq", open, close, items, word)  ("mat", rows)
  ("rel", operands, operators)  ("set", operator, a, b)  ("w", name) the reals, the empty set  ("ratio", parts)
"""
import cmath, math, re, unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS, MAX_BITS = 2000, 600, 40, 400, 16384


class Unparsable(ValueError):
    """The text is no mathematics that this parser knows, or it is larger than its limits."""


# ---- 1. cleaning: Unicode and LaTeX spellings become one spelling ----------------------------------------------------
_CHARS = {ord(k): v for k, v in {
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-",
    "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "°": "^\\circ ", "º": "^\\circ ", "˚": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F",
    "≤": "\\le ", "≦": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "≧": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≃": "\\approx ",
    "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\R ", "θ": "\\theta ",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ", "μ": "\\mu ", "∠": "", "△": "",
    "。": ".", "、": ",", "《": "", "》": "", "“": '"', "”": '"', "‘": "'", "’": "'", "′": "'", "″": '"', "【": "(", "】": ")",
    "⟨": "\\langle ", "⟩": "\\rangle ", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2061": "", "\u2062": "", "\u2063": ",",
    "€": "\\eur ", "£": "\\gbp ", "¥": "\\cny ", "￥": "\\cny ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    "∣": "|", "∶": ":", "～": "~", "∼": "~", "∛": "\\sqrt[3]"}.items()}
_SUP = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CJK = {"平方": " square ", "立方": " cubic ", "厘米": " cm ", "毫米": " mm ", "千米": " km ", "公里": " km ", "分米": " dm ", "米": " m ",
        "千克": " kg ", "公斤": " kg ", "克": " g ", "吨": " ton ", "毫升": " ml ", "升": " L ", "分钟": " minutes ", "小时": " hours ",
        "秒": " seconds ", "天": " days ", "度": "^\\circ ", "元": " yuan ", "和": " and ", "或": " or ", "且": " and "}
_CJK_RE = re.compile("|".join(_CJK))
_CJK_COUNT = re.compile(r"(?<=[\d}])\s*[个個人只件次岁条名种棵本张位块辆支组](?=\s*$)")
_WRAP = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|cal|normal)|mbox|hbox|operatorname|boldsymbol|bm|pmb"
                   r"|overline|overrightarrow|vec|hat|underline|widehat|mathop)\*?\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;: >]|\\q?quad(?![A-Za-z])|~|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|rm|bf|it"
                      r"|textdegree(?=\s*\\circ))(?![A-Za-z])")
_ENV = re.compile(r"\\begin\{[a-zA-Z]*matrix\}|\\begin\{array\}")
_SPELLINGS = [(re.compile(p), r) for p, r in (
    (r"\\!", ""), (r"\{,\}", ","), (r"\\(?:boxed|fbox)(?![A-Za-z])", ""), (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\\1 "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\^\s*\{\s*\\(?:circ|degree|textdegree)\s*\}|\^\s*\\(?:circ|degree)|\\(?:degree|textdegree)(?![A-Za-z])", r"\\deg "),
    (r"\\(?:lt|gt)(?![A-Za-z])", lambda m: "<" if "l" in m[0] else ">"), (r"\\%", "%"), (r"\\#", "#"), (r"\\_", "_"), (r"\\&", "and"))]
_REPEAT = re.compile(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")


def _repeating(m):
    """0.1\\overline{6} -> a fraction, before \\overline is dropped as decoration."""
    head, fixed, loop = m[1] or "0", m[2], m[3]
    if len(head + fixed + loop) > 60:
        return m[0]
    den = 10 ** len(fixed) * (10 ** len(loop) - 1)
    return f"({(int(head + fixed + loop) - int(head + fixed))}/{den})"


def unicode_plain(s):
    """Full-width forms, super- and subscripts, vulgar fractions, Chinese units and typographic signs to ASCII LaTeX."""
    if s.isascii():
        return s
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ]+", lambda m: "^{" + m[0].translate(_SUP) + "}", s)
    s = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUB) + "}", s)
    s = re.sub("[¼-¾⅐-⅞]", lambda m: "\\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")), s)
    s = unicodedata.normalize("NFKC", s.translate(_CHARS)).translate(_CHARS)
    return s if s.isascii() else _CJK_RE.sub(lambda m: _CJK[m[0]], _CJK_COUNT.sub("", s))


@lru_cache(maxsize=8192)
def clean(s):
    """One spelling for what LaTeX and Unicode can write in many ways. Still text; linear in its length."""
    s = unicode_plain(s.replace("\x00", " "))
    if "\\" in s:
        s = s.replace("\\\\", "\\newline ") if _ENV.search(s) else re.sub(r"\\\\(?=[a-zA-Z])", r"\\", s).replace("\\\\", " ")
        if "$" in s:
            s = s.replace("\\$", "\\usd ")
        if "\\overline" in s:
            s = _REPEAT.sub(_repeating, s)
        s = _SPACING.sub(" ", re.sub(r"\\[()\[\]]", " ", s))
        for pattern, repl in _SPELLINGS:
            s = pattern.sub(repl, s)
        for _ in range(3):  # \text{a \textbf{b}} nests a little
            if (t := _WRAP.sub(r" \1 ", s)) == s:
                break
            s = t
    if "$" in s:  # one dollar sign before a number is money, the others delimit mathematics
        s = re.sub(r"\$\s*(?=[\d.])", r"\\usd ", s) if s.count("$") == 1 else s.replace("$", " ")
    return s.replace("**", "^").strip() if re.search(r"\w\s*\*\*\s*[\w({-]", s) else s.replace("**", "").strip()


# ---- 2. units --------------------------------------------------------------------------------------------------------
_UNIT_TABLE = """m 1 m meter meters metre metres|cm .01 m centimeter centimeters centimetre centimetres|mm .001 m millimeter millimeters millimetre millimetres
km 1000 m kilometer kilometers kilometre kilometres|dm .1 m decimeter decimeters decimetre decimetres|nm 1e-9 m|inch .0254 m inches in|foot .3048 m feet ft
yard .9144 m yards yd yds|mile 1609.344 m miles mi|g 1 g gram grams|kg 1000 g kilogram kilograms kilo kilos|mg .001 g milligram milligrams|ton 1000000 g tons tonne tonnes
lb 453.59237 g lbs|oz 28.349523125 g ounce ounces|s 1 s sec secs second seconds|min 60 s mins minute minutes|h 3600 s hr hrs hour hours|day 86400 s days
week 604800 s weeks|month 1 month months|year 1 year years yr yrs|ms .001 s millisecond milliseconds|deg 1 deg degree degrees|rad 1 rad radian radians
usd 1 usd dollar dollars bucks|cent .01 usd cents|eur 1 eur euro euros|gbp 1 gbp|cny 1 cny yuan rmb|pound 1 pound pounds|rupee 1 rupee rupees|N 1 N newton newtons|J 1 J joule joules|W 1 W watt watts
V 1 V volt volts|Hz 1 Hz hertz|Pa 1 Pa pascal pascals|kPa 1000 Pa|kJ 1000 J|kW 1000 W|mol 1 mol mole moles|acre 1 acre acres|percent 1 % percentage|unit 1 unit units"""
UNITS = {name: (Fraction(f), ((base, 1),)) for row in re.split(r"[|\n]", _UNIT_TABLE)
         for first, f, base, *more in [row.split()] for name in (first, *more)}
UNITS |= {"L": (Fraction(1, 1000), (("m", 3),)), "ml": (Fraction(1, 10**6), (("m", 3),)), "mph": (Fraction("0.44704"), (("m", 1), ("s", -1))),
          "kph": (Fraction(5, 18), (("m", 1), ("s", -1))), "kmph": (Fraction(5, 18), (("m", 1), ("s", -1))), "hectare": (Fraction(10000), (("m", 2),))}
UNITS |= {k: UNITS["L"] for k in ("liter", "liters", "litre", "litres")} | {k: UNITS["ml"] for k in ("mL", "milliliter", "milliliters", "millilitres", "cc")}
UNITS |= {"ha": UNITS["hectare"], "hectares": UNITS["hectare"], "sq": None, "square": None, "cubic": None, "cu": None}
_POWER_WORDS = {"sq": 2, "square": 2, "squared": 2, "cu": 3, "cubic": 3, "cubed": 3}
_NO_NOUN = set("is are was not or and but to than of for with from least most more less about maybe if then at by up down wrong correct minus plus times".split())
DEGREE, PERCENT = UNITS["deg"], UNITS["percent"]
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# ---- 3. tokens -------------------------------------------------------------------------------------------------------
_TOKEN = re.compile(r"(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)"
                    r"|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<op><=|>=|!=|/=|==|[-+*/^_=<>()\[\]{},;:!%|'&#~])|(?P<sp>\s+)|(?P<bad>.)", re.S)
_PLAIN_NUM = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?")
FUNCTIONS = {n: n for n in "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log lg exp max min gcd lcm abs floor ceil".split()}
FUNCTIONS |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan"}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega ell "
            "Gamma Delta Theta Lambda Sigma Phi Psi Omega".split())
RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "/=": "!=", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
             "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\ne": "!=", "\\neq": "!=", "\\approx": "~", "\\in": "in", "\\equiv": "=",
             "\\simeq": "~", "\\doteq": "~", "~": "~", "\\sim": "~", "\\cong": "~"}
_CLOSERS = {")", "]", "}", "\\}", "\\rangle", ">"}
_ENDS = {",", ";", "and", "or", "\\text"} | _CLOSERS | set(RELATIONS)


def tokenize(s, thousands=True):
    """Text -> list of (kind, text). thousands=False reads 1,234 as two numbers."""
    if len(s) > MAX_CHARS:
        raise Unparsable("too long")
    toks = []
    for m in _TOKEN.finditer(s):
        kind, text = m.lastgroup, m[0]
        if kind == "sp":
            continue
        if kind == "bad":
            raise Unparsable(f"unknown sign {text!r}")
        if kind == "num" and not thousands and ("," in text or " " in text):
            toks += [("num", t) if t[0].isdigit() else ("op", ",") for t in re.findall(r"\d+(?:\.\d+)?|,", text)]
        else:
            toks.append((kind, text))
        if len(toks) > MAX_TOKENS or (kind == "num" and len(text) > MAX_DIGITS):
            raise Unparsable("too many tokens or digits")
    return toks


def number(text):
    """Literal -> ("n", exact value, ulp)."""
    text = text.replace(",", "").replace(" ", "")
    if text.isdigit():
        return ("n", int(text), None)
    mantissa, _, exp = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    ulp = Fraction(10) ** (int(exp or 0) - decimals)
    value = Fraction(mantissa.rstrip(".") if mantissa != "." else "x") * Fraction(10) ** int(exp or 0)
    return ("n", int(value) if value.denominator == 1 else value, ulp if decimals else None)


# ---- 4. parser -------------------------------------------------------------------------------------------------------
class Parser:
    """Recursive descent; one method per level of precedence. Every method returns a tuple tree."""

    def __init__(self, toks):
        self.toks, self.i, self.depth, self.bars = toks + [("end", "")] * 3, 0, 0, 0

    def at(self, *texts):
        return self.toks[self.i][1] in texts and self.toks[self.i][0] != "end"

    def take(self, *texts):
        if self.at(*texts):
            self.i += 1
            return self.toks[self.i - 1][1]
        return None

    def need(self, *texts):
        return self.take(*texts) or self.fail(f"expected {' or '.join(texts)}, found {self.toks[self.i][1] or 'the end'!r}")

    def fail(self, why):
        raise Unparsable(why)

    def whole(self):
        self.take("=")  # "= 5"
        node = self.items()
        while self.take(".", "\\newline", ";", ":"):
            pass
        return node if self.toks[self.i][0] == "end" else self.fail(f"cannot read {self.toks[self.i][1]!r}")

    def items(self, opener="", closers=()):
        """Relations separated by commas, "and", "or"; one item without brackets is itself."""
        out, word = [self.relation()], ""
        while sep := self.take(",", ";", "and", "or", "\\lor", "\\land", "\\vee", "\\wedge", "\\newline"):
            if sep in (",", ";") and (also := self.take("and", "or")):  # "1, 2, and 3"
                sep = also
            if self.at("=") or self.toks[self.i][0] == "end":
                break
            word = "or" if sep in ("or", "\\lor", "\\vee") else word or ("and" if sep == "and" else "")
            out.append(self.relation())
        if opener:
            return ("seq", opener, self.need(*closers), tuple(out), word)
        return out[0] if len(out) == 1 else ("seq", "", "", tuple(out), word)

    def relation(self):
        label, j = [], self.i
        while self.toks[j][0] == "word" and len(self.toks[j][1]) > 1 and self.toks[j][1] not in FUNCTIONS:
            label.append(self.toks[j][1].lower())
            j += 1
        if label and self.toks[j][1] in ("=", ":", "is", "\\approx"):  # "Area = 5 cm^2", "range: [0, 1]"
            name = "".join(self.toks[k][1] for k in range(self.i, j)) if len(label) == 1 and len(label[0]) < 4 else " ".join(label)
            self.i = j + 1
            if self.toks[j][1] == ":":
                self.take("=")
            nodes, ops = [("v", name)], ["="]
            nodes.append(self.union())
        else:
            nodes, ops = [self.union()], []
        while (rel := RELATIONS.get(self.toks[self.i][1])) and not (self.at(">") and self.depth < 0):
            self.i += 1
            ops.append(rel)
            nodes.append(self.union())
        return ("rel", tuple(nodes), tuple(ops)) if ops else nodes[0]

    def union(self):
        node = self.ratio()
        while op := self.take("\\cup", "\\cap", "\\setminus", "\\backslash", "U"):
            node = ("set", "\\setminus" if op == "\\backslash" else "\\cup" if op == "U" else op, node, self.ratio())
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.at(":") and self.toks[self.i + 1][0] != "end" and len(parts) < 9:
            self.i += 1
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", tuple(parts))

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail("nested too deeply")
        terms, first = [], True
        while first or self.at("+", "-", "\\pm", "\\mp"):
            sign = 1
            op = None
            while s := self.take("+", "-", "\\pm", "\\mp"):
                if op:  # "+ -3", "- -3" but no longer runs
                    sign *= -1 if op == "-" else 1
                op = s
                if not first and len(terms) > MAX_TOKENS:
                    self.fail("too long")
            term = self.term()
            if op == "-":
                sign = -sign
            if op in ("\\pm", "\\mp"):
                term = ("pm", term, 1 if op == "\\pm" else -1)
            terms.append(negate(term) if sign < 0 else term)
            first = False
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", tuple(terms))

    def term(self):
        node = self.power()
        while True:
            if self.take("*", "\\cdot", "\\times", "\\ast"):
                node = times(node, self.signed())
            elif self.take("/", "\\div"):
                node = ("/", node, self.signed())
            elif unit := self.unit(node):
                node = ("q", node, unit)
            elif self.toks[self.i][1] in SCALES and not variables(node):
                node = times(node, ("n", SCALES[self.toks[self.i][1]], None))
                self.i += 1
            elif self.starts_factor(node):
                node = times(node, self.power())
            else:
                return node

    def signed(self):
        if self.take("-"):
            return negate(self.power())
        self.take("+")
        return self.power()

    def starts_factor(self, left):
        kind, text = self.toks[self.i]
        if kind == "word":
            return text not in ("and", "or") and not (text == "U" and left[0] in ("seq", "set"))
        if kind == "cmd":
            return text in _ATOM_COMMANDS or text[1:] in FUNCTIONS or text[1:] in GREEK
        if kind == "num":  # (2)3 and \sqrt{2} 3, but neither 5 6 nor x 2
            return self.toks[self.i - 1][1] in (")", "}", "]")
        return text in ("(", "[", "{")

    def power(self, mixed=True):
        node = self.postfix(self.atom(mixed))
        if self.take("^"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.fail("nested too deeply")
            sign = -1 if self.take("-") else 1
            exponent = self.power(mixed=False)
            self.depth -= 1
            node = self.postfix(("^", node, negate(exponent) if sign < 0 else exponent))
        return node

    def postfix(self, node):
        while op := self.take("!", "%", "\\deg", "'"):
            if op == "!":
                node = ("f", "factorial", (node,))
            elif op == "%":
                node = ("q", node, PERCENT)
            elif op == "\\deg":
                tail = self.toks[self.i][1] if self.toks[self.i + 1][0] == "end" or self.toks[self.i + 1][1] in _ENDS else ""
                if tail in ("C", "F", "T", "E"):  # Celsius, Fahrenheit, a true bearing
                    self.i += 1
                node = ("q", node, (Fraction(1), (("deg" + tail, 1),)) if tail in ("C", "F") else DEGREE)
            elif node[0] == "v":
                node = ("v", node[1] + "'")
            else:
                self.fail("stray '")
        return node

    def atom(self, mixed=True):
        kind, text = self.toks[self.i]
        self.i += 1
        if kind == "num":
            return self.mixed(number(text)) if mixed else number(text)
        if kind == "word":
            return self.word(text)
        if text in ("(", "["):
            return group(self.items(text, (")", "]")))
        if text == "{":
            node = self.items("{", ("}",))
            return node[3][0] if len(node[3]) == 1 else node
        if text == "\\{":
            node = ("seq", "{", "}", (), "") if self.at("\\}") else self.items()
            if self.take("|", "\\mid"):  # {x | x > 5} is what its condition says
                node = self.items()
                self.need("\\}")
                return node
            self.need("\\}")
            return node if node[0] == "seq" and node[1] == "{" and not node[3] else ("seq", "{", "}", node[3] if node[0] == "seq" and not node[1] else (node,), "")
        if text in ("|", "\\lvert", "\\vert") and self.bars < 3:
            self.bars += 1
            node = self.sum()
            self.need("|", "\\rvert", "\\vert")
            self.bars -= 1
            return ("f", "abs", (node,))
        if kind == "cmd":
            return self.command(text)
        return self.fail(f"cannot read {text or 'an empty answer'!r}")

    def mixed(self, node):
        """6\\frac12 and 6 1/2 are six and a half."""
        (_, a), (k2, b), (_, c) = self.toks[self.i - 1], self.toks[self.i], self.toks[self.i + 1]
        if not isinstance(node[1], int) or node[2] is not None:
            return node
        if b == "\\frac":
            self.i += 1
            frac = self.command("\\frac")
            if frac[1][0] == frac[2][0] == "n" and isinstance(frac[1][1], int) and isinstance(frac[2][1], int) and 0 < frac[1][1] < frac[2][1] and a.isdigit():
                return ("n", node[1] + Fraction(frac[1][1], frac[2][1]), None)
            return times(node, frac)
        if k2 == "num" and c == "/" and self.toks[self.i + 2][0] == "num" and b.isdigit() and self.toks[self.i + 2][1].isdigit() and 0 < int(b) < int(self.toks[self.i + 2][1]):
            self.i += 3
            return ("n", node[1] + Fraction(int(b), int(self.toks[self.i - 1][1])), None)
        return node

    def word(self, w):
        low = w.lower()
        if w in FUNCTIONS or (low in FUNCTIONS and len(w) > 2):
            return self.function(FUNCTIONS[low])
        if low == "sqrt":
            return self.command("\\sqrt")
        if low in ("pi", "infinity", "inf", "oo", "infty"):
            return ("c", "pi" if low == "pi" else "inf")
        if w in ("e", "i"):
            return ("c", w)
        if w in UNITS and len(w) > 2 and self.toks[self.i][0] == "num":  # USD 5
            return ("q", self.postfix(self.atom()), UNITS[w] or self.fail(w))
        if len(w) == 1:
            return ("v", w + self.subscript())
        if w.isupper() and len(w) <= 4:  # a segment, an angle: AB, ABC
            return ("v", w)
        if len(w) <= 3 and w.islower():
            return ("*", tuple(("c", c) if c in "ei" else ("v", c) for c in w[:-1]) + ((("c", w[-1]) if w[-1] in "ei" else ("v", w[-1] + self.subscript())),))
        return self.fail(f"unknown word {w!r}")

    def subscript(self):
        if not self.take("_"):
            return ""
        if self.take("{"):
            text = ""
            while not self.at("}") and self.toks[self.i][0] != "end" and len(text) < 20:
                text += self.toks[self.i][1]
                self.i += 1
            self.need("}")
            return "_" + text
        self.i += 1
        return "_" + self.toks[self.i - 1][1]

    def function(self, name):
        base = exponent = None
        if name == "log" and self.take("_"):
            base = self.argument()
        if self.take("^"):
            exponent = negate(self.power()) if self.take("-") else self.postfix(self.atom())
        if self.at("(", "[", "{"):
            arg = self.atom()
            args = arg[3] if arg[0] == "seq" else (arg,)
        else:
            arg = self.power()
            while self.starts_factor(arg) and not self.at("(", "[") and self.toks[self.i][1].lstrip("\\") not in FUNCTIONS and not self.unit(arg, peek=True):
                arg = times(arg, self.power())
            args = (arg,)
        if base:
            args += (base,)
        if exponent == ("n", -1, None) and "arc" + name in FUNCTIONS:
            return ("f", "arc" + name, args)
        return ("^", ("f", name, args), exponent) if exponent else ("f", name, args)

    def argument(self):
        """One LaTeX argument: a group, a digit, or one atom. \\frac12 has two of one digit."""
        kind, text = self.toks[self.i]
        if kind == "num" and len(text) > 1 and text.isdigit():
            self.toks[self.i] = ("num", text[1:])
            return number(text[0])
        if self.take("-"):
            return negate(self.atom())
        return self.atom()

    def command(self, c):
        name = c[1:]
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name == "sqrt":
            index = ("n", 2, None)
            if self.take("["):
                index = self.sum()
                self.need("]")
            return ("^", self.atom(mixed=False), ("/", ("n", 1, None), index))
        if name in ("binom", "dbinom", "tbinom"):
            return ("f", "binom", (self.argument(), self.argument()))
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in ("pi", "infty"):
            return ("c", "pi" if name == "pi" else "inf")
        if name in GREEK:
            return ("v", name + self.subscript())
        if name in ("usd", "eur", "gbp", "cny"):
            return ("q", self.postfix(self.atom()), UNITS[name])
        if name == "R":
            return ("w", "reals")
        if name in ("emptyset", "varnothing"):
            return ("seq", "{", "}", (), "")
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("\\r" + name[1:])
            return ("f", name[1:], (node,))
        if name == "langle":
            return ("seq", "(", ")", self.items("<", ("\\rangle",))[3], "")
        if name == "begin":
            return self.matrix()
        return self.fail(f"unknown command {c!r}")

    def matrix(self):
        self.need("{")
        name = self.toks[self.i][1]
        self.i += 1
        self.need("}")
        if name == "array" and self.take("{"):
            while not self.take("}"):
                self.i += 1 if self.toks[self.i][0] != "end" else self.fail("unclosed array")
        rows = [[]]
        while not self.take("\\end"):
            if self.take("\\newline"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.sum())
        self.need("{"), self.need(name), self.need("}")
        return ("mat", tuple(tuple(r) for r in rows if r))

    def unit(self, left, peek=False):
        """A unit that ends the item: cm, m^2, km/h, square metres, "apples". None if there is none."""
        kind, text = self.toks[self.i]
        if kind != "word" or (text not in UNITS and len(text) < 3) or text in SCALES or text in ("and",) or text.lower() in FUNCTIONS:
            return None
        j, factor, dims, power, sign = self.i, Fraction(1), {}, 1, 1
        numeric = not variables(left)
        while True:
            kind, text = self.toks[j]
            if text in _POWER_WORDS and text[-1] != "d":
                power, j = _POWER_WORDS[text], j + 1
                continue
            if kind == "word" and text in UNITS and (len(text) > 1 or numeric):
                f, base = UNITS[text]
            elif kind == "word" and len(text) > 2 and text.lower() not in _NO_NOUN and text.lower() not in SCALES and len(dims) < 5:
                f, base = Fraction(1), ((re.sub(r"(?<=..)(?:s|\Bes)$", "", text.lower()), 1),)  # 5 apples: a noun counts as a unit
            else:
                return None
            j += 1
            if self.toks[j][1] == "^":
                k = j + 2 if self.toks[j + 1][1] == "{" else j + 1
                if self.toks[k][1] not in ("2", "3", "-1", "-") or self.toks[k][0] != "num":
                    return None
                power, j = int(self.toks[k][1]), k + (2 if self.toks[j + 1][1] == "{" else 1)
            elif self.toks[j][1] in ("squared", "cubed"):
                power, j = _POWER_WORDS[self.toks[j][1]], j + 1
            factor *= f ** (power * sign)
            for b, p in base:
                dims[b] = dims.get(b, 0) + p * power * sign
            power = 1
            if self.toks[j][1] in ("/", "per", "a") and self.toks[j + 1][0] == "word":
                sign, j = -1, j + 1
            elif self.toks[j][1] in ("*", "\\cdot") and self.toks[j + 1][0] == "word":
                j += 1
            elif self.toks[j][0] == "end" or self.toks[j][1] in _ENDS or self.toks[j][1] in (".", "\\deg"):
                break
            elif self.toks[j][0] != "word":
                return None
        if not peek:
            self.i = j
        return (factor, tuple(sorted(dims.items())))


_ATOM_COMMANDS = set("\\frac \\sqrt \\binom \\dbinom \\pi \\infty \\R \\lfloor \\lceil \\lvert \\begin \\{ \\emptyset \\usd \\eur \\gbp \\cny".split())


def negate(a):
    return ("n", -a[1], a[2]) if a[0] == "n" else ("q", negate(a[1]), a[2]) if a[0] == "q" else ("*", (("n", -1, None), a))


def times(a, b):
    return ("*", (a[1] if a[0] == "*" else (a,)) + (b,))


def group(seq):
    """( expr ) is expr; [ expr ] too; what holds several items stays a sequence."""
    return seq[3][0] if len(seq[3]) == 1 and seq[1] + seq[2] in ("()", "[]") else seq


@lru_cache(maxsize=8192)
def parse(text, thousands=True):
    """Cleaned text -> tree, or Unparsable (also cached, as None, by the caller's choice)."""
    return Parser(tokenize(text, thousands)).whole()


# ---- 5. numbers ------------------------------------------------------------------------------------------------------
def kids(node):
    """The trees directly below a node."""
    tag = node[0]
    if tag in ("+", "*", "rel", "ratio"):
        return node[1]
    if tag in ("/", "^"):
        return node[1:]
    if tag in ("q", "pm"):
        return node[1:2]
    return node[2] if tag == "f" else node[3] if tag == "seq" else node[2:] if tag == "set" else sum(node[1], ()) if tag == "mat" else ()


def variables(node):
    """Names of the free variables of a tree."""
    return {node[1]} if node[0] == "v" else set().union(*map(variables, kids(node))) if kids(node) else set()


def contains(node, tag, what=None):
    return (node[0] == tag and what in (None, node[1])) or any(contains(k, tag, what) for k in kids(node))


def choose_sign(node, sign):
    """Reads every plus-minus as plus (sign 1) or minus (sign -1); minus-plus the other way round."""
    if node[0] == "pm":
        a = choose_sign(node[1], sign)
        return a if sign * node[2] > 0 else negate(a)
    if node[0] in ("+", "*"):
        return (node[0], tuple(choose_sign(k, sign) for k in node[1]))
    if node[0] in ("/", "^"):
        return (node[0], choose_sign(node[1], sign), choose_sign(node[2], sign))
    return ("f", node[1], tuple(choose_sign(k, sign) for k in node[2])) if node[0] == "f" else node


def small(x):
    """Bounds an exact number: beyond MAX_BITS it is no answer."""
    if isinstance(x, Fraction):
        if x.denominator == 1:
            x = x.numerator
        elif x.denominator.bit_length() > MAX_BITS:
            raise Unparsable("number too large")
    if isinstance(x, int) and x.bit_length() > MAX_BITS:
        raise Unparsable("number too large")
    return x


def power(a, b):
    """a ** b, exact where that is cheap, float or complex otherwise; never large."""
    if isinstance(b, int) and not isinstance(a, (float, complex)):
        bits = max(abs(a.numerator).bit_length(), a.denominator.bit_length())
        if bits * abs(b) <= MAX_BITS or a in (0, 1, -1):
            return small(Fraction(a) ** b if b < 0 or isinstance(a, Fraction) else a ** b if abs(a) > 1 else a ** (b % 2 + 2 * (b > 0)))
        raise Unparsable("power too large")
    if isinstance(b, Fraction) and not isinstance(a, (float, complex)):
        if a < 0 and b.denominator % 2:  # the real cube root of -8
            return power(power(-a, Fraction(1, b.denominator)) * -1, b.numerator)
        if a >= 0 and (r := exact_root(a, b.denominator)) is not None:
            return power(r, b.numerator)
    if isinstance(a, complex) or isinstance(b, complex) or (a < 0 and not isinstance(b, int)):
        return complex(a) ** complex(b)
    return float(a) ** float(b)


def exact_root(a, n):
    """n-th root of a rational number when that is rational (n <= 9, moderate size), else None."""
    if n > 9 or a.numerator.bit_length() > 512 or a.denominator.bit_length() > 512:
        return None
    parts = []
    for k in (a.numerator, a.denominator):
        r = math.isqrt(k) if n == 2 else round(k ** (1 / n))
        if r ** n != k:
            return None
        parts.append(r)
    return small(Fraction(*parts))


def call(name, args):
    """A function of the allow-list at numbers."""
    x = args[0]
    if name in ("factorial", "binom", "gcd", "lcm"):
        if not all(isinstance(a, int) and 0 <= a <= 10**6 for a in args) or (name in ("factorial", "binom") and max(args) > 1000):
            raise Unparsable(f"{name} out of bounds")
        return small({"factorial": lambda: math.factorial(x), "binom": lambda: math.comb(*args), "gcd": lambda: math.gcd(*args), "lcm": lambda: math.lcm(*args[:20])}[name]())
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    if name in ("abs", "floor", "ceil"):
        return abs(x) if name == "abs" else math.floor(x) if name == "floor" else math.ceil(x)
    m = cmath if isinstance(x, complex) or (name in ("ln", "log", "lg") and x < 0) or (name in ("arcsin", "arccos") and abs(x) > 1) else math
    if name in ("ln", "log", "lg"):
        y = m.log(x)
        return y / math.log(10) if name == "lg" else y / m.log(args[1]) if len(args) > 1 else y
    if name in ("cot", "sec", "csc"):
        y = {"cot": m.tan, "sec": m.cos, "csc": m.sin}[name](x)
        return 1 / y if abs(y) > 1e-12 else math.inf
    y = getattr(m, {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name))(x)
    return y if name != "tan" or abs(y) < 1e12 else math.inf


def value(node, env=None, trig=False):
    """Number of a tree: int or Fraction where exact, else float or complex. env gives the variables; degrees count as
    radians inside trigonometric functions and as plain numbers elsewhere. Unparsable where there is no finite number."""
    tag = node[0]
    if tag == "n":
        return node[1]
    if tag == "v" and env and node[1] in env:
        return env[node[1]]
    if tag == "c" and node[1] != "inf":
        return math.pi if node[1] == "pi" else math.e if node[1] == "e" else 1j
    if tag == "+":
        out = 0
        for k in node[1]:
            out = out + value(k, env, trig)
    elif tag == "*":
        out = 1
        for k in node[1]:
            out = small(out * value(k, env, trig))
    elif tag == "/":
        a, b = value(node[1], env, trig), value(node[2], env, trig)
        out = Fraction(a) / b if isinstance(a, (int, Fraction)) and isinstance(b, (int, Fraction)) else a / b
    elif tag == "^":
        out = power(value(node[1], env, trig), value(node[2], env, trig))
    elif tag == "f":
        out = call(node[1], [value(k, env, node[1] in ("sin", "cos", "tan", "cot", "sec", "csc")) for k in node[2]])
    elif tag == "q":
        a = value(node[1], env, trig)
        out = a * math.pi / 180 if node[2] == DEGREE and trig else Fraction(a) / 100 if node[2] == PERCENT and isinstance(a, (int, Fraction)) else a
    else:
        raise Unparsable(f"no number: {tag}")
    out = small(out)
    if isinstance(out, (float, complex)) and not cmath.isfinite(out):
        raise Unparsable("not finite")
    return out


# fixed "random" points: positive ones below and above 1, then mixed signs (where square roots and moduli tell)
_POINTS = [0.3719, 0.8243, 1.2957, 2.6181, 4.7731, 0.5417, 1.8713, 3.3391, 0.1173, 6.1031]


def probes(names):
    """Assignments of numbers to names, deterministic. Yields (env, all_positive)."""
    for k in range(8):
        yield {n: _POINTS[(3 * j + k) % 10] * (1 + 0.0137 * j + 0.0021 * k) for j, n in enumerate(sorted(names))}, True
    for k in range(4):
        yield {n: _POINTS[(3 * j + k + 1) % 10] * (-1 if (j + k) % 2 == 0 or k == 3 else 1) * (1 + 0.0171 * j) for j, n in enumerate(sorted(names))}, False


def samples(nodes, names):
    """Values of all nodes at the points where all are defined; complex points only if a node speaks of i."""
    use_complex = any(contains(n, "c", "i") for n in nodes)
    for env, _ in probes(names):
        try:
            vals = [value(n, env) for n in nodes]
        except (ArithmeticError, ValueError, TypeError):
            continue
        if use_complex or not any(isinstance(v, complex) for v in vals):
            yield vals
