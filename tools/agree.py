"""How often our verdicts on released answers are the official ones, and where they differ.

python -m tools.agree FILE...    JSONL with official verdicts: correct, true_false or judgement
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from benchmarks import rules
from benchmarks.report import read_run
from nano import run

# For what the authors' language model extracted; the other benchmarks take any text.
MATCHERS = {"mathvista": rules.mathvista_match, "mathvision": rules.mathvision_match}


def first(row, *keys):
    """The first of these fields that the row has."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def verdicts(path):
    """{(benchmark, question type, what was judged): [(row, our verdict, the official one), ...]}"""
    groups = defaultdict(list)
    for n, row in enumerate(read_run(path), 1):
        id = str(first(row, "item_id", "id") or Path(path).stem)
        bench = str(first(row, "bench", "benchmark") or re.split(r"[-_]\d", id)[0]).lower()
        right = first(row, "correct", "true_false", "judgement", "official")
        if bench not in rules.BENCHMARKS or right is None:
            raise ValueError(
                f"{path}:{n}: no official verdict (correct, true_false or judgement), "
                f"or no benchmark {bench!r}"
            )
        question = SimpleNamespace(
            answer=str(first(row, "gt_answer", "answer")),
            choices=row.get("choices"),
            problem=str(row.get("problem", "")),
            meta=row | (row.get("meta") or {}),
        )
        extracted = first(row, "extracted", "extraction", "model_answer")
        response = first(row, "response", "completion")
        official = rules.BENCHMARKS[bench].official
        for text, judge, words in (
            (extracted, MATCHERS.get(bench, official), "the official extraction"),
            (response, official, "the whole response"),
        ):
            if text is not None:
                group = bench, str(row.get("question_type", "")), words
                groups[group].append((row, judge(str(text), question), bool(int(right))))
    return groups


def agree(path) -> str:
    lines = []
    for (bench, kind, words), cases in verdicts(path).items():
        wrong = [(row, verdict) for row, verdict, right in cases if verdict.right != right]
        undecided = sum(not verdict.decided for _, verdict, _ in cases)
        lines.append(
            f"{path}: {bench} {kind} {len(cases)} answers, from {words}: "
            f"{1 - len(wrong) / len(cases):.2%} judged as officially, {undecided} undecided"
        )
        for row, verdict in wrong:
            ours, theirs = ("right", "wrong") if verdict.right else ("wrong", "right")
            lines.append(
                f"  {first(row, 'item_id', 'id')} ({row.get('model', '')}): "
                f"{ours} by us ({verdict.why}), officially {theirs}; "
                f"gold {first(row, 'gt_answer', 'answer')!r}, "
                f"extracted {str(row.get('extracted', ''))[:60]!r}, "
                f"ends {str(row.get('response', ''))[-80:]!r}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python -m tools.agree FILE...")
    with run.for_people():
        for path in sys.argv[1:]:
            print(agree(path))
