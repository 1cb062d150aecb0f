"""Benchmark of tools/decontaminate.py.

  python bench/decontaminate.py [--train 200000] [--eval 10000] [--workers 2]

The pictures are drawn (300 x 200 PNG), and the questions are random words. One training record in
200 is a copy of an evaluation record: its picture at 80 % and JPEG quality 60, one word changed. It
prints the time, how many copies were found, how many pairs are false, and the memory of the largest
process at its highest.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = [
    f"{a}{b}"
    for a in ("tri", "rec", "cir", "pol", "ang", "ten", "line", "sum", "half", "deg", "par", "mid")
    for b in ("gle", "ta", "cle", "us", "ine", "or", "ent", "al")
]


def drawing(rng, path):
    image = Image.new("RGB", (300, 200), "white")
    pen = ImageDraw.Draw(image)
    pen.polygon(
        [(rng.randrange(300), rng.randrange(200)) for _ in range(rng.randint(3, 5))],
        outline="black",
    )
    pen.ellipse(
        [
            x := rng.randrange(200),
            y := rng.randrange(120),
            x + rng.randint(20, 99),
            y + rng.randint(20, 79),
        ],
        outline=rng.choice(["black", "red", "blue"]),
        width=2,
    )
    for _ in range(4):
        pen.text(
            (rng.randrange(280), rng.randrange(180)),
            rng.choice("ABCDEFGH") + str(rng.randrange(90)),
            fill="black",
        )
    image.save(path, compress_level=1)


def text(rng):
    return [rng.choice(VOCABULARY) for _ in range(rng.randint(8, 40))]


def main(args):
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        own = min(args.train, 5000)  # each is decoded and compared as often as it is used, though
        for i in range(args.eval + own):
            drawing(rng, folder / f"{i}.png")
        with open(folder / "eval.jsonl", "w") as f:
            evals = [text(rng) for _ in range(args.eval)]
            f.writelines(
                json.dumps(
                    {"id": f"e{i}", "image": f"{i}.png", "problem": " ".join(t), "answer": str(i)}
                )
                + "\n"
                for i, t in enumerate(evals)
            )
        planted = {}
        with open(folder / "train.jsonl", "w") as f:
            for i in range(args.train):
                row = {
                    "id": f"t{i}",
                    "image": f"{args.eval + i % own}.png",
                    "problem": " ".join(text(rng)),
                    "answer": str(i),
                }
                if i % 200 == 0:
                    n = planted[f"t{i}"] = rng.randrange(args.eval)
                    words = list(evals[n])
                    words[rng.randrange(len(words))] = "changed"
                    Image.open(folder / f"{n}.png").resize(
                        (240, 160), Image.Resampling.LANCZOS
                    ).save(folder / f"t{i}.jpg", quality=60)
                    row |= {"image": f"t{i}.jpg", "problem": " ".join(words), "answer": str(n)}
                f.write(json.dumps(row) + "\n")
        began = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tools.decontaminate",
                str(folder / "train.jsonl"),
                "--against",
                str(folder / "eval.jsonl"),
                "--out",
                str(folder / "out"),
                "--workers",
                str(args.workers),
            ],
            check=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        pairs = [json.loads(line) for line in open(folder / "out" / "report.jsonl")]
        right = {
            p["train"]["id"]
            for p in pairs
            if planted.get(p["train"]["id"]) == int(p["eval"]["id"][1:])
            and p["kind"] in ("copy", "same question")
        }
        false = [p for p in pairs if planted.get(p["train"]["id"]) != int(p["eval"]["id"][1:])]
        print(done.stdout)
        sizes = f"{args.train:,} x {args.eval:,} records, {args.workers} workers"
        cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        found = f"{len(right)} of {len(planted)} copies ({len(right) / len(planted):.1%})"
        print(f"{sizes}: {seconds:.0f} s, CPU {cpu:.0f} s; found {found}, {len(false)} false pairs")
        print(f"largest process {memory:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=200_000)
    parser.add_argument("--eval", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    main(parser.parse_args())
