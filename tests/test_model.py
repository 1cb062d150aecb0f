"""model.py and nano/packing.py against transformers and against plain float64."""

import copy
import functools

import pytest
import torch
from conftest import single_rank
from transformers import AutoModelForImageTextToText

import model
import toy
from nano import data, packing, rollout


@pytest.fixture(scope="module")
def loaded(tiny):
    return model.load(tiny)


def sequences(records, processor, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for record, n in zip(records, [5, 1, 17, 9, 30, 3]):
        ids = torch.randint(10, 400, (n,), generator=g).tolist()
        out.append((packing.encode(record, processor), ids))
    return out


def reference_logits(path, prompt, ids, processor):
    """transformers' own forward over one sequence -> the model, logits (r, V) of its answer."""
    hf = AutoModelForImageTextToText.from_pretrained(path)
    row, images = torch.tensor([prompt.ids + ids]), {}
    if prompt.record.images:
        images = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid)
    out = hf(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        mm_token_type_ids=(row == processor.image_token).int(),
        **images,
    )
    return hf, out.logits[0, len(prompt.ids) - 1 : -1]


def reference_logprobs(path, seqs, processor, banned):
    """The log-probabilities and entropies of all answers, one by one, in float64."""
    logprobs, entropy = [torch.zeros(0)], [torch.zeros(0)]
    for prompt, ids in seqs:
        if not ids:
            continue
        with torch.no_grad():
            logits = reference_logits(path, prompt, ids, processor)[1].double()
        log_p = logits.index_fill(1, banned, -float("inf")).log_softmax(-1)
        logprobs.append(log_p.gather(1, torch.tensor(ids)[:, None])[:, 0])
        entropy.append(-(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1))
    return torch.cat(logprobs), torch.cat(entropy)


def whole_gradients(policy):
    trained = [(n, p) for n, p in policy.named_parameters() if p.grad is not None]
    return {model.clean_name(n): model.full(p.grad).clone() for n, p in trained}


def test_mrope_positions_are_those_of_transformers(tiny, loaded, pictures):
    policy, processor = loaded
    for record in pictures:
        p = packing.encode(record, processor)
        row = torch.tensor([p.ids])
        grid = p.image_grid if len(p.image_grid) else None
        kinds = (row == processor.image_token).int()
        positions, delta = policy.hf.model.get_rope_index(row, kinds, image_grid_thw=grid)
        assert torch.equal(p.position_ids, positions[:, 0])
        assert p.next_position == delta.item() + len(p.ids)


def test_packed_forward_is_the_one_by_one_forward(tiny, loaded, pictures):
    policy, processor = loaded
    seqs = sequences(pictures, processor)
    with torch.no_grad():
        logprobs, entropy = policy(packing.pack(seqs))
    want_logprobs, want_entropy = reference_logprobs(tiny, seqs, processor, policy.banned)
    assert (logprobs - want_logprobs).abs().max() < 2e-5
    assert (entropy - want_entropy).abs().max() < 2e-5


def test_a_temperature_divides_the_logits(tiny, loaded, pictures):
    policy, processor = loaded
    prompt, ids = sequences(pictures, processor)[0]
    with torch.no_grad():
        got, _ = policy(packing.pack([(prompt, ids)]), 0.5)
        logits = reference_logits(tiny, prompt, ids, processor)[1].double()
    log_p = (logits / 0.5).index_fill(1, policy.banned, -float("inf")).log_softmax(-1)
    assert torch.allclose(got.double(), log_p.gather(1, torch.tensor(ids)[:, None])[:, 0])


def test_packed_gradients_are_the_one_by_one_gradients(tiny, pictures):
    policy, processor = model.load(tiny)
    seqs = sequences(pictures, processor)
    logprobs, _ = policy(packing.pack(seqs))
    logprobs.sum().backward()
    total = {}
    for prompt, ids in seqs:
        hf, logits = reference_logits(tiny, prompt, ids, processor)
        log_p = logits.index_fill(1, policy.banned, -1e30).log_softmax(-1)
        log_p.gather(1, torch.tensor(ids)[:, None]).sum().backward()
        for name, p in hf.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad
    mine = {n: p.grad for n, p in policy.hf.named_parameters()}
    assert set(total) == set(mine)
    for name, want in total.items():
        assert (mine[name] - want).abs().max() <= 1e-5 * max(1, want.abs().max()), name


def test_a_shared_prompt_and_its_image_go_through_once_and_change_nothing(tiny, loaded, pictures):
    """Values against transformers one by one, gradients against a Prompt for each sequence."""
    policy, processor = loaded
    chosen = (pictures[2], pictures[4], pictures[5])
    one, two, three = (packing.encode(record, processor) for record in chosen)
    rows = [(one, [20, 30, 40]), (two, [10] * 9), (one, [50]), (three, [11, 12]), (two, [])]
    rows += [(one, [60, 70]), (two, [13])]
    shared = packing.pack(rows)
    separate = packing.pack([(copy.copy(prompt), ids) for prompt, ids in rows])
    assert len(shared.image_grid) == 1 + 2
    assert len(separate.image_grid) == 3 + 3 * 2
    assert len(shared.ids) == len(separate.ids) - 2 * len(one.ids) - len(two.ids)
    assert torch.equal(shared.labels, separate.labels)
    with torch.no_grad():
        got, _ = policy(shared)
    want, _ = reference_logprobs(tiny, rows, processor, policy.banned)
    assert (got - want).abs().max() < 2e-5
    grads = []
    for batch in (shared, separate):
        policy.zero_grad()
        policy(batch)[0].sum().backward()
        grads.append(whole_gradients(policy))
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-4), name


def test_ranges_of_queries_and_keys_for_attention_on_a_gpu(loaded, pictures):
    """What varlen_attn is given there, followed by a plain float64 loop.

    The last query of a piece sits at its last key.
    """
    _, processor = loaded
    prompt, other = packing.encode(pictures[0], processor), packing.encode(pictures[5], processor)
    rows = [(prompt, [20, 30, 40]), (other, [50, 60]), (prompt, [70])]
    where = packing.pack(rows).packing
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(where.lengths), 8) for h in (4, 2, 2))
    got = model.packed_attention(None, q, k, v, None, packing=where)[0][0].double()  # (T, 4, 8)
    q, k, v = (x[0].double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    for i in range(len(where.lengths)):
        keys = where.keys[where.cu_keys[i] : where.cu_keys[i + 1]]
        for j, t in enumerate(reversed(range(where.cu_seqlens[i], where.cu_seqlens[i + 1]))):
            seen = keys[: len(keys) - j]
            weights = (torch.einsum("hd,hsd->hs", q[:, t], k[:, seen]) / 8**0.5).softmax(-1)
            want = torch.einsum("hs,hsd->hd", weights, v[:, seen])
            assert torch.allclose(got[t], want, atol=1e-5)


def test_text_only_batch_still_runs_the_vision_tower(loaded, pictures):
    policy, processor = loaded
    policy.zero_grad()
    batch = packing.pack([(packing.encode(pictures[-1], processor), [20, 21])])
    assert batch.pixel_values is None
    policy(batch)[0].sum().backward()
    grads = [p.grad for p in policy.hf.model.visual.parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_image_tokens_come_from_the_grid_and_lengths_from_the_header(loaded, real):
    _, processor = loaded
    for name in ("geometry3k", "mathvision", "mathvista"):
        records, _ = data.read(real / name / "data.jsonl")
        for record in records[:8]:
            p = packing.encode(record, processor)
            want = sum(int(g.prod()) // processor.merge_size**2 for g in p.image_grid)
            assert p.ids.count(processor.image_token) == want > 0
            assert packing.prompt_length(record, processor) == len(p.ids) == p.position_ids.shape[1]


def test_hostile_and_overlong_prompts_are_reported_and_never_cut(loaded, pictures):
    _, processor = loaded
    pictures[0].images *= 2
    problems = data.Problems()
    kept = packing.usable(pictures, processor, 34, problems)
    kinds = {p.id: p.kind for p in problems}
    assert kinds["t-0"] == "image marks" and kinds["two"] == "prompt too long"
    assert len(kept) + len(problems) == len(pictures)


def test_a_base_model_without_a_chat_template(loaded, pictures):
    processor = copy.copy(loaded[1])
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.chat_template = None
    processor.set_up({"<|image_pad|>"}, "Think .")
    text = processor.text(pictures[0])
    assert text.startswith("Think .")
    assert text.endswith("Assistant:")
    assert "<|vision_start|><|image_pad|>" in text


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_qwen_families_load_and_agree_with_transformers(family, tiny, tmp_path, pictures):
    """Tiny random Qwen2-VL and Qwen3-VL, deepstack included: packed is one by one."""
    path = toy.random_relative(tmp_path / family, family)
    policy, processor = model.load(path)
    seqs = sequences(pictures, processor)
    with torch.no_grad():
        logprobs, _ = policy(packing.pack(seqs))
    want, _ = reference_logprobs(path, seqs, processor, policy.banned)
    assert (logprobs - want).abs().max() < 3e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("freeze_vision", [False, True])
def test_sharded_loading_is_transformers_loading(family, freeze_vision, tiny, tmp_path, pictures):
    """From meta tensors and slices of safetensors: weights, buffers and log-probabilities are those
    of from_pretrained, bit by bit."""
    single_rank()
    path = tiny if family == "qwen2_5_vl" else toy.random_relative(tmp_path / family, family)
    hf = AutoModelForImageTextToText.from_pretrained(path)
    policy = model.load_sharded(path, "cpu", freeze_vision=freeze_vision)
    mine = dict(policy.hf.named_parameters())
    assert mine.keys() == {n for n, _ in hf.named_parameters()}
    assert all(torch.equal(p, model.full(mine[n])) for n, p in hf.named_parameters())
    buffers = dict(policy.hf.named_buffers())
    assert buffers.keys() == {n for n, _ in hf.named_buffers()}
    assert all(torch.equal(b, buffers[n]) for n, b in hf.named_buffers())
    whole, processor = model.load(path)
    batch = packing.pack(sequences(pictures, processor))
    with torch.no_grad():
        assert torch.equal(policy(batch)[0], whole(batch)[0])


def test_a_folder_without_all_weights_is_refused(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    single_rank()
    shutil.copytree(tiny, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    lost = [k for k in state if "layers.1" in k]
    kept = {k: v for k, v in state.items() if k not in lost}
    save_file(kept, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=f"{len(lost)} weights are not in its"):
        model.load_sharded(tmp_path / "m", "cpu")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_frozen_vision_tower_sees_an_image_once_and_nothing_changes(
    family, tiny, tmp_path, pictures
):
    path = tiny if family == "qwen2_5_vl" else toy.random_relative(tmp_path / family, family)
    policy, processor = model.load(path, freeze_vision=True)
    seqs = sequences(pictures, processor)
    with torch.no_grad():
        want, _ = policy(packing.pack(seqs))
    calls = []
    policy.hf.model.visual.register_forward_hook(lambda *_: calls.append(1))
    model.encode_once(policy, [p for p, _ in seqs], "cpu")
    model.encode_once(policy, [p for p, _ in seqs], "cpu")
    assert len(calls) == sum(bool(p.record.images) for p, _ in seqs)
    with torch.no_grad():
        for part in (seqs, seqs[::-1], seqs[:1] * 3, [s for s in seqs if not s[0].record.images]):
            got, _ = policy(packing.pack(part))
            assert len(got) == sum(len(ids) for _, ids in part)
        assert (policy(packing.pack(seqs))[0] - want).abs().max() < 1e-5
    assert len(calls) == sum(bool(p.record.images) for p, _ in seqs)


def test_compiled_blocks_change_no_gradient(tiny, pictures, monkeypatch):
    """Traced and cut around attention. The code generator is left out: it takes a minute, and it is
    PyTorch's to test."""
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    single_rank()
    grads = []
    for compiled in (False, True):
        policy = model.load_sharded(tiny, "cpu", freeze_vision=True, compile=compiled)
        policy(packing.pack(sequences(pictures, packing.Processor(tiny))))[0].sum().backward()
        grads.append(whole_gradients(policy))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-4, rtol=1e-4) for n in grads[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_something_is_compiled(tiny, pictures, monkeypatch, checkpointing):
    """Also below activation checkpointing, which every recipe of the paper uses."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    counting = functools.partialmethod(torch.nn.Module.compile, backend=count)
    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    torch._dynamo.reset()
    single_rank()
    knobs = dict(freeze_vision=True, compile=True, activation_checkpointing=checkpointing)
    policy = model.load_sharded(tiny, "cpu", **knobs)
    policy(packing.pack(sequences(pictures, packing.Processor(tiny))))[0].sum().backward()
    assert len(graphs) > 0


def test_export_reads_back_the_same(tiny, tmp_path, pictures):
    single_rank()
    policy, processor = model.load(tiny)
    batch = packing.pack(sequences(pictures, processor))
    with torch.no_grad():
        before = policy(batch)[0]
    model.shard(policy, "cpu")
    model.export(policy, processor, tmp_path / "out")
    again, _ = model.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(batch)[0], before)


def test_activation_checkpointing_changes_no_gradient_and_no_name(tiny, tmp_path, pictures):
    single_rank()
    grads = []
    for checkpointing in (False, True):
        policy, processor = model.load(tiny)
        batch = packing.pack(sequences(pictures, processor))
        model.shard(policy, "cpu", activation_checkpointing=checkpointing)
        policy(batch)[0].sum().backward()
        grads.append(whole_gradients(policy))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])
    whole = rollout.TorchEngine(model.replica(policy), processor)
    whole.sync(policy)
    model.export(policy, processor, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for (n, a), b in zip(again.named_parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("share, wrapped", [(0.0, 0), (0.5, 2), (0.99, 4), (1.0, 5)])
def test_a_share_of_the_blocks_computes_again(tiny, share, wrapped):
    single_rank()
    policy = model.load_sharded(tiny, "cpu", activation_checkpointing=share)
    names = [name for name, _ in policy.named_modules()]
    assert sum(name.endswith("_checkpoint_wrapped_module") for name in names) == wrapped


def test_a_frozen_vision_tower_has_no_gradient(tiny, pictures):
    policy, processor = model.load(tiny, freeze_vision=True)
    policy(packing.pack(sequences(pictures, processor)))[0].sum().backward()
    assert all(p.grad is None for p in policy.hf.model.visual.parameters())
    assert all(p.grad is not None for p in policy.hf.model.language_model.parameters())


def test_a_rehearsed_step_leaves_nothing_behind(tiny, pictures):
    single_rank()
    policy = model.load_sharded(tiny, "cpu")
    before = {n: model.full(p).clone() for n, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1)
    batch = packing.pack(sequences(pictures, packing.Processor(tiny)))
    model.rehearse(policy, optimizer, batch, reference=policy)
    assert all(torch.equal(before[n], model.full(p)) for n, p in policy.named_parameters())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in policy.parameters())
