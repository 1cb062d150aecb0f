"""rollout.py against transformers' generate and against the trainer's own recomputation."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

import model
from nano import packing, rollout


@pytest.fixture(scope="module")
def loaded(tiny):
    """a sharper random model, so that samples differ in likelihood and greedy choices are clear"""
    policy, processor = model.load(tiny)
    with torch.no_grad():
        policy.hf.model.language_model.norm.weight.mul_(6)
    return policy, processor


def engine(loaded, **kwargs):
    policy, processor = loaded
    e = rollout.TorchEngine(model.replica(policy), processor, policy.banned, **kwargs)
    e.sync(policy)
    return e


def prompts_of(pictures, processor):
    return [packing.encode(r, processor) for r in pictures]


def test_greedy_tokens_are_those_of_generate(loaded, pictures):
    policy, processor = loaded
    prompts = prompts_of(pictures, processor)
    got = engine(loaded).generate(
        prompts, 1, 24, [(0, i) for i in range(len(prompts))], temperature=0
    )
    hf = AutoModelForImageTextToText.from_config(
        copy.deepcopy(policy.hf.config), attn_implementation="sdpa"
    )
    model.copy_weights(policy, hf)
    for prompt, (mine,) in zip(prompts, got):
        row = torch.tensor([prompt.ids])
        images = (
            dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid)
            if prompt.record.images
            else {}
        )
        want = hf.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=24,
            do_sample=False,
            mm_token_type_ids=(row == processor.image_token).int(),
            eos_token_id=processor.eos_ids,
            suppress_tokens=policy.banned.tolist(),
            pad_token_id=0,
            **images,
        )
        assert mine.ids == want[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_trainers(loaded, pictures, temperature):
    policy, processor = loaded
    prompts = prompts_of(pictures, processor)
    groups = engine(loaded, max_rows=5).generate(
        prompts, 4, 40, [(7, i) for i in range(len(prompts))], temperature
    )
    sequences = [(p, r.ids) for p, g in zip(prompts, groups) for r in g]
    with torch.no_grad():
        logprobs, _ = policy(packing.pack(sequences), temperature)
    sampled = torch.tensor([x for g in groups for r in g for x in r.logprobs])
    assert (logprobs - sampled).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_sample_what_the_trainer_sees(family, tmp_path, pictures):
    import toy

    policy, processor = model.load(toy.random_relative(tmp_path, family))
    prompts = prompts_of(pictures, processor)
    groups = engine((policy, processor)).generate(
        prompts, 3, 20, [(7, i) for i in range(len(prompts))]
    )
    with torch.no_grad():
        logprobs, _ = policy(packing.pack([(p, r.ids) for p, g in zip(prompts, groups) for r in g]))
    assert (
        logprobs - torch.tensor([x for g in groups for r in g for x in r.logprobs])
    ).abs().max() < 1e-4


def test_samples_do_not_depend_on_batching(loaded, pictures):
    prompts = prompts_of(pictures, loaded[1])
    seeds = [(1, 2, i) for i in range(len(prompts))]
    want = engine(loaded).generate(prompts, 6, 30, seeds)
    ids = [[r.ids for r in g] for g in want]
    narrow = engine(loaded, max_rows=3, prefill_tokens=1).generate(prompts, 6, 30, seeds)
    assert [[r.ids for r in g] for g in narrow] == ids
    backwards = engine(loaded, max_rows=7).generate(prompts[::-1], 6, 30, seeds[::-1])
    assert [[r.ids for r in g] for g in backwards[::-1]] == ids
    assert len({tuple(i) for g in ids for i in g}) > 20  # and they differ from each other


def test_finish_reasons_and_limits(loaded, pictures):
    prompts = prompts_of(pictures, loaded[1])
    eos = loaded[1].eos_ids
    rollouts = [
        r for g in engine(loaded).generate(prompts, 8, 60, [(0, i) for i in range(6)]) for r in g
    ]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert len(r.ids) == len(r.logprobs) <= 60
        assert (r.ids[-1] in eos) == (r.finish == "stop") and not set(r.ids[:-1]) & set(eos)
        assert r.finish == "stop" or len(r.ids) == 60


def test_vision_tokens_are_never_sampled_even_if_the_policy_loves_them(tiny, pictures):
    policy, processor = model.load(tiny)
    with torch.no_grad():  # every hidden state now points at <|image_pad|>
        policy.hf.model.language_model.norm.weight.zero_()
        policy.hf.get_output_embeddings().weight[processor.image_token] = 50.0
    groups = engine((policy, processor)).generate(
        prompts_of(pictures, processor), 4, 20, [(0, i) for i in range(6)]
    )
    banned = set(policy.banned.tolist())
    assert processor.image_token in banned and not any(
        banned & set(r.ids) for g in groups for r in g
    )


def test_the_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, 5.0]).repeat(20000, 1)
    u = rollout.uniforms((1, 2, 3), 20000)
    banned = torch.tensor([3])
    tokens, logprobs = rollout.sample(logits, u, 0.7, 1.0, banned)
    want = (torch.tensor([0.0, 1.0, 2.0]).double() / 0.7).softmax(0)
    assert (tokens.bincount(minlength=3)[:3] / 20000 - want).abs().max() < 0.012
    assert torch.allclose(logprobs, want.log()[tokens].float(), atol=1e-5)


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens, logprobs = rollout.sample(
        p.log().repeat(4000, 1), rollout.uniforms((5,), 4000), 1.0, 0.7, None
    )
    assert set(tokens.tolist()) == {0, 1}
    assert abs((tokens == 0).float().mean() - 0.625) < 0.03
    assert torch.allclose(
        logprobs, p.log()[tokens]
    )  # reported before the cut, as the trainer sees it
