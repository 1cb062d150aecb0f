"""mllama.py: Llama-3.2-Vision as sft.py trains it, against transformers' own forward on a tiny random model."""

import pytest
import torch
from conftest import single_rank
from test_sft import chains, log_of, run_sft  # noqa: F401 (chains is a fixture)
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor

import model
import toy
from nano import mllama

TEMPLATE = (  # Llama-3.2-Vision-Instruct's, without its tools and dates
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}<|image|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """folder of a random Mllama: 4 text layers, 2 of them look at images of up to 4 tiles"""
    path, tok = tmp_path_factory.mktemp("llama"), toy.tokenizer()
    names = ["<|start_header_id|>", "<|end_header_id|>"]
    tok.add_special_tokens(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "extra_special_tokens": names}
    )
    vocab = len(tok)
    tok.add_tokens(
        ["<|image|>"], special_tokens=True
    )  # past the head's last row, as in the released model
    tok.chat_template = TEMPLATE
    text = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_output_dim=96,
        intermediate_layers_indices=[0, 1],
    )
    torch.manual_seed(0)
    hf = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=vocab)
    )
    for name, p in hf.named_parameters():
        if (
            name.endswith("gate")
            or "attn_gate" in name
            or "mlp_gate" in name
            or "gate_" in name
            and "proj" not in name
        ):
            torch.nn.init.constant_(p, 0.7)  # they begin at zero, and would hide the images
    hf.save_pretrained(path)
    tok.save_pretrained(path)
    MllamaImageProcessorPil(size=dict(height=56, width=56), max_image_tiles=4).save_pretrained(path)
    return path


def sequences(records, processor):
    g = torch.Generator().manual_seed(0)
    responses = [torch.randint(10, 400, (n,), generator=g).tolist() for n in [5, 1, 17, 9, 30, 3]]
    return [(mllama.encode(r, processor), ids) for r, ids in zip(records, responses)]


def reference(hf, path, prompt, ids):
    """transformers' processor and forward over the whole text, -100 for the prompt -> sum of the loss"""
    processor = MllamaProcessor(
        MllamaImageProcessorPil.from_pretrained(path), mllama.Processor(path).tokenizer
    )
    record = prompt.record
    text = processor.tokenizer.decode(prompt.ids + ids)
    images = {"images": [[mllama.load_image(i) for i in record.images]]} if record.images else {}
    inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
    assert inputs["input_ids"][0].tolist()[: len(prompt.ids)] == prompt.ids
    inputs["input_ids"] = torch.tensor(
        [prompt.ids + ids]
    )  # random ids may decode to a text that encodes otherwise
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if record.images:  # its mask grows by its own rule for generation: the last row again
        row = processor(
            text=[processor.tokenizer.decode(prompt.ids)],
            add_special_tokens=False,
            return_tensors="pt",
            **images,
        )
        last = row["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat(
            [last, last[:, -1:].expand(-1, len(ids), -1, -1)], 1
        )
    logits = hf(**inputs).logits[0, len(prompt.ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")


def test_loss_and_gradients_are_those_of_transformers(llama, pictures):
    """one image, two, none; the text alone runs every layer and is still the text alone"""
    single_rank()
    hf = MllamaForConditionalGeneration.from_pretrained(llama)
    policy = mllama.load_sharded(llama, "cpu")
    seqs = sequences(pictures, mllama.Processor(llama))
    assert {len(p.record.images) for p, _ in seqs} == {0, 1, 2}
    for prompt, ids in seqs:
        want, mine = (
            reference(hf, llama, prompt, ids),
            -policy(mllama.pack([(prompt, ids)]))[0].sum(),
        )
        assert mine.item() == pytest.approx(want.item(), abs=2e-5 * len(ids))
        want.backward()
        mine.backward()
    theirs = dict(hf.named_parameters())
    assert theirs.keys() == {n for n, _ in policy.hf.named_parameters()}
    for name, p in policy.hf.named_parameters():
        a, b = theirs[name].grad, model.full(p.grad)
        assert b is not None and (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7, name
    assert theirs["model.vision_model.patch_embedding.weight"].grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*hidden_state. is deprecated")
def test_checkpointing_and_a_frozen_tower_change_no_gradient(llama, pictures):
    single_rank()
    seqs, grads = sequences(pictures, mllama.Processor(llama)), []
    for knobs in ({}, {"activation_checkpointing": True}, {"freeze_vision": True}):
        policy = mllama.load_sharded(llama, "cpu", **knobs)
        for seq in seqs:
            policy(mllama.pack([seq]))[0].sum().backward()
        named = policy.hf.named_parameters()
        grads.append(
            {model.clean_name(n): model.full(p.grad) for n, p in named if p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys()
    assert {n for n in grads[0] if "vision_model" not in n} == grads[2].keys()
    for other in grads[1:]:
        assert all((grads[0][n] - g).abs().max() < 1e-5 for n, g in other.items())


def test_hostile_text_and_a_base_model_without_a_template(llama, pictures):
    processor = mllama.Processor(llama)
    pictures[0].problem += " <|image|>"
    with pytest.raises(mllama.BadRow):
        mllama.encode(pictures[0], processor)
    processor.tokenizer.chat_template = None
    prompt = mllama.encode(pictures[1], processor)
    text = processor.tokenizer.decode(prompt.ids)
    assert text.startswith("<|begin_of_text|>User: <|image|>") and text.endswith("Assistant:")
    assert len(prompt.ids) == mllama.prompt_length(pictures[1], processor)


@pytest.mark.filterwarnings("ignore:.*hidden_state. is deprecated")
def test_sft_trains_it_and_transformers_reads_the_result(llama, chains, tmp_path):  # noqa: F811
    """two ranks, one of them without held-out records; falling loss; the export has the names of the original"""
    from safetensors.torch import load_file

    said = run_sft(
        tmp_path, chains, ranks=2, model=llama, epochs=1, lr=3e-3, holdout=1, freeze_vision=False
    )
    rows = log_of(tmp_path)
    assert (
        rows[-1]["loss"] < rows[0]["loss"] - 0.5
        and 0 <= rows[-1]["eval_accuracy"] <= 1
        and "left_out" in rows[0]
    ), said
    before, after = (
        load_file(llama / "model.safetensors"),
        load_file(tmp_path / "final" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and not all(
        torch.equal(before[k], after[k]) for k in before
    )
    hf, info = MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_other_stages_refuse_it(llama):
    with pytest.raises(ValueError, match=r"sft.py alone trains"):
        model.Processor(llama)
    with pytest.raises(ValueError, match="no vision tower"):
        model.load(llama)
