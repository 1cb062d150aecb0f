"""SFT of any vision-language model of transformers: Llama-3.2-Vision (Table 2), InternVL, Gemma 3.

Each forward takes one sequence, as the model's own processor prepares it; nothing is packed. Only a
server samples such a model: eval.py can score it, grpo.py cannot train it.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from nano import hub
from nano.asking import Asking
from nano.data import BadRow, Record, load_image
from nano.logprobs import likeliest, token_logprobs

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # what a checkpoint has besides its weights
# By these some models scale, cap or cut the product of hidden state and output embedding.
LOGIT_SETTINGS = "final_logit_softcapping logit_scale logits_scaling output_multiplier".split()


def packed_refusal(config) -> str:
    """Why packed rows are not for this model; '' if they are. This alone decides on the path."""
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if config.model_type in PACKED and layers == {"full_attention"}:
        return ""
    return (
        f"{config.model_type} with {' and '.join(sorted(layers))} layers cannot be packed, only "
        f"{', '.join(PACKED)} with full attention; sft.py trains such a model, grpo.py does not"
    )


def refusal(hf) -> str:
    """Why this file cannot train a model right; '' if it can."""
    head, text = hf.get_output_embeddings(), hf.config.get_text_config()
    buffers = hf.state_dict().keys() - dict(hf.named_parameters(remove_duplicate=False)).keys()
    if head is None or head.bias is not None or not hasattr(hf, "model"):
        return "no decoder whose logits are a product with one matrix"
    if changed := [name for name in LOGIT_SETTINGS if getattr(text, name, None) not in (None, 1)]:
        return f"its logits are changed by {', '.join(changed)}"
    return f"its checkpoint holds more than weights: {min(buffers)}" if buffers else ""


class Processor(Asking):
    """The model's own processor, around a tokenizer and an image processor without torchvision."""

    def __init__(self, path: str, **how):
        self.folder = Path(hub.model(path))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.image_processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(self.folder))]
        settings, _ = kind.get_processor_dict(self.folder)
        parts = dict(tokenizer=self.tokenizer, image_processor=self.image_processor)
        settings |= parts | {"video_processor": None}
        # Only videos need torchvision. transformers would refuse to be without their processor.
        kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
        self.whole = kind.from_args_and_dict([], {}, **settings)
        self.tokenizer.chat_template = self.tokenizer.chat_template or self.whole.chat_template
        # Gemma's tokenizer names another image token than its processor.
        names = {self.whole.image_token, getattr(self.tokenizer, "image_token", None)}
        self.image_marks = names - {None}
        self.set_up(self.image_marks, **how)
        self.whole.image_processor = self.image_processor
        if not self.chat:
            raise ValueError(f"{path}: no chat template; take the family's instruct model")
        self.eos_ids = [self.tokenizer.eos_token_id]

    def banned_ids(self, vocab_size: int) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.long)  # no rollouts are sampled here

    def save(self, path: str):
        """Copy what the checkpoint had beside its weights: servers find what they look for."""
        for file in {file for pattern in FILES for file in self.folder.glob(pattern)}:
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, Path(path) / file.name)
        self.save_asked(path)


class Prompt(NamedTuple):
    """A problem as the model reads it. Every rank must run every sharded layer, so that a text
    alone is followed by a blank image, which no token before it can see."""

    has_image: bool
    ids: list[int]  # P tokens, without the blank image
    inputs: dict[str, torch.Tensor]  # of the model's own processor; per token (1, P or more, ...)


def prompt_text(record: Record, processor: Processor) -> str:
    text = processor.text(record)
    found, images = sum(map(text.count, processor.image_marks)), len(record.images)
    if found != images:
        raise BadRow("image marks", f"{found} image tokens in the text, {images} images")
    return text


def prompt_length(record: Record, processor: Processor) -> int:
    """Tokens of the text alone, which is enough to give ranks similar work."""
    text = prompt_text(record, processor)
    return len(processor.tokenizer(text, add_special_tokens=False).input_ids)


def encode(record: Record, processor: Processor) -> Prompt:
    text, length = prompt_text(record, processor), None
    images = [load_image(image) for image in record.images]
    if not images:
        length = prompt_length(record, processor)
        text, images = text + processor.whole.image_token, [Image.new("RGB", (56, 56))]
    options = dict(add_special_tokens=False, return_tensors="pt")
    inputs = dict(processor.whole(text=[text], images=[images], **options))
    return Prompt(bool(record.images), inputs["input_ids"][0, :length].tolist(), inputs)


def blank(processor: Processor) -> tuple[Prompt, list[int]]:
    """A sequence without a label, for a rank that has none left but must still take part."""
    return encode(Record("blank", "", "-", []), processor), []


class Batch(NamedTuple):
    inputs: dict[str, torch.Tensor]  # one sequence of T tokens
    has_image: bool  # False: the image in it is blank
    label_index: torch.Tensor  # (N,) positions whose next token is a response token
    labels: torch.Tensor  # (N,) that token


def pack(sequences: list[tuple[Prompt, list[int]]], device="cpu") -> Batch:
    """[(Prompt, response ids)], one of them -> Batch"""
    ((prompt, response),) = sequences
    p, r, inputs = len(prompt.ids), len(response), {}
    for name, x in prompt.inputs.items():
        if x.shape[:2] == prompt.inputs["input_ids"].shape:
            # A response token gets what the prompt's last token has: its masks, its type.
            response_part = x[:, p - 1 : p].repeat_interleave(r, 1)
            x = torch.cat([x[:, :p], response_part, x[:, p:]], 1)
        inputs[name] = x.to(device)
    labels = torch.tensor(response, dtype=torch.long, device=device)
    inputs["input_ids"][0, p : p + r] = labels
    return Batch(inputs, prompt.has_image, torch.arange(p - 1, p + r - 1, device=device), labels)


class Policy(nn.Module):
    """As model.Policy, for one sequence per forward."""

    def __init__(self, hf):
        super().__init__()
        self.hf, self.has_image = hf, True
        self.banned = torch.zeros(0, dtype=torch.long)
        if hf.config.model_type == "mllama":
            hf.model.multi_modal_projector.register_forward_hook(self.hide)

    def hide(self, projector, args, states):
        """Llama lets tokens before an image attend to it. Of zeros they get nothing."""
        return states if self.has_image else 0.0 * states

    @property
    def visual(self):
        return self.hf.get_encoder(modality="image")

    def blocks(self) -> list[nn.Module]:
        """The repeated layers that are trained: the outermost lists of modules hold them."""
        lists = [m for m in self.hf.modules() if isinstance(m, nn.ModuleList)]
        inner = {m for blocks in lists for block in blocks for m in block.modules()}
        blocks = [block for blocks in lists if blocks not in inner for block in blocks]
        return [block for block in blocks if any(p.requires_grad for p in block.parameters())]

    def forward(self, batch: Batch, temperature: float = 1.0, judge: bool = False):
        """-> logprobs (N,), entropy (N,); `judge`: also (N,) whether a label is the likeliest"""
        self.has_image = batch.has_image
        states = self.hf.model(**batch.inputs, use_cache=False).last_hidden_state  # (1, T, H)
        hidden, weight = states[0, batch.label_index], self.hf.get_output_embeddings().weight
        out = token_logprobs(hidden, weight, batch.labels, temperature, self.banned)
        return (*out, likeliest(hidden, weight, self.banned) == batch.labels) if judge else out


def wrap(hf, path: str, device="cpu", freeze_vision: bool = False) -> tuple[Policy, Processor]:
    """As model.wrap, of an HF model and the folder of its processor."""
    if reason := refusal(hf):
        raise ValueError(f"{path}: {type(hf).__name__} cannot be trained here: {reason}")
    policy = Policy(hf)
    policy.visual.requires_grad_(not freeze_vision)
    return policy, Processor(path)
