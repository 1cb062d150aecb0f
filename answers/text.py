"""Answers as text, before any mathematics: regular expressions and tables, all linear or bounded.

`core_text` takes off what surrounds an answer; `clean` gives LaTeX and Unicode one spelling, which
parse.py reads. A spelling that is missing is one more entry in a table here.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache


def pairs(text: str) -> dict[str, str]:
    """`a b c d` as the table {a: b, c: d}."""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


# ---- 1. what surrounds an answer, choice letters -----------------------------------------------
_PREFIX = re.compile(  # what may stand before an answer
    r"(?:so|thus|hence|therefore|\\therefore)\b[,:]?\s+"
    r"|≈\s*|\\approx\s*|#+\s*|\*\*final answer\*\*:?\s*"
    r"|(?:the\s+)?(?:final\s+|correct\s+|best\s+)?(?:answer|result|solution|choice)\s*"
    r"(?:(?:is|:|=|are)\s*:?\s*|(?=[$\\\d]))"
    r"|(?:[A-Za-z]+\s+){0,8}?(?:is|equals)\s+(?:equal\s+to\s+)?"
    r"(?:about\s+|approximately\s+)?(?=[-\d$\\(.])"  # the area is 5
    r"|the\s+(?:[a-z]+\s+){1,4}(?:is|are)\s+(?=[a-z]+\.?$)"  # the color is red
    r"|(?:in|on|at)\s+(?=\d)"
    r"|(?:approximately|approx\.?|about|around|roughly|约|大约)\s*(?=[\d\\$.-])"
    r"|[故则]?(?:正确)?(?:答案|结果|答)(?:是|为|:)*\s*"
    r"|[\u4e00-\u9fff]{1,8}(?<!不)(?:是|为|等于)\s*(?=[-\d\\$(])"
    r"|故?应?选择?(?:项)?:?\s*(?=\(?[A-J])",
    re.I,
)
_NEGATION = re.compile(r"\b(?:or|not|no|never|if|but|wrong|incorrect|false|instead|unless)\b", re.I)
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|选项)\s*(?:is|:)?\s*)?"
    r"[\[({]?\s*([A-J])\s*[\])}]?\s*[.:,]?$",
    re.I,
)
_LETTER_TEXT = re.compile(
    r"(?:(?:option|choice)\s*)?"
    r"(?:[\[(]([A-J])[\])]\s*[:.]?|([A-J])\s*[).:、]|([A-J])\s+(?=\())\s*(.+)$",
    re.S,
)
_LETTERS = re.compile(r"(?:\([A-J]\)|[A-J])(?:\s*(?:,|;|and|&)?\s*(?:\([A-J]\)|[A-J]))+$")
_MORE_LETTERS = re.compile(r"(?:^|\s)\(?[A-J](?:[).:]|$)|\b(?:or|not)\b")
_GAP = re.compile(r"[\s~$&]{9,}")
_BOXES = re.compile(r"(\\boxed\{[^{}]*\})\s*(?=\\boxed)")
_FINAL = re.compile(r"[\s*]*final\s+answer[\s*]*[:：][\s*]*", re.I)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


def unwrap(text: str) -> str:
    """Takes off `Final Answer:`, bold stars, and one or more \\boxed{} around the whole."""
    text = text.strip()
    for _ in range(4):
        if m := _FINAL.match(text[:80]):
            text = text[m.end() :].strip()
            if text.endswith("**") and text.count("**") % 2:
                text = text[:-2].strip()
        core = text.strip("$ \n.").removeprefix("\\(").removeprefix("\\[")
        core = core.removesuffix("\\)").removesuffix("\\]").strip()
        if core.startswith("**") and core.endswith("**") and len(core) > 4:
            core = core[2:-2].strip()
        inner = braced(core, core.find("{")) if core.startswith(("\\boxed", "\\fbox")) else None
        if inner is None or inner[1] != len(core):
            break
        text = inner[0].strip()
    return text


def braced(text: str, start: int) -> tuple[str, int] | None:
    """(content, end) of the balanced {...} that opens at `start`, else None. Linear."""
    if start < 0 or text[start : start + 1] != "{":
        return None
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return text[start + 1 : m.start()], m.end()
    return None


def core_text(s: str) -> str:
    """An answer without `The answer is`, stars, dollars, outer boxes, a full stop, a farewell."""
    if len(s) > 100:  # several patterns are quadratic in the length of a gap
        s = _GAP.sub(" " * 8, s)
    s = unwrap(bare(s.partition(" I hope ")[0]))
    if not s.isascii():
        s = unicode_plain(re.sub(r"(?<![A-Za-z])([A-J])、(?![A-J]\b)", r"\1: ", s))
    for _ in range(4):
        m = _PREFIX.match(s[:200]) if s[:1] not in "-+.([{0123456789" else None
        if not m or not m[0] or _NEGATION.search(m[0]):
            break
        s = unwrap(bare(s[m.end() :]))
    s = _BOXES.sub(r"\1, ", s) if s.count("\\boxed{") > 1 else s.rstrip(" \\")
    if s.count("\\boxed{") == 1 and not _NEGATION.search(s):  # a sentence with one box in it
        inner = braced(s, s.find("\\boxed{") + 6)
        s = inner[0].strip() if inner else s
    return bare(s[:-1].rstrip() if s[-1:] == "." and s[-3:] != "..." and len(s) > 1 else s)


def bare(s: str) -> str:
    """Without one pair of $...$, \\(...\\), \\[...\\], stars or backticks around the whole."""
    s = s.strip()
    for left, right in _WRAPPERS if s[:1] in ("$", "\\", "*", "`") else ():
        if s.startswith(left) and s.endswith(right) and len(s) > len(left + right):
            inner = s[len(left) : -len(right)]
            return s if left in inner or right in inner else inner.strip()
    return s


def letters(t: str) -> set[str] | None:
    """The set of choice letters that a text consists of, else None: B, (B), "A and C", BD."""
    if m := _LETTER.match(t):
        return {m[1].upper()}
    listed = len(t) < 60 and not t.isalpha() and _LETTERS.match(t)
    glued = 1 < len(t) < 5 and re.fullmatch("[A-E]+", t) and list(t) == sorted(set(t))
    return set(re.findall("[A-J]", t)) if listed or glued else None


def letter_text(t: str, strict: bool = True) -> tuple[str, str] | None:
    """("B", "54") for `B: 54`, `(B) 54`, `B. 54`, `B (54)`; None if there are several options."""
    m = _LETTER_TEXT.match(t)
    if not m or (strict and _MORE_LETTERS.search(m[4])):
        return None
    text = m[4].strip()
    return m[1] or m[2] or m[3], text[1:-1] if m[3] and text.endswith(")") else text


# ---- 2. cleaning -------------------------------------------------------------------------------
_SIGNS = pairs(r"""
 × * · * ⋅ * ∙ * ∗ * ÷ / ⁄ / ∕ / − - – - — - ‐ - ‑ - π \pi √ \sqrt ∛ \sqrt[3] ∞ \infty
 ° \deg º \deg ˚ \deg ≤ \le ≦ \le ⩽ \le ≥ \ge ≧ \ge ⩾ \ge ≠ \ne ≈ \approx ≃ \approx ± \pm ∓ \mp
 ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ℝ \R ℤ \Z θ \theta α \alpha β \beta γ \gamma λ \lambda φ \phi
 ω \omega μ \mu ∠ \angle ℃ \degC ℉ \degF 。 . 、 , “ " ” " ‘ ' ’ ' ′ ' ″ " 【 ( 】 )
 ⟨ \langle ⟩ \rangle € \eur £ \gbp ¥ \cny ￥ \cny ∣ | ∶ : ～ ~ ∼ ~""")
_CHARS = {ord(sign): v + " " * (v[0] == "\\") for sign, v in _SIGNS.items()}
_CHARS |= dict.fromkeys(map(ord, "△《》\u200b\u200c\u200d\ufeff\u2061\u2062"), "")
_CHARS[0x2063] = ","  # the invisible separator
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_HAN_WORDS = pairs("""
 平方 square 立方 cubic 厘米 cm 毫米 mm 千米 km 公里 km 分米 dm 米 m 千克 kg 公斤 kg 克 g 吨 ton
 毫升 ml 升 L 分钟 minutes 小时 hours 秒 seconds 天 days 度 \\deg 元 yuan 和 and 或 or 且 and""")
_HAN_RE = re.compile("|".join(_HAN_WORDS))
_HAN_COUNTER = re.compile(r"(?<=[\d}])\s*[个個人只件次岁条名种棵本张位块辆支组](?=\s*$)")

# Commands that are another spelling of something.
_COMMANDS = dict.fromkeys(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle limits "
    "textstyle nolimits rm bf it triangle , ; : ( ) [ ] >".split(),
    " ",
)
_COMMANDS |= dict.fromkeys("! boxed fbox mathrm text mathbf overline underline vec hat".split(), "")
_COMMANDS |= {" ": " ", "&": " and ", "$": "\\usd "} | pairs(r"""
 dfrac \frac tfrac \frac cfrac \frac nicefrac \frac sfrac \frac degree \deg textdegree \deg
 lt < gt > ldots \dots cdots \dots rightarrow \to longrightarrow \to mod \bmod | |
 % % _ _ lvert | rvert | vert | mid | lbrace \{ rbrace \}""")
_TEXT_NAMES = (
    r"text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|cal|normal)|[mh]box|operatorname"
    r"|boldsymbol|bm|pmb"
)
_ACCENTS = "overline|bar|overrightarrow|vec|hat|underline|widehat|mathop"
TEXT = re.compile(rf"\\(?:{_TEXT_NAMES})\*?\s*\{{([^{{}}]*)\}}")
_WRAP = re.compile(rf"\\(?:{_TEXT_NAMES}|{_ACCENTS})\*?\s*\{{([^{{}}]*)\}}")
_MATRIX = re.compile(r"\\(begin|end)\{(?:[a-zA-Z]*matrix|array)\}(?:\{[lcr| ]*\})?")
_ALIGN = re.compile(r"\\(?:begin|end)\{(?:align|equation|gather|split|math|cases)(?:ed)?\*?\}")


def repeating(m: re.Match) -> str:
    """0.1\\overline{6} as a fraction, before \\overline is dropped as decoration."""
    head, fixed, loop = m[1] or "0", m[2], m[3]
    top = int(head + fixed + loop) - int(head + fixed)
    return f"({top}/{10 ** len(fixed) * (10 ** len(loop) - 1)})"


# Rules (sign, pattern, replacement), in order; a rule is tried only on texts with its sign.
_RULES = [
    ("{,", r"\s*\{,\s*\}\s*", ","),
    (",\\!", r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ","),  # 46,\! 656
    ("vmatrix", r"(?s)(\\begin)\{vmatrix\}(.*?)(\\end)\{vmatrix\}", r"|\1{pmatrix}\2\3{pmatrix}|"),
    ("or", r"(?<=[\d)}])or(?=[A-Za-z(\\])", " or "),
    (".", r"(?<=[a-z])\.(?=\s|$)", " "),  # sq. ft.
    ("", r"(?<![A-Za-z])(sin|cos|tan|cot|ln|log)(?=(?!h\b)[a-zA-Z]\b|\d)", r"\1 "),  # sinx, sin2x
    ("...", r"(\d{0,20}\.\d{0,20}?)(\d{1,3}?)\2{2,20}\s*\.\.\.", r"\1\\overline{\2}"),
    ("dots", r"(\d{0,20}\.\d{0,20}?)(\d{1,3}?)\2{2,20}\s*\\[cl]?dots", r"\1\\overline{\2}"),
    ("...", r"\.{3}", r"\\dots "),
    ("{}", r"(?<!\\)\{\}", ""),
    ("^", r"(?<=\d)\^\{?o\}?(?![A-Za-z])", r"\\deg "),  # a degree sign typed as a letter
    ("sq", r"(?<=[\d}])\s*sq(?:uare)?\s*$", ""),  # 42 square, without its noun
    ("square", r"\{?\b(square)\s*([a-z]{2,})\}?", r" \1 \2 "),
    ("cubic", r"\{?\b(cubic)\s*([a-z]{2,})\}?", r" \1 \2 "),
    ("2", r"(?<=[\d}])\s*([cdkm]?m|ft|in)2\b", r" \1^2"),  # 18 cm2
    ("3", r"(?<=[\d}])\s*([cdkm]?m|ft|in)3\b", r" \1^3"),
    ("10^", r"(?<=\d)\s*[xX]\s*(?=10\^)", "*"),
]
_REPEAT = r"(\d{0,20})\.(\d{0,20})\\(?:overline|dot)\s*\{\s*(\d{1,20})\s*\}"
_REPEAT_RULES = [("\\overline", _REPEAT, repeating), ("\\dot", _REPEAT, repeating)]
_LATEX_RULES = [
    ("quad", r"\\q?quad", " "),  # \quadx, too
    ("mod", r"\(\s*mod\s+(\w{1,20})\s*\)", r"\\pmod{\1}"),
    ("choose", r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    ("\\circ", r"\\circ", r"\\deg "),
    ("angle", r"m?\\(?:measured)?angle(?![A-Za-z])\s*(?=\d)", "a_"),
    ("angle", r"m?\\(?:measured)?angle(?![A-Za-z])\s*", " "),
    ("\\equiv", r"(\\equiv.*)\\b?mod\b", r"\1\\pmod"),
    ("\\mathbb", r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\\1 "),
    ("\\", r"(?s)\\([A-Za-z]+|.)", lambda m: _COMMANDS.get(m[1], m[0])),
    ("\\over", r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    ("\\frac{d", r"\\frac\{d([a-zA-Z])\}\{d[a-z]\}", r"\1'"),
    ("\\frac{d", r"\\frac\{d\}\{d([a-z])\}", r"\\lim_{d\1} "),  # as little to be cancelled as lim
    (  # \frac{km}{h^2}
        "\\frac",
        r"(?<=[\d }])\\frac\s*\{\s*([A-Za-z]+)\s*\}"
        r"\s*\{\s*([A-Za-z]+(?:\^\{?\d\}?)?)\s*\}(?!\s*\^)",
        r" \1/\2",
    ),
    ("\\deg", r"\^\s*\{+\s*\\deg\s*\}+|\^?\s*\\deg(?![A-Za-z])", r"\\deg "),
]
for _table in (_RULES, _REPEAT_RULES, _LATEX_RULES):
    _table[:] = [(sign, re.compile(pattern), to) for sign, pattern, to in _table]


def rewrite(s: str, rules: list) -> str:
    for sign, pattern, to in rules:
        if sign in s:
            s = pattern.sub(to, s)
    return s


def unicode_plain(s: str) -> str:
    """Full-width forms, super- and subscripts, fractions, Chinese units and signs as LaTeX."""
    if s.isascii():
        return s
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ]+", lambda m: "^{" + m[0].translate(_SUPER) + "}", s)
    s = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUB) + "}", s)
    for sign in set(re.findall("[¼-¾⅐-⅞]", s)):
        s = s.replace(
            sign, "\\frac{" + unicodedata.normalize("NFKC", sign).replace("⁄", "}{") + "}"
        )
    s = unicodedata.normalize("NFKD", s.translate(_CHARS)).translate(_CHARS)
    s = re.sub("(?<=[A-Za-z])[\u0300-\u036f]+", "", s)  # accents of letters
    s = unicodedata.normalize("NFC", s)
    if s.isascii():
        return s
    return _HAN_RE.sub(lambda m: f" {_HAN_WORDS[m[0]]} ", _HAN_COUNTER.sub("", s))


def latex_plain(s: str) -> str:
    """LaTeX without layout: environments, text commands, spacing, sizes, synonyms."""
    if "\\end" in s:
        s = _ALIGN.sub(" ", s.replace("\\\\", ", ") if "{cases}" in s else s)
    if _MATRIX.search(s):
        s = _MATRIX.sub(r"\\\1 ", s.replace("\\\\", "\\newline "))
    elif "\\\\" in s or "&" in s:
        s = re.sub(r"(?<!\\)&", " ", re.sub(r"\\\\(?=[a-zA-Z])", r"\\", s).replace("\\\\", " "))
    s = rewrite(s, _REPEAT_RULES)
    while "{" in s and s.count("{") < 200 and (t := _WRAP.sub(r" \1 ", s)) != s:
        s = t  # once for each level of \text{a \textbf{b}}
    return rewrite(s, _LATEX_RULES)


@lru_cache(maxsize=8192)
def clean(s: str) -> str:
    """One spelling for what LaTeX and Unicode can write in many ways. Still text; linear."""
    s = unicode_plain(s.replace("\x00", " "))
    s = rewrite(s.replace("~", " ").replace("per cent", "percent"), _RULES)
    s = latex_plain(s) if "\\" in s else s
    if s.count("$") == 1:  # money, before or after a number
        s = re.sub(r"\$(?=\s*[\d.])|(?<=\d)\s*\$$", r"\\usd ", s)
    else:  # the borders of mathematics
        s = s.replace("$", " ")
    if "**" in s:  # a power, or bold text
        s = s.replace("**", "^" if re.search(r"\w\s*\*\*\s*[\w({-]", s) else "")
    return s.strip()


# ---- 3. numbers in words -----------------------------------------------------------------------
_TO_19 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL = dict(zip(_TO_19.split(), range(20))) | dict(zip(_TENS.split(), range(20, 100, 10)))
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6}
SCALES |= {"billion": 10**9, "trillion": 10**12}
_PARTS = pairs("half 2 third 3 quarter 4 fourth 4 fifth 5 sixth 6 eighth 8 tenth 10 halve 2")
_PARTS |= {word + "s": k for word, k in _PARTS.items()}
_HAN_DIGIT = dict(zip("零一二三四五六七八九两", [*range(10), 2]))
_HAN_TENS = re.compile("([一二三四五六七八九]?)十([一二三四五六七八九]?)")


def number_words(text: str) -> str:
    """`twenty-one` -> 21, `three quarters` -> 3/4, `five apples` -> 5 apples, `二十` -> 20."""
    if "十" in text and (m := _HAN_TENS.fullmatch(text)):
        return str(10 * _HAN_DIGIT.get(m[1], 1) + _HAN_DIGIT.get(m[2], 0))
    if text in _HAN_DIGIT or not text[:1].isalpha():
        return str(_HAN_DIGIT.get(text, text))
    if m := re.match(r"(?:negative|minus)\s+(?=[a-z])", text, re.I):
        return "-" + number_words(text[m.end() :])
    words = re.split(r"[\s-]+", text.lower())
    if len(words) > 12 or words[0] not in {*SMALL, "a", "an", "half", "dozen"}:
        return text
    total, part, k, seen = 0, 0, 0, False  # "two thousand five" is a total of 2000 and a part of 5
    while k < len(words):
        w, nxt = words[k], words[k + 1] if k + 1 < len(words) else ""
        if w in SMALL or (w in ("a", "an") and (nxt in _PARTS or nxt in SCALES)):
            part, seen = part + SMALL.get(w, 1), True
        elif w == "dozen" or (w == "hundred" and seen):
            part, seen = max(part, 1) * SCALES[w], True
        elif w in SCALES and seen:
            total, part = total + part * SCALES[w], 0
        elif not (w == "and" and nxt in SMALL and words[k - 1] in SCALES):
            break
        k += 1
    rest = words[k:]
    if rest and rest[0] in _PARTS and (seen or rest[0] == "half"):
        return f"{total + part or 1}/{_PARTS[rest[0]]} {' '.join(rest[1:])}".strip()
    if len(rest) == 3 and rest[0] == "and" and rest[2] in _PARTS:  # two and a half
        return f"{total + part} {SMALL.get(rest[1], 1)}/{_PARTS[rest[2]]}"
    return f"{total + part} {' '.join(rest)}".strip() if seen else text


# ---- 4. units: names = factor and dimensions; a plain plural counts as a name, too -------------
_UNIT_TABLE = """m meter metre = 1 m | cm centimeter centimetre = .01 m | dm = .1 m
mm millimeter millimetre = .001 m | km kilometer kilometre = 1000 m | in inch inches = .0254 m
ft foot feet = .3048 m | yd yds yard = .9144 m | nm = 1e-9 m | mi mile = 1609.344 m
g gram = 1 g | kg kilo kilogram = 1000 g | mg milligram = .001 g | ton tonne = 1000000 g
lb lbs pound = 1 pound | oz ounce = 1/16 pound | s sec second = 1 s | min minute = 60 s
h hr hrs hour = 3600 s | ms millisecond = .001 s | day = 86400 s | week = 604800 s
month = 1 month | yr year = 1 year | deg degree = 1 deg | rad radian = 1 rad
L liter litre = .001 m3 | ml mL cc milliliter millilitre = 1e-6 m3 | mph = .44704 m s-1
kph kmph = 5/18 m s-1 | ha hectare = 10000 m2 | acre = 1 acre | percent percentage pct = 1 %
unit = 1 unit | usd USD dollar bucks = 1 usd | cent = .01 usd | eur EUR euro = 1 eur
gbp GBP = 1 pound | cny yuan rmb RMB = 1 cny | rupee = 1 rupee | N newton = 1 N | J joule = 1 J
kJ = 1000 J | W watt = 1 W | kW = 1000 W | V volt = 1 V | Hz hertz = 1 Hz | Pa pascal = 1 Pa
kPa = 1000 Pa | mol mole = 1 mol | C coulomb = 1 C"""
UNITS = {}
for _row in re.split(r" \| |\n", _UNIT_TABLE):
    _names, _meaning = _row.split(" = ")
    _factor, *_bases = _meaning.split()
    _dims = tuple((re.sub(r"-?\d", "", b), int(re.sub(r"[^-\d]", "", b) or 1)) for b in _bases)
    for _name in _names.split():
        UNITS[_name] = Fraction(_factor), _dims
        if len(_name) > 2:
            UNITS[_name + "s"] = UNITS[_name]
DEGREE, PERCENT = UNITS["deg"], UNITS["percent"]
POWER_WORDS = {"sq": 2, "square": 2, "squared": 2, "cu": 3, "cubic": 3, "cubed": 3}
_MONTHS = (
    "january february march april may june july august september october november december".split()
)
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
# Words that are neither a unit nor a counted thing.
NO_NOUN = {*SMALL, *SCALES, *POWER_WORDS, *_MONTHS} | set(
    "is are was not or and but to than of for with from least most more less about maybe if then "
    "at by up down wrong correct minus plus over divided choose factorial negative infinity half "
    "yes no true false lambda import return except while".split()
)


def unit_key(text: str) -> str:
    """The spelling under which UNITS knows a word: as written, else in small letters."""
    return text if text in UNITS or len(text) == 1 else text.lower()


# ---- 5. words, times, dates --------------------------------------------------------------------
_ABBREV = {name[:3]: name for name in _DAYS + _MONTHS}
_ABBREV |= pairs("tues tuesday thur thursday thurs thursday sept september")
_SAME_WORD = _ABBREV | {w: str(k) for w, k in SMALL.items()}
_SAME_WORD |= pairs(
    "first 1st second 2nd third 3rd fourth 4th fifth 5th sixth 6th seventh 7th eighth 8th "
    "ninth 9th tenth 10th"
)
_NO_SOLUTION = "no solutions|no real solution|no real solutions|there is no solution|empty set|none"
_ALL_REALS = "all reals|all real|real numbers|reals|set of all real numbers|every real number"
_PHRASES = dict.fromkeys("dne|undefined|not exist|doesnt exist".split("|"), "does not exist")
_PHRASES |= dict.fromkeys(_NO_SOLUTION.split("|"), "no solution")
_PHRASES |= dict.fromkeys(_ALL_REALS.split("|"), "all real numbers")
PHRASE_LATEX = {"all real numbers": "\\R", "no solution": "\\emptyset"}
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::\d\d)?\s*(?:([ap])\.?\s?m\.?|(o'?clock))?$", re.I)
_DATEISH = re.compile(r"\d[-/年.]\d|(?<!\\)\b[A-Za-z]{3}")
_YEAR_FIRST = re.compile(r"(\d{4})[-/年.](\d{1,2})[-/月.](\d{1,2})日?")
_YEAR_LAST = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_LAYOUT = re.compile(
    r"\\(?:text\w*|math\w+|emph|\w*box|\w+line|q?quad|left|right|rm|bf|it|[lL]arge|[^A-Za-z]|$)"
    r'|[{}$*_"]'
)
_CLASS_A = re.compile(r"(?<=\S) A(?![a-z])")
_HYPHEN = re.compile(r"(?<=[a-z]{2})-(?=[a-z]{2})")
_APOSTROPHE = re.compile(r"(?<=\w)'s\b|'")
_POINT = re.compile(r"(?<=[a-z])\.(?=[a-z]\b)")


def words(t: str) -> str:
    """Words without case, articles, punctuation: what names and phrases are compared by."""
    t = _LAYOUT.sub(" ", t)
    t = _CLASS_A.sub(" \u00c0", t).lower() if " A" in t else t.lower()  # Class A: no article
    t = t.replace("&", " and ")
    t = _HYPHEN.sub(" ", t) if "-" in t else t
    t = _APOSTROPHE.sub("", t) if "'" in t else t
    t = _POINT.sub("", t) if "." in t else t  # p.m. -> pm.
    out = [w.strip(".,;:!?()[]") for w in t.split()]
    out = [_SAME_WORD.get(w, w) for w in out if w]
    out = " ".join([w for w in out if w not in ("a", "an", "the")] or out)
    return _PHRASES.get(out, out)


def same_word_list(p: str, g: str) -> bool:
    """[Gambia, Niger] = Niger and Gambia: names in any order, but (A, C) in this one."""
    lists = []
    for t in (p, g):
        parts = re.split(r"\s*(?:,|;|\band\b|&)\s*", clean(t).strip("[](){} "))
        parts = [w for w in map(words, parts) if w]
        lists.append(parts if "(" in t[:2] else sorted(parts))
    if lists[0] != lists[1] or len(lists[0]) < 2 or not re.search(r"[^\W\d]", "".join(lists[0])):
        return False
    return all(re.fullmatch(r"[\w .'%-]+", w) for w in lists[0])


def clock(t: str) -> tuple[int, bool, bool] | None:
    """(minutes, is the half of the day known, was it written) of a time of day, else None."""
    t = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(t.lower(), t)
    m = _TIME.match(t.strip())
    if not m or not (m[2] or m[3] or m[4]) or int(m[1]) > 24 or int(m[2] or 0) > 59:
        return None
    hour, minute = int(m[1]), int(m[2] or 0)
    if m[3] and hour <= 12:  # 2:10 pm on the 24-hour clock
        hour = hour % 12 + 12 * (m[3].lower() == "p")
    return hour * 60 + minute, bool(m[3]) or hour > 12, bool(m[3])


def same_clock(a: tuple, b: tuple) -> bool:
    """14:10 = 2:10 P.M.; 8:55 = 8:55 A.M., where one does not say the half of the day."""
    open_half = a[1] != b[1] and a[2] != b[2] and (a[0] - b[0]) % 720 == 0
    return a[:2] == b[:2] or (open_half and min(a[0], b[0]) < 780)


def date(t: str) -> tuple[int, int, int] | None:
    """(year or 0, month, day) of a written date; None if it is none."""
    if len(t) > 40 or t.isalpha() or not _DATEISH.search(t):
        return None
    if m := _YEAR_FIRST.fullmatch(t):
        return int(m[1]), int(m[2]), int(m[3])
    if m := _YEAR_LAST.fullmatch(t):
        return int(m[3]), int(m[1]), int(m[2])
    t = re.sub(r"(?<=\d)(st|nd|rd|th)\b|\bof\b|\bthe\b", "", t.lower())
    parts = [_ABBREV.get(p, p) for p in re.findall(r"[a-z]+|\d+", t)]
    months = [_MONTHS.index(p) + 1 for p in parts if p in _MONTHS]
    numbers = [int(p[:5]) for p in parts if p.isdigit()]
    days = [k for k in numbers if k <= 31]
    years = [k for k in numbers if 31 < k < 10000]
    if len(months) == 1 and len(days) == 1 and len(years) <= 1 and len(parts) == 2 + len(years):
        return sum(years), months[0], days[0]
    return None
