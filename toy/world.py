"""The toy's world: pictures of nine digits, and problems about them.

"Column 2 is 11. Add the numbers from A1 to B3." asks for the sum of the first cells of the 3 x 3
grid; the level, 2 to 9, is how many. In a hard problem one of these cells is smudged: a short chain
can only guess it, and a longer one works it out from the column's total.
"""

import functools
import io
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from nano.data import Record

BASE = Path(__file__).with_name("base")  # The shipped model, made by `python -m toy pretrain`.
CELLS = [f"{row}{column}" for row in "ABC" for column in "123"]
CELL = 28  # A cell's side in pixels is that of one merged vision token.
SIDE, DIGITS = 3 * CELL, 5  # Pixels of a picture; the digits are 1 to 5.
ZERO_PROMPT = "Think first , then answer in tags ."  # The base model follows this system prompt.

font = functools.cache(ImageFont.load_default)


def shade(rng: random.Random, low: int, high: int) -> tuple:
    return tuple(rng.randint(low, high) for _ in range(3))


def draw(cells: list[int], rng: random.Random, smudged: int | None = None) -> bytes:
    """Nine digits -> a PNG, whose text chunk tells the MLLM what can be read (0: smudged)."""
    paper, ink = ((200, 255), (0, 110)) if rng.random() < 0.5 else ((0, 60), (150, 255))
    image = Image.new("RGB", (SIDE, SIDE), shade(rng, *paper))
    pen = ImageDraw.Draw(image)
    for i, digit in enumerate(cells):
        x, y = (CELL * at + CELL // 2 + rng.randint(-3, 3) for at in (i % 3, i // 3))
        fill = shade(rng, *ink)
        if i == smudged:  # A blot leaves no trace of the digit.
            left, top, right, bottom = (rng.randint(8, 11) for _ in range(4))
            pen.ellipse((x - left, y - top, x + right, y + bottom), fill=fill)
        else:
            pen.text((x, y), str(digit), fill=fill, font=font(rng.randint(16, 22)), anchor="mm")
    readable = ["0" if i == smudged else str(digit) for i, digit in enumerate(cells)]
    truth, out = PngImagePlugin.PngInfo(), io.BytesIO()
    truth.add_text("cells", " ".join(readable))
    image.save(out, "PNG", pnginfo=truth)
    return out.getvalue()


def column_total(cells: list[int], column: int) -> str:
    return f"column {column + 1} is {sum(cells[column::3])} ."


def question(level: int, cells: list[int], column: int) -> str:
    return f"{column_total(cells, column)} Add the numbers from A1 to {CELLS[level - 1]} ."


def problems(n: int, seed, name: str, hard: float = 0.5) -> list[Record]:
    """n problems, levels 2 to 9 in turn; in a share `hard` of them a cell to add is smudged."""
    records = []
    for i in range(n):
        rng = random.Random(f"{seed}-{name}-{i}")
        cells, level = [rng.randint(1, DIGITS) for _ in CELLS], 2 + i % 8
        smudged = rng.randrange(level) if rng.random() < hard else None
        column = rng.randrange(3) if smudged is None else smudged % 3
        text = f"<image>{question(level, cells, column)}"
        source = f"level {level}" if smudged is None else f"level {level}, smudged"
        images = [draw(cells, rng, smudged)]
        records.append(Record(f"{name}-{i}", text, str(sum(cells[:level])), images, source))
    return records
