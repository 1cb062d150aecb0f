"""Names on the hub, against a small server of the hub's own protocol, and without any network."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import conftest
import pytest
from huggingface_hub import constants
from test_layouts import CHAIN, human, jsonl, parquet, png

from nano import hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a repository's state, its files, and their bytes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        words = unquote(urlparse(self.path).path).strip("/").split("/")
        api = words[:1] == ["api"]
        words = words[1:] if api else words
        kind = words.pop(0) if words[0] in ("datasets", "models") else "models"
        name, rest = "/".join(words[:2]), words[2:]
        folder = self.server.root / kind / name
        if not folder.is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        if api:
            rows = [
                dict(rfilename=str(f.relative_to(folder)), size=f.stat().st_size) for f in files
            ]
            if rest[:1] == ["tree"]:
                rows = [
                    dict(type="file", path=r["rfilename"], size=r["size"], oid=SHA) for r in rows
                ]
                return self.reply(200, json.dumps(rows).encode())
            return self.reply(200, json.dumps(dict(id=name, sha=SHA, siblings=rows)).encode())
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.got.append(f"{name}/{file.relative_to(folder)}")
        body = file.read_bytes()
        tag = hashlib.sha256(body).hexdigest()
        self.reply(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def reply(self, status, body=b"", headers=()):
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def remote(tmp_path_factory, tiny):
    """The folder of what the hub has: the real names with a tiny model and a few rows."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2-VL-2B"):
        shutil.copytree(tiny, root / "models" / name)
    (root / "models/Qwen/Qwen2-VL-2B/pytorch_model.bin").write_bytes(b"not needed")
    rl, sat, cold, llava, mulberry = (
        root / "datasets" / name
        for name in ("Osilly/Vision-R1-rl", "array/SAT", "Osilly/Vision-R1-cold",
                     "Xkev/LLaVA-CoT-100k", "HuanjinYao/Mulberry-SFT")
    )  # fmt: skip
    for folder in (rl, sat, cold, llava, mulberry):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("a data set")
    picture = {"bytes": png(), "path": None}
    parquet(
        rl / "train.parquet",
        *(dict(images=[picture], problem=f"{i}?", answer="3") for i in range(4)),
    )
    parquet(rl / "test.parquet", dict(images=[picture], problem="test?", answer="3"))
    row = dict(image_bytes=[png()], question="Which?", answers=["cup", "box"], correct_answer="box")
    for split in ("train", "val", "test"):
        parquet(sat / f"SAT_{split}.parquet", *[row | dict(question=f"{split}?")] * 3)
    for source in ("llava_cot", "mulberry"):
        rows = [
            dict(image=f"{source}_images/a/{i}.png", conversations=human("<image>?", CHAIN))
            for i in (1, 2)
        ]
        (cold / f"vision_r1_{source}_full.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(root / "whole.zip", "w") as z:
        for i in (1, 2):
            z.writestr(f"images/a/{i}.png", png())
    whole = (root / "whole.zip").read_bytes()
    (llava / "image.zip.part-aa").write_bytes(whole[:150])
    (llava / "image.zip.part-ab").write_bytes(whole[150:])
    with tarfile.open(mulberry / "mulberry_images.tar", "w") as tar:
        for i in (1, 2):
            info = tarfile.TarInfo(f"mulberry_images/a/{i}.png")
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    return root


@pytest.fixture(scope="module")
def server(remote):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.got = remote, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def python(code, home, server=None, **more):
    """Runs this code as on a machine with the network (a server) or without one."""
    port = server.server_port if server else 9
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    env |= {"HF_HUB_OFFLINE": "0" if server else "1", "HF_HUB_DISABLE_XET": "1"} | more
    call = [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, *code]
    done = subprocess.run(
        call, env=env, capture_output=True, text=True, cwd=conftest.ROOT, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


READ = """
from nano import data, hub
print(hub.model("Qwen/Qwen2-VL-2B"), hub.model("Qwen/Qwen2.5-VL-7B-Instruct"))
for name, split in (("Osilly/Vision-R1-rl", "train"), ("array/SAT", "validation"),
                    ("array/SAT", "train"), ("Osilly/Vision-R1-cold", "train")):
    records, problems = data.read(name, split=split)
    print(name, len(records), [len(r.images) for r in records], problems.summary())
"""


@pytest.fixture(scope="module")
def home(server, tmp_path_factory):
    """A cache (HF_HOME) that was filled through the network, and what was said on the way."""
    home = tmp_path_factory.mktemp("home")
    server.got.clear()
    status, said = python(READ, home, server)
    assert status == 0, said
    (home / "said").write_text(said)
    return home


def test_only_what_is_needed_is_fetched_and_only_once(server, home):
    said, got = (home / "said").read_text(), sorted(server.got)
    assert "from the hub: Qwen/Qwen2-VL-2B, 7 files, 0.0" in said
    assert "from the hub: Osilly/Vision-R1-rl, 1 files" in said
    read = ("Vision-R1-rl 4 [1, 1, 1, 1] ", "SAT 3 [1, 1, 1] ", "Vision-R1-cold 4 [1, 1, 1, 1] ")
    assert all(f"{line}\n" in said for line in read)
    assert [f for f in got if f.startswith(("Osilly", "array", "Xkev", "Huanjin"))] == [
        "HuanjinYao/Mulberry-SFT/mulberry_images.tar",
        "Osilly/Vision-R1-cold/vision_r1_llava_cot_full.json",
        "Osilly/Vision-R1-cold/vision_r1_mulberry_full.json",
        "Osilly/Vision-R1-rl/train.parquet",
        "Xkev/LLaVA-CoT-100k/image.zip.part-aa",
        "Xkev/LLaVA-CoT-100k/image.zip.part-ab",
        "array/SAT/SAT_train.parquet",
        "array/SAT/SAT_val.parquet",
    ]
    assert not any("pytorch_model" in f for f in got)
    server.got.clear()
    status, again = python(READ, home)  # Without a network, the cache has it all.
    assert status == 0 and "from the hub" not in again and not server.got
    assert all(f"{line}\n" in again for line in read)


def test_names_that_the_hub_does_not_know(server, tmp_path):
    code = "from nano import data; data.read('No/such-set')"
    status, said = python(code, tmp_path, server)
    assert status == 1 and "hf download No/such-set --repo-type dataset" in said
    code = "from nano import data; data.read('Osilly/Vision-R1-rl', split='validation')"
    _, said = python(code, tmp_path, server)
    assert "no split 'validation' (--split); there is test, train" in said.splitlines()[-1]


SMALL = dict(preflight=False, activation_checkpointing=False)
ONE_STEP = SMALL | dict(stages="4x2x1", questions=2, minibatches=1, engine="torch")
SFT_STEP = SMALL | dict(epochs=1, batch_size=4, workers=0)
RECIPES = {  # recipe: stage, flags, what it needs from the hub
    "vision-r1-7b": ("grpo", ONE_STEP, "Osilly/Vision-R1-rl"),
    "r1-zero-base": ("grpo", ONE_STEP, "Qwen/Qwen2-VL-2B"),
    "vision-r1-zero": ("grpo", ONE_STEP, "Qwen/Qwen2.5-VL-7B-Instruct"),
    "vision-r1-ci-7b": ("sft", SFT_STEP, "Qwen/Qwen2.5-VL-7B-Instruct"),
}


def cache(monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.model.cache_clear()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_by_their_name_alone(recipe, home, tiny, tmp_path, monkeypatch):
    """With what the hub has: a tiny model under the real names. Without it they say what to do."""
    stage, flags, missing = RECIPES[recipe]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "runs/vision-r1-ci-7b/final")
    cache(monkeypatch, home / "hub")
    stage = __import__(stage)
    conftest.alone(stage, recipe=recipe, out="out", **flags)
    assert len(conftest.log_of(Path("out"))) == 1
    cache(monkeypatch, tmp_path / "empty")
    with pytest.raises(SystemExit, match=f"hf download {missing}") as error:
        conftest.alone(stage, recipe=recipe, out="other", **flags)
    assert "HF_HUB_OFFLINE is set" in str(error.value) and "\n" not in str(error.value)


def test_what_is_neither_a_folder_nor_a_name():
    with pytest.raises(ValueError, match="runs/x/final: no such folder"):
        hub.model("runs/x/final")


def benchmark_rows():
    """Repository -> its file and a row with the fields that the benchmark's file has."""
    base = dict(question="Is it red? Yes or no", answer="yes", decoded_image=dict(bytes=png()))
    more = {
        "mathvista": dict(pid="1", question_type="free_form", answer_type="text", query="Is it?"),
        "mathverse": dict(problem_version="Vision Only", question_type="free-form", query_cot="?"),
        "mm-math": dict(solution="\\boxed{3}", difficult="easy", file_name="1.png", answer=None),
        "dynamath": dict(id="1", answer_type="text", knowledge_level="high school"),
        "mathvision": dict(id="1", level=1, subject="algebra", options=["yes", "no"], answer="A"),
        "mmstar": dict(index=1, category="a", l2_category="b", answer="A"),
        "chartqa": dict(query="Is it?", label=["yes"], human_or_machine=0, answer=None),
        "mme": dict(question_id="1", category="color"),
        "hallusionbench": dict(figure_id="1", set_id="2", category="VS", subcategory="chart"),
    }
    return {name: base | row for name, row in more.items()}


def test_each_benchmark_by_its_name(tiny, tmp_path, monkeypatch):
    import eval
    from benchmarks import rules

    cache(monkeypatch, tmp_path)
    for name, bench in rules.BENCHMARKS.items():
        with pytest.raises(
            ValueError, match=f"hf download {bench.repo} --repo-type dataset --include"
        ):
            rules.load(name)
    for name, row in benchmark_rows().items():
        bench = rules.BENCHMARKS[name]
        repo = tmp_path / f"datasets--{bench.repo.replace('/', '--')}"
        folder = repo / "snapshots" / SHA
        file = folder / bench.files.split()[0].replace("*", "0")
        file.parent.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text(SHA)
        if name == "mm-math":
            row.pop("decoded_image")
            jsonl(file, row)
            with zipfile.ZipFile(file.with_suffix(".zip"), "w") as z:
                z.writestr("MM_Math/1.png", png())
        else:
            parquet(file, row)
    flags = dict(model=tiny, out=tmp_path / "out", max_len=4, bench=",".join(rules.BENCHMARKS))
    conftest.alone(eval, **flags)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report.keys() == rules.BENCHMARKS.keys()
