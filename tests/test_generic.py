"""nano/generic.py: tiny random models of four families against transformers' loss and gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, single_rank
from safetensors.torch import load_file
from test_sft import chains, log_of, run_sft  # noqa: F401 (chains is a fixture)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import model
import toy
from nano import generic
from nano.data import Record, load_image

FAMILIES = ("mllama", "internvl", "gemma3", "qwen3_5")
ANSWER = "<think> I add them one by one . </think> <answer> 7 </answer>"
SQUARE = {"height": 56, "width": 56}
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
VISION = dict(hidden_size=32, intermediate_size=64, image_size=56, patch_size=14)


def template(mark, begin="", start="<|im_start|>{}\n", end="<|im_end|>\n"):
    """A chat template in the manner of the released ones, without tools and dates."""
    return (
        begin
        + "{% for m in messages %}"
        + start.format("{{ m.role }}")
        + "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        + "{% if c.type == 'image' %}"
        + mark
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + start.format("assistant")
        + "{% endif %}"
    )


def tokenizer(chat_template, **marks):
    """The toy's tokenizer with the marks that a model's processor asks it for."""
    tok = toy.tokenizer()
    new = [token for token in marks.values() if token not in tok.get_vocab()]
    tok.add_special_tokens({"extra_special_tokens": new})
    tok._set_model_specific_special_tokens(marks)
    tok.chat_template = chat_template
    return tok


def save(path, tok, image_processor, processor_class, **settings):
    """the files of a released folder"""
    tok.save_pretrained(path)
    image_processor.save_pretrained(path)
    settings["processor_class"] = processor_class.__name__
    (path / "processor_config.json").write_text(json.dumps(settings))


def mllama(path):
    """4 text layers, 2 of which look at images of up to 4 tiles"""
    start = "<|start_header_id|>{}<|end_header_id|>\n\n"
    tok = tokenizer(
        template("<|image|>", "{{ bos_token }}", start, "<|eot_id|>"),
        start_token="<|start_header_id|>",
        end_token="<|end_header_id|>",
    )
    tok.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    vocab_size = len(tok)
    tok.add_tokens(["<|image|>"], special_tokens=True)  # past the head's last row, as released
    save(path, tok, MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4), MllamaProcessor)
    text = TEXT | dict(
        vocab_size=vocab_size,
        num_hidden_layers=4,
        cross_attention_layers=[1, 3],
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    vision = VISION | dict(
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        vision_output_dim=96,
        intermediate_layers_indices=[0, 1],
    )
    return dict(text_config=text, vision_config=vision, image_token_index=vocab_size)


def internvl(path):
    tok = tokenizer(
        template("<IMG_CONTEXT>\n"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=3)
    save(path, tok, images, InternVLProcessor, image_seq_length=4)
    text = TEXT | dict(model_type="qwen2", vocab_size=len(tok), num_hidden_layers=2)
    vision = VISION | dict(
        image_size=[56, 56], patch_size=[14, 14], num_hidden_layers=2, num_attention_heads=2
    )
    token = tok.context_image_token_id
    return dict(text_config=text, vision_config=vision, image_token_id=token, image_seq_length=4)


def gemma3(path):
    tok = tokenizer(
        template("<start_of_image>", "{{ bos_token }}", "<start_of_turn>{}\n", "<end_of_turn>\n"),
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        start_token="<start_of_turn>",
        end_token="<end_of_turn>",
    )
    tok.add_special_tokens({"bos_token": "<bos>"})
    images = Gemma3ImageProcessorPil(size=SQUARE)
    save(path, tok, images, Gemma3Processor, image_seq_length=4)
    text = TEXT | dict(
        vocab_size=len(tok),
        num_hidden_layers=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=tok.pad_token_id,
    )
    del text["rope_parameters"]  # Gemma has two of them, by layer type
    return dict(
        text_config=text,
        vision_config=VISION | dict(num_hidden_layers=2, num_attention_heads=2),
        mm_tokens_per_image=4,
        image_token_id=tok.image_token_id,
        boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id,
    )


def qwen3_5(path):
    """one linear attention layer and one of full attention"""
    tok = tokenizer(template("<|vision_start|><|image_pad|><|vision_end|>"))
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=1024, max_pixels=64 * 256)
    save(path, tok, images, Qwen3VLProcessor)
    text = TEXT | dict(
        vocab_size=len(tok),
        num_hidden_layers=2,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    text["rope_parameters"] = dict(
        rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], partial_rotary_factor=0.25
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=64,
    )
    token = tok.convert_tokens_to_ids
    return dict(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def make(family, path):
    """save a random model of a family with all the files of a released one -> its folder"""
    config = AutoConfig.for_model(family, **globals()[family](path))
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(config)
    for name, p in hf.named_parameters():
        if "gate" in name and p.numel() == 1:
            torch.nn.init.constant_(p, 0.7)  # Llama's begin at zero, and would hide the images
        elif p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def encode(records, processor):
    ids = processor.tokenizer(ANSWER + processor.tokenizer.eos_token).input_ids
    return [(generic.encode(record, processor), ids) for record in records]


def loss_of_transformers(hf, processor, record):
    """the model's own processor on the whole text, labels of -100 for the prompt, its own loss"""
    prompt = generic.prompt_text(record, processor)
    images = {"images": [[load_image(i) for i in record.images]]} if record.images else {}
    options = dict(add_special_tokens=False, return_tensors="pt") | images
    before = processor.whole(text=[prompt], **options)["input_ids"].shape[1]
    text = prompt + ANSWER + processor.tokenizer.eos_token
    inputs = processor.whole(text=[text], **options)
    labels = inputs["input_ids"].clone()
    labels[:, :before] = -100
    return hf(**inputs, labels=labels).loss


def gradients(policy):
    """name -> whole gradient, of the parameters that have one"""
    named = [(model.clean_name(n), p.grad) for n, p in policy.hf.named_parameters()]
    return {name: model.full(grad) for name, grad in named if grad is not None}


def assert_close(want, mine):
    """to 1e-4 of each tensor's largest entry; where all is noise, to 1e-7 of the largest of all"""
    largest = max(grad.abs().max() for grad in want.values())
    for name, grad in mine.items():
        other = want.get(name, torch.zeros_like(grad))
        assert (other - grad).abs().max() <= 1e-4 * other.abs().max() + 1e-7 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family, folder, pictures):
    """one image, two, none; the text alone runs every layer and is still the text alone"""
    single_rank()
    hf = AutoModelForImageTextToText.from_pretrained(folder(family), dtype=torch.float32)
    policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap)
    processor = generic.Processor(folder(family))
    assert {len(record.images) for record in pictures} == {0, 1, 2}
    hf.train()
    policy.train()
    for record, sequence in zip(pictures, encode(pictures, processor)):
        logprobs, _ = policy(generic.pack([sequence]))
        loss = loss_of_transformers(hf, processor, record)
        assert -logprobs.mean().item() == pytest.approx(loss.item(), abs=1e-5), record.id
        loss.backward()
        (-logprobs.mean()).backward()
    theirs = {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}
    mine = gradients(policy)
    assert theirs.keys() == mine.keys()
    assert_close(theirs, mine)
    tower = dict(hf.get_encoder(modality="image").named_parameters(prefix="tower"))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_alone_gives_the_vision_tower_a_gradient_of_zero(family, folder, pictures):
    """so that a rank with a text takes part where the other ranks have images"""
    single_rank()
    policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap)
    (sequence,) = encode(pictures[-1:], generic.Processor(folder(family)))
    policy(generic.pack([sequence]))[0].sum().backward()
    found = [p.grad for p in policy.visual.parameters() if p.grad is not None]
    assert found and not any(model.full(grad).any() for grad in found)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {root!r})
import model
from nano import generic, run
from test_generic import gradients
run.start_ranks()
policy = model.load_sharded({folder!r}, "cpu", wrap=generic.wrap, activation_checkpointing=True)
sequences = torch.load({file!r}, weights_only=False)
for sequence in sequences[dist.get_rank() :: dist.get_world_size()]:
    (policy(generic.pack([sequence]))[0].sum() * dist.get_world_size()).backward()
found = gradients(policy)
if run.is_main():
    torch.save(found, {file!r})
dist.barrier()
"""


@pytest.mark.parametrize("family", ["mllama", "gemma3"])
def test_two_ranks_give_the_gradients_of_one(family, folder, pictures, tmp_path):
    """one rank has a text alone, the other two images; one has nothing at the end"""
    single_rank()
    processor = generic.Processor(folder(family))
    sequences = [*encode(pictures[1:], processor), generic.blank(processor)]
    policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap)
    for sequence in sequences:
        policy(generic.pack([sequence]))[0].sum().backward()
    file, script = tmp_path / "sequences.pt", tmp_path / "script.py"
    torch.save(sequences, file)
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(folder(family)), file=str(file)))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-m", *launch], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    want, mine = gradients(policy), torch.load(file)
    assert want.keys() == mine.keys()
    assert_close(want, mine)


@pytest.mark.filterwarnings("ignore:.*hidden_state. is deprecated")
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_a_frozen_tower_change_no_gradient(family, folder, pictures):
    single_rank()
    sequences, found = encode(pictures[-3:], generic.Processor(folder(family))), []
    vision_layers = 3 if family == "mllama" else 2  # one of Llama's three is global
    for knobs in ({}, {"activation_checkpointing": True}, {"freeze_vision": True}):
        policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap, **knobs)
        for sequence in sequences:
            policy(generic.pack([sequence]))[0].sum().backward()
        found.append(gradients(policy))
        layers = {"mllama": 4}.get(family, 2) + (0 if "freeze_vision" in knobs else vision_layers)
        assert len(policy.blocks()) == layers
        tower = {id(p) for p in policy.visual.parameters()}
        inside = {model.clean_name(n) for n, p in policy.hf.named_parameters() if id(p) in tower}
    assert found[0].keys() == found[1].keys() and found[0].keys() - inside == found[2].keys()
    for other in found[1:]:
        assert_close(found[0], other)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_export_with_its_processor(family, folder, pictures, tmp_path):
    single_rank()
    policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap)
    model.export(policy, generic.Processor(folder(family)), tmp_path)
    hf, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = (load_file(d / "model.safetensors") for d in (folder(family), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f.name for f in folder(family).iterdir()} == {f.name for f in tmp_path.iterdir()}
    read = AutoProcessor.from_pretrained if family in ("mllama", "gemma3") else generic.Processor
    processor = read(tmp_path)
    if family in ("mllama", "gemma3"):  # transformers wants torchvision for the others' videos
        assert type(processor) is type(generic.Processor(folder(family)).whole).__base__
    else:
        inputs = generic.encode(pictures[0], processor).inputs
        want = generic.encode(pictures[0], generic.Processor(folder(family))).inputs
        assert all(torch.equal(want[name], inputs[name]) for name in want)


@pytest.mark.filterwarnings("ignore:.*hidden_state. is deprecated")
def test_sft_trains_table_2s_llama(folder, chains, tmp_path):  # noqa: F811
    """two ranks, one of them without held-out records; the loss falls, the result can be read"""
    flags = dict(ranks=2, epochs=1, lr=3e-3, holdout=1, freeze_vision=False)
    run_sft(tmp_path, chains, model=folder("mllama"), **flags)
    rows = log_of(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and 0 <= rows[-1]["eval_accuracy"] <= 1
    hf, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_text_that_holds_image_tokens_is_a_text(folder, pictures):
    for family in FAMILIES:
        processor = generic.Processor(folder(family))
        assert processor.image_marks
        image_ids = {processor.tokenizer.convert_tokens_to_ids(m) for m in processor.image_marks}
        for mark in processor.image_marks:
            end = processor.tokenizer.eos_token
            record = Record("a", f"What is {mark} ? {end}", "1", [])
            ids = generic.encode(record, processor).ids
            plain = generic.encode(Record("a", "What is ? ", "1", []), processor).ids
            assert not image_ids & set(ids)
            count = processor.tokenizer.eos_token_id
            assert ids.count(count) == plain.count(count)
            assert mark in processor.tokenizer.decode(ids)


def test_only_packable_models_enter_the_packed_path(folder, tiny):
    """linear attention would mix packed sequences; without the guard this model loads and trains"""
    single_rank()
    assert generic.packed_refusal(AutoConfig.from_pretrained(tiny)) == ""
    for load in (model.load, lambda path: model.load_sharded(path, "cpu")):
        with pytest.raises(ValueError, match="linear_attention layers cannot .* grpo.py does not"):
            load(folder("qwen3_5"))
        with pytest.raises(
            ValueError, match="mllama with .* cannot be packed, only qwen2_vl, .* grpo.py does not"
        ):
            load(folder("mllama"))
    config = AutoConfig.from_pretrained(tiny)
    config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert "sliding_attention" in generic.packed_refusal(config)


def test_what_cannot_be_trained_right_is_refused(folder):
    single_rank()
    config = AutoConfig.from_pretrained(folder("gemma3"))
    config.text_config.final_logit_softcapping = 30.0
    hf = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ValueError, match="changed by final_logit_softcapping"):
        generic.wrap(hf, folder("gemma3"))
    hf.config.text_config.final_logit_softcapping = None
    hf.lm_head.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="product with one matrix"):
        generic.wrap(hf, folder("gemma3"))
