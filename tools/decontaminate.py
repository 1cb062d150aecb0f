"""Are problems of the evaluation sets among the training data? The paper is silent: our rules.

  python -m tools.decontaminate TRAIN --against EVAL [EVAL ...] [--out DIR] [--drop-shared-images]

DIR/report.jsonl has a pair a line: file, row, id, hash distance, overlap. Beside it each file of
TRAIN is written in its own layout without the rows found.

  copy           the same picture and a like question                                     removed
  same question  a long question (20 words), all its numbers equal, whatever the picture  removed
  image shared   the same picture, another question          removed with --drop-shared-images
  variant        a copy with another answer: one template filled twice                    reported
  template       as same question, but many pictures go with the text                     reported

A 255-bit perceptual hash (signs of the low DCT frequencies of a 64 x 64 grey picture) finds
candidates, then the 64 x 64 colour pictures are compared: noise of JPEG and resizing is small and
everywhere, a changed digit is in one place. Cropped, turned or mirrored copies are not found, nor
questions in other words.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from nano import data

SIDE, BANDS = 64, 16
NEAR = 32  # Bits of the hash. These four were chosen on real pictures and copies.
COLOUR, WORST, SPREAD = 64, 32, 15  # Levels in any place, colour and grey; worst place : mean.
LIKE, SAME = 0.4, 0.85  # Overlaps of a like and of the same question.
LONG, GRAM = 20, 5  # Words in a long question and in a gram of it.
COMMON = 100  # A gram that so many evaluation questions share tells nothing.
GREY = np.array([[0.299], [0.587], [0.114]], np.float32)
ANGLES = np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(BANDS)[:, None]
DCT = np.cos(ANGLES).astype(np.float32)  # (BANDS, SIDE)
REMOVED = ("copy", "same question")
BATCH, AHEAD = 64, 6  # Records in a batch; batches that exist at a time.

# ---- what a picture and a question look like


def look(image: str | bytes):
    """-> (hash (4,) uint64, thumbnail (64, 64, 3) uint8, log of width : height), or ValueError."""
    with data.opened(image) as im:
        im.draft("RGB", (4 * SIDE, 4 * SIDE))  # JPEG is decoded small at once.
        turned = im.getexif().get(0x0112)
        plain = im.mode in ("RGB", "L") and not im.has_transparency_data and not turned
        im = im.convert("RGB") if plain else data.load_image(image)
        shape = np.log(im.width / im.height)
        small = im.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    low = DCT @ np.asarray(small.convert("L"), np.float32) @ DCT.T
    low = low.ravel()[1:]  # (255,) without the mean
    bits = np.packbits(np.append(low > np.median(low), False)).view(np.uint64)
    return bits, np.asarray(small), shape


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    """Do two thumbnails (64, 64, 3) differ as a resized or compressed copy does?"""
    difference = a.astype(np.float32) - b
    # JPEG is coarse in colour and fine in grey.
    both = np.concatenate([difference, difference @ GREY], axis=2)  # (64, 64, 4)
    places = np.abs(sliding_window_view(both, (4, 4), (0, 1)).mean((-2, -1)))  # (61, 61, 4)
    limit = min(WORST, SPREAD * np.abs(both[..., 3]).mean() + 3)
    return places[..., :3].max() <= COLOUR and places[..., 3].max() <= limit


@lru_cache(4096)
def words(question: str) -> tuple[str, ...]:
    """Lower-case words and numbers; each Chinese or Japanese sign is a word."""
    text = unicodedata.normalize("NFKC", question.replace(data.MARK, " ")).lower()
    return tuple(re.findall(r"\d+(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", text))


def numbers(question: str) -> list[str]:
    return sorted(word for word in words(question) if word[0].isdigit())


def masked(question: str) -> tuple[str, ...]:
    return tuple("0" if word[0].isdigit() else word for word in words(question))


@lru_cache(4096)
def shingles(question: str) -> set[str]:
    text = f" {' '.join(words(question))} "
    return {text[i : i + 4] for i in range(max(1, len(text) - 3))}


def overlap(a: str, b: str) -> float:
    """The share of the shorter question's pieces that the longer one has, maybe with options."""
    a, b = shingles(a), shingles(b)
    return len(a & b) / min(len(a), len(b))


def grams(question: str) -> list[str]:
    """A long question's runs of words, each once; a short one has none."""
    found = words(question)
    starts = range(len(found) - GRAM + 1) if len(found) >= LONG else ()
    return list(dict.fromkeys(" ".join(found[i : i + GRAM]) for i in starts))


def conflict(a: str, b: str) -> bool:
    """Can two answers not both be right? Letters tell nothing: options may have been shuffled."""
    a, b = (re.sub(r"[\s$°%]", "", x).lower() for x in (a, b))
    kinds = (r"[-\d.,:/()]+", r"[^\W\d_]{2,}")  # Two numbers, or two words.
    return a != b and any(re.fullmatch(kind, a) and re.fullmatch(kind, b) for kind in kinds)


# ---- the evaluation sets as an index, the training set as a stream


class Index:
    """The evaluation sets: their pictures, and the rare grams of their long questions."""

    def __init__(self, evals: list[tuple]):
        self.evals = evals  # [(record, its place, looks of its pictures)]
        seen = [(n, *look) for n, (*_, looks) in enumerate(evals) for look in looks]
        self.owner, hashes, self.thumbs, shapes = zip(*seen) if seen else [()] * 4
        self.hashes, self.shapes = np.array(hashes, np.uint64).reshape(-1, 4), np.array(shapes)
        self.texts = defaultdict(list)  # Equal questions are looked up once.
        pictures, found = defaultdict(set), defaultdict(list)
        for n, (record, _, looks) in enumerate(evals):
            self.texts[words(record.problem)].append(n)
            pictures[masked(record.problem)].add(bytes(looks[0][0]) if looks else b"")
        self.templates = {text for text, own in pictures.items() if len(own) > 1}
        for first, *_ in self.texts.values():
            for gram in grams(evals[first][0].problem):
                found[gram].append(first)
        self.grams = {gram: own for gram, own in found.items() if len(own) <= COMMON}

    def pairs(self, record: data.Record, place: dict, looks: list) -> dict[int, dict]:
        """One training record -> {number of the evaluation record: line of report.jsonl}"""
        found = {}
        for bits, thumb, shape in looks:
            distance = np.bitwise_count(self.hashes ^ bits).sum(1, dtype=np.uint16)
            for i in np.flatnonzero((distance <= NEAR) & (abs(self.shapes - shape) < 0.1)):
                n = self.owner[i]
                if n not in found and same_picture(thumb, self.thumbs[i]):
                    other = self.evals[n][0]
                    share = overlap(record.problem, other.problem)
                    kind = "variant" if conflict(record.answer, other.answer) else "copy"
                    found[n] = kind if share >= LIKE else "image shared", int(distance[i]), share
        hits = Counter(n for gram in grams(record.problem) for n in self.grams.get(gram, ()))
        for first, _ in hits.most_common(20):
            other = self.evals[first][0].problem
            share = overlap(record.problem, other)
            if share >= SAME and numbers(record.problem) == numbers(other):
                kind = "template" if masked(other) in self.templates else "same question"
                for n in self.texts[words(other)]:
                    if n not in found and not conflict(record.answer, self.evals[n][0].answer):
                        found[n] = kind, None, share
        pairs = {}
        for n, (kind, distance, share) in found.items():
            pair = dict(kind=kind, train=place, eval=self.evals[n][1], distance=distance)
            pairs[n] = pair | dict(overlap=round(share, 3))
        return pairs


def looks_of(images: list[str | bytes]) -> tuple[list | None, str]:
    """-> (looks, "") or (None, what is wrong)"""
    try:
        return [look(image) for image in images], ""
    except ValueError as error:
        return None, str(error)


def looked(paths: list, problems: data.Problems, pool: ProcessPoolExecutor, split: str = ""):
    """Yields (record without its pictures, its place, their looks or None if broken) in order."""
    items = (item for path in paths for item in data.stream(path, problems, False, split))
    jobs = deque()  # Only a few batches exist at a time.
    while (batch := list(islice(items, BATCH))) or jobs:
        if batch:
            images = [record.images for *_, record in batch]
            jobs.append(zip(batch, pool.map(looks_of, images, chunksize=BATCH)))
        if batch and len(jobs) < AHEAD:
            continue
        for (file, row, record), (looks, wrong) in jobs.popleft():
            if wrong:
                problems.add("broken image", wrong, file, row, record.id)
            record.images = []
            yield record, dict(file=str(file), row=row, id=record.id), looks


# ---- the cleaned files


def relocate(row: dict, old: Path, new: Path) -> dict:
    """Makes the relative picture paths of a row readable from another folder."""
    for key in {"image", "images"} & row.keys():
        images = row[key] if isinstance(row[key], list) else [row[key]]
        relative = [isinstance(image, str) and not os.path.isabs(image) for image in images]
        images = [os.path.relpath(old / i, new) if r else i for i, r in zip(images, relative)]
        row[key] = images if isinstance(row[key], list) else images[0]
    return row


def clean(file: Path, rows: set[int], path: Path):
    """Writes these rows of a data file (numbers from 1) to `path`, in the layout that it has."""
    kind = data._kind(file)
    if kind == "parquet":
        table, start = pq.ParquetFile(file), 1
        with pq.ParquetWriter(path, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=256):
                writer.write_batch(batch.take([i for i in range(len(batch)) if start + i in rows]))
                start += len(batch)
        return
    if kind not in ("jsonl", "json"):
        raise ValueError(f"{file}: only JSONL, JSON and parquet files can be cleaned")
    kept = (relocate(row, file.parent, path.parent) for n, row in data._rows(file) if n in rows)
    lines = (json.dumps(row, ensure_ascii=False) for row in kept)
    with open(path, "w", encoding="utf-8") as f:
        if kind == "jsonl":
            f.writelines(f"{line}\n" for line in lines)
        else:
            f.write("[\n" + ",\n".join(lines) + "\n]\n")


def check(train, against, out, drop_shared_images: bool = False, workers: int | None = None):
    """-> (counts of records and of pairs by kind, evaluation records, Problems, cleaned files)"""
    out, problems = Path(out), data.Problems()
    out.mkdir(parents=True, exist_ok=True)
    counts, rows, bad, by_text = Counter(), defaultdict(set), defaultdict(set), defaultdict(list)
    pairs, context = [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        found = tqdm(looked(against, problems, pool), "evaluation sets", unit=" records")
        evals = [(record, place, looks or []) for record, place, looks in found]
        index = Index(evals)
        bar = tqdm(looked([train], problems, pool), "training data", unit=" records")
        for record, place, looks in bar:
            rows[place["file"]].add(place["row"])
            if looks is None:
                bad[place["file"]].add(place["row"])
            for n, pair in index.pairs(record, place, looks or []).items():
                (by_text[n] if pair["kind"] == "same question" else pairs).append(pair)
    for group in by_text.values():  # A text that goes with many pictures is a template.
        kind = "template" if len(group) > 3 else "same question"
        pairs += [pair | dict(kind=kind) for pair in group]
    removed = (*REMOVED, "image shared") if drop_shared_images else REMOVED
    with open(out / "report.jsonl", "w", encoding="utf-8") as f:
        for pair in pairs:
            f.write(json.dumps(pair, ensure_ascii=False) + "\n")
            counts[pair["kind"]] += 1
            if pair["kind"] in removed:
                bad[pair["train"]["file"]].add(pair["train"]["row"])
    counts["records"] = bar.n
    counts["rows removed"] = sum(map(len, bad.values()))
    names, paths = Counter(Path(file).name for file in rows), []
    for file, all_rows in rows.items():
        kept, file = all_rows - bad[file], Path(file)
        path = out / (file.name if names[file.name] == 1 else f"{file.parent.name}-{file.name}")
        if path in paths or path.exists() and path.samefile(file):
            raise ValueError(f"{path} would overwrite {file} or its namesake; give another --out")
        clean(file, kept, path)
        paths.append(path)
    return counts, len(evals), problems, paths


def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("decontaminate", description=__doc__, formatter_class=raw)
    parser.add_argument("train", metavar="TRAIN")
    parser.add_argument("--against", nargs="+", required=True, metavar="EVAL")
    parser.add_argument("--out", default="runs/decontaminated", metavar="DIR")
    parser.add_argument("--drop-shared-images", action="store_true")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(argv)
    try:
        counts, n, problems, paths = check(**vars(args))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"stopped: {error}")
    print(problems.summary() or "all data could be read")
    against = f"{counts.pop('records'):,} training records against {n:,} evaluation records"
    print(f"{against}; {counts.pop('rows removed'):,} rows removed")
    for kind, count in counts.most_common():
        print(f"  {count:,} pairs: {kind}")
    print(f"pairs: {args.out}/report.jsonl; cleaned: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
