"""Table 4: how often the words of self-reflection occur in the responses of a data set.

  python -m tools.stats FILE... [--out stats.png]

FILE: JSONL or JSON with `response`, `conversations` or `messages`.

Counted are whole words in any case. Lengths and duplicates of each file stand beside them, and the
paper's three data sets; the lengths are drawn in --out.
"""

import argparse
import json
import re
from collections import Counter

from matplotlib.figure import Figure

from nano import run
from nano.words import WORDS

TABLE_4 = {  # Records, then the count of each word.
    "LLaVA-CoT": (100_000, 2300, 1, 183, 251, 8332),
    "Mulberry": (260_000, 1122, 0, 8784, 68, 26421),
    "Vision-R1-cold": (200_000, 585_719, 75_853, 26_697, 188_187, 100_148),
}
FOUND = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def responses(path: str):
    """Yields the assistant's side of each row; the pictures are not needed."""
    with open(path, encoding="utf-8") as file:
        is_list = file.read(1) == "["
        file.seek(0)
        for row in json.load(file) if is_list else map(json.loads, file):
            alone = [{"from": "gpt", "value": row.get("response")}]
            turns = row.get("conversations") or row.get("messages") or alone
            theirs = [t for t in turns if t.get("from", t.get("role")) in ("gpt", "assistant")]
            yield "\n".join(t.get("value", t.get("content")) or "" for t in theirs)


def word_cells(n: int, counts: list[int]) -> dict[str, str]:
    cells = {"records": f"{n:,}"} | {word: f"{count:,}" for word, count in zip(WORDS, counts)}
    return cells | {f"{word} per record": f"{count / n:.3f}" for word, count in zip(WORDS, counts)}


def column(path: str) -> tuple[dict[str, str], list[int]]:
    """-> (the file's column of the table, the words in each response)"""
    counts, records_with, texts, lengths = Counter(), Counter(), set(), []
    for text in filter(None, responses(path)):
        found = Counter(map(str.capitalize, FOUND.findall(text)))
        counts.update(found)
        records_with.update(found.keys())
        texts.add(hash(text))
        lengths.append(len(text.split()))
    if not lengths:
        raise ValueError(f"{path}: no responses in it (response, conversations or messages)")
    n, by_length = len(lengths), sorted(lengths)
    cells = word_cells(n, [counts[word] for word in WORDS])
    cells |= {f"records with {word}": f"{records_with[word] / n:.1%}" for word in WORDS}
    cells |= {"words: mean": f"{sum(lengths) / n:.0f}", "words: median": f"{by_length[n // 2]}"}
    cells |= {"words: 95 %": f"{by_length[int(0.95 * n)]}", "duplicates": f"{n - len(texts):,}"}
    return cells, lengths


def main(files: list[str], out: str = "stats.png") -> None:
    names = [file if len(file) < 32 else "..." + file[-29:] for file in files]
    columns, lengths = zip(*map(column, files))
    columns = dict(zip(names, columns))
    columns |= {f"Table 4: {name}": word_cells(n, own) for name, (n, *own) in TABLE_4.items()}
    print(" " * 28 + "".join(f"  {name}" for name in columns))
    for head in columns[names[0]]:
        cells = [f"{cells.get(head, ''):>{len(name) + 2}}" for name, cells in columns.items()]
        print(f"{head:<28}" + "".join(cells))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="words in a response")
    axes.hist(lengths, bins=40, density=True, label=names)
    axes.legend()
    figure.savefig(out, dpi=120)
    print(f"lengths: {out}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("stats", description=__doc__, formatter_class=raw)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out", default="stats.png", help="the picture of the lengths")
    with run.for_people():
        main(**vars(parser.parse_args()))
