"""The readers of nano/data.py: every format under shared/data, and how such files are broken."""

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nano.data import NAMES, Problems, Record, load_image, read, write_parquet

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
COLD = SHARED / "formats" / "vision_r1_cold"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the sample data (shared/data beside the checkout) is not here"
)


def png(color=(200, 30, 30), size=(8, 6), format="PNG", mode="RGB", **kw) -> bytes:
    f = io.BytesIO()
    Image.new(mode, size, color).save(f, format, **kw)
    return f.getvalue()


def jsonl(path: Path, *rows) -> Path:
    """Writes rows (dicts, or raw text for a malformed line), one a line."""
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def row(id="a", **kw):
    return {"id": id, "problem": "2 + 2 = ?", "answer": "4", **kw}


def only(problems):
    assert len(problems) == 1, problems.summary()
    return problems[0]


# ---- the real formats


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "geometry3k",
        "mathvision",
        "mathverse",
        "mathvista",
        "dynamath",
        "tabmwp",
        "chartqa_owid",
        "puzzlevqa",
        "algopuzzlevqa",
        "scemqa_math",
        "gaokao_mm_math",
    ],
)
def test_our_jsonl(name):
    file = SHARED / name / "data.jsonl"
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    records, problems = read(file, strict=True)
    assert len(problems) == 0 and problems.summary() == ""
    assert [r.id for r in records] == [r["id"] for r in rows]
    for r, raw in zip(records, rows):
        assert r.problem.startswith(raw["problem"])  # The options may stand below it.
        assert r.answer == raw["answer"].strip() and r.source == raw["source"]
        assert r.choices == raw["choices"] and r.response is None
        assert r.problem.count("<image>") == len(r.images) == 1 and Path(r.images[0]).is_file()
    assert load_image(records[0].images[0]).mode == "RGB"
    assert read(SHARED / name)[0] == records  # the folder holds the same


@needs_shared
def test_vision_r1_rl_parquet():
    records, problems = read(SHARED / "formats/vision_r1_rl/train.parquet", strict=True)
    raw = pq.read_table(SHARED / "formats/vision_r1_rl/train.parquet").to_pylist()
    assert len(records) == 120 and len(problems) == 0
    for r, x in zip(records, raw):
        assert (r.problem, r.answer, r.images) == (
            x["problem"],
            x["answer"],
            [i["bytes"] for i in x["images"]],
        )
    assert records[0].id == "train-1" and len({r.id for r in records}) == 120
    assert (
        load_image(records[0].images[0]).size == Image.open(io.BytesIO(records[0].images[0])).size
    )


@needs_shared
def test_folders_and_lists_of_paths():
    rl, hub = SHARED / "formats/vision_r1_rl", SHARED / "geometry3k/hf_parquet"
    assert len(read(rl)[0]) == 140 and len(read(hub)[0]) == 30  # hub: data/*.parquet, three splits
    both, problems = read(f"{rl / 'test.parquet'}, {hub},")
    assert len(both) == 50 and len({r.id for r in both}) == 50 and len(problems) == 0


@needs_shared
def test_cold_mulberry():
    records, problems = read(COLD / "vision_r1_mulberry_sft_full.json", strict=True)
    assert [r.answer for r in records] == list("BBDDBB")  # "Final Answer:" is gone
    assert all(
        r.response.startswith("<think>") and r.response.endswith("</answer>") for r in records
    )
    assert (
        "<answer>Final Answer:B</answer>" in records[0].response
    )  # the text to train on is left as it is
    assert (
        records[0].problem.startswith("<image>\nQuestion: Find x.")
        and records[0].id == "vision_r1_mulberry_sft_full-1"
    )
    assert all(Path(r.images[0]).is_file() for r in records) and len(problems) == 0


@needs_shared
def test_cold_llava_has_several_exchanges():
    """Each question about the picture becomes a record, and the conversation is reported."""
    records, problems = read(COLD / "vision_r1_llava_cot_full.json")
    assert [r.answer for r in records] == ["5.32", "16.55", "Myanmar", "Zambia", "No", "Finland"]
    assert records[1].id == "chartqa-00339007006077-hsc223-turn2"
    assert (
        records[1].problem == "<image>What's the sum of all values above 5?"
        and "16.55" in records[1].response
    )
    assert all(len(r.images) == 1 for r in records)
    assert [p.kind for p in problems] == ["several exchanges"] * 3
    with pytest.raises(ValueError, match="several exchanges"):
        read(COLD / "vision_r1_llava_cot_full.json", strict=True)


@needs_shared
def test_cold_folder_takes_both_files_and_not_their_configuration():
    assert len(read(COLD)[0]) == 12


BENCHMARKS = {
    "mathvista/data/testmini-00000-of-00001.parquet": 45,
    "mathverse/testmini.parquet": 40,
    "mathvision/data/test-00000-of-00001.parquet": 16,
    "dynamath/data/sample1-00000-of-00001.parquet": 16,
    "chartqa/data/test-00000-of-00001.parquet": 10,
    "vlmevalkit/MathVista_MINI.sample.tsv": 12,
}


@needs_shared
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_files_give_every_row_with_its_picture(name):
    records, problems = read(SHARED / "formats" / name, strict=True)
    assert len(records) == BENCHMARKS[name] and not problems
    for r in records:
        assert (
            r.answer
            and len(r.images) == r.problem.count("<image>") == 1
            and load_image(r.images[0]).width > 10
        )
        assert all(c in r.problem for c in r.choices or [])


@needs_shared
def test_benchmark_rows_mean_what_they_say():
    by_id = (
        {r.id: r for r in read(SHARED / "formats/mathvista")[0]}
        if (SHARED / "formats/mathvista").is_dir()
        else {}
    )
    assert by_id["3"].answer == "145°" and by_id["3"].problem.endswith(
        "(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°"
    )
    chart = read(SHARED / "formats/chartqa/data")[0][0]
    assert chart.answer == "8.87" and chart.problem == "<image>What is the value of South Sudan?"


def test_unknown_parquet_columns_are_named(tmp_path):
    pq.write_table(pa.table({"picture": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match="x.parquet: unknown fields picture, text.*images, problem, answer"
    ):
        read(tmp_path / "x.parquet")


# ---- small differences between files


def test_marks_are_added_in_front_and_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "d/images").mkdir(parents=True)
    (tmp_path / "d/images/a.png").write_bytes(png())
    jsonl(
        tmp_path / "d/x.txt",
        row(image="images/a.png"),
        row("b", images=["images/a.png"] * 2),
        row("c", image=None),
        row("d", images="images/a.png", problem="one <image> in the middle"),
        row("e", images=[str(tmp_path / "d/images/a.png")]),
    )
    monkeypatch.chdir(tmp_path)
    records, problems = read("d/x.txt", strict=True)  # JSONL whatever its name
    assert [r.problem for r in records] == [
        "<image>2 + 2 = ?",
        "<image><image>2 + 2 = ?",
        "2 + 2 = ?",
        "one <image> in the middle",
        "<image>2 + 2 = ?",
    ]
    assert [len(r.images) for r in records] == [1, 2, 0, 1, 1] and records[0].images == [
        str(Path("d/images/a.png"))
    ]


def test_openai_style_messages_and_jsonl_of_conversations(tmp_path):
    turns = [
        {"role": "user", "content": "2 + 2 = ?"},
        {
            "role": "assistant",
            "content": "<think>is it <answer>5</answer>?</think>"
            "<answer> final answer: 4\n</answer>",
        },
    ]
    (record,), problems = read(
        jsonl(tmp_path / "a", {"messages": turns, "source": "mine"}), strict=True
    )
    assert (record.problem, record.answer, record.source, record.id, record.images) == (
        "2 + 2 = ?",
        "4",
        "mine",
        "a-1",
        [],
    )
    assert record.response == turns[1]["content"]


def test_numbers_byte_order_mark_blank_lines_and_windows_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id": 7, "problem": "p", "answer": 80}\r\n\r\n'
        b'{"problem": "line\xe2\x80\xa8separator", "answer": 5.75, "choices": [1, "x"]}'
    )
    records, problems = read(tmp_path / "a.jsonl", strict=True)
    assert [(r.id, r.answer, r.choices) for r in records] == [
        ("7", "80", None),
        ("a-3", "5.75", ["1", "x"]),
    ]
    assert records[1].problem == "line\u2028separator\nChoices:\n(A) 1\n(B) x"


def test_parquet_with_one_image_column_and_paths(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    pq.write_table(
        pa.table(
            {
                "image": [
                    {"bytes": None, "path": "p.png"},
                    {"bytes": png(), "path": "elsewhere.png"},
                    None,
                ],
                "problem": ["a", "b", "c"],
                "answer": [1.0, 2.5, 3.0],
            }
        ),
        tmp_path / "x",
    )
    records, _ = read(tmp_path / "x", strict=True)
    assert [r.images for r in records] == [[str(tmp_path / "p.png")], [png()], []]
    assert [r.answer for r in records] == ["1", "2.5", "3"]


def test_row_numbers_run_on_across_row_groups(tmp_path):
    answers = [str(i) for i in range(1000)]
    answers[777] = None
    pq.write_table(
        pa.table({"problem": answers[:777] + ["p"] * 223, "answer": answers}),
        tmp_path / "x.parquet",
        row_group_size=100,
    )
    records, problems = read(tmp_path / "x.parquet")
    assert len(records) == 999 and only(problems).line == 778 and records[-1].id == "x-1000"


def test_every_name_that_data_sets_use_is_ours(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    ours = {"problem": "2 + 2 = ?", "answer": "4", "choices": ["4", "5"], "images": ["p.png"]}
    ours["id"] = "7"
    as_text = {"solution": "It is $\\boxed{3}$, no, $\\boxed{4}$.", "label": ["4"]}
    as_text |= {"answers": ["4", "four"]}
    as_text |= dict.fromkeys(NAMES["images"][1:], "p.png")
    for field in ("problem", "answer", "choices", "images", "id"):
        for other in NAMES[field]:
            plain = {"question": ours["problem"]} | {
                k: v for k, v in ours.items() if k != "problem"
            }
            plain.pop("question" if field == "problem" else field)
            outer, _, inner = other.partition(".")
            value = as_text.get(other, ours[field])
            file = jsonl(tmp_path / "x", plain | {outer: {inner: value} if inner else value})
            ((record,), _) = read(file, strict=True)
            assert record.problem == "<image>2 + 2 = ?\nChoices:\n(A) 4\n(B) 5", other
            assert (record.answer, record.choices, record.id) == ("4", ["4", "5"], "7"), other
            assert record.images == [str(tmp_path / "p.png")], other


# ---- bad rows: reported with file, line and id; the rest goes on

BAD = [
    ('{"id": "bad", "problem": "x"', "malformed line"),
    ("not json", "malformed line"),
    ("[" * 100_000, "malformed line"),
    ("[1, 2]", "wrong type"),
    ({"id": "bad", "problem": "p"}, "empty answer"),
    ({"id": "bad", "problem": "p", "answer": "  "}, "empty answer"),
    ({"id": "bad", "problem": "p", "answer": None}, "empty answer"),
    ({"id": "bad", "problem": "", "answer": "4"}, "empty problem"),
    ({"id": "bad", "answer": "4"}, "empty problem"),
    ({"id": "bad", "problem": "p", "answer": ["4"]}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": True}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": float("nan")}, "wrong type"),
    ({"id": "bad", "problem": "half a character \ud83d", "answer": "4"}, "wrong type"),
    ({"id": "bad", "problem": {"text": "p"}, "answer": "4"}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": "4", "choices": "A, B"}, "wrong type"),
    ({"id": "bad", "question": {"a": "p"}, "answer": "4", "choices": ["A", "B"]}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": "4", "response": " "}, "empty response"),
    ({"id": "bad", "problem": "p", "answer": "4", "images": [3]}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": "4", "images": [""]}, "wrong type"),
    ({"id": "bad", "problem": "p", "answer": "4", "video": "a.mp4"}, "video"),
    ({"id": "bad", "problem": "<video> p", "answer": "4"}, "video"),
    ({"id": "bad", "problem": "p", "answer": "4", "image": "none.png"}, "missing image"),
    ({"id": "bad", "problem": "p", "answer": "4", "image": "a\0b.png"}, "missing image"),
    ({"id": "bad", "problem": "p", "answer": "4", "image": "broken.png"}, "broken image"),
    ({"id": "bad", "problem": "p", "answer": "4", "image": "cut.png"}, "broken image"),
    (
        {"id": "bad", "problem": "<image> and <image>", "answer": "4", "image": "ok.png"},
        "image marks",
    ),
    ({"id": "bad", "problem": "<image>", "answer": "4"}, "image marks"),
    (
        {"id": "bad", "problem": "<image>", "answer": "4", "images": ["ok.png", "ok.png"]},
        "image marks",
    ),
    ({"id": "bad", "conversations": "hello"}, "wrong type"),
    ({"id": "bad", "conversations": []}, "empty problem"),
    ({"id": "bad", "conversations": [{"from": "human", "value": "q"}]}, "empty answer"),
    (
        {
            "id": "bad",
            "conversations": [{"from": ["x"], "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        "odd turns",
    ),
    (
        {
            "id": "bad",
            "conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}],
        },
        "odd turns",
    ),
    (
        {
            "id": "bad",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>"}],
        },
        "empty answer",
    ),
    (
        {
            "id": "bad",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "<answer>Final Answer: </answer>"},
            ],
        },
        "empty answer",
    ),
    (
        {"id": "bad", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]},
        "empty turn",
    ),
]


@pytest.mark.parametrize("bad, kind", BAD, ids=[f"{i}-{kind}" for i, (_, kind) in enumerate(BAD)])
def test_bad_rows(tmp_path, bad, kind):
    (tmp_path / "ok.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(b"<html>404</html>")
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:-30])
    file = jsonl(tmp_path / "data.jsonl", row("first"), bad, row("last"))
    records, problems = read(file)
    assert [r.id for r in records] == ["first", "last"]
    problem = only(problems)
    assert (problem.kind, problem.file, problem.line) == (kind, str(file), 2)
    assert problem.id == ("bad" if isinstance(bad, dict) else "")
    assert f"{file}:2" in problems.summary() and f"1 x {kind}" in problems.summary()
    with pytest.raises(ValueError, match=kind) as error:
        read(file, strict=True)
    assert f"{file}:2" in str(error.value)


def test_bad_parquet_rows(tmp_path):
    images = [[{"bytes": b, "path": None}] for b in (png(), b"garbage", None)] + [
        [{"bytes": png(), "path": None}]
    ]
    pq.write_table(
        pa.table({"images": images, "problem": ["p"] * 4, "answer": ["1", "2", "3", None]}),
        tmp_path / "x.parquet",
    )
    records, problems = read(tmp_path / "x.parquet")
    assert [r.answer for r in records] == ["1"]
    assert [(p.line, p.kind) for p in problems] == [
        (2, "broken image"),
        (3, "wrong type"),
        (4, "empty answer"),
    ]


def test_duplicate_ids_are_renamed_and_reported(tmp_path):
    file = jsonl(tmp_path / "data.jsonl", row("a-copy1"), row("a"), row("a"), row("a"), row("b"))
    records, problems = read(file)
    assert [r.id for r in records] == ["a-copy1", "a", "a-copy2", "a-copy3", "b"]
    assert {p.kind for p in problems} == {"duplicate id"} and [p.line for p in problems] == [3, 4]
    twice, problems = read(f"{file},{file}")  # ids are unique over all files of one call
    assert len({r.id for r in twice}) == 10


def test_made_up_ids_never_clash_and_are_no_problem(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "data.jsonl", {"problem": "p", "answer": "1"})
    records, problems = read(f"{tmp_path}/a,{tmp_path}/b")
    assert len({r.id for r in records}) == 2 and len(problems) == 0


def test_headers_are_only_read_when_asked(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    file = jsonl(tmp_path / "data.jsonl", row(image="broken.png"), row("b", image="missing.png"))
    records, problems = read(file, check_images=False)
    assert [r.id for r in records] == ["a"] and only(problems).kind == "missing image"
    with pytest.raises(ValueError, match="broken.png"):
        load_image(records[0].images[0])


def test_lfs_pointer_instead_of_a_picture(tmp_path):
    (tmp_path / "a.png").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    )
    _, problems = read(jsonl(tmp_path / "data.jsonl", row(image="a.png"), row("b")))
    assert "git-lfs pointer" in only(problems).detail


def test_summary_counts_kinds_and_shows_a_few():
    problems = Problems()
    for i in range(5):
        problems.add("empty answer", file="f.jsonl", line=i + 1, id=str(i))
    problems.add("overlong prompt", "9000 tokens", id="x")
    text = problems.summary(examples=2)
    assert (
        len(problems) == 6
        and text.startswith("6 problems")
        and "5 x empty answer" in text
        and "1 x overlong prompt" in text
    )
    assert (
        "f.jsonl:2" in text
        and "f.jsonl:3" not in text
        and "id x: overlong prompt (9000 tokens)" in text
    )
    assert Problems().summary() == ""


# ---- files that cannot be read at all


def cut_parquet(path):
    pq.write_table(pa.table({"problem": ["p" * 500] * 9, "answer": ["1"] * 9}), path)
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b" \n\n", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"<!doctype html><title>404</title>", "unknown kind of file, it begins with b'<!doctype"),
        (b"\x1f\x8b\x08\x00zipped", "unknown kind of file"),
        (b"index\timage\tquestion\n", "unknown kind of file"),
        (b'[{"problem": "p", "answer": "1"}, {"prob', "broken json of 40 bytes, half downloaded"),
        (b"[]", "no line is a JSON object"),
        (b'{\n  "problem": "p",\n  "answer": "1"\n}\n', "no line is a JSON object"),
        (b'{"step": 1, "reward": 0.5}\n', "unknown fields step, reward"),
        (b"PAR1", "broken parquet of 4 bytes, half downloaded"),
        (cut_parquet, "broken parquet of .* bytes, half downloaded"),
    ],
)
def test_files_of_no_use(tmp_path, content, message):
    file = tmp_path / "data.parquet"  # names do not count
    content(file) if callable(content) else file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nope.jsonl"):
        read(tmp_path / "nope.jsonl")
    with pytest.raises(ValueError, match="no data.jsonl"):
        read(tmp_path)
    (tmp_path / "with,comma.jsonl").write_text(json.dumps(row()))
    assert len(read(tmp_path / "with,comma.jsonl")[0]) == 1


# ---- images


def test_transparency_goes_on_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    f = io.BytesIO()
    palette.save(f, "PNG", transparency=0)
    for image in (
        f.getvalue(),
        png((0, 0, 0, 0), mode="RGBA"),
        png((0, 0), mode="LA"),
        png((0, 0, 0), transparency=(0, 0, 0)),
    ):
        assert load_image(image).mode == "RGB" and load_image(image).getpixel((1, 1)) == (
            255,
            255,
            255,
        )
    half = load_image(png((0, 0, 0, 128), mode="RGBA")).getpixel((0, 0))[0]
    assert 120 < half < 135


def test_sixteen_bit_grey_keeps_its_range():
    for dtype, format in ((np.uint16, "PNG"), (">u2", "TIFF"), (np.int32, "TIFF")):
        f = io.BytesIO()
        Image.fromarray(np.array([[0, 32896, 65535]], dtype=dtype)).save(f, format)
        assert [load_image(f.getvalue()).getpixel((x, 0)) for x in range(3)] == [
            (0,) * 3,
            (128,) * 3,
            (255,) * 3,
        ]


def test_cmyk_grey_and_black_and_white():
    red = load_image(png((0, 255, 255, 0), format="JPEG", mode="CMYK")).getpixel((0, 0))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    assert load_image(png(77, mode="L")).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(png(1, mode="1")).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "a.jpg").write_bytes(png(size=(20, 10), format="JPEG", exif=exif))
    assert load_image(str(tmp_path / "a.jpg")).size == (10, 20)
    assert load_image(png(format="JPEG", exif=b"Exif\0\0" + b"nonsense")).size == (
        8,
        6,
    )  # broken EXIF, good picture


def test_decompression_bombs_are_refused_unread(tmp_path):
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    for side in (9_000, 100_000):  # below and above Pillow's own limits
        bomb = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b"")
        )
        with pytest.raises(ValueError, match="pixels"):
            load_image(bomb)
    (tmp_path / "b.png").write_bytes(bomb)
    _, problems = read(jsonl(tmp_path / "data.jsonl", row(image="b.png"), row("b")))
    assert only(problems).kind == "broken image"


@pytest.mark.filterwarnings("ignore")  # Pillow also warns before it raises
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_pictures_raise_value_errors_that_name_them(tmp_path, format):
    noise, f = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(f, format)
    (tmp_path / "x.img").write_bytes(f.getvalue()[:-800])
    with pytest.raises(ValueError, match="x.img"):
        load_image(str(tmp_path / "x.img"))
    rng, whole = np.random.default_rng(1), bytearray(f.getvalue())
    for _ in range(30):  # damaged bytes either decode or raise ValueError, never anything else
        broken = bytearray(whole)
        for at in rng.integers(0, len(broken), 20):
            broken[at] = rng.integers(256)
        try:
            assert load_image(bytes(broken)).mode == "RGB"
        except ValueError:
            pass


# ---- writing


def some_records(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/p.png").write_bytes(png((1, 2, 3)))
    return [
        Record(
            "a/b:c",
            "<image>π = ?\nChoices:\n(A) 3\n(B) 3.14",
            "3.14",
            [png()],
            "s",
            "<think>é</think><answer>3.14</answer>",
            ["3", "3.14"],
        ),
        Record(
            "a_b_c", "<image> <image>", "x", [png(format="JPEG"), str(folder / "elsewhere/p.png")]
        ),
        Record("text", "2 + 2", "4", []),
    ]


def contents(record):
    return [Path(i).read_bytes() if isinstance(i, str) else i for i in record.images]


def test_what_is_written_reads_back(tmp_path):
    records = some_records(tmp_path)
    write_parquet(tmp_path / "out/set", records)
    back, _ = read(tmp_path / "out/set", strict=True)
    for a, b in zip(records, back, strict=True):
        same = {"images": contents(a), "place": 0}
        assert {**vars(a), **same} == {**vars(b), "images": contents(b), "place": 0}
    write_parquet(tmp_path / "out/set", back)  # and again, over itself
    assert read(tmp_path / "out/set", strict=True)[0] == back
    assert not list((tmp_path / "out").glob("*.part"))


def test_parquet_has_the_columns_of_vision_r1_rl(tmp_path):
    write_parquet(tmp_path / "x.parquet", some_records(tmp_path))
    schema = pq.read_schema(tmp_path / "x.parquet")
    assert schema.names[:3] == ["images", "problem", "answer"] and {"id", "source"} <= set(
        schema.names
    )
    assert str(schema.field("images").type) == "list<element: struct<bytes: binary, path: string>>"
