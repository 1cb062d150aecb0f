"""The paper's settings, read like the paper (arXiv 2503.06749): every value with its source.

What the paper leaves open is taken from its framework EasyR1 or is ours, and says so.
"""

import asyncio
import re

import pytest
import torch
from conftest import words
from PIL import Image

import cold_start
import eval as evaluation
import grpo
import ptst
import reward
import sft
from nano import run
from nano.data import Record


def settings(stage, **flags):
    """What a stage is run with."""
    return run.parse_config(stage.Config, stage.RECIPES, words(flags))


# -------------------------------------------------------------------------------------------------
# Stage 0, the cold-start data (Sec. 3.3.1, Fig. 2, App. B)


def test_the_teachers():
    config = settings(cold_start, recipe="vision-r1-cold")
    assert config.mllm_model == "Qwen/Qwen2.5-VL-72B-Instruct"  # Sec. 4.1
    assert config.reasoner_model == "deepseek-ai/DeepSeek-R1"  # Sec. 3.3.1
    assert config.temperature == 0.6  # DeepSeek-R1's model card; the paper is silent
    assert config.top_p == 0.95  # likewise
    assert config.reasoner_tokens == 16384  # ours: the cutoff length of the released SFT config


class Teacher:
    """Answers in order, and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    async def ask(self, id, step, prompt, images=""):
        self.asked.append((prompt, bool(images)))
        return dict(text=self.replies.pop(0), finish="stop")


def test_modality_bridging_shows_each_model_what_fig_2_shows(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "line.png")
    record = Record("r", "<image>What is the SLOPE?", "417", [str(tmp_path / "line.png")])
    pseudo = "CAPTION of a line. Step 1: PSEUDO step. Final Answer: 417"
    chain = "The description says that it rises. I compute again and again until it is 417. " * 2
    mllm = Teacher(pseudo, "DETAILS of the line")
    reasoner = Teacher(f"<think>{chain}</think>\nFinal Answer: 417")
    config = settings(cold_start, recipe="vision-r1-cold")
    response = asyncio.run(cold_start.bridge(config, record, mllm, reasoner))

    (first, first_sees), (second, second_sees) = mllm.asked
    ((third, third_sees),) = reasoner.asked
    # 1. Image, question and answer -> pseudo-CoT, that is a caption and step-by-step reasoning.
    assert first_sees
    assert "SLOPE" in first
    assert "417" in first
    assert "caption" in first
    assert "step by step" in first
    # 2. Image, question and pseudo-CoT -> detailed description (App. B: else it misses details).
    assert second_sees
    assert "SLOPE" in second
    assert pseudo in second
    assert "detail" in second
    # 3. Description and question -> the chain. This model sees neither image nor the answer.
    assert not third_sees
    assert "SLOPE" in third
    assert "DETAILS of the line" in third
    assert "417" not in third
    assert "PSEUDO" not in third
    for wish in ("image description", "step by step", "directly"):  # App. B
        assert wish in third
    # 4. The chain reads as if its writer had seen the image, in the form of the released data.
    assert response.startswith("<think>")
    assert "description" not in response
    assert response.endswith("</think>\n<answer> Final Answer:417 </answer>")
    # The authors' evaluation takes what stands between exactly these words and spaces.
    assert re.findall(r"<answer> Final Answer:(.*?) </answer>", response) == ["417"]
    assert reward.score(response, "417").reward == 1.0


@pytest.mark.parametrize("shown", [False, True])
def test_the_answer_may_be_shown_to_the_reasoner(shown, tmp_path):
    """Fig. 2 does not; the first author did (Osilly/Vision-R1, issue 17)."""
    Image.new("RGB", (28, 28)).save(tmp_path / "line.png")
    record = Record("r", "<image>What is the SLOPE?", "417", [str(tmp_path / "line.png")])
    mllm = Teacher("CAPTION. Final Answer: 417", "DETAILS")
    reasoner = Teacher(f"<think>{'I compute. ' * 20}</think>\nFinal Answer: 417")
    config = settings(cold_start, recipe="vision-r1-cold")
    assert not config.reasoner_sees_answer
    config.reasoner_sees_answer = shown
    asyncio.run(cold_start.bridge(config, record, mllm, reasoner))
    ((prompt, _),) = reasoner.asked
    assert ("417" in prompt) == shown
    for part in ("DETAILS", "SLOPE"):
        assert part in prompt


# -------------------------------------------------------------------------------------------------
# Stage 1, SFT -> Vision-R1-CI


@pytest.mark.parametrize(
    "recipe, model",
    [
        ("vision-r1-ci-7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("vision-r1-ci-32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("vision-r1-ci-72b", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("zero-sft", "Qwen/Qwen2.5-VL-7B-Instruct"),  # App. A, Table 6
        ("vision-r1-llamav-ci", "meta-llama/Llama-3.2-11B-Vision-Instruct"),  # Table 2
    ],
)
def test_cold_start_initialization(recipe, model):
    config = settings(sft, recipe=recipe)
    assert config.model == model
    assert config.epochs == 2  # Sec. 4.1
    assert config.lr == 5e-6  # released config
    assert config.warmup_ratio == 0.05  # released config
    assert config.cutoff == 16384  # released config
    assert config.batch_size == 32  # released config: 8 GPUs x 1 x 4, or 32 GPUs
    assert config.beta2 == 0.999  # released config: it leaves the optimizer at its defaults
    assert config.max_pixels == 0  # the paper does not limit pictures
    assert not config.freeze_vision  # Sec. 4.1: all parameters are trained
    assert config.drop_chains == (recipe == "zero-sft")  # Table 6: SFT without the chains
    assert not config.system_prompt


def test_sft_as_the_released_file_does_it():
    """It freezes the tower and the projector, which model.py freezes as one, and limits pictures;
    all else is as in the paper's own recipe."""
    released = vars(settings(sft, recipe="vision-r1-ci-7b-released"))
    paper = vars(settings(sft, recipe="vision-r1-ci-7b"))
    changed = {name: value for name, value in released.items() if value != paper[name]}
    assert changed.pop("recipe") == "vision-r1-ci-7b-released"
    changed.pop("out")
    assert changed == dict(freeze_vision=True, max_pixels=768 * 768)


def test_the_learning_rate_of_sft_is_a_cosine_after_5_percent_of_warm_up():
    """Released config: 200K records in batches of 32, 2 epochs."""
    config, total = settings(sft, recipe="vision-r1-ci-7b"), 12500
    rates = [sft.learning_rate(step, total, config) for step in range(total)]
    assert max(rates) == rates[624] == rates[625] == 5e-6  # 625 steps are 5 percent
    assert rates[0] == pytest.approx(5e-6 / 625)
    assert rates[625 + 11875 // 2] == pytest.approx(2.5e-6, rel=1e-3)
    assert rates[-1] < 1e-12
    assert rates[625:] == sorted(rates[625:], reverse=True)


# -------------------------------------------------------------------------------------------------
# Stage 2, RL (Sec. 3.4)

FULL = [(4096, 16, 100), (8192, 8, 100)]  # Sec. 3.4: 4K x 16, then 8K x 8, 100 steps each
# App. A: model before RL, stages, system prompt and format reward (Zero's 1:1)
APP_A = {
    "vision-r1-7b": ("runs/vision-r1-ci-7b/final", FULL, False),
    # 20K more problems, in the setting of stage 2
    "vision-r1-32b": ("runs/vision-r1-ci-32b/final", [FULL[0], (8192, 8, 200)], False),
    "vision-r1-72b": ("runs/vision-r1-ci-72b/final", [FULL[0], (8192, 8, 200)], False),
    "vision-r1-long": ("runs/vision-r1-ci-7b/final", [(16384, 4, 300)], False),
    "vision-r1-zero": ("Qwen/Qwen2.5-VL-7B-Instruct", [(4096, 16, 300)], True),
    "zero-ptst": ("Qwen/Qwen2.5-VL-7B-Instruct", FULL, True),  # Table 6
    "zero-sft-ptst": ("runs/zero-sft/final", FULL, True),  # Table 6
}


@pytest.mark.parametrize("recipe", APP_A)
def test_the_models_of_app_a(recipe):
    model, stages, zero = APP_A[recipe]
    config = settings(grpo, recipe=recipe)
    assert config.model == model
    assert [tuple(stage) for stage in ptst.parse(config.stages)] == stages
    assert all(length * group == 64 * 1024 for length, group, _ in stages)  # Sec. 3.4
    assert config.format_weight == (1.0 if zero else 0.0)  # App. A: format + result, 1:1
    assert bool(config.system_prompt) == zero  # Sec. 3.4: none after the cold start
    assert not zero or "<think>" in config.system_prompt

    assert config.clip_eps == 0.2  # Eq. 1
    assert config.clip_eps_high in (0.0, 0.2)  # Eq. 1: both sides alike
    assert config.kl_coef == 1e-2  # Eq. 1, beta
    assert config.std_norm  # Eq. 1: (r - mean) / std
    assert config.loss_mean == "sequence"  # Eq. 1: the mean over the G answers
    assert not config.drop_zero_var
    assert not config.tis
    assert config.lr == 1e-6  # EasyR1; the paper is silent, as on all that follows
    assert config.warmup_steps == 0  # EasyR1
    assert config.weight_decay == 1e-2  # EasyR1
    assert config.max_grad_norm == 1.0  # EasyR1
    assert config.questions == 512  # EasyR1's rollout batch
    assert config.questions // config.minibatches == 128  # EasyR1's batch per update
    assert config.epochs == 1  # EasyR1
    assert config.temperature == 1.0  # EasyR1
    assert config.top_p == 1.0  # EasyR1
    assert not config.freeze_vision
    assert config.max_pixels == config.min_pixels == 0
    assert not config.prefill
    assert config.keep * config.save_every == 50  # Tables 5, 6: every fifth of the last 50 steps
    assert config.save_every == 5


def test_every_recipe_of_rl_is_pinned_here():
    toys = {name for name in grpo.RECIPES if name.startswith("toy")}
    # The paper has no 3B and trains all weights.
    ours = {"vision-r1-3b", "vision-r1-7b-lora-1gpu", "vision-r1-3b-lora-24gb"}
    assert set(grpo.RECIPES) - toys == {*APP_A, "r1-zero-base"} | ours


def test_every_recipe_of_sft_is_pinned_here():
    papers = {f"vision-r1-ci-{size}" for size in ("7b", "32b", "72b")}
    others = {"zero-sft", "vision-r1-llamav-ci", "vision-r1-ci-7b-released"}
    assert papers | others <= set(sft.RECIPES)


def test_the_neighbour_starts_from_a_base_model():
    """arXiv 2503.05132: R1-Zero on Qwen2-VL-2B, straight on SAT, without SFT."""
    config = settings(grpo, recipe="r1-zero-base")
    assert config.model == "Qwen/Qwen2-VL-2B"
    assert config.data == "array/SAT"
    ((max_len, group_size, steps),) = ptst.parse(config.stages)
    assert (max_len, group_size) == (700, 8)  # their script; TRL's default
    assert steps * config.questions == 2 * 15_000  # their script: 2 epochs of 15K problems
    assert config.questions == 8  # their script: 4 GPUs x 1 x 2
    assert config.max_pixels == 401_408  # their script
    assert config.format_weight == 1.0  # their script: accuracy and format
    assert (config.lr, config.kl_coef, config.weight_decay) == (1e-6, 0.04, 0.0)  # TRL's defaults
    # their prompt, word for word: it ends in <think>
    user = "\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>"
    assert config.system_prompt.endswith("and then provides the user with the answer.")
    assert config.system_prompt.startswith("A conversation between User and Assistant. ")
    assert user.endswith(f"Assistant:{config.prefill}")


def test_ptst_in_plain_sight():
    assert grpo.STAGES == FULL  # Eq. 2
    assert ptst.parse(grpo.Config().stages) == ptst.parse(FULL)
    at = [ptst.stage_at(FULL, step) for step in (0, 99, 100, 199)]
    assert [stage.max_len for _, stage in at] == [4096, 4096, 8192, 8192]
    assert ptst.total_steps(FULL) == 200


@pytest.mark.parametrize(
    "completion, cut, hard, zeros",
    [
        ("<think>I see.</think><answer>7</answer>", False, 1.0, 2.0),
        ("<think>I see.</think><answer>8</answer>", False, 0.0, 1.0),  # the format alone
        ("The answer is 7", False, 0.0, 0.0),
        ("<think>I see.</think><answer>7</answer>", True, 0.0, None),  # cut at the limit
    ],
)
def test_the_hard_formatting_result_reward(completion, cut, hard, zeros):
    """Sec. 3.4: 1 only when format AND answer are right. App. A: Zero adds both, 1:1."""
    assert reward.score(completion, "7", None, cut, 0.0).reward == hard
    if zeros is not None:
        right_format = reward.score("<think>a</think><answer>8</answer>", "7", None, False, 1.0)
        both = reward.score("<think>a</think><answer>7</answer>", "7", None, False, 1.0)
        assert both.reward == pytest.approx(2 * right_format.reward)  # the weights are equal
        score = reward.score(completion, "7", None, cut, 1.0)
        assert score.reward == pytest.approx(zeros * right_format.reward)


def test_eq_1_on_paper():
    """Four answers, one of them right: advantages (r - mean) / std; k3 of a halved probability."""
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4)  # std = 1/2
    half = torch.tensor([0.5]).log()
    assert grpo.k3(half, 2 * half).item() == pytest.approx(0.5 - torch.tensor(0.5).log() - 1)


# -------------------------------------------------------------------------------------------------
# Evaluation (Sec. 4.1)


def test_evaluation():
    config = settings(evaluation, recipe="vision-r1")
    assert config.temperature == 0.6
    assert config.top_p == 0.95
    assert config.max_len == 16384  # up to 16K new tokens
    assert not config.system_prompt
    assert evaluation.RECIPES["vision-r1"] == {}  # the defaults are the paper's
