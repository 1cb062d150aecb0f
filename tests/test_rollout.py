"""nano/rollout.py against transformers' generate and against the trainer's own recomputation."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

import model
from nano import packing, rollout


@pytest.fixture(scope="module")
def loaded(tiny):
    """A sharper random model: samples differ in likelihood, and greedy choices are clear."""
    policy, processor = model.load(tiny)
    with torch.no_grad():
        policy.hf.model.language_model.norm.weight.mul_(6)
    return policy, processor


def engine(loaded, **kwargs):
    policy, processor = loaded
    made = rollout.TorchEngine(model.replica(policy), processor, **kwargs)
    made.sync(policy)
    return made


def prompts_of(pictures, processor):
    return [packing.encode(record, processor) for record in pictures]


def seeds_of(prompts, *before):
    return [(*before, i) for i in range(len(prompts))]


def recomputed(policy, prompts, groups, temperature=1.0):
    """The trainer's log-probabilities of all samples, in one packed row."""
    rows = [(p, s.ids) for p, group in zip(prompts, groups) for s in group]
    with torch.no_grad():
        return policy(packing.pack(rows), temperature)[0]


def sampled(groups):
    return torch.tensor([x for group in groups for s in group for x in s.logprobs])


def test_greedy_tokens_are_those_of_generate(loaded, pictures):
    policy, processor = loaded
    prompts = prompts_of(pictures, processor)
    got = engine(loaded).generate(prompts, 1, 24, seeds_of(prompts, 0), temperature=0)
    config = copy.deepcopy(policy.hf.config)
    hf = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    hf.load_state_dict(policy.hf.state_dict())
    for prompt, (mine,) in zip(prompts, got):
        row, images = torch.tensor([prompt.ids]), {}
        if prompt.record.images:
            images = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid)
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
    narrow = engine(loaded, max_rows=5)
    groups = narrow.generate(prompts, 4, 40, seeds_of(prompts, 7), temperature)
    error = recomputed(policy, prompts, groups, temperature) - sampled(groups)
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_sample_what_the_trainer_sees(family, tmp_path, pictures):
    import toy

    policy, processor = model.load(toy.random_relative(tmp_path, family))
    prompts = prompts_of(pictures, processor)
    groups = engine((policy, processor)).generate(prompts, 3, 20, seeds_of(prompts, 7))
    assert (recomputed(policy, prompts, groups) - sampled(groups)).abs().max() < 1e-4


def test_samples_do_not_depend_on_batching(loaded, pictures):
    prompts = prompts_of(pictures, loaded[1])
    seeds = seeds_of(prompts, 1, 2)

    def ids(groups):
        return [[s.ids for s in group] for group in groups]

    want = ids(engine(loaded).generate(prompts, 6, 30, seeds))
    narrow = engine(loaded, max_rows=3, prefill_tokens=1)
    assert ids(narrow.generate(prompts, 6, 30, seeds)) == want
    backwards = engine(loaded, max_rows=7).generate(prompts[::-1], 6, 30, seeds[::-1])
    assert ids(backwards)[::-1] == want
    assert len({tuple(i) for group in want for i in group}) > 20  # they differ from each other
    other = engine(loaded).generate(prompts, 6, 30, seeds_of(prompts, 1, 3))
    assert ids(other) != want


def test_finish_reasons_and_limits(loaded, pictures):
    """A sample ends with the end token or at the limit; its text is without the end token."""
    processor = loaded[1]
    prompts, eos = prompts_of(pictures, processor), processor.eos_ids
    groups = engine(loaded).generate(prompts, 8, 60, seeds_of(prompts, 0))
    samples = [s for group in groups for s in group]
    assert {s.finish for s in samples} == {"stop", "length"}
    for group, prompt in zip(groups, prompts):
        assert len(group) == 8
        assert all(s.prompt is prompt for s in group)
    for s in samples:
        assert s.length == len(s.ids) == len(s.logprobs) <= 60
        assert (s.ids[-1] in eos) == (s.finish == "stop")
        assert not set(s.ids[:-1]) & set(eos)
        assert s.finish == "stop" or len(s.ids) == 60
        kept = s.ids[:-1] if s.finish == "stop" else s.ids
        assert s.text == processor.tokenizer.decode(kept)


def test_a_sample_of_one_token_at_a_limit_of_one(loaded, pictures):
    prompts = prompts_of(pictures, loaded[1])
    assert engine(loaded).generate([], 8, 60, []) == []
    for group in engine(loaded, max_rows=2).generate(prompts, 3, 1, seeds_of(prompts, 0)):
        assert [len(s.ids) for s in group] == [1, 1, 1]


def test_vision_tokens_are_never_sampled_even_if_the_policy_loves_them(tiny, pictures):
    policy, processor = model.load(tiny)
    with torch.no_grad():  # every hidden state now points at <|image_pad|>
        policy.hf.model.language_model.norm.weight.zero_()
        policy.hf.get_output_embeddings().weight[processor.image_token] = 50.0
    prompts = prompts_of(pictures, processor)
    groups = engine((policy, processor)).generate(prompts, 4, 20, seeds_of(prompts, 0))
    banned = set(policy.banned.tolist())
    assert processor.image_token in banned
    assert not any(banned & set(s.ids) for group in groups for s in group)


def test_sync_takes_over_every_weight(tiny):
    """A replica starts from random weights, and follows the policy as it changes."""
    policy, processor = model.load(tiny)
    made = rollout.TorchEngine(model.replica(policy), processor)
    for _ in range(2):
        made.sync(policy)
        theirs = dict(policy.hf.named_parameters())
        for name, mine in made.policy.hf.named_parameters():
            assert torch.equal(mine, theirs[name]), name
            assert mine.data_ptr() != theirs[name].data_ptr()
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(1.0)


def test_the_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, 5.0]).repeat(20000, 1)
    draws = rollout.uniforms((1, 2, 3), 20000)
    tokens, logprobs = rollout.pick(logits, draws, 0.7, 1.0, torch.tensor([3]))
    want = (torch.tensor([0.0, 1.0, 2.0]).double() / 0.7).softmax(0)
    assert (tokens.bincount(minlength=3)[:3] / 20000 - want).abs().max() < 0.012
    assert torch.allclose(logprobs, want.log()[tokens].float(), atol=1e-5)


def test_draws_follow_from_every_number_of_the_seed():
    base = rollout.uniforms((1, 2, 3, 4), 50)
    assert torch.equal(base, rollout.uniforms((1, 2, 3, 4), 50))
    assert torch.equal(base[:20], rollout.uniforms((1, 2, 3, 4), 20))
    for seed in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 3)):
        assert not (base == rollout.uniforms(seed, 50)).any()


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = rollout.uniforms((5,), 4000)
    tokens, logprobs = rollout.pick(p.log().repeat(4000, 1), draws, 1.0, 0.7, None)
    assert set(tokens.tolist()) == {0, 1}
    assert abs((tokens == 0).float().mean() - 0.625) < 0.03
    # What is reported is before the cut, as the trainer sees it.
    assert torch.allclose(logprobs, p.log()[tokens])


def test_temperature_zero_takes_the_likeliest_that_is_not_banned():
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    tokens, logprobs = rollout.pick(logits, torch.zeros(1), 0.0, 1.0, torch.tensor([3]))
    assert tokens.tolist() == [2]
    assert torch.allclose(logprobs, torch.tensor([0.0, 1.0, 2.0]).log_softmax(0)[2])
