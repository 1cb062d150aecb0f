"""ablations/*.patch: each applies to the code as it is, and does what it says."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, environment, kill_all, log_of, wait_for, weights_of, words

PATCHES = sorted((ROOT / "ablations").glob("*.patch"))


def patched(folder, name):
    """A copy of the scripts and packages with this patch applied."""
    for part in ("nano", "answers", "benchmarks", "toy"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    patch = ROOT / "ablations" / f"{name}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_every_patch_applies(patch, tmp_path):
    code = patched(tmp_path, patch.stem)
    assert any((ROOT / f.name).read_text() != f.read_text() for f in code.glob("*.py"))


def test_one_step_off_killed_and_resumed_is_uninterrupted(problem_file, tmp_path):
    (tmp_path / "code").mkdir()
    code = patched(tmp_path / "code", "one_step_off")
    flags = SMALL | dict(data=problem_file, stages="16x8x3,24x4x2", save_every=2, lr=1e-3)

    def call(out):
        return [sys.executable, str(code / "grpo.py"), *words(flags | dict(out=out))]

    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    subprocess.run(call(tmp_path / "whole"), check=True, timeout=240, **quiet)
    whole = log_of(tmp_path / "whole")
    assert [(r["max_len"], r["group_size"]) for r in whole] == [(16, 8)] * 3 + [(24, 4)] * 2
    # The first batch comes from the weights that it trains, later ones from the weights before the
    # last update.
    assert whole[0]["logprob_gap_max"] < 1e-4
    assert all(row["logprob_gap_max"] > 1e-4 for row in whole[1:])

    out = tmp_path / "cut"
    process = subprocess.Popen(call(out), **quiet)
    saved = out / "checkpoints" / "step-000002"
    wait_for(lambda: process.poll() is not None or saved.exists(), 200)
    kill_all(str(out))
    process.wait()
    subprocess.run(call(out), check=True, timeout=240, **quiet)
    assert log_of(out) == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
