"""The model: a Hugging Face vision-language model of the Qwen-VL family behind one small wrapper.

`load` reads a checkpoint whole, `load_sharded` spreads it over the ranks with FSDP2 before a weight
is read, `Policy.forward` turns a packed batch into the log-probabilities of its labels, `export`
writes the result back in the Hugging Face layout. No forward here pads: sequences lie one after the
other in one row (T,), and `packed_attention` keeps them apart.
"""

import copy
import inspect
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from nano import checkpoint, hub, lora, run
from nano.device import compute_dtype, gpu_path
from nano.generic import packed_refusal
from nano.logprobs import likeliest, token_logprobs
from nano.packing import Batch, Processor, Prompt

# -------------------------------------------------------------------------------------------------
# attention over packed rows


def packed_attention(
    module, q, k, v, attention_mask, scaling=None, packing=None, decode_mask=None, **kwargs
):
    """Causal attention that never looks across sequence borders.

    Training and prefill: q (1, h, T, d), k, v (1, kv, T, d); `packing` says where sequences lie.
    Decoding: q (B, h, 1, d), k, v (B, kv, S, d) from the cache; `decode_mask` (B, 1, 1, S) is True
    where a row has keys. Returns (1, T, h, d) or (B, 1, h, d), and None, as transformers wants.
    """
    if packing is None:
        # The query heads that share a key head look like queries of one head: nothing is repeated.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])  # (B, kv, h / kv, d)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=decode_mask, scale=scaling)
        return out.reshape(q.shape[0], 1, -1, q.shape[-1]), None
    if gpu_path(q.device) and q.dtype != torch.float32:
        return flash_attention(q, k, v, packing, scaling), None
    # Elsewhere one call per piece: nothing is padded, copied or repeated.
    outs = []
    gqa = q.shape[1] > k.shape[1]
    queries, keys, values = (x.split(packing.lengths, 2) for x in (q, k, v))
    for query, key, value, prompt in zip(queries, keys, values, packing.after):
        mask = None
        if prompt is not None:  # a response of r tokens sees all of its p prompt tokens
            key = torch.cat([keys[prompt], key], 2)
            value = torch.cat([values[prompt], value], 2)
            total = key.shape[2]
            mask = packing.lower[total - query.shape[2] : total, :total]  # (r, p + r)
        outs.append(
            F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
            )
        )
    return torch.cat(outs, 2).transpose(1, 2), None  # (1, T, h, d)


def flash_attention(q, k, v, packing, scaling):
    """The same with the variable-length flash attention that ships with torch -> (1, T, h, d)."""
    from torch.nn.attention.varlen import varlen_attn

    options = dict(scale=scaling, window_size=(-1, 0))
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 has no such flag
        options["enable_gqa"] = q.shape[1] > k.shape[1]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (T, h, d)
    if packing.keys is not None:
        k, v = k[packing.keys], v[packing.keys]
    # Causal, with the last query of a piece at its last key: a response sees all of its prompt.
    ranges = (packing.cu_seqlens, packing.cu_keys, packing.longest, packing.longest_keys)
    return varlen_attn(q, k, v, *ranges, **options)[None]


def vision_attention(
    module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """The vision tower's on a GPU: a patch sees its own image (or window) in both directions.

    q, k, v (1, h, T, d) -> (1, T, h, d).
    """
    from torch.nn.attention.varlen import varlen_attn

    flat = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # (T, h, d)
    cu, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    return varlen_attn(*flat, cu, cu, longest, longest, scale=scaling)[None], None


# They are registered without a mask function, so that transformers builds no (T, T) mask. Compiled
# blocks leave attention as it is: it is one kernel already, and the changing lengths of packed rows
# would make it compile again and again. With "flash" in the name of the vision tower's, it gets the
# whole row from transformers, else it would be called once per image.
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
AttentionInterface.register("packed_flash", torch.compiler.disable(vision_attention))


def use_our_kernels(hf, device):
    """Sets the names after the model is made: to make a model from a config with such a name,
    transformers would look for a package of that name."""
    hf.model.language_model.config._attn_implementation = "packed"
    hf.model.visual.config._attn_implementation = "packed_flash" if gpu_path(device) else "sdpa"
    if gpu_path(device):
        embed = hf.model.visual.patch_embed
        embed.forward = partial(linear_patches, embed)
        for norm in (m for m in hf.modules() if type(m).__name__.endswith("RMSNorm")):
            norm.forward = partial(fast_norm, norm)


def linear_patches(embed, patches):
    """The patch embedding (patches, patch_dim) -> (patches, E) as one product.

    Its Conv3d covers each patch once, and such convolutions are slow in bf16.
    """
    weight = embed.proj.weight  # (E, 3, time, height, width)
    return F.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def fast_norm(norm, x):
    """RMSNorm (..., H) in one kernel. transformers' is four, and keeps float32 copies of x."""
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


# -------------------------------------------------------------------------------------------------
# the policy


class Policy(nn.Module):
    """The Hugging Face model and its head as one module, so that FSDP2 gathers both with the root.

    `banned`: ids (K,) that it must never sample.
    """

    def __init__(self, hf, banned: torch.Tensor):
        super().__init__()
        self.hf = hf
        self.register_buffer("banned", banned, persistent=False)

    def forward(self, batch: Batch, temperature: float = 1.0, judge: bool = False):
        """-> logprobs (N,), entropy (N,) of the labelled positions of the packed batch, in order.

        With `judge` also (N,): whether the label is what the model would have said itself.
        """
        hidden = self.hidden_states(batch)[batch.label_index]  # (N, H): no prompt in the head
        weight = self.hf.get_output_embeddings().weight
        out = token_logprobs(hidden, weight, batch.labels, temperature, self.banned)
        if judge:
            out = (*out, likeliest(hidden, weight, self.banned) == batch.labels)
        return out

    def hidden_states(self, batch: Batch, cache=None) -> torch.Tensor:
        """One forward over a packed batch -> (T, H)."""
        images = encode_images(self.hf, batch)
        out = self.hf.model(
            input_ids=batch.ids[None],
            position_ids=batch.position_ids[:, None],  # (3, 1, T): M-RoPE's time, height, width
            mm_encoder_outputs={"image": images} if batch.image_index else None,
            past_key_values=cache,
            use_cache=cache is not None,
            packing=batch.packing,
        )
        hidden = out.last_hidden_state[0]
        if images is not None and not batch.image_index:
            # Every rank must run a sharded vision tower in every forward, or FSDP's collectives
            # wait for it for ever.
            hidden = hidden + 0.0 * images.pooler_output[0].sum().to(hidden.dtype)
        return hidden

    @property
    def visual(self):
        return self.hf.model.visual

    def blocks(self) -> list[nn.Module]:
        """The repeated layers: units of sharding, activation checkpointing and compilation."""
        vision = self.visual.blocks if is_trained(self.visual) else []
        return [*self.hf.model.language_model.layers, *vision]

    def full_weights(self, dtype=None) -> Iterator[tuple[str, torch.Tensor]]:
        return full_weights(self, dtype)


def encode_images(hf, batch: Batch):
    """The vision tower, once per distinct image; repeated for each place where the image stands.

    Returns what transformers' models take as `mm_encoder_outputs`, or None when there is nothing
    to look at and no other rank to wait for.
    """
    features, trained = batch.features, is_trained(hf.model.visual)
    if features is None:
        if batch.pixel_values is None and not trained:
            return None
        pixels, grid = batch.pixel_values, batch.image_grid
        if not batch.image_index:
            pixels, grid = smallest_image(hf, batch.ids.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = image_features(hf, pixels, grid)
    image, *levels = zip(*(features[i] for i in batch.image_index or [0]))
    deepstack = [list(level) for level in levels]
    return SimpleNamespace(pooler_output=list(image), deepstack_features=deepstack)


def image_features(hf, pixels, grid) -> list[tuple]:
    """Per image its (tokens, H) embedding, and Qwen3-VL's further levels for the first layers."""
    out = hf.model.get_image_features(pixels, grid, return_dict=True)
    return list(zip(out.pooler_output, *(getattr(out, "deepstack_features", None) or [])))


def smallest_image(hf, device):
    vision = hf.config.vision_config
    merge = vision.spatial_merge_size
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, merge, merge]], device=device)
    return torch.zeros(merge * merge, size, device=device), grid


@torch.no_grad()
def encode_once(policy, prompts: list[Prompt], device):
    """A frozen vision tower sees each image once a step; its output stays with the Prompt."""
    for prompt in prompts:
        if prompt.pixel_values is not None and prompt.features is None:
            pixels, grid = prompt.pixel_values.to(device), prompt.image_grid.to(device)
            prompt.features = image_features(policy.hf, pixels, grid)


def is_trained(module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# -------------------------------------------------------------------------------------------------
# load and shard


def load(path: str, device="cpu", dtype=torch.float32, freeze_vision=False):
    """A Hugging Face folder or hub name -> (Policy, Processor), whole on this device."""
    path = hub.model(path)
    config = AutoConfig.from_pretrained(path)
    refuse_unpackable(config, path)
    options = dict(config=config, dtype=dtype, use_safetensors=True)  # never a pickle
    hf = AutoModelForImageTextToText.from_pretrained(path, **options)
    policy, processor = wrap(hf, path, device, freeze_vision)
    return policy.to(device), processor


def refuse_unpackable(config, path: str):
    if reason := packed_refusal(config):
        raise ValueError(f"{path}: {reason}")


def wrap(hf, path: str, device="cpu", freeze_vision=False):
    """An HF model (its weights may still be missing) and its folder -> (Policy, Processor)."""
    refuse_unpackable(hf.config, path)
    processor = Processor(path)
    use_our_kernels(hf, device)
    hf.model.visual.requires_grad_(not freeze_vision)
    vocab_size = hf.get_output_embeddings().weight.shape[0]
    return Policy(hf, processor.banned_ids(vocab_size)), processor


def load_sharded(
    path: str, device, dtype=None, freeze_vision=False, adapters=(0,), wrap=wrap, **knobs
):
    """As `load`, but spread over the ranks by `shard` before a weight is read -> Policy.

    The model is made without memory (on the meta device); then every rank reads the slices of the
    safetensors that it keeps. `offload`: weights, gradients and with them the optimizer's state
    live in the CPU's memory and visit the GPU block by block. `adapters`: (rank, alpha, vision) of
    lora.add; the weights, which then stay as they are, get the dtype of the forward, else float32.
    """
    folder = hub.model(path)
    dtype = dtype or (compute_dtype(device) if adapters[0] else torch.float32)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        hf = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    hf.name_or_path = path
    policy, processor = wrap(hf, folder, device, freeze_vision)
    if adapters[0]:
        lora.add(policy, *adapters)
    if freeze_vision and policy.visual is not None:
        # Mixed precision does not reach what is not sharded.
        policy.visual.to(compute_dtype(device))
    shard(policy, device, **knobs)
    policy.to_empty(device="cpu" if knobs.get("offload") else device)
    if freeze_vision:
        policy.visual.to_empty(device=device)
    # What no checkpoint holds: the rotary embeddings' frequencies, say. The outer model comes
    # first, since a model inside it knows better how to fill its own buffers.
    for part in [m for m in hf.modules() if isinstance(m, PreTrainedModel)]:
        for module in part.modules():
            if module._buffers:
                module.to(device)
                part._init_weights(module)
    policy.banned = processor.banned_ids(hf.get_output_embeddings().weight.shape[0]).to(device)
    read_weights(policy, folder)
    lora.reset(policy)
    return policy


def names_in_files(hf, reader: HuggingFaceStorageReader) -> dict[str, str]:
    """{weight: its name in the files of a Hugging Face folder}; adapters are in none."""
    names = {clean_name(n): p for n, p in hf.named_parameters() if ".lora_" not in n}
    # Checkpoints of Qwen2.5-VL carry older names than transformers' modules.
    rules, found = get_model_conversion_mapping(hf), {}
    for key in reader.read_metadata().state_dict_metadata:
        name, _ = rename_source_key(key, rules, [], hf.base_model_prefix, names)
        if name in names:
            found[name] = key
    if missing := [name for name in names if name not in found]:
        some = ", ".join(missing[:3])
        raise ValueError(
            f"{reader.path}: {len(missing)} weights are not in its *.safetensors, e.g. {some}"
        )
    return found


@torch.no_grad()
def read_weights(policy, folder: str):
    """The values of a Hugging Face folder into the weights of a sharded policy (a collective)."""
    reader = HuggingFaceStorageReader(folder)
    weights = {clean_name(name): p.data for name, p in policy.hf.named_parameters()}
    wanted = {key: weights[name] for name, key in names_in_files(policy.hf, reader).items()}
    dcp.load(wanted, storage_reader=reader)


def shard(policy, device, activation_checkpointing=0.0, shard_size=0, offload=False, compile=False):
    """FSDP2: every block is its own unit, the rest (embeddings, head, merger) goes with the root.

    `shard_size` ranks share one copy of the weights (HSDP: those of a node, say), 0 = all. A frozen
    vision tower stays whole on each rank (0.7B weights at most): then its features can be had
    without the other ranks. On a GPU the matrix products run in bf16 over float32 master weights
    and gradients are reduced in float32; on the CPU everything is float32. Gradients come out as
    the mean over ranks (FSDP2's default): scale a summed loss by the number of ranks.
    `activation_checkpointing`: the share of the blocks that forget their activations and compute
    them again for the backward.
    """
    device, world = torch.device(device).type, dist.get_world_size()
    if activation_checkpointing:
        share = float(activation_checkpointing)  # of the blocks, spread evenly
        blocks = enumerate(policy.blocks())
        units = {block for i, block in blocks if int((i + 1) * share) > int(i * share)}
        apply_activation_checkpointing(policy, check_fn=units.__contains__)
    mesh = init_device_mesh(device, (world,))
    if shard_size and shard_size < world:
        names = ("replicate", "shard")
        mesh = init_device_mesh(device, (world // shard_size, shard_size), mesh_dim_names=names)
    precision = MixedPrecisionPolicy()
    if gpu_path(device):
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    frozen = policy.visual is not None and not is_trained(policy.visual)
    options = dict(
        mesh=mesh,
        mp_policy=precision,
        ignored_params=set(policy.visual.parameters()) if frozen else set(),
        offload_policy=CPUOffloadPolicy() if offload and device == "cuda" else OffloadPolicy(),
    )
    for block in policy.blocks():
        if compile:  # not the whole block: below activation checkpointing it would stay eager
            getattr(block, "mlp", block).compile(dynamic=True)
        fully_shard(block, **options)
    return fully_shard(policy, **options)


def rehearse(policy, optimizer, batch, temperature: float = 1.0, reference=None):
    """One step that is thrown away: too little memory for the greatest length shows at once."""
    if reference is not None:
        with torch.no_grad():
            reference(batch, temperature)
    (0 * policy(batch, temperature)[0].sum()).backward()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()  # makes AdamW's moments; they are zero, and no weight changes
    for group, lr in zip(optimizer.param_groups, rates):
        group["lr"] = lr
    optimizer.zero_grad()
    optimizer.state.clear()


def clip_gradients(policy, max_norm: float) -> float:
    """Scales all gradients down to this norm; -> the norm before (a collective)."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return full(nn.utils.clip_grad_norm_(trained, max_norm)).item()


def update(policy, optimizer, max_norm: float, loss: float) -> float:
    """Clips the gradients and takes the step -> their norm before, NaN when it is not taken, since
    it or this rank's loss is not finite on some rank (a collective)."""
    norm = clip_gradients(policy, max_norm)
    taken = checkpoint.accept(loss, norm)
    if taken:
        optimizer.step()
    optimizer.zero_grad()
    return norm if taken else math.nan


# -------------------------------------------------------------------------------------------------
# whole weights: replica and export


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a whole one (a collective: every rank must call it)."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def clean_name(name: str) -> str:
    """A parameter's name without what the wrappers added."""
    return name.replace("_checkpoint_wrapped_module.", "")


def full_weights(policy, dtype=None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of each weight, one by one: no rank holds the whole model (a
    collective: every rank must walk it to its end). `dtype`: cast before it is gathered. Adapters
    are merged into their layers."""
    adapted = {f"{name}.weight": layer for name, layer in lora.layers(policy).items()}
    for name, p in policy.hf.named_parameters():
        if layer := adapted.get(name):
            b, a = full(layer.lora_B.detach()), full(layer.lora_A.detach())
            p = full(p.detach()).float() + layer.scale * (b @ a)
        if ".lora_" not in name:
            yield clean_name(name), full(p.detach().to(dtype or p.dtype))


def replica(policy: Policy) -> Policy:
    """A whole, unsharded Policy of the same shape, to sample from; its weights come from sync."""
    device = policy.banned.device
    config = copy.deepcopy(policy.hf.config)
    dtype = compute_dtype(device)  # as in the forward
    with torch.device(device):
        hf = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    use_our_kernels(hf, device)
    return Policy(hf, policy.banned)


@torch.no_grad()
def export(policy, processor, path: Path):
    """Writes the whole model in the Hugging Face layout, in bf16 after a run on GPUs. Adapters are
    merged into it, and lie beside it for themselves."""
    checkpoint.refuse_broken(policy)
    own = [(clean_name(n), p) for n, p in policy.hf.named_parameters() if ".lora_" in n]
    adapters = {name: full(p.detach()).cpu() for name, p in own}
    state, path = {}, Path(path)
    aside = path.with_name(f"writing-{path.name}")
    for name, whole in full_weights(policy):
        if dist.get_rank() == 0:
            state[name] = (whole.bfloat16() if whole.is_cuda else whole.clone()).cpu()

    def write():
        try:
            policy.hf.save_pretrained(aside, state_dict=state)
            processor.save(aside)
            if adapters:
                lora.save(path.parent / "adapter", policy, adapters)
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
        finally:  # a full disk gets its room back
            shutil.rmtree(aside, ignore_errors=True)

    run.on_main_first(write)
