"""mathparse.py: reads the text of an answer into a small tree, and tells whether two trees mean the same.

Sections: 1 cleaning, 2 units, 3 tokens, 4 parser (text to tree), 5 numbers (tree to value), 6 comparing trees, 7 words,
times, dates. Nothing that was read is ever evaluated as code: the parser knows an allow-list of names and fails
(`Unparsable`) on everything else; length, tokens, nesting, digits and exponents have limits, so that a call costs
milliseconds whatever a model wrote. Algebra needs no computer algebra system: two expressions are equal if they agree
at fixed random points (Schwartz-Zippel), which is fast and cannot hang.
Trees are plain tuples whose first item says what they are:
  ("n", value, ulp)  number; ulp = unit of the last decimal place when written as a decimal, else None
  ("v", name)  ("c", "pi"|"e"|"i"|"inf")  ("+", terms)  ("*", factors)  ("/", a, b)  ("^", a, b)  ("pm", a, sign)
  ("f", name, args)  ("q", a, unit) quantity with a unit  ("seq", open, close, items, word)  ("mat", rows)
  ("rel", operands, operators)  ("set", operator, a, b)  ("w", name) the reals, ...  ("ratio", parts)
"""
import cmath, math, re, unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS, MAX_BITS = 2000, 600, 24, 400, 16384


class Unparsable(ValueError):
    """The text is no mathematics that this parser knows, or it is larger than its limits."""


# ---- 1. cleaning: Unicode and LaTeX spellings become one spelling ----------------------------------------------------
_CHARS = {ord(k): v for k, v in {
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-",
    "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "°": "^\\circ ", "º": "^\\circ ", "˚": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F",
    "≤": "\\le ", "≦": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "≧": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≃": "\\approx ",
    "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\R ", "θ": "\\theta ",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ", "μ": "\\mu ", "∠": "\\angle ", "△": "", "ℤ": "\\Z ",
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
_ARG = r"\*?\s*\{([^{}]*)\}"
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|cal|normal)|mbox|hbox|operatorname|boldsymbol|bm|pmb)" + _ARG)
_WRAP = re.compile(TEXT.pattern.replace("|pmb)", "|pmb|overline|overrightarrow|vec|hat|underline|widehat|mathop)"))
_SPACING = re.compile(r"\\[,;: >()\[\]]|\\q?quad(?![A-Za-z])|~|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|rm|bf|it"
                      r"|textdegree(?=\s*\\circ))(?![A-Za-z])")
_ENV = re.compile(r"\\begin\{[a-zA-Z]*matrix\}|\\begin\{array\}")
_SPELLINGS = [(h, re.compile(p), r) for h, p, r in (
    ("\\!", r"\\!", ""), ("box", r"\\(?:boxed|fbox)(?![A-Za-z])", ""), ("\\mathbb", r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\\1 "), ("frac", r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    ("circ", r"\^\s*\{+\s*\\circ\s*\}+|\^?\s*\\circ", r"\\deg "), ("degree", r"\^\s*\{+\s*\\(?:text)?degree\s*\}+|\^?\s*\\(?:text)?degree", r"\\deg "),
    ("\\lt", r"\\lt(?![A-Za-z])", "<"), ("\\gt", r"\\gt(?![A-Za-z])", ">"), ("\\%", r"\\%", "%"), ("\\_", r"\\_", "_"), ("\\&", r"\\&", " and "),
    ("angle", r"\\angle\s*(?=\d)", "a_"), ("angle", r"m?\\(?:angle|measuredangle|triangle)(?![A-Za-z])", " "))]
_UNIT_FRAC = re.compile(r"(?<=[\d }])\\frac\s*\{\s*(km|cm|mm|m|mi|miles|ft|kg|g)\s*\}\s*\{\s*(h|hr|hour|s|sec|min|L|m|cm)\s*((?:\^\s*\{?[23]\}?\s*)?)\}")
_STOP = re.compile(r"(?<=[a-z])\.(?=\s|$)")  # sq. ft.
_GLUED = re.compile(r"(?<![A-Za-z])(sin|cos|tan|cot|ln|log)(?=[a-zA-Z]\b|\d)")  # sinx, sin2x
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
    if "{," in s:
        s = re.sub(r"\s*\{,\s*\}\s*", ",", s)
    s = _GLUED.sub(r"\1 ", _STOP.sub(" ", s.replace("~", " ").replace("per cent", "percent")))
    if "^o" in s or "^{o" in s:  # a degree sign typed as a letter
        s = re.sub(r"(?<=\d)\^\{?o\}?(?![A-Za-z])", r"\\deg ", s)
    if "square" in s or "cubic" in s:
        s = re.sub(r"\{?\b(square|cubic)\s*([a-z]{2,})\}?", r" \1 \2 ", s)
    if "\\" in s:
        if "\\end" in s:
            s = re.sub(r"\\(?:begin|end)\{(?:align|equation|gather|split|math)(?:ed)?\*?\}", " ", s)
            s = s if _ENV.search(s) else s.replace("&", " ")
        s = s.replace("\\\\", "\\newline ") if _ENV.search(s) else re.sub(r"\\\\(?=[a-zA-Z])", r"\\", s).replace("\\\\", " ")
        if "$" in s:
            s = s.replace("\\$", "\\usd ")
        if "\\overline" in s:
            s = _REPEAT.sub(_repeating, s)
        s = _SPACING.sub(" ", s)
        for hint, pattern, repl in _SPELLINGS:
            if hint in s:
                s = pattern.sub(repl, s)
        while (t := _WRAP.sub(r" \1 ", s)) != s and s.count("{") < 200:  # \text{a \textbf{b}}
            s = t
        if "frac" in s:
            s = _UNIT_FRAC.sub(r" \1/\2\3", s)  # \frac{\text{km}}{\text{h}}
    if "$" in s:  # one dollar sign before a number is money, the others delimit mathematics
        s = re.sub(r"\$(?=\s*[\d.])|(?<=\d)\s*\$$", r"\\usd ", s) if s.count("$") == 1 else s.replace("$", " ")
    if "**" not in s:
        return s.strip()
    return s.replace("**", "^").strip() if re.search(r"\w\s*\*\*\s*[\w({-]", s) else s.replace("**", "").strip()


# ---- 2. units --------------------------------------------------------------------------------------------------------
_UNIT_TABLE = """m 1 m meter meters metre metres|cm .01 m centimeter centimeters centimetre centimetres|mm .001 m millimeter millimeters millimetre millimetres
km 1000 m kilometer kilometers kilometre kilometres|dm .1 m decimeter decimeters decimetre decimetres|nm 1e-9 m|inch .0254 m inches in|foot .3048 m feet ft
yard .9144 m yards yd yds|mile 1609.344 m miles mi|g 1 g gram grams|kg 1000 g kilogram kilograms kilo kilos|mg .001 g milligram milligrams|ton 1000000 g tons tonne tonnes
lb 453.59237 g lbs|oz 28.349523125 g ounce ounces|s 1 s sec secs second seconds|min 60 s mins minute minutes|h 3600 s hr hrs hour hours|day 86400 s days
week 604800 s weeks|month 1 month months|year 1 year years yr yrs|ms .001 s millisecond milliseconds|deg 1 deg degree degrees|rad 1 rad radian radians
usd 1 usd dollar dollars bucks|cent .01 usd cents|eur 1 eur euro euros|gbp 1 gbp|cny 1 cny yuan rmb|pound 1 pound pounds|rupee 1 rupee rupees|N 1 N newton newtons|J 1 J joule joules|W 1 W watt watts
V 1 V volt volts|Hz 1 Hz hertz|Pa 1 Pa pascal pascals|kPa 1000 Pa|kJ 1000 J|kW 1000 W|mol 1 mol mole moles|acre 1 acre acres|percent 1 % percentage pct|unit 1 unit units"""
UNITS = {name: (Fraction(f), ((base, 1),)) for row in re.split(r"[|\n]", _UNIT_TABLE)
         for first, f, base, *more in [row.split()] for name in (first, *more)}
UNITS |= {"L": (Fraction(1, 1000), (("m", 3),)), "ml": (Fraction(1, 10**6), (("m", 3),)), "mph": (Fraction("0.44704"), (("m", 1), ("s", -1))),
          "kph": (Fraction(5, 18), (("m", 1), ("s", -1))), "kmph": (Fraction(5, 18), (("m", 1), ("s", -1))), "hectare": (Fraction(10000), (("m", 2),))}
UNITS |= {k: UNITS["L"] for k in ("liter", "liters", "litre", "litres")} | {k: UNITS["ml"] for k in ("mL", "milliliter", "milliliters", "millilitres", "cc")}
UNITS |= {"ha": UNITS["hectare"], "hectares": UNITS["hectare"], "sq": None, "square": None, "cubic": None, "cu": None}
_POWER_WORDS = {"sq": 2, "square": 2, "squared": 2, "cu": 3, "cubic": 3, "cubed": 3}
_NO_NOUN = set("is are was not or and but to than of for with from least most more less about maybe if then at by up down wrong correct minus plus over "
               "divided choose squared cubed factorial negative infinity half yes no true false january february march april may june july august "
               "september october november december zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety".split())
_CURRENCY = {"\\usd", "\\eur", "\\gbp", "\\cny"}
DEGREE, PERCENT = UNITS["deg"], UNITS["percent"]
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# ---- 3. tokens -------------------------------------------------------------------------------------------------------
_TOKEN = re.compile(r"(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)"
                    r"|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<op><=|>=|!=|/=|==|[-+*/^_=<>()\[\]{},;:!%|'&#~])|(?P<sp>\s+)|(?P<bad>.)", re.S)
FUNCTIONS = {n: n for n in "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log lg exp abs floor ceil".split()}
FUNCTIONS |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan"}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega ell "
            "Gamma Delta Theta Lambda Sigma Phi Psi Omega".split())
RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "/=": "!=", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
             "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\ne": "!=", "\\neq": "!=", "\\approx": "~", "\\in": "in", "\\equiv": "=",
             "\\simeq": "~", "\\doteq": "~", "\\sim": "~", "\\cong": "~"}
_SIGNS = ("+", "-", "\\pm", "\\mp")
_CLOSERS = {")", "]", "}", "\\}", "\\rangle"}
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
        return self.toks[self.i][1] in texts

    def take(self, *texts):
        text = self.toks[self.i][1]
        if text in texts:  # the end is "", which nobody asks for
            self.i += 1
            return text
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
            return ("seq", opener, self.need(*closers)[-1], tuple(out), word)
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
        while rel := RELATIONS.get(self.toks[self.i][1]):
            self.i += 1
            ops.append(rel)
            nodes.append(self.union())
        return ("rel", tuple(nodes), tuple(ops)) if ops else nodes[0]

    def union(self):
        node, n = self.ratio(), 0
        while n < MAX_DEPTH and (op := self.take("\\cup", "\\cap", "\\setminus", "\\backslash", "U")):
            n += 1
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
        terms = []
        while not terms or self.at(*_SIGNS):
            sign, pm = 1, 0
            while op := self.take(*_SIGNS):
                sign = -sign if op == "-" else sign
                pm = {"\\pm": 1, "\\mp": -1}.get(op, pm)
            term = self.term()
            term = ("pm", term, pm) if pm else term
            while term[0] == "q" and self.toks[self.i][0] == "num":  # 3 hours 20 minutes
                more = self.term()
                if more[0] != "q" or more[2][1] != term[2][1]:
                    self.fail("two numbers side by side")
                term = ("q", ("+", (times(("n", small(term[2][0] / more[2][0]), None), term[1]), more[1])), more[2])
            terms.append(negate(term) if sign < 0 else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", tuple(terms))

    def term(self):
        node, n = self.power(), 0
        while True:
            if self.take("*", "\\cdot", "\\times", "\\ast"):
                node = times(node, self.signed())
            elif n < MAX_DEPTH and self.take("/", "\\div"):
                n += 1
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
            return self.toks[self.i - 1][1] in (")", "}", "]", "!")
        return text in ("(", "[", "{") or (text == "|" and not self.bars)

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
        n = 0
        while n < 4 and (op := self.take("!", "%", "\\deg", "'")):
            n += 1
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
            if self.at("_"):  # 1101_2, in another base: a name
                return ("v", text + self.subscript())
            return self.mixed(number(text)) if mixed else number(text)
        if kind == "word":
            return self.word(text)
        if text in ("(", "["):
            return group(self.items(text, (")", "]")))
        if text == "{":
            node = self.items("{", ("}",))
            return node[3][0] if len(node[3]) == 1 else node
        if text == "\\{":
            k = self.i + (3 if self.toks[self.i + 1][1] == "\\in" else 1)
            if self.toks[self.i][0] == "word" and self.toks[min(k, len(self.toks) - 1)][1] in ("|", ":", "\\mid"):
                self.i = k + 1  # {x | x > 5} is what its condition says
                node = self.items()
                self.need("\\}")
                return node
            if self.take("\\}"):
                return ("seq", "{", "}", (), "")
            return self.items("{", ("\\}",))
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
        nxt = self.toks[self.i][1]
        if len(w) <= 3 and w.islower() and nxt in ("^", "_", "'", "!"):  # xy^2 is x times y^2
            self.i -= 1
            self.toks[self.i] = ("word", w[-1])
            w = w[:-1]
            return ("*", tuple(("c", c) if c in "ei" else ("v", c) for c in w)) if len(w) > 1 else ("c" if w in "ei" else "v", w)
        if len(w) <= 3 and w.islower() and not (len(nxt) > 1 and nxt.isalpha() and nxt not in FUNCTIONS and nxt not in _ENDS):  # two words are prose
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
        if name in ("R", "Z", "N", "Q"):
            return ("w", {"R": "reals", "Z": "integers", "N": "naturals", "Q": "rationals"}[name])
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
        if text in _CURRENCY and self.toks[self.i + 1][1] in ("", ".", ","):  # 1,000.99$
            self.i += not peek
            return UNITS[text[1:]]
        if kind != "word" or (unit_key(text) not in UNITS and len(text) < 3) or text in SCALES or text == "and" or text.lower() in FUNCTIONS:
            return None
        j, factor, dims, power, sign, nouns = self.i, Fraction(1), {}, 1, 1, 0
        numeric = not variables(left)
        while True:
            kind, text = self.toks[j]
            if text in _POWER_WORDS and text[-1] != "d":
                power, j = _POWER_WORDS[text], j + 1
                continue
            if kind == "word" and unit_key(text) in UNITS and (len(text) > 1 or numeric):
                f, base = UNITS[unit_key(text)]
            elif kind == "word" and len(text) > 2 and text.lower() not in _NO_NOUN and text.lower() not in SCALES and nouns < 2:
                nouns += 1
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
            elif self.toks[j][0] == "end" or self.toks[j][1] in _ENDS or (self.toks[j][0] == "num" and unit_key(text) in UNITS) or self.toks[j][1] in (".", "\\deg"):
                break
            elif self.toks[j][0] != "word":
                return None
        if not peek:
            self.i = j
        return (factor, tuple(sorted(dims.items())))


_ATOM_COMMANDS = set("\\Z \\N \\Q \\frac \\sqrt \\binom \\dbinom \\pi \\infty \\R \\lfloor \\lceil \\lvert \\begin \\{ \\emptyset \\usd \\eur \\gbp \\cny".split())


def unit_key(text):
    return text if text in UNITS or len(text) == 1 else text.lower()


def negate(a):
    return ("n", -a[1], a[2]) if a[0] == "n" else ("q", negate(a[1]), a[2]) if a[0] == "q" else ("*", (("n", -1, None), a))


def times(a, b):
    return ("*", (a[1] if a[0] == "*" else (a,)) + (b,))


def group(seq):
    """( expr ) is expr; [ expr ] too; what holds several items stays a sequence."""
    return seq[3][0] if len(seq[3]) == 1 and seq[1] + seq[2] in ("()", "[]") else seq


@lru_cache(maxsize=8192)
def parse(text, thousands=True):
    """Cleaned text -> tree, or Unparsable."""
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
    if name in ("factorial", "binom"):
        if not all(isinstance(a, int) and 0 <= a <= 1000 for a in args):
            raise Unparsable(f"{name} out of bounds")
        return small(math.factorial(x) if name == "factorial" else math.comb(*args))
    if len(args) != 1 and name not in ("log",):
        raise Unparsable(f"{name} of {len(args)} numbers")
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
            out = small(out + value(k, env, trig))
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
    """Assignments of numbers to names, deterministic: five of positive numbers, then four of mixed signs."""
    for k in range(9):
        yield {n: _POINTS[(3 * j + k) % 10] * (1 + 0.0137 * j) * (-1 if k > 4 and (j + k) % 3 else 1) for j, n in enumerate(sorted(names))}


def samples(nodes, names):
    """Values of all nodes at the points where all are defined; complex points only if a node speaks of i."""
    use_complex = any(contains(n, "c", "i") for n in nodes)
    for env in probes(names):
        try:
            vals = [value(n, env) for n in nodes]
        except (ArithmeticError, ValueError, TypeError):
            continue
        if use_complex or not any(isinstance(v, complex) for v in vals):
            yield vals


def show(node):
    """A tree as text for people."""
    tag = node[0]
    if tag in ("n", "v", "c", "w"):
        return str(node[1])
    if tag in ("+", "*", "ratio"):
        return "(" + {"+": " + ", "*": " * ", "ratio": " : "}[tag].join(map(show, node[1])) + ")"
    if tag == "rel":
        return " ".join(x for pair in zip(map(show, node[1]), node[2] + ("",)) for x in pair).strip()
    if tag == "q":
        return show(node[1]) + " " + "*".join(b if p == 1 else f"{b}^{p}" for b, p in node[2][1])
    name = {"f": str(node[1]), "set": str(node[1]), "pm": "+-" if node[-1] == 1 else "-+"}.get(tag, tag if tag in "/^" else "")
    return f"{name}{node[1] if tag == 'seq' else '('}{', '.join(map(show, kids(node)))}{node[2] if tag == 'seq' else ')'}"


# ---- 6. comparing trees ----------------------------------------------------------------------------------------------
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
    if abs(x - y) <= 1e-12 * abs(x):  # 0.30000000000000004
        return True
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
    for x, y in samples((a, b), names):
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
        return same_expr(("/", times(x, ("c", "pi")), ("n", 180, None)), y)
    return same_expr(x, y)


def scaled(node, factor):
    return node if factor == 1 else ("*", (("n", small(factor), None), node))


def unname(node):
    """`x = 5` -> ("x", 5), `f(x) = x+1` -> ("f", x+1), `x in S` -> ("x", S), others -> ("", node). In a chain of equal
    numbers any stands for all; 6 = 5 is no number, 10/3 ~ 3.33 is one if it rounds so."""
    if node[0] != "rel" or not set(node[2]) <= {"=", "~", "in"}:
        return "", node
    parts, ops, name = list(node[1]), list(node[2]), ""
    for end in (0, -1):
        rest = parts[1:] if end == 0 else parts[:-1]
        head = heading(parts[end])
        if head and (end == 0 or len(parts) == 2) and head not in set().union(*map(variables, rest)):
            name, parts, ops = head, rest, ops[1:] if end == 0 else ops[:-1]
            break
    if "in" in ops or (not name and len(parts) == len(node[1]) and any(variables(p) for p in parts)):
        return "", node
    for p, q, op in zip(parts, parts[1:], ops):
        if not (same_quantity(p, q) or (op == "~" and rounds_to(p, q))):
            return "", node
    return name, parts[0]


def heading(p):
    """The name that a left side gives to the right: x, f(x), f^{-1}(x), (x, y), |AB|, sin A; else None."""
    if p[0] == "v":
        return p[1]
    if p[0] == "seq" and p[1] == "(" and all(k[0] == "v" for k in p[3]):
        return ",".join(k[1] for k in p[3])
    if p[0] == "f" and p[2][0][0] == "v" and p[1] in ("abs", "sin", "cos", "tan", "cot"):
        return f"{p[1]}({p[2][0][1]})"
    if p[0] == "*" and len(p[1]) == 2 and p[1][1][0] in "vn":
        f = p[1][0][1] if p[1][0][0] == "^" else p[1][0]
        return f[1] if f[0] == "v" and f[1][:1] in "fghpqyPFGHRSVAT" else None
    return None


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
        return [choose_sign(node, 1), choose_sign(node, -1)]
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
    if node[0] == "seq" and node[1] == "" and len(node[3]) == 2 and node[4] == "and":  # x > 1 and x < 3
        parts = [intervals(k) for k in node[3] if k[0] == "rel"]
        if len(parts) == 2 and all(p and len(p) == 1 for p in parts):
            (a,), (b,) = parts
            if infinite(a[0]) and infinite(b[2]):
                a, b = b, a
            return [a[:2] + b[2:]] if infinite(a[2]) and infinite(b[0]) else None
        return None
    if node[0] == "seq" and node[1] == "" and node[4] == "or" or node[:2] == ("set", "\\cup"):
        parts = [intervals(k) for k in kids(node)]
        return None if None in parts else sorted(sum(parts, []), key=lambda p: float("-inf") if infinite(p[0]) else value(p[0]))
    if node[0] == "rel" and node[2] == ("in",):
        return intervals(node[1][1])
    if node[:2] == ("set", "\\setminus") and node[2] == ("w", "reals") and node[3][0] == "seq" and len(node[3][3]) == 1:
        return [(minus, False, node[3][3][0], False), (node[3][3][0], False, inf, False)]
    if node[0] != "rel":
        return None
    if node[1][0][:2] == ("f", "abs") and node[1][0][2][0][0] == "v" and len(node[2]) == 1 and node[2][0] in _FLIP:  # |x| < 3
        c, shut = node[1][1], len(node[2][0]) == 2
        return [(negate(c), shut, c, shut)] if node[2][0][0] == "<" else [(minus, False, negate(c), shut), (c, shut, inf, False)]
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
    for x, y in samples((("+", (p, negate(q))), ("+", (r, negate(s)))), variables(a) | variables(b)):
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


def without_integer_note(node):
    """x = pi/4 + k pi, k in Z -> x = pi/4 + k pi"""
    if node[0] == "seq" and not node[1]:
        left = [k for k in node[3] if not (k[0] == "rel" and k[2] == ("in",) and k[1][1][0] == "w" and k[1][1][1] != "reals")]
        return left[0] if len(left) == 1 < len(node[3]) else node
    return node


def same(a, b):
    """Do two trees mean the same answer?"""
    if a == b:
        return True
    a, b = without_integer_note(a), without_integer_note(b)
    (na, x), (nb, y) = unname(a), unname(b)
    if (na or nb) and not (x[0] == "rel" or y[0] == "rel"):
        function = {na, nb} & set("fgh") and variables(x) and variables(y)  # f(x) = x^2 is y = x^2
        if na and nb and na != nb and len(na) < 4 and len(nb) < 4 and not function:
            return a[0] == b[0] == "rel" and same_relation(a, b)
        return same(x, y) or (a[0] == b[0] == "rel" and same_relation(a, b))
    if a[0] == b[0] == "rel" and "rel" in (x[0], y[0]) and not (intervals(a) and intervals(b)):
        return same_relation(a, b)
    a, b = x, y
    if a[0] == b[0] == "ratio":
        return len(a[1]) == len(b[1]) and all(same_expr(times(p, b[1][0]), times(q, a[1][0])) for p, q in zip(a[1], b[1]))
    if "ratio" in (a[0], b[0]):
        r, o = (a, b) if a[0] == "ratio" else (b, a)
        return len(r[1]) == 2 and o[0] not in ("seq", "rel", "set", "mat") and same_quantity(("/", *r[1]), o)
    if rows(a) and rows(b) and (a[0] == "mat" or b[0] == "mat"):
        ra, rb = rows(a), rows(b)
        return len(ra) == len(rb) and all(len(p) == len(q) and all(map(same, p, q)) for p, q in zip(ra, rb))
    if "mat" in (a[0], b[0]):
        m, o = (a, b) if a[0] == "mat" else (b, a)
        flat = [k for r in m[1] for k in r]
        return o[0] == "seq" and o[1] == "(" and (len(m[1]) == 1 or all(len(r) == 1 for r in m[1])) and len(flat) == len(o[3]) and all(map(same, flat, o[3]))
    both, tags = a[0] == b[0] == "seq", {a[0], b[0]}
    if tags & {"rel", "set", "w"} or {"or", "and"} & {*a[4:], *b[4:]} or (both and a[1] and b[1] and len(a[3]) == 2 and a[1] + a[2] != b[1] + b[2]):
        ia, ib = intervals(a), intervals(b)
        if ia and ib:
            return len(ia) == len(ib) and all(p[1] == q[1] and p[3] == q[3] and same(p[0], q[0]) and same(p[2], q[2]) for p, q in zip(ia, ib))
        if tags & {"set", "w"}:
            return a[:2] == b[:2] and a[0] == "set" and same(a[2], b[2]) and same(a[3], b[3])
        if "rel" in tags and not (several(a) and several(b)):
            return False
    if both and ("(" in (a[1], b[1]) or a[1] == b[1] == "["):
        fence, fence_b = a[1] + a[2], b[1] + b[2]
        if len(a[3]) != len(b[3]) or "{" in (a[1], b[1]) or "or" in (a[4], b[4]) or (fence in ("(]", "[)")) != (fence_b in ("(]", "[)")):
            return False
        if fence and fence_b and len(a[3]) == 2 and fence != fence_b:
            return False
        members = []
        for s in (a, b):  # points keep their order; x = 1, y = 2 is the point (1, 2), x = 1, x = 2 is none
            names = [unname(k)[0] for k in s[3]]
            if all(names) and len(set(names)) < len(names):
                return False
            members.append([k for _, k in sorted(zip(names, s[3]), key=lambda p: p[0])] if all(names) else s[3])
        return all(map(same, *members))
    ma, mb = several(a), several(b)
    if a[0] == "seq" and a[1] + a[2] == "[]" and b[0] == "seq" and not b[1] and b[4] != "or":  # [2003, 2004] as a list
        ma = list(a[3])
    if b[0] == "seq" and b[1] + b[2] == "[]" and a[0] == "seq" and not a[1] and a[4] != "or":
        mb = list(b[3])
    if ma is not None or mb is not None:
        ma, mb = [a] if ma is None else ma, [b] if mb is None else mb
        if max(len(ma), len(mb)) > 60:
            return False
        if "seq" not in tags or any(s[0] == "seq" and (s[1] == "{" or s[4] == "or") for s in (a, b)):
            ma, mb = unique(ma), unique(mb)  # in a set, {2, 2} is {2}
        if len(ma) != len(mb) or (len(ma) == 1 and (ma[0] is a and mb[0] is b)):
            return False
        return matched(ma, mb)
    return "seq" not in tags and same_quantity(a, b)


# ---- 7. words, numbers in words, times, dates ------------------------------------------------------------------------
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::\d\d)?\s*(?:([ap])\.?\s?m\.?|(o'?clock))?$", re.I)
_DATEISH = re.compile(r"\d[-/年.]\d|(?<!\\)\b[A-Za-z]{3}")
_MONTHS = "january february march april may june july august september october november december".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_ABBREV = {d[:3]: d for d in _DAYS + _MONTHS} | {"tues": "tuesday", "thur": "thursday", "thurs": "thursday", "sept": "september", "&": "and"}
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_NUMBER = {w: i for i, w in enumerate(_ONES)} | {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_ORDINAL = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6,
            "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}
_SYNONYM = {w: v for v, ws in {"does not exist": "dne|undefined|not exist|doesnt exist", "no solution": "no solutions|no real solution|no real solutions|there is no solution|empty set|none",
                                "all real numbers": "all reals|all real|real numbers|reals|set of all real numbers|every real number"}.items() for w in ws.split("|")}
PHRASE = {"all real numbers": "\\R", "no solution": "\\emptyset"}
_RANK = {w: f"{i}{'st nd rd'.split()[i - 1] if i < 4 else 'th'}" for i, w in enumerate("first second third fourth fifth sixth seventh eighth ninth tenth".split(), 1)}
_HAN = dict(zip("零一二三四五六七八九十两", [*range(11), 2]))


def number_words(t):
    """`twenty-one` -> 21, `three quarters` -> 3/4, `five apples` -> 5 apples; other texts unchanged."""
    if t in _HAN:
        return str(_HAN[t])
    t = t.strip()
    if not t[:1].isalpha():
        return t
    if m := re.match(r"(?:negative|minus)\s+(?=[a-z])", t, re.I):
        return "-" + number_words(t[m.end():])
    words = re.split(r"[\s-]+", t.lower())
    if not words or len(words) > 12 or (words[0] not in _NUMBER and words[0] not in ("a", "an", "half", "dozen")):
        return t
    total, part, k, seen = 0, 0, 0, False
    while k < len(words):
        w = words[k]
        if w in _NUMBER:
            part, seen = part + _NUMBER[w], True
        elif w in ("a", "an") and words[k + 1:k + 2] and words[k + 1] in {**_ORDINAL, **SCALES, "dozen": 12}:
            part, seen = 1, True
        elif w == "hundred" and seen:
            part *= 100
        elif w == "dozen":
            part, seen = max(part, 1) * 12, True
        elif w in SCALES and seen:
            total, part = total + part * SCALES[w], 0
        elif not (w == "and" and seen and words[k + 1:k + 2] and words[k + 1] in _NUMBER):
            break
        k += 1
    if k < len(words) and words[k] in _ORDINAL and (seen or words[k] == "half"):
        return f"{total + part or 1}/{_ORDINAL[words[k]]} {' '.join(words[k + 1:])}".strip()
    return f"{total + part} {' '.join(words[k:])}".strip() if seen else t


def words(t):
    """Words without case, articles, punctuation: what names and phrases are compared by."""
    t = re.sub(r"(?<=\S) A(?![a-z])", " \u00c0", re.sub(r"\\[a-zA-Z]+|[{}$*_\"]", " ", t)).lower()  # Class A: no article
    t = t.replace("&", " and ")
    t = re.sub(r"(?<=\w)'s\b|'", "", re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})", " ", t))
    t = re.sub(r"(?<=[a-z])\.(?=[a-z]\b)", "", t)  # p.m. -> pm.
    out = [w.strip(".,;:!?()[]") for w in t.split()]
    out = [_ABBREV.get(w, _RANK.get(w, str(_NUMBER.get(w, w)))) for w in out if w]
    out = " ".join([w for w in out if w not in ("a", "an", "the")] or out)
    return _SYNONYM.get(out, out)


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


def same_hour(p, g, cp, cg):
    """8:55 = 8:55 A.M., but 2:10 A.M. is not 2:10 P.M.: one of the two texts does not say which half of the day."""
    return cp[1] != cg[1] and p[-1].isdigit() != g[-1].isdigit() and (cp[0] - cg[0]) % 720 == 0 and min(cp[0], cg[0]) < 780


def date(t):
    """(year, month, day) of a written date, missing parts 0; None if it is no date with a day and a month."""
    if len(t) > 40 or not _DATEISH.search(t):
        return None
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


def same_word_list(p, g):
    """[Gambia, Niger] = Niger and Gambia: names in any order, but (A, C) in this one."""
    out = []
    for t in (p, g):
        parts = [w for w in map(words, re.split(r"\s*(?:,|;|\band\b|&)\s*", clean(t).strip("[](){} "))) if w]
        out.append(parts if "(" in t[:2] else sorted(parts))
    return out[0] == out[1] and len(out[0]) > 1 and all(re.fullmatch(r"[\w .'%-]+", w) for w in out[0])
