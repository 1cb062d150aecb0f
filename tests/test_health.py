"""What a run says about itself: warnings with a knob, each once, and the rollouts in trackers."""

import json
import math
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import SMALL, alone, single_rank
from test_grpo import answer

import grpo
from nano import data, health, packing, run, trackers

FINE = dict(stage=0, max_len=96, group_size=8, tokens=4000, reward=0.6, format_rate=0.95)
FINE |= dict(truncated=0.05, len_mean=60.0, entropy=0.3, kl=0.01, logprob_gap=0.001)
FINE |= dict(zero_var_groups=4, t_total=2.0, t_rollout=1.0, t_update=0.8, t_eval=0.0)
FINE |= dict(tokens_per_s=2000.0)


def rows(*parts):
    """Steps of (count, changes)."""
    rows = [FINE | changes for count, changes in parts for _ in range(count)]
    return [row | dict(step=step) for step, row in enumerate(rows, 1)]


def warned(log, folder="none"):
    watch = health.Health(folder, 100, 8)
    return [(row["step"], said) for row in log for said in watch.warnings(row)]


@pytest.mark.parametrize(
    "changes, words, knob",
    [
        (dict(zero_var_groups=8, reward=0.4), "nothing is learned (mean reward 0.40)", "--data"),
        (dict(truncated=0.7, format_rate=0.3), "of the answers are cut at the limit", "--stages"),
        (dict(format_rate=0.3), "of the answers have the format", "--format_weight"),
        (dict(reward=0.1), "the reward has fallen to", "--lr"),
        (dict(len_mean=10.0), "answers have shrunk from 60 to", "tools.viewer"),
        (dict(entropy=2.0), "entropy has grown from 0.30 to", "--kl_coef"),
        (dict(kl=1.5), "nats per token from its start", "--kl_coef"),
        (dict(logprob_gap=0.05), "nats per token, 0.001 at first", "--tis"),
    ],
)
def test_a_trouble_is_told_once_with_its_knob(changes, words, knob):
    """It shows when the mean of five steps is out of range, and no other rule speaks."""
    ((step, said),) = warned(rows((10, {}), (30, changes), (20, {}), (20, changes)))
    assert 10 < step <= 15
    assert words in said
    assert knob in said


def test_every_rule_has_been_tried():
    assert len(health.RULES) == 8


def test_every_knob_exists():
    text = " ".join(health.RULES)
    flags = {word.removeprefix("--") for word in re.findall(r"--\w+", text)}
    assert flags
    assert flags <= set(grpo.Config.__dataclass_fields__)


def test_a_healthy_run_says_nothing_and_gaps_in_numbers_do_not_matter():
    assert not warned(rows((50, {})))
    assert not warned(rows((50, dict(entropy=None, kl=math.nan))))
    one_bad_step = dict(zero_var_groups=8, truncated=1.0, reward=0.0)
    assert not warned(rows((10, {}), (1, one_bad_step), (20, {})))


def test_a_resumed_run_does_not_repeat_itself(tmp_path):
    log = rows((10, {}), (30, dict(kl=1.5)))
    whole = warned(log)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log[:20]))
    assert len(whole) == 1
    assert not warned(log[20:], tmp_path)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log[:11]))
    assert warned(log[11:], tmp_path) == whole


def test_the_line_tells_end_speed_shares_and_signal(monkeypatch):
    clock = iter(range(0, 10_000, 30))  # a step takes 30 s, whatever its own timer says
    monkeypatch.setattr(health.time, "time", lambda: float(next(clock)))
    watch = health.Health("none", 100, 8)
    log = rows((40, {}))
    log[25] |= dict(t_eval=10.0, t_total=12.0)  # a validation: 10 s of the 50 s of 20 steps
    said = [line for row in log for line in watch.see(row)]
    steps = [int(line.split()[1].rstrip(":")) for line in said]
    assert steps == [2, 5, 10, 15, 20, 25, 30, 35, 40]
    assert said[-1] == (
        "step 40: 0:30:00 to go at the pace of the last 20 steps; 2,000 tokens/s; "
        "rollout 40%, update 32%, eval 20%; 50% of the groups have a signal"
    )


# -------------------------------------------------------------------------------------------------
# trackers


class Recorder(ModuleType):
    """Stands for the packages wandb and tensorboard."""

    def __init__(self, name="wandb"):
        super().__init__(name)
        self.calls = []
        self.Image = lambda picture: ("image", picture.size)
        self.Table = lambda columns: SimpleNamespace(
            columns=columns, rows=[], add_data=lambda *row: self.calls.append(("row", row))
        )
        self.SummaryWriter = lambda folder: self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **more: self.calls.append((name, *args, more))


def test_wandb_gets_a_table_of_rollouts_every_eval_every(problem_file, tmp_path, monkeypatch):
    """Picture, completion, reward and reason of the same rollouts as in samples.jsonl."""
    fake = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = dict(data=problem_file, out=tmp_path, stages="12x4x3", eval_every=2, wandb=True)
    alone(grpo, **SMALL | flags)
    logged = [call[1:] for call in fake.calls if call[0] == "log"]
    assert [more["step"] for numbers, more in logged if "reward" in numbers] == [1, 2, 3]
    assert [more["step"] for numbers, more in logged if "rollouts" in numbers] == [2, 3]
    table = next(numbers["rollouts"] for numbers, _ in logged if "rollouts" in numbers)
    assert table.columns[0] == "picture"
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    samples = [sample for sample in samples if sample["step"] in (2, 3)]
    drawn = [call[1] for call in fake.calls if call[0] == "row"]
    assert len(drawn) == len(samples) == 2 * 2 * 4
    for (images, *cells), sample in zip(drawn, samples):
        assert images[0][0] == "image"
        assert cells == [sample[name] for name in table.columns[1:]]


def test_tensorboard_gets_texts_verbatim_and_each_picture_once(tiny, pictures, tmp_path):
    writer = Recorder("tensorboard")
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    board = object.__new__(trackers.TensorBoard)
    board.writer = module.SummaryWriter("x")
    prompt = packing.encode(pictures[4], packing.Processor(tiny))  # two pictures
    samples = [answer(3, 1.0, prompt=prompt), answer(5, 0.0, prompt=prompt)]
    for sample in samples:
        sample.text, sample.score = "# <b>7</b>\n| a | b |", SimpleNamespace(why="wrong")
    board.rollouts(samples, 40)
    texts = [call for call in writer.calls if call[0] == "add_text"]
    assert [call[1] for call in texts] == ["rollouts/0", "rollouts/1"]
    assert "    completion: # <b>7</b>\n    | a | b |\n" in texts[0][2]
    assert "reward: 1.0" in texts[0][2]
    assert all(line.startswith("    ") for line in texts[0][2].splitlines())
    images = [call for call in writer.calls if call[0] == "add_image"]
    assert [call[1] for call in images] == ["pictures/0-0", "pictures/0-1"]
    want = np.asarray(data.load_image(pictures[4].images[0]))
    assert np.array_equal(images[0][2], want)
    assert {call[3] for call in texts + images} == {40}
    board.numbers(dict(reward=0.5, nothing=math.nan, name="x"), 3)
    assert [call[1:4] for call in writer.calls if call[0] == "add_scalar"] == [("reward", 0.5, 3)]


def test_a_tracker_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    single_rank()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--wandb needs a package: pip install wandb"):
        run.Log(tmp_path, grpo.Config(wandb=True))
