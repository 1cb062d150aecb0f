"""The answers that an earlier try of an evaluation left in responses.jsonl, as far as they belong
to this one: an answer is that of these weights to this question, asked in this way."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

from nano.data import Record


def asked(record: Record, settings: dict) -> str:
    """What the answers to a question depend on besides the weights, as 16 hex digits."""
    pictures = []
    for image in record.images:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        pictures.append(hashlib.sha256(content).hexdigest())
    parts = [record.system, record.problem, record.answer, record.choices, record.meta]
    parts += [pictures, settings]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path, weights: str, records: list[Record], settings: dict, say) -> list[dict]:
    """The rows of `path` that belong to this run. The others move to stale-responses.jsonl.

    Answers to questions that are not asked now stay, if they are of the same weights.
    """
    path.touch()
    groups, stale, why, rows = defaultdict(list), [], Counter(), []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
            groups[row["id"]].append((row, line))
        except (ValueError, LookupError, TypeError):  # killed within this line
            why["damaged"] += 1
            stale.append(line)
    records, good = {record.id: record for record in records}, []
    for id, group in groups.items():
        found, lines = [row for row, _ in group], [line for _, line in group]
        numbers = [row.get("sample") for row in found]
        if numbers != list(range(len(found))) or found[0].get("more", 0) != len(found) - 1:
            reason = "of half a question"
        elif any(row.get("weights") != weights for row in found):
            reason = "of another model"
        elif id in records and found[0].get("asked") != asked(records[id], settings):
            reason = "to another question, picture, answer or setting"
        else:
            rows += found
            good += lines
            continue
        why[reason] += len(found)
        stale += lines
    if stale:
        with open(path.with_name("stale-responses.jsonl"), "ab") as f:
            f.writelines(line.rstrip(b"\n") + b"\n" for line in stale)
        aside = path.with_suffix(".tmp")
        aside.write_bytes(b"".join(good))
        aside.replace(path)
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in why.items())
        say(f"{path}: these lines do not count, and their questions are asked again: {reasons}")
    return rows
