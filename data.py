"""Problems in, training batches out.

First half, the readers: `read(path)` turns every layout that users have on disk into a list of `Record`:
  our JSONL             data.jsonl: id, image or images, problem, answer [, choices, source, response]
  Vision-R1-rl parquet  images (list of {bytes, path}), problem, answer: the columns of hiyouga/geometry3k
  Vision-R1-cold JSON   conversations + image (roles human/gpt), or + images as ONE string (roles user/assistant)
  a folder of these, or several paths separated by commas
The kind is found by looking at the bytes, never at the name. Bad rows are collected in `Problems` and the rest goes on.
Second half: `encode` makes a record a `Prompt`, `pack` lays prompts and responses one after the other in a `Batch`.
"""
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

MARK = "<image>"                  # one per image in Record.problem
MAX_PIXELS = 64_000_000           # ours: a picture above this is refused before its pixels are decoded
LFS = b"version https://git-lfs"  # what a clone without git-lfs has in place of a file
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TASK = {"problem", "conversations", "messages"}  # a row without any of these is not a problem
FIELDS = ["id", "images", "image", "problem", "answer", "choices", "source", "response", "conversations", "messages"]
KNOWN = ("expected our JSONL (image or images, problem, answer), parquet (images, problem, answer, as Vision-R1-rl), "
         "a JSON list (conversations, image or images, as Vision-R1-cold), or a folder of these")

@dataclass
class Record:
    id: str
    problem: str                        # text with one "<image>" per image (added in front where the file has none)
    answer: str                         # ground truth, never ""
    images: list[str | bytes]           # a path, or the encoded bytes (parquet); [] for text-only
    source: str = ""
    response: str | None = None         # chain + answer, for SFT
    choices: list[str] | None = None

class Problem(NamedTuple):
    file: str
    line: int | None    # line of a JSONL file, row of a parquet file or JSON list, from 1
    id: str
    kind: str           # "empty answer", "broken image", ...: what the summary counts by
    detail: str

    def __str__(self):
        where = self.file + (f":{self.line}" if self.line else "")
        return f"{where}: id {self.id or '?'}: {self.kind}" + (f" ({self.detail})" if self.detail else "")

class Problems(list):
    """Bad data met on the way: `add` notes a Problem, or raises it as a ValueError when strict."""

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict

    def add(self, kind: str, detail: str = "", file="", line: int | None = None, id: str = ""):
        self.append(Problem(str(file), line, id, kind, detail))
        if self.strict:
            raise ValueError(f"{self[-1]}; without --strict such data is reported and the rest goes on")

    def summary(self, examples: int = 3) -> str:
        """Counts per kind with the first few examples of each; "" when nothing was wrong."""
        lines = [f"{len(self)} problems in the data:"] if self else []
        for kind, count in Counter(p.kind for p in self).most_common():
            lines += [f"  {count} x {kind}"] + [f"    {p}" for p in [p for p in self if p.kind == kind][:examples]]
        return "\n".join(lines)

class BadRow(ValueError):
    """One row that cannot be used: BadRow(kind, detail)."""

# ---- images

@contextmanager
def _opened(image: str | bytes):
    """The PIL image, header read and pixels not yet decoded; whatever is wrong with it becomes a ValueError that names it."""
    name = f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"{im.width} x {im.height} pixels, the limit is {MAX_PIXELS:,} (data.MAX_PIXELS)")
            yield im
    except Exception as error:  # on damaged bytes Pillow's decoders raise OSError, SyntaxError, struct.error, KeyError, ...
        lfs = isinstance(image, str) and os.path.isfile(image) and Path(image).read_bytes().startswith(LFS)
        raise ValueError(f"{name}: {'a git-lfs pointer; run `git lfs pull`' if lfs else error}") from error

def load_image(image: str | bytes) -> Image.Image:
    """Path or encoded bytes -> upright RGB image. ValueError with the path and the cause if it cannot be decoded.

    Transparency goes on white, as in qwen_vl_utils; a plain convert("RGB") would show the colours hidden beneath it.
    """
    with _opened(image) as im:
        im = ImageOps.exif_transpose(im)  # phones store the turn in EXIF
        if im.mode.startswith("I"):       # 16-bit grey: convert("RGB") would clip everything above 255 to white
            return Image.fromarray((np.clip(np.asarray(im), 0, 65535) // 257).astype(np.uint8)).convert("RGB")
        if im.has_transparency_data:      # RGBA, LA, and palettes or RGB with a transparent colour
            im = im.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
        return im.convert("RGB")          # palette, grey, CMYK, ...

def _check_image(image: str | bytes, verify: bool):
    if isinstance(image, str) and not os.path.isfile(image):
        raise BadRow("missing image", image)
    try:
        if verify:
            with _opened(image) as im:
                kind = im.format
                im.verify()  # header and checksums
            if kind == "JPEG":  # has no checksum: read it to its end, at an eighth of its size, to see whether it was cut
                with _opened(image) as im:
                    im.draft("RGB", (1, 1))
                    im.load()
    except ValueError as error:
        raise BadRow("broken image", str(error)) from error

# ---- files -> rows (dicts)

def _kind(path: Path) -> str:
    """"parquet", "json" (one list) or "jsonl", from the first bytes; ValueError says what was found instead."""
    with open(path, "rb") as f:
        head = f.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(LFS):
        raise ValueError(f"{path}: a git-lfs pointer instead of the file; run `git lfs pull`, or download the file itself")
    if not text:
        raise ValueError(f"{path}: empty file; {KNOWN}")
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
                except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
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
            for batch in table.iter_batches(batch_size=256, columns=[c for c in FIELDS if c in names]):
                for n, row in enumerate(batch.to_pylist(), n + 1):
                    yield n, row
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: broken parquet of {path.stat().st_size:,} bytes, half downloaded? ({error})") from error

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
        found = [f for f in sorted(whole.glob(pattern)) if f.is_file() and not f.name.startswith(".")]
        if pattern == "*.json":  # configuration files (dataset_info.json) are objects, data are lists
            found = [f for f in found if _kind(f) == "json"]
        if found:
            return found
    raise ValueError(f"{path}: no data.jsonl, *.parquet, data/*.parquet, *.jsonl or JSON list in this folder")

# ---- rows -> records

def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if type(value) in (int, float) and value == value:  # "answer": 80 is common; a NaN is no answer
        value = str(value).removesuffix(".0")
    if value is None or isinstance(value, str) and not value.strip():
        raise BadRow(f"empty {key}", "" if key in row else f"fields found: {', '.join(row)}")
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):  # tokenizers refuse half a character
        raise BadRow("wrong type", f"{key} is {value!r:.40}, expected text")
    return value

def _exchanges(row: dict) -> list[dict]:
    """A ShareGPT row as one plain row per question and answer; a row without turns is plain already."""
    turns = next((row[key] for key in ("conversations", "messages") if row.get(key) is not None), None)
    if turns is None:
        return [row]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong type", "conversations is not a list of turns")
    roles = [str(turn.get("from", turn.get("role"))) for turn in turns]
    if not turns or [ROLES.get(role) for role in roles] != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow("odd turns", f"roles {roles}, expected human, gpt or user, assistant in alternation")
    rows = []
    for k in range(0, len(turns), 2):
        problem, response = (_text({"turn": t.get("value", t.get("content"))}, "turn") for t in turns[k:k + 2])
        answer = (re.findall(r"<answer>(.*?)</answer>", response, re.S) or [""])[-1]
        answer = re.sub(r"^\s*final answer\s*:", "", answer, flags=re.I)  # the released data has "Final Answer:B"
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
        images.append(os.path.normpath(folder / item) if isinstance(item, str) else item)
    return images

def _record(row: dict, folder: Path, id: str) -> Record:
    problem, answer, images = _text(row, "problem"), _text(row, "answer").strip(), _images(row, folder)
    marks, choices = problem.count(MARK), row.get("choices")
    if marks not in (0, len(images)):
        raise BadRow("image marks", f"{marks} {MARK} in the problem, {len(images)} images")
    if choices is not None and not isinstance(choices, list):
        raise BadRow("wrong type", f"choices is {type(choices).__name__}, expected a list")
    return Record(id, problem if marks else MARK * len(images) + problem, answer, images,
                  _text(row, "source") if row.get("source") else "",
                  _text(row, "response") if row.get("response") is not None else None,
                  [str(c) for c in choices] if choices else None)

def read(path: str | Path, strict: bool = False, check_images: bool = True) -> tuple[list[Record], Problems]:
    """All usable records behind `path` (see the top of this file), and what was wrong with the others.

    Raises ValueError for a file of no known kind, and for the first bad row when strict. check_images reads each picture's
    header (minutes for 200K); without it a picture file must merely exist. A row without an id gets "<file>-<row>".
    """
    records, problems, ids, copies, checked = [], Problems(strict), set(), Counter(), set()
    for file in _files(path):
        known, found = False, "no line is a JSON object"
        for n, row in _rows(file, problems):
            name = ""
            try:
                if not isinstance(row, dict):
                    raise BadRow("wrong type", f"{type(row).__name__}, expected an object")
                known, found = known or bool(TASK & row.keys()), f"unknown fields {', '.join(row)}"
                given = row.get("id") not in (None, "")
                id = name = str(row["id"]) if given else f"{file.stem}-{n}"
                parts = _exchanges(row)
                if len(parts) > 1:  # LLaVA-CoT asks several questions about one picture
                    problems.add("several exchanges", f"made {len(parts)} records; later ones may lean on the first", file, n, id)
                for k, part in enumerate(parts, 1):
                    name = id if k == 1 else f"{id}-turn{k}"
                    record = _record(part, file.parent, name)
                    for image in set(record.images) - checked:
                        _check_image(image, check_images)
                        checked.add(image)
                    while record.id in ids:
                        copies[name] += 1
                        record.id = f"{name}-copy{copies[name]}"
                    if given and record.id != name:
                        problems.add("duplicate id", f"renamed {record.id}", file, n, name)
                    ids.add(record.id)
                    records.append(record)
            except BadRow as bad:
                problems.add(*bad.args, file, n, name)
        if not known:
            raise ValueError(f"{file}: {found}; {KNOWN}")
    return records, problems

# ---- records -> files

def write_jsonl(path: str | Path, records: list[Record]):
    """Our JSONL; byte images are saved in images/ beside it, paths are made relative to it. The file appears when complete."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "w", encoding="utf-8") as f:
        for r in records:
            images = [_save_image(i, folder, r.id) if isinstance(i, bytes) else os.path.relpath(i, folder) for i in r.images]
            f.write(json.dumps({k: v for k, v in {**vars(r), "images": images}.items() if v is not None}, ensure_ascii=False) + "\n")
    os.replace(f"{path}.part", path)

def _save_image(image: bytes, folder: Path, id: str) -> str:
    with _opened(image) as im:
        ending = im.format.lower()
    name = f"images/{re.sub(r'[^A-Za-z0-9_.-]', '_', id)[:80]}-{hashlib.sha256(image).hexdigest()[:8]}.{ending}"
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_bytes(image)
    return name

def write_parquet(path: str | Path, records: list[Record]):
    """Vision-R1-rl's columns (images as list<struct<bytes, path>>, problem, answer) + id, source, choices, response."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text, image = pa.string(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"images": pa.list_(image), "problem": text, "answer": text, "id": text, "source": text, "choices": pa.list_(text),
               "response": text}
    with pq.ParquetWriter(f"{path}.part", pa.schema(columns)) as writer:
        for start in range(0, len(records), 256):  # a row group at a time: pictures are large
            rows = [{**vars(r), "images": [{"bytes": i if isinstance(i, bytes) else Path(i).read_bytes()} for i in r.images]}
                    for r in records[start:start + 256]]
            writer.write_table(pa.Table.from_pylist(rows, writer.schema))
    os.replace(f"{path}.part", path)


# -----------------------------------------------------------------------------------------------------------------
# second half: records -> prompts -> packed batches. nothing is padded and no prompt is ever cut


@dataclass(eq=False)
class Prompt:
    """A problem as the model reads it; rollouts of one group share one Prompt, and with it the image."""
    record: Record
    ids: list[int]                      # image tokens expanded: one <|image_pad|> per merged patch
    position_ids: torch.Tensor          # (3, P) M-RoPE: time, height, width
    pixel_values: torch.Tensor | None   # (patches, patch_dim) of all its images
    image_grid: torch.Tensor            # (n_images, 3) in patches

    @property
    def next_position(self):
        return int(self.position_ids.max()) + 1     # where the response begins, on all three axes


def prompt_text(record, tokenizer, system_prompt=""):
    """The chat template's own text, with one <|image_pad|> per image; a base model without one gets a plain dialogue."""
    parts = re.split(f"({MARK})", record.problem)
    if tokenizer.chat_template:
        content = [{"type": "image"} if p == MARK else {"type": "text", "text": p} for p in parts if p]
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": content})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    problem = record.problem.replace(MARK, "<|vision_start|><|image_pad|><|vision_end|>")
    return f"{system_prompt}\n\nUser: {problem}\nAssistant:".lstrip()   # ours, after arXiv 2503.05132's setting


def prompt_ids(record, processor, patches, system_prompt=""):
    """Token ids with each image mark expanded to patches / merge^2 tokens; BadRow if the text itself holds image tokens."""
    ids = processor.tokenizer(prompt_text(record, processor.tokenizer, system_prompt), add_special_tokens=False).input_ids
    if ids.count(processor.image_token) != len(record.images):
        raise BadRow("image marks", f"{ids.count(processor.image_token)} image tokens in the text, {len(record.images)} images")
    counts = iter(patches)
    return [t for i in ids for t in ([i] * (next(counts) // processor.merge_size**2) if i == processor.image_token else [i])]


def prompt_length(record, processor, system_prompt=""):
    """Tokens of the prompt, from the headers of its images: nothing is decoded."""
    patches = []
    for image in record.images:
        with _opened(image) as im:
            width, height = ImageOps.exif_transpose(im).size if im.getexif().get(0x0112, 1) > 4 else im.size
        patches.append(processor.image_processor.get_number_of_image_patches(height, width, {}))
    return len(prompt_ids(record, processor, patches, system_prompt))


def usable(records, processor, max_prompt_len, problems, system_prompt=""):
    """The records whose prompt fits; the others are reported and left out, never cut."""
    kept = []
    for record in tqdm(records, "prompt lengths", leave=False, disable=len(records) < 5000):
        try:
            length = prompt_length(record, processor, system_prompt)
            if length > max_prompt_len:
                raise BadRow("prompt too long", f"{length} tokens, the limit is {max_prompt_len} (--max-prompt-len)")
            kept.append(record)
        except BadRow as bad:
            problems.add(*bad.args, record.source, None, record.id)
    return kept


def encode(record, processor, system_prompt=""):
    """Record -> Prompt, its images decoded and cut into patches."""
    pixels, grid = None, torch.zeros(0, 3, dtype=torch.long)
    if record.images:
        out = processor.image_processor(images=[load_image(i) for i in record.images], return_tensors="pt")
        pixels, grid = out["pixel_values"], out["image_grid_thw"]
    ids = prompt_ids(record, processor, grid.prod(-1).tolist(), system_prompt)
    return Prompt(record, ids, mrope(ids, grid, processor), pixels, grid)


def blank(processor):
    """A sequence without a label, for a rank that has none left but must still take part."""
    record = Record("blank", "", "-", [])
    ids = [processor.tokenizer.eos_token_id]
    return Prompt(record, ids, torch.zeros(3, 1, dtype=torch.long), None, torch.zeros(0, 3, dtype=torch.long)), []


def mrope(ids, grid, processor):
    """(3, P) positions of Qwen-VL: text counts up on all axes, an image spans a (time, height, width) box of them."""
    out, here, t = [], 0, 0
    boxes = iter(grid.tolist())
    while t < len(ids):
        if ids[t] == processor.image_token:
            time, height, width = next(boxes)
            box = torch.cartesian_prod(*(torch.arange(n) for n in
                                         (time, height // processor.merge_size, width // processor.merge_size)))
            out.append(box.T + here)
            t, here = t + len(box), here + max(height, width) // processor.merge_size
        else:
            out.append(torch.full((3, 1), here))
            t, here = t + 1, here + 1
    return torch.cat(out, 1)


class Packing:
    """Where the sequences of a packed row lie: lengths [l_0, l_1, ...] that add up to T.

    `buckets`: for attention that must pad, groups of sequences of similar length, each a (S, L) table of positions in the
    row (slots past a sequence's end repeat its last token); `order` puts their real outputs, bucket after bucket, back.
    """

    def __init__(self, lengths, device="cpu"):
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        self.cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32).to(device)  # (S + 1,)
        self.longest = max(lengths)
        self.buckets, places = [], []
        waiting = sizes.argsort(stable=True).tolist()
        while waiting:  # at most half again as long as the shortest of the bucket: little is padded, few calls are made
            count = sum(lengths[i] <= 1.5 * lengths[waiting[0]] + 8 for i in waiting)
            rows, waiting = torch.tensor(waiting[:count]), waiting[count:]
            column = torch.arange(int(sizes[rows].max()))
            table = (ends - sizes)[rows, None] + torch.minimum(column, sizes[rows, None] - 1)  # (S, L)
            real = (column < sizes[rows, None]).flatten().nonzero()[:, 0]
            self.buckets.append((table.to(device), real.to(device)))
            places.append(table.flatten()[real])
        self.order = torch.cat(places).argsort().to(device)  # (T,)


class Batch(NamedTuple):
    """Sequences one after the other in a row of T tokens (B sequences, N labelled positions, I distinct images)."""
    ids: torch.Tensor                   # (T,)
    position_ids: torch.Tensor          # (3, T)
    packing: Packing                    # where the sequences begin and end
    pixel_values: torch.Tensor | None   # (patches of the I images, patch_dim)
    image_grid: torch.Tensor            # (I, 3)
    image_index: list[int]              # the image at each place in the row where one stands
    label_index: torch.Tensor           # (N,) positions whose next token is a response token
    labels: torch.Tensor                # (N,) that token
    rows: torch.Tensor                  # (N,) which of the B sequences it belongs to


def pack(sequences, device="cpu"):
    """[(Prompt, response ids)] -> Batch. A Prompt that comes several times brings its images once."""
    ids, positions, index, labels, rows, image_index, first = [], [], [], [], [], [], {}
    pixels, grids, start, n_images = [], [], 0, 0
    for row, (prompt, response) in enumerate(sequences):
        p, r = len(prompt.ids), len(response)
        ids += prompt.ids + response
        after = torch.arange(r) + prompt.next_position
        positions += [prompt.position_ids, after.expand(3, -1)]
        index.append(torch.arange(start + p - 1, start + p + r - 1))
        labels += response
        rows += [row] * r
        start += p + r
        if prompt not in first:
            first[prompt] = n_images
            if prompt.pixel_values is not None:
                pixels.append(prompt.pixel_values)
                grids.append(prompt.image_grid)
                n_images += len(prompt.image_grid)
        image_index += range(first[prompt], first[prompt] + len(prompt.image_grid))
    packing = Packing([len(p.ids) + len(r) for p, r in sequences], device)
    tensors = (torch.tensor(ids), torch.cat(positions, 1), torch.cat(pixels) if pixels else None,
               torch.cat(grids) if grids else None, torch.cat(index), torch.tensor(labels, dtype=torch.long),
               torch.tensor(rows, dtype=torch.long))
    ids, positions, pixels, grids, index, labels, rows = (x if x is None else x.to(device) for x in tensors)
    return Batch(ids, positions, packing, pixels, grids, image_index, index, labels, rows)
