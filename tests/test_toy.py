"""toy/: the world follows from its seed, the teachers see what they should, the base works."""

import base64
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import ROOT, single_rank

import model
import reward
import toy
from nano import data, packing, rollout


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
    smudged = {
        share: sum("smudged" in r.source for r in toy.problems(200, 1, "x", share))
        for share in (0, 0.5, 1)
    }
    assert smudged[0] == 0 and smudged[1] == 200 and 70 < smudged[0.5] < 130


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

    processor, record = packing.Processor(tiny), toy.problems(1, 0, "x")[0]
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
    told = {
        text: sum(
            len(re.findall(r"is (?:\d|smudged)", toy.MLLM().chat(messages(text, r.images[0]))))
            for r in records
        )
        for text in ("description Reasoning :", "description")
    }
    assert told["description Reasoning :"] == 9 * 60 and told["description"] < 0.95 * 9 * 60


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
    return policy, processor, rollout.TorchEngine(policy, processor)


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
        said = re.findall(r"is (\w+)", x.text)
        good += sum(a == (str(b) if b else "smudged") for a, b in zip(said, cells))
    assert good >= 0.95 * 9 * 16


def test_the_base_answers_tersely_and_knows_the_format_only_when_asked(base):
    policy, processor, engine = base
    records = toy.problems(32, 8, "x")
    for prompt, rate in ((toy.ZERO_PROMPT, 0.9), ("", 0.0)):
        asked = packing.Processor(toy.BASE, system_prompt=prompt)
        prompts = [packing.encode(r, asked) for r in records]
        groups = engine.generate(prompts, 1, 60, [(0, i) for i in range(32)])
        scores = [reward.score(x.text, r.answer) for r, (x,) in zip(records, groups)]
        got = sum(s.format_ok for s in scores) / 32
        assert got >= rate if rate else got == 0
        assert all(len(x.ids) < 20 for (x,) in groups)


def test_names_of_the_toy_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single_rank()
    config = SimpleNamespace(model="toy:base", data="elsewhere.jsonl")
    toy.resolve(config)
    assert config.model == str(ROOT / "toy" / "base") and config.data == "elsewhere.jsonl"
    monkeypatch.setitem(toy.PROBLEMS, "test-problems", 5)
    assert toy.find("toy:test-problems") == "runs/toy/data/test-problems.parquet"
    records, problems = data.read("runs/toy/data/test-problems.parquet", strict=True)
    assert [r.problem for r in records] == [r.problem for r in toy.problems(5, 0, "test")]
    with pytest.raises(ValueError, match="the toy has no 'bse'; it has base, cold-problems"):
        toy.find("toy:bse")


def test_the_server_of_the_teachers_speaks_http_and_ends_with_its_starter():
    url = toy.start_teachers(0.2)
    ask = {"model": "toy-reasoner", "messages": messages("column 1 is 9 from A1 to A2 A1 is 1")}
    post = Request(f"{url}/chat/completions", json.dumps(ask).encode())
    reply = json.load(urlopen(post, timeout=20))["choices"][0]
    assert reply["finish_reason"] == "stop" and "</think>" in reply["message"]["content"]
    with pytest.raises(HTTPError, match="400"):
        bad = json.dumps(ask | {"model": "gpt-x"}).encode()
        urlopen(Request(f"{url}/chat/completions", bad), timeout=20)
    toy.start_teachers.process.stdin.close()
    assert toy.start_teachers.process.wait(20) == 0
    toy.teachers.start_teachers.cache_clear()


def test_the_teachers_start_without_torch():
    code = "import sys, toy, toy.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
