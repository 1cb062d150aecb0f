"""Every layout of rows that people of the field have on disk gives records, and trains for a step.

The files are made here, after the projects' own code: small, with their names and quirks.
"""

import base64
import io
import json
import tarfile
import zipfile
from pathlib import Path

import conftest
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import reward
from nano import archives, data, hub
from nano.data import read

CHAIN = "<think> I add them . It is 3 . </think><answer> 3 </answer>"
LLAVA_COT = (
    "<SUMMARY> I will count. </SUMMARY><CAPTION> Three dots. </CAPTION>"
    "<REASONING> One, two, three. </REASONING><CONCLUSION> 3 </CONCLUSION>"
)
MULBERRY = "### Rationales:\nThere are three.\n\n### The final answer is: B"


def png(size=(56, 56), color=(200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def user(text):
    return {"role": "user", "content": text}


def human(text, *answers):
    return [{"from": "human", "value": text}] + [{"from": "gpt", "value": a} for a in answers]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def as_json(path, *rows):
    path.write_text(json.dumps(rows, indent=1))


def csv_file(path, *rows):
    lines = [",".join(rows[0])] + [",".join(f'"{v}"' for v in row.values()) for row in rows]
    path.write_text("\ufeff" + "\n".join(lines) + "\n")


PNG = {"bytes": png(), "path": None}
PARTS = [{"type": "image"}, {"type": "text", "text": "How many?"}]
# name: (writer, file name, rows, expected problems of the records, answers, pictures, response?)
LAYOUTS = {
    "R1-V": (parquet, "train.parquet",
        [dict(image=PNG, problem="How many?", solution="<answer> 3 </answer>"),
         dict(image=PNG, problem="How many?", solution=CHAIN)],
        ["<image>How many?"] * 2, ["3", "3"], [1, 1], [False, True]),
    "R1-V as JSON": (as_json, "train.json",
        [dict(image="p.png", problem="How many?", solution="<answer> 3 </answer>")],
        ["<image>How many?"], ["3"], [1], [False]),
    "VLM-R1": (jsonl, "rec.jsonl",
        [dict(id=1, image="p.png", conversations=human("<image>How many?", "3")),
         dict(id=2, image=["p.png", "q.png"], conversations=human("<image><image>Same?", "no"))],
        ["<image>How many?", "<image><image>Same?"], ["3", "no"], [1, 2], [False, False]),
    "ms-swift GRPO": (jsonl, "swift.jsonl",
        [dict(messages=[dict(role="system", content="Think."), user("<image>How many?")],
              images=["p.png"], solution="<answer>3</answer>"),
         dict(messages=[user("<image>How many?"), dict(role="assistant", content=CHAIN)],
              images=["p.png"], solution="$3$"),
         dict(messages=[user("1 + 2")], images=[], solution="3")],
        ["<image>How many?", "<image>How many?", "1 + 2"], ["3", "$3$", "3"], [1, 1, 0],
        [False, True, False]),
    "TRL": (parquet, "trl.parquet",
        [dict(prompt=[dict(role="user", content=PARTS)], image=PNG, solution=CHAIN)],
        ["<image>How many?"], ["3"], [1], [True]),
    "TRL with images and answer": (jsonl, "trl.jsonl",
        [dict(prompt=[user([*PARTS, {"type": "image"}])], images=["p.png", "q.png"], answer="3")],
        ["<image>How many?<image>"], ["3"], [2], [False]),
    "MM-EUREKA, OpenRLHF-M": (jsonl, "eureka.jsonl",
        [dict(id="7", answer="$3$", message=json.dumps([
            dict(role="system", content="Think."),
            user([{"type": "image", "image": "file://FOLDER/p.png"}, PARTS[1]])]))],
        ["<image>How many?"], ["$3$"], [1], [False]),
    "EasyR1": (parquet, "easy.parquet",
        [dict(images=[PNG], problem="<image>How many?", answer="3")],
        ["<image>How many?"], ["3"], [1], [False]),
    "EasyR1 with paths": (jsonl, "easy.jsonl",
        [dict(images=["root/r.png"], question="<image>How many?", answer="3")],
        ["<image>How many?"], ["3"], [1], [False]),
    "verl": (parquet, "verl.parquet",
        [dict(data_source="geo3k", prompt=[user("<image>How many?")], images=[PNG],
              ability="math", reward_model=dict(style="rule", ground_truth="3"),
              extra_info=dict(split="train", index=0, answer="three", question="How many?"))],
        ["<image>How many?"], ["3"], [1], [False]),
    "VisualThinker": (as_json, "sat.json",
        [dict(messages=[user("<image> Answer in natural language. Which? Choose between the "
                             "following options: cup, box or pen"),
                        dict(role="assistant", content="box")], images=["p.png"])],
        ["<image> Answer in natural language. Which? Choose between the following options: "
         "cup, box or pen"], ["box"], [1], [False]),
    "SAT": (parquet, "SAT_train.parquet",
        [dict(image_bytes=[png()], question="Which?", answers=["cup", "box"],
              correct_answer="box", question_type="other"),
         dict(image_bytes=[png(), png()], question="Turned?", answers=["left", "right"],
              correct_answer="left", question_type="action")],
        ["<image>Which?\nChoices:\n(A) cup\n(B) box",
         "<image><image>Turned?\nChoices:\n(A) left\n(B) right"], ["box", "left"], [1, 2],
        [False, False]),
    "LLaVA-CoT-100k": (jsonl, "train.jsonl",
        [dict(id="a", image="p.png", conversations=human("How many?", LLAVA_COT)),
         dict(id="b", image="p.png", conversations=[
             *human("How many?", LLAVA_COT),
             *human("And red?", LLAVA_COT.replace(" 3 ", " 2 "))])],
        ["<image>How many?", "<image>How many?", "<image>And red?"], ["3", "3", "2"], [1, 1, 1],
        [True, True, True]),
    "Mulberry-SFT": (as_json, "mulberry_sft.json",
        [dict(messages=[user("<image>\nWhich?"), dict(role="assistant", content=MULBERRY)],
              images=["p.png"]),
         dict(conversations=human("<image>\nWhich?", MULBERRY), images="p.png")],
        ["<image>\nWhich?"] * 2, ["B", "B"], [1, 1], [True, True]),
    "Vision-R1-cold": (as_json, "vision_r1_llava_cot_full.json",
        [dict(id="c", image="p.png", conversations=human(
            "<image>How many?", "<think>three</think>\n<answer>Final Answer:3</answer>"))],
        ["<image>How many?"], ["3"], [1], [True]),
    "CSV": (csv_file, "table.csv",
        [dict(image="p.png", question="Which, and why?", options="['cup', 'box']", answer="B"),
         dict(image=base64.b64encode(png()).decode(), question="Red?", options="", answer="yes"),
         dict(image="", question="1 + 2", options="", answer="3")],
        ["<image>Which, and why?\nChoices:\n(A) cup\n(B) box", "<image>Red?", "1 + 2"],
        ["B", "yes", "3"], [1, 1, 0], [False] * 3),
    "a JSON object": (lambda path, *rows: path.write_text(json.dumps({"data": rows, "v": 1})),
        "object.json",
        [dict(image="data:image/png;base64," + base64.b64encode(png()).decode(),
              question="Red?", answer="yes")],
        ["<image>Red?"], ["yes"], [1], [False]),
    "a JSON object on many lines": (
        lambda path, *rows: path.write_text(json.dumps({"v": 1, "data": rows}, indent=2)),
        "object.json", [dict(image="", question="1 + 2", answer=3)], ["1 + 2"], ["3"], [0],
        [False]),
}  # fmt: skip


def made(folder: Path, name: str) -> Path:
    """The file of a layout, with its pictures beside it and in a root of their own."""
    write, file, rows, *_ = LAYOUTS[name]
    (folder / "elsewhere/root").mkdir(parents=True, exist_ok=True)
    for picture in ("p.png", "q.png", "elsewhere/root/r.png"):
        (folder / picture).write_bytes(png())
    if write is not parquet:
        rows = json.loads(json.dumps(rows).replace("FOLDER", str(folder)))
    path = folder / name.replace(" ", "-").replace(",", "") / file
    path.parent.mkdir(exist_ok=True)
    write(path, *rows)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path, name):
    *_, asked, answers, pictures, chains = LAYOUTS[name]
    path = made(tmp_path, name)
    records, problems = read(path, image_root=f"{tmp_path / 'elsewhere'},{tmp_path}")
    assert {p.kind for p in problems} <= {"several exchanges"}, problems.summary()
    assert [r.problem for r in records] == asked
    assert [r.answer for r in records] == answers
    assert [len(r.images) for r in records] == pictures
    assert [r.response is not None for r in records] == chains
    assert all(r.place[0] == str(path) and r.place[1] for r in records)
    for record in records:
        assert [data.load_image(image).size for image in record.images] == [(56, 56)] * len(
            record.images
        )
        if record.response:
            assert record.response.strip().startswith(("<think>", "<SUMMARY>", "###"))
    if name.startswith(("ms-swift", "MM-EUREKA")):
        assert records[0].system == "Think."


def test_each_stage_runs_over_all_layouts(tmp_path, tiny):
    """One step over a list of all of them, and an evaluation."""
    import eval
    import grpo
    import sft

    files = ",".join(str(made(tmp_path, name)) for name in LAYOUTS)
    root = f"{tmp_path / 'elsewhere'},{tmp_path}"
    count = sum(len(LAYOUTS[name][3]) for name in LAYOUTS)
    common = dict(model=tiny, data=files, image_root=root, preflight=False)
    common |= dict(activation_checkpointing=False)
    conftest.alone(
        grpo, out=tmp_path / "g", stages="4x2x1", questions=count, minibatches=1, **common
    )
    (row,) = conftest.log_of(tmp_path / "g")
    assert row["tokens"] > 0
    conftest.alone(
        sft, out=tmp_path / "s", epochs=1, batch_size=16, workers=0, micro_tokens=4096, **common
    )
    rows = conftest.log_of(tmp_path / "s")
    flags = dict(model=tiny, data=files, image_root=root, out=tmp_path / "e", max_len=2)
    conftest.alone(eval, split="train", **flags)
    assert len((tmp_path / "e/responses.jsonl").read_text().splitlines()) == count
    chains = sum(sum(LAYOUTS[name][6]) for name in LAYOUTS)
    assert len(rows) == -(-chains // 16) and all(row["left_out"] == 0 for row in rows)


def test_several_exchanges_are_reported(tmp_path):
    records, problems = read(made(tmp_path, "LLaVA-CoT-100k"), image_root=str(tmp_path))
    (problem,) = problems
    assert (problem.kind, problem.line, problem.id) == ("several exchanges", 2, "b")
    assert [r.id for r in records] == ["a", "b", "b-turn2"]


def test_video_rows_are_refused_and_counted(tmp_path):
    jsonl(
        tmp_path / "v.jsonl",
        dict(video="a.mp4", problem="What?", answer="3"),
        dict(problem="<video>What?", answer="3"),
        dict(messages=[user([{"type": "video", "video": "a.mp4"}])], answer="3"),
        dict(messages=[user("<video> What?")], videos=["a.mp4"], solution="3"),
        dict(problem="1 + 2", answer="3"),
    )
    records, problems = read(tmp_path / "v.jsonl")
    assert len(records) == 1 and [p.line for p in problems] == [1, 2, 3, 4]
    assert "4 x video" in problems.summary()


# ---- marks and pictures


def test_numbered_marks_are_image_marks(tmp_path):
    for name, size in (("a.png", (56, 28)), ("b.png", (28, 56))):
        (tmp_path / name).write_bytes(png(size))
    both = ["a.png", "b.png"]
    jsonl(
        tmp_path / "x.jsonl",
        dict(problem="In <image1> and <image2>: why?", images=both, answer="3"),
        dict(problem="Is <image 2> in <image 1>, not <image 2> ?", images=both, answer="3"),
        dict(problem="Like <image1> or <image2> ?", images=["a.png"], answer="3"),
        dict(problem="<image3>", images=both, answer="3"),
    )
    records, problems = read(tmp_path / "x.jsonl")
    assert [r.problem for r in records] == [
        "In <image> and <image>: why?",
        "Is <image> in <image>, not image 2 ?",
        "Like <image> or image 2 ?",
    ]
    sizes = [[data.load_image(image).size for image in r.images] for r in records]
    assert sizes == [[(56, 28), (28, 56)], [(28, 56), (56, 28)], [(56, 28)]]
    assert [p.kind for p in problems] == ["image marks"]


def test_an_empty_picture_column_is_a_text_row(tmp_path):
    jsonl(
        tmp_path / "x.jsonl", *(dict(problem="1 + 2", answer="3", image=i) for i in ("", None, []))
    )
    records, _ = read(tmp_path / "x.jsonl", strict=True)
    assert [r.images for r in records] == [[], [], []]


def test_pictures_in_archives_and_below_a_root(tmp_path):
    """A zip beside the file, a tar and a zip in parts below a root, and a plain folder there."""
    root = tmp_path / "pictures"
    (root / "plain/a/1").mkdir(parents=True)
    (root / "plain/a/1/img.png").write_bytes(png((28, 56)))
    with zipfile.ZipFile(tmp_path / "beside.zip", "w") as z:
        z.writestr("deep/z.png", png((56, 28)))
    with tarfile.open(root / "mulberry_images.tar", "w") as tar:
        for number, size in ((2, (84, 56)), (3, (112, 56))):
            info = tarfile.TarInfo(f"mulberry_images/a/{number}/img.png")
            info.size = len(png(size))
            tar.addfile(info, io.BytesIO(png(size)))
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as z:
        z.writestr("image/chartqa/c.png", png((56, 84)))
        z.writestr("image/other/img.png", png((56, 84)))
    for k in range(0, len(whole.getvalue()), 100):
        letters = chr(97 + k // 2600) + chr(97 + k // 100 % 26)
        (root / f"image.zip.part-{letters}").write_bytes(whole.getvalue()[k : k + 100])
    names = ["z.png", "a/1/img.png", "x/a/2/img.png", "x/a/3/img.png", "cot/chartqa/c.png"]
    jsonl(tmp_path / "x.jsonl", *(dict(problem="?", answer="3", image=name) for name in names))
    records, problems = read(tmp_path / "x.jsonl", image_root=str(root))
    assert not problems, problems.summary()
    sizes = [data.load_image(r.images[0]).size for r in records]
    assert sizes == [(56, 28), (28, 56), (84, 56), (112, 56), (56, 84)]
    _, problems = read(tmp_path / "x.jsonl")
    assert [p.kind for p in problems] == ["missing image"] * 4


def test_where_the_pictures_of_vision_r1_cold_are(tmp_path):
    for source, repo in (
        ("llava_cot", "Xkev/LLaVA-CoT-100k"),
        ("mulberry", "HuanjinYao/Mulberry-SFT"),
    ):
        path = tmp_path / f"vision_r1_{source}_full.json"
        as_json(path, dict(image="none.png", conversations=human("<image>?", CHAIN)))
        _, (problem,) = read(path)
        assert f"hf download {repo} --repo-type dataset" in str(problem)
        assert "--image_root" in str(problem)


# ---- options


def holds(problem, choices, answer="B"):
    return data.with_options(problem, choices, answer) == problem


def test_options_are_written_below_unless_the_text_holds_them():
    numbers = ["5", "6"]
    asked = "A side is 5 and another 6 long. How many?"
    assert data.with_options(asked, numbers, "A") == f"{asked}\nChoices:\n(A) 5\n(B) 6"
    assert data.with_options(asked, numbers, "6").endswith("(B) 6")
    for text in ("(A) 5\n(B) 6", "A. 5\nB. 6", "A: 5 ; B: 6", "Options: A) 5, B) 6", "A 5 B 6"):
        assert holds(f"{asked} {text}", numbers), text
    assert holds("Is it 5 or 6?", numbers, "6") and not holds("Is it 5 or 6?", numbers, "B")
    assert holds("Choose: red, dark  blue, or green", ["red", "dark blue", "green"], "red")
    assert not holds("Letters P, R, I", ["P", "R", "I"], "B")
    assert not holds("A. 50\nB. 60", numbers)
    assert holds("Which one in the picture?", ["A", "B", "C"], "C")  # They stand in the picture.
    assert data.with_options("?", None, "3") == data.with_options("?", [], "3") == "?"
    once = data.with_options("?", ["$\\frac{1}{2}$", "a\nb", "(B) c"], "A")
    assert data.with_options(once, ["$\\frac{1}{2}$", "a\nb", "(B) c"], "A") == once


def test_options_in_any_form(tmp_path):
    base = dict(question="?", answer="B")
    rows = [base | dict(options={"A": "cup", "B": "box"}), base | dict(A="cup", B="box")]
    rows += [base | dict(choices=["A. cup", "B. box"]), base | dict(options='["cup", "box"]')]
    jsonl(tmp_path / "x.jsonl", *rows)
    records, _ = read(tmp_path / "x.jsonl", strict=True)
    assert all(r.choices == ["cup", "box"] for r in records)
    assert {r.problem for r in records} == {"?\nChoices:\n(A) cup\n(B) box"}
    # DocVQA: all of its answers are right, and none of them may be given away.
    jsonl(tmp_path / "x.jsonl", dict(question="?", answers=["3", "three"]))
    ((record,), _) = read(tmp_path / "x.jsonl")
    assert (record.problem, record.answer, record.choices) == ("?", "3", None)


def test_every_question_says_its_options_and_one_letter_earns_what_chance_gives(real):
    """On the real problems, through the reward."""
    earned, expected, count = dict.fromkeys("ABCDE", 0), dict.fromkeys("ABCDE", 0), 0
    for folder in sorted(real.glob("*/data.jsonl")):
        for record in read(folder, check_images=False)[0]:
            if not record.choices:
                continue
            bare = record.choices == [chr(65 + k) for k in range(len(record.choices))]
            assert bare or all(choice in record.problem for choice in record.choices)
            count += 1
            for k, letter in enumerate(earned):
                expected[letter] += (k < len(record.choices)) / len(record.choices)
                completion = f"<think>.</think><answer>{letter}</answer>"
                earned[letter] += reward.score(completion, record.answer, record.choices).reward
    assert count > 500
    for letter, right in earned.items():  # Within three standard deviations of guessing.
        assert abs(right - expected[letter]) < 3 * expected[letter] ** 0.5, (earned, expected)


# ---- splits


def test_splits_of_a_folder_are_never_mixed(tmp_path):
    for name, count in (("train", 3), ("validation", 2), ("test", 1)):
        rows = [dict(problem=f"{name} {i}", answer="3") for i in range(count)]
        for part in range(count):
            parquet(tmp_path / f"{name}-{part:05d}-of-{count:05d}.parquet", rows[part])
    for split, count in (("train", 3), ("validation", 2), ("val", 0), ("test", 1), ("", 6)):
        if split == "val":
            with pytest.raises(ValueError, match="no split 'val'.*test, train, validation"):
                read(tmp_path, split=split)
            continue
        records, _ = read(tmp_path, split=split)
        assert len(records) == count
        assert all(r.problem.startswith(split) for r in records)
    (tmp_path / "plain").mkdir()
    jsonl(tmp_path / "plain/mine.jsonl", dict(problem="?", answer="3"))
    assert len(read(tmp_path / "plain", split="train")[0]) == 1
    assert len(read(tmp_path / "plain", split="test")[0]) == 1
    with pytest.raises(ValueError, match="no split 'validation'"):
        read(tmp_path / "plain", split="validation")


def test_names_of_splits():
    def chosen(split, *names):
        return data.choose(list(names), split)

    sat = ("README.md", "SAT_static.parquet", "SAT_train.parquet", "SAT_val.parquet")
    assert chosen("train", *sat) == ["SAT_train.parquet"]
    assert chosen("validation", *sat) == ["SAT_val.parquet"]
    hub_files = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    assert chosen("train", *hub_files, "data/test-00000-of-00001.parquet") == list(hub_files)
    assert chosen("test", "test/a.parquet", "train/a.parquet") == ["test/a.parquet"]
    assert chosen("train", "latest.jsonl", "contest.jsonl") == ["contest.jsonl", "latest.jsonl"]
    assert chosen("test", "data/test-0.parquet", "data/testmini-0.parquet") == [
        "data/test-0.parquet"
    ]
    assert chosen("held-out", *sat, "SAT_test.parquet") == ["SAT_val.parquet"]
    assert chosen("held-out", "train.parquet", "test.parquet") == ["test.parquet"]
    assert chosen("test", "data/testmini-0.parquet") == ["data/testmini-0.parquet"]


def test_rows_that_name_their_split(tmp_path):
    rows = [
        dict(problem=s, answer="3", extra_info=dict(split=s)) for s in ("train", "test", "test")
    ]
    jsonl(tmp_path / "x.jsonl", *rows)
    assert [r.problem for r in read(tmp_path / "x.jsonl", split="train")[0]] == ["train"]
    assert len(read(tmp_path / "x.jsonl", split="test")[0]) == 2
    with pytest.raises(ValueError, match="validation.*train .1 rows., test .2 rows."):
        read(tmp_path / "x.jsonl", split="validation")


# ---- odd pictures


def test_odd_pictures_are_left_out_with_their_place_in_every_stage(tmp_path, tiny):
    import grpo
    import sft
    from nano import packing

    sizes = dict(thin=(1, 5000), flat=(2000, 5), dot=(1, 1), fine=(56, 56))
    rows = []
    for name, size in sizes.items():
        (tmp_path / f"{name}.png").write_bytes(png(size))
        rows.append(dict(id=name, image=f"{name}.png", problem="?", answer="3", response=CHAIN))
    jsonl(tmp_path / "data.jsonl", *rows)
    records, problems = read(tmp_path / "data.jsonl")
    assert [(p.id, p.line) for p in problems] == [("thin", 1), ("flat", 2)]
    assert all("200 : 1" in str(p) and "data.jsonl:" in str(p) for p in problems)
    # What the processor itself refuses is as well a problem of that record alone.
    processor, problems = packing.Processor(tiny), data.Problems()

    def refuse(*args, **kwargs):
        raise TypeError("not like this")

    processor.image_processor.get_number_of_image_patches = refuse
    assert packing.usable(records, processor, 4096, problems) == []
    assert [(p.line, p.id) for p in problems] == [(3, "dot"), (4, "fine")]
    common = dict(model=tiny, data=tmp_path / "data.jsonl", preflight=False)
    conftest.alone(grpo, out=tmp_path / "g", stages="4x2x1", questions=2, minibatches=1, **common)
    conftest.alone(sft, out=tmp_path / "s", epochs=1, batch_size=4, workers=0, **common)
    (row,) = conftest.log_of(tmp_path / "s")
    assert row["left_out"] == 2


# ---- URLs


def test_pictures_at_a_url_are_fetched_once(tmp_path, monkeypatch):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = {"/p.png": png(), "/big.png": b"x" * 5000}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(archives, "MOST_BYTES", 4000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    images = [f"{url}/p.png", [f"{url}/p.png"], f"{url}/big.png", f"{url}/none.png", "http://["]
    jsonl(tmp_path / "x.jsonl", *(dict(problem="?", answer="3", image=i) for i in images))
    records, problems = read(tmp_path / "x.jsonl")
    server.shutdown()
    server.server_close()
    assert len(records) == 2 and asked.count("/p.png") == 1
    assert [(p.line, p.kind) for p in problems] == [(n, "broken image") for n in (3, 4, 5)]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    records, problems = read(tmp_path / "x.jsonl")
    assert len(records) == 2 and "HF_HUB_OFFLINE" in problems[0].detail
