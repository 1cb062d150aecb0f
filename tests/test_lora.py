"""LoRA: what the adapters compute, what is trained, saved and merged, and whole runs on one and two
ranks. The references are products in float64, transformers, and peft where it is installed."""

import json

import pytest
import torch
from conftest import ROOT, SMALL, alone, log_of, run_grpo, single_rank, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import grpo
import model
import sft
from nano import budget, lora, packing
from tools import export

CPU = torch.device("cpu")


def adapted(path, vision=False, noise=0.1, **knobs):
    """A sharded policy with adapters that are not zero, and a batch of the pictures."""
    single_rank()
    knobs = dict(freeze_vision=not vision, adapters=(4, 8.0, vision)) | knobs
    policy = model.load_sharded(path, CPU, **knobs)
    torch.manual_seed(0)
    for layer in lora.layers(policy).values():
        lora.fill(layer.lora_B, noise * torch.randn(layer.lora_B.shape))
    return policy


def batch_of(path, pictures):
    processor = packing.Processor(path)
    answer = list(range(20, 29))
    return packing.pack([(packing.encode(r, processor), answer) for r in pictures])


@pytest.mark.parametrize("vision", [False, True])
def test_merged_weights_compute_what_the_adapters_compute(tiny, pictures, vision):
    policy, batch = adapted(tiny, vision), batch_of(tiny, pictures)
    plain, _ = model.load(tiny)
    before = plain(batch)[0].detach()
    plain.hf.load_state_dict(dict(policy.full_weights()), strict=False)
    with torch.no_grad():
        merged, ours = plain(batch)[0], policy(batch)[0]
    assert (merged - ours).abs().max() < 1e-5
    assert (ours - before).abs().max() > 0.01
    assert (lora.without(policy)(batch)[0] - before).abs().max() == 0
    names = lora.layers(policy)
    assert any("visual" in name for name in names) == vision
    assert {name.split(".")[-1] for name in names if "language_model" in name} == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )


def test_gradients_are_those_of_the_products_and_only_in_adapters(tiny, pictures):
    """Of W + s B A: dB = s G A^T and dA = s B^T G, where G is the gradient of the merged weight."""
    policy, batch = adapted(tiny, True), batch_of(tiny, pictures)
    plain, _ = model.load(tiny)
    plain.hf.load_state_dict(dict(policy.full_weights()), strict=False)
    policy(batch)[0].sum().backward()
    plain(batch)[0].sum().backward()
    theirs = {name: p.grad for name, p in plain.hf.named_parameters()}
    own = lora.layers(policy)
    for name, layer in own.items():
        a, b = (model.full(x.detach()).double() for x in (layer.lora_A, layer.lora_B))
        g = theirs[f"{name}.weight"].double()
        for p, expected in ((layer.lora_B, g @ a.T), (layer.lora_A, b.T @ g)):
            error = (model.full(p.grad) - 2.0 * expected).abs().max()  # alpha / rank = 2
            assert error < 1e-4 * (1 + 2 * expected.abs().max()), name
    for name, p in policy.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (".lora_" in name), name


def test_a_new_adapter_changes_nothing(tiny, pictures):
    policy, batch = adapted(tiny, noise=0.0), batch_of(tiny, pictures)
    plain, _ = model.load(tiny)
    with torch.no_grad():
        assert (policy(batch)[0] - plain(batch)[0]).abs().max() == 0
    weights = dict(policy.full_weights())
    assert all(torch.equal(weights[name], p) for name, p in plain.hf.named_parameters())
    a = model.full(next(iter(lora.layers(policy).values())).lora_A)
    assert a.std() > 0.01  # B = 0 alone would never move with A = 0


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    policy, out = adapted(tiny, True), tmp_path_factory.mktemp("exported")
    model.export(policy, packing.Processor(tiny), out / "final")
    return policy, out


def test_the_export_is_merged_and_transformers_reads_it(tiny, exported, pictures):
    policy, out = exported
    hf = AutoModelForImageTextToText.from_pretrained(out / "final", dtype=torch.float32)
    processor = packing.Processor(tiny)
    for record in pictures[:5]:
        prompt, answer = packing.encode(record, processor), list(range(20, 29))
        ids = torch.tensor([prompt.ids + answer])
        images = {}
        if prompt.pixel_values is not None:
            images = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid)
            kinds = (ids == hf.config.image_token_id).int()
            images["mm_token_type_ids"] = kinds
        with torch.no_grad():
            logits = hf(input_ids=ids, **images).logits[0, len(prompt.ids) - 1 : -1]
            logits[:, policy.banned] = -float("inf")
            theirs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            ours = policy(packing.pack([(prompt, answer)]))[0]
        assert (ours - theirs).abs().max() < 1e-4


def test_adapters_on_disk_have_pefts_format(tiny, exported, pictures):
    policy, out = exported
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["base_model_name_or_path"] == tiny
    state = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert state[name].shape == (4, 128) and len(state) == 2 * len(config["target_modules"])
    fresh, batch = adapted(tiny, True, noise=0.0), batch_of(tiny, pictures)
    for name, p in fresh.hf.named_parameters():
        if ".lora_" in name:
            lora.fill(p, state[f"base_model.model.{model.clean_name(name)}.weight"])
    with torch.no_grad():
        assert torch.equal(fresh(batch)[0], policy(batch)[0])
    export.export(out / "adapter", out / "merged", dtype="float32")
    again, final = (load_file(out / x / "model.safetensors") for x in ("merged", "final"))
    assert again.keys() == final.keys() and all(torch.equal(again[n], final[n]) for n in final)


def test_peft_reads_them(tiny, exported):
    peft = pytest.importorskip("peft")
    _, out = exported
    base = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(out / "final", dtype=torch.float32)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        difference = theirs(input_ids=ids).logits - whole(input_ids=ids).logits
    assert difference.abs().max() < 1e-4


def test_bf16_base_and_float32_adapters_as_on_a_gpu(tiny, monkeypatch):
    """The base has no float32 master; the adapters, their gradients and moments are float32."""
    monkeypatch.setattr("nano.device.forced", True)
    policy = adapted(tiny)
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


@pytest.mark.parametrize("vision", [False, True])
def test_the_memory_table_knows_them_to_the_byte(tiny, pictures, vision):
    policy = adapted(tiny, vision, adapters=(6, 8.0, vision))
    policy(batch_of(tiny, pictures))[0].sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
    fixed = [p for n, p in policy.named_parameters() if not p.requires_grad and "visual" not in n]
    tower = [p for p in policy.visual.parameters() if not p.requires_grad]
    knobs = dict(cuda=False, frozen_vision=not vision, lora_rank=6, lora_vision=vision)
    s = budget.shape(policy.hf.config)
    items = {i.name: i.bytes for i in budget.memory(s, 800, reference="", **knobs)}
    assert items["master weights, float32"] == sum(p.nbytes for p in trained)
    assert items["gradients, float32"] == sum(p.grad.nbytes for p in trained)
    assert items["AdamW's m and v"] == sum(x.nbytes for x in state)
    tower_bytes = items.get("frozen vision tower, whole", 0)
    assert tower_bytes + items["frozen weights"] == sum(p.nbytes for p in fixed + tower)
    assert "the head's gradient, whole" not in items


def test_a_7b_with_adapters_by_hand():
    """Rank 16 in 28 layers: q and o of 3584 x 3584, k and v of 3584 x 512, an MLP of 18944."""
    s = budget.shape(budget.published_config("qwen2.5-vl-7b"))
    widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    items = budget.memory(s, 16384, frozen_vision=True, lora_rank=16, reference="")
    found = {item.name: item.bytes for item in items}
    assert found["AdamW's m and v"] == 8 * 16 * 28 * widths == 322_961_408
    both = found["frozen weights"] + found["frozen vision tower, whole"]
    assert both == 2 * 8_292_166_656


@pytest.mark.parametrize(
    "size, gib, peak", [("7b-lora-1gpu", 79.1, 67.3), ("3b-lora-24gb", 23.6, 20.3)]
)
def test_recipes_for_one_gpu_fit_on_paper(size, gib, peak):
    """With the longest prompt and answer in a micro-batch, and 5,000 patches in it."""
    config = grpo.Config(**grpo.RECIPES[f"vision-r1-{size}"])
    longest = config.max_prompt_len + 8192
    s = budget.shape(budget.published_config(f"qwen2.5-vl-{size[:2]}"))
    knobs = dict(activation_checkpointing=True, frozen_vision=True, lora_rank=config.lora_rank)
    knobs |= dict(reference="", vllm_bytes=config.vllm_memory * gib * budget.GIB)
    items = budget.memory(s, max(longest, config.micro_tokens), 5000, **knobs)
    assert config.micro_tokens == 0 or config.micro_tokens >= longest
    assert budget.peak(items) / budget.GIB == pytest.approx(peak, abs=1)
    assert budget.peak(items) < 0.9 * gib * budget.GIB


# ---- whole runs

FLAGS = dict(lora_rank=4, lora_alpha=8, lr=1e-3, recipe="toy-zero")


@pytest.fixture(scope="module")
def uninterrupted(problem_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    alone(grpo, **SMALL | FLAGS, data=problem_file, out=out)
    return out


def test_a_run_with_adapters(uninterrupted):
    rows = log_of(uninterrupted)
    assert len(rows) == 6 and rows[0]["kl"] == 0 and rows[-1]["kl"] > 1e-5
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4  # sampled with merged weights
    before = load_file(ROOT / "toy" / "base" / "model.safetensors")
    after = weights_of(uninterrupted)
    changed = {name for name in after if not torch.equal(after[name], before[name].float())}
    assert len(changed) == 3 * 7 and all("model.layers." in name for name in changed)
    files = (uninterrupted / "checkpoints" / "step-000006").glob("*.safetensors")
    whole = (uninterrupted / "final" / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in files) < whole / 3


def assert_equal(a, b, tolerance):
    for x, y in zip(log_of(a), log_of(b), strict=True):
        for key in set(x) - {"logprob_gap", "logprob_gap_max", "logprob_gap_kl", "tokens_per_s"}:
            assert x[key] == pytest.approx(y[key], rel=1e-3 if tolerance else 1e-9, abs=1e-5), key
    x, y = weights_of(a), weights_of(b)
    assert max((x[name] - y[name]).abs().max() for name in x) <= tolerance


def test_stopped_and_resumed_is_uninterrupted(uninterrupted, problem_file, tmp_path):
    flags = SMALL | FLAGS | dict(data=problem_file, out=tmp_path)
    alone(grpo, **flags | dict(stages="16x8x3,24x4x1"))
    alone(grpo, **flags)
    assert_equal(tmp_path, uninterrupted, 0)


def test_two_ranks_are_one(uninterrupted, problem_file, tmp_path):
    run_grpo(tmp_path, problem_file, ranks=2, **FLAGS)
    assert_equal(tmp_path, uninterrupted, 2e-5)


def test_sft_with_adapters(problem_file, tmp_path):
    flags = dict(model=ROOT / "toy" / "base", data=problem_file, epochs=1, batch_size=10, workers=0)
    flags |= dict(activation_checkpointing=False, preflight=False, cutoff=512)
    flags |= dict(lora_rank=4, lora_vision=True, lr=5e-3)
    alone(sft, out=tmp_path, **flags)
    rows = log_of(tmp_path)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    moved = [name for name, x in state.items() if "lora_B" in name and x.abs().max() > 0]
    assert len(moved) == len(state) / 2 and any("visual" in name for name in moved)
