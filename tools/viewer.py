"""One HTML page for the rollouts of a training run or the answers of an evaluation, to be read in any browser.

  python eval.py view runs/toy/grpo                      samples.jsonl of grpo.py      -> runs/toy/grpo/view.html
  python eval.py view runs/eval/responses.jsonl          responses.jsonl of eval.py    -> runs/eval/view.html
  python eval.py view RUN --data FILE --out FILE.html    where the problems have moved; another place for the page
  python viewer.py RUN                                   the same, without waiting for torch to be imported

The page holds everything (pictures too, made smaller) and asks for nothing from anywhere: it can be mailed, and opened from
disk. A run's rows hold no pictures: they are found by id in the problems that the run's config.json names. The page is
assets/viewer.html with the data put in. What a model wrote is hostile until proven otherwise: it is never markup, here or
there, and the page's policy lets no script run but its own.
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

from cold_start import WORDS  # Table 4
from nano import data

HERE = Path(__file__).resolve().parents[1]
FILES = ("samples.jsonl", "responses.jsonl")  # of grpo.py, of eval.py
SIDES = (
    640,
    448,
    320,
    224,
    160,
)  # longest side of a picture in pixels, tried in turn until it fits


def find_file(path):
    """a run's folder, or the file itself -> the file; ValueError says what is there instead"""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if found:
            return found[0]
        below = sorted({str(f.parent) for name in FILES for f in path.rglob(name)})
        hint = f"; there is in {', '.join(below[:9])}" if below else ""
        raise ValueError(f"{path}: no {' or '.join(FILES)} in it{hint}")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such run or file; expected a run of grpo.py or eval.py, or its {' or '.join(FILES)}"
        )
    return path


def read_rows(path):
    """-> (rows, [what was wrong with others]). ValueError if no row is left: a row needs id, problem and completion"""
    rows, wrong = [], []
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            wrong.append(f"{path}:{n}: not JSON (the writer was killed, or still writes?)")
            continue
        need = ("id", "problem", "completion")
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in need):
            rows.append(row)
        else:
            wrong.append(f"{path}:{n}: no {', '.join(need)} in it")
    if not rows:
        raise ValueError(
            f"{path}: no rollouts in it" + (f"; {wrong[0]}" if wrong else ", it is empty")
        )
    return rows, wrong


def find_records(source, wanted):
    """the problems file that the run read -> ({id: Record, or what is wrong with it}, why any other id has none)"""
    if not source:
        return {}, "no config.json beside the rollouts says where the problems are; give --data"
    if (
        not os.path.exists(source) and (HERE / source).exists()
    ):  # the run was started here, the viewer somewhere else
        source = str(HERE / source)
    try:
        records, problems = data.read(source, check_images=False)
    except (ValueError, FileNotFoundError) as error:
        return {}, f"the problems are not where the run had them; give --data ({error})"
    bad = {p.id: f"{p.kind} {p.detail}" for p in problems if p.id in wanted}
    return bad | {r.id: r for r in records if r.id in wanted}, f"its id is not in {source}"


def shrink(image, room):
    """path or encoded bytes -> data URI of at most `room` characters; ValueError if it cannot be read or made so small"""
    picture = data.load_image(image)  # upright, RGB, and without what else the file carried
    sizes = []
    for side in SIDES:
        picture.thumbnail((side, side))  # in place, and never larger
        hopeless = (
            side > SIDES[-1] and side * side > 16 * room
        )  # no picture of this size gets so small
        if hopeless or picture.size in sizes:
            continue
        sizes.append(picture.size)
        uris = []
        for kind in (
            "png",
            "jpeg",
        ):  # drawings are as small as PNG, and stay sharp; photographs are not
            out = BytesIO()
            picture.save(out, kind, quality=80)
            uris.append(f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}")
        png, jpeg = uris
        if len(min(uris, key=len)) <= room:
            return png if len(png) <= min(room, 2 * len(jpeg)) else jpeg
    raise ValueError("left out: the page's budget for pictures is spent (--image-mb)")


class Pictures:
    """the pictures of a page, each embedded once however many problems share it; what one does not need is left to the others"""

    def __init__(self, images, budget):
        self.left, self.room = (
            len({self.key(image) for image in images}),
            budget,
        )  # budget: characters
        self.uris, self.found = (
            [],
            {},
        )  # found: picture -> (place in uris or None, why there is none)

    def key(self, image):
        return image if isinstance(image, bytes) else os.path.realpath(image)

    def place(self, image):
        """path or encoded bytes -> (its place in uris, ""), or (None, why it is not there)"""
        key = self.key(image)
        if key not in self.found:
            try:
                uri = shrink(image, self.room // self.left)
                self.found[key] = len(self.uris), ""
                self.uris.append(uri)
                self.room -= len(uri)
            except ValueError as error:
                self.found[key] = None, str(error)
            self.left -= 1
        return self.found[key]


def number(value, digits=4):
    """a finite number, rounded, or None: NaN is no JSON"""
    good = isinstance(value, (int, float)) and math.isfinite(value)
    return round(value, digits) if good else None


def pack_problem(row, record, absent, pictures):
    """-> (id, source, problem, answer, choices, places of its pictures, why one is missing)"""
    note = ""
    if not isinstance(record, data.Record):
        record, note = None, record or absent
    elif record.problem != row["problem"]:
        record, note = None, "another problem has this id now"
    places = [pictures.place(image) for image in (record.images if record else [])]
    note = next((why for _, why in places if why), note if "<image>" in row["problem"] else "")
    choices = [str(c) for c in row["choices"]] if isinstance(row.get("choices"), list) else []
    source, answer = str(row.get("source", "")), str(row.get("answer", ""))
    return row["id"], source, row["problem"], answer, choices, [i for i, _ in places], note


def pack_sample(row):
    """-> (completion, right?, reward, why, advantage, length in tokens, cut at the limit?, answer that was judged)"""
    right = row.get("right", row.get("why") == "ok")  # samples.jsonl has no `right`
    given = None if row.get("given") is None else str(row["given"])
    return (
        row["completion"],
        int(bool(right)),
        number(row.get("reward")),
        str(row.get("why", "")),
        number(row.get("advantage")),
        number(row.get("length"), 0),
        int(row.get("finish") == "length"),
        given,
    )


def build(path, source="", image_mb=24.0):
    """a samples or responses file -> (what the page embeds, [what was wrong]). a group: the rows of one step and question"""
    path = find_file(path)
    rows, wrong = read_rows(path)
    config = path.with_name("config.json")
    config = json.loads(config.read_text()) if config.is_file() else {}
    records, absent = find_records(source or config.get("data", ""), {row["id"] for row in rows})
    pictures = Pictures(
        [image for r in records.values() for image in getattr(r, "images", [])], int(image_mb * 1e6)
    )
    problems, places, groups = [], {}, {}
    for row in rows:
        question, step = (row["id"], row["problem"]), number(row.get("step"), 0) or 0
        if question not in places:
            places[question] = len(problems)
            problems.append(pack_problem(row, records.get(row["id"]), absent, pictures))
            if problems[-1][-1]:
                wrong.append(f"{row['id']}: no picture: {problems[-1][-1]}")
        limit = number(row.get("max_len", config.get("max_len")))
        groups.setdefault((step, places[question]), (step, places[question], limit, []))[3].append(
            pack_sample(row)
        )
    name = "/".join(path.resolve().parts[-3:-1])
    ordered = sorted(groups.values(), key=lambda group: group[0])
    return dict(
        name=name,
        file=path.name,
        words=WORDS,
        images=pictures.uris,
        problems=problems,
        groups=ordered,
    ), wrong


def page(embedded):
    """what build gives -> the HTML file, as bytes"""
    html = (HERE / "tools" / "viewer.html").read_text(encoding="utf-8")
    for tag in (
        "style",
        "script",
    ):  # the policy names the page's own code by its hash: nothing else may run
        code = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        html = html.replace(
            f"{tag.upper()}_HASH", base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        )
    text = json.dumps(embedded, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    before, after = html.split("EMBEDDED_DATA")
    # without a "<" no text can end the script element or open a comment; half a character is written as its escape
    return (before + text.replace("<", "\\u003c") + after).encode("utf-8", "backslashreplace")


def main(argv):
    parser = argparse.ArgumentParser(
        prog="eval.py view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_OR_FILE")
    parser.add_argument("--out", metavar="FILE.html", help="default: view.html beside the rollouts")
    parser.add_argument(
        "--data",
        default="",
        help="the problems, for their pictures; default: as in the run's config.json",
    )
    parser.add_argument(
        "--image-mb",
        type=float,
        default=24.0,
        metavar="N",
        help="room for pictures in the page (default 24 MB)",
    )
    args = parser.parse_args(argv)
    try:
        embedded, wrong = build(args.run, args.data, args.image_mb)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for reason in wrong[:5]:
        print(reason, file=sys.stderr)
    if wrong[5:]:
        print(f"... {len(wrong)} notes like these", file=sys.stderr)
    out = Path(args.out) if args.out else find_file(args.run).with_name("view.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page(embedded))
    samples = sum(len(group[3]) for group in embedded["groups"])
    print(
        f"wrote {out}: {samples:,} completions in {len(embedded['groups']):,} groups, {len(embedded['images']):,} pictures, "
        f"{out.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
