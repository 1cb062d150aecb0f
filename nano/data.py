"""Problems in: `read(path)` turns every layout that users have on disk into a list of `Record`:
  our JSONL             data.jsonl: id, image or images, problem, answer [, choices, source, response]
  Vision-R1-rl parquet  images (list of {bytes, path}), problem, answer: the columns of hiyouga/geometry3k
  Vision-R1-cold JSON   conversations + image (roles human/gpt), or + images as ONE string (roles user/assistant)
  MathVista, MathVerse, MATH-Vision, DynaMath, ChartQA, MMStar, MME parquet; HallusionBench and MM-Math JSON, their pictures
  unpacked beside it or still in a zip; VLMEvalKit's TSV   (benchmarks.py scores them by their own rules)
  a folder of these, or several paths separated by commas
The kind is found by looking at the bytes, never at the name. Bad rows are collected in `Problems` and the rest goes on.
"""

import ast
import base64
import csv
import functools
import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

MARK = "<image>"  # one per image in Record.problem
MAX_PIXELS = 64_000_000  # ours: a picture above this is refused before its pixels are decoded
LFS = b"version https://git-lfs"  # what a clone without git-lfs has in place of a file
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TASK = {
    "problem",
    "question",
    "query",
    "conversations",
    "messages",
}  # a row without any of these is not a problem
# what the benchmarks and VLMEvalKit's TSV call our fields
OTHER_NAMES = {
    "problem": ("question", "query", "query_cot"),
    "answer": ("ground_truth", "label", "gt_answer"),
    "choices": ("options",),
    "images": ("decoded_image",),
    "id": ("pid", "sample_index", "index"),
}
# what they say beside a question, kept in Record.meta for benchmarks.py
META = (
    "question_type",
    "answer_type",
    "precision",
    "unit",
    "task",
    "skills",
    "category",
    "answer_option",
    "query",
    "query_cot",
    "label",
    "problem_index",
    "problem_version",
    "question_for_eval",
    "human_or_machine",
    "subject",
    "level",
    "knowledge_level",
    "solution",
    "difficult",
    "year",
    "knowledge",
    "l2_category",
    "l2-category",
    "question_id",
    "image_path",
    "subcategory",
    "visual_input",
    "set_id",
    "figure_id",
    "index",
    "filename",
    "file_name",
)
FIELDS = [
    "id",
    "images",
    "image",
    "problem",
    "answer",
    "choices",
    "source",
    "response",
    "conversations",
    "messages",
]
KNOWN = (
    "expected our JSONL (image or images, problem, answer), parquet (images, problem, answer, as Vision-R1-rl), "
    "a JSON list (conversations, image or images, as Vision-R1-cold), or a folder of these"
)


@dataclass
class Record:
    id: str
    problem: str  # text with one "<image>" per image (added in front where the file has none)
    answer: str  # ground truth, never ""
    images: list[str | bytes]  # a path, or the encoded bytes (parquet); [] for text-only
    source: str = ""
    response: str | None = None  # chain + answer, for SFT
    choices: list[str] | None = None
    meta: dict = field(
        default_factory=dict
    )  # META of a benchmark's row, and what its `meta` or `metadata` holds
    prompt_tokens: int = 0  # once packing.usable has counted them


class Problem(NamedTuple):
    file: str
    line: int | None  # line of a JSONL file, row of a parquet file or JSON list, from 1
    id: str
    kind: str  # "empty answer", "broken image", ...: what the summary counts by
    detail: str

    def __str__(self):
        where = self.file + (f":{self.line}" if self.line else "")
        return f"{where}: id {self.id or '?'}: {self.kind}" + (
            f" ({self.detail})" if self.detail else ""
        )


class Problems(list):
    """Bad data met on the way: `add` notes a Problem, or raises it as a ValueError when strict."""

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict

    def add(self, kind: str, detail: str = "", file="", line: int | None = None, id: str = ""):
        self.append(Problem(str(file), line, id, kind, detail))
        if self.strict:
            raise ValueError(
                f"{self[-1]}; without --strict such data is reported and the rest goes on"
            )

    def summary(self, examples: int = 3) -> str:
        """Counts per kind with the first few examples of each; "" when nothing was wrong."""
        lines = [f"{len(self)} problems in the data:"] if self else []
        for kind, count in Counter(p.kind for p in self).most_common():
            lines += [f"  {count} x {kind}"] + [
                f"    {p}" for p in [p for p in self if p.kind == kind][:examples]
            ]
        return "\n".join(lines)


class BadRow(ValueError):
    """One row that cannot be used: BadRow(kind, detail)."""


# ---- images


@contextmanager
def opened(image: str | bytes):
    """The PIL image, header read and pixels not yet decoded; whatever is wrong with it becomes a ValueError that names it."""
    name = f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(
                    f"{im.width} x {im.height} pixels, the limit is {MAX_PIXELS:,} (data.MAX_PIXELS)"
                )
            yield im
    except Exception as error:  # on damaged bytes Pillow's decoders raise OSError, SyntaxError, struct.error, KeyError, ...
        lfs = (
            isinstance(image, str)
            and os.path.isfile(image)
            and Path(image).read_bytes().startswith(LFS)
        )
        raise ValueError(
            f"{name}: {'a git-lfs pointer; run `git lfs pull`' if lfs else error}"
        ) from error


def load_image(image: str | bytes) -> Image.Image:
    """Path or encoded bytes -> upright RGB image. ValueError with the path and the cause if it cannot be decoded.

    Transparency goes on white, as in qwen_vl_utils; a plain convert("RGB") would show the colours hidden beneath it.
    """
    with opened(image) as im:
        im = ImageOps.exif_transpose(im)  # phones store the turn in EXIF
        if im.mode.startswith(
            "I"
        ):  # 16-bit grey: convert("RGB") would clip everything above 255 to white
            return Image.fromarray(
                (np.clip(np.asarray(im), 0, 65535) // 257).astype(np.uint8)
            ).convert("RGB")
        if im.has_transparency_data:  # RGBA, LA, and palettes or RGB with a transparent colour
            im = im.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
        return im.convert("RGB")  # palette, grey, CMYK, ...


def _check_image(image: str | bytes, verify: bool):
    if isinstance(image, str) and not os.path.isfile(image):
        raise BadRow("missing image", image)
    try:
        if verify:
            with opened(image) as im:
                kind = im.format
                im.verify()  # header and checksums
            if (
                kind == "JPEG"
            ):  # has no checksum: read it to its end, at an eighth of its size, to see whether it was cut
                with opened(image) as im:
                    im.draft("RGB", (1, 1))
                    im.load()
    except ValueError as error:
        raise BadRow("broken image", str(error)) from error


# ---- files -> rows (dicts)


def _kind(path: Path) -> str:
    """ "parquet", "json" (one list) or "jsonl", from the first bytes; ValueError says what was found instead."""
    with open(path, "rb") as f:
        head = f.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(LFS):
        raise ValueError(
            f"{path}: a git-lfs pointer instead of the file; run `git lfs pull`, or download the file itself"
        )
    if not text:
        raise ValueError(f"{path}: empty file; {KNOWN}")
    if b"\t" in text.split(b"\n")[0] and {b"question", b"answer"} <= set(
        text.split(b"\n")[0].strip().split(b"\t")
    ):
        return "tsv"
    if not head.startswith(b"PAR1") and text[:1] not in b"[{":
        raise ValueError(f"{path}: unknown kind of file, it begins with {head[:24]!r}; {KNOWN}")
    return {b"[": "json", b"{": "jsonl"}.get(text[:1], "parquet")


def _rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) one by one: JSONL by lines, parquet by batches; a JSON list must be loaded whole."""
    kind = _kind(path)
    if kind == "jsonl":
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    if line.strip():
                        yield n, json.loads(line)
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                    problems.add("malformed line", str(error), path, n)
    elif kind == "tsv":  # VLMEvalKit: pictures in base64, options as the text of a list
        csv.field_size_limit(1 << 30)
        pictures = {}  # by index: a question about the same picture gives the other's index instead of the bytes
        with open(path, encoding="utf-8", newline="") as f:
            for n, row in enumerate(csv.DictReader(f, delimiter="\t"), 1):
                try:
                    options = ast.literal_eval(row.get("choices") or "None") or [
                        row[c] for c in "ABCDEF" if row.get(c)
                    ]
                    image = row.get("image") or ""
                    image = pictures[row.get("index")] = (
                        pictures[image] if image in pictures else base64.b64decode(image)
                    )
                    yield n, {**row, "choices": options, "image": image or None}
                except (ValueError, SyntaxError, TypeError) as error:
                    problems.add("malformed line", str(error), path, n)
    elif kind == "json":
        try:
            yield from enumerate(json.loads(path.read_bytes()), 1)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: broken JSON, half downloaded? ({error})") from error
    else:
        try:
            table, n = pq.ParquetFile(path), 0
            names = table.schema_arrow.names
            if not TASK & set(names):
                raise ValueError(f"{path}: unknown columns {', '.join(names)}; {KNOWN}")
            wanted = {
                *FIELDS,
                *META,
                "metadata",
                "meta_info",
                *(name for others in OTHER_NAMES.values() for name in others),
            }
            for batch in table.iter_batches(
                batch_size=256, columns=[c for c in names if c in wanted]
            ):
                for n, row in enumerate(batch.to_pylist(), n + 1):
                    yield n, row
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{path}: broken parquet of {path.stat().st_size:,} bytes, half downloaded? ({error})"
            ) from error


def _files(path: str | Path) -> list[Path]:
    """The data files behind a path, a folder, or several of them separated by commas."""
    whole = Path(path).expanduser()
    if whole.is_file():
        return [whole]
    if not whole.exists() and "," in str(path):
        return [f for part in str(path).split(",") if part.strip() for f in _files(part.strip())]
    if not whole.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; {KNOWN}")
    for pattern in ("data.jsonl", "*.parquet", "data/*.parquet", "*.jsonl", "*.json"):
        found = [
            f for f in sorted(whole.glob(pattern)) if f.is_file() and not f.name.startswith(".")
        ]
        if (
            pattern == "*.json"
        ):  # configuration files (dataset_info.json) are objects, data are lists
            found = [f for f in found if _kind(f) == "json"]
        if found:
            return found
    raise ValueError(
        f"{path}: no data.jsonl, *.parquet, data/*.parquet, *.jsonl or JSON list in this folder"
    )


# ---- rows -> records


def _our_names(row: dict) -> dict:
    """A benchmark's row under our names, its options written out below the question as its authors do."""
    if TASK & row.keys() & {"problem", "conversations", "messages"}:
        return row
    row = dict(row)
    for ours, others in OTHER_NAMES.items():
        found = [row[name] for name in others if row.get(name) not in (None, "", [])]
        if found and row.get(ours) in (None, "", []):
            row[ours] = (
                found[0][0] if ours == "answer" and isinstance(found[0], list) else found[0]
            )  # ChartQA's label is a list
    if (
        not row.get("images")
        and not row.get("image")
        and (name := row.get("filename") or row.get("file_name") or row.get("image_path"))
    ):
        row["images"] = [name]
    if row.get("answer") in (None, "") and isinstance(
        row.get("solution"), str
    ):  # MM-Math's answer is the last \boxed{} of its solution
        row["answer"] = (boxes(row["solution"]) or [""])[-1]
    row["problem"] = (
        re.sub(r"<image\d*>", MARK, row["problem"])
        if isinstance(row.get("problem"), str)
        else row.get("problem")
    )
    choices = row["choices"] = row.get("choices") or None
    if (
        isinstance(choices, list)
        and row["problem"]
        and not all(str(c) in row["problem"] for c in choices)
    ):
        row["problem"] += "\nChoices:\n" + "\n".join(
            f"({chr(65 + i)}) {c}" for i, c in enumerate(choices)
        )
    return row


def boxes(text: str) -> list[str]:
    """Contents of every closed \\boxed{...}, in order, without the boxes inside of boxes. Linear."""
    opened, closed = [], []
    for m in re.finditer(r"\\boxed\s{0,9}\{|\\.|[{}]", text, re.S):
        if m[0] != "}" and m[0][-1] == "{" and m[0] != "\\{":
            opened.append((m.end(), len(m[0]) > 1))
        elif m[0] == "}" and opened:
            start, box = opened.pop()
            if box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, m.start()))
    return [text[start:end].strip() for start, end in closed]


def _meta(row: dict) -> dict:
    meta = {key: row[key] for key in META if row.get(key) not in (None, "")}
    for nested in (row.get("metadata"), row.get("meta_info"), row.get("meta")):
        if isinstance(nested, str) and nested.startswith("{"):  # the TSV holds it as text
            try:
                nested = ast.literal_eval(nested)
            except (ValueError, SyntaxError) as error:
                raise BadRow("wrong type", f"metadata is no dict: {error}") from error
        meta |= nested if isinstance(nested, dict) else {}
    return meta


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if type(value) in (int, float) and value == value:  # "answer": 80 is common; a NaN is no answer
        value = str(value).removesuffix(".0")
    if value is None or isinstance(value, str) and not value.strip():
        raise BadRow(f"empty {key}", "" if key in row else f"fields found: {', '.join(row)}")
    if not isinstance(value, str) or re.search(
        "[\ud800-\udfff]", value
    ):  # tokenizers refuse half a character
        raise BadRow("wrong type", f"{key} is {value!r:.40}, expected text")
    return value


def _exchanges(row: dict) -> list[dict]:
    """A ShareGPT row as one plain row per question and answer; a row without turns is plain already."""
    turns = next(
        (row[key] for key in ("conversations", "messages") if row.get(key) is not None), None
    )
    if turns is None:
        return [row]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong type", "conversations is not a list of turns")
    roles = [str(turn.get("from", turn.get("role"))) for turn in turns]
    if not turns or [ROLES.get(role) for role in roles] != ["user", "assistant"] * (
        len(turns) // 2
    ):
        raise BadRow(
            "odd turns", f"roles {roles}, expected human, gpt or user, assistant in alternation"
        )
    rows = []
    for k in range(0, len(turns), 2):
        problem, response = (
            _text({"turn": t.get("value", t.get("content"))}, "turn") for t in turns[k : k + 2]
        )
        answer = (re.findall(r"<answer>(.*?)</answer>", response, re.S) or [""])[-1]
        answer = re.sub(
            r"^\s*final answer\s*:", "", answer, flags=re.I
        )  # the released data has "Final Answer:B"
        rows.append({**row, "problem": problem, "answer": answer, "response": response})
    return rows


def _images(row: dict, folder: Path) -> list[str | bytes]:
    value = row["images"] if row.get("images") is not None else row.get("image")
    images = []
    for item in [] if value is None else value if isinstance(value, list) else [value]:
        if isinstance(item, dict):  # parquet: {bytes, path}
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)) or not item:
            raise BadRow("wrong type", f"an image is {item!r:.40}, expected a path or bytes")
        if isinstance(item, str):
            path = os.path.normpath(folder / item)
            item = path if os.path.isfile(path) else _from_zip(folder, item) or path
        images.append(item)
    return images


@functools.lru_cache(maxsize=8)
def _members(folder: Path) -> dict[str, tuple[Path, str] | None]:
    """Pictures in the zips of a folder by the end of their path, of any length: (zip, path inside); None where two share it."""
    members = {}
    for path in sorted(folder.glob("*.zip")):
        try:
            with zipfile.ZipFile(path) as z:
                for name in z.namelist():
                    parts = Path(name).parts
                    for k in range(len(parts)):
                        end = "/".join(parts[k:])
                        members[end] = None if end in members else (path, name)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"{path}: broken zip of {path.stat().st_size:,} bytes, half downloaded? ({error})"
            ) from error
    return members


def _from_zip(folder: Path, name: str) -> bytes | None:
    parts, members = Path(os.path.normpath(name)).parts, _members(folder)
    found = next(
        (members["/".join(parts[k:])] for k in range(len(parts)) if "/".join(parts[k:]) in members),
        None,
    )
    if not found:
        return None
    try:
        with zipfile.ZipFile(found[0]) as z:
            return z.read(found[1])
    except (zipfile.BadZipFile, OSError, zlib.error) as error:
        raise BadRow("broken image", f"{name} in {found[0]}: {error}") from error


def _record(row: dict, folder: Path, id: str) -> Record:
    problem, answer, images = (
        _text(row, "problem"),
        _text(row, "answer").strip(),
        _images(row, folder),
    )
    marks, choices = problem.count(MARK), row.get("choices")
    if marks not in (0, len(images)):
        raise BadRow("image marks", f"{marks} {MARK} in the problem, {len(images)} images")
    if choices is not None and not isinstance(choices, list):
        raise BadRow("wrong type", f"choices is {type(choices).__name__}, expected a list")
    return Record(
        id,
        problem if marks else MARK * len(images) + problem,
        answer,
        images,
        _text(row, "source") if row.get("source") else "",
        _text(row, "response") if row.get("response") is not None else None,
        [str(c) for c in choices] if choices else None,
        _meta(row),
    )


def stream(
    path: str | Path, problems: Problems, check_images: bool = True
) -> Iterator[tuple[Path, int, Record]]:
    """(file, row from 1, record) one by one, for sets whose pictures do not fit in memory; see `read`."""
    ids, copies, checked = set(), Counter(), set()
    for file in _files(path):
        known, found = False, "no line is a JSON object"
        for n, row in _rows(file, problems):
            name = ""
            try:
                if not isinstance(row, dict):
                    raise BadRow("wrong type", f"{type(row).__name__}, expected an object")
                known, found = known or bool(TASK & row.keys()), f"unknown fields {', '.join(row)}"
                row = _our_names(row)
                given = row.get("id") not in (None, "")
                id = name = str(row["id"]) if given else f"{file.stem}-{n}"
                parts = _exchanges(row)
                if len(parts) > 1:  # LLaVA-CoT asks several questions about one picture
                    problems.add(
                        "several exchanges",
                        f"made {len(parts)} records; later ones may lean on the first",
                        file,
                        n,
                        id,
                    )
                for k, part in enumerate(parts, 1):
                    name = id if k == 1 else f"{id}-turn{k}"
                    record = _record(part, file.parent, name)
                    for image in set(record.images) - checked:
                        _check_image(image, check_images)
                        if isinstance(image, str):
                            checked.add(image)
                    while record.id in ids:
                        copies[name] += 1
                        record.id = f"{name}-copy{copies[name]}"
                    if given and record.id != name:
                        problems.add("duplicate id", f"renamed {record.id}", file, n, name)
                    ids.add(record.id)
                    yield file, n, record
            except BadRow as bad:
                problems.add(*bad.args, file, n, name)
        if not known:
            raise ValueError(f"{file}: {found}; {KNOWN}")


def read(
    path: str | Path, strict: bool = False, check_images: bool = True
) -> tuple[list[Record], Problems]:
    """All usable records behind `path` (see the top of this file), and what was wrong with the others.

    Raises ValueError for a file of no known kind, and for the first bad row when strict. check_images reads each picture's
    header (minutes for 200K); without it a picture file must merely exist. A row without an id gets "<file>-<row>".
    """
    problems = Problems(strict)
    return [record for _, _, record in stream(path, problems, check_images)], problems


# ---- records -> files


def write_parquet(path: str | Path, records: list[Record]):
    """Vision-R1-rl's columns (images as list<struct<bytes, path>>, problem, answer) + id, source, choices, response."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text, image = pa.string(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "images": pa.list_(image),
        "problem": text,
        "answer": text,
        "id": text,
        "source": text,
        "choices": pa.list_(text),
        "response": text,
    }
    with pq.ParquetWriter(f"{path}.part", pa.schema(columns)) as writer:
        for start in range(0, len(records), 256):  # a row group at a time: pictures are large
            rows = [
                {
                    **vars(r),
                    "images": [
                        {"bytes": i if isinstance(i, bytes) else Path(i).read_bytes()}
                        for i in r.images
                    ],
                }
                for r in records[start : start + 256]
            ]
            writer.write_table(pa.Table.from_pylist(rows, writer.schema))
    os.replace(f"{path}.part", path)
