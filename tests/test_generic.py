"""nano/generic.py: tiny random models of four families, against transformers' own loss and gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, single_rank
from safetensors.torch import load_file
# from test_sft import chains, log_of, run_sft  # noqa: F401 (chains is a fixture)
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_processing_utils import BaseVideoProcessor

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
    """4 text layers, 2 of which look at images of up to 4 tiles; laid out as the released folder is"""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family, folder, pictures):
    """one image, two, none; the text alone runs every layer and is still the text alone"""
    single_rank()
    hf = AutoModelForImageTextToText.from_pretrained(folder(family), dtype=torch.float32)
    policy = model.load_sharded(folder(family), "cpu", wrap=generic.wrap)
    processor = generic.Processor(folder(family))
    assert {len(record.images) for record in pictures} == {0, 1, 2}
    policy.train(), hf.train()
    for record, sequence in zip(pictures, encode(pictures, processor)):
        logprobs, _ = policy(generic.pack([sequence]))
        loss = loss_of_transformers(hf, processor, record)
        assert -logprobs.mean().item() == pytest.approx(loss.item(), abs=1e-5), record.id
        loss.backward()
        (-logprobs.mean()).backward()
    theirs = dict(hf.named_parameters())
    assert theirs.keys() == {name for name, _ in policy.hf.named_parameters()}
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for name, p in policy.hf.named_parameters():
        want, mine = theirs[name].grad, model.full(p.grad)
        if mine is None:  # e.g. SigLIP's pooling head, which Gemma has and does not use
            assert want is None, name
            continue
        assert (want - mine).abs().max() <= 1e-4 * want.abs().max() + 1e-7 * largest, name
    tower = {name for name, p in hf.get_encoder(modality="image").named_parameters()}
    assert any(theirs[n].grad.abs().max() > 0 for n in theirs if n.split(".", 2)[2] in tower)
