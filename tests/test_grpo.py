"""grpo.py's equations against naive float64 loops; its runs against each other: 1 rank and 2, killed and not."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, single_rank

import grpo
from nano import run

TIMES = ("t_rollout", "t_reward", "t_logprob", "t_update", "t_total", "mem_peak")


# ---- the equations


def naive_advantages(groups, std_norm):
    out = []
    for g in groups:
        mean = sum(g) / len(g)
        std = math.sqrt(sum((r - mean) ** 2 for r in g) / (len(g) - 1))
        out.append([(r - mean) / (std + 1e-6) if std_norm else r - mean for r in g])
    return out


@pytest.mark.parametrize("std_norm", [True, False])
def test_advantages(std_norm):
    rng = random.Random(0)
    groups = [[float(rng.random() < 0.4) for _ in range(8)] for _ in range(20)] + [
        [1.0] * 8,
        [0.0] * 8,
    ]
    got = grpo.group_advantages(torch.tensor(groups), std_norm)
    want = torch.tensor(naive_advantages(groups, std_norm))
    assert torch.allclose(got, want, atol=1e-5) and not got[-2:].any()


def test_k3_kl():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50, 11).double().log_softmax(-1)
    terms = [
        sum(math.exp(y - x) - (y - x) - 1 for y, x in zip(ref, pi))
        for pi, ref in zip(a.tolist(), b.tolist())
    ]
    assert torch.allclose(grpo.k3(a, b).sum(-1), torch.tensor(terms).double())
    assert (grpo.k3(a, b) >= 0).all() and not grpo.k3(a, a).any()
    kl, expected = (
        (a.exp() * (a - b)).sum(-1),
        (a.exp() * grpo.k3(a, b)).sum(-1),
    )  # unbiased: E_pi[k3] = KL(pi || ref)
    assert torch.allclose(kl, expected)


@pytest.mark.parametrize("loss_mean", ["sequence", "token", "fixed"])
@pytest.mark.parametrize("kl_coef, high", [(0.01, 0.0), (0.1, 0.28), (0.0, 0.0)])
def test_loss_and_its_gradient_against_a_naive_loop(loss_mean, kl_coef, high):
    single_rank()
    torch.manual_seed(1)
    lengths = [3, 7, 1, 12]
    n, max_len, eps = sum(lengths), 16, 0.2
    logprobs = -torch.rand(n).double().requires_grad_()
    logprobs = (-torch.rand(n).double()).requires_grad_()
    old, ref = (logprobs.detach() + 0.3 * torch.randn(2, n).double()).unbind()
    advantages = torch.randn(4).double()
    counted = torch.tensor([1.0, 1.0, 0.0, 1.0])  # one sequence is left out of the means
    rows = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    config = SimpleNamespace(clip_eps=eps, clip_eps_high=high, kl_coef=kl_coef)
    weights = grpo.token_weights(
        torch.tensor(lengths).float(), counted, max_len, loss_mean
    ).double()
    loss, clipped = grpo.policy_loss(
        logprobs, old, ref if kl_coef else None, advantages[rows], weights[rows], config
    )
    loss.backward()

    x, total, t, want_clipped = logprobs.detach().clone().requires_grad_(), 0.0, 0, []
    denominator = {"token": 3 + 7 + 12, "fixed": 3 * max_len}.get(loss_mean)
    for i, length in enumerate(lengths):
        for _ in range(length):
            rho = (x[t] - old[t]).exp()
            unclipped, cut = (
                rho * advantages[i],
                min(max(rho.item(), 1 - eps), 1 + (high or eps)) * advantages[i],
            )
            term = (
                unclipped if unclipped <= cut else (cut if abs(cut - unclipped) > 0 else unclipped)
            )
            want_clipped.append(float(unclipped > cut))
            if kl_coef:
                term = term - kl_coef * ((ref[t] - x[t]).exp() - (ref[t] - x[t]) - 1)
            total = total - counted[i] * term / (denominator or 3 * length)
            t += 1
    total.backward()
    assert abs(loss.item() - total.item()) < 1e-7
    assert torch.allclose(logprobs.grad, x.grad, atol=1e-7)
    assert clipped.tolist() == want_clipped


def test_the_order_of_questions_goes_through_every_epoch_once():
    order = grpo.question_order(7, 3)
    epochs = [[next(order) for _ in range(7)] for _ in range(4)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]


# ---- whole runs


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    import toy
    from nano.data import write_parquet

    path = tmp_path_factory.mktemp("problems") / "problems.parquet"
    write_parquet(path, toy.problems(40, 5, "g"))
    return path


def command(out, problem_file, ranks=1, **flags):
    """the base model asked in Zero's way: it answers in the format, often wrongly, so that groups have advantages"""
    flags = (
        dict(
            model=ROOT / "toy" / "base",
            data=problem_file,
            out=out,
            stages="16x8x3,24x4x3",
            questions=8,
            lr=1e-4,
            save_every=2,
            seed=1,
            sample_questions=2,
        )
        | flags
    )
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
    words = [w for k, v in flags.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    return [*launch, str(ROOT / "grpo.py"), "--recipe", "toy-zero", *words]


def run_grpo(out, problem_file, ranks=1, **flags):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(out, problem_file, ranks, **flags),
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def log_of(out, drop=TIMES):
    return [
        {k: v for k, v in json.loads(line).items() if k not in drop}
        for line in open(out / "log.jsonl")
    ]


def weights_of(out):
    from safetensors.torch import load_file

    return load_file(out / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, problem_file):
    out = tmp_path_factory.mktemp("one")
    run_grpo(out, problem_file, keep=10)
    return out


def test_log_lines_say_what_happened(one_rank):
    rows = log_of(one_rank, drop=())
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and [r["stage"] for r in rows] == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    assert [(r["max_len"], r["group_size"]) for r in rows] == [(16, 8)] * 3 + [(24, 4)] * 3
    for r in rows:
        assert (
            r["logprob_gap_max"] < 1e-4 and 0 <= r["logprob_gap"] <= r["logprob_gap_max"]
        )  # rollout = trainer
        assert r["len_mean"] <= r["max_len"] and 0 <= r["accuracy"] <= r["format_rate"] <= 1
        assert r["t_total"] >= r["t_rollout"] + r["t_reward"] + r["t_logprob"] + r["t_update"]
    assert any(r["grad_norm"] > 0 for r in rows) and rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    samples = [json.loads(line) for line in open(one_rank / "samples.jsonl")]
    assert len(samples) == 3 * 2 * 8 + 3 * 2 * 4 and {
        "completion",
        "reward",
        "why",
        "answer",
        "advantage",
    } <= set(samples[0])
    assert json.loads((one_rank / "config.json").read_text())["stages"] == "16x8x3,24x4x3"
    assert "--recipe toy-zero" in (one_rank / "command.txt").read_text()


def test_two_ranks_are_one_rank(one_rank, problem_file, tmp_path):
    # a small token budget: many micro-batches, so that the split differs between the runs
    run_grpo(tmp_path, problem_file, ranks=2, micro_tokens=400)
    for a, b in zip(log_of(one_rank), log_of(tmp_path), strict=True):
        for key in set(a) - {"logprob_gap", "logprob_gap_max"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    a, b = weights_of(one_rank), weights_of(tmp_path)
    worst = max((a[k] - b[k]).abs().max().item() for k in a)
    assert worst < 1e-5


def kill_all(word):
    """SIGKILL to every process with this word on its command line: torchrun and its ranks, as when a machine goes down"""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError):
            continue  # gone in the meantime


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_uninterrupted(one_rank, problem_file, tmp_path, ranks):
    """SIGKILL at two arbitrary moments; the log, the samples and the weights come out the same, bit by bit on one rank"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for lines in (1, 4):
        p = subprocess.Popen(
            command(tmp_path, problem_file, ranks),
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 120
        while p.poll() is None and time.time() < deadline:
            log = tmp_path / "log.jsonl"
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        kill_all(str(tmp_path))
        p.wait()
    # what the kill may leave behind
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 6, "rew')
    said = run_grpo(tmp_path, problem_file)  # a run of two ranks goes on with one
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
    ]  # the last two
    if ranks == 1:
        assert log_of(tmp_path) == log_of(one_rank)
        assert (tmp_path / "samples.jsonl").read_text() == (one_rank / "samples.jsonl").read_text()
        a, b = weights_of(one_rank), weights_of(tmp_path)
        assert all(torch.equal(a[k], b[k]) for k in a)
    else:
        assert [r["step"] for r in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
        a, b = weights_of(one_rank), weights_of(tmp_path)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    assert "resumed after step" in said


def test_several_updates_per_rollout_batch_use_old_logprobs(problem_file, tmp_path):
    run_grpo(
        tmp_path,
        problem_file,
        minibatches=4,
        lr=3e-3,
        stages="16x8x2",
        drop_zero_var=True,
        loss_mean="token",
        clip_eps_high=0.28,
    )
    rows = log_of(tmp_path)
    assert any(r["clip_frac"] > 0 for r in rows) and all(r["logprob_gap_max"] < 1e-4 for r in rows)


def test_without_kl_there_is_no_reference(problem_file, tmp_path):
    run_grpo(
        tmp_path, problem_file, kl_coef=0.0, std_norm=False, loss_mean="fixed", stages="16x8x1"
    )
    assert log_of(tmp_path)[0]["kl"] == 0


def test_a_folder_of_another_method_is_not_gone_on_with(one_rank, problem_file):
    """a finished run must not take the name of settings that it never had"""
    before = (one_rank / "config.json").read_text()
    for flags, words in (
        (dict(kl_coef=0.0), "kl_coef = 0.01"),
        (dict(stages="16x8x3,32x4x3"), "6 steps of --stages 16x8x3,24x4x3"),
    ):
        if dist.is_initialized():
            dist.destroy_process_group()
        with pytest.raises(
            SystemExit, match=f"(?s){words}.*--no_resume"
        ):  # in this process: quicker, since nothing is imported again
            grpo.main(
                run.parse_config(
                    grpo.Config, grpo.RECIPES, command(one_rank, problem_file, **flags)[2:]
                )
            )
        run.locks.clear()  # as when a process ends
        assert (one_rank / "config.json").read_text() == before
    dist.destroy_process_group()


def test_errors_are_for_people(problem_file, tmp_path):
    def said(**flags):
        done = subprocess.run(
            command(tmp_path, problem_file, **flags), capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        return done.stderr

    assert "clip_eps" in said(clip_epss=1)
    assert "vision-r1-7b" in said(recipe="vision-r1-7")
    assert "whole number" in said(stages="4Kx16xmany")
    assert "multiple of ranks" in said(questions=7, minibatches=2)
