"""Are problems of the evaluation sets among the training data? (the paper's reviewers asked; the paper does not say. all rules are ours)

  python cold_start.py decontaminate TRAIN --against EVAL [EVAL ...] [--out DIR] [--drop-shared-images] [--workers 2]

Any formats of data.py. Writes DIR/report.jsonl, one pair a line with its file, row and id, hash distance and overlap, and each file of TRAIN in
its own layout without the rows that were found. The kinds of pairs:

  copy           the same picture and a like question                                                               removed
  same question  a long question (20 words) with all its numbers, whatever the picture                             removed
  image shared   the same picture, but another question about it                                 removed on --drop-shared-images
  variant        a copy with another answer: one template filled twice                                               reported
  template       as same question, but the text goes with many pictures: the picture makes the problem         reported

Pictures: a 255-bit perceptual hash (signs of the low DCT frequencies of a 64 x 64 grey picture) finds candidates, then the 64 x 64 colour
pictures are compared: noise of JPEG and resizing is everywhere and small, a changed digit is in one place and a changed colour is large.
Cropped, turned or mirrored copies are not found, nor are questions in other words or another language.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from nano import data

SIDE, BANDS = 64, 16
NEAR, COLOUR, WORST, SPREAD = (
    32,
    64,
    32,
    15,
)  # bits; levels in any place, in colour and in grey; worst place : mean. chosen on real pictures and copies
LIKE, SAME, LONG, GRAM, COMMON = (
    0.4,
    0.85,
    20,
    5,
    100,
)  # overlaps; words; words in a gram; a gram of so many eval questions tells nothing
GREY = np.array([[0.299], [0.587], [0.114]], np.float32)
DCT = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(BANDS)[:, None]).astype(
    np.float32
)  # (BANDS, SIDE)
REMOVED = ("copy", "same question")

# ---- what a picture and a question look like


def look(image):
    """path or bytes -> (hash (4,) uint64, thumbnail (64, 64, 3) uint8, log of width : height); ValueError when it cannot be read"""
    with data.opened(image) as im:
        im.draft("RGB", (4 * SIDE, 4 * SIDE))  # JPEG is decoded small at once
        plain = (
            im.mode in ("RGB", "L")
            and not im.has_transparency_data
            and not im.getexif().get(0x0112)
        )
        im = im.convert("RGB") if plain else data.load_image(image)
        shape = np.log(im.width / im.height)
        small = im.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    low = (DCT @ np.asarray(small.convert("L"), np.float32) @ DCT.T).ravel()[
        1:
    ]  # (255,) without the mean
    return (
        np.packbits(np.append(low > np.median(low), False)).view(np.uint64),
        np.asarray(small),
        shape,
    )


def same_picture(a, b):
    """two thumbnails (64, 64, 3): do they differ as a resized or compressed copy does?"""
    difference = a.astype(np.float32) - b
    both = np.concatenate(
        [difference, difference @ GREY], axis=2
    )  # (64, 64, 4). JPEG is coarse in colour, fine in grey
    total = np.pad(both, ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    places = (
        np.abs(total[4:, 4:] - total[:-4, 4:] - total[4:, :-4] + total[:-4, :-4]) / 16
    )  # means over squares of 4 x 4
    return places[..., :3].max() <= COLOUR and places[..., 3].max() <= min(
        WORST, SPREAD * np.abs(both[..., 3]).mean() + 3
    )


@functools.lru_cache(4096)
def words(question):
    """a question as it is compared: lower-case words and numbers; each Chinese or Japanese sign is a word"""
    text = unicodedata.normalize("NFKC", question.replace(data.MARK, " ")).lower()
    return tuple(re.findall(r"\d+(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", text))


def numbers(question):
    return Counter(w for w in words(question) if w[0].isdigit())


@functools.lru_cache(4096)
def shingles(question):
    text = f" {' '.join(words(question))} "
    return {text[i : i + 4] for i in range(max(1, len(text) - 3))}


def overlap(a, b):
    """share of the shorter question's 4-letter grams that the longer one has: options added behind a question change nothing"""
    a, b = shingles(a), shingles(b)
    return len(a & b) / min(len(a), len(b))


def grams(question):
    found = words(question)
    return (
        {hash_of(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1)}
        if len(found) >= LONG
        else set()
    )


def hash_of(gram):
    return int.from_bytes(
        hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest(), "little"
    )


def masked(question):
    return tuple("0" if w[0].isdigit() else w for w in words(question))


def conflict(a, b):
    """two answers that cannot both be right: numbers, or words. letters tell nothing, since options may have been shuffled"""
    a, b = (re.sub(r"[\s$°%]", "", x).lower() for x in (a, b))
    return a != b and any(
        re.fullmatch(kind, a) and re.fullmatch(kind, b)
        for kind in (r"[-\d.,:/()]+", r"[^\W\d_]{2,}")
    )


# ---- the evaluation sets as an index, the training set as a stream


class Index:
    """what the workers know of the evaluation sets: hashes and thumbnails of all pictures, rare grams of all long questions"""

    def __init__(self, records, looks):
        self.records = records  # [(file, row, id, problem, answer)]
        self.owner = [n for n, seen in enumerate(looks) for _ in seen]
        seen = [look for looks_of_one in looks for look in looks_of_one]
        self.hashes = (
            np.stack([h for h, *_ in seen]) if seen else np.zeros((0, 4), np.uint64)
        )  # (pictures, 4)
        self.thumbs = (
            np.stack([t for _, t, _ in seen]) if seen else np.zeros((0, SIDE, SIDE, 3), np.uint8)
        )
        self.shapes = np.array([s for *_, s in seen], np.float64)
        self.grams, templates = defaultdict(list), defaultdict(set)
        self.texts = defaultdict(list)  # equal questions are looked up once
        for n, (*_, problem, _) in enumerate(records):
            self.texts[words(problem)].append(n)
            templates[masked(problem)].add(bytes(looks[n][0][0]) if looks[n] else b"")
        self.templates = {text for text, pictures in templates.items() if len(pictures) > 1}
        for text, members in self.texts.items():
            for gram in grams(records[members[0]][3]):
                self.grams[gram].append(members[0])
        self.grams = {
            gram: members for gram, members in self.grams.items() if len(members) <= COMMON
        }

    def pairs(self, problem, answer, looks):
        """one training record -> [(number of the eval record, kind, distance, overlap)]"""
        found = {}
        for bits, thumb, shape in looks:
            distance = (
                np.bitwise_count(self.hashes ^ bits).sum(1, dtype=np.uint16)
                if len(self.hashes)
                else np.zeros(0)
            )
            for i in np.flatnonzero((distance <= NEAR) & (abs(self.shapes - shape) < 0.1)):
                n = self.owner[i]
                if n not in found and same_picture(thumb, self.thumbs[i]):
                    share = overlap(problem, self.records[n][3])
                    kind = (
                        "image shared"
                        if share < LIKE
                        else "variant"
                        if conflict(answer, self.records[n][4])
                        else "copy"
                    )
                    found[n] = (n, kind, int(distance[i]), share)
        hits = Counter(n for gram in grams(problem) for n in self.grams.get(gram, ()))
        for first, _ in hits.most_common(20):
            other = self.records[first][3]
            if (
                len(words(other)) >= LONG
                and not numbers(problem) - numbers(other) | numbers(other) - numbers(problem)
                and (share := overlap(problem, other)) >= SAME
            ):
                for n in self.texts[words(other)]:
                    if n not in found and not conflict(answer, self.records[n][4]):
                        found[n] = (
                            n,
                            "template" if masked(other) in self.templates else "same question",
                            None,
                            share,
                        )
        return list(found.values())


index = None


def start(given):
    global index
    index = given


def looks_of(batch):
    """[(file, row, record)] -> [(file, row, id, problem, answer, looks, what is wrong)]"""
    rows = []
    for file, row, r in batch:
        try:
            rows.append((file, row, r.id, r.problem, r.answer, [look(i) for i in r.images], ""))
        except ValueError as e:
            rows.append((file, row, r.id, r.problem, r.answer, [], str(e)))
    return rows


def pairs_of(batch):
    return [
        (file, row, id, index.pairs(problem, answer, looks), wrong)
        for file, row, id, problem, answer, looks, wrong in looks_of(batch)
    ]


def spread(work, items, pool, size=64, ahead=6):
    """results of work(batch of items) in order; only a few batches exist at a time, however many items there are"""
    items, jobs = iter(items), deque()
    while batch := list(islice(items, size)):
        jobs.append(pool.submit(work, batch))
        if len(jobs) >= ahead:
            yield from jobs.popleft().result()
    for job in jobs:
        yield from job.result()


# ---- the cleaned files


def relocate(row, old, new):
    """a row whose relative picture paths are to be read from another folder"""

    def move(value):
        if isinstance(value, list):
            return [move(v) for v in value]
        return (
            os.path.relpath(old / value, new)
            if isinstance(value, str) and not os.path.isabs(value)
            else value
        )

    return row | {key: move(row[key]) for key in ("image", "images") if row.get(key) is not None}


def clean(file, rows, path):
    """a data file with these rows (numbers from 1) only, in the layout that it has, to `path`"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, out = data._kind(file), path.parent
    if kind == "parquet":
        table, n = pq.ParquetFile(file), 0
        with pq.ParquetWriter(path, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=256):
                writer.write_batch(
                    batch.filter(pa.array([n + k in rows for k in range(1, len(batch) + 1)]))
                )
                n += len(batch)
    elif kind in ("jsonl", "json"):
        problems = data.Problems()
        kept = (
            relocate(row, file.parent, out) for n, row in data._rows(file, problems) if n in rows
        )
        with open(path, "w", encoding="utf-8") as f:
            f.write("[\n" if kind == "json" else "")
            for k, row in enumerate(kept):
                f.write(
                    (",\n" if kind == "json" and k else "")
                    + json.dumps(row, ensure_ascii=False)
                    + ("\n" if kind == "jsonl" else "")
                )
            f.write("\n]\n" if kind == "json" else "")
    else:
        raise ValueError(f"{file}: only JSONL, JSON and parquet files can be cleaned")


# ---- the check


def check(train, against, out, drop_shared_images=False, workers=None):
    """-> (counts of rows and of pairs by kind); files in `out`. ValueError for files that cannot be read"""
    from tqdm import tqdm

    out, problems = Path(out), data.Problems()
    out.mkdir(parents=True, exist_ok=True)
    workers, context = workers or os.cpu_count(), multiprocessing.get_context("spawn")
    records, looks = [], []
    with ProcessPoolExecutor(workers, context) as pool:
        evals = (
            item for path in against for item in data.stream(path, problems, check_images=False)
        )
        for file, row, id, problem, answer, seen, wrong in tqdm(
            spread(looks_of, evals, pool), desc="evaluation sets", unit=" records", mininterval=1
        ):
            records.append((str(file), row, id, problem, answer))
            looks.append(seen)
            if wrong:
                problems.add("broken image", wrong, file, row, id)
    counts, rows, bad, text_pairs = Counter(), defaultdict(set), defaultdict(set), defaultdict(list)
    with (
        ProcessPoolExecutor(workers, context, start, (Index(records, looks),)) as pool,
        open(out / "report.jsonl", "w", encoding="utf-8") as report,
    ):
        del looks

        def tell(file, row, id, n, kind, distance, share):
            there = dict(zip(("file", "row", "id"), records[n]))
            report.write(
                json.dumps(
                    {
                        "kind": kind,
                        "train": {"file": str(file), "row": row, "id": id},
                        "eval": there,
                        "distance": distance,
                        "overlap": round(share, 3),
                    },
                    ensure_ascii=False,
                )
                + "\n"
            )
            counts[kind] += 1
            if kind in REMOVED or kind == "image shared" and drop_shared_images:
                bad[file].add(row)

        for file, row, id, pairs, wrong in tqdm(
            spread(pairs_of, data.stream(train, problems, check_images=False), pool),
            desc="training data",
            unit=" records",
            mininterval=1,
        ):
            counts["records"] += 1
            rows[file].add(row)
            if wrong:
                problems.add("broken image", wrong, file, row, id)
                bad[file].add(row)
            for pair in pairs:
                if pair[1] == "same question":  # wait and see with how many pictures
                    text_pairs[pair[0]].append((file, row, id, *pair))
                else:
                    tell(file, row, id, *pair)
        for found in text_pairs.values():
            for file, row, id, n, kind, *rest in found:
                tell(file, row, id, n, "template" if len(found) > 3 else kind, *rest)
    counts["rows removed"] = sum(map(len, bad.values()))
    names = Counter(file.name for file in rows)
    paths = {
        file: out / (file.name if names[file.name] == 1 else f"{file.parent.name}-{file.name}")
        for file in rows
    }
    for file, path in paths.items():
        if path.exists() and path.samefile(file) or list(paths.values()).count(path) > 1:
            raise ValueError(
                f"{path} would overwrite {file}, or two files of that name; give another --out, or one file at a time"
            )
        clean(file, rows[file] - bad[file], path)
    return counts, len(records), problems, list(paths.values())


def main(argv):
    parser = argparse.ArgumentParser(
        prog="cold_start.py decontaminate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", metavar="TRAIN")
    parser.add_argument("--against", nargs="+", required=True, metavar="EVAL")
    parser.add_argument("--out", default="runs/decontaminated")
    parser.add_argument("--drop-shared-images", action="store_true")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    try:
        counts, n, problems, paths = check(
            args.train, args.against, args.out, args.drop_shared_images, args.workers
        )
    except ValueError as e:
        sys.exit(f"stopped: {e}")
    print(problems.summary() or "all data could be read")
    print(
        f"{counts.pop('records'):,} training records against {n:,} evaluation records; {counts.pop('rows removed'):,} rows removed"
    )
    for kind, count in counts.most_common():
        print(f"  {count:,} pairs: {kind}")
    print(f"pairs: {args.out}/report.jsonl; cleaned: {', '.join(map(str, paths))}")
