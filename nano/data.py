"""Problems in: `read(path)` turns the files that people have into a list of `Record`.

  our JSONL             id, image or images, problem, answer [, choices, source, response]
  Vision-R1-rl          parquet: images (list of {bytes, path}), problem, answer
  Vision-R1-cold        JSON: conversations + image, or conversations + images as one string
  the benchmarks' own   parquet, JSON, VLMEvalKit's TSV; pictures inside, beside it or in a zip
  a folder of these, or several paths separated by commas

The first bytes of a file tell its kind, not its name. A bad row is noted in `Problems`.
"""

import ast
import base64
import csv
import json
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

MARK = "<image>"  # Record.problem holds one for each image.
MAX_PIXELS = 64_000_000  # Ours: a larger picture is refused before its pixels are decoded.
LFS = b"version https://git-lfs"  # A clone without git-lfs has this in place of a file.
KNOWN = "expected JSONL, parquet or a JSON list: images, problem, answer or images, conversations"
# Our field <- what data sets call it, the likeliest name first. A new layout is a new name here.
NAMES = {
    "problem": ("question", "query", "query_cot"),
    "answer": ("ground_truth", "label", "gt_answer", "solution"),
    "choices": ("options",),
    "images": ("decoded_image", "image", "filename", "file_name", "image_path"),
    "id": ("pid", "sample_index", "index"),
}
NOTHING = (None, "", [])
OURS = {"problem", "conversations", "messages"}  # A row with one of these has our names already.
TASK = {*OURS, *NAMES["problem"]}  # A row without any of these is no problem.
# What the benchmarks say beside a question. Record.meta keeps it for their rules and reports.
META = """
    question_type answer_type precision unit task skills category answer_option query query_cot
    label problem_index problem_version question_for_eval human_or_machine subject level
    knowledge_level solution difficult year knowledge l2_category l2-category question_id image_path
    subcategory visual_input set_id figure_id index filename file_name
""".split()


@dataclass
class Record:
    id: str
    problem: str  # The text holds one "<image>" per image; they are put in front if it has none.
    answer: str  # The ground truth is never "".
    images: list[str | bytes]  # Each is a path or the encoded bytes; [] for a text-only problem.
    source: str = ""
    response: str | None = None  # A chain and its answer, for SFT.
    choices: list[str] | None = None
    meta: dict = field(default_factory=dict)  # What else a benchmark's row says, see META.
    prompt_tokens: int = 0  # packing.usable fills it in.


class Problem(NamedTuple):
    file: str
    line: int | None  # Line of a JSONL file, row of any other file, counted from 1.
    id: str
    kind: str  # What the summary counts by: "empty answer", "broken image", ...
    detail: str

    def __str__(self):
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: id {self.id or '?'}: {self.kind}" + (self.detail and f" ({self.detail})")


class Problems(list):
    """Bad data met on the way. `add` notes a Problem, or raises a ValueError when strict."""

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict

    def add(self, kind: str, detail: str = "", file="", line: int | None = None, id: str = ""):
        self.append(Problem(str(file), line, id, kind, detail))
        if self.strict:
            raise ValueError(f"{self[-1]}; without --strict it is reported and the rest goes on")

    def summary(self, examples: int = 3) -> str:
        """Counts by kind, each with its first examples; "" when nothing was wrong."""
        lines = [f"{len(self)} problems in the data:"] if self else []
        for kind, count in Counter(p.kind for p in self).most_common():
            alike = [f"    {p}" for p in self if p.kind == kind]
            lines += [f"  {count} x {kind}", *alike[:examples]]
        return "\n".join(lines)


class BadRow(ValueError):
    """One row cannot be used: BadRow(kind, detail)."""


@contextmanager
def opened(image: str | bytes):
    """The PIL image, its pixels not yet decoded. Whatever is wrong becomes a ValueError."""
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(
                    f"{im.width} x {im.height} pixels, at most {MAX_PIXELS:,} are read"
                )
            yield im
    except Exception as error:  # Damaged bytes raise OSError, SyntaxError, struct.error and more.
        name = f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
        lfs = os.path.isfile(name) and Path(name).read_bytes().startswith(LFS)
        cause = "a git-lfs pointer; run `git lfs pull`" if lfs else error
        raise ValueError(f"{name}: {cause}") from error


def load_image(image: str | bytes) -> Image.Image:
    """A path or encoded bytes -> an upright RGB image. ValueError if it cannot be decoded."""
    with opened(image) as im:
        im = ImageOps.exif_transpose(im)  # Phones store the turn in EXIF.
        if im.mode.startswith("I"):  # convert("RGB") would clip 16-bit grey at 255.
            grey = np.clip(np.asarray(im), 0, 65535) // 257
            im = Image.fromarray(grey.astype(np.uint8))
        elif im.has_transparency_data:  # It goes on white, as in qwen_vl_utils.
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert("RGB")


def _look_into(image: str | bytes):
    """BadRow for a picture that is damaged or cut, as far as its file shows."""
    try:
        with opened(image) as im:
            if im.format == "JPEG":  # It has no checksum: decode it at an eighth of its size.
                im.draft("RGB", (1, 1))
                im.load()
            else:
                im.verify()
    except ValueError as error:
        raise BadRow("broken image", str(error)) from error


def _kind(path: Path) -> str:
    """ "json", "jsonl", "tsv" or "parquet", from the first bytes. ValueError for any other file."""
    with open(path, "rb") as f:
        head = f.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if {b"question", b"answer"} <= set(text.split(b"\n")[0].strip().split(b"\t")):
        return "tsv"
    for start, kind in ((b"[", "json"), (b"{", "jsonl"), (b"PAR1", "parquet")):
        if text.startswith(start):
            return kind
    wrong = f"unknown kind of file, it begins with {head[:24]!r}" if text else "empty file"
    if text.startswith(LFS):
        wrong = "a git-lfs pointer instead of the file, run `git lfs pull`"
    raise ValueError(f"{path}: {wrong}; {KNOWN}")


def _tsv_row(row: dict, pictures: dict) -> dict:
    """VLMEvalKit's row: base64 (or the index of a row before with this picture), lists as text."""
    for name in ("choices", "metadata", "meta_info", "meta"):
        if (row.get(name) or "").startswith(("[", "{")):
            row[name] = ast.literal_eval(row[name])
    row["choices"] = row.get("choices") or [row[key] for key in "ABCDEF" if row.get(key)]
    image = row.get("image") or ""
    image = pictures[image] if image in pictures else base64.b64decode(image) or None
    row["image"] = pictures[row.get("index")] = image
    return row


def _rows(path: Path):
    """(number from 1, row or BadRow) one by one. Only a JSON list must be loaded whole."""
    kind, pictures = _kind(path), {}
    csv.field_size_limit(1 << 30)
    try:
        with open(path, "rb") as file:
            rows = file
            if kind == "json":
                rows = json.load(file)
            elif kind == "parquet":
                batches = pq.ParquetFile(path).iter_batches(batch_size=256)
                rows = (row for batch in batches for row in batch.to_pylist())
            elif kind == "tsv":
                rows = csv.DictReader(TextIOWrapper(file, "utf-8", newline=""), delimiter="\t")
            for n, row in enumerate(rows, 1):
                if kind == "jsonl" and not row.strip():
                    continue
                try:
                    if kind == "tsv":
                        row = _tsv_row(row, pictures)
                    elif kind == "jsonl":
                        row = json.loads(row)
                    yield n, row
                except (ValueError, SyntaxError, TypeError, RecursionError) as error:
                    yield n, BadRow("malformed line", str(error))
    except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"{path}: broken {kind} of {size}, half downloaded? ({error})") from error


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
        found = [f for f in sorted(whole.glob(pattern)) if f.is_file() and f.name[0] != "."]
        if pattern == "*.json":  # Data are lists; dataset_info.json and its like are objects.
            found = [f for f in found if _kind(f) == "json"]
        if found:
            return found
    raise ValueError(f"{path}: no data.jsonl, *.parquet, *.jsonl or JSON list in this folder")


def boxes(text: str) -> list[str]:
    """Contents of every closed \\boxed{...}, in order, without the boxes inside boxes. Linear."""
    opened, closed = [], []
    for m in re.finditer(r"(\\boxed\s{0,9})?(\{)|\\.|(\})", text, re.S):
        if m[2]:
            opened.append((m.end(), m[1]))
        elif m[3] and opened:
            start, is_box = opened.pop()
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, m.start()))
    return [text[start:end].strip() for start, end in closed]


def _our_names(row: dict) -> dict:
    """A row under our names, with its options written below the question as the authors do."""
    if OURS & row.keys():
        return row
    row = dict(row)
    for ours, names in NAMES.items():
        for name in names:
            value = row.get(name)
            if row.get(ours) in NOTHING and value not in NOTHING:
                if ours == "answer" and isinstance(value, list):  # ChartQA's label is a list.
                    value = value[0]
                if name == "solution":  # MM-Math's is a text that ends in the answer.
                    value = (boxes(str(value)) or [""])[-1]
                row[ours] = value
    problem, choices = row.get("problem"), row.get("choices") or None
    if isinstance(problem, str):
        problem = re.sub(r"<image\d*>", MARK, problem)
        if isinstance(choices, list) and not all(str(c) in problem for c in choices):
            lines = [f"({chr(65 + i)}) {c}" for i, c in enumerate(choices)]
            problem = "\n".join([problem, "Choices:", *lines])
    return {**row, "problem": problem, "choices": choices}


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if type(value) in (int, float) and value == value:  # "answer": 80 is common, NaN is no answer.
        value = str(value).removesuffix(".0")
    if value is None or isinstance(value, str) and not value.strip():
        raise BadRow(f"empty {key}", "" if key in row else f"fields found: {', '.join(row)}")
    # Tokenizers refuse half a character (a lone surrogate).
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise BadRow("wrong type", f"{key} is {value!r:.40}, expected text")
    return value


def _exchanges(row: dict) -> list[dict]:
    """A ShareGPT row as one plain row per question and answer; any other row as it is."""
    turns = row.get("conversations", row.get("messages"))
    if turns is None:
        return [row]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong type", "conversations is not a list of turns")
    roles = [str(turn.get("from", turn.get("role"))) for turn in turns]
    if not re.fullmatch("((human|user) (gpt|assistant) )+", " ".join([*roles, ""])):
        raise BadRow("odd turns", f"{roles}, expected human, gpt or user, assistant in turn")
    texts = [_text({"turn": turn.get("value", turn.get("content"))}, "turn") for turn in turns]
    rows = []
    for problem, response in zip(texts[::2], texts[1::2]):
        answer = (re.findall(r"<answer>(.*?)</answer>", response, re.S) or [""])[-1]
        answer = re.sub(r"^\s*final answer\s*:", "", answer, flags=re.I)  # In the released data.
        rows.append({**row, "problem": problem, "answer": answer, "response": response})
    return rows


def _images(row: dict, folder: Path) -> list[str | bytes]:
    images = row.get("images") or row.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    for i, item in enumerate(images := list(images)):
        if isinstance(item, dict):  # Parquet has {bytes, path}.
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)) or not item:
            raise BadRow("wrong type", f"an image is {item!r:.40}, expected a path or bytes")
        if isinstance(item, str):
            path = os.path.normpath(folder / item)
            item = path if os.path.isfile(path) else _from_zip(folder, item) or path
        images[i] = item
    return images


@lru_cache(maxsize=8)
def _members(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """The last part of a name in the folder's zips -> all (zip, name) with it."""
    members = defaultdict(list)
    for path in sorted(folder.glob("*.zip")):
        try:
            for name in zipfile.ZipFile(path).namelist():
                members[Path(name).name].append((path, name))
        except (zipfile.BadZipFile, OSError) as error:
            size = f"{path.stat().st_size:,} bytes"
            raise ValueError(f"{path}: broken zip of {size}, half downloaded? ({error})") from error
    return members


def _from_zip(folder: Path, name: str) -> bytes | None:
    """The picture whose path in a zip ends as `name` does; None if there are none or several."""
    found, asked = _members(folder).get(Path(name).name, []), f"/{os.path.normpath(name)}"
    if len(found) > 1:
        found = [x for x in found if f"/{x[1]}".endswith(asked) or asked.endswith(f"/{x[1]}")]
    if len(found) != 1:
        return None
    path, member = found[0]
    try:
        with zipfile.ZipFile(path) as z:
            return z.read(member)
    except (zipfile.BadZipFile, OSError, zlib.error) as error:
        raise BadRow("broken image", f"{name} in {path}: {error}") from error


def _record(row: dict, folder: Path, id: str) -> Record:
    problem, answer = _text(row, "problem"), _text(row, "answer").strip()
    images, choices, marks = _images(row, folder), row.get("choices"), problem.count(MARK)
    if marks not in (0, len(images)):
        raise BadRow("image marks", f"{marks} {MARK} in the problem, {len(images)} images")
    if choices is not None and not isinstance(choices, list):
        raise BadRow("wrong type", f"choices is {type(choices).__name__}, expected a list")
    problem = problem if marks else MARK * len(images) + problem
    source = _text(row, "source") if row.get("source") else ""
    response = _text(row, "response") if row.get("response") is not None else None
    choices = [str(c) for c in choices] if choices else None
    meta = {name: row[name] for name in META if row.get(name) not in NOTHING}
    for nested in (row.get("metadata"), row.get("meta_info"), row.get("meta")):
        meta |= nested if isinstance(nested, dict) else {}
    return Record(id, problem, answer, images, source, response, choices, meta)


def stream(path: str | Path, problems: Problems, check_images: bool = True):
    """Yields (file, row from 1, record), for sets larger than memory; see `read`."""
    ids, copies = set(), Counter()
    for file in _files(path):
        known, found = False, "no line is a JSON object"
        for n, row in _rows(file):
            name = ""
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, dict):
                    raise BadRow("wrong type", f"{type(row).__name__}, expected an object")
                known, found = known or bool(TASK & row.keys()), f"unknown fields {', '.join(row)}"
                row = _our_names(row)
                given = row.get("id") not in NOTHING
                id = name = str(row["id"]) if given else f"{file.stem}-{n}"
                parts = _exchanges(row)
                if len(parts) > 1:  # LLaVA-CoT asks several questions about one picture.
                    detail = f"made {len(parts)} records; later ones may lean on the first"
                    problems.add("several exchanges", detail, file, n, id)
                for k, part in enumerate(parts, 1):
                    name = id if k == 1 else f"{id}-turn{k}"
                    record = _record(part, file.parent, name)
                    for image in record.images:
                        if isinstance(image, str) and not os.path.isfile(image):
                            raise BadRow("missing image", image)
                        if check_images:
                            _look_into(image)
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


def read(path: str | Path, strict: bool = False, check_images: bool = True):
    """-> (all usable Records behind `path`, the Problems of the others, or a ValueError if strict).

    check_images looks into each picture (minutes for 200K), which else must merely exist.
    """
    problems = Problems(strict)
    return [record for _, _, record in stream(path, problems, check_images)], problems


def write_parquet(path: str | Path, records: Iterable[Record]) -> int:
    """Vision-R1-rl's columns (images, problem, answer) and id, source, choices, response.

    -> how many there were; only a few are in memory at a time"""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text, records, n = pa.string(), iter(records), 0
    columns = {"images": pa.list_(pa.struct([("bytes", pa.binary()), ("path", text)]))}
    columns |= {"problem": text, "answer": text, "id": text, "source": text}
    columns |= {"choices": pa.list_(text), "response": text}
    with pq.ParquetWriter(f"{path}.part", schema := pa.schema(columns)) as writer:
        while some := list(islice(records, 256)):
            rows = []
            for r in some:
                images = [i if isinstance(i, bytes) else Path(i).read_bytes() for i in r.images]
                rows.append({**vars(r), "images": [{"bytes": image} for image in images]})
            writer.write_table(pa.Table.from_pylist(rows, schema))
            n += len(rows)
    os.replace(f"{path}.part", path)
    return n
