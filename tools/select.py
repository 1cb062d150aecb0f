"""Keeps the problems that are neither too easy nor hopeless for a model, by its pass rate.

  python eval.py --model DIR --data problems.jsonl --samples 8 --temperature 1 --out RUN
  python -m tools.select RUN --min 0.1 --max 0.9 --out kept.parquet

The pass rate is the share of a problem's samples that the training reward calls right. A problem
at 0 or 1 gives a group without a signal (Eq. 1: all advantages are 0). This is no part of the
paper. FILE has the pictures inside; the problems come from --data of the run, joined by id.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from nano import data, run


def pass_rates(path: Path) -> dict[str, float]:
    """id -> share of right answers, from responses.jsonl, without what was drawn once more."""
    right = defaultdict(list)
    with open(path, encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not row.get("resampled"):
                    right[row["id"]].append(bool(row.get("training_right", row["right"])))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{n}: no line of eval.py ({error!r})") from error
    return {id: sum(own) / len(own) for id, own in right.items()}


def joined(config: dict, rates: dict[str, float], least: float, most: float):
    """Yields the records of the run with a rate in [least, most]. ValueError at the end, before
    FILE gets its name, if some that were answered are not there."""
    missing = set(rates)
    where = (False, config.get("split", ""), config.get("image_root", ""))
    for *_, record in data.stream(config["data"], data.Problems(), *where):
        missing.discard(record.id)
        if least <= rates.get(record.id, -1) <= most:
            yield record
    if missing:
        some = ", ".join(sorted(missing)[:3])
        text = f"{config['data']}: {len(missing):,} answered ids are not there, as {some}"
        raise ValueError(text)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("select", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--min", type=float, default=0.1, help="smallest pass rate to keep")
    parser.add_argument("--max", type=float, default=0.9, help="largest pass rate to keep")
    parser.add_argument("--out", required=True, metavar="FILE", help="a parquet file")
    args = parser.parse_args(argv)
    with run.for_people():
        config = json.loads((args.run / "config.json").read_text())
        if not config.get("data"):
            raise ValueError(f"{args.run}: not a run of eval.py with --data")
        rates = pass_rates(args.run / "responses.jsonl")
        kept = data.write_parquet(args.out, joined(config, rates, args.min, args.max))
    never, always = (list(rates.values()).count(rate) for rate in (0, 1))
    print(f"{len(rates):,} problems with answers: {never:,} never right, {always:,} always right")
    print(f"{kept:,} with a pass rate of {args.min:g} to {args.max:g} in {args.out}")


if __name__ == "__main__":
    main()
