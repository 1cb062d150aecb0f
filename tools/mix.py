"""Several data sets -> one file of problems, as Vision-R1-rl is made of five sources (Sec. 4.1).

  python -m tools.mix A B C --weights 2 1 1 --limit 10000 --out mix.parquet
  python -m tools.mix A B --against TEST [TEST ...] --dedup --out mix.parquet

A, B, C: whatever --data takes. Without --weights every record is as likely as any other; with them
the sets stand in this ratio, and where one is used up the others fill its place. --dedup and
--against leave out what tools/decontaminate.py calls a copy or the same question, here and there;
a copy of an earlier set goes. The same --seed gives the same bytes, with the pictures inside.
"""

import argparse
import multiprocessing
import os
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nano import data, run
from tools.decontaminate import REMOVED, Index, looked


def quotas(sizes: list[int], weights: list[float], limit: int) -> list[int]:
    """How many to take of each set: by weight, and what one set lacks comes from the others."""
    taken, limit = [0] * len(sizes), min(limit or sum(sizes), sum(sizes))
    for _ in range(limit):  # One at a time, each from the set that is furthest behind its share.
        open_sets = [k for k, size in enumerate(sizes) if taken[k] < size and weights[k]]
        if not open_sets:
            break
        taken[min(open_sets, key=lambda k: (taken[k] + 0.5) / weights[k])] += 1
    return taken


def clean(sets: list[str], against: list[str], dedup: bool, problems: data.Problems):
    """-> (ids of the usable records of each set, what was left out: (set, why) -> how many)"""
    ids, left_out, evals = [[] for _ in sets], Counter(), []
    if not against and not dedup:
        for k, path in enumerate(sets):
            ids[k] = [record.id for *_, record in data.stream(path, problems, True, "train")]
        return ids, left_out
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        tests = Index(
            [(r, place, looks or []) for r, place, looks in looked(against, problems, pool)]
        )
        for k, path in enumerate(sets):
            for record, place, looks in looked([path], problems, pool, "train"):
                found = tests.pairs(record, place, looks or []).values()
                if looks is None or any(pair["kind"] in REMOVED for pair in found):
                    left_out[k, "broken" if looks is None else "in the tests"] += 1
                else:
                    evals.append((record, place | {"set": k}, looks))
    kept, index = set(), Index(evals if dedup else [])
    for n, (record, place, looks) in enumerate(evals):
        pairs = index.pairs(record, place, looks) if dedup else {}
        if any(m in kept and pair["kind"] in REMOVED for m, pair in pairs.items()):
            left_out[place["set"], "copies"] += 1
        else:
            kept.add(n)
            ids[place["set"]].append(record.id)
    return ids, left_out


def chosen(sets: list[str], wanted: list[set[str]]):
    """Yields the records with these ids; ids are unique in the whole, and each names its source."""
    seen = set()
    for path, ids in zip(sets, wanted):
        name = Path(path).stem
        for *_, record in data.stream(path, data.Problems(), False, "train"):
            if record.id in ids:
                record.source = record.source or name
                while record.id in seen:
                    record.id = f"{name}-{record.id}"
                seen.add(record.id)
                yield record


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mix", description=__doc__, formatter_class=raw)
    parser.add_argument("sets", nargs="+", metavar="SET")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each set")
    parser.add_argument("--limit", type=int, default=0, help="records in all; 0 means all")
    parser.add_argument("--out", required=True, metavar="FILE", help="a parquet file")
    parser.add_argument("--against", nargs="+", default=[], metavar="TEST")
    parser.add_argument("--dedup", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with run.for_people():
        problems = data.Problems()
        ids, left_out = clean(args.sets, args.against, args.dedup, problems)
        sizes = [len(own) for own in ids]
        weights = args.weights or [max(size, 1) for size in sizes]
        if len(weights) != len(sizes) or min(weights) < 0 or not sum(weights):
            raise ValueError(f"--weights: {len(sizes)} numbers are needed, one for each set")
        taken = quotas(sizes, weights, args.limit)
        rng = random.Random(args.seed)
        wanted = [set(rng.sample(own, n)) for own, n in zip(ids, taken)]
        data.write_parquet(args.out, chosen(args.sets, wanted))
    print(problems.summary() or "all data could be read")
    columns = sorted({why for _, why in left_out})
    print("".join(f"{head:>14}" for head in ["taken", "of", *columns]) + "  set")
    for k, path in enumerate(args.sets):
        cells = [taken[k], sizes[k], *(left_out[k, why] for why in columns)]
        print("".join(f"{cell:>14,}" for cell in cells) + f"  {path}")
    print(f"{sum(taken):,} records in {args.out}")


if __name__ == "__main__":
    main()
