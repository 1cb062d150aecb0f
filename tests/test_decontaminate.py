"""tools/decontaminate.py: planted copies are found, disjoint sets give no pair, layouts stay."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

from nano import data
from nano.data import Record
from tools import decontaminate

TEXTS = [
    "In triangle ABC the side AB is {n} cm long. Find the angle at C.",
    "How many apples were sold in week {n}?",
    "The graph shows y = {n} x + 1. Where does it meet the axis?",
    "What is the area of the shaded part of this circle of radius {n}?",
    "Which bar is taller than {n}?",
    "A cube has edges of length {n} cm; compute its volume.",
]


def drawing(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (260, 180), "white")
    pen = ImageDraw.Draw(image)
    pen.polygon([(rng.randrange(260), rng.randrange(180)) for _ in range(4)], outline="black")
    pen.ellipse(
        [
            x := rng.randrange(160),
            y := rng.randrange(100),
            x + rng.randint(30, 90),
            y + rng.randint(30, 70),
        ],
        outline="blue",
        width=2,
    )
    pen.text((rng.randrange(240), rng.randrange(160)), f"{rng.randrange(90)} cm", fill="black")
    return image


def png(image):
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def mutate(image, rng):
    """what becomes of a picture on its way through another data set: resized, compressed"""
    image = data.load_image(image)
    scale = rng.choice([0.5, 0.7, 0.9, 1.5])
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)),
        rng.choice([Image.Resampling.LANCZOS, Image.Resampling.BICUBIC]),
    )
    image.save(out := io.BytesIO(), "JPEG", quality=rng.choice([40, 60, 85]))
    return out.getvalue()


def one_word_changed(text, rng):
    words = text.replace("<image>", " ").split(" ")
    if max(map(len, words)) > 20:  # Chinese has no spaces: two signs
        at = rng.randrange(len(text) - 9)
        return (
            text
            if "<image>" in text[max(0, at - 7) : at + 9]
            else text[:at] + "变化" + text[at + 2 :]
        )
    at = rng.randrange(len(words))
    return " ".join([*words[:at], "changed", *words[at + 1 :]])


def pairs_in(out):
    return [json.loads(line) for line in open(Path(out) / "report.jsonl")]


def test_planted_copies_of_real_problems_are_found_and_disjoint_sets_give_no_pair(tmp_path, real):
    """Pictures resized and compressed, one word changed: 95 % found, and nothing else removed."""
    rng, planted, others = random.Random(0), [], []
    evals = [
        r
        for name in ("mathvision", "mathvista", "chartqa_owid", "scemqa_math", "gaokao_mm_math")
        for r in data.read(real / name, check_images=False)[0][:40]
    ]
    for r in evals:
        planted.append(
            Record(
                f"copy of {r.id}",
                "<image>" * r.problem.count("<image>")
                + one_word_changed(r.problem, rng).replace("<image>", ""),
                r.answer,
                [mutate(image, rng) for image in r.images],
                "planted",
            )
        )
    for name in ("geometry3k", "tabmwp", "puzzlevqa", "algopuzzlevqa", "mathverse"):
        others += data.read(real / name, check_images=False)[0][:40]
    data.write_parquet(tmp_path / "eval.parquet", evals)
    data.write_parquet(tmp_path / "train.parquet", planted + others)
    counts, n, problems, [path] = decontaminate.check(
        tmp_path / "train.parquet", [tmp_path / "eval.parquet"], tmp_path / "out", workers=1
    )
    assert n == len(evals) and not problems and counts["records"] == len(planted) + len(others)
    removed = {
        p["train"]["id"] for p in pairs_in(tmp_path / "out") if p["kind"] in decontaminate.REMOVED
    }
    hits = {
        p["train"]["id"]
        for p in pairs_in(tmp_path / "out")
        if p["kind"] in decontaminate.REMOVED and p["train"]["id"] == f"copy of {p['eval']['id']}"
    }
    assert len(hits) >= 0.95 * len(planted), sorted({r.id for r in planted} - hits)
    assert not removed & {r.id for r in others}, [
        p for p in pairs_in(tmp_path / "out") if not p["train"]["id"].startswith("copy")
    ]
    left = data.read(path, check_images=False)[0]
    assert {r.id for r in left} == {r.id for r in planted + others} - removed
    was = {
        r.id: [Path(i).read_bytes() if isinstance(i, str) else i for i in r.images]
        for r in planted + others
    }
    assert all(r.images == was[r.id] for r in left)  # the bytes as they were


@pytest.fixture()
def world(tmp_path):
    """20 evaluation problems; training: every kind of pair once, and 40 strangers"""
    (tmp_path / "e").mkdir(), (tmp_path / "t").mkdir()
    evals, train = [], []
    for i in range(20):
        drawing(i).save(tmp_path / "e" / f"{i}.png")
        evals.append(
            {
                "id": f"e{i}",
                "image": f"{i}.png",
                "problem": TEXTS[i % 6].format(n=i + 3),
                "answer": str(i),
            }
        )
    long = (
        "A farmer has a field with a fence around it as in the plan, and walks along all of it at "
        "5 km per hour in 37 minutes; how long is the fence, and what is the cost at 12 per metre?"
    )
    evals[19]["problem"] = long

    def add(id, image, problem, answer):
        image.save(tmp_path / "t" / f"{id}.png")
        train.append({"id": id, "image": f"{id}.png", "problem": problem, "answer": answer})

    add(
        "copy", drawing(4).resize((200, 138)), evals[4]["problem"] + "\nChoices:\n(A) 1\n(B) 2", "4"
    )
    add("shared", drawing(5), "Name the colour of the ellipse.", "blue")
    add("variant", drawing(6), evals[6]["problem"], "1234")
    add("text", drawing(900), long.replace("farmer", "gardener"), "19")
    add("other-numbers", drawing(901), long.replace("37", "73"), "19")
    for i in range(40):
        add(f"stranger{i}", drawing(1000 + i), TEXTS[i % 6].format(n=i + 3), str(i % 20))
    (tmp_path / "e" / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evals))
    return tmp_path, train


def run(folder, file, *flags):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.decontaminate",
            str(file),
            "--against",
            str(folder / "e" / "eval.jsonl"),
            "--out",
            str(folder / "out"),
            "--workers",
            "1",
            *flags,
        ],
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kind_of_pair_has_its_name_and_the_cleaned_file_its_layout(world):
    folder, train = world
    (folder / "t" / "train.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in train)
        + "\n"
        + '{"id": "broken", "image": "none.png", "problem": "?", "answer": "1"}\n'
    )
    said = run(folder, folder / "t" / "train.jsonl")
    pairs = {p["train"]["id"]: p for p in pairs_in(folder / "out")}
    assert {id: (p["kind"], p["eval"]["id"]) for id, p in pairs.items()} == {
        "copy": ("copy", "e4"),
        "shared": ("image shared", "e5"),
        "variant": ("variant", "e6"),
        "text": ("same question", "e19"),
    }
    assert (
        pairs["text"]["distance"] is None
        and pairs["copy"]["distance"] < 32
        and pairs["copy"]["overlap"] == 1
        and pairs["shared"]["train"]["row"] == 2
    )
    assert (
        "45 training records against 20 evaluation records; 2 rows removed" in said
        and "1 x missing image" in said
    )
    left, bad = data.read(
        folder / "out" / "train.jsonl"
    )  # the pictures are found from there, and are readable
    assert not bad and [r.id for r in left] == [
        r["id"] for r in train if r["id"] not in ("copy", "text")
    ]
    run(folder, folder / "t" / "train.jsonl", "--drop-shared-images")
    assert "shared" not in {r.id for r in data.read(folder / "out" / "train.jsonl")[0]}


def test_what_would_be_overwritten_ends_with_one_line(world):
    folder, train = world
    (folder / "t" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
    command = [sys.executable, "-m", "tools.decontaminate", str(folder / "t" / "train.jsonl")]
    command += ["--against", str(folder / "e" / "eval.jsonl"), "--workers", "1"]
    command += ["--out", str(folder / "t")]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train.jsonl would overwrite" in done.stderr.splitlines()[-1]
    assert len((folder / "t" / "train.jsonl").read_text().splitlines()) == len(train)


def test_sharegpt_files_stay_sharegpt(world):
    folder, train = world
    rows = [
        {
            "id": r["id"],
            "images": r["image"],
            "conversations": [
                {"from": "user", "value": "<image>" + r["problem"]},
                {
                    "from": "assistant",
                    "value": f"<think>x</think><answer>Final Answer:{r['answer']}</answer>",
                },
            ],
        }
        for r in train
    ]
    (folder / "t" / "mine.json").write_text(json.dumps(rows))
    run(folder, folder / "t" / "mine.json")
    left = json.loads((folder / "out" / "mine.json").read_text())
    assert [{**r, "images": Path(r["images"]).name} for r in left] == [
        r for r in rows if r["id"] not in ("copy", "text")
    ]
    assert not data.read(folder / "out" / "mine.json")[1]


def test_a_text_that_goes_with_many_pictures_is_a_template(tmp_path):
    text = (
        "Each ring of this puzzle holds some numbers that follow one rule, going round from the "
        "top to the left; what is the missing number of the part denoted with a question mark?"
    )
    for folder, first, n in (("e", 0, 3), ("t", 100, 4)):
        (tmp_path / folder).mkdir()
        data.write_parquet(
            tmp_path / folder / "x.parquet",
            [
                Record(f"{folder}{i}", f"<image>{text}", "7", [png(drawing(first + i))])
                for i in range(n)
            ],
        )
    counts, *_ = decontaminate.check(
        tmp_path / "t" / "x.parquet", [tmp_path / "e" / "x.parquet"], tmp_path / "out", workers=1
    )
    assert counts["template"] == 12 and not counts["rows removed"]


def test_words_overlap_and_answers():
    assert decontaminate.words("<image>Find  X, if 10.7 km! 求角ABC") == (
        "find",
        "x",
        "if",
        "10.7",
        "km",
        "求",
        "角",
        "abc",
    )
    assert (
        decontaminate.overlap("Find the angle x.", "FIND the angle  x ?") == 1
        and decontaminate.overlap("Find the angle x", "How many apples were sold?") < 0.2
    )
    assert (
        decontaminate.overlap(
            "Which bar is the tallest one here?", "Which column is the tallest one here?"
        )
        > 0.6
    )
    assert (
        decontaminate.conflict("12", "13 cm²") is False
        and decontaminate.conflict("12", "1,300")
        and decontaminate.conflict("red", "Blue")
    )
    assert (
        not decontaminate.conflict("B", "C")
        and not decontaminate.conflict("12 %", "12")
        and not decontaminate.conflict("B", "12")
    )


def test_the_hash_is_that_of_a_naive_cosine_transform():
    image = drawing(3)
    bits, thumb, shape = decontaminate.look(png(image))
    grey = np.asarray(
        image.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=3.0).convert("L"), np.float64
    )
    at = np.arange(64)
    low = [
        sum(
            grey[y] @ np.cos(np.pi / 64 * (at + 0.5) * v) * np.cos(np.pi / 64 * (y + 0.5) * u)
            for y in range(64)
        )
        for u in range(16)
        for v in range(16)
    ][1:]
    expected = [x > np.median(low) for x in low]
    assert (np.unpackbits(bits.view(np.uint8))[:255] == expected).mean() > 0.99 and abs(
        shape - np.log(260 / 180)
    ) < 1e-9


def test_a_changed_digit_or_colour_is_another_picture():
    base = drawing(7)
    digit, colour = base.copy(), base.copy()
    ImageDraw.Draw(base).text((100, 20), "37", fill="black", font_size=22)
    ImageDraw.Draw(digit).text((100, 20), "81", fill="black", font_size=22)
    ImageDraw.Draw(base).rectangle([20, 120, 70, 170], fill=(250, 120, 120))
    ImageDraw.Draw(digit).rectangle([20, 120, 70, 170], fill=(250, 120, 120))
    ImageDraw.Draw(colour).text((100, 20), "37", fill="black", font_size=22)
    ImageDraw.Draw(colour).rectangle([20, 120, 70, 170], fill=(75, 196, 170))
    thumbs = [decontaminate.look(png(im))[1] for im in (base, digit, colour)]
    assert decontaminate.same_picture(
        thumbs[0], decontaminate.look(mutate(png(base), random.Random(1)))[1]
    )
    assert not decontaminate.same_picture(thumbs[0], thumbs[1]) and not decontaminate.same_picture(
        thumbs[0], thumbs[2]
    )
