"""ablations/*.patch: each applies to the code as it is, and does what it says."""

import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    alone,
    environment,
    kill_all,
    log_of,
    single_rank,
    wait_for,
    weights_of,
    words,
)

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


def patched_stage(folder, name):
    """grpo.py with this patch as a module of this process, beside the packages as they are."""
    shutil.copy(ROOT / "grpo.py", folder)
    patch = ROOT / "ablations" / f"{name}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(f"grpo_{name}", folder / "grpo.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_every_patch_is_small_applies_and_trains(patch, problem_file, tmp_path):
    head, diff = patch.read_text().split("\n\n", 1)
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?!\+\+|--)", line)]
    assert 0 < len(changed) <= 40 and len(head) > 100
    (tmp_path / "code").mkdir()
    grpo = patched_stage(tmp_path / "code", patch.stem)
    flags = SMALL | dict(data=problem_file, out=tmp_path / "run", stages="16x8x1,24x4x1", lr=1e-3)
    if "--minibatches" in head:
        flags["minibatches"] = 2
    alone(grpo, **flags)
    rows = log_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)


def batch_of(lengths, advantages, logprobs, old, ref=None):
    """The fields of a Batch that policy_loss reads; the means of Eq. 1 over these answers."""
    weights = torch.cat([torch.full((n,), 1 / (len(lengths) * n)) for n in lengths])
    advantages = torch.cat([torch.full((n,), a) for n, a in zip(lengths, advantages)])
    fields = dict(lengths=lengths, advantages=advantages, weights=weights, logprobs=logprobs)
    return SimpleNamespace(**fields, old_logprobs=old, ref_logprobs=ref)


@pytest.fixture()
def answers():
    """Three answers of 2, 5 and 3 tokens: lengths, advantages, logprobs, old, ref (10,)."""
    g = torch.Generator().manual_seed(0)
    logprobs, old, ref = -torch.rand(3, 10, generator=g)
    return [2, 5, 3], [1.5, -0.7, 0.2], logprobs, old, ref


def test_rloo_and_reinforce_pp_against_a_loop(tmp_path):
    single_rank()
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    got = patched_stage(tmp_path / "a", "rloo").group_advantages(rewards)
    for group, row in zip(rewards.tolist(), got.tolist()):
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert row[i] == pytest.approx(reward - sum(others) / len(others), abs=1e-6)
    got = patched_stage(tmp_path / "b", "reinforce_pp").group_advantages(rewards)
    want = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gspo_against_a_loop_over_answers(answers, tmp_path):
    lengths, advantages, logprobs, old, ref = answers
    grpo = patched_stage(tmp_path, "gspo")
    config = grpo.Config(clip_eps=0.1, clip_eps_high=0.2, kl_coef=0.5)
    x = logprobs.clone().requires_grad_()
    loss, _ = grpo.policy_loss(x, batch_of(lengths, advantages, logprobs, old, ref), config)
    loss.backward()
    y = logprobs.double().requires_grad_()
    want, first = 0, 0
    for n, a in zip(lengths, advantages):
        at = slice(first, first + n)
        rho = ((y[at].sum() - old[at].double().sum()) / n).exp()
        kl = (ref[at].double() - y[at]).exp() - (ref[at].double() - y[at]) - 1
        term = torch.minimum(rho * a, rho.clamp(0.9, 1.2) * a) - 0.5 * kl.mean()
        want, first = want - term / len(lengths), first + n
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-6, rtol=1e-4)


def test_cispo_gradient_is_the_clipped_weight(answers, tmp_path):
    lengths, advantages, logprobs, old, _ = answers
    grpo, x = patched_stage(tmp_path, "cispo"), logprobs.clone().requires_grad_()
    batch = batch_of(lengths, advantages, logprobs, old)
    grpo.policy_loss(x, batch, grpo.Config(clip_eps=0.1))[0].backward()
    want = -(logprobs - old).exp().clamp(0.9, 1.1) * batch.advantages * batch.weights
    torch.testing.assert_close(x.grad, want)


def test_kl_in_the_reward_lowers_what_comes_before(answers, tmp_path):
    lengths, advantages, logprobs, old, ref = answers
    grpo, x = patched_stage(tmp_path, "kl_reward"), logprobs.clone().requires_grad_()
    batch = batch_of(lengths, advantages, logprobs, None, ref)  # pi is pi_old
    grpo.policy_loss(x, batch, grpo.Config(kl_coef=0.3))[0].backward()
    first, want = 0, []
    for n, a in zip(lengths, advantages):
        for t in range(first, first + n):
            paid = sum(0.3 * (logprobs[s] - ref[s]).item() for s in range(t, first + n))
            want.append(-(a - paid) / (len(lengths) * n))
        first += n
    torch.testing.assert_close(x.grad, torch.tensor(want), atol=1e-6, rtol=1e-4)


def test_adaptive_ptst_goes_on_when_few_answers_are_cut(tmp_path):
    grpo = patched_stage(tmp_path, "adaptive_ptst")
    stages = grpo.ptst.parse("16x8x9,24x4x9")
    asked = [None, dict(stage=0, truncated=0.5), dict(stage=0, truncated=0.01)]
    asked.append(dict(stage=1, truncated=0.0))
    assert [grpo.next_stage(stages, row)[0] for row in asked] == [0, 0, 1, 1]


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
