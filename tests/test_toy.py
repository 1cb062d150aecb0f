"""toy.py: the world follows from its seed, the teachers see only what they should, the shipped base can do what it must."""

import base64
import re

import pytest
import torch
from conftest import ROOT

import model
import reward
import toy
from nano import packing, rollout


def messages(text, png=None):
    url = "data:image/png;base64," + base64.b64encode(png or b"").decode()
    image = [{"type": "image_url", "image_url": {"url": url}}] if png else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def test_problems_follow_from_the_seed_and_the_answers_are_right():
    a, b, c = toy.problems(16, 1, "x"), toy.problems(16, 1, "x"), toy.problems(16, 2, "x")
    assert a == b and a != c and len({r.images[0] for r in a}) == 16
    for r in a:
        cells, level = solve(r), toy.CELLS.index(re.search(r"to (\w\d)", r.problem)[1]) + 1
        assert r.answer == str(sum(cells[:level])) and min(cells) >= 1 and max(cells) <= toy.DIGITS
    smudged = lambda share: sum("smudged" in r.source for r in toy.problems(200, 1, "x", share))
    assert smudged(0) == 0 and smudged(1) == 200 and 70 < smudged(0.5) < 130


def solve(record):
    """the nine digits: those that can be read, and the smudged one from its column's total"""
    _, cells = toy.read_messages(messages("", record.images[0]))
    column, total = map(int, re.search(r"column (\d) is (\d+)", record.problem).groups())
    assert (0 in cells) == ("smudged" in record.source) and cells.count(0) <= 1
    assert 0 not in cells or cells.index(0) % 3 == column - 1
    return [c or total - sum(cells[i % 3 :: 3]) for i, c in enumerate(cells)]


def test_the_model_cannot_see_the_truth_in_the_file(tiny):
    """the text chunk that the scripted MLLM reads does not reach the pixels"""
    import io

    from PIL import Image

    processor, record = model.Processor(tiny), toy.problems(1, 0, "x")[0]
    out = io.BytesIO()
    Image.open(io.BytesIO(record.images[0])).save(out, "PNG")  # written again, without the chunk
    with_truth = packing.encode(record, processor).pixel_values
    record.images = [out.getvalue()]
    assert b"cells" not in out.getvalue() and torch.equal(
        with_truth, packing.encode(record, processor).pixel_values
    )


def test_the_description_without_a_pseudo_cot_misses_details():
    """App. B"""
    records = toy.problems(60, 3, "x")
    told = lambda text: sum(
        len(re.findall(r"is (?:\d|smudged)", toy.MLLM().chat(messages(text, r.images[0]))))
        for r in records
    )
    assert told("description Reasoning :") == 9 * 60 and told("description") < 0.95 * 9 * 60


def test_the_reasoner_depends_on_the_description_alone_and_thinking_longer_helps_and_hurts():
    right = {}
    for r in toy.problems(1600, 4, "x"):
        told = toy.MLLM().chat(messages("description Reasoning :", r.images[0]))
        reply = toy.Reasoner().chat(messages(f"{told} {r.problem}"))
        assert reply == toy.Reasoner().chat(messages(f"{told} {r.problem}"))
        worked_out = "not clear" in reply
        kind = "clear" if "smudged" not in r.source else "worked out" if worked_out else "guessed"
        right.setdefault((kind, min(reply.count(". so ") - 2 * worked_out, 2) > 1), []).append(
            reply.endswith(f"</think> {r.answer}")
        )
    rate = {k: sum(v) / len(v) for k, v in right.items()}
    assert (
        rate["guessed", False] < 0.4 < 0.6 < rate["worked out", False]
    )  # a smudged digit needs the longer chain
    assert rate["clear", True] < rate["clear", False]  # doubts spoil right answers


def test_what_the_reasoner_works_out_is_the_columns_total_less_its_other_digits():
    reasoner = toy.Reasoner()
    reasoner.slip = 0
    for r in toy.problems(80, 5, "x", hard=1):
        told = toy.MLLM().chat(messages("description Reasoning :", r.images[0]))
        if str(toy.read_messages(messages("", r.images[0]))[1]) == str(
            [int(x) if x != "smudged" else 0 for x in re.findall(r" is (\w+)", told)]
        ):
            reply = reasoner.chat(messages(f"{told} {r.problem}"))
            for cell, digit in re.findall(r"\. so (\w\d) is (\d)", reply):
                assert int(digit) == solve(r)[toy.CELLS.index(cell)]


def test_the_tokenizer_takes_any_text_and_makes_words_of_the_world_one_token():
    tok = toy.tokenizer()
    for text in (
        "<think> A1 3 3 , so 41 . </think> <answer> 41 </answer>",
        "naïve ∠ABC = 30°\n\t中文",
    ):
        assert tok.decode(tok(text).input_ids) == text
    assert len(tok("<think> A1 3 3 , so 41 . </think> <answer> 41 </answer>").input_ids) == 12


@pytest.fixture(scope="module")
def base():
    policy, processor = model.load(ROOT / "toy" / "base")
    return policy, processor, rollout.TorchEngine(policy.hf, processor, policy.banned)


def test_the_shipped_base_is_small_and_reads_pictures(base):
    policy, processor, engine = base
    assert sum(f.stat().st_size for f in (ROOT / "toy" / "base").iterdir()) < 4e6
    assert 1e6 <= sum(p.numel() for p in policy.parameters()) <= 5e6
    records = toy.problems(16, 8, "x")
    for r in records:
        r.problem = "<image>column 1 is 9 . Describe the picture ."
    groups = engine.generate(
        [packing.encode(r, processor) for r in records],
        1,
        60,
        [(0, i) for i in range(16)],
        temperature=0,
    )
    good = 0
    for r, (x,) in zip(records, groups):
        _, cells = toy.read_messages(messages("", r.images[0]))
        said = re.findall(r"is (\w+)", processor.tokenizer.decode(x.ids))
        good += sum(a == (str(b) if b else "smudged") for a, b in zip(said, cells))
    assert good >= 0.95 * 9 * 16


def test_the_base_answers_tersely_and_knows_the_format_only_when_asked(base):
    policy, processor, engine = base
    records = toy.problems(32, 8, "x")
    for prompt, rate in ((toy.ZERO_PROMPT, 0.9), ("", 0.0)):
        prompts = [packing.encode(r, processor, prompt) for r in records]
        groups = engine.generate(prompts, 1, 60, [(0, i) for i in range(32)])
        scores = [
            reward.score(processor.tokenizer.decode(x.ids[:-1]), r.answer)
            for r, (x,) in zip(records, groups)
        ]
        got = sum(s.format_ok for s in scores) / 32
        assert got >= rate if rate else got == 0
        assert all(len(x.ids) < 20 for (x,) in groups)
