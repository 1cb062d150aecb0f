"""--tis of grpo.py: truncated importance sampling."""

import pytest
from conftest import SMALL, alone, log_of

import grpo


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
