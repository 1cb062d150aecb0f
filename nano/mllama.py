"""Llama-3.2-Vision for sft.py (Vision-R1-LlamaV-CI, Table 2): the parts of model.py and packing.py where it differs.

Its images do not stand among the tokens: cross-attention layers look at their tiles, and transformers' forward for them
knows rows of a batch, not packed rows. So one sequence makes one micro-batch, nothing is padded, and the released
configuration (batches of 1) loses nothing. Left out: sampling, and with it GRPO; model.py says so.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.models.mllama.processing_mllama import MllamaProcessor, build_string_from_input

import model
from nano import packing
from nano.data import BadRow, Record, load_image


def is_one(path):
    return AutoConfig.from_pretrained(path).model_type == "mllama"


class Processor:
    """tokenizer, image processor (Pillow), and transformers' own processor over both"""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.both = MllamaProcessor(self.image_processor, self.tokenizer)
        self.image_token = self.both.image_token_id
        self.eos_ids = [self.tokenizer.eos_token_id]

    def banned_ids(self, vocab_size):
        return torch.arange(
            min(len(self.tokenizer), vocab_size), vocab_size
        )  # the head has no image token

    def save(self, path):
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)


@dataclass(eq=False)
class Prompt:
    """A problem as the model reads it. A text alone brings a black image that no token sees (`sees` False): every rank
    must run every sharded layer."""

    record: Record
    ids: list[int]
    inputs: dict[
        str, torch.Tensor
    ]  # pixel_values (1, I, tiles, 3, side, side), aspect_ratio_ids, aspect_ratio_mask
    mask: torch.Tensor  # (P, I, tiles): 1 where a token sees a tile
    sees: bool


def prompt_text(record, processor, system_prompt=""):
    """the chat template's text, or a base model's plain dialogue; it begins with <|begin_of_text|>, once"""
    text = packing.prompt_text(record, processor.tokenizer, system_prompt)
    if not processor.tokenizer.chat_template:
        text = text.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", processor.both.image_token
        )
    return build_string_from_input(text, processor.tokenizer.bos_token, processor.both.image_token)


def prompt_ids(record, processor, system_prompt=""):
    ids = processor.tokenizer(
        prompt_text(record, processor, system_prompt), add_special_tokens=False
    ).input_ids
    found = ids.count(processor.image_token)
    if found != len(record.images):
        raise BadRow(
            "image marks", f"{found} image tokens in the text, {len(record.images)} images"
        )
    return ids


def prompt_length(record, processor, system_prompt=""):
    return len(prompt_ids(record, processor, system_prompt))


def encode(record, processor, system_prompt=""):
    """Record -> Prompt; what a token sees is transformers' rule: the last image before it"""
    ids = prompt_ids(
        record, processor, system_prompt
    )  # first, since it says what is wrong with a text
    if not record.images:
        inputs = processor.image_processor(images=[[Image.new("RGB", (8, 8))]], return_tensors="pt")
        mask = torch.zeros(len(ids), *inputs["aspect_ratio_mask"].shape[1:], dtype=torch.long)
    else:
        text, images = (
            prompt_text(record, processor, system_prompt),
            [load_image(i) for i in record.images],
        )
        inputs = processor.both(
            images=[images], text=[text], add_special_tokens=False, return_tensors="pt"
        )
        mask = inputs["cross_attention_mask"][0]
    inputs = {
        name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    }
    return Prompt(record, ids, inputs, mask, bool(record.images))


def blank(processor):
    """a sequence without a label, for a rank that has none left but must still take part"""
    return encode(Record("blank", "", "-", []), processor), []


class Batch(NamedTuple):
    """one sequence of T tokens, N of them labelled"""

    ids: torch.Tensor  # (1, T)
    images: dict[str, torch.Tensor]  # as in Prompt
    mask: torch.Tensor  # (1, T, I, tiles)
    sees: bool
    label_index: torch.Tensor  # (N,) positions whose next token is a response token
    labels: torch.Tensor  # (N,) that token


def pack(sequences, device="cpu"):
    """[(Prompt, response ids)], one of them -> Batch"""
    ((prompt, response),) = sequences
    p, r = len(prompt.ids), len(response)
    mask = torch.cat(
        [prompt.mask, prompt.mask[-1:].expand(r, -1, -1)]
    )  # the response sees what the prompt's end sees
    images = {k: v.to(device) for k, v in prompt.inputs.items()}
    ids, index = torch.tensor([prompt.ids + response]), torch.arange(p - 1, p + r - 1)
    labels = torch.tensor(response, dtype=torch.long)
    return Batch(
        ids.to(device),
        images,
        mask[None].to(device),
        prompt.sees,
        index.to(device),
        labels.to(device),
    )


class Policy(model.Policy):
    @property
    def visual(self):
        return self.hf.model.vision_model

    @property
    def vision_blocks(self):
        return [*self.visual.transformer.layers, *self.visual.global_transformer.layers]

    def hidden(self, batch):
        with torch.set_grad_enabled(torch.is_grad_enabled() and model.is_trained(self.visual)):
            tiles = self.visual(**batch.images).last_hidden_state
        states = self.hf.model.multi_modal_projector(tiles).flatten(0, 2)  # (I * tiles, patches, H)
        if not batch.sees:
            # a mask is not enough: transformers lets a token that sees nothing attend to everything. keys and values
            # are linear in the states, so that zeros add nothing
            states = 0.0 * states
        out = self.hf.model(
            input_ids=batch.ids,
            cross_attention_states=states,
            cross_attention_mask=batch.mask,
            use_cache=False,
        )
        return out.last_hidden_state[0][batch.label_index]


def wrap(hf, path, device="cpu", freeze_vision=False):
    """as model.wrap"""
    processor = Processor(path)
    hf.model.vision_model.requires_grad_(not freeze_vision)
    return Policy(hf, processor.banned_ids(hf.get_output_embeddings().weight.shape[0])), processor


def load_sharded(path, device, **knobs):
    """as model.load_sharded"""
    return model.load_sharded(path, device, wrap=wrap, **knobs)
