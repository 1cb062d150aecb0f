"""Tests of reward.py and answers/: cases, properties, format, hostile answers, real data.

The table of cases lies beside this file in reward_cases.txt, one case a line. Nothing here needs a
network, a GPU or torch. Set REWARD_FUZZ=2000 for a longer fuzz than the default.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reward as R

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LIMIT = 0.25  # processor seconds of a verdict; about 0.1 on an idle core


def table():
    kind = ""
    for line in (ROOT / "tests" / "reward_cases.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = line[3:]
        elif line.strip() and not line.startswith("#"):
            verdict, pred, gold, source, *options = [x.strip() for x in line.split(" ¦ ")]
            yield kind, verdict, pred, gold, source, options[0].split(" / ") if options else None


CASES = list(table())


@pytest.mark.parametrize("kind", list(dict.fromkeys(c[0] for c in CASES)))
def test_table(kind):
    """Every case of a kind; both ways round unless its verdict ends in >."""
    wrong = []
    for k, verdict, pred, gold, source, choices in CASES:
        for a, b in (
            [(pred, gold), (gold, pred)][: 1 if verdict.endswith(">") else 2] if k == kind else []
        ):
            if R.is_equiv(a, b, choices) != verdict.startswith("yes"):
                wrong.append(f"{verdict}: {a!r} against {b!r} ({source})")
    assert not wrong, "\n".join(wrong)


def test_table_is_broad():
    assert (
        len(CASES) > 500
        and min(sum(c[1].startswith(v) for c in CASES) for v in ("yes", "no")) > 150
    )


# ---- format --------------------------------------------------------------------------------------
GOOD = {
    "<think>a</think><answer>5</answer>": "5",
    "<think> a </think> <answer> 5 </answer>": "5",
    "<think>\na\n</think>\n\n<answer>\n5\n</answer>\n": "5",
    "<think></think><answer>5</answer>": "5",
    "<think>a</think>\t<answer>5</answer>  \n": "5",
    "<think>a < b and c > d</think><answer>x < 5</answer>": "x < 5",
    "<think>a</think><answer>Final Answer:B</answer>": "B",
    "<think>a</think><answer> Final Answer: B </answer>": "B",
    "<think>a</think><answer>**Final Answer:** 5</answer>": "5",
    "<think>a</think><answer>**Final Answer**: 5</answer>": "5",
    "<think>a</think><answer>**Final Answer: 5**</answer>": "5",
    "<think>a</think><answer>FINAL ANSWER: \\boxed{5}</answer>": "5",
    "<think>a</think><answer>final answer：5</answer>": "5",
    "<think>a</think><answer>\\boxed{\\frac{1}{2}}</answer>": "\\frac{1}{2}",
    "<think>a</think><answer>$\\boxed{5}$</answer>": "5",
    "<think>a</think><answer>\\boxed{Final Answer: 5}</answer>": "5",
    "<think>a</think><answer>Final Answer: **B**</answer>": "B",
    "<think>a</think><answer>\\boxed{\\boxed{5}}</answer>": "5",
    "<think>a</think><answer>\\boxed{1}, \\boxed{2}</answer>": "\\boxed{1}, \\boxed{2}",
    "<think>a</think><answer><b>5</b></answer>": "<b>5</b>",
    "<think> A1 3 3 , A2 2 5 . so 5 . </think> <answer> 5 </answer>": "5",
    "<think>\\boxed{6}</think><answer>5</answer>": "5",
    "<think>一</think><answer>５</answer>": "５",
}
BAD = [
    "",
    " ",
    "5",
    "<answer>5</answer>",
    "<think>a</think>5",
    "<think>a</think>",
    "<think>a",
    "<think>a</think><answer>5",
    "<think>a</think><answer></answer>",
    "<think>a</think><answer>  \n </answer>",
    "<think>a</think><answer>\\boxed{}</answer>",
    "<think>a</think><answer>Final Answer:</answer>",
    "<think>a</think><answer>**Final Answer:** </answer>",
    "<answer>5</answer><think>a</think>",
    "<think>a<answer>5</answer></think>",
    "<think>a</think><answer>5</answer><answer>6</answer>",
    "<think>a</think><think>b</think><answer>5</answer>",
    "<think>a</think><answer>5</answer>.",
    "x<think>a</think><answer>5</answer>",
    "<think>a</think>so<answer>5</answer>",
    "<think><think>a</think></think><answer>5</answer>",
    "<think>a</think><answer><answer>5</answer></answer>",
    "<think>a <answer> b</think><answer>5</answer>",
    "<think>a </answer> b</think><answer>5</answer>",
    "<think>a</think></think><answer>5</answer>",
    "<THINK>a</THINK><ANSWER>5</ANSWER>",
    "<think>a</think><answer>5</answer",
    "think>a</think><answer>5</answer>",
    "<think>a</answer><answer>5</think>",
    "<think>a</think><answer>5<think></answer>",
    "<think>a</think><answer>5</answer></answer>",
    "</think><think><answer>5</answer>",
    "<think>a</think><answer>5</answer><|im_end|>",
    "<think >a</think><answer>5</answer>",
    "<think>a</think><answer/>5</answer>",
    "<think>a</think><answer>5</answer>\u200b",
    "\n<think>a</think><answer>5</answer>",
    None,
    5,
]


@pytest.mark.parametrize("completion", list(GOOD))
def test_format_good(completion):
    assert R.extract_answer(completion) == GOOD[completion]


@pytest.mark.parametrize("completion", BAD)
def test_format_bad(completion):
    assert R.extract_answer(completion) is None
    assert R.score(completion, "5")[:2] == (0.0, "format")


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>" * 40_000,
        "<think>" * 200_000,
        "<answer>" * 100_000 + "</answer>" * 100_000,
        "<think>a</think>" + " " * 10**6 + "x<answer>5</answer>",
        "<think></think><answer>" + "\\boxed{" * 100_000 + "</answer>",
        "<think></think><answer>" + " *" * 300_000 + "</answer>",
        "<think>" + "\n" * 10**6,
    ],
)
def test_format_is_linear(text):
    begun = time.perf_counter()
    R.extract_answer(text)
    R.loose_answer(text)
    assert time.perf_counter() - begun < 2


# ---- score ---------------------------------------------------------------------------------------
def wrap(answer, chain="so"):
    return f"<think>{chain}</think><answer>{answer}</answer>"


def test_hffrf_needs_format_and_result():
    assert R.score(wrap(5), "5") == R.Score(1.0, "ok", True, True, "5")
    assert R.score(wrap(6), "5") == R.Score(0.0, "wrong", True, False, "6")
    assert R.score("\\boxed{5}", "5") == R.Score(0.0, "format", False, False, None)
    assert R.score("<think>so 5", "5", truncated=True) == R.Score(
        0.0, "truncated", False, False, None
    )
    for weight in (0.0, 1.0):
        for text in (wrap(5), "<answer>5</answer> and so", "\\boxed{5}"):
            assert R.score(text, "5", truncated=True, format_weight=weight) == R.Score(
                0.0, "truncated", False, False, None
            )
    assert R.score(wrap("the sum of its parts"), "5").why == "unparsable"
    assert R.score(wrap("B"), "54°", choices=["45°", "54°"]).reward == 1.0
    assert R.score(wrap(5), 5).reward == 1.0


def test_zero_variant_is_one_to_one():
    """Vision-R1-Zero: format and result count the same (paper, App. A)."""
    assert R.score(wrap(5), "5", format_weight=1.0).reward == 1.0
    assert R.score(wrap(6), "5", format_weight=1.0)[:4] == (0.5, "wrong", True, False)
    assert R.score("so <answer>5</answer>", "5", format_weight=1.0)[:4] == (
        0.5,
        "format",
        False,
        True,
    )
    assert R.score("so \\boxed{6} no, \\boxed{5}", "5", format_weight=1.0)[:4] == (
        0.5,
        "format",
        False,
        True,
    )
    assert R.score("5", "5", format_weight=1.0)[:2] == (0.0, "format")
    assert R.score(wrap(6), "5", format_weight=0.25).reward == pytest.approx(0.2)


# ---- properties ----------------------------------------------------------------------------------
def corpus():
    out = list(dict.fromkeys(x for c in CASES for x in c[2:4]))
    return [x for x in out if R.core_text(x) and "Final" not in x and x[-1] != "\\"]  # \\boxed{5\\}


def test_reflexive_and_blind_to_dress():
    """An answer equals itself, and itself in dollars, in a box, with spaces, with a full stop."""
    wrong = []
    for a in corpus():
        dresses = [a, f"  {a} \n", f"\\boxed{{{a}}}"]
        if "$" not in a and "\\usd" not in a:
            dresses += [f"${a}$", f"\\({a}\\)", f"The answer is: {a}"]
        wrong += [(d, a) for d in dresses if not R.is_equiv(d, a)]
    assert not wrong


def test_latex_spellings_do_not_matter():
    swaps = [
        ("\\frac", "\\dfrac"),
        ("\\frac", "\\tfrac"),
        ("(", "\\left("),
        (")", "\\right)"),
        (",", ",\\,"),
        ("\\circ", "{\\circ}"),
        ("\\cdot", "\\times"),
    ]
    wrong = []
    for _kind, verdict, pred, gold, _source, choices in CASES:
        for old, new in swaps:
            if "\\" not in pred or old not in pred or choices or verdict != "yes":
                continue
            if old in "()" and (
                "\\left" in pred
                or "\\(" in pred
                or "\\text" in pred
                or pred.count("(") != pred.count(")")
            ):
                continue
            if old == "," and re.search(r"\d,\d{3}", pred):  # a thousands separator
                continue
            if (
                "_" not in pred
                and "{,}" not in pred
                and ",\\" not in pred
                and not R.is_equiv(pred.replace(old, new), gold)
            ):
                wrong.append((pred.replace(old, new), gold))
    assert not wrong


def test_random_numbers_keep_their_value():
    rng = random.Random(0)
    for _ in range(300):
        p, q, k = rng.randint(-50, 50), rng.randint(2, 30), rng.choice([2, 3, 5, 7])
        spellings = [
            f"{p}/{q}",
            f"\\frac{{{p}}}{{{q}}}",
            f"\\frac{{{k * p}}}{{{k * q}}}",
            f"x = \\dfrac{{{p}}}{{{q}}}",
            f"({p})\\div {q}",
            f"{p} \\cdot {q}^{{-1}}",
            f"{p / q:.9f}",
        ]
        other = f"{p + 1}/{q}"
        for s in spellings:
            assert R.is_equiv(s, spellings[0]) and R.is_equiv(spellings[0], s), (s, spellings[0])
            assert not R.is_equiv(s, other) and not R.is_equiv(other, s), (s, other)


def test_random_polynomials():
    """A product equals its expansion, and no expansion with another constant."""
    rng = random.Random(1)
    for _ in range(100):
        a, b, c, d = (rng.randint(-9, 9) or 1 for _ in range(4))
        product = f"({a}x{b:+d})({c}x{d:+d})"
        assert R.is_equiv(product, f"{a * c}x^2{a * d + b * c:+d}x{b * d:+d}")
        assert not R.is_equiv(product, f"{a * c}x^2{a * d + b * c:+d}x{b * d + 1:+d}")


# ---- hostile answers -----------------------------------------------------------------------------
class Tripwire:
    """Creating this file is what injected code tries."""

    path = "reward_was_executed.txt"


INJECTIONS = [
    "__import__('os').system('touch %s')",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: open('%s','w'))()",
    'exec(\'open("%s","w")\')',
    "eval('1+4')",
    "open('%s','w').write('x')",
    "{0.__class__}",
    "{self.__init__.__globals__}",
    "%%s%%n",
    'f\'{open("%s","w")}\'',
    "5 if open('%s','w') else 6",
    "[c for c in ().__class__.__mro__]",
    "x.__class__",
    "sympify('5')",
    "Symbol('x').func.__globals__",
    "\\input{/etc/passwd}",
    "\\write18{touch %s}",
    "$(touch %s)",
    "`touch %s`",
    "; touch %s",
    "'; DROP TABLE answers; --",
    "<script>alert(5)</script>",
    "getattr(int,'real')",
    "print(5)",
    "S('__import__(\"os\")')",
    "E.subs",
    "I.is_real",
    "globals()",
    "vars()['x']",
    "5;import os",
    "5\nimport os",
    "yield 5",
    "await 5",
    "5 := 5",
    "del x",
    "raise SystemExit",
    "exit()",
    "quit()",
    "breakpoint()",
    "input()",
]
BOMBS = [
    "9**9**9**9",
    "9^9^9^9^9",
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "2^{10^9}",
    "(2^{100})^{(2^{100})}",
    "((9!)!)!",
    "1000000!",
    "999999999!",
    "99!!!!!!!",
    "10^{-10^{10}}",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\sum_{k=1}^{10^{12}} k",
    "\\prod_{k=1}^{10^9} k",
    "\\int_0^1 x^{10^9} dx",
    "\\lim_{x\\to 0} \\sin(x)/x",
    "sum(range(10**10))",
    "1e999",
    "1e-999",
    "1e99999999",
    "0." + "0" * 5000 + "1",
    "9" * 5000,
    "1" + "0" * 1500,
    "x" * 3000,
    "x^" * 500 + "x",
    "(" * 500 + "5" + ")" * 500,
    "[" * 5000,
    "{" * 100_000,
    "}" * 100_000,
    "(" * 10**6,
    "\\frac{" * 3000,
    "\\frac{1}{" * 30 + "7" + "}" * 30,
    "\\sqrt{" * 200 + "5" + "}" * 200,
    "-" * 10_000 + "5",
    "+" * 600 + "5",
    "5" + "!" * 500,
    "1" + "/1" * 290,
    "5" + "%" * 500,
    "|" * 1000,
    "|" * 3 + "5" + "|" * 3,
    "1," * 5000,
    "1," * 290 + "1",
    "\\{" + "1," * 250 + "1\\}",
    " " * 10**6,
    "5" + " " * 10**6 + "5",
    "\n" * 10**6 + "5",
    "a" * 10**6,
    "1" * 10**6,
    "\\" * 10**6,
    "$" * 10**6,
    "\\boxed{" * 10_000 + "5" + "}" * 10_000,
    "The answer is " * 70_000,
    "*" * 10**6,
    "**" * 5000 + "5",
    "é" * 10**6,
    "²" * 10**5,
    "½" * 10**5,
    "五" * 10**5,
    "\u202e5",
    "5\u0301",
    "🙂" * 1000,
    "\x00",
    "5\x00",
    "\x005",
    "\x00" * 10**6,
    "5\x1b[31m",
    "\ud800",
    "5\ufffe",
    "{5",
    "5}",
    "(5",
    "5)",
    "[5",
    "\\left(5",
    "\\frac{1",
    "\\sqrt",
    "\\frac",
    "^",
    "_",
    "x^",
    "x_",
    "_{",
    "\\begin{pmatrix}",
    "\\begin{pmatrix}1&2",
    "\\begin{array}{" + "c" * 1000,
    "\\end{pmatrix}",
    "\\begin{pmatrix}" + "1&" * 290 + "1\\end{pmatrix}",
    "NaN",
    "nan",
    "inf",
    "-inf",
    "Infinity",
    "1/0",
    "0/0",
    "0^0",
    "0^{-1}",
    "\\infty-\\infty",
    "\\infty/\\infty",
    "\\tan(90^\\circ)",
    "\\ln 0",
    "\\log_1 5",
    "\\sqrt[0]{5}",
    "\\arcsin 2",
    "(-1)^{0.5}",
    "(-8)^{1/3}",
    "i^i",
    "e^{1000}",
    "e^{e^{e^{e}}}",
    "\\sin(10^{300})",
    "x^{1000000}",
    "(x+1)^{100000}",
    "(((x+1)^{99}+1)^{99}+1)^{99}",
    "x!" + "+x!" * 100,
    "+".join(f"x_{{{k}}}" for k in range(80)),
    "\\pm" * 100 + "5",
    "\\pm 1" * 100,
    "\\pm1,\\pm2,\\pm3" * 20,
    "(a|a)*" * 100,
    "((a+)+)+" * 50,
    "a" * 200 + "!",
    "1 " * 5000,
    "five " * 5000,
    "twenty-" * 3000,
    "hundred " * 300,
    "one hundred " * 5,
    "a.b." * 10_000,
    "A: " * 10_000,
    "(A)" * 10_000,
    "A, " * 20_000,
    "<think>" * 1000,
    "</answer>" * 1000,
    "<answer>5</answer>",
    "12:" * 5000,
    "1:1:" * 100 + "1",
    "5 " + "cm" * 2000,
    "5 cm" + "^2" * 100,
    "5 cm/" * 100 + "s",
    "5 square " * 100,
    "m" * 600,
    "5" + "^{-1}" * 200,
    "\\text{" * 5000,
    "\\text{\\text{\\text{\\text{\\text{5}}}}}",
    "$5$" * 1000,
    "5=" * 250 + "5",
    "x=" * 250 + "5",
    "5<" * 250 + "5",
    "\\cup" * 500,
    "(1,2)\\cup" * 60 + "(3,4)",
    "January " * 3000,
    "2003-" * 3000,
    "0x5",
    "0b101",
    "5j",
    "05e0",
    "5e",
    "5e+",
    "5_000",
    "1__0",
    "5.5.5",
    "..5",
    "5..",
    "·5",
    "5'",
    "5''''",
    "f'" * 300,
    "\\overline{" * 500,
    "0.\\overline{" + "3" * 5000 + "}",
    "0.\\overline{}",
    "\\frac{1}{0.\\overline{0}}",
]


@pytest.fixture(scope="module", autouse=True)
def in_scratch(tmp_path_factory):
    old = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("hostile"))
    yield
    os.chdir(old)


def fair(text):
    """Is 5, an infinity or 1 a fair reading of this strange text?"""
    spelt = (
        "<answer>5</answer>",
        "\\text{\\text{\\text{\\text{\\text{5}}}}}",
        "05e0",
        "5\ufffe",
        "5'",
        "inf",
        "Infinity",
    )
    return (
        text in spelt
        or "boxed" in text
        or text.startswith(("5=", "x="))
        or text.endswith("\n5")
        or not text.strip(" \n+-5\x00%$*=/.|01!^{}(e)")
    )


@pytest.mark.parametrize(
    "gold", ["5", "\\frac{\\sqrt{3}}{2}", "x+1", "B", "Yes", "(1,2)", "1, 2", "\\infty"]
)
def test_hostile(gold):
    """No crash, no code run, no second of work, and nothing accepted."""
    before, slow, taken = R.stats(), [], []
    for text in [t.replace("%s", Tripwire.path) for t in INJECTIONS] + BOMBS:
        begun = time.process_time()
        for a, b in ((text, gold), (gold, text)):
            if R.is_equiv(a, b) and not fair(text):
                taken.append((text[:60], gold))
        R.extract_answer(wrap(text))
        if time.process_time() - begun > LIMIT:
            slow.append((text[:60], time.process_time() - begun))
    assert not slow and not taken
    assert R.stats() == before
    assert not os.path.exists(Tripwire.path)


def near_the_limits():
    """Answers that are as much work as the limits of length, tokens and digits allow."""
    pieces = (
        "( [ { | \\sqrt{ 9^ 1/ 1: x= x<1, x=1, x=\\pm1, \\{1,2\\}\\cup (1,2)\\cup \\{1, \\frac12 "
        "\\frac{1}{ 1000!* 1000!/999!+ 99^{999}* 99^{2400}, 1e300* 1e-300* 1e-300+ x_1+ "
        "(x+1)^{99}* (x+1)^{99}, \\sin \\log_2 (-8)^{5/9}+ \\binom{1000}{500}* cm^2 m/s* word, A,"
    ).split()
    pieces += [
        "and ",
        "x or ",
        "x>1 or \\sinh x+",
        "5 hours 20 minutes ",
        "sin ",
        "1/(2^{16000}+1)+",
        "3000!/2999!+",
        "\\frac{1}{2999!}+",
        "\\binom{3000}{1500}*",
        "\\sum_{k=1}^{500}",
        "\\prod_{k=1}^{400}k",
        "\\sum_{k=1}^{400}\\frac{1}{k}+",
        "\\int_0^1 x\\lim_{x\\to 3}",
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{64}",
        "\\begin{pmatrix}x&2\\\\3&4\\end{pmatrix}^{9}+",
        "(1,2)+x",
        "[0,1]\\cup(2,3)\\setminus\\{5\\}\\cap",
        "\\{1,2\\}\\cap",
        "x\\ne 1,x>",
        "1<|x|<5,",
        "1,2;",
        "\\lfloor",
        "\\max(1,",
        "7\\bmod",
        "\\Delta x",
    ]
    for piece in pieces:
        for length in (590, 1990, R.LONGEST):
            text = (piece * length)[:length]
            yield text
            yield text.rstrip("+*/^,=<:-")
            yield "\\{" + text[:-4].rstrip(",") + "\\}"
    for gap in (" ", "\t", "~", "$", "&"):  # gaps, which patterns with \s* read again and again
        for before, after in (("1", "x"), ("yes" * 30, "B"), ("^", "{\\deg}"), ("\\over", "{,")):
            yield before + gap * (R.LONGEST - 100) + after


def test_work_is_bounded():
    """The slowest verdict takes about a tenth of a second of processor time; nothing crashes."""
    before, slow = R.stats(), []
    for text in near_the_limits():
        swapped = text.replace("1", "2", 1)
        members = ",".join(reversed(text.split(",")))
        for other in ("5", "x+1", "1, 2", text + " ", swapped, members):
            begun = time.process_time()
            R.is_equiv(text, other)
            seconds = time.process_time() - begun
            if seconds > LIMIT:
                slow.append((text[:40], len(text), other[:40], seconds))
    assert not slow and R.stats() == before


def square(n, cell):
    rows = ["&".join(cell.replace("N", str(3 * i + j * j)) for j in range(n)) for i in range(n)]
    return "\\begin{pmatrix}" + "\\\\".join(rows) + "\\end{pmatrix}"


@pytest.mark.parametrize("n", [2, 5, 8, 16])
def test_large_matrices_are_bounded(n):
    """Determinants, powers and products of the largest matrices that the limits let through."""
    for cell in ("N", "x+N", "\\frac{1}{N+1}"):
        m = square(n, cell)
        for text in (f"|{m}|", f"\\det{m}", f"{m}^{{64}}", m + m, f"{m}+{m}", square(n, f"|{m}|")):
            begun = time.process_time()
            R.is_equiv(text, "5")
            R.is_equiv(text, text.replace("4", "5"))
            assert time.process_time() - begun < 2 * LIMIT, text[:60]


def nested_sets(depth, leaf, k=1):
    if depth == 0:
        return leaf.format(k)
    first, second = nested_sets(depth - 1, leaf, k), nested_sets(depth - 1, leaf, k + 1)
    return f"\\{{{first}, {second}\\}}"


def test_a_comparison_without_end_is_stopped():
    """Sets of sets multiply the comparisons; running out of steps is no agreement."""
    begun = time.process_time()
    assert R.is_equiv(nested_sets(4, "{}+x"), nested_sets(4, "x+{}"))
    assert not R.is_equiv(nested_sets(6, "{}+x"), nested_sets(6, "x+{}"))
    assert time.process_time() - begun < 2 * LIMIT


def test_hostile_memory():
    """The whole hostile list in a process of its own stays below 512 MiB (address space)."""
    code = (
        "import sys, resource\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "import reward as R; from test_reward import BOMBS, INJECTIONS\n"
        "for t in BOMBS + INJECTIONS: R.is_equiv(t, '5'); R.is_equiv(t, 'x+1')\n"
        "print(R.stats()['crashes'])"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_no_evaluation_in_the_source():
    forbidden = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
    for path in [ROOT / "reward.py", *(ROOT / "answers").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & forbidden, path


def test_import_is_light():
    """Importing reward must not pull in sympy, torch or numpy."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reward\n"
        "print(sorted({'sympy', 'torch', 'numpy', 'mpmath'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


# ---- command line --------------------------------------------------------------------------------
def command(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


def test_command_line():
    assert "verdict: equal" in command("reward.py", "3\\sqrt{2}", "\\sqrt{18}").stdout
    assert "verdict: not equal" in command("reward.py", "6 (or 5)", "5").stdout
    assert "usage" in command("reward.py").stderr
    moved = command("reward.py", "audit", "s.jsonl")
    assert moved.returncode == 2 and "python -m tools.agree s.jsonl" in moved.stderr


def test_answers_of_a_run_and_released_ones_are_judged_again(tmp_path):
    rows = [
        {"completion": wrap(5), "answer": "5", "why": "ok", "reward": 1.0},
        {"completion": wrap(6), "answer": "5", "reward": 1.0},
        {"completion": "5", "answer": "5"},
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = command("-m", "tools.agree", str(tmp_path / "s.jsonl")).stdout
    assert "3 samples" in out and "reward was 1.0" in out and "format" in out
    missing = command("-m", "tools.agree", str(tmp_path / "none.jsonl"))
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1
    from tools import agree  # brings torch, which the reward does without

    official = dict(item_id="q7", gt_answer="5", choices=None, correct=True)
    both = [official | {"extracted": "5"}, official | {"extracted": "6"}]
    (tmp_path / "released.jsonl").write_text("\n".join(map(json.dumps, both)))
    out = agree.agree(str(tmp_path / "released.jsonl"))
    assert "2 answers, 50.00%" in out and "wrong by us ('6' against '5'), officially right" in out


# ---- real data -----------------------------------------------------------------------------------
def rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


BENCHMARKS = (
    "algopuzzlevqa chartqa_owid dynamath gaokao_mm_math geometry3k mathverse mathvision mathvista "
    "puzzlevqa scemqa_math tabmwp"
)


@pytest.mark.parametrize("name", BENCHMARKS.split())
def test_golds_of_real_data(name):
    """Every gold equals itself in a box; with options, the letter and the text find the gold."""
    for r in rows(f"{name}/data.jsonl"):
        gold, choices = r["answer"], r["choices"]
        for dress in ("{}", "\\boxed{{{}}}", "The answer is {}."):
            assert R.is_equiv(dress.format(gold), gold), r["id"]
        if choices and len(set(choices)) == len(choices) and (gold in choices or len(gold) == 1):
            k = choices.index(gold) if gold in choices else ord(gold) - 65
            assert R.is_equiv(chr(65 + k), gold, choices) and R.is_equiv(
                choices[k], gold, choices
            ), (r["id"], gold, choices)
            assert not R.is_equiv(chr(65 + (k + 1) % len(choices)), gold, choices), r["id"]


@pytest.mark.parametrize(
    "name, field, least", [("mathvision", "extracted", 0.99), ("mathvista", "prediction", 1.0)]
)
def test_agrees_with_official_verdicts(name, field, least):
    """The rest name the right option by its text, which the rule of MathVision does not accept."""
    got = [
        R.is_equiv(str(r[field]), r["gt_answer"], r["choices"]) == r["correct"]
        for r in rows(f"model_responses/{name}.jsonl")
    ]
    assert sum(got) / len(got) >= least


# ---- fuzz ----------------------------------------------------------------------------------------
# Random strings of these are the fuzz.
PIECES = [
    "1",
    "2",
    "5",
    "10",
    "0.5",
    "x",
    "y",
    "+",
    "-",
    "*",
    "/",
    "^",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    ",",
    "\\frac",
    "\\sqrt",
    "\\pi",
    "\\pm",
    "=",
    "<",
    "\\cup",
    "\\sin",
    "\\ln",
    "!",
    "%",
    "^\\circ",
    "cm",
    " ",
    "or",
    "and",
    "\\infty",
    "\\text{",
    "|",
    "$",
    "\\boxed{",
    "A",
    ":",
    "_",
    "e",
    "i",
    "\\{",
    "\\}",
    "9999",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    "½",
    "²",
    "度",
    "！",
    "\x00",
    "'",
    "five",
    "\\sum_{k=1}^{",
    "\\lim_{x\\to ",
    "\\int_0^",
    "\\bmod",
    "\\pmod{",
    "\\lfloor",
    "\\rfloor",
    "\\setminus",
    "\\cap",
    "\\in",
    "\\ne",
    "\\det",
    "\\max",
    "\\Delta",
    ";",
    "!",
]


def test_fuzz_pieces():
    """Random strings of pieces of answers: no crash, no slow call, symmetric, reflexive."""
    rng, before = random.Random(7), R.stats()["crashes"]
    for _ in range(int(os.environ.get("REWARD_FUZZ", 1500))):
        a, b = ("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14))) for _ in range(2))
        begun = time.perf_counter()
        assert R.is_equiv(a, b) == R.is_equiv(b, a), (a, b)
        assert time.perf_counter() - begun < 1, (a, b)
        assert not R.core_text(a) or R.is_equiv(a, a), a
    assert R.stats()["crashes"] == before, R.stats()


def test_fuzz_hypothesis():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is optional")
    st = hypothesis.strategies
    answers = st.one_of(
        st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
    )

    @hypothesis.settings(
        max_examples=int(os.environ.get("REWARD_FUZZ", 300)), deadline=1000, database=None
    )
    @hypothesis.given(answers, answers)
    def check(a, b):
        before = R.stats()["crashes"]
        R.is_equiv(a, b)
        assert R.stats()["crashes"] == before, R.stats()
        assert R.extract_answer(a) is None
        assert R.score(wrap(a), b).why in ("ok", "format", "wrong", "unparsable")

    check()
