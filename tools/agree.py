"""Released answers: are our verdicts the official ones? A run's answers: scored again.

  python -m tools.agree FILE...

The rows of a FILE have official verdicts (correct, true_false or judgement), or are those of a
run's samples.jsonl or responses.jsonl. Either way the cases that deserve a look are listed.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import reward
from benchmarks import rules
from benchmarks.report import read_run
from nano import run

# For what the authors' language model extracted; the other benchmarks take any text.
MATCHERS = {"mathvista": rules.mathvista_match, "mathvision": rules.mathvision_match}
OFFICIAL = ("correct", "true_false", "judgement")
MOST = 40  # Remarks on a run that are printed.


def first(row: dict, *keys: str):
    """The first of these fields that the row has."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def by_reward(text: str, question) -> rules.Verdict:
    right = reward.is_equiv(text, question.answer, question.choices)
    return rules.Verdict(right, f"{text!r} against {question.answer!r}")


def released(path: str | Path, rows: list[dict]) -> list[str]:
    """How often our rules and the training reward say what the officials say, and where not."""
    groups = defaultdict(list)  # (benchmark, question type, how we judge) -> cases
    for row in rows:
        name = first(row, "bench", "benchmark", "item_id", "id") or Path(path).stem
        bench = re.split(r"[-_]\d", str(name))[0].lower()
        question = SimpleNamespace(answer=str(first(row, "gt_answer", "answer")))
        question.choices, question.problem = row.get("choices"), str(row.get("problem", ""))
        question.meta = row | (row.get("meta") or {})
        extracted = first(row, "extracted", "extraction", "model_answer")
        ways = [("the training reward", by_reward, first(row, "prediction") or extracted)]
        if bench in rules.BENCHMARKS:
            official = rules.BENCHMARKS[bench].official
            ways.append(("the official extraction", MATCHERS.get(bench, official), extracted))
            ways.append(("the whole response", official, first(row, "response", "completion")))
        for words, judge, text in ways:
            if text is not None:
                case = row, judge(str(text), question), bool(int(first(row, *OFFICIAL)))
                groups[bench, str(row.get("question_type", "")), words].append(case)
    lines = []
    for (bench, kind, words), cases in groups.items():
        wrong = [(row, verdict) for row, verdict, right in cases if verdict.right != right]
        share, undecided = 1 - len(wrong) / len(cases), sum(not v.decided for _, v, _ in cases)
        lines.append(
            f"{path}: {bench} {kind} by {words}: {len(cases)} answers, "
            f"{share:.2%} judged as officially, {undecided} undecided"
        )
        for row, verdict in wrong:
            ours, theirs = ("right", "wrong") if verdict.right else ("wrong", "right")
            gold, text = first(row, "gt_answer", "answer"), str(row.get("extracted", ""))[:60]
            lines.append(
                f"  {first(row, 'item_id', 'id')} ({row.get('model', '')}): {ours} by us "
                f"({verdict.why}), officially {theirs}; gold {gold!r}, extracted {text!r}, "
                f"ends {str(row.get('response', ''))[-80:]!r}"
            )
    return lines


def rescored(path: str | Path, rows: list[dict]) -> list[str]:
    """The shares of the reasons, and what a person should look at."""
    scores, look = [], []
    for row in rows:
        if "completion" not in row:
            names = ", ".join(OFFICIAL)
            raise ValueError(f"{path}: no {names} and no completion in {str(row)[:80]}")
        truncated = row.get("why") == "truncated" or row.get("finish") == "length"
        gold = str(row.get("answer"))
        scores.append(new := reward.score(row["completion"], gold, row.get("choices"), truncated))
        far = new.correct and len(new.answer) > 3 * len(gold) + 20
        changed = abs(row.get("reward", new.reward) - new.reward) > 1e-6
        remarks = [
            changed and f"reward was {row['reward']}",
            new.why == "unparsable" and new.why,
            far and "right but far from the gold's text",
        ]
        case = f"{new.answer!r} against {gold!r} -> {new.why}"
        look += [f"  [{remark}] {case}" for remark in remarks if remark]
    mean = sum(new.reward for new in scores) / len(scores)
    lines = [f"{path}: {len(rows)} samples, mean reward {mean:.3f}"]
    for why, count in Counter(new.why for new in scores).most_common():
        lines.append(f"  {why:10s} {count:6d}  {count / len(rows):6.1%}")
    return [*lines, f"{len(look)} to look at, at most {MOST} are shown:", *look[:MOST]]


def agree(path: str | Path) -> str:
    rows = read_run(path)
    official = [row for row in rows if first(row, *OFFICIAL) is not None]
    own = [row for row in rows if first(row, *OFFICIAL) is None]
    lines = released(path, official) + (rescored(path, own) if own else [])
    return "\n".join(lines or [f"{path}: it is empty"])


if __name__ == "__main__":
    if not sys.argv[1:] or "--help" in sys.argv:
        sys.exit("usage: python -m tools.agree FILE...")
    with run.for_people():
        for path in sys.argv[1:]:
            print(agree(path))
