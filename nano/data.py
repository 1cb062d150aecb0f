"""Problems in: `read(path)` turns the files that people have into a list of `Record`.

  our JSONL            id, image or images, problem, answer [, choices, source, response, system]
  the field's layouts  columns (R1-V, EasyR1, verl, SAT) or turns (VLM-R1, ms-swift, TRL, MM-EUREKA,
                       LLaVA-CoT, Mulberry, Vision-R1-cold): NAMES, ROLES and ENDS say what is what
  files                JSONL, a JSON list, parquet, CSV, TSV (VLMEvalKit's too)
  pictures             inside, relative to the file or an image root, in a zip or tar there, a URL
  a folder of these or a name on the hub, both with splits; or several of all this with commas

The first bytes of a file tell its kind, not its name. A bad row is noted in `Problems`.
"""

import ast
import base64
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BytesIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from nano import archives, hub

MARK = "<image>"  # Record.problem holds one for each image.
MAX_PIXELS = 64_000_000  # Ours: a larger picture is refused before its pixels are decoded.
MAX_RATIO = 200  # Qwen-VL's processors refuse a picture that is longer than this in its widths.
DELIMITERS = {"tsv": "\t", "csv": ","}
LFS = b"version https://git-lfs"  # A clone without git-lfs has this in place of a file.
KNOWN = "expected JSONL, parquet, CSV or a JSON list: images, problem, answer, or conversations"
# Our field <- what data sets call it, the likeliest name first; a.b lies inside a. A new layout is
# a new name here.
NAMES = {
    "turns": "messages message conversations conversation",
    "problem": "problem question query prompt query_cot",
    "answer": """answer ground_truth label gt_answer correct_answer reward_model.ground_truth
        solution answers""",
    "choices": "choices options",
    "images": """images decoded_image image image_bytes image_path image_url img picture filename
        file_name""",
    "video": "video videos",
    "id": "id pid sample_index index",
    "split": "extra_info.split",
}
NAMES = {ours: names.split() for ours, names in NAMES.items()}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# How a chain says its answer: ours and R1's, LLaVA-CoT's, Mulberry's, GSM8K's.
ENDS = (
    *(r"<answer>(.*?)</answer>", r"<CONCLUSION>(.*?)</CONCLUSION>"),
    *(r"### The final answer is:?([^\n]+)", r"\n#### ?([^\n]+)\s*\Z"),
)
NOTHING = (None, "", [], {})
TASK = {*NAMES["turns"], *NAMES["problem"]}  # A row without any of these is no problem.
# The files of a folder or repository are those of the first pattern that finds some.
PATTERNS = """data.jsonl *.parquet data/*.parquet */*.parquet *.jsonl data/*.jsonl *.json
    data/*.json *.tsv *.csv data/*.csv""".split()
# A split <- the words for it in the names of files, the likeliest first.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "testmini"),
}
SPLITS["held-out"] = SPLITS["validation"] + SPLITS["test"]  # what --eval_data of training is
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
    system: str = ""  # The row's own system prompt; a stage's --system_prompt goes before it.
    place: tuple = field(default=("", None), compare=False)  # The file, and the line as in Problem.
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
            if max(im.size) > MAX_RATIO * min(im.size):
                raise ValueError(
                    f"{im.width} x {im.height} pixels, no more than {MAX_RATIO} : 1 are read"
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
            if im.format == "PNG":
                im.verify()
            else:  # Others have no checksum: decode them, a JPEG at an eighth of its size.
                im.draft("RGB", (1, 1))
                im.load()
    except ValueError as error:
        raise BadRow("broken image", str(error)) from error


def _kind(path: Path) -> str:
    """ "json", "jsonl", "tsv", "csv", "parquet" or "object" (JSON's), from the first bytes."""
    with open(path, "rb") as f:
        head = f.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.split(b"\n")[0].decode("utf-8", "replace")
    for kind, delimiter in DELIMITERS.items():
        header = {name.strip().strip('"') for name in first.split(delimiter)}
        if header & TASK and header.intersection(NAMES["answer"]):
            return kind
    for start, kind in ((b"[", "json"), (b"{", "jsonl"), (b"PAR1", "parquet")):
        if text.startswith(start):  # An object that goes on after its first line is no JSONL.
            cut = kind == "jsonl" and b"\n" in text and not first.rstrip().endswith("}")
            return "object" if cut else kind
    wrong = f"unknown kind of file, it begins with {head[:24]!r}" if text else "empty file"
    if text.startswith(LFS):
        wrong = "a git-lfs pointer instead of the file, run `git lfs pull`"
    raise ValueError(f"{path}: {wrong}; {KNOWN}")


def _inner(row) -> list:
    """The rows in {"data": [...]}; [] for what is a row itself."""
    lists = row.values() if isinstance(row, dict) and not TASK & row.keys() else []
    return next((x for x in lists if isinstance(x, list) and x and isinstance(x[0], dict)), [])


def _rows(path: Path):
    """(number from 1, row or BadRow) one by one. Only a JSON list must be loaded whole."""
    kind, pictures = _kind(path), {}
    csv.field_size_limit(1 << 30)
    try:
        with open(path, "rb") as file:
            rows = file
            if kind in ("json", "object"):
                rows = json.load(file)
                rows = _inner(rows) or rows
            elif kind == "parquet":
                batches = pq.ParquetFile(path).iter_batches(batch_size=256)
                rows = (row for batch in batches for row in batch.to_pylist())
            elif kind in DELIMITERS:
                lines = TextIOWrapper(file, "utf-8-sig", newline="")
                rows = csv.DictReader(lines, delimiter=DELIMITERS[kind])
            for n, row in enumerate(rows, 1):
                try:
                    if kind in DELIMITERS and (image := row.get("image")):
                        # VLMEvalKit's may be the index of a row before that had the picture.
                        pictures[row.get("index")] = row["image"] = pictures.get(image, image)
                    if isinstance(row, bytes):
                        if not row.strip():
                            continue
                        row = json.loads(row)
                    if kind == "jsonl" and (inner := _inner(row)):
                        yield from enumerate(inner, 1)
                        continue
                    yield n, row
                except (ValueError, TypeError, RecursionError) as error:
                    yield n, BadRow("malformed line", str(error))
    except (ValueError, RecursionError, OSError, pa.ArrowException, csv.Error) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"{path}: broken {kind} of {size}, half downloaded? ({error})") from error


def choose(names: list[str], split: str, where="") -> list[str]:
    """The data files of one split out of the relative names in a folder; "" stands for all.

    Files without a split in their names are for training, or if none has one for any use.
    """
    for pattern in PATTERNS:
        depth = pattern.count("/")
        found = [n for n in sorted(names) if n.count("/") == depth and fnmatchcase(n, pattern)]
        if found := [n for n in found if "dataset_info" not in n and not n.startswith(".")]:
            break
    words, by_split = "|".join(word for words in SPLITS.values() for word in words), {}
    for name in found:
        in_name = re.findall(f"(?<![a-z])({words})(?![a-z])", name.lower())
        by_split.setdefault(in_name[-1] if in_name else "", []).append(name)
    if not split or by_split.keys() == {""} and split in ("train", "test", "held-out"):
        return found
    for word in (*SPLITS.get(split, (split,)), *([""] if split == "train" else [])):
        if word in by_split:
            return by_split[word]
    there = ", ".join(word or "one without a name" for word in by_split) or "no data file"
    raise ValueError(f"{where}: no split {split!r} (--split); there is {there}")


def _files(path: str | Path, split: str = "") -> list[Path]:
    """The data files behind a path, a folder, a hub name, or several of them with commas."""
    whole = Path(path).expanduser()
    if whole.is_file():
        return [whole]
    if not whole.exists() and "," in str(path):
        parts = [part.strip() for part in str(path).split(",")]
        return [file for part in parts if part for file in _files(part, split)]
    if hub.is_name(path):
        whole = hub.dataset(str(path), lambda names: _wanted(names, split, path))
    if not whole.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; {KNOWN}")
    names = [f.relative_to(whole).as_posix() for f in (*whole.glob("*"), *whole.glob("*/*"))]
    # Data are lists; dataset_info.json and its like are objects.
    names = [n for n in names if not n.endswith(".json") or _kind(whole / n) == "json"]
    if found := [whole / n for n in choose(names, split, path) if (whole / n).is_file()]:
        return found
    raise ValueError(f"{path}: no data.jsonl, *.parquet, *.jsonl or JSON list in this folder")


def _wanted(names: list[str], split: str, name: str) -> list[str]:
    """What to fetch of a repository: parquet holds its pictures, other files have them beside."""
    files = choose(names, split, name)
    parquet = all(f.endswith(".parquet") for f in files)
    return files if parquet else files + ["*.zip*", "*.tar", "*.jpg", "*.jpeg", "*.png"]


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


def _unpacked(value):
    """Lists and objects that a file holds as text, JSON's or Python's; all else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        for read_text in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return read_text(value)
    return value


def _our_names(row: dict) -> dict:
    """A row under our names, whatever its data set calls them."""
    out = dict(row)
    for ours, names in NAMES.items():
        out[ours] = None
        for name in names:
            outer, _, inner = name.partition(".")
            value = row.get(outer)
            if inner:
                value = _unpacked(value)
                value = value.get(inner) if isinstance(value, dict) else None
            if out[ours] in NOTHING and value not in NOTHING:
                if ours == "answer" != name and isinstance(value, list):  # ChartQA's label is one.
                    value = value[0]
                if ours == "answer" and isinstance(value, str):
                    if re.search("</think>|<CONCLUSION>", value):
                        out.setdefault("response", value)
                    ending = _ending(value)
                    if ending is None and name == "solution":  # MM-Math's ends in a box.
                        ending = (boxes(value) or [value if len(value) < 200 else ""])[-1]
                    value = value if ending is None else ending
                out[ours] = value
    if "correct_answer" in row:  # SAT's `answers` are options; elsewhere all of them are right.
        out["choices"] = out["choices"] or row.get("answers")
    turns = _unpacked(out["problem"])
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):  # TRL's and verl's prompt
        out["turns"] = out["turns"] or turns
    return out


def _ending(text: str) -> str | None:
    """The answer that a chain of thought ends in, or that stands in tags; None without one."""
    found = next((found for end in ENDS if (found := re.findall(end, text, re.S))), None)
    return found and re.sub(r"^\s*final answer\s*:", "", found[-1], flags=re.I).strip()


def _options(row: dict) -> list[str] | None:
    """The options' texts: of a list, of {"A": ...}, or of the columns A, B, ...; None for none."""
    options = _unpacked(row.get("choices"))
    if isinstance(options, dict):
        options = list(options.values())
    options = options or [row[letter] for letter in "ABCDEFGH" if row.get(letter) not in NOTHING]
    if not isinstance(options, list):
        raise BadRow("wrong type", f"choices is {type(options).__name__}, expected a list")
    options = [str(option) for option in options]
    labels = [re.match(rf"\s*\(?{chr(65 + k)}[.):]\s*(?=\S)", o) for k, o in enumerate(options)]
    if options and all(labels):  # They carry their letters along.
        options = [o[label.end() :] for o, label in zip(options, labels)]
    return options or None


def with_options(problem: str, choices: list[str] | None, answer: str) -> str:
    """The question with its options below it, lettered, unless it holds them.

    It does where they follow one another, with their letters if the answer is one. Options that
    are bare letters stand in the picture.
    """
    if not choices or choices == [chr(65 + k) for k in range(len(choices))]:
        return problem
    lettered = re.fullmatch(r"\(?[A-H]\)?", answer) and answer.strip("()") not in choices
    listed = ""
    for k, choice in enumerate(choices):
        label = rf"\W{{0,9}}\b{chr(65 + k)}\b[\s).:,\]]*"
        between = r"[\s,;/|]*(?:\b(?:or|and)\b)?\s*" if k else r"(?<!\w)"
        text = r"\s+".join(map(re.escape, choice.split()))
        listed += (label if lettered else f"(?:{label}|{between})") + text
    if re.search(listed + r"(?!\w)", problem, re.I):
        return problem
    lines = [f"({chr(65 + k)}) {choice}" for k, choice in enumerate(choices)]
    return "\n".join([problem, "Choices:", *lines])


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


def _flat(content, images: list) -> str:
    """A turn's text. Pictures among its parts leave a mark, and their sources go to `images`."""
    if not isinstance(content, list):
        return _text({"turn": content}, "turn")
    text = ""
    for part in content:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = str(part.get("type") or "text")
        if kind.startswith("video"):
            raise BadRow("video", "only pictures are read")
        if not kind.startswith("image"):
            text += _text(part, "text")
            continue
        text += MARK
        sources = [part[name] for name in ("image", "image_url", "url", "path") if part.get(name)]
        images += sources[:1]
    return _text({"turn": text}, "turn")


def _exchanges(row: dict) -> list[dict]:
    """A row of turns as one plain row per question and answer; any other row as it is.

    What is answered without a chain is a ground truth, with one it is a response.
    """
    turns = _unpacked(row.get("turns"))
    if turns is None:
        return [row]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong type", "conversations is not a list of turns")
    roles = [str(turn.get("from") or turn.get("role")) for turn in turns]
    roles, images = [ROLES.get(role, role) for role in roles], []
    if not re.fullmatch("(system )?(user |(user assistant )+)", " ".join([*roles, ""])):
        raise BadRow("odd turns", f"{roles}, expected user (human), assistant (gpt) in turn")
    texts = [_flat(turn.get("value") or turn.get("content"), images) for turn in turns]
    row = row | {"images": images or row.get("images")}
    if roles[0] == "system":
        row, texts = row | {"system": texts[0]}, texts[1:]
    if len(texts) == 1:
        return [row | {"problem": texts[0]}]
    rows = []
    for problem, response in zip(texts[::2], texts[1::2]):
        ending = _ending(response)
        chain = ending is not None or "<think>" in response
        answer = row.get("answer") if len(texts) == 2 else None
        if answer in NOTHING:
            answer = ending if chain else response
        more = {"problem": problem, "answer": answer}
        rows.append(row | more | {"response": response if chain else row.get("response")})
    return rows


NUMBERED = re.compile(r"<image[ _]?(\d+)>")


def _numbered(problem: str, images: list) -> tuple[str, list]:
    """<image1> and its like are image marks, in whatever order; a mark that recurs is a word."""
    order = [int(n) for n in dict.fromkeys(NUMBERED.findall(problem))]
    if len(images) == 1:
        order = order[:1]  # One picture shows them all, as in MATH-Vision.
    elif sorted(order) == list(range(1, len(images) + 1)):
        images = [images[n - 1] for n in order]
    for n in order:
        problem = re.sub(f"<image[ _]?{n}>", MARK, problem, count=1)
    return NUMBERED.sub(r"image \1", problem), images


def _images(row: dict, folder: Path, roots: tuple[Path, ...]) -> list[str | bytes]:
    images = _unpacked(row.get("images"))
    images = images if isinstance(images, list) else [] if images in NOTHING else [images]
    return [_picture(item, folder, roots) for item in images]


def _picture(item, folder: Path, roots: tuple[Path, ...]) -> str | bytes:
    """One picture, in any form in which a row may hold or name it -> its path or encoded bytes."""
    if isinstance(item, dict):  # Parquet has {bytes, path}, OpenAI's messages have {url}.
        item = item.get("bytes") or item.get("path") or item.get("url")
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item:
        raise BadRow("wrong type", f"an image is {item!r:.40}, expected a path or bytes")
    encoded = item.partition(",")[2] if item.startswith("data:") else item
    if encoded != item or len(item) > 100 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", item):
        with suppress(ValueError):
            return base64.b64decode(encoded)
    try:
        if item.startswith(("http://", "https://")):
            return hub.fetched(item)
        if item.startswith("file://"):
            item = unquote(urlparse(item).path)
        paths = [os.path.normpath(base / item) for base in (folder, *roots)]
        found = next(filter(os.path.isfile, paths), None)
        for place in (folder, *roots):
            found = found or archives.find(place, item, deep=place is not folder)
        return found or paths[0]
    except archives.Unreadable as error:
        raise BadRow("broken image", str(error)) from error


def _record(row: dict, folder: Path, id: str, roots: tuple[Path, ...] = ()) -> Record:
    if row.get("video") not in NOTHING or "<video>" in str(row.get("problem")):
        raise BadRow("video", "only pictures are read")
    problem, answer = _text(row, "problem"), _text(row, "answer").strip()
    problem, images = _numbered(problem, _images(row, folder, roots))
    choices, marks = _options(row), problem.count(MARK)
    if marks not in (0, len(images)):
        raise BadRow("image marks", f"{marks} {MARK} in the problem, {len(images)} images")
    problem = with_options(problem if marks else MARK * len(images) + problem, choices, answer)
    source, system = (_text(row, key) if row.get(key) else "" for key in ("source", "system"))
    response = _text(row, "response") if row.get("response") is not None else None
    meta = {name: row[name] for name in META if row.get(name) not in NOTHING}
    for nested in map(_unpacked, (row.get("metadata"), row.get("meta_info"), row.get("meta"))):
        meta |= nested if isinstance(nested, dict) else {}
    return Record(id, problem, answer, images, source, response, choices, meta, system)


def stream(
    path: str | Path, problems: Problems, check_images: bool = True, split="", image_root=""
):
    """Yields (file, row from 1, record), for sets larger than memory; see `read`."""
    ids, copies, others = set(), Counter(), Counter()
    for file in _files(path, split):
        known, found, where, hint = False, "no line is a JSON object", str(file), ""
        roots = [Path(root.strip()).expanduser() for root in image_root.split(",") if root.strip()]
        elsewhere = next((hub.PICTURES[p] for p in hub.PICTURES if file.name.startswith(p)), None)
        if elsewhere and any(hub.is_name(part.strip()) for part in str(path).split(",")):
            roots.append(hub.snapshot(*elsewhere))
        elif elsewhere:
            hint = f"; {file.name} has its pictures elsewhere: {hub.command(*elsewhere)}"
            hint += ", then --image_root FOLDER"
        for n, row in _rows(file):
            name = ""
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, dict):
                    raise BadRow("wrong type", f"{type(row).__name__}, expected an object")
                known, found = known or bool(TASK & row.keys()), f"unknown fields {', '.join(row)}"
                row = _our_names(row)
                if split and row["split"] and row["split"] not in SPLITS.get(split, split):
                    others[row["split"]] += 1
                    continue
                given = row.get("id") not in NOTHING
                id = name = str(row["id"]) if given else f"{file.stem}-{n}"
                parts = _exchanges(row)
                if len(parts) > 1:  # LLaVA-CoT asks several questions about one picture.
                    detail = f"made {len(parts)} records; later ones may lean on the first"
                    problems.add("several exchanges", detail, file, n, id)
                for k, part in enumerate(parts, 1):
                    name = id if k == 1 else f"{id}-turn{k}"
                    record = _record(part, file.parent, name, tuple(roots))
                    record.place = where, n
                    for image in record.images:
                        if isinstance(image, str) and not os.path.isfile(image):
                            raise BadRow("missing image", image + hint)
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
    if others and not ids:
        there = ", ".join(f"{name} ({count:,} rows)" for name, count in others.items())
        raise ValueError(f"{path}: no split {split!r} (--split); its rows say {there}")


def read(
    path: str | Path, strict: bool = False, check_images: bool = True, split="", image_root=""
):
    """-> (all usable Records behind `path`, the Problems of the others, or a ValueError if strict).

    check_images looks into each picture (minutes for 200K), which else must merely exist. `split`
    of a folder or a name on the hub: "" takes all of them. `image_root`: where else pictures are.
    """
    problems = Problems(strict)
    found = stream(path, problems, check_images, split, image_root)
    return [record for _, _, record in found], problems


def write_parquet(path: str | Path, records: Iterable[Record]) -> int:
    """Vision-R1-rl's columns (images, problem, answer) and id, source, choices, response.

    -> how many there were; only a few are in memory at a time"""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text, records, n = pa.string(), iter(records), 0
    columns = {"images": pa.list_(pa.struct([("bytes", pa.binary()), ("path", text)]))}
    columns |= dict.fromkeys(("problem", "answer", "id", "source", "system"), text)
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
