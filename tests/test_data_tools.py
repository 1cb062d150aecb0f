"""tools/mix.py and tools/select.py: what they take, from where, and that it reads back."""

import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_decontaminate import TEXTS, drawing, mutate, one_word_changed, png

from nano import data
from nano.data import Record
from tools import mix, select


def a_set(path, n, seed, name, as_paths=False):
    """n problems with drawings in a file; `as_paths`: a JSONL with the pictures beside it"""
    records = []
    for i in range(n):
        text = TEXTS[i % len(TEXTS)].format(n=seed + i)
        records.append(Record(str(i), f"<image>{text}", str(i), [png(drawing(seed + i))], name))
    if not as_paths:
        data.write_parquet(path, records)
        return records
    (path.parent / "pictures").mkdir()
    with open(path, "w") as f:
        for r in records:
            (path.parent / "pictures" / f"{r.id}.png").write_bytes(r.images[0])
            row = dict(id=r.id, images=[f"pictures/{r.id}.png"], problem=r.problem)
            f.write(json.dumps(row | dict(answer=r.answer, source=r.source)) + "\n")
    return records


def naive_quotas(sizes, weights, limit):
    """the ideal shares, filled up from the others by hand: bisection for the common factor"""
    low, high = 0.0, 1e9
    for _ in range(200):
        factor = (low + high) / 2
        total = sum(min(size, factor * weight) for size, weight in zip(sizes, weights))
        low, high = (factor, high) if total < limit else (low, factor)
    return [min(size, low * weight) for size, weight in zip(sizes, weights)]


def test_quotas_are_the_shares_and_what_lacks_comes_from_the_others():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randrange(60) for _ in range(rng.randint(1, 5))]
        weights = [rng.choice([0.5, 1, 2, 3]) for _ in sizes]
        limit = rng.randint(0, sum(sizes) + 5)
        taken = mix.quotas(sizes, weights, limit)
        wanted = min(limit or sum(sizes), sum(sizes))
        assert sum(taken) == wanted
        for got, ideal in zip(taken, naive_quotas(sizes, weights, wanted)):
            assert abs(got - ideal) <= 1 + 1e-6
    assert mix.quotas([100, 100], [1, 0], 150) == [100, 0]


def test_mix_by_weight_is_deterministic_and_reads_back(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    sets = [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c/data.jsonl")]
    ours = {}
    for k, (path, n) in enumerate(zip(sets, (40, 10, 30))):
        own = a_set(tmp_path / path, n, 100 * k, "abc"[k], as_paths=k == 2)
        ours |= {(r.source, r.problem): r for r in own}
    ask = [*sets, "--weights", "2", "1", "1", "--limit", "36", "--out"]
    for name, seed in (("one", "0"), ("two", "0"), ("three", "7")):
        mix.main([*ask, str(tmp_path / name), "--seed", seed])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[2:5]] == [["18", "40"], ["9", "10"], ["9", "30"]]
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    records, problems = data.read(tmp_path / "one")
    assert len(records) == 36 and not problems  # no id twice, though all sets count from 0
    for r in records:
        own = ours[r.source, r.problem]
        assert (r.answer, r.images) == (own.answer, own.images)
    mix.main([*sets, "--out", str(tmp_path / "all")])
    assert len(data.read(tmp_path / "all")[0]) == 80
    with pytest.raises(SystemExit, match="3 numbers are needed"):
        mix.main([*sets, "--weights", "1", "--out", str(tmp_path / "no")])


def test_mix_leaves_out_copies_and_what_is_in_the_tests(tmp_path, capsys):
    rng = random.Random(0)
    first = a_set(tmp_path / "a", 24, 0, "a")
    second = a_set(tmp_path / "b", 24, 500, "b")
    tests = a_set(tmp_path / "tests", 12, 900, "t")

    def copy(r, k):
        text = one_word_changed(r.problem, rng)
        return Record(f"copy{k}", text, r.answer, [mutate(r.images[0], rng)], "b")

    copies = [copy(r, k) for k, r in enumerate([*first[:5], *tests[:3]])]
    data.write_parquet(tmp_path / "b", [*second, *copies])
    sets = [str(tmp_path / "a"), str(tmp_path / "b")]
    out = tmp_path / "mixed"
    mix.main([*sets, "--dedup", "--against", str(tmp_path / "tests"), "--out", str(out)])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["24", "24", "0", "0", sets[0]] in said and ["24", "24", "5", "3", sets[1]] in said
    assert not [r.id for r in data.read(out)[0] if "copy" in r.id]
    mix.main([*sets, "--dedup", "--out", str(out)])
    ids = {r.id for r in data.read(out)[0]}
    assert {i for i in ids if i.startswith("copy")} == {"copy5", "copy6", "copy7"}


def test_select_keeps_a_range_of_pass_rates(tmp_path, capsys):
    problems = tmp_path / "problems"
    ours = {r.id: r for r in a_set(problems, 9, 0, "a")}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dict(data=str(problems), samples=8)))
    with open(run / "responses.jsonl", "w") as f:
        for i in range(9):  # problem i is right i times of 8
            for k in range(8):
                f.write(json.dumps(dict(id=str(i), sample=k, right=k < i)) + "\n")
        f.write(json.dumps(dict(id="0", sample=8, right=True, resampled=True)) + "\n")
    select.main([str(run), "--min", "0.125", "--max", "0.5", "--out", str(tmp_path / "kept")])
    said = capsys.readouterr().out
    assert "9 problems with answers: 1 never right, 1 always right" in said
    assert "4 with a pass rate of 0.125 to 0.5" in said
    kept, wrong = data.read(tmp_path / "kept")
    assert [r.id for r in kept] == ["1", "2", "3", "4"] and not wrong
    assert all(r == ours[r.id] for r in kept)


def test_select_tells_what_does_not_fit(tmp_path):
    a_set(tmp_path / "problems", 3, 0, "a")
    run = tmp_path / "run"
    run.mkdir()
    ask = [str(run), "--out", str(tmp_path / "kept")]
    with pytest.raises(SystemExit, match="config.json"):
        select.main(ask)
    (run / "config.json").write_text('{"data": "", "bench": "mathvista"}')
    with pytest.raises(SystemExit, match="not a run of eval.py with --data"):
        select.main(ask)
    (run / "config.json").write_text(json.dumps(dict(data=str(tmp_path / "problems"))))
    (run / "responses.jsonl").write_text('{"id": "gone", "right": true}\n')
    (tmp_path / "kept").write_text("of an earlier run")
    with pytest.raises(SystemExit, match="1 answered ids are not there, as gone"):
        select.main(ask)
    assert (tmp_path / "kept").read_text() == "of an earlier run"
    (run / "responses.jsonl").write_text('{"id": "0", "right": true}\n{"id": "1"}\n')
    with pytest.raises(SystemExit, match=r"responses.jsonl:2: no line of eval.py"):
        select.main(ask)


@pytest.mark.parametrize(
    "words", [["select", __file__, "--out", "x"], ["compare", "a", "b"], ["agree", "a"]]
)
def test_a_wrong_path_is_one_plain_line(words):
    command = [sys.executable, "-m", f"tools.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: .+: (No such file|Not a) ", line) and done.returncode == 1
