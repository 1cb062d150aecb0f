"""nano/run.py: settings, the folder of a run, its log and its checkpoints; every recipe of every
stage is a valid one."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, single_rank

import cold_start
import eval as evaluation
import grpo
import ptst
import sft
from nano import checkpoint, run

STAGES = [cold_start, sft, grpo, evaluation]
RESUMED = [sft, grpo, evaluation]  # those that take their folder with run.claim

# -------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize("stage, recipe", [(s, r) for s in STAGES for r in s.RECIPES])
def test_every_recipe_parses(stage, recipe):
    config = run.parse_config(stage.Config, stage.RECIPES, ["--recipe", recipe])
    assert config.recipe == recipe
    assert all(getattr(config, k) == v for k, v in stage.RECIPES[recipe].items())
    if stage is grpo:
        assert ptst.total_steps(ptst.parse(config.stages)) > 0


def parse(*argv):
    return run.parse_config(grpo.Config, grpo.RECIPES, list(argv))


def test_without_a_recipe_the_toy_runs_and_with_files_of_ones_own_the_papers_values_hold():
    toy = parse("--recipe", "toy")
    assert parse() == toy
    assert parse("--data", "toy:rl-problems", "--model=toy:base").questions == toy.questions
    for own in (["--data", "my.jsonl"], ["--model=my/model"]):
        config = parse(*own)
        name, _, value = own[0].lstrip("-").partition("=")
        expected = grpo.Config(recipe="")
        setattr(expected, name, value or own[1])
        assert config == expected
    assert parse("--data", "my.jsonl", "--recipe", "toy").lr == toy.lr


def test_flags_have_the_last_word_and_dashes_are_allowed():
    config = parse(
        *("--lr", "2e-6", "--recipe=vision-r1-7b", "--max-prompt-len", "99", "--no_resume")
    )
    assert config.lr == 2e-6
    assert config.questions == 512
    assert config.max_prompt_len == 99
    assert not config.resume


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--clip-epss", "1"], "did you mean --clip_eps"),
        (["--recipe", "vision-r1-8b"], "did you mean vision-r1-7b"),
        (["--lrr=3"], "did you mean --lr?"),
        (["--lerning_rate", "3"], "did you mean --lr?"),
        (["--learning-rate=3"], "did you mean --lr?"),
        (["--strict", "perhaps"], "neither True nor False"),
        (["lr"], "unknown argument 'lr'"),
        (["--questions", "many"], "invalid int value"),
    ],
)
def test_mistakes_name_the_nearest(argv, hint, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert hint in capsys.readouterr().err


def test_switches_can_be_given_in_three_ways():
    for words, value in (("--strict", True), ("--strict False", False), ("--no-strict", False)):
        assert parse(*words.split()).strict is value
    assert parse("--system_prompt=--a-b=c").system_prompt == "--a-b=c"


def test_no_flag_is_dead_or_hidden_by_torchrun():
    """Every field is read somewhere; none is a prefix of one of torchrun's own flags, which would
    swallow it."""
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    machinery = "".join(path.read_text() for path in sorted((ROOT / "nano").glob("*.py")))
    for stage in STAGES:
        source = Path(stage.__file__).read_text() + machinery
        for field in dataclasses.fields(stage.Config):
            assert not [option for option in theirs if option.startswith(f"--{field.name}")]
            # cold_start.py reads the fields of its two teachers by the teacher's name.
            names = [field.name, field.name.removeprefix("mllm_").removeprefix("reasoner_")]
            read = any(f".{name}" in source or f'"{name}"' in source for name in names)
            assert read or field.name == "recipe", (stage.__name__, field.name)


def test_an_old_sub_command_says_where_it_went(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ptst.py", "plot", "runs/x"])
    with pytest.raises(SystemExit) as ended:
        run.moved({"plot": "python -m tools.plot"})
    assert ended.value.code == 2
    assert "python -m tools.plot" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["ptst.py", "4Kx16x100"])
    run.moved({"plot": "python -m tools.plot"})
    monkeypatch.setattr("sys.argv", ["ptst.py"])
    run.moved({"plot": "python -m tools.plot"})


@pytest.mark.parametrize("error", [ValueError("x is wrong"), FileNotFoundError("no file x")])
def test_what_is_wrong_with_a_users_file_ends_in_one_line(error):
    with pytest.raises(SystemExit, match=f"error: {error}"):
        with run.for_people():
            raise error
    with pytest.raises(KeyError):  # a fault of the program keeps its traceback
        with run.for_people():
            raise KeyError("x")


# -------------------------------------------------------------------------------------------------
# the folder


def test_a_folder_of_its_own():
    assert run.default_out("grpo", "toy:ci", "toy:rl-problems") == "runs/toy/grpo"
    named = run.default_out("grpo", "runs/x/final", "../data/geometry3k/data.jsonl")
    assert named == "runs/grpo-x-geometry3k"
    named = run.default_out("grpo", "Qwen/Qwen2.5-VL-3B", "a/train-0.parquet")
    assert named == "runs/grpo-Qwen2.5-VL-3B-train-0"


def test_one_writer_per_folder(tmp_path):
    lock = run.one_writer(tmp_path)
    with pytest.raises(SystemExit, match="another run"):
        run.one_writer(tmp_path)
    lock.close()
    run.one_writer(tmp_path).close()


def claimed(config, how_only):
    """run.claim, and the lock is given back as at the end of a process."""
    single_rank()
    try:
        return run.claim(config, how_only)
    finally:
        for lock in run.locks:
            lock.close()
        run.locks.clear()


def another(value):
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value}x"


FIELDS = [(stage, f.name) for stage in RESUMED for f in dataclasses.fields(stage.Config)]


@pytest.mark.parametrize("stage, name", [(s, n) for s, n in FIELDS if n not in ("out", "resume")])
def test_a_changed_setting_is_refused_unless_it_only_says_how(stage, name, tmp_path):
    """Opt-out: a new field is compared from the day that it is added."""
    config = stage.Config(out=str(tmp_path))
    assert claimed(config, stage.HOW_ONLY) == {}
    run.Log(tmp_path, config)
    assert claimed(config, stage.HOW_ONLY)["out"] == str(tmp_path)
    old = getattr(config, name)
    setattr(config, name, another(old))
    if name in ("recipe", *stage.HOW_ONLY):
        assert claimed(config, stage.HOW_ONLY)[name] == old
    else:
        with pytest.raises(SystemExit, match=f"(?s){name} = .*--no_resume"):
            claimed(config, stage.HOW_ONLY)


METHOD = {  # a change of these changes the numbers
    grpo: "model data holdout seed questions minibatches epochs system_prompt format_weight "
    "clip_eps clip_eps_high kl_coef std_norm loss_mean drop_zero_var tis temperature top_p "
    "max_prompt_len engine lr warmup_steps weight_decay max_grad_norm freeze_vision",
    sft: "model data holdout seed drop_chains system_prompt cutoff epochs batch_size lr "
    "warmup_ratio weight_decay max_grad_norm freeze_vision",
    evaluation: "model data seed temperature top_p max_len samples system_prompt",
}


@pytest.mark.parametrize("stage", RESUMED)
def test_nothing_that_changes_the_numbers_counts_as_how(stage):
    fields = {f.name for f in dataclasses.fields(stage.Config)}
    method = set(METHOD[stage].split())
    assert method <= fields
    assert set(stage.HOW_ONLY) <= fields
    assert not set(stage.HOW_ONLY) & method


def test_no_resume_removes_the_run_and_nothing_else(tmp_path):
    config = grpo.Config(out=str(tmp_path), resume=False)
    for name in ("checkpoints/step-000001/x", "final/x", "log.jsonl", "config.json", "mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert claimed(config, grpo.HOW_ONLY) == {}
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"mine.txt", ".lock"}


# -------------------------------------------------------------------------------------------------
# log and checkpoints


def test_the_log_is_cut_after_the_checkpoint(tmp_path):
    lines = "".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "re'
    (tmp_path / "log.jsonl").write_text(lines)
    twice = "".join(json.dumps({"step": s, "n": n}) + "\n" for s in range(1, 6) for n in range(2))
    (tmp_path / "samples.jsonl").write_text(twice)
    single_rank()
    log = run.Log(tmp_path, grpo.Config(), after_step=3)
    log.write({"step": 4, "third": 1 / 3, "nothing": float("nan"), "kind": "new"})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[:3] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert rows[3:] == [{"step": 4, "third": 0.333333, "nothing": None, "kind": "new"}]
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]


def test_read_log_gives_the_steps_in_order_and_skips_a_half_line(tmp_path, capsys):
    row = dict(stage=0, max_len=16, group_size=4, len_mean=3.0, tokens=48)
    rows = [row | dict(step=2, reward=0.1), row | dict(step=1), row | dict(step=2, reward=0.2)]
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "sta'
    (tmp_path / "log.jsonl").write_text(text)
    for source in (tmp_path, tmp_path / "log.jsonl"):
        assert run.read_log(source) == [rows[1], rows[2]]
    assert "log.jsonl:4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such file"):
        run.read_log(tmp_path / "nowhere")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n')
    with pytest.raises(ValueError, match="is it a grpo.py run"):
        run.read_log(tmp_path)


def test_the_timer_adds_up_each_part():
    timer = run.Timer("rollout", "update")
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    row = timer.row()
    assert list(row) == ["t_rollout", "t_update", "t_total"]
    assert 0.04 <= row["t_rollout"] <= row["t_total"]
    assert row["t_update"] == 0


def trained(layer, optimizer, steps):
    for _ in range(steps):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_brings_weights_and_moments_back(tmp_path):
    """The newest of two is read, the oldest of three is gone; training goes on bit by bit."""
    single_rank()
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(3, 2)
        pairs.append((layer, torch.optim.AdamW(layer.parameters(), lr=0.1)))
    (layer, optimizer), (other, fresh) = pairs
    assert checkpoint.load(tmp_path, other, fresh) == 0
    for step in (1, 2, 3):
        trained(layer, optimizer, 1)
        checkpoint.save(tmp_path, step, layer, optimizer, keep=2)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["step-000002", "step-000003"]
    (tmp_path / "checkpoints" / "writing-000004").mkdir()  # killed while it was written
    assert checkpoint.load(tmp_path, other, fresh) == 3
    trained(layer, optimizer, 2)
    trained(other, fresh, 2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def test_sums_and_maxima_over_the_ranks_are_named():
    single_rank()
    assert run.all_sum({"a": 1, "b": 2.5}) == {"a": 1.0, "b": 2.5}
    assert run.all_max(3) == 3.0
    assert run.on_main_first(lambda: "made") == "made"
    with pytest.raises(KeyError):
        run.on_main_first(lambda: {}["x"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("words", [["--help"], ["--recipe", "toy", "--help"]])
def test_help_names_every_flag_with_its_comment_and_loads_no_torch(stage, words):
    call = [sys.executable, "-X", "importtime", stage.__file__, *words]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "torch" not in done.stderr
    assert all(name in done.stdout for name in stage.RECIPES)
    source = Path(stage.__file__).read_text()
    for field in dataclasses.fields(stage.Config):
        (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"  --{field.name} ")]
        default, _, comment = re.search(rf"\n    {field.name}: .*? = (.*)", source)[1].partition(
            "  # "
        )
        shown = re.sub(r".+\((\w+)\)$", r"\1", default)  # Of f(STAGES) the name.
        assert f"  --{field.name} {shown}" in line and comment in line
