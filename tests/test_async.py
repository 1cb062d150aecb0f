"""--async_steps 1 and --tis of grpo.py, which need no vLLM: what a step trains on, and exact resume with rollouts in flight."""

import os
import subprocess
import time

import pytest
import torch
from test_grpo import command, kill_all, log_of, problem_file, run_grpo, weights_of  # noqa: F401

import grpo

FLAGS = dict(async_steps=1, stages="16x8x3,24x4x2", save_every=2, lr=1e-3)


def test_one_step_behind_killed_and_resumed_is_uninterrupted(problem_file, tmp_path):  # noqa: F811
    run_grpo(tmp_path / "whole", problem_file, **FLAGS)
    whole = log_of(tmp_path / "whole")
    assert [(r["max_len"], r["group_size"]) for r in whole] == [(16, 8)] * 3 + [(24, 4)] * 2
    # the first batch comes from the weights that it trains; later ones from the weights before the last update
    assert whole[0]["logprob_gap_max"] < 1e-4 < whole[1]["logprob_gap_max"]
    assert all(r["logprob_gap_kl"] >= 0 for r in whole)

    out = tmp_path / "cut"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    p = subprocess.Popen(
        command(out, problem_file, **FLAGS),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.time() + 200
    while (
        p.poll() is None
        and time.time() < end
        and not (out / "checkpoints" / "step-000002").exists()
    ):
        time.sleep(0.01)
    kill_all(str(out))
    p.wait()
    assert "resumed after step" in run_grpo(out, problem_file, **FLAGS)
    assert log_of(out) == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_truncated_importance_sampling_scales_each_tokens_advantage(problem_file, tmp_path):  # noqa: F811
    """off and on agree where rollout and trainer do: TorchEngine's ratio is 1 to float32's rounding"""
    for name, tis in [("off", 0.0), ("on", 2.0), ("half", 0.5)]:
        run_grpo(
            tmp_path / name,
            problem_file,
            tis=tis,
            stages="16x8x1",
            kl_coef=0.0,
            lr=1e-4,
            max_grad_norm=1e9,
        )
    off, on, half = (log_of(tmp_path / n)[0]["grad_norm"] for n in ("off", "on", "half"))
    assert on == pytest.approx(off, rel=1e-4) and half == pytest.approx(
        off / 2, rel=1e-4
    )  # min(1, 0.5) on every token


@pytest.mark.parametrize(
    "flags, hint",
    [
        (dict(engine="vlm"), "one of torch, vllm, http"),
        (dict(engine="vllm", top_p=0.9), "--top_p"),
        (dict(async_steps=2), "0 or 1"),
        (dict(async_steps=1, tis=2.0), "--tis"),
        (dict(async_steps=1, vllm_tp=2), "--vllm_tp"),
    ],
)
def test_flags_that_do_not_go_together_end_with_one_line(flags, hint):
    with pytest.raises(SystemExit, match=hint):
        grpo.check_engine(grpo.Config(**flags))
