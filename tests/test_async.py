"""--async_steps 1 and --tis of grpo.py: what a step trains on, and an exact resume with rollouts in
hand. Neither needs vLLM."""

import subprocess

import pytest
import torch
from conftest import (
    SMALL,
    alone,
    command,
    environment,
    kill_all,
    log_of,
    run_grpo,
    wait_for,
    weights_of,
)

import grpo

FLAGS = dict(async_steps=1, stages="16x8x3,24x4x2", save_every=2, lr=1e-3)


def test_one_step_behind_killed_and_resumed_is_uninterrupted(problem_file, tmp_path):
    alone(grpo, **SMALL | FLAGS, data=problem_file, out=tmp_path / "whole")
    whole = log_of(tmp_path / "whole")
    assert [(r["max_len"], r["group_size"]) for r in whole] == [(16, 8)] * 3 + [(24, 4)] * 2
    # The first batch comes from the weights that it trains, later ones from the weights before the
    # last update.
    assert whole[0]["logprob_gap_max"] < 1e-4
    assert all(row["logprob_gap_max"] > 1e-4 for row in whole[1:])
    assert all(row["logprob_gap_kl"] >= 0 for row in whole)

    out = tmp_path / "cut"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command(out, problem_file, **FLAGS), env=environment(), **quiet)
    saved = out / "checkpoints" / "step-000002"
    wait_for(lambda: process.poll() is not None or saved.exists(), 200)
    kill_all(str(out))
    process.wait()
    assert "resumed after step" in run_grpo(out, problem_file, **FLAGS)
    assert log_of(out) == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_truncated_importance_sampling_scales_each_tokens_advantage(problem_file, tmp_path):
    """TorchEngine's ratio is 1 up to float32's rounding: with a bound of 2 nothing changes, with a
    bound of .5 the weight of every token is .5."""
    flags = SMALL | dict(stages="16x8x1", kl_coef=0.0, max_grad_norm=1e9, data=problem_file)
    norms = {}
    for tis in (0.0, 2.0, 0.5):
        out = tmp_path / str(tis)
        alone(grpo, **flags, tis=tis, out=out)
        norms[tis] = log_of(out)[0]["grad_norm"]
    assert norms[2.0] == pytest.approx(norms[0.0], rel=1e-4)
    assert norms[0.5] == pytest.approx(norms[0.0] / 2, rel=1e-4)
