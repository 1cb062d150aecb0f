"""grpo.py: its equations against naive float64 loops, a step of Sec. 3.4 against transformers by
hand, and whole runs against each other: one rank and two, killed and not."""

import json
import math
import random
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SMALL,
    alone,
    command,
    environment,
    kill_all,
    log_of,
    run_grpo,
    single_rank,
    weights_of,
)
from transformers import AutoModelForImageTextToText

import grpo
from nano import packing, rollout, run

# -------------------------------------------------------------------------------------------------
# the equations


def naive_advantages(groups, std_norm):
    out = []
    for group in groups:
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        out.append([(r - mean) / (std + 1e-6) if std_norm else r - mean for r in group])
    return out


@pytest.mark.parametrize("std_norm", [True, False])
def test_advantages(std_norm):
    rng = random.Random(0)
    groups = [[float(rng.random() < 0.4) for _ in range(8)] for _ in range(20)]
    groups += [[1.0] * 8, [0.0] * 8]
    got = grpo.group_advantages(torch.tensor(groups), std_norm)
    want = torch.tensor(naive_advantages(groups, std_norm))
    assert torch.allclose(got, want, atol=1e-5)
    assert not got[-2:].any()


def test_rewards_that_nearly_agree_have_finite_advantages():
    """The epsilon of EasyR1 in the denominator shows when rewards differ by less than it."""
    groups = [[1.0, 1.0 + 1e-6, 1.0, 1.0]]
    got = grpo.group_advantages(torch.tensor(groups, dtype=torch.float64))
    (want,) = naive_advantages(groups, True)
    assert got[0].tolist() == pytest.approx(want)


def test_k3_kl():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50, 11).double().log_softmax(-1)
    terms = []
    for pi, ref in zip(a.tolist(), b.tolist()):
        terms.append(sum(math.exp(y - x) - (y - x) - 1 for y, x in zip(ref, pi)))
    assert torch.allclose(grpo.k3(a, b).sum(-1), torch.tensor(terms).double())
    assert (grpo.k3(a, b) >= 0).all()
    assert not grpo.k3(a, a).any()
    kl = (a.exp() * (a - b)).sum(-1)
    expected = (a.exp() * grpo.k3(a, b)).sum(-1)  # it is unbiased: E_pi[k3] = KL(pi || ref)
    assert torch.allclose(kl, expected)


def answer(length, reward=0.0, advantage=0.0, prompt=None, seed=0):
    """A Sample with this many tokens."""
    rng = random.Random(seed * 1000 + length)
    ids = [rng.randint(10, 400) for _ in range(length)]
    logprobs = [-rng.random() for _ in ids]
    return rollout.Sample(
        prompt, ids, logprobs, "stop", "", reward=reward, advantage=advantage, weight=-1.0
    )


def naive_weight(groups, group, sample, loss_mean, max_len, drop):
    """The weight of a token of a sample: Eq. 1's mean, DAPO's and Dr. GRPO's."""
    counted = [g for g in groups if not drop or len({s.reward for s in g}) > 1]
    if not any(group is g for g in counted):
        return 0.0
    lengths = [len(s.ids) for g in counted for s in g]
    if loss_mean == "sequence":
        return 1 / len(lengths) / len(sample.ids)
    if loss_mean == "token":
        return 1 / sum(lengths)
    return 1 / len(lengths) / max_len


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("loss_mean", ["sequence", "token", "fixed"])
def test_token_weights_are_the_means_of_eq_1(loss_mean, drop):
    """With --drop_zero_var the groups of equal rewards leave the means, and no others do."""
    single_rank()
    groups = [
        [answer(3, 1.0), answer(7, 0.0)],
        [answer(4, 1.0), answer(2, 1.0)],
        [answer(5, 0.0), answer(9, 0.0)],
        [answer(1, 0.0), answer(12, 1.0)],
    ]
    for group in groups:
        for sample in group:
            sample.weight = 0.0
    config = grpo.Config(loss_mean=loss_mean, drop_zero_var=drop)
    grpo.set_token_weights(groups, 16, config)
    for group in groups:
        for sample in group:
            want = naive_weight(groups, group, sample, loss_mean, 16, drop)
            assert sample.weight == pytest.approx(want)
    total = sum(s.weight * len(s.ids) for g in groups for s in g)
    assert loss_mean == "fixed" or total == pytest.approx(1)


def naive_loss(logprobs, old, ref, sampler, rows, config):
    """Eq. 1 token by token -> loss, clipped; rows: (advantage, weight) of each token."""
    total, clipped = 0.0, []
    low, high = 1 - config.clip_eps, 1 + (config.clip_eps_high or config.clip_eps)
    for t, (advantage, weight) in enumerate(rows):
        if config.tis:
            advantage = advantage * min(math.exp(old[t] - sampler[t]), config.tis)
        ratio = (logprobs[t] - old[t]).exp()
        bound = min(max(ratio.item(), low), high)
        acts = bound * advantage < ratio.item() * advantage
        term = bound * advantage if acts else ratio * advantage
        clipped.append(float(acts))
        if ref is not None:
            d = ref[t] - logprobs[t]
            term = term - config.kl_coef * (d.exp() - d - 1)
        total = total - weight * term
    return total, clipped


@pytest.mark.parametrize("tis", [0.0, 1.1])
@pytest.mark.parametrize("kl_coef, high", [(0.01, 0.0), (0.1, 0.28), (0.0, 0.0)])
def test_loss_and_its_gradient_against_a_naive_loop(kl_coef, high, tis):
    torch.manual_seed(1)
    n = 60
    logprobs = (-torch.rand(n).double()).requires_grad_()
    old, ref, sampler = (logprobs.detach() + 0.3 * torch.randn(3, n).double()).unbind()
    advantages, weights = torch.randn(n).double(), torch.rand(n).double()
    config = grpo.Config(kl_coef=kl_coef, clip_eps_high=high, tis=tis)
    batch = SimpleNamespace(
        logprobs=sampler,
        old_logprobs=old,
        ref_logprobs=ref if kl_coef else None,
        advantages=advantages,
        weights=weights,
    )
    loss, clipped = grpo.policy_loss(logprobs, batch, config)
    loss.backward()

    mine = logprobs.detach().clone().requires_grad_()
    rows = list(zip(advantages.tolist(), weights.tolist()))
    want, want_clipped = naive_loss(mine, old, batch.ref_logprobs, sampler, rows, config)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    assert torch.allclose(logprobs.grad, mine.grad, atol=1e-12)
    assert clipped.tolist() == want_clipped
    assert 0 < sum(want_clipped) < n


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_is_not():
    """On the first update pi_old is pi: the gradient is A times that of the log-probability."""
    logprobs = (-torch.rand(9)).requires_grad_()
    advantages, weights = torch.randn(9), torch.rand(9)
    batch = SimpleNamespace(
        old_logprobs=None, ref_logprobs=None, advantages=advantages, weights=weights
    )
    loss, clipped = grpo.policy_loss(logprobs, batch, grpo.Config())
    loss.backward()
    assert loss.item() == pytest.approx(-(advantages * weights).sum().item(), rel=1e-5)
    assert torch.allclose(logprobs.grad, -advantages * weights)
    assert not clipped.any()


def test_an_advantage_per_token_is_one_per_sample_repeated(tiny, pictures):
    """The same loss and gradient, bit by bit; and a sample's tokens may differ in it."""
    single_rank()
    processor = packing.Processor(tiny)
    prompt = packing.encode(pictures[0], processor)
    losses, slopes = [], []
    for kind in ("number", "list", "slope"):
        samples = [answer(n, 0.0, a, prompt) for n, a in [(3, 0.5), (7, -1.25), (1, 2.0)]]
        for sample in samples:
            sample.weight = 1 / len(sample.ids)
            if kind == "list":
                sample.advantage = [sample.advantage] * len(sample.ids)
            if kind == "slope":
                sample.advantage = [sample.advantage * t for t in range(len(sample.ids))]
        (batch,) = packing.batches(samples, 10**6, 64, processor)
        torch.manual_seed(0)
        logprobs = (-torch.rand(11)).requires_grad_()
        loss, _ = grpo.policy_loss(logprobs, batch, grpo.Config())
        loss.backward()
        losses.append(loss.item())
        slopes.append(logprobs.grad)
    assert losses[0] == losses[1]
    assert torch.equal(slopes[0], slopes[1])
    factor = torch.tensor([*range(3), *range(7), *range(1)])
    assert torch.allclose(slopes[2], slopes[0] * factor)


@pytest.mark.parametrize("warmup, want", [(0, [1, 1, 1]), (1, [1, 1, 1]), (4, [1, 2, 3, 4, 4, 4])])
def test_the_learning_rate_warms_up_in_equal_steps_and_stays(warmup, want):
    """Its first step is not wasted at zero, and step `warmup` is the first at the full rate."""
    config = grpo.Config(lr=4e-6, warmup_steps=warmup)
    got = [grpo.learning_rate(step, config) for step in range(len(want))]
    assert got == pytest.approx([4e-6 * w / max(want) for w in want])


def test_a_cosine_falls_from_the_peak_to_zero():
    config = grpo.Config(lr=2.0, lr_decay="cosine", stages="96x2x60,192x2x40")
    got = [grpo.learning_rate(step, config) for step in (0, 25, 50, 75, 100)]
    assert got == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0])


def test_the_order_of_questions_goes_through_every_epoch_once():
    """Two steps of 7 questions may share an epoch of 10 records; another seed, another order."""
    single_rank()
    records = list(range(10))
    orders = []
    for seed in (0, 1):
        config = grpo.Config(questions=7, seed=seed)
        questions = grpo.Questions(records, None, config)
        asked = [questions.record(step, number) for step in range(10) for number in range(7)]
        epochs = [asked[i : i + 10] for i in range(0, 70, 10)]
        assert all(sorted(epoch) == records for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 7
        orders.append(asked)
    assert orders[0] != orders[1]


# -------------------------------------------------------------------------------------------------
# a step of Sec. 3.4 by hand


@pytest.fixture()
def watched(monkeypatch):
    """What the engine is asked for and what it answers: (groups, keywords) of each call."""
    calls = []
    generate = rollout.TorchEngine.generate

    def watch(self, prompts, group_size, max_len, seeds, temperature, top_p):
        groups = generate(self, prompts, group_size, max_len, seeds, temperature, top_p)
        asked = dict(group_size=group_size, max_len=max_len, seeds=seeds)
        calls.append((groups, asked | dict(temperature=temperature, top_p=top_p)))
        return groups

    monkeypatch.setattr(rollout.TorchEngine, "generate", watch)
    return calls


def whole_model(path):
    """By transformers alone."""
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)


def answer_logprobs(hf, sample, temperature, banned):
    """transformers' own forward of one sequence -> logprobs, entropy of the answer's tokens."""
    prompt = sample.prompt
    row = torch.tensor([prompt.ids + sample.ids])
    out = hf(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        mm_token_type_ids=(row == hf.config.image_token_id).int(),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid,
    )
    logits = out.logits[0, len(prompt.ids) - 1 : -1] / temperature
    log_p = logits.index_fill(1, banned, -1e30).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, torch.tensor(sample.ids)[:, None])[:, 0], entropy


def updates_by_hand(groups, config, max_len):
    """All optimizer steps of one rollout batch, sequence by sequence -> weights, metrics."""
    banned = packing.Processor(config.model).banned_ids(10**4)
    hf = whole_model(config.model)
    banned = banned[banned < hf.get_output_embeddings().weight.shape[0]]
    hf.model.visual.requires_grad_(False)
    trained = [p for p in hf.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)

    def logprobs_of(sample):
        return answer_logprobs(hf, sample, config.temperature, banned)

    advantages = naive_advantages([[s.reward for s in g] for g in groups], config.std_norm)
    start = {}  # sample -> log-probabilities of pi_old, which is the reference too
    with torch.no_grad():
        for sample in (s for g in groups for s in g):
            start[sample] = logprobs_of(sample)[0]
    metrics = dict(entropy=[], kl=[], clip_frac=[])
    norms, size = [], len(groups) // config.minibatches
    for _ in range(config.epochs):
        for first in range(0, len(groups), size):
            part = range(first, first + size)
            optimizer.zero_grad()
            for g in part:
                for sample, advantage in zip(groups[g], advantages[g]):
                    here = [groups[i] for i in part]
                    weight = naive_weight(
                        here, groups[g], sample, config.loss_mean, max_len, config.drop_zero_var
                    )
                    logprobs, entropy = logprobs_of(sample)
                    old = ref = start[sample]
                    rows = [(advantage, weight)] * len(old)
                    loss, clipped = naive_loss(logprobs, old, ref, None, rows, config)
                    loss.backward()
                    metrics["entropy"] += entropy.tolist()
                    metrics["clip_frac"] += clipped
                    d = (ref - logprobs).detach()
                    metrics["kl"] += (d.exp() - d - 1).tolist()
            norms.append(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item())
            optimizer.step()
    means = {name: sum(values) / len(values) for name, values in metrics.items()}
    return dict(hf.named_parameters()), means | dict(grad_norm=sum(norms) / len(norms))


@pytest.mark.parametrize(
    "minibatches, epochs, more",
    [
        (2, 2, dict(kl_coef=0.3)),
        (2, 1, dict(loss_mean="token", drop_zero_var=True)),
        (1, 2, dict(loss_mean="fixed", clip_eps_high=0.3)),
    ],
)
def test_a_step_is_the_papers_step_done_by_hand(
    minibatches, epochs, more, watched, problem_file, tmp_path
):
    """Rollouts come from the engine; all that follows is recomputed with transformers.

    With several minibatches or epochs pi moves away from pi_old and from the reference in between.
    This is the first of two warm-up steps, at half the learning rate.
    """
    flags = SMALL | dict(stages="16x4x1", temperature=0.8, data=problem_file, out=tmp_path)
    flags |= dict(minibatches=minibatches, epochs=epochs, micro_tokens=300) | more
    flags |= dict(lr=2e-4, warmup_steps=2, max_grad_norm=0.5)
    alone(grpo, **flags)
    ((groups, asked),) = watched
    assert asked["group_size"] == 4
    assert asked["max_len"] == 16
    assert asked["temperature"] == 0.8
    samples = [s for g in groups for s in g]
    assert any(len({s.reward for s in g}) > 1 for g in groups)

    config = grpo.Config(**flags | dict(lr=1e-4))
    weights, metrics = updates_by_hand(groups, config, 16)
    mine = dict(whole_model(tmp_path / "final").named_parameters())
    start = dict(whole_model(config.model).named_parameters())
    moved = {name: (weights[name] - start[name]).abs().max() for name in mine}
    assert max(moved.values()) > 2e-4
    for name in mine:
        error = (mine[name] - weights[name]).abs()
        # AdamW enlarges the rounding of a gradient that is nearly zero up to the learning rate.
        assert error.mean() < 1e-7, name
        assert error.max() < config.lr, name

    (row,) = log_of(tmp_path)
    right = [s for s in samples if s.score.correct and s.score.format_ok]
    wrong = [s for s in samples if not (s.score.correct and s.score.format_ok)]
    n, total = len(samples), sum(len(s.ids) for s in samples)
    metrics |= dict(
        reward=sum(s.reward for s in samples) / n,
        format_rate=sum(s.score.format_ok for s in samples) / n,
        accuracy=len(right) / n,
        len_mean=total / n,
        len_correct=sum(len(s.ids) for s in right) / len(right) if right else None,
        len_wrong=sum(len(s.ids) for s in wrong) / len(wrong) if wrong else None,
        truncated=sum(s.finish == "length" for s in samples) / n,
        tokens=total,
        zero_var_groups=sum(len({s.reward for s in g}) == 1 for g in groups),
        lr=1e-4,
    )
    for name, want in metrics.items():
        assert row[name] == pytest.approx(want, rel=1e-3, abs=1e-6), name
    assert row["clip_frac"] > 0


def test_every_log_probability_is_taken_at_the_temperature_of_sampling(problem_file, tmp_path):
    """With a learning rate of 0 pi, pi_old, the reference and the sampler are one."""
    flags = SMALL | dict(stages="16x8x1", data=problem_file, lr=0.0, temperature=0.7)
    for minibatches in (1, 2):  # without and with a pass for pi_old
        out = tmp_path / str(minibatches)
        alone(grpo, **flags, out=out, minibatches=minibatches)
        (row,) = log_of(out)
        assert row["kl"] == 0
        assert row["clip_frac"] == 0
        assert row["logprob_gap_max"] < 1e-4


def test_no_two_questions_of_a_run_share_a_seed(watched, problem_file, tmp_path):
    """A seed is that of the run, the step and the question: else draws would repeat."""
    flags = SMALL | dict(stages="8x2x3", questions=4, data=problem_file, kl_coef=0.0)
    alone(grpo, **flags | dict(out=tmp_path / "one", seed=1))
    seeds = [seed for _, asked in watched for seed in asked["seeds"]]
    assert sorted(seeds) == [(1, step, number) for step in range(3) for number in range(4)]
    asked = [g[0].prompt.record.id for groups, _ in watched for g in groups]
    assert len(set(asked)) == 12


# -------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, problem_file):
    out = tmp_path_factory.mktemp("one")
    run_grpo(out, problem_file, keep=10)
    return out


def test_log_lines_say_what_happened(one_rank):
    rows = log_of(one_rank, drop=())
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["stage"] for r in rows] == [0, 0, 0, 1, 1, 1]
    assert [(r["max_len"], r["group_size"]) for r in rows] == [(16, 8)] * 3 + [(24, 4)] * 3
    assert [r["lr"] for r in rows] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4, 1e-4])
    for r in rows:
        # What sampled is what is trained: the engine got the weights of every step.
        assert 0 <= r["logprob_gap"] <= r["logprob_gap_max"] < 1e-4
        assert r["len_mean"] <= r["max_len"]
        assert 0 <= r["accuracy"] <= r["format_rate"] <= 1
        assert r["t_total"] >= r["t_rollout"] + r["t_reward"] + r["t_logprob"] + r["t_update"]
    assert any(r["grad_norm"] > 0 for r in rows)
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0
    samples = [json.loads(line) for line in open(one_rank / "samples.jsonl")]
    assert len(samples) == 3 * 2 * 8 + 3 * 2 * 4
    assert {"completion", "reward", "why", "answer", "advantage"} <= set(samples[0])
    assert json.loads((one_rank / "config.json").read_text())["stages"] == "16x8x3,24x4x3"
    assert "--recipe toy-zero" in (one_rank / "command.txt").read_text()


def test_two_ranks_are_one_rank(one_rank, problem_file, tmp_path):
    """A small token budget makes many micro-batches, so that the split differs between the runs."""
    run_grpo(tmp_path, problem_file, ranks=2, micro_tokens=400)
    for a, b in zip(log_of(one_rank), log_of(tmp_path), strict=True):
        for key in set(a) - {"logprob_gap", "logprob_gap_max"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    a, b = weights_of(one_rank), weights_of(tmp_path)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


def killed_after(call, out, lines):
    """SIGKILL at an arbitrary moment after so many lines of the log."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(call, env=environment(), **quiet)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        log = out / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.01)
    time.sleep(random.random() * 0.3)
    kill_all(str(out))
    process.wait()


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_uninterrupted(one_rank, problem_file, tmp_path, ranks):
    """Log, samples and weights come out the same, bit by bit on one rank."""
    for lines in (1, 4):
        killed_after(command(tmp_path, problem_file, ranks), tmp_path, lines)
    with open(tmp_path / "log.jsonl", "a") as f:  # what the kill may leave behind
        f.write('{"step": 6, "rew')
    said = run_grpo(tmp_path, problem_file)  # a run of two ranks goes on with one
    assert "resumed after step" in said
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]  # the last two
    a, b = weights_of(one_rank), weights_of(tmp_path)
    if ranks == 1:
        assert log_of(tmp_path) == log_of(one_rank)
        assert (tmp_path / "samples.jsonl").read_text() == (one_rank / "samples.jsonl").read_text()
        assert all(torch.equal(a[k], b[k]) for k in a)
    else:
        assert [r["step"] for r in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


def test_without_kl_there_is_no_reference(problem_file, tmp_path, monkeypatch):
    loaded = []
    load_sharded = grpo.model.load_sharded

    def count(*args, **knobs):
        loaded.append(args)
        return load_sharded(*args, **knobs)

    monkeypatch.setattr(grpo.model, "load_sharded", count)
    flags = SMALL | dict(kl_coef=0.0, std_norm=False, loss_mean="fixed", stages="16x8x1")
    alone(grpo, **flags, data=problem_file, out=tmp_path)
    assert log_of(tmp_path)[0]["kl"] == 0
    assert len(loaded) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(kl_coef=0.0), "kl_coef = 0.01"),
        (dict(stages="16x8x3,32x4x3"), "6 steps of --stages 16x8x3,24x4x3"),
    ],
)
def test_a_folder_of_another_method_is_not_gone_on_with(one_rank, problem_file, flags, words):
    """A finished run must not take the name of settings that it never had."""
    before = (one_rank / "config.json").read_text()
    with pytest.raises(SystemExit, match=f"(?s){words}.*--no_resume"):
        alone(grpo, **SMALL | dict(data=problem_file, out=one_rank, keep=10) | flags)
    assert (one_rank / "config.json").read_text() == before


@pytest.mark.parametrize(
    "flags, hint",
    [
        (dict(stages="4Kx16xmany"), "stage 1 .*4Kx16xmany"),
        (dict(questions=7, minibatches=2), "multiple of ranks x minibatches"),
        (dict(engine="vllm", top_p=0.9), "--top_p"),
        (dict(data="no/such/file.jsonl"), "no/such/file.jsonl"),
    ],
)
def test_what_cannot_be_run_ends_with_one_line(flags, hint, problem_file, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{hint}"):
        alone(grpo, **SMALL | dict(data=problem_file, out=tmp_path) | flags)


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--clip_epss", "1"], "did you mean --clip_eps"),
        (["--recipe", "vision-r1-7"], "did you mean vision-r1-7b"),
        (["--engine", "vlm"], "invalid choice"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(argv, hint, capsys):
    with pytest.raises(SystemExit):
        run.parse_config(grpo.Config, grpo.RECIPES, argv)
    assert hint in capsys.readouterr().err


def test_the_ranks_part_at_the_end(problem_file, tmp_path):
    alone(grpo, **SMALL | dict(data=problem_file, out=tmp_path, stages="8x2x1", questions=2))
    assert not dist.is_initialized()
