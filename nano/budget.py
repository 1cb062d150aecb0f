"""What a run needs before it is run, by arithmetic from the model's config: FLOPs and memory.

FLOPs count matrix products, two for each multiply-add. Norms, rotary embeddings, softmax, the
activation functions, Qwen3-VL's interpolated positions, loss and optimizer are left out.
"""

import copy
import math
import re
import sys
from collections import Counter, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

GIB = 2**30
Shape = SimpleNamespace  # `shape` says what each field is.


# From the vendors' data sheets, without sparsity: the peak of dense bf16 with float32 accumulation
# in TFLOP/s, and the bandwidth in TB/s. The first wins whose words are all in a name.
GPU = namedtuple("GPU", "name tera bandwidth")
GPUS = """H100 PCIe 756 2.0, H100 NVL 835 3.9, H100 989 3.35, H800 989 3.35, H200 989 4.8,
    B200 2250 8.0, H20 148 4.0, A100 40GB 312 1.555, A100 312 2.04, A800 312 2.04, L40S 362 0.864,
    A6000 155 0.768, 6000 Ada 364 0.96, 5090 209 1.79, 4090 165 1.01, 3090 71 0.936"""
GPUS = [row.strip().rsplit(maxsplit=2) for row in GPUS.split(",")]
GPUS = [GPU(name, float(tera), float(bandwidth)) for name, tera, bandwidth in GPUS]


def gpu(name: str) -> GPU | None:
    """Find a GPU by a name such as "H100" or "NVIDIA A100-SXM4-80GB"."""
    found = (g for g in GPUS if all(word in name.lower() for word in g.name.lower().split()))
    return next(found, None)


def mfu(model_flops: float, seconds: float, device: torch.device | str) -> float | None:
    """Return the model FLOPs utilization of one GPU, 0..1; None where its peak is not known."""
    name = str(device)
    found = gpu(torch.cuda.get_device_name(device) if name.startswith("cuda") else name)
    return model_flops / seconds / (found.tera * 1e12) if found else None


def shape(config: PreTrainedConfig) -> Shape:
    """Count what the arithmetic needs of a Qwen-VL config, on a model without storage."""
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise ValueError(f"{config.model_type}: budget.py knows Qwen2-VL, Qwen2.5-VL and Qwen3-VL")
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(
            copy.deepcopy(config), attn_implementation="sdpa"
        )
    text, vision = config.text_config, config.vision_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    old = config.model_type == "qwen2_vl"
    full = set(getattr(vision, "fullatt_block_indexes", range(vision.depth)))

    def count(words: str, least_dims: int = 1) -> int:
        found = (p for name, p in hf.named_parameters() if re.search(words, name))
        return sum(p.numel() for p in found if p.ndim >= least_dims)

    def widths(words: str) -> int:
        linear = (m for n, m in hf.named_modules() if re.search(words, n) and type(m) is nn.Linear)
        return sum(m.in_features + m.out_features for m in linear)

    return Shape(
        text=text,
        vision=vision,
        params=count(""),
        vision_params=count(r"visual\."),
        # The root of FSDP is what lies outside of the text layers and vision blocks.
        root_params=count("") - count(r"language_model\.layers|visual\.blocks"),
        # Weights of matrix products: of every token, patch, merged patch, and labelled position.
        text_matrices=count(r"language_model\.layers", 2),
        vision_matrices=count(r"visual\.blocks|patch_embed", 2),
        merger_matrices=count("merger", 2),
        # Times the rank: the parameters of LoRA's adapters.
        text_widths=widths(r"language_model\."),
        vision_widths=widths(r"visual\."),
        head_matrix=text.vocab_size * text.hidden_size,
        query=text.num_attention_heads * dim,
        kv=text.num_key_value_heads * dim,
        vision_hidden=vision.embed_dim if old else vision.hidden_size,
        vision_inner=vision.embed_dim * vision.mlp_ratio if old else vision.intermediate_size,
        # Vision blocks that attend to the whole image; the others attend to windows of patches.
        full_layers=len(full & set(range(vision.depth))),
        window=(getattr(vision, "window_size", 0) // vision.patch_size) ** 2,
    )


TEXT_FIELDS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
TEXT_FIELDS = [*TEXT_FIELDS.split(), "num_key_value_heads"]
# As published, for machines without the hub: TEXT_FIELDS, and the width of the vision tower's MLP.
PUBLISHED = {
    "qwen2-vl-2b": (151936, 1536, 8960, 28, 12, 2, None),
    "qwen2.5-vl-3b": (151936, 2048, 11008, 36, 16, 2, 3420),
    "qwen2.5-vl-7b": (152064, 3584, 18944, 28, 28, 4, 3420),
    "qwen2.5-vl-32b": (152064, 5120, 27648, 64, 40, 8, 3456),
    "qwen2.5-vl-72b": (152064, 8192, 29568, 80, 64, 8, 3456),
}


def published_config(name: str) -> PreTrainedConfig:
    """Build the config of a model in PUBLISHED."""
    *text, mlp = PUBLISHED[name]
    hidden = text[1]
    vision = {"hidden_size": 1280, "intermediate_size": mlp, "out_hidden_size": hidden}
    return AutoConfig.for_model(
        "qwen2_5_vl" if mlp else "qwen2_vl",
        text_config=dict(zip(TEXT_FIELDS, text)),
        # In Qwen2-VL hidden_size is the width of the tower's output.
        vision_config=vision if mlp else {"hidden_size": hidden},
        tie_word_embeddings=hidden <= 2048,  # So it is in the models below 7B.
    )


class Flops(NamedTuple):
    """The FLOPs of one forward, by part."""

    text: float  # projections and MLPs of the text layers
    attention: float  # scores and weighted sums of the text layers, the causal half
    head: float
    vision: float  # the tower with its attention, and the merger

    @property
    def forward(self) -> float:
        return sum(self)

    def training(self, frozen_vision: bool = False, lora: bool = False) -> float:
        """Count forward and backward as three forwards, or as one of a frozen tower, for `mfu`.

        With LoRA, matrices that are not trained have no gradient of their own.
        """
        fixed = self.text + self.head + (0 if frozen_vision else self.vision) if lora else 0
        return 3 * self.forward - fixed - (2 * self.vision if frozen_vision else 0)


def flops(s: Shape, lengths: list[int], labels: int = 0, images: list | tuple = ()) -> Flops:
    """Count a forward of packed sequences with so many labelled positions and distinct images.

    An image is its grid (time, height, width) in patches; windows are cut at the borders.
    """
    # Two products over half the square of each sequence.
    attention = 2 * s.text.num_hidden_layers * s.query * sum(n * (n + 1) for n in lengths)
    side = math.isqrt(s.window)
    patches = pairs = 0  # pairs of a query and a key, over all vision blocks
    for time, height, width in images:
        patches += time * height * width
        pairs += s.full_layers * time * (height * width) ** 2  # Frames do not see each other.
        if side:
            rows, columns = (n // side * side**2 + (n % side) ** 2 for n in (height, width))
            pairs += (s.vision.depth - s.full_layers) * time * rows * columns
    merged = patches / s.vision.spatial_merge_size**2
    vision = s.vision_matrices * patches + s.merger_matrices * merged + 2 * s.vision_hidden * pairs
    text = 2 * s.text_matrices * sum(lengths)
    return Flops(text, attention, 2 * s.head_matrix * labels, 2 * vision)


class Item(NamedTuple):
    name: str
    bytes: float
    when: str  # "always", "training" or "sampling"; the last two are never there together
    knob: str  # what makes it smaller


def activations(s: Shape, tokens: int, patches: int, cuda: bool, checkpointing: float) -> float:
    """Return the bytes that a forward keeps for the backward, without masks and index tables.

    A value has e = 2 bytes (bf16) on a GPU and 4 on the CPU. An RMSNorm keeps 2e for each channel
    on a GPU, its input and output, as a LayerNorm does; on the CPU its float32 input, the
    normalised value and the output. `checkpointing`: the share of the blocks that keep no more
    than their input.
    """
    e, extra = (2, 0) if cuda else (4, 4)
    family = s.text.model_type.removesuffix("_text")
    # A text layer keeps two norms, q, k, v and the output of attention (the CPU repeats keys for
    # all heads and keeps the output twice), and four times the width of its gated MLP.
    attention = e * (2 * s.query + 2 * s.kv if cuda else 5 * s.query)
    if family == "qwen3_vl":  # It has norms of q and k, whose outputs are not kept.
        attention += (extra + e) * (s.query + s.kv)
    hidden = (extra + 2 * e) * s.text.hidden_size
    layer = tokens * (2 * hidden + attention + 4 * e * s.text.intermediate_size)
    # A vision block keeps two norms, 7 values for each channel of its attention (v keeps the whole
    # of qkv alive), and 4, 3 or 2 times the width of its MLP: SiLU gate, quick GELU or GELU.
    norm = extra + 2 * e if family == "qwen2_5_vl" else 2 * e
    mlp = {"qwen2_vl": 3, "qwen2_5_vl": 4, "qwen3_vl": 2}[family] * e * s.vision_inner
    block = patches * ((2 * norm + 7 * e) * s.vision_hidden + mlp)
    mergers = 1 + len(getattr(s.vision, "deepstack_visual_indexes", ()))
    ends = tokens * hidden + patches * mergers * (norm + 2 * e) * s.vision_hidden
    layers, depth = s.text.num_hidden_layers, s.vision.depth
    # Of a checkpointed block its input, and one block while it is made again.
    inputs = e * (layers * tokens * s.text.hidden_size + depth * patches * s.vision_hidden)
    kept = (1 - checkpointing) * (layers * layer + depth * block) + checkpointing * inputs
    return kept + (max(layer, block) if checkpointing else 0) + ends


def memory(
    s: Shape,
    tokens: int,  # of the largest micro-batch
    patches: int = 0,  # of its images
    *,
    world: int = 1,
    shard_size: int | None = None,  # ranks that share one copy of the policy; None: all
    cuda: bool = True,
    activation_checkpointing: float = 0.0,  # the share of the blocks
    frozen_vision: bool = False,  # A tower that is not trained stays whole on each rank.
    lora_rank: int = 0,  # Only adapters are trained; all else is frozen, on a GPU in bf16.
    lora_vision: bool = False,
    reference: str = "float32",  # or "bfloat16", both sharded; "cpu"; "" for none
    offload: bool = False,  # weights, gradients and optimizer in the CPU's memory
    replica: bool = False,  # TorchEngine's whole copy for sampling, with its KV cache:
    rows: int = 0,
    row_tokens: int = 0,  # prompt + limit
    vllm_bytes: float = 0,  # what vLLM may take while it is awake
) -> list[Item]:
    """List what lies on each GPU. Master weights are float32, gathered layers are bf16.

    Left out are fragments, what NCCL and CUDA take (1-2 GiB) and temporaries within a layer.
    """
    n = shard_size or world
    e = 2 if cuda else 4
    shard = 0 if offload else (s.params - (s.vision_params if frozen_vision else 0)) / n
    frozen = shard if lora_rank else 0
    if lora_rank and not offload:
        shard = lora_rank * (s.text_widths + lora_vision * s.vision_widths) / n
    patches = 0 if frozen_vision else patches
    # token_logprobs makes float32 logits of some columns at a time; a GPU adds their bf16 gradient.
    logits = max(2**27, 2048 * tokens) if cuda else max(2**22, 1024 * tokens)
    tile = min(tokens * s.text.vocab_size, logits) * (6 if cuda else 4)
    # An estimate after FSDP2's documentation: the root (embeddings, head, merger) and two text
    # layers in bf16 with their gradients, and one float32 buffer of the largest unit.
    block = s.text_matrices / s.text.num_hidden_layers
    gathered = 4 * (s.root_params + 2 * block) + 4 * max(s.root_params, block) if cuda else 0
    head_gradient = e * s.head_matrix
    if lora_rank:
        gathered, head_gradient = 2 * cuda * (s.root_params + 2 * block), 0
    # The reference keeps its vision tower whole.
    fixed = {"float32": 4, "bfloat16": 2}.get(reference, 0) * (s.params - s.vision_params) / n
    if fixed:
        fixed += e * s.vision_params + (2 * s.root_params if cuda else 0)
    # The cache grows by doubling, and may come to nearly twice this size.
    cache = replica * 2 * e * s.text.num_hidden_layers * s.kv * rows * row_tokens
    smaller = "nothing but a smaller model"
    more = f"more GPUs to a shard (now {n}), or --offload to the CPU"
    freeze = more if frozen_vision else f"{more}, --freeze_vision"
    micro = "" if activation_checkpointing == 1 else "activation_checkpointing, or "
    micro += f"micro_tokens (now {tokens}; as many as the longest sequence at least)"
    no_reference = "--kl_coef 0 (none), or --offload reference (to the CPU)"
    kept = activations(s, tokens, patches, cuda, activation_checkpointing)
    items = [
        Item(f"activations of {tokens} tokens", kept, "training", micro),
        Item("a tile of logits", tile, "training", "a smaller width in token_logprobs"),
        Item("the head's gradient, whole", head_gradient, "training", smaller),
        Item("frozen weights", e * frozen, "always", more),
        Item("master weights, float32", 4 * shard, "always", more),
        Item("gradients, float32", 4 * shard, "training", freeze),
        Item("AdamW's m and v", 8 * shard, "always", more),
        Item("frozen vision tower, whole", frozen_vision * e * s.vision_params, "always", smaller),
        Item("gathered layers and their gradients", gathered, "training", smaller),
        Item(f"reference, {reference}", fixed, "always", no_reference),
        Item("replica to sample from", replica * e * s.params, "always", "vLLM, which sleeps"),
        Item(f"KV cache of {rows} x {row_tokens} tokens", cache, "sampling", "fewer max_rows"),
        Item("vLLM's share", vllm_bytes, "sampling", "a smaller --vllm_memory"),
    ]
    return [item for item in items if item.bytes]


def peak(items: list[Item]) -> float:
    """Add up what is always there and the larger of training and sampling, in bytes."""
    part = Counter()
    for item in items:
        part[item.when] += item.bytes
    return part["always"] + max(part["training"], part["sampling"])


def preflight(items: list[Item], capacity: float | None = None) -> str:
    """Write the table of the memory. `capacity` is what the GPU has in bytes, None on the CPU."""
    top = peak(items)
    unit, word = (GIB, "GiB") if capacity or top > GIB else (2**20, "MiB")
    rows = [(item.bytes, item.name, item.when) for item in items] + [(top, word, "at the peak")]
    lines = [f"{size / unit:8.2f}  {name} ({when})" for size, name, when in rows]
    text = "\n".join(lines)
    if capacity:
        text += f", the GPU has {capacity / GIB:.1f}"
    if capacity and top > 0.9 * capacity:
        text += ": this will not fit" if top > capacity else ": tight"
    return f"memory per {'GPU' if capacity else 'rank'}, computed:\n{text}"


def explain_oom(error: Exception, items: list[Item], capacity: float) -> str:
    """Turn torch.OutOfMemoryError into a message that names the knobs, the largest item first."""
    asked = re.search(r"allocate ([\d.]+ [KMG]iB)", str(error))
    more, top = f" ({asked[1]} more were wanted)" if asked else "", peak(items)
    lines = [f"out of GPU memory{more}; what fills it, and what to turn:"]
    for item in sorted(items, key=lambda item: -item.bytes):
        if item.bytes >= 0.01 * top:
            lines.append(f"{item.bytes / GIB:8.2f} GiB  {item.name}: {item.knob}")
    lines.append(f"{top / GIB:8.2f} GiB  at the peak; the GPU has {capacity / GIB:.1f}")
    loose = re.search(r"([\d.]+) GiB is reserved by PyTorch but unallocated", str(error))
    if loose and float(loose[1]) >= 1:
        lines.append(f"{loose[1]} GiB are in fragments, which this setting may free:")
        lines.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    return "\n".join(lines)


def announce(items: list[Item], device: torch.device, say: Callable[[str], None]) -> None:
    """Say the table; from now on, `explain_oom` has the last word when the memory is too small."""
    cuda = torch.device(device).type == "cuda"
    capacity = torch.cuda.get_device_properties(device).total_memory if cuda else None
    say(preflight(items, capacity))
    before = sys.excepthook

    def explain(kind, error, trace) -> None:
        if not issubclass(kind, torch.OutOfMemoryError):
            return before(kind, error, trace)
        print(explain_oom(error, items, capacity), file=sys.stderr)

    sys.excepthook = explain


def announce_run(config, policy, device, say, tokens: int, patches: int, **more) -> None:
    """Say the table of a run with these settings of sft.py or grpo.py; `more` goes to `memory`."""
    cuda = device.type == "cuda"
    capacity = torch.cuda.get_device_properties(device).total_memory if cuda else float("inf")
    if cuda and getattr(config, "engine", "") == "vllm":
        more["vllm_bytes"] = config.vllm_memory * capacity
    settings = dict(
        world=dist.get_world_size(),
        shard_size=config.shard_size or None,
        cuda=cuda,
        activation_checkpointing=config.activation_checkpointing * config.checkpoint_share,
        frozen_vision=config.freeze_vision,
        lora_rank=config.lora_rank,
        lora_vision=config.lora_vision,
        reference="",
        offload=config.offload in (True, "all"),
    )
    items = memory(shape(policy.hf.config), tokens, patches, **settings | more)
    announce(items, device, say)
    if peak(items) > capacity and not config.force:
        largest = max(items, key=lambda item: item.bytes)
        raise SystemExit(f"error: this will not fit; {largest.name}: {largest.knob} (or --force)")
