"""The benchmarks of the paper's tables: where their files are, and how an answer is scored.

  load(name, path)                -> the questions, from published files or from the hub
  official(name, text, question)  -> Verdict by the authors' rules, on an <answer> or on any text
  fork(name, text, question)      -> Verdict by the rules of the paper's own fork of VLMEvalKit

Where the authors ask a language model, rules stand in for it. What they cannot tell is a Verdict
with decided=False: wrong, unless a judge (eval.py --judge_url) says otherwise. A question `q` is a
data.Record, or anything else with answer, choices, problem and meta.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from answers.parse import Unparsable, parse, variables
from answers.text import clean, core_text, letters, unwrap
from benchmarks import extract
from benchmarks.extract import SHORT, candidates, find_option, math_value, option_index
from nano import data, hub, run
from reward import verdict as reward_verdict


class Verdict(NamedTuple):
    right: bool
    why: str  # for people
    given: str | None = None  # the answer that was compared
    decided: bool = True  # False: the rules cannot tell, and it counts as wrong


UNDECIDED = Verdict(False, "undecided: no answer found by rule", None, False)


def by_letter(k, how, gold):
    """The verdict on option number k, found in the way `how`."""
    if k is None:
        return UNDECIDED
    letter = chr(65 + k)
    return Verdict({letter} == letters(gold.strip()), f"{how}: {letter} against {gold}", letter)


# MathVista
def kind(q):
    return "choice" if q.choices else q.meta.get("answer_type", "text")


def chosen(k, how, q):
    """The verdict on option number k where the gold is the text of an option."""
    return Verdict(q.choices[k] == q.answer, f"{how}option {chr(65 + k)}", q.choices[k])


def mathvista_match(text, q):
    """The authors' rule for an extracted answer: normalise it by its type, then compare texts."""
    answer_type, text = kind(q), text.strip()
    if answer_type == "choice":
        bracketed = re.search(r"\(([a-zA-Z])\)", text)
        letter = bracketed[1].upper() if bracketed else text
        k = option_index(letter, q.choices)
        if k is not None:
            return chosen(k, "letter: ", q)
        if text in q.choices:
            return chosen(q.choices.index(text), "text of the option: ", q)
        distances = [extract.edit_distance(letter[:500], choice) for choice in q.choices]
        return chosen(distances.index(min(distances)), "nearest option by edit distance: ", q)
    try:
        if answer_type == "integer":
            text = str(int(float(text)))  # It truncates, as theirs does.
        elif answer_type == "float":
            digits = q.meta.get("precision") or len(q.answer.strip().partition(".")[2])
            text = str(round(float(text), int(float(digits))))
    except (ValueError, OverflowError):
        return Verdict(False, f"{text[:40]!r} is no {answer_type}", text)
    return Verdict(text == q.answer, f"{answer_type}: {text[:60]} against {q.answer}", text)


def mathvista_extract(text, q):
    """What the authors' language model would take out of a response, or None."""
    answer_type, text = kind(q), text.strip()
    if answer_type == "choice":
        k = None if text in q.choices else find_option(text, q.choices)[0]
        if k is not None:
            return q.choices[k]
        short = 0 < len(text) <= SHORT and "\n" not in text
        plain = short and not letters(core_text(text))  # "A or B" is no answer.
        return text if plain or text in q.choices else None
    if answer_type in ("integer", "float"):
        x = extract.find_number(text)
        return None if x is None else repr(x)
    if answer_type != "list":
        return next((core_text(part) for part in candidates(text) if part), None)
    for part in candidates(text):
        inner = re.findall(r"\[([^\[\]]{1,400})\]", part)[-1:]
        numbers = extract.NUMBER.findall(inner[0] if inner else part)
        if numbers and (inner or len(numbers) == q.answer.count(",") + 1):
            items = [str(float(x)) if "." in x else x.replace(",", "") for x in numbers]
            return f"[{', '.join(items)}]"
        if inner:
            return f"[{inner[0]}]"
    return None


def mathvista(text, q):
    extraction = mathvista_extract(text, q)
    return UNDECIDED if extraction is None else mathvista_match(extraction, q)


def mathvista_fork(text, q):
    """VLMEvalKit's rules: options by can_infer, numbers exactly equal, a list never right."""
    answer_type = kind(q)
    if answer_type == "choice":
        k = extract.can_infer(text, q.choices)
        k = find_option(text, q.choices)[0] if k is None else k
        return UNDECIDED if k is None else chosen(k, "", q)
    if answer_type == "list":
        return Verdict(False, "VLMEvalKit never counts a list as right", text[:200])
    given = mathvista_extract(text, q)  # in the place of an LLM
    if given is None:
        return UNDECIDED
    if answer_type not in ("integer", "float"):
        return Verdict(given == q.answer, f"{given!r} against {q.answer!r}", given)
    x = float(given)
    if answer_type == "integer" and not x.is_integer():
        return Verdict(False, f"{given[:40]!r} is no {answer_type}", given)
    return Verdict(x == float(q.answer), f"{answer_type}: {x:g} against {q.answer}, exactly", given)


# MathVerse
def mathverse(text, q, by_text=True):
    """The same meaning, by letters or by reward.py. by_text: an option's text is its letter."""
    gold = q.answer.strip()
    written = q.meta.get("question_for_eval") or q.meta.get("question") or ""
    options, golds = q.choices or extract.written_choices(written), letters(gold) or set()
    if not (q.meta.get("question_type", "").startswith("multi") or options and golds):
        return same_meaning(text, gold)
    if len(golds) > 1:  # "Choose 2 answers"
        for part in candidates(text):
            if given := sorted(letters(core_text(part[-1000:])) or ()):
                shown = f"{given} against {gold!r}"
                return Verdict(given == sorted(golds), shown, ", ".join(given))
        return UNDECIDED
    k, how = find_option(text, options or [f"({c})" for c in "ABCDEFGH"])
    if k is None and letters(core_text(text)):
        return same_meaning(text, gold)
    if k is not None and not by_text and "letter" not in how:
        letter = chr(65 + k)
        return Verdict(False, f"text of option {letter} without its letter", letter, decided=False)
    return by_letter(k, how, gold)


def same_meaning(text, gold):
    """The likeliest part of a free-form answer that can be read, against the gold."""
    for part in candidates(text):
        part = part[:1000]
        right, why = reward_verdict(part, gold)
        if right or why != "unparsable":
            # A sentence may hold the answer and more: rules cannot say that it is wrong.
            prose = len(part) > SHORT or re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", part)
            shown = f"{part[:60]!r} {'is' if right else 'is not'} {gold[:60]!r}"
            return Verdict(right, shown, part, decided=right or not prose)
    return UNDECIDED


# MM-Math
_CHINESE = str.maketrans("，（）＋", ",()+", "$°")
_NOISE = re.compile(r"\\left|\\right|\\, ?|\^\{\\circ\}|\^\\circ|\\?%")
_UNITS = re.compile(
    r"\\(?:text|mathrm|mathbf|rm)\s?\{\s*~?\s*(?:[cdkm]?m|厘米|分米|米)\s*\}\s*(?:\^\{?[23]\}?)?"
    r"|厘米|分米|平方|(?<=[\d}])\s*[cdk]?m(?:\^\{?[23]\}?|[²³])?\s*$"
)


def mmmath(text, q, tolerance=1e-8):
    """The authors' rule: units off, split at commas, in any order; percent may be off by 100."""
    given = mmmath_items(text)
    shown, boxes = ", ".join(given), ", ".join(data.boxes(q.meta.get("solution", "")))
    for gold in (boxes or q.answer, q.answer):  # all the boxes, or the last
        want, left = mmmath_items(gold), list(given)
        for item in want:
            same = [x for x in left if mmmath_same(item, x, tolerance)]
            if same:
                left.remove(same[0])
        if want and len(want) == len(given) and not left:
            return Verdict(True, f"{shown[:80]} is {gold[:80]}", shown)
    return Verdict(False, f"{shown[:80]} is not {q.answer[:80]}", shown[:400])


def mmmath_items(text):
    """The values of all boxes, else of the last line's formulas, else of the whole answer."""
    text = text.strip()[-extract.LONGEST :]
    formulas = re.findall(r"\$([^$]{1,400})\$", text.split("\n")[-1])
    items = []
    for part in data.boxes(text) or formulas or [text[-1000:]]:
        part = _NOISE.sub("", part.translate(_CHINESE)).split("\\in ")[-1]
        if re.search(r"[^\u4e00-\u9fff]", part):
            part = re.sub(r"[\u4e00-\u9fff]+", "", _UNITS.sub("", part))
        depth, start = 0, 0
        for i, c in enumerate(part + ","):
            depth += (c in "([{") - (c in ")]}")
            if c == "," and depth <= 0:
                items.append(part[start:i])
                start = i + 1
    signed = [item.replace("\\pm", s) for item in items for s in ("+-" if "\\pm" in item else "+")]
    return [x for item in signed if (x := item.strip(" \n,.:;_=+`!@#&*~，。"))]


def mmmath_same(gold, given, tolerance):
    pair = (gold, given)
    plain = not any(text.count("=") > 1 or extract.DOUBT.search(text) for text in pair)
    x, y = (math_value(text.rsplit("=", 1)[-1]) if plain else None for text in pair)
    if x is None or y is None:
        return gold == given or reward_verdict(given[:1000], gold)[0]
    numerals = all(re.fullmatch(r"[-\d.]+", text) for text in pair)
    scales = (1, 100, 0.01) if numerals else (1,)
    return any(abs(x * scale - y) <= 1.01 * tolerance for scale in scales)


# MATH-Vision
_FLAGS = ("final answer is", "answer is", "correct answer is", "answer should be")
_NUMERAL = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_OFF = r"\text \mbox \left \right ^{\circ} ^\circ {m}^3 m^3 {units} units {km} km \$ $ \! \, \%"


def mathvision_extract(text):
    """The authors' steps: a letter at the start or end, `is N`, `the answer is`, the last box."""
    text = text.strip()[-extract.LONGEST :]
    for c in "ABCDE":
        starts = (f"{c}\n", f"({c})\n", f"({c}) {c}\n")
        if text.endswith((f" {c}.", f" ({c}).")) or text.startswith(starts):
            text = c
    tail = text.split("is ")[-1].rstrip(".")
    text = tail if re.fullmatch(rf"\s*{_NUMERAL}(?:[eE][-+]?\d+)?\s*", tail) else text
    if "oxed{" not in text:
        for flag in [f"{the} {rest}" for rest in _FLAGS for the in ("the", "The")]:
            if flag in text:
                text = text.split(flag)[-1].strip().split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    text = text[start + 5 : end] if 0 <= start < end else text
    before = text.partition("}")[0]
    text = text if "{" in before else before
    text = text.split("=")[-1].split("\\approx")[-1]
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for mark in [*_OFF.split(), " ", "\n"]:
        text = text.replace(mark, "")
    text = re.sub(r"\(([a-e])\)", r"\1", text)
    return re.sub(r"\{([a-e])\}", r"\1", text).rstrip(".").lstrip(":").strip()


def mathvision_match(given, q):
    """The same text, or numbers that agree to two decimals: 1/55 is 1/60."""
    gold = q.answer.strip()
    k = option_index(gold, q.choices or [])
    golds = [gold] if k is None else [gold, q.choices[k]]
    given = given.lower().strip()
    for gold in golds:
        if given and given == gold.lower().strip():
            return Verdict(True, f"the same text as {gold!r}", given)
        value = rounded(gold)
        if value is not None and value == rounded(given):
            return Verdict(True, f"{given[:60]} and {gold!r} are {value} to two decimals", given)
    return Verdict(False, f"{given[:60]!r} is not {' or '.join(golds)}", given)


@lru_cache(10_000)
def rounded(text):
    """A number to two decimals, a point as a tuple; None where the authors' parser fails."""
    if len(text) > 300 or re.search(r"\\(?:mathrm|text|circ|degree|mbox)|°|<|>|~", text):
        return None
    if items := re.fullmatch(r"\$?\s*([(\[])(.*,.*)[)\]]\s*\$?", text):
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


def one_letter(text, q, names="ABCDEFGH"):
    options = q.choices or extract.written_choices(q.meta.get("question") or q.problem)
    return by_letter(*find_option(text, options or list(names)), q.answer)


def dynamath(text, q, relative=1e-3):
    """A float within 0.001 or a thousandth; a letter; or the gold among the words."""
    if q.meta.get("answer_type") == "multiple choice":
        return one_letter(text, q)
    if q.meta.get("answer_type") == "float":
        x, gold = extract.find_number(text), float(q.answer)
        if x is None:
            return UNDECIDED
        right = abs(x - gold) <= max(1e-3, relative * abs(gold)) + 1e-12
        return Verdict(right, f"{x:g} against {gold:g}", f"{x:g}")
    gold = q.answer.strip().lower()
    for part in candidates(text):
        if len(part) <= SHORT:
            word = re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", part.lower())
            same = bool(word) or reward_verdict(part, q.answer)[0]
            return Verdict(same, f"{part!r} {'gives' if same else 'does not give'} {gold!r}", part)
    return UNDECIDED


def chart_number(text):
    """`1,234`, `-5.6`, or `12%`, which is 0.12; None for any other text."""
    text = text.strip()
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?%?", text):
        text = text.replace(",", "")
    if not re.fullmatch(_NUMERAL + "%?", text):
        return None
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def chartqa(text, q):
    """Relaxed accuracy against any label: numbers within 5 %, else the same text in lower case."""
    labels = [str(x) for x in q.meta.get("label") or [q.answer]]
    part = unwrap(candidates(text)[0]).strip().rstrip(".")
    numbers = extract.NUMBER.findall(part)
    if chart_number(part) is None and len(numbers) == 1 and chart_number(labels[0]) is not None:
        part = numbers[0] + ("%" if f"{numbers[0]}%" in part else "")
    for label in labels:
        x, gold = chart_number(part), chart_number(label)
        if x is not None and gold:
            if abs(x - gold) <= 0.05 * abs(gold) * (1 + 1e-9):
                return Verdict(True, f"{part} is within 5 % of {label}", part)
        elif part.lower() == label.strip().lower():
            return Verdict(True, f"the same text as {label!r}", part)
    return Verdict(False, f"{part[:60]!r} against {labels}", part, len(part) <= SHORT)


def yes_no(text, q):
    """The one of yes and no that the answer says; the gold may be 1 or 0 (HallusionBench)."""
    gold = {"1": "yes", "0": "no"}.get(q.answer.strip(), q.answer.strip().lower())
    for part in candidates(text):
        found = re.findall(r"(?<![a-z])(?:yes|no)(?![a-z])", part.lower())
        if len(set(found)) == 1 or re.match(r"\W*(?:yes|no)\W*[,.;:]", part.lower()):
            return Verdict(found[0] == gold, f"{found[0]} against {gold}", found[0])
    return UNDECIDED


class Benchmark(NamedTuple):
    title: str
    repo: str  # on the hub
    files: str  # patterns of its files there
    full: int  # questions when complete
    needs: str  # fields that tell its files from others; "a|b" is one of the two
    subsets: str  # fields that name the subsets of which scores are reported
    official: Callable
    fork: Callable | None = None  # where the paper's fork scores by other rules
    prompt: str = ""  # the field that its authors ask in the place of the bare question
    ask: str = ""  # ours: added to a question that leaves the form of its answer open


BENCHMARKS = {
    "mathvista": Benchmark("MathVista testmini", "AI4Math/MathVista",
        "data/testmini-*.parquet", 1000, "question_type answer_type", "task skills source grade",
        mathvista, mathvista_fork, prompt="query"),
    "mathverse": Benchmark("MathVerse testmini", "AI4Math/MathVerse",
        "testmini.parquet testmini_text_only.parquet", 3940,
        "problem_version question_type", "problem_version subject subfield",
        mathverse, partial(mathverse, by_text=False), prompt="query_cot"),
    "mm-math": Benchmark("MM-Math", "THU-KEG/MM_Math",
        "MM_Math/MM_Math.jsonl MM_Math/MM_Math.zip", 5929,
        "solution difficult", "difficult year knowledge", mmmath, partial(mmmath, tolerance=1e-2)),
    "dynamath": Benchmark("DynaMath", "DynaMath/DynaMath_Sample", "data/sample*.parquet", 5010,
        "answer_type knowledge_level|level", "subject knowledge_level level",
        dynamath, partial(dynamath, relative=0)),
    "mathvision": Benchmark("MATH-Vision", "MathLLMs/MathVision", "data/test-*.parquet", 3040,
        "level subject", "subject level", mathvision),
    "mmstar": Benchmark("MMStar", "Lin-Chen/MMStar", "mmstar.parquet", 1500,
        "category l2_category|l2-category", "category", partial(one_letter, names="ABCD")),
    "chartqa": Benchmark("ChartQA", "HuggingFaceM4/ChartQA", "data/test-*.parquet", 2500,
        "human_or_machine|split", "human_or_machine split", chartqa),
    "mme": Benchmark("MME", "lmms-lab/MME", "data/test-*.parquet", 2374,
        "category question_id|image_path", "category", yes_no),
    "hallusionbench": Benchmark("HallusionBench", "lmms-lab/HallusionBench", "data/*.parquet", 1129,
        "figure_id|index set_id|index", "category subcategory",
        yes_no, ask="\nPlease answer yes or no."),  # MME's questions end like this already.
}  # fmt: skip


def official(name: str, text: str, q) -> Verdict:
    return BENCHMARKS[name].official(text, q)


def fork(name: str, completion: str, q) -> Verdict:
    bench = BENCHMARKS[name]
    return (bench.fork or bench.official)(fork_prediction(completion), q)


def fork_prediction(completion: str) -> str:
    """The answer that the paper's fork reads: with exactly these spaces, else the whole text."""
    rest = completion.partition("<answer> Final Answer:")[2]
    given, closed, _ = rest.partition(" </answer>")
    return given.strip() if closed else completion


def files(name, path=""):
    bench, patterns = BENCHMARKS[name], BENCHMARKS[name].files.split()
    if not path or hub.is_name(path):  # a copy of it on the hub
        try:
            path = hub.snapshot(path or bench.repo, patterns)
        except ValueError as error:
            raise ValueError(
                f"{bench.title} is not on this machine: {error}, then --bench {name}=FOLDER"
            ) from error
    found = sorted(f for p in patterns for f in Path(path).expanduser().glob(p))
    return [f for f in found if f.suffix != ".zip"] or data._files(path, "test")


def tags(name: str, meta: dict) -> list[str]:
    """The subsets that a question belongs to, by the names of the paper's table."""
    found = []
    for key in BENCHMARKS[name].subsets.split():
        values = meta.get(key)
        if isinstance(values, str) and values.startswith("['"):
            values = re.findall(r"'([^']+)'", values)  # VLMEvalKit's TSV holds a list as text.
        values = list(values.values()) if isinstance(values, dict) else values
        for v in values if isinstance(values, list) else [values]:
            if v in (None, ""):
                continue
            if key == "skills":  # "geometry reasoning" is GEO.
                v = v[:3].upper()
            elif key == "task":  # "geometry problem solving" is GPS.
                v = "".join(word[0] for word in v.split()).upper()
            elif key == "human_or_machine":
                v = {0: "human", 1: "augmented"}.get(v, v)
            found.append(f"level {v}" if key == "level" else str(v))
    return list(dict.fromkeys(found))


def adapt(record, name, file):
    """Gives a record its benchmark's prompt, id, source and tags."""
    bench, meta = BENCHMARKS[name], record.meta
    missing = [n for n in bench.needs.split() if not any(x in meta for x in n.split("|"))]
    if missing:
        fields = " and no ".join(missing)
        raise ValueError(f"{file}: not {bench.title}: question {record.id} has no {fields}")
    in_name = re.match(r"sample(?:_variant)?(\d+)", file.stem)
    variant = meta.get("variant") or in_name and int(in_name[1])
    if name == "dynamath" and variant:  # There is one file for each variant of the same questions.
        meta |= {"seed": meta.get("qid") or record.id, "variant": variant}
        record.id = f"{meta['seed']}-v{variant}"
    if asked := meta.get(bench.prompt):
        record.problem = data.MARK * len(record.images) + asked.replace(data.MARK, "")
    if not re.search(r"yes or no", record.problem, re.I):
        record.problem += bench.ask
    record.id, record.source = f"{name}-{record.id.removeprefix(name + '-')}", bench.title
    meta |= {"bench": name, "tags": tags(name, meta)}


def load(name: str, path: str | Path = "", strict: bool = False, image_root: str = ""):
    """(records, data.Problems): the usable questions, and what is wrong with the others."""
    if name not in BENCHMARKS:
        known = f"{run.nearest(name, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}"
        raise ValueError(f"no benchmark {name!r}{known}")
    records, problems = {}, data.Problems(strict)
    for file in files(name, path):
        part, wrong = data.read(file, strict, image_root=image_root)
        problems += wrong
        for record in part:
            adapt(record, name, file)
            while record.id in records:
                record.id += "-copy"
            records[record.id] = record
    if not records:
        raise ValueError(f"{path}: no usable question of {name} in it\n{problems.summary()}")
    return list(records.values()), problems
