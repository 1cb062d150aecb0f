"""run.py: configuration and the log; and that every recipe of every stage is a valid one."""

import dataclasses
import json

import pytest

import cold_start
import eval as evaluation
import grpo
import ptst
import sft
from nano import rollout, run, steps

STAGES = [cold_start, sft, grpo, evaluation]


@pytest.mark.parametrize("stage, recipe", [(s, r) for s in STAGES for r in s.RECIPES])
def test_every_recipe_parses(stage, recipe):
    config = run.parse_config(stage.Config, stage.RECIPES, ["--recipe", recipe])
    assert config.recipe == recipe and all(
        getattr(config, k) == v for k, v in stage.RECIPES[recipe].items()
    )
    if stage is grpo:
        assert (
            ptst.total_steps(ptst.parse(config.stages)) > 0
            and config.clip_eps == 0.2
            and config.kl_coef == 1e-2
        )  # Eq. 1


def test_the_papers_models():
    """App. A, as the table in the paper has it"""
    of = lambda name: run.parse_config(grpo.Config, grpo.RECIPES, ["--recipe", name])
    assert (
        ptst.parse(of("vision-r1-7b").stages) == ptst.SCHEDULES["vision-r1"]
        and of("vision-r1-7b").format_weight == 0
    )
    assert (
        ptst.parse(of("vision-r1-long").stages) == ptst.SCHEDULES["vision-r1-long"]
        and not of("vision-r1-7b").system_prompt
    )
    for zero in ("vision-r1-zero", "zero-ptst", "zero-sft-ptst"):
        assert of(zero).format_weight == 1 and "<think>" in of(zero).system_prompt
        assert ptst.parse(of(zero).stages) == ptst.SCHEDULES[zero]
    assert run.parse_config(sft.Config, sft.RECIPES, ["--recipe", "zero-sft"]).drop_chains
    assert (
        evaluation.RECIPES["vision-r1"] == {}
        and evaluation.Config().temperature == 0.6
        and evaluation.Config().top_p == 0.95
    )


def test_flags_have_the_last_word_and_dashes_are_allowed():
    config = run.parse_config(
        grpo.Config,
        grpo.RECIPES,
        ["--lr", "2e-6", "--recipe=vision-r1-7b", "--max-prompt-len", "99", "--no_resume"],
    )
    assert (config.lr, config.questions, config.max_prompt_len, config.resume) == (
        2e-6,
        512,
        99,
        False,
    )


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--clip-epss", "1"], "did you mean --clip_eps"),
        (["--recipe", "vision-r1-8b"], "did you mean vision-r1-7b"),
        (["--lrr=3"], "did you mean --lr"),
        (["lr"], "unknown argument 'lr'"),
        (["--questions", "many"], "invalid int value"),
    ],
)
def test_mistakes_name_the_nearest(argv, hint, capsys):
    with pytest.raises(SystemExit):
        run.parse_config(grpo.Config, grpo.RECIPES, argv)
    assert hint in capsys.readouterr().err


def test_log_is_cut_after_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "re')
    run.cut_after_step(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_folder_of_its_own():
    assert run.default_out("grpo", "toy:ci", "toy:rl-problems") == "runs/toy/grpo"
    assert (
        run.default_out("grpo", "runs/x/final", "../data/geometry3k/data.jsonl")
        == "runs/grpo-x-geometry3k"
    )
    assert (
        run.default_out("grpo", "Qwen/Qwen2.5-VL-3B", "a/train-0.parquet")
        == "runs/grpo-Qwen2.5-VL-3B-train-0"
    )


def test_one_writer_per_folder(tmp_path):
    lock = run.one_writer(tmp_path)
    with pytest.raises(SystemExit, match="another run"):
        run.one_writer(tmp_path)
    lock.close()
    run.one_writer(tmp_path)


def test_no_flag_is_dead_or_hidden_by_torchrun():
    """every field is read somewhere; none is a prefix of one of torchrun's own flags, which would swallow it"""
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    for stage in STAGES:
        for f in dataclasses.fields(stage.Config):
            assert not [t for t in theirs if t.startswith(f"--{f.name}")], f.name
    for stage in [sft, grpo, evaluation]:
        source = "".join(open(part.__file__).read() for part in (stage, run, rollout, steps))
        for f in dataclasses.fields(stage.Config):
            assert (
                source.count(f".{f.name}") + source.count(f'"{f.name}"') >= 1 or f.name == "recipe"
            ), (
                stage.__name__,
                f.name,
            )
