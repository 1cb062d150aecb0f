"""What a run costs before it is run: FLOPs, memory and time, by arithmetic from a model's config alone.

  s = shape(hf.config)                                  parameters counted exactly, on the meta device
  flops(s, lengths, labels, images).training()          model FLOPs of a packed micro-batch, for `mfu`
  items = memory(s, tokens=16384, world=8, ...)         bytes on each GPU; preflight(items) prints them,
  explain_oom(error, items)                             and this names the knobs after torch.OutOfMemoryError
  cost(s, stage, gpu("H100"), ...)                      seconds of a PTST step; `python ptst.py cost` prints whole runs

FLOPs count matrix multiplications, 2 for each multiply-add. Left out: norms, rotary embeddings, softmax, activation
functions, the interpolated position table of Qwen3-VL, the loss, the optimizer's step. No function here starts anything.
"""

import copy
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

GIB = 2**30

# -----------------------------------------------------------------------------------------------------------------
# GPUs and models


class GPU(NamedTuple):
    name: str
    flops: float  # peak dense bf16 with float32 accumulation, FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes


GPUS = [  # vendors' data sheets, without sparsity; the first whose words are all in the device's name is taken
    GPU(name, tera * 1e12, tb * 1e12, gb * 1e9)
    for name, tera, tb, gb in [
        ("H100 PCIe", 756, 2.0, 80),
        ("H100 NVL", 835, 3.9, 94),
        ("H100", 989, 3.35, 80),
        ("H800", 989, 3.35, 80),
        ("H200", 989, 4.8, 141),
        ("B200", 2250, 8.0, 180),
        ("H20", 148, 4.0, 96),
        ("A100 40GB", 312, 1.555, 40),
        ("A100", 312, 2.04, 80),
        ("A800", 312, 2.04, 80),
        ("L40S", 362, 0.864, 48),
        ("A6000", 155, 0.768, 48),
        ("6000 Ada", 364, 0.96, 48),
        ("5090", 209, 1.79, 32),
        ("4090", 165, 1.01, 24),
        ("3090", 71, 0.936, 24),
    ]
]


def gpu(name):
    """a name such as "H100" or "NVIDIA A100-SXM4-80GB" -> GPU, or None if it is not in the table"""
    return next(
        (g for g in GPUS if all(word in str(name).lower() for word in g.name.lower().split())), None
    )


def mfu(model_flops, seconds, device):
    """model FLOPs utilization of one GPU, 0..1; None on the CPU or a GPU whose peak is not in the table.

    `model_flops`: what this GPU's own share of the work needs, recomputation not counted (Flops.training).
    `device`: a torch.device, "cuda:0", or the name of a GPU.
    """
    name = str(device)
    found = gpu(torch.cuda.get_device_name(device) if name.startswith("cuda") else name)
    return model_flops / seconds / found.flops if found else None


# shapes as published with the checkpoints, for machines without the hub; their parameters add up to those of the files
# name: vocabulary, hidden, MLP, layers, heads, key-value heads, MLP of the vision tower (0: its default), tied head
PUBLISHED = {
    "qwen2-vl-2b": (151936, 1536, 8960, 28, 12, 2, 0, True),
    "qwen2-vl-7b": (152064, 3584, 18944, 28, 28, 4, 0, False),
    "qwen2.5-vl-3b": (151936, 2048, 11008, 36, 16, 2, 3420, True),
    "qwen2.5-vl-7b": (152064, 3584, 18944, 28, 28, 4, 3420, False),
    "qwen2.5-vl-32b": (152064, 5120, 27648, 64, 40, 8, 3456, False),
    "qwen2.5-vl-72b": (152064, 8192, 29568, 80, 64, 8, 3456, False),
    "qwen3-vl-8b": (151936, 4096, 12288, 36, 32, 8, 4304, False),
}


def published_config(name):
    vocab, hidden, mlp, layers, heads, kv_heads, vision_mlp, tied = PUBLISHED[name]
    family = name.rsplit("-", 1)[0].replace("-", "_").replace(".", "_")
    text = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    if family == "qwen2_vl":
        vision = dict(hidden_size=hidden)  # here the width of its output
    else:
        width = 1152 if family == "qwen3_vl" else 1280
        vision = dict(hidden_size=width, intermediate_size=vision_mlp, out_hidden_size=hidden)
    return AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=tied
    )


def find_config(model):
    """a folder, a cached hub name, or a name that tells the size -> (config, words on where it is from). no download.

    a name without a family ("runs/vision-r1-ci-7b/final") is taken for Qwen2.5-VL, the paper's. ValueError: no idea.
    """
    if Path(model).is_dir() or not model.startswith(("runs/", "toy:")):
        try:
            return AutoConfig.from_pretrained(model, local_files_only=True), model
        except (OSError, ValueError):  # neither a checkpoint nor in the hub's cache
            pass
    name = model.lower()
    family = re.search(r"qwen\d(\.\d)?-vl", name)
    size = re.search(r"(?<![\d.])(\d+)b\b", name)
    key = f"{family[0] if family else 'qwen2.5-vl'}-{size[0] if size else ''}"
    if key not in PUBLISHED:
        raise ValueError(
            f"{model}: no config.json there and no known size in the name; --model takes a folder, or one of "
            + ", ".join(PUBLISHED)
        )
    return published_config(key), f"{key}, published shape"


@dataclass
class Shape:
    """what the arithmetic needs of a config; `*_matrices` are weights of matrix multiplications, embeddings are not"""

    text: object  # the config's own halves
    vision: object
    params: int
    vision_params: int
    block_params: int  # of all text layers and vision blocks: the rest is FSDP's root
    text_matrices: int  # applied to every token
    vision_matrices: int  # applied to every patch
    merger_matrices: int  # applied to every merged patch
    vocab: int
    hidden: int
    query: int  # heads x head_dim
    kv: int  # key-value heads x head_dim
    vision_hidden: int
    vision_inner: int
    full_layers: int  # vision blocks that attend to the whole image; the others to windows
    window: int  # patches of a window

    @property
    def head_matrix(self):
        return self.vocab * self.hidden

    @property
    def root_params(self):
        return self.params - self.block_params

    @property
    def kv_bytes(self):
        """of one token in a bf16 cache, all layers"""
        return 2 * 2 * self.text.num_hidden_layers * self.kv


def shape(config):
    """a Qwen2-VL, Qwen2.5-VL or Qwen3-VL config -> Shape, counted on a model without storage (under a second)"""
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise ValueError(f"{config.model_type}: budget.py knows Qwen2-VL, Qwen2.5-VL and Qwen3-VL")
    with torch.device("meta"):
        named = list(
            AutoModelForImageTextToText.from_config(copy.deepcopy(config)).named_parameters()
        )
    text, vision = config.text_config, config.vision_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def count(words, dims=1):
        return sum(p.numel() for n, p in named if re.search(words, n) and p.ndim >= dims)

    old = config.model_type == "qwen2_vl"
    full = [
        i for i in getattr(vision, "fullatt_block_indexes", range(vision.depth)) if i < vision.depth
    ]
    return Shape(
        text,
        vision,
        params=count(""),
        vision_params=count(r"visual\."),
        block_params=count(r"language_model\.layers|visual\.blocks"),
        text_matrices=count(r"language_model\.layers", 2),
        vision_matrices=count(r"visual\.blocks|patch_embed", 2),
        merger_matrices=count("merger", 2),
        vocab=text.vocab_size,
        hidden=text.hidden_size,
        query=text.num_attention_heads * dim,
        kv=text.num_key_value_heads * dim,
        vision_hidden=vision.embed_dim if old else vision.hidden_size,
        vision_inner=vision.embed_dim * vision.mlp_ratio if old else vision.intermediate_size,
        full_layers=len(full),
        window=(getattr(vision, "window_size", 0) // vision.patch_size) ** 2,
    )


# -----------------------------------------------------------------------------------------------------------------
# FLOPs


class Flops(NamedTuple):
    """of one forward, by part"""

    text: float  # projections and MLPs of the text layers
    attention: float  # scores and weighted sums of the text layers, the causal half
    head: float
    vision: float  # the tower with its attention, and the merger

    @property
    def forward(self):
        return sum(self)

    def training(self, frozen_vision=False):
        """model FLOPs of forward and backward: 3 forwards, or 1 of a frozen tower. this is what MFU counts"""
        return 3 * self.forward - (2 * self.vision if frozen_vision else 0)

    def hardware(self, activation_checkpointing=False, frozen_vision=False):
        """what is really computed: token_logprobs makes its logits twice, checkpointing makes every block twice, 4 forwards
        in all. an upper bound with checkpointing, by up to a tenth: torch stops before a block's last matmul. left out:
        the scores that flash attention makes again in its backward (half a forward of `attention`)."""
        again = self.text + self.attention + (0 if frozen_vision else self.vision)
        return self.training(frozen_vision) + self.head + (again if activation_checkpointing else 0)


def flops(s, lengths, labels=0, images=()):
    """forward FLOPs of a packed batch: tokens of each sequence, labelled positions, and each distinct image.

    an image is its grid (time, height, width) in patches, or just a number of patches; without a grid the windows of
    Qwen2.5-VL are taken as full ones, with it they are cut at the borders as the model cuts them.
    """
    text = 2 * s.text_matrices * sum(lengths)
    attention = (
        2 * s.text.num_hidden_layers * s.query * sum(n * (n + 1) for n in lengths)
    )  # 2 matmuls, half the square
    patches = whole = windows = 0  # the last two: query-key pairs
    for image in images:
        if isinstance(image, (int, float)):
            n, pairs = image, image * min(image, s.window)
            square = image**2
        else:
            time, height, width = (int(x) for x in image)
            n, square = (
                time * height * width,
                time * (height * width) ** 2,
            )  # frames do not see each other
            side = math.isqrt(s.window)
            cut = (
                [n // side * side**2 + (n % side) ** 2 for n in (height, width)] if side else (0, 0)
            )
            pairs = time * cut[0] * cut[1]
        patches, whole, windows = patches + n, whole + square, windows + pairs
    pairs = s.full_layers * whole + (s.vision.depth - s.full_layers) * windows
    merged = patches / s.vision.spatial_merge_size**2
    vision = (
        2 * (s.vision_matrices * patches + s.merger_matrices * merged) + 4 * s.vision_hidden * pairs
    )
    return Flops(text, attention, 2 * s.head_matrix * labels, vision)


# -----------------------------------------------------------------------------------------------------------------
# memory


class Item(NamedTuple):
    name: str
    bytes: float
    when: str  # "always", "training" or "sampling": the last two do not meet
    knob: str  # what makes it smaller


def activations(
    s, tokens, patches=0, cuda=True, activation_checkpointing=False, frozen_vision=False
):
    """bytes that a forward keeps for the backward, of `tokens` packed tokens and `patches` of their images.

    e = 2 bytes (bf16) on a GPU, 4 on the CPU. one channel of an RMSNorm keeps 4 + 2e (its float32 input, the normalised
    value, the output that feeds the next matmul), one of a LayerNorm 2e. per token a text layer keeps two norms of H,
    q, k, v and attention's output e (2Q + 2K) (CPU: keys repeated to all heads and the output once more, 5 Q e), and
    4 I e of the gated MLP. per patch a vision block keeps two norms, 7 E e of its attention (v keeps the whole qkv
    alive) and 4, 3 or 2 times I e of its MLP (SiLU gate, quick GELU, GELU). with checkpointing: the input of every
    block, and one block in full while it is computed again. left out: masks, index tables, softmax statistics.
    """
    e = 2 if cuda else 4
    family = s.text.model_type.removesuffix("_text")
    attend = e * (2 * s.query + 2 * s.kv if cuda else 5 * s.query)
    if family == "qwen3_vl":  # norms of q and k; their output is not kept, the rotated one is
        attend += (4 + e) * (s.query + s.kv)
    layer = tokens * (2 * (4 + 2 * e) * s.hidden + attend + 4 * e * s.text.intermediate_size)
    norm, mlp = {"qwen2_vl": (2 * e, 3), "qwen2_5_vl": (4 + 2 * e, 4), "qwen3_vl": (2 * e, 2)}[
        family
    ]
    patches = 0 if frozen_vision else patches
    block = patches * (
        2 * norm * s.vision_hidden + e * (7 * s.vision_hidden + mlp * s.vision_inner)
    )
    mergers = 1 + len(getattr(s.vision, "deepstack_visual_indexes", ()))
    ends = tokens * (4 + 2 * e) * s.hidden + patches * mergers * (norm + 2 * e) * s.vision_hidden
    layers, depth = s.text.num_hidden_layers, s.vision.depth
    if activation_checkpointing:
        return (
            e * (layers * tokens * s.hidden + depth * patches * s.vision_hidden)
            + max(layer, block)
            + ends
        )
    return layers * layer + depth * block + ends


def memory(
    s,
    tokens,
    patches=0,
    *,
    world=1,
    shard_size=None,
    cuda=True,
    activation_checkpointing=False,
    frozen_vision=False,
    reference="float32",
    offload=False,
    replica=False,
    rows=0,
    row_tokens=0,
    vllm_bytes=0,
):
    """bytes on each GPU -> [Item]; `peak` adds them up.

    tokens, patches: of the largest micro-batch. shard_size: ranks that share one copy of the policy (HSDP; None = all of
    `world`). reference: "float32" or "bfloat16" (sharded alike), "cpu", or "" for none (beta 0). offload: weights, gradients
    and optimizer live in the CPU's memory. a vision tower that is not trained stays whole on each rank. replica: TorchEngine's
    whole copy for sampling, with a KV cache of `rows` x `row_tokens` (prompt + limit; it grows by doubling, and may come
    to nearly twice that). vllm_bytes: what vLLM may take
    while it is awake. on a GPU the master weights are float32 and layers are gathered in bf16; on the CPU all is float32.

    the gathered layers are an estimate after FSDP2's documentation: the root (embeddings, head, merger) stays gathered,
    two blocks at a time beside it, their bf16 gradients, and one float32 buffer of the largest unit being reduced. left
    out: the allocator's fragments, NCCL's and CUDA's own (1-2 GiB), the backward's temporaries within one layer.
    """
    n = shard_size or world
    trained = s.params - (s.vision_params if frozen_vision else 0)
    e = 2 if cuda else 4
    block = s.text_matrices / s.text.num_hidden_layers  # a text layer: larger than a vision block
    sharded = f"more GPUs to a shard (now {n})"
    # token_logprobs: float32 logits of so many columns at a time, on a GPU their bf16 gradient beside them
    tile = min(
        tokens * s.vocab, max(2**27, 2048 * tokens) if cuda else max(2**22, 1024 * tokens)
    ) * (6 if cuda else 4)
    kept = activations(s, tokens, patches, cuda, activation_checkpointing, frozen_vision)
    micro = "" if activation_checkpointing else "activation_checkpointing, or "
    micro += f"micro_tokens (now {tokens}; as many as the longest sequence at least)"
    items = [
        Item(f"activations of {tokens} tokens", kept, "training", micro),
        Item("a tile of logits", tile, "training", "a smaller width in token_logprobs"),
        Item(
            "the head's gradient, whole",
            e * s.head_matrix,
            "training",
            "nothing but a smaller model",
        ),
    ]
    if not offload:
        sharded += ", or --offload to the CPU"
        items += [
            Item("master weights, float32", 4 * trained / n, "always", sharded),
            Item(
                "gradients, float32",
                4 * trained / n,
                "training",
                sharded + ("" if frozen_vision else ", --freeze_vision"),
            ),
            Item("AdamW's m and v", 8 * trained / n, "always", sharded),
        ]
    if frozen_vision:
        items += [
            Item(
                "frozen vision tower, whole",
                e * s.vision_params,
                "always",
                "nothing but a smaller model",
            )
        ]
    if cuda:
        gathered = 4 * (s.root_params + 2 * block) + 4 * max(s.root_params, block)
        items += [
            Item(
                "gathered layers and their gradients",
                gathered,
                "training",
                "nothing but a smaller model",
            )
        ]
    if reference in ("float32", "bfloat16"):
        text = s.params - s.vision_params
        size = (
            (4 if reference == "float32" else 2) * text / n
            + e * s.vision_params
            + (2 * s.root_params if cuda else 0)
        )
        items += [
            Item(
                f"reference, {reference}",
                size,
                "always",
                "--kl_coef 0 (none), or --offload reference (to the CPU)",
            )
        ]
    if replica:
        cache = 2 * e * s.text.num_hidden_layers * s.kv * rows * row_tokens
        items += [
            Item(
                "replica to sample from",
                e * s.params,
                "always",
                "vLLM, which sleeps while training runs",
            ),
            Item(
                f"KV cache, {rows} rows x {row_tokens} tokens",
                cache,
                "sampling",
                f"max_rows (now {rows})",
            ),
        ]
    if vllm_bytes:
        items += [
            Item("vLLM's share", vllm_bytes, "sampling", "a smaller share of the GPU for vLLM")
        ]
    return items


def peak(items):
    """bytes: what is always there, and the larger of training's and sampling's"""
    part = {
        when: sum(i.bytes for i in items if i.when == when)
        for when in ("always", "training", "sampling")
    }
    return part["always"] + max(part["training"], part["sampling"])


def preflight(items, capacity=None):
    """the table as text, a line per item in GiB. `capacity`: bytes of the GPU, None on the CPU"""
    unit, word = (GIB, "GiB") if capacity or peak(items) > GIB else (2**20, "MiB")
    lines = [
        f"{i.bytes / unit:8.2f}  {i.name}{'' if i.when == 'always' else f' ({i.when})'}"
        for i in items
        if i.bytes
    ]
    total = f"{peak(items) / unit:8.2f}  {word} at the peak"
    if capacity:
        total += f", the GPU has {capacity / GIB:.1f}"
        total += (
            ": this will not fit"
            if peak(items) > capacity
            else ": tight"
            if peak(items) > 0.9 * capacity
            else ""
        )
    return "\n".join(
        ["memory per GPU, computed:" if capacity else "memory per rank, computed:", *lines, total]
    )


def explain_oom(error, items, capacity=None, when=None):
    """torch.OutOfMemoryError -> a message that names the knobs, the largest item first. `when`: "training", "sampling"
    or None, where it struck: what was not there at that time is left out"""
    there = sorted(
        (i for i in items if when in (None, i.when) or i.when == "always"), key=lambda i: -i.bytes
    )
    asked = re.search(r"allocate ([\d.]+ [KMG]iB)", str(error))
    lines = [
        "out of GPU memory"
        + (f" ({asked[1]} more were wanted)" if asked else "")
        + "; what fills it, and what to turn:"
    ]
    lines += [
        f"{i.bytes / GIB:8.2f} GiB  {i.name}: {i.knob}"
        for i in there
        if i.bytes >= 0.01 * peak(items)
    ]
    has = f"; the GPU has {capacity / GIB:.1f}" if capacity else ""
    lines.append(f"{peak(items) / GIB:8.2f} GiB  at the peak, computed{has}")
    loose = re.search(r"([\d.]+) GiB is reserved by PyTorch but unallocated", str(error))
    if loose and float(loose[1]) >= 1:
        lines.append(
            f"{loose[1]} GiB lie in fragments: try PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    return "\n".join(lines)


def announce(items, device, say):
    """say the table; from here on, an out-of-memory error ends the program with `explain_oom`'s words"""
    capacity = (
        torch.cuda.get_device_properties(device).total_memory
        if torch.device(device).type == "cuda"
        else None
    )
    say(preflight(items, capacity))
    others = sys.excepthook
    sys.excepthook = lambda kind, error, trace: (
        print(explain_oom(error, items, capacity), file=sys.stderr)
        if issubclass(kind, torch.OutOfMemoryError)
        else others(kind, error, trace)
    )


# -----------------------------------------------------------------------------------------------------------------
# time


def answer_lengths(limit, mean_fill, n=64):
    """n quantiles of the lengths assumed: limit x u^((1 - f) / f), u uniform, whose mean is f x limit (ours).

    f = 0.5: uniform between nothing and the limit; f = 1: every answer at its limit.
    """
    if not 0 < mean_fill <= 1:
        raise ValueError(
            f"--mean-fill is {mean_fill}, it must lie in (0, 1]: the mean length over the limit"
        )
    return [limit * ((i + 0.5) / n) ** ((1 - mean_fill) / mean_fill) for i in range(n)]


PASSES = ("rollout", "reference", "old", "training")


def cost(
    s,
    stage,
    device,
    gpus=8,
    *,
    questions=128,
    minibatches=1,
    kl_coef=0.01,
    frozen_vision=False,
    micro_tokens=16384,
    activation_checkpointing=False,
    mfu=0.45,
    bandwidth_share=0.6,
    mean_fill=0.5,
    image_tokens=512,
    prompt_tokens=128,
):
    """one step of a stage (L, G, steps) on `gpus` of the GPU `device` -> dict of tokens, FLOPs (all GPUs) and seconds.

    passes run at `mfu` of the peak. generation: every decoding step reads the text weights and the keys and values of
    all rows at `bandwidth_share` of the bandwidth, or computes at `mfu`, whichever takes longer; prompts are prefilled
    once per question. rows decode together as far as their keys and values fit into what training's states leave of 90 %
    of the memory; where an engine would not fit beside them they are taken as offloaded. weights larger than two
    thirds of that are split over 2, 4, ... GPUs. left out: rewards, weight sync, the optimizer, FSDP's gathers.
    """
    limit, group, _ = stage
    if gpus < 1 or not (0 < mfu <= 1 and 0 < bandwidth_share <= 1):
        raise ValueError(
            f"{gpus} GPUs at mfu {mfu} and bandwidth share {bandwidth_share}: a GPU at least, and shares in (0, 1]"
        )
    answers, prompt = answer_lengths(limit, mean_fill), image_tokens + prompt_tokens
    share = questions * group / len(answers)  # real answers to a quantile
    # one pass of the trainer. a group's members lie in several micro-batches, and each of these encodes the image
    whole = [prompt + a for a in answers]
    bins = max(1, share * sum(whole) / gpus / minibatches / micro_tokens)
    encoded = (
        questions * bins * (1 - (1 - 1 / bins) ** group)
    )  # micro-batches with a member of a group, expected
    packed = flops(s, whole, sum(answers))
    image = flops(s, [], 0, [image_tokens * s.vision.spatial_merge_size**2])
    forward = share * packed.forward + encoded * image.forward
    training = share * packed.training() + encoded * image.training(frozen_vision)
    again = activation_checkpointing, frozen_vision
    hardware = share * packed.hardware(*again) + encoded * image.hardware(*again)
    # generation: what the prompts cost, and all the tokens after them
    prefill = questions * (flops(s, [prompt], 1).forward + image.forward)
    decode = share * (packed.forward - flops(s, [prompt] * len(answers)).forward)

    held = (
        (12 + (4 if kl_coef else 0)) * s.params / gpus
    )  # masters, m, v, reference; gradients are not there yet
    usable, split = 0.9 * device.memory, 1
    offloaded = usable - held < 0.2 * device.memory
    room = usable if offloaded else usable - held
    while 2 * s.params / split > room * 2 / 3 and 2 * split <= gpus:
        split *= 2
    room = room * split - 2 * s.params
    if room <= 0:
        raise ValueError(
            f"{gpus} x {device.name} cannot hold the {2 * s.params / 1e9:.0f} GB of weights that generation reads"
        )
    rows = questions * group * split / gpus  # of one engine
    reads = sum(a * (prompt + a / 2) for a in answers) / len(
        answers
    )  # cached tokens that one answer reads in all
    batch = max(
        1, room / (s.kv_bytes * reads / (sum(answers) / len(answers)))
    )  # by the mean size of a live row
    # an engine that holds all its rows runs until the longest ends; else the rows pass through it, and the last drain
    decodings = limit * (1 - mean_fill + mean_fill * max(1, rows / batch))
    read = device.bandwidth * bandwidth_share * split
    peak_flops = gpus * device.flops * mfu
    out = dict(
        tokens=share * sum(answers),
        rows=min(rows, batch),
        split=split,
        held=held,
        offloaded=offloaded,
        weights_s=decodings * 2 * (s.text_matrices + s.head_matrix) / read,
        kv_s=rows * reads * s.kv_bytes / read,
        prefill_s=prefill / peak_flops,
        compute_s=decode / peak_flops,
        hardware_flops=hardware,
        rollout_flops=prefill + decode,
        reference_flops=forward if kl_coef else 0,
        old_flops=forward if minibatches > 1 else 0,
        training_flops=training,
    )
    out |= {f"{k}_s": out[f"{k}_flops"] / peak_flops for k in ("reference", "old", "training")}
    out["rollout_s"] = out["prefill_s"] + max(out["weights_s"] + out["kv_s"], out["compute_s"])
    return out | dict(
        step_s=sum(out[f"{k}_s"] for k in PASSES), step_flops=sum(out[f"{k}_flops"] for k in PASSES)
    )


def report(s, stages, device, gpus, **settings):
    """the text that `python ptst.py cost` prints for stages (L, G, steps): each stage per step, and the whole run"""
    lines, total = [], dict(tokens=0, step_flops=0, step_s=0)
    for number, stage in enumerate(stages, 1):
        limit, group, steps = stage
        c = cost(s, stage, device, gpus, **settings)
        lines += [
            f"stage {number}: {limit} x {group}, {steps} steps; {c['tokens'] / 1e6:.2f} M tokens sampled a step",
            f"  {'a step':10} {'PFLOP':>9} {'s':>8}",
        ]
        engine = "GPU" if c["split"] == 1 else f"{c['split']} GPUs"
        notes = dict(
            rollout=f"weights {c['weights_s']:.1f} s + KV cache {c['kv_s']:.1f} s (as FLOPs {c['compute_s']:.1f} s), prefill "
            f"{c['prefill_s']:.1f} s; {c['rows']:.0f} rows at a time per {engine}"
            + (
                f"; training's states ({c['held'] / 1e9:.0f} GB a GPU) offloaded meanwhile"
                if c["offloaded"]
                else ""
            ),
            training=f"hardware {c['hardware_flops'] / 1e15:.0f} PFLOP with what is computed again",
        )
        for part in (k for k in PASSES if c[f"{k}_flops"]):
            line = f"  {part:10} {c[f'{part}_flops'] / 1e15:9.1f} {c[f'{part}_s']:8.1f}  {notes.get(part, '')}"
            lines.append(line.rstrip())
        hours = c["step_s"] * steps / 3600
        lines.append(
            f"  {'all':10} {c['step_flops'] / 1e15:9.1f} {c['step_s']:8.1f}  "
            f"the stage: {hours:.1f} h, {hours * gpus:.0f} GPU hours"
        )
        total = {k: v + c[k] * steps for k, v in total.items()}
    hours = total["step_s"] / 3600
    lines.append(
        f"the run: {total['tokens'] / 1e9:.2f} G tokens sampled, {total['step_flops'] / 1e18:.0f} EFLOP, {hours:.1f} h, "
        f"{hours * gpus:.0f} GPU hours"
    )
    return "\n".join(lines)
