"""The benchmarks of the paper's tables: where their files are, how an answer is scored, what is reported.

  load(name, path)                 -> the questions, read from the published files (or fetched from the hub)
  official(name, text, question)   -> Verdict by the authors' rules, on the contents of <answer> or on any response
  fork(name, text, question)       -> Verdict by the rules of the paper's own evaluation (a fork of VLMEvalKit)

Where the authors let a language model extract the answer or compare it, rules stand in for it here; what they cannot tell is
a Verdict with decided=False: wrong, unless a judge (eval.py --judge_url) says otherwise. Nothing a model wrote is evaluated.
A question is anything with answer, choices and meta: a data.Record, or a line of responses.jsonl.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from answers.parse import Unparsable, parse, variables
from answers.text import clean, core_text, letters, unwrap
from benchmarks import report
from benchmarks.extract import (
    DOUBT,
    LONGEST,
    NUMBER,
    SHORT,
    can_infer,
    candidates,
    find_number,
    find_option,
    math_value,
    nearest,
    written_choices,
)
from nano import data
from reward import verdict as reward_verdict


class Verdict(NamedTuple):
    right: bool
    why: str  # for people
    given: str | None = None  # the answer that was compared
    decided: bool = True  # False: the rules cannot tell; counts as wrong


UNDECIDED = Verdict(False, "undecided: no answer found by rule", None, False)


# ---- MathVista -----------------------------------------------------------------------------------------------------------


def kind(q):
    """(question type, answer type, precision); guessed from the gold where a file does not say"""
    if q.choices:
        return "multi_choice", "text", None
    gold, answer_type = q.answer.strip(), q.meta.get("answer_type")
    if not answer_type:
        number = (
            "integer"
            if re.fullmatch(r"-?\d+", gold)
            else "float"
            if math_value(gold) is not None
            else "text"
        )
        answer_type = "list" if gold.startswith("[") else number
    return (
        "free_form",
        answer_type,
        int(float(q.meta.get("precision") or len(gold.partition(".")[2]))),
    )


def mathvista_match(extraction, q):
    """the authors' rule for an extracted answer: normalise by the answer's type, then the same text"""
    question_type, answer_type, precision = kind(q)
    text = str(extraction).strip()
    if question_type == "multi_choice":
        bracketed = re.findall(r"\(([a-zA-Z])\)", text)
        letter = bracketed[0].upper() if bracketed else text
        if len(letter) == 1 and 0 <= ord(letter) - 65 < len(q.choices):
            k, how = ord(letter) - 65, "letter"
        elif text in q.choices:
            k, how = q.choices.index(text), "text of the option"
        else:
            k, how = nearest(letter[:500], q.choices), "nearest option by edit distance"
        return Verdict(q.choices[k] == q.answer, f"{how}: option {chr(65 + k)}", q.choices[k])
    try:
        if answer_type == "integer":
            text = str(int(float(text)))  # truncates, as theirs does
        elif answer_type == "float":
            text = str(round(float(text), precision))
    except (ValueError, OverflowError):
        return Verdict(False, f"{text[:40]!r} is no {answer_type}", text)
    return Verdict(text == q.answer, f"{answer_type}: {text[:60]} against {q.answer}", text)


def mathvista_extract(text, q):
    """what the authors' language model would take out of a response: a text for mathvista_match, or None"""
    question_type, answer_type, _ = kind(q)
    text = text.strip()
    short = 0 < len(text) <= SHORT and "\n" not in text
    if question_type == "multi_choice":
        if text in q.choices:
            return text
        k, _ = find_option(text, q.choices)
        if k is not None:
            return q.choices[k]
        return text if short and not letters(core_text(text)) else None  # "A or B" is no answer
    if answer_type in ("integer", "float"):
        x = find_number(text)
        return None if x is None else repr(x)
    if answer_type == "list":
        for part in candidates(text):
            inner = re.findall(r"\[([^\[\]]{1,400})\]", part)
            numbers = NUMBER.findall(inner[-1] if inner else part)
            if inner and not numbers:
                return f"[{inner[-1]}]"
            if numbers and (inner or len(numbers) == q.answer.count(",") + 1):
                return (
                    "["
                    + ", ".join(str(float(x)) if "." in x else x.replace(",", "") for x in numbers)
                    + "]"
                )
        return None
    return next((core_text(part) for part in candidates(text) if part), None)


def mathvista(text, q):
    extraction = mathvista_extract(text, q)
    return UNDECIDED if extraction is None else mathvista_match(extraction, q)


def mathvista_fork(text, q):
    """VLMEvalKit: options by can_infer, numbers exactly equal without rounding; else an LLM extracts, for which our rules stand"""
    question_type, answer_type, _ = kind(q)
    if question_type == "multi_choice":
        k = can_infer(text, q.choices)
        k = find_option(text, q.choices)[0] if k is None else k
        return (
            UNDECIDED
            if k is None
            else Verdict(q.choices[k] == q.answer, f"option {chr(65 + k)}", q.choices[k])
        )
    if answer_type == "list":
        return Verdict(False, "VLMEvalKit never counts a list as right", text[:200])
    given = mathvista_extract(text, q)
    if given is None:
        return UNDECIDED
    if answer_type not in ("integer", "float"):
        return Verdict(given == q.answer, f"{given!r} against {q.answer!r}", given)
    x = float(given) if re.fullmatch(r"[-+.\deE]+", given) else None
    if x is None or answer_type == "integer" and x != int(x):
        return Verdict(False, f"{given[:40]!r} is no {answer_type}", given)
    return Verdict(x == float(q.answer), f"{answer_type}: {x:g} against {q.answer}, exactly", given)


# ---- MathVerse -----------------------------------------------------------------------------------------------------------


def mathverse(text, q, by_text=True):
    """the official judge's rule (the same meaning; for a choice also its text), by letters and by reward.py's equality"""
    gold = q.answer.strip()
    options = q.choices or written_choices(
        q.meta.get("question_for_eval") or q.meta.get("question") or ""
    )
    multi = q.meta.get("question_type", "").startswith("multi") or bool(options) and letters(gold)
    if not multi:
        return same_meaning(text, gold)
    if len(letters(gold) or ()) > 1:  # "Choose 2 answers"
        given = next(
            (found for part in candidates(text) if (found := letters(core_text(part[-1000:])))),
            None,
        )
        return (
            UNDECIDED
            if given is None
            else Verdict(
                given == letters(gold),
                f"{sorted(given)} against {gold!r}",
                ", ".join(sorted(given)),
            )
        )
    k, how = find_option(text, options or [f"({c})" for c in "ABCDEFGH"])
    if k is None:
        return same_meaning(text, gold) if letters(core_text(text)) else UNDECIDED
    if not by_text and "letter" not in how:
        return Verdict(
            False, f"text of option {chr(65 + k)} without its letter", chr(65 + k), decided=False
        )
    return Verdict(
        {chr(65 + k)} == letters(gold), f"{how}: {chr(65 + k)} against {gold}", chr(65 + k)
    )


def same_meaning(text, gold):
    """free form: the likeliest part of the response against the gold"""
    for part in candidates(text):
        part = part[:1000]
        right, why = reward_verdict(part, gold)
        if right or why != "unparsable":
            named = [f"{part[:60]!r} {'is' if right else 'is not'} {gold[:60]!r}", part]
            prose = len(part) > SHORT or re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", part)
            return Verdict(
                right, *named, right or not prose
            )  # a sentence may hold the answer and more: not wrong by rule
    return UNDECIDED


# ---- MM-Math -------------------------------------------------------------------------------------------------------------

_SYMBOLS = [
    ("\\left", ""),
    ("\\right", ""),
    ("，", ","),
    ("$", ""),
    ("（", "("),
    ("）", ")"),
    ("＋", "+"),
    ("\\, ", ""),
    ("\\,", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("°", ""),
    ("\\%", ""),
    ("%", ""),
]
_UNITS = re.compile(
    r"\\(?:text|mathrm|mathbf|rm)\s?\{\s*~?\s*(?:[cdkm]?m|厘米|分米|米)\s*\}\s*(?:\^\{?[23]\}?)?|厘米|分米|平方|(?<=[\d}])\s*[cdk]?m(?:\^\{?[23]\}?|[²³])?\s*$"
)


def mmmath(text, q, tolerance=1e-8):
    """the authors' rule: units off, split at commas, matched in any order; a number may be off by 100 (percent)"""
    solution = q.meta.get("solution", "")
    golds = dict.fromkeys(
        [", ".join(data.boxes(solution)) or q.answer, q.answer]
    )  # all its boxes, or its last
    given = mmmath_items(text)
    for gold in golds:
        want, left = mmmath_items(gold), list(given)
        for item in want:
            same = next((x for x in left if mmmath_same(item, x, tolerance)), None)
            if same is not None:
                left.remove(same)
        if want and len(want) == len(given) and not left:
            return Verdict(True, f"{', '.join(given)[:80]} is {gold[:80]}", ", ".join(given))
    return Verdict(False, f"{', '.join(given)[:80]} is not {q.answer[:80]}", ", ".join(given)[:400])


def mmmath_items(text):
    text = text.strip()[-LONGEST:]
    found = (
        data.boxes(text) or re.findall(r"\$([^$]{1,400})\$", text.split("\n")[-1]) or [text[-1000:]]
    )
    items = []
    for part in found:
        for old, new in _SYMBOLS:
            part = part.replace(old, new)
        part = part.split("\\in ")[-1]
        part = (
            re.sub(r"[\u4e00-\u9fff]+", "", _UNITS.sub("", part))
            if re.search(r"[^\u4e00-\u9fff]", part)
            else part
        )
        depth, start = 0, 0
        for i, c in enumerate(part + ","):
            depth += (c in "([{") - (c in ")]}")
            if c == "," and depth <= 0:
                items.append(part[start:i])
                start = i + 1
    pairs = [[x.replace("\\pm", s) for s in "+-"] if "\\pm" in x else [x] for x in items]
    return [y for pair in pairs for x in pair if (y := x.strip(" \n,.:;_=+`!@#&*~，。"))]


def mmmath_same(gold, x, tolerance):
    a, b = (
        math_value(t.rsplit("=", 1)[-1]) if t.count("=") <= 1 and not DOUBT.search(t) else None
        for t in (gold, x)
    )
    if a is None or b is None:
        return gold == x or reward_verdict(x[:1000], gold)[0]
    scales = (
        (1, 100, 0.01) if re.fullmatch(r"[-\d.]+", gold) and re.fullmatch(r"[-\d.]+", x) else (1,)
    )
    return any(abs(a * scale - b) <= 1.01 * tolerance for scale in scales)


# ---- MATH-Vision ---------------------------------------------------------------------------------------------------------

_OFF = [
    "\\text",
    "\\mbox",
    "\\left",
    "\\right",
    "^{\\circ}",
    "^\\circ",
    "{m}^3",
    "m^3",
    "{units}",
    "units",
    "{km}",
    "km",
    "\\$",
    "$",
    "\\!",
    "\\,",
    " ",
    "\n",
]


def mathvision_extract(text):
    """the authors' extraction, step for step: a closing letter, `is N`, `the answer is`, the last box; in lower case"""
    text = text.strip()[-LONGEST:]
    for c in "ABCDE":
        if text.endswith((f" {c}.", f" ({c}).")) or text.startswith(
            (f"{c}\n", f"({c})\n", f"({c}) {c}\n")
        ):
            text = c
    tail = text.split("is ")[-1].rstrip(".")
    text = tail if re.fullmatch(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*", tail) else text
    if "oxed{" not in text:
        for flag in (
            "the final answer is",
            "the answer is",
            "the correct answer is",
            "the answer should be",
        ):
            for flag in (flag, flag.replace("the", "The")):
                if flag in text:
                    text = text.split(flag)[-1].strip().split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = text.lower().replace("{}", "")
    at, end = text.find("oxed{"), text.rfind("}")
    text = text[at + 5 : end] if 0 <= at < end else text
    if "}" in text and text.find("}") < (text.find("{") if "{" in text else len(text)):
        text = text.split("}")[0]
    text = (
        text.split("=")[-1]
        .split("\\approx")[-1]
        .replace("\\\\", "\\")
        .replace("tfrac", "frac")
        .replace("dfrac", "frac")
    )
    for mark in _OFF:
        text = text.replace(mark, "")
    text = text.replace("\\%", "")
    text = re.sub(r"\(([a-e])\)", r"\1", text)
    return re.sub(r"\{([a-e])\}", r"\1", text).rstrip(".").lstrip(":").strip()


def mathvision_match(given, q):
    """the letter's or the value's text, or numbers that agree when rounded to two decimals: 1/55 counts as 1/60"""
    gold = q.answer.strip()
    golds = [gold] + (
        [q.choices[ord(gold) - 65]]
        if q.choices and re.fullmatch("[A-Z]", gold) and ord(gold) - 65 < len(q.choices)
        else []
    )
    given = given.lower().strip()
    for g in golds:
        if given and given == g.lower().strip():
            return Verdict(True, f"the same text as {g!r}", given)
        a, b = rounded(g), rounded(given)
        if a is not None and a == b:
            return Verdict(True, f"{given[:60]} and {g!r} are {a} to two decimals", given)
    return Verdict(False, f"{given[:60]!r} is not {' or '.join(golds)}", given)


@functools.lru_cache(10_000)
def rounded(text):
    """number to two decimals; a tuple for (a, b). None for units, degrees and variables: the authors' parser fails on them"""
    if len(text) > 300 or re.search(r"\\(?:mathrm|text|circ|degree|mbox)|°|<|>|~", text):
        return None
    items = re.fullmatch(r"\$?\s*([(\[])(.*,.*)[)\]]\s*\$?", text)
    if items:
        parts = [math_value(x) for x in items[2].split(",")]
        return None if None in parts else (items[1], *(round(x, 2) for x in parts))
    a, colon, b = text.replace("$", "").partition(":")
    try:
        if not re.search(r"\d|\\pi", text) or any(variables(parse(clean(x))) for x in (a, b) if x):
            return None
    except (Unparsable, RecursionError):
        return None
    x, y = math_value(a), math_value(b) if colon else 1.0
    return None if x is None or not y else round(x / y, 2)


def mathvision(text, q):
    return mathvision_match(mathvision_extract(text), q)


# ---- the others ----------------------------------------------------------------------------------------------------------


def dynamath(text, q, relative=1e-3):
    """float: off by at most 0.001, or by a thousandth of the value; multiple choice: the letter; text: the gold among the words"""
    answer_type = q.meta.get("answer_type", "text")
    if answer_type == "multiple choice":
        options = (
            q.choices
            or written_choices(q.meta.get("question") or getattr(q, "problem", ""))
            or list("ABCDEFGH")
        )
        k, how = find_option(text, options)
        gold = letters(q.answer.strip())
        return (
            UNDECIDED
            if k is None
            else Verdict(
                {chr(65 + k)} == gold, f"{how}: {chr(65 + k)} against {q.answer}", chr(65 + k)
            )
        )
    if answer_type == "float":
        x, gold = find_number(text), float(q.answer)
        if x is None:
            return UNDECIDED
        return Verdict(
            abs(x - gold) <= max(1e-3, relative * abs(gold)) + 1e-12,
            f"{x:g} against {gold:g}",
            f"{x:g}",
        )
    gold = q.answer.strip().lower()
    for part in candidates(text):
        if len(part) <= SHORT:
            words = rf"(?<!\w){re.escape(gold)}(?!\w)"
            same = bool(re.search(words, part.lower())) or reward_verdict(part, q.answer)[0]
            return Verdict(same, f"{part!r} {'gives' if same else 'does not give'} {gold!r}", part)
    return UNDECIDED


def mmstar(text, q):
    options = (
        q.choices
        or written_choices(q.meta.get("question") or getattr(q, "problem", ""))
        or list("ABCD")
    )
    k, how = find_option(text, options)
    return (
        UNDECIDED
        if k is None
        else Verdict(
            chr(65 + k) == q.answer.strip().upper(),
            f"{how}: {chr(65 + k)} against {q.answer}",
            chr(65 + k),
        )
    )


def chartqa(text, q):
    """relaxed accuracy: numbers within 5 % of the gold, other answers the same text in lower case; any of several labels"""

    def number(t):
        t = (
            t.strip().replace(",", "")
            if re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+(\.\d+)?%?\s*", t)
            else t.strip()
        )
        x = re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(%?)", t)
        return None if not x else float(t.rstrip("%")) / (100 if x[1] else 1)

    labels = [str(x) for x in q.meta.get("label") or [q.answer]]
    parts = candidates(text)
    part = unwrap(parts[0]).strip().rstrip(".") if parts else ""
    alone = NUMBER.findall(part)
    part = (
        part
        if number(part) is not None or len(alone) != 1 or number(labels[0]) is None
        else alone[0] + ("%" if f"{alone[0]}%" in part else "")
    )
    for label in labels:
        x, gold = number(part), number(label)
        if x is not None and gold:
            if abs(x - gold) <= 0.05 * abs(gold) * (1 + 1e-9):
                return Verdict(True, f"{part} is within 5 % of {label}", part)
        elif part.lower() == label.strip().lower():
            return Verdict(True, f"the same text as {label!r}", part)
    return Verdict(False, f"{part[:60]!r} against {labels}", part, len(part) <= SHORT)


def yes_no(text, q):
    """the one of yes and no that the answer says; the gold may be 1 or 0 (HallusionBench)"""
    gold = {"1": "yes", "0": "no"}.get(q.answer.strip(), q.answer.strip().lower())
    for part in candidates(text):
        found = {w for w in re.findall(r"[a-z]+", part.lower()) if w in ("yes", "no")}
        if len(found) == 1 or re.match(r"\W*(?:yes|no)\W*[,.;:]", part.lower()):
            said = re.search(r"\b(?:yes|no)\b", part.lower())[0]
            return Verdict(said == gold, f"{said} against {gold}", said)
    return UNDECIDED


# ---- the table of benchmarks -----------------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    title: str
    repo: str  # on the hub
    files: tuple  # patterns in it
    full: int  # questions when complete
    needs: tuple  # fields without which a file is another one; "a|b": one of them
    official: object
    fork: object = None  # where the paper's fork scores by other rules; else by the official ones on its own extraction
    prompt: str = ""  # the field that its authors ask, instead of the bare question
    ask: str = ""  # ours, added to the question where the authors leave the form of the answer open


YES_NO = "\nPlease answer yes or no."  # MME's questions end like this already
BENCHMARKS = {
    "mathvista": Benchmark(
        "MathVista testmini",
        "AI4Math/MathVista",
        ("data/testmini-*.parquet",),
        1000,
        ("question_type", "answer_type"),
        mathvista,
        mathvista_fork,
        "query",
    ),
    "mathverse": Benchmark(
        "MathVerse testmini",
        "AI4Math/MathVerse",
        ("testmini.parquet", "testmini_text_only.parquet"),
        3940,
        ("problem_version", "question_type"),
        mathverse,
        functools.partial(mathverse, by_text=False),
        "query_cot",
    ),
    "mm-math": Benchmark(
        "MM-Math",
        "THU-KEG/MM_Math",
        ("MM_Math/MM_Math.jsonl", "MM_Math/MM_Math.zip"),
        5929,
        ("solution", "difficult"),
        mmmath,
        functools.partial(mmmath, tolerance=1e-2),
    ),
    "dynamath": Benchmark(
        "DynaMath",
        "DynaMath/DynaMath_Sample",
        ("data/sample*.parquet",),
        5010,
        ("answer_type", "knowledge_level|level"),
        dynamath,
        functools.partial(dynamath, relative=0),
    ),
    "mathvision": Benchmark(
        "MATH-Vision",
        "MathLLMs/MathVision",
        ("data/test-*.parquet",),
        3040,
        ("level", "subject"),
        mathvision,
    ),
    "mmstar": Benchmark(
        "MMStar",
        "Lin-Chen/MMStar",
        ("mmstar.parquet",),
        1500,
        ("category", "l2_category|l2-category"),
        mmstar,
    ),
    "chartqa": Benchmark(
        "ChartQA",
        "HuggingFaceM4/ChartQA",
        ("data/test-*.parquet",),
        2500,
        ("human_or_machine|split",),
        chartqa,
    ),
    "mme": Benchmark(
        "MME",
        "lmms-lab/MME",
        ("data/test-*.parquet",),
        2374,
        ("category", "question_id|image_path"),
        yes_no,
    ),
    "hallusionbench": Benchmark(
        "HallusionBench",
        "lmms-lab/HallusionBench",
        ("data/*.parquet",),
        1129,
        ("figure_id|index", "set_id|index"),
        yes_no,
        ask=YES_NO,
    ),
}


def official(name, text, q):
    return BENCHMARKS[name].official(text, q)


def fork_prediction(completion):
    """what the paper's fork takes as the answer: with exactly these spaces, else the whole response"""
    at = completion.find("<answer> Final Answer:") if "<answer>" in completion else -1
    end = completion.find(" </answer>", at)
    return completion[at + 22 : end].strip() if 0 <= at < end else completion


def fork(name, completion, q):
    bench = BENCHMARKS[name]
    return (bench.fork or bench.official)(fork_prediction(completion), q)


def files(name, path=""):
    """data files of a benchmark: under `path` if one is given, else from the hub (its cache, when there is no network)"""
    if path:
        # DynaMath's ten variants, MathVerse's text-only file: every parquet of the folder; a folder of the hub's layout is found by it
        found = sorted(
            f
            for p in BENCHMARKS[name].files
            for f in Path(path).expanduser().glob(p)
            if f.suffix != ".zip"
        )
        return found or data._files(path)
    import huggingface_hub

    bench = BENCHMARKS[name]
    try:
        folder = huggingface_hub.snapshot_download(
            bench.repo, repo_type="dataset", allow_patterns=list(bench.files)
        )
    except Exception as error:  # no network, no such file in the cache, a gated repository: requests and the hub raise many kinds
        raise ValueError(
            f"{bench.title} is not on this machine and could not be fetched ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Download {', '.join(bench.files)} of https://huggingface.co/datasets/{bench.repo} elsewhere, "
            f"then say --bench {name}=FOLDER"
        ) from error
    return files(name, folder)


def load(name, path="", strict=False):
    """-> (Records with meta["bench"] and meta["tags"], data.Problems). ValueError for a file of another kind"""
    if name not in BENCHMARKS:
        from nano.run import nearest as alike

        raise ValueError(
            f"no benchmark {name!r}{alike(name, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}"
        )
    bench, records, problems, ids = BENCHMARKS[name], [], data.Problems(strict), set()
    for file in files(name, path):
        part, wrong = data.read(file, strict)
        problems += wrong
        for r in part:
            missing = [n for n in bench.needs if not any(x in r.meta for x in n.split("|"))]
            if missing:
                raise ValueError(
                    f"{file}: not {bench.title}: question {r.id} has no {' and no '.join(missing)}; "
                    f"fields found: {', '.join(r.meta) or 'none beside question and answer'}"
                )
            variant = r.meta.get("variant") or re.match(r"sample(?:_variant)?(\d+)", file.stem)
            if name == "dynamath" and variant:  # one file per variant of the same questions
                r.meta |= {
                    "seed": r.meta.get("qid") or r.id,
                    "variant": int(variant if isinstance(variant, int) else variant[1]),
                }
                r.id = f"{r.meta['seed']}-v{r.meta['variant']}"
            asked = r.meta.get(bench.prompt) if bench.prompt else None
            if asked:
                r.problem = data.MARK * len(r.images) + asked.replace(data.MARK, "")
            r.problem += (
                bench.ask if bench.ask and not re.search(r"yes or no", r.problem, re.I) else ""
            )
            r.id = f"{name}-{r.id.removeprefix(name + '-')}"
            while r.id in ids:
                r.id += "-copy"
            ids.add(r.id)
            r.meta |= {"bench": name, "tags": report.tags(name, r.meta)}
            r.source = bench.title
            records.append(r)
    if not records:
        raise ValueError(
            f"{path or bench.repo}: no usable question of {bench.title} in it\n{problems.summary()}"
        )
    return records, problems
