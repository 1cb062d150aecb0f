"""Dynamic sampling: which questions are asked and kept, held against a naive loop, and whole runs
that are stopped, or have two ranks."""

import random
from types import SimpleNamespace as Fake

import pytest
from conftest import SMALL, alone, log_of, run_grpo, single_rank, weights_of

import grpo
from nano.questions import Questions, rounds


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_first_questions_with_a_signal_are_kept(share, times):
    single_rank()
    for seed in range(20):
        rng = random.Random(seed)
        flat = [rng.random() >= share for _ in range(16 * times)]
        asked = []

        def ask(numbers, flat=flat, asked=asked):
            asked.append(list(numbers))
            prompts = [Fake(number=n) for n in numbers]
            rewards = [(0.0, 1.0 - flat[n]) for n in numbers]
            return [
                [Fake(prompt=p, reward=r, length=2) for r in pair]
                for p, pair in zip(prompts, rewards)
            ]

        groups, used, row = rounds(
            ask, lambda sample, _: sample, grpo.Config(questions=16, resample=times)
        )
        numbers = [n for some in asked for n in some]
        assert numbers == list(range(len(numbers)))  # in the order of the data, each once
        good = [n for n in numbers if not flat[n]]
        naive = (good + [n for n in numbers if flat[n]])[:16]
        assert used == sorted(naive) == [group[0].prompt.number for group in groups]
        # It stops as soon as it may, and before that each round goes on.
        assert len(good) >= 16 or len(numbers) == 16 * times
        assert sum(not flat[n] for some in asked[:-1] for n in some) < 16
        if times > 1:
            wanted = dict(drawn=len(numbers), drawn_tokens=4 * len(numbers))
            wanted |= dict(drawn_signal=len(good) / len(numbers))
            assert {key: row[key] for key in wanted} == pytest.approx(wanted)
            assert row["drawn_reward"] == pytest.approx(len(good) / len(numbers) / 2)


def test_each_step_has_its_own_places_in_the_order_of_the_data():
    single_rank()
    config = grpo.Config(questions=4, resample=3, seed=1)
    questions = Questions(list(range(60)), None, config)
    order = [questions.record(step, number) for step in range(5) for number in range(12)]
    assert sorted(order) == list(range(60))


# ---- whole runs: groups of 2 often agree, so that there is something to replace

FLAGS = SMALL | dict(stages="16x2x6", questions=8, minibatches=2, resample=3)


@pytest.fixture(scope="module")
def uninterrupted(problem_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("resample")
    alone(grpo, **FLAGS, data=problem_file, out=out)
    return out


def test_more_groups_have_a_signal(uninterrupted):
    rows = log_of(uninterrupted)
    assert {row["drawn"] for row in rows} != {8} and max(row["drawn"] for row in rows) <= 24
    for row in rows:
        kept = 8 - row["zero_var_groups"]
        assert kept == min(8, round(row["drawn"] * row["drawn_signal"]))
        assert kept == 8 or row["drawn"] == 24
        assert row["drawn_tokens"] >= row["tokens"]


def assert_equal(a, b, exact):
    for x, y in zip(log_of(a), log_of(b), strict=True):
        for key in set(x) - {"logprob_gap", "logprob_gap_max", "logprob_gap_kl", "tokens_per_s"}:
            assert x[key] == pytest.approx(y[key], rel=1e-9 if exact else 1e-3, abs=1e-5), key
    x, y = weights_of(a), weights_of(b)
    assert max((x[name] - y[name]).abs().max() for name in x) <= (0 if exact else 1e-5)


def test_stopped_and_resumed_is_uninterrupted(uninterrupted, problem_file, tmp_path):
    flags = FLAGS | dict(data=problem_file, out=tmp_path)
    alone(grpo, **flags | dict(stages="16x2x4"))
    alone(grpo, **flags)
    assert_equal(tmp_path, uninterrupted, exact=True)


def test_two_ranks_are_one(uninterrupted, problem_file, tmp_path):
    run_grpo(tmp_path, problem_file, ranks=2, **FLAGS)
    assert_equal(tmp_path, uninterrupted, exact=False)
