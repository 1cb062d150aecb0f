"""eval.py: the interval against a closed form, a stopped run against an uninterrupted one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import eval as evaluation
import toy
from data import write_parquet


def run_eval(out, problem_file, ranks=1, **flags):
    flags = (
        dict(
            model=ROOT / "assets" / "toy-base",
            system_prompt=toy.ZERO_PROMPT,
            data=problem_file,
            out=out,
            samples=2,
            temperature=1.0,
            chunk=10,
        )
        | flags
    )
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [w for k, v in flags.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    return subprocess.run([sys.executable, *launch, str(ROOT / "eval.py"), "--recipe", "toy", *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)  # fmt: skip


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.parquet"
    write_parquet(path, toy.problems(32, 6, "e"))
    return path


def test_interval_is_the_binomial_one_for_single_answers():
    right = np.random.default_rng(0).random(4000) < 0.3
    low, high = evaluation.interval(right.astype(float), np.arange(4000))
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 4000)
    assert low == pytest.approx(right.mean() - half, abs=0.002) and high == pytest.approx(
        right.mean() + half, abs=0.002
    )


def test_samples_of_one_question_are_not_independent():
    right = np.repeat(np.random.default_rng(0).random(200) < 0.5, 10).astype(float)
    low, high = evaluation.interval(right, np.repeat(np.arange(200), 10))
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.15)  # 200 questions, not 2,000 answers


def test_a_stopped_run_goes_on_to_the_same_report(problem_file, tmp_path):
    done = run_eval(tmp_path / "a", problem_file)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report) == {"all", *(f"level {k}" for k in range(2, 10))}
    assert report["all"]["n"] == 64 and report["all"]["format_rate"] > 0.9 and 0.1 < report["all"]["accuracy"] < 0.9
    assert report["all"]["low"] < report["all"]["accuracy"] < report["all"]["high"]
    assert f"{100 * report['all']['accuracy']:.1f}" in done.stdout and "level 2" in done.stdout

    assert run_eval(tmp_path / "b", problem_file).returncode == 0
    responses = tmp_path / "b" / "responses.jsonl"
    text = responses.read_text()
    assert text == (tmp_path / "a" / "responses.jsonl").read_text()
    responses.write_text("".join(text.splitlines(True)[:20]) + '{"id": "e-1')  # killed in the middle of a line
    assert run_eval(tmp_path / "b", problem_file, ranks=2).returncode == 0
    assert json.loads((tmp_path / "b" / "report.json").read_text()) == report


def test_responses_of_another_setting_are_not_mixed_in(problem_file, tmp_path):
    assert run_eval(tmp_path, problem_file, limit=4).returncode == 0
    again = run_eval(tmp_path, problem_file, limit=4, temperature=0.0)
    assert again.returncode != 0 and "--no_resume" in again.stderr
    assert run_eval(tmp_path, problem_file, limit=4, temperature=0.0, no_resume=True).returncode == 0


def test_real_problems(real, tiny, tmp_path):
    done = run_eval(
        tmp_path, real / "geometry3k" / "data.jsonl", model=tiny, max_len=24, samples=1, max_prompt_len=2048
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["all"]["n"] == 30
