"""One HTML page for the rollouts of a training run or the answers of an evaluation.

  python -m tools.viewer RUN_OR_FILE      samples.jsonl of grpo.py, responses.jsonl of eval.py

The page holds everything, pictures too, and asks for nothing from anywhere. Rows hold no pictures:
they are found by id in the problems that the run's config.json names. What a model wrote is
hostile: it is never markup, and the page's policy lets no script run but its own.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from io import BytesIO
from pathlib import Path

from nano import data
from nano.words import WORDS

HERE = Path(__file__).resolve().parent
FILES = ("samples.jsonl", "responses.jsonl")  # Of grpo.py and of eval.py.
SIDES = (640, 448, 320, 224, 160)  # A picture's longest side in pixels, tried until it fits.
NEEDED = ("id", "problem", "completion")  # Texts that a row must have.


def find_file(path: str | Path) -> Path:
    """A run's folder or the file itself -> the file. ValueError says what is there instead."""
    path = Path(path)
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        below = sorted({str(f.parent) for name in FILES for f in path.rglob(name)})
        there = f"there is one in {', '.join(below[:9])}" if below else "nor is one below it"
        raise ValueError(f"{path}: no such run or file: no {' or '.join(FILES)} in it, {there}")
    return found[0]


def read_rows(path: Path) -> tuple[list[dict], list[str]]:
    """-> (rows, what was wrong with others). ValueError if no row is left."""
    rows, wrong = [], []
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip():
                wrong.append(f"{path}:{n}: not JSON (the writer was killed, or still writes?)")
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in NEEDED):
            wrong.append(f"{path}:{n}: no {', '.join(NEEDED)} in it")
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rollouts in it; {wrong[0] if wrong else 'it is empty'}")
    return rows, wrong


def find_records(source: str, config: dict) -> tuple[dict, str]:
    """-> ({id: Record, or what is wrong with it}, why any other id has none)."""
    if not source:
        return {}, "no config.json beside the rollouts says where the problems are; give --data"
    # The run may have been started in the repository, and the viewer somewhere else.
    if not os.path.exists(source) and (HERE.parent / source).exists():
        source = str(HERE.parent / source)
    try:
        where = dict(split=config.get("split", ""), image_root=config.get("image_root", ""))
        records, problems = data.read(source, check_images=False, **where)
    except (ValueError, FileNotFoundError) as error:
        return {}, f"the problems are not where the run had them; give --data ({error})"
    bad = {p.id: f"{p.kind} {p.detail}" for p in problems}
    return bad | {r.id: r for r in records}, f"its id is not in {source}"


def shrink(image: str | bytes, room: int) -> str:
    """A data URI of at most `room` characters. ValueError if that cannot be."""
    picture = data.load_image(image)  # It is upright, RGB, and without what else the file held.
    for side in SIDES:
        picture.thumbnail((side, side))  # It never becomes larger.
        if side > SIDES[-1] and side * side > 16 * room:
            continue  # It would hardly fit.
        uris = []
        for kind in ("png", "jpeg"):  # Drawings stay small and sharp as PNG, and photographs don't.
            picture.save(out := BytesIO(), kind, quality=80)
            text = base64.b64encode(out.getvalue()).decode()
            uris.append(f"data:image/{kind};base64,{text}")
        png, jpeg = uris
        if min(len(png), len(jpeg)) <= room:
            return png if len(png) <= min(room, 2 * len(jpeg)) else jpeg
    raise ValueError("left out: the page's budget for pictures is spent (--image-mb)")


def embed(images: list[str | bytes], room: int) -> tuple[list[str], dict]:
    """-> (data URIs, {picture: (its place there, "") or (None, why it has none)}), each once.

    What one picture does not need of the room, in characters, is left to the others.
    """
    uris, found, images = [], {}, list(dict.fromkeys(images))
    for n, image in enumerate(images):
        try:
            uris.append(shrink(image, room // (len(images) - n)))
            found[image] = len(uris) - 1, ""
            room -= len(uris[-1])
        except ValueError as error:
            found[image] = None, str(error)
    return uris, found


def number(value, digits: int = 4):
    """A finite number, rounded, or None: NaN is no JSON. Of a list, one per token, the mean."""
    if isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
        value = sum(value) / len(value)
    finite = isinstance(value, int | float) and math.isfinite(value)
    return round(value, digits) if finite else None


def about(path: Path, config: dict) -> str:
    """What tells a run from its neighbours: the patch, the adapters, the start of each answer."""
    trained = Path(config.get("model", "")) / "../config.json"  # Of an evaluation's model.
    trained = json.loads(trained.read_text()) if trained.is_file() else {}
    folders = re.findall(r"/ablations/([^/]+)/", path.resolve().as_posix())
    rank = config.get("lora_rank", trained.get("lora_rank"))
    prefill = config.get("prefill", "")
    return " · ".join(
        [f"variant {name}" for name in folders[-1:]]
        + [f"LoRA of rank {rank}"] * bool(rank)
        + [f"answers begin with {prefill!r}"] * bool(prefill)
    )


def match(row: dict, record: data.Record | str) -> tuple[list, str]:
    """-> (a row's pictures, why it has none). `record` may be a reason instead."""
    if data.MARK not in row["problem"]:
        return [], ""
    if isinstance(record, str):
        return [], record
    same = record.problem == row["problem"]
    return (record.images, "") if same else ([], "another problem has this id now")


def pack_problem(row: dict, places: list[tuple], note: str) -> tuple:
    """-> (id, source, problem, answer, choices, places of its pictures, why one is missing)"""
    note = next((why for _, why in places if why), note)
    choices = [str(c) for c in row["choices"]] if isinstance(row.get("choices"), list) else []
    source, answer = str(row.get("source", "")), str(row.get("answer", ""))
    return row["id"], source, row["problem"], answer, choices, [i for i, _ in places], note


def pack_sample(row: dict) -> tuple:
    """-> (completion, right?, reward, why, advantage, length, cut?, the answer that was judged)"""
    why = str(row.get("why", ""))
    right = bool(row.get("right", why == "ok"))  # samples.jsonl has no `right`.
    given = None if row.get("given") is None else str(row["given"])
    length, cut = number(row.get("length"), 0), row.get("finish") == "length"
    values = number(row.get("reward")), why, number(row.get("advantage"))
    return row["completion"], int(right), *values, length, int(cut), given


def build(path: str | Path, source: str = "", image_mb: float = 24.0) -> tuple[dict, list[str]]:
    """-> (what the page embeds, what was wrong). A group is the rows of one step and question."""
    path = find_file(path)
    rows, wrong = read_rows(path)
    config = path.with_name("config.json")
    config = json.loads(config.read_text()) if config.is_file() else {}
    records, absent = find_records(source or config.get("data", ""), config)
    asked, groups = {}, {}
    for row in rows:
        step, limit = number(row.get("step"), 0) or 0, row.get("max_len", config.get("max_len"))
        place, _ = asked.setdefault((row["id"], row["problem"]), (len(asked), row))
        group = groups.setdefault((step, place), (step, place, number(limit), []))
        group[3].append(pack_sample(row))
    asked = [row for _, row in asked.values()]
    matched = [match(row, records.get(row["id"], absent)) for row in asked]
    uris, found = embed([image for own, _ in matched for image in own], int(image_mb * 1e6))
    problems = [
        pack_problem(row, [found[image] for image in own], note)
        for row, (own, note) in zip(asked, matched)
    ]
    wrong += [f"{id}: no picture: {note}" for id, *_, note in problems if note]
    embedded = dict(name="/".join(path.resolve().parts[-3:-1]), file=path.name, words=WORDS)
    embedded["about"] = about(path, config)
    groups = sorted(groups.values(), key=lambda group: group[0])
    return embedded | dict(images=uris, problems=problems, groups=groups), wrong


def page(embedded: dict) -> bytes:
    html = (HERE / "viewer.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):  # The policy names the page's own code by its hash.
        code = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        html = html.replace(f"{tag.upper()}_HASH", digest)
    text = json.dumps(embedded, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without a "<" no text can end the script element or open a comment.
    html = html.replace("EMBEDDED_DATA", text.replace("<", "\\u003c"))
    return html.encode("utf-8", "backslashreplace")  # Half a character is written as its escape.


def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.viewer", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN_OR_FILE")
    parser.add_argument("--out", help="the page (default: view.html beside the rollouts)")
    parser.add_argument("--data", default="", help="the problems (default: as in config.json)")
    parser.add_argument("--image-mb", type=float, default=24.0, help="room for pictures (24)")
    args = parser.parse_args(argv)
    try:
        embedded, wrong = build(args.run, args.data, args.image_mb)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for reason in wrong[:5]:
        print(reason, file=sys.stderr)
    if wrong[5:]:
        print(f"... {len(wrong)} notes like these", file=sys.stderr)
    out = Path(args.out) if args.out else find_file(args.run).with_name("view.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page(embedded))
    groups, size = embedded["groups"], out.stat().st_size / 1e6
    counts = f"{sum(len(g[3]) for g in groups):,} completions in {len(groups):,} groups"
    print(f"wrote {out}: {counts}, {len(embedded['images']):,} pictures, {size:.1f} MB")


if __name__ == "__main__":
    main()
