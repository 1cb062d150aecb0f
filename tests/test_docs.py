"""README.md and docs/: every command is one that exists, and the quick ones run as printed."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib import import_module

import pytest
from conftest import ROOT, environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("grpo.py", "sft.py", "eval.py", "cold_start.py")
STARTS = ("python ", "torchrun ", "bash ", "git apply ", "pip install ")


def commands(page) -> list[str]:
    """The commands of a page: lines of its bash blocks, and code within sentences and tables."""
    text, found = page.read_text(), []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        found += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    return [c for c in found if c.startswith(STARTS) and "..." not in c.split("#")[0][:12]]


ALL = [pytest.param(c, id=f"{p.stem}: {c[:60]}") for p in PAGES for c in dict.fromkeys(commands(p))]


@lru_cache
def source(path) -> str:
    return (ROOT / path).read_text()


def check_flags(path: str, words: list[str]):
    """A tool knows the flags: each stands in its source, or is a field of its settings."""
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no_")
        assert flag in source(path) or re.search(rf"\b{name}\b\s*:", source(path)), (path, flag)


def check_stage(script: str, words: list[str]):
    from nano import run

    stage = import_module(script.removesuffix(".py"))
    words = [word for word in words if word != "--help"]
    if script == "cold_start.py":
        check_flags(script, words)
        recipe = dict(zip(words, words[1:])).get("--recipe")
        assert recipe is None or recipe in stage.RECIPES
        return
    config = run.parse_config(stage.Config, stage.RECIPES, words)
    if script == "grpo.py":
        import ptst

        ptst.parse(config.stages)


@pytest.mark.parametrize("command", ALL)
def test_commands_exist(command):
    words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    scripts = [word for word in words if word.endswith((".py", ".sh", ".patch", ".txt"))]
    for script in scripts:
        assert (ROOT / script).exists() or script.isupper(), script
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        path = f"{module.replace('.', '/')}.py" if "." in module else f"{module}/__main__.py"
        assert "NAME" in module or (ROOT / path).exists(), module
        if "NAME" not in module and module != "toy":
            check_flags(path, rest)
    for script in set(scripts) & set(STAGES):
        check_stage(script, words[words.index(script) + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in tests, name


def test_readme_is_one_page():
    text = source("README.md")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 9 * 1024
    lines = sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py"))
    assert lines <= 2300 and "under 2,300 lines" in text


def call(command: str, folder) -> str:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_your_own_data_as_readme_says(tmp_path):
    from PIL import Image

    text = source("README.md").split("## Your own data")[1].split("\n## ")[0]
    row = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    os.makedirs(tmp_path / "images")
    with open(tmp_path / "problems.jsonl", "w") as file:
        for k in range(8):
            name = row["image"].replace("1", str(k))
            Image.new("RGB", (56, 56), (k * 30, 0, 0)).save(tmp_path / name)
            file.write(json.dumps(row | dict(image=name, problem=f"{row['problem']} {k}")) + "\n")
    for command in re.search(r"```bash\n(.*?)```", text, re.S)[1].strip().splitlines():
        call(command, tmp_path)
    assert (tmp_path / "runs/smoke/final/model.safetensors").exists()
    assert len((tmp_path / "runs/smoke/log.jsonl").read_text().splitlines()) == 4


QUICK = ("python ptst.py", "python reward.py", "python -m tools.cost")
RUN = dict.fromkeys(c.values[0] for c in ALL if c.values[0].startswith(QUICK))


@pytest.mark.parametrize("command", RUN)
def test_quick_commands_run(command, tmp_path):
    assert call(command, tmp_path)


@pytest.mark.parametrize("script", STAGES)
def test_help_into_head_is_no_traceback(script):
    command = f"{shlex.quote(sys.executable)} {script} --help | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout and not done.stderr


def test_help_shows_no_source_code():
    text = call("python grpo.py --help", ROOT)
    assert re.search(r"--stages STAGES .*4Kx16x100", text)


def test_a_trial_with_other_flags_or_another_patch_has_its_own_folder(tmp_path):
    """The folders and the two refusals; the training itself is a program that does nothing."""
    for name in ("ablations", "nano", "answers", "benchmarks", "toy", "tools"):
        (tmp_path / name).mkdir()
    for name in ("grpo.py", "ablations/try.sh", "ablations/rloo.patch"):
        (tmp_path / name).write_text(source(name))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\necho $*\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def trial(*words):
        command = ["bash", "ablations/try.sh", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "NAME one of: rloo" in trial().stderr and "there are: rloo" in trial("x").stderr
    for words in ([], ["--questions", "2"]):
        done = trial("rloo", *words)
        assert done.returncode == 0, done.stderr
        tail = "".join(f"-{word.strip('-')}" for word in words)
        assert f"tools.compare runs/ablations/baseline{tail}/0/eval" in done.stdout
        assert (tmp_path / f"runs/ablations/rloo{tail}/code/grpo.py").exists()
    with open(tmp_path / "ablations/rloo.patch", "a") as file:
        file.write("\n")
    done = trial("rloo")
    assert done.returncode == 2 and "has changed since runs/ablations/rloo was" in done.stderr
