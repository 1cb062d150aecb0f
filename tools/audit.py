"""python -m tools.audit FILE: re-scores answers and prints the cases that a person should look at.

FILE is a run's samples.jsonl, or answers with a benchmark's own verdicts (gt_answer, correct).
"""

import json
import sys
from collections import Counter
from pathlib import Path

from reward import is_equiv, score


def audit_official(rows: list[dict]) -> None:
    """Prints how often the reward agrees with a benchmark's verdicts, and each disagreement."""
    differ = []
    for row in rows:
        given = str(row.get("prediction", row.get("extracted")))
        if is_equiv(given, row["gt_answer"], row.get("choices")) != row["correct"]:
            differ.append((given, row))
    agreement = 1 - len(differ) / len(rows)
    print(f"{len(rows)} answers, {agreement:.2%} judged as officially; the others:")
    for given, row in differ:
        official = "right" if row["correct"] else "wrong"
        print(f"  {row['item_id']}: {given!r} against {row['gt_answer']!r}, officially {official}")


def remarks(sample: dict, new) -> list[str]:
    """Why a person should look at a sample."""
    found = []
    if abs(sample.get("reward", new.reward) - new.reward) > 1e-6:
        found.append(f"reward was {sample['reward']}")
    if new.why == "unparsable":
        found.append(new.why)
    if new.correct and len(new.answer) > 3 * len(str(sample.get("answer"))) + 20:
        found.append("right but far from the gold's text")
    return found


def audit(rows: list[dict], most: int = 40) -> None:
    """Prints the shares of the reasons, and the first `most` remarks."""
    whys, total, look = Counter(), 0.0, []
    for row in rows:
        truncated = row.get("why") == "truncated" or bool(row.get("truncated"))
        gold = str(row.get("answer"))
        new = score(row.get("completion") or "", gold, row.get("choices"), truncated)
        whys[new.why] += 1
        total += new.reward
        look += [
            f"[{why}] {new.answer!r} against {gold!r} -> {new.why}" for why in remarks(row, new)
        ]
    print(f"{len(rows)} samples, mean reward {total / max(1, len(rows)):.3f}")
    for why, count in whys.most_common():
        print(f"  {why:10s} {count:6d}  {count / len(rows):6.1%}")
    print(f"{len(look)} to look at" + (f", the first {most}:" if len(look) > most else ":"))
    for line in look[:most]:
        print(f"  {line}")


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.audit FILE")
    try:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as e:
        sys.exit(f"{sys.argv[1]}: {e}")
    official = bool(rows) and "gt_answer" in rows[0]
    audit_official(rows) if official else audit(rows)


if __name__ == "__main__":
    main()
