"""The model of nano-vision-r1: a Hugging Face vision-language model behind one small wrapper.

`load` reads a checkpoint (Qwen2-VL, Qwen2.5-VL, Qwen3-VL: whatever AutoModelForImageTextToText knows that places
images by M-RoPE), `shard` spreads it with FSDP2, `Policy.forward` turns a packed batch into the log-probabilities of
its labels, and `export` writes the result back in the Hugging Face layout. No forward here pads: sequences lie one
after the other in one row (T,), and `packed_attention` keeps them apart.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
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
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from nano.logprobs import likeliest, token_logprobs

# -----------------------------------------------------------------------------------------------------------------
# attention over packed rows


def packed_attention(
    module, q, k, v, attention_mask, scaling=None, packing=None, decode_mask=None, **kwargs
):
    """causal attention that never looks across sequence borders.

    training and prefill: q (1, h, T, d), k, v (1, kv, T, d); `packing` says where the sequences lie.
    decoding: q (B, h, 1, d), k, v (B, kv, S, d) from the cache; `decode_mask` (B, 1, 1, S) is True where a row has keys.
    returns (1, T, h, d) or (B, 1, h, d), None as transformers' attention functions do.
    """
    groups = q.shape[1] // k.shape[1]
    if (
        packing is None
    ):  # the query heads that share a key head look like queries of one head: nothing is repeated
        q = q.view(q.shape[0], k.shape[1], groups, -1)  # (B, kv, h / kv, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=decode_mask, scale=scaling)
        return out.reshape(q.shape[0], 1, -1, q.shape[-1]), None
    if q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import (
            varlen_attn,  # flash attention that ships with torch
        )

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (T, h, d)
        if packing.keys is not None:
            k, v = k[packing.keys], v[packing.keys]
        # causal, the last query of a piece at its last key: a response sees all of its prompt
        out = varlen_attn(
            q,
            k,
            v,
            packing.cu_seqlens,
            packing.cu_keys,
            packing.longest,
            packing.longest_keys,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=groups > 1,
        )
        return out[None], None
    # elsewhere one call per piece: nothing is padded, copied or repeated
    queries, keys, values = (x.split(packing.lengths, 2) for x in (q, k, v))
    outs = []
    for query, key, value, prompt in zip(queries, keys, values, packing.after):
        mask = None
        if prompt is not None:
            key, value = torch.cat([keys[prompt], key], 2), torch.cat([values[prompt], value], 2)
            mask = packing.lower[
                key.shape[2] - query.shape[2] : key.shape[2], : key.shape[2]
            ]  # (r, p + r)
        outs.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=groups > 1,
            )
        )
    return torch.cat(outs, 2).transpose(1, 2), None  # (1, T, h, d)


def vision_attention(
    module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """the vision tower's on a GPU, q, k, v (1, h, T, d): every patch sees its own image (or window) in both directions"""
    from torch.nn.attention.varlen import varlen_attn

    flat = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # (T, h, d)
    cu, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    return varlen_attn(*flat, cu, cu, longest, longest, scale=scaling)[None], None


# registered without a mask function, so that transformers builds no (T, T) mask. compiled blocks leave attention as it is:
# it is one kernel already, and the lengths of a packed row would make it compile again and again
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
# "flash" in the name: transformers then gives the whole row, else it would call once per image
AttentionInterface.register("packed_flash", torch.compiler.disable(vision_attention))


# -----------------------------------------------------------------------------------------------------------------
# the policy


def hidden_states(hf, batch, cache=None):
    """one forward over a packed batch (see packing.Batch) -> (T, H) float"""
    images = encode_images(hf, batch)
    out = hf.model(
        input_ids=batch.ids[None],
        position_ids=batch.position_ids[:, None],  # (3, 1, T): M-RoPE's time, height, width
        mm_encoder_outputs={"image": images} if batch.image_index else None,
        past_key_values=cache,
        use_cache=cache is not None,
        packing=batch.packing,
    )
    hidden = out.last_hidden_state[0]
    if images is not None and not batch.image_index:
        # every rank must run a sharded vision tower in every forward, or FSDP's collectives wait for it for ever
        hidden = hidden + 0.0 * images.pooler_output[0].sum().to(hidden.dtype)
    return hidden


def encode_images(hf, batch):
    """the vision tower, once per distinct image; repeated for each place where the image stands in the packed row.

    what transformers' models take as `mm_encoder_outputs`; None when there is nothing to look at and nobody to wait for.
    """
    features, trained = batch.features, is_trained(hf.model.visual)
    if features is None:
        if batch.pixel_values is None and not trained:
            return None
        pixels, grid = (
            (batch.pixel_values, batch.image_grid)
            if batch.image_index
            else smallest_image(hf, batch.ids.device)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = image_features(hf, pixels, grid)
    places = batch.image_index or [0]
    image, *levels = zip(*(features[i] for i in places))
    return SimpleNamespace(
        pooler_output=list(image), deepstack_features=[list(level) for level in levels]
    )


def image_features(hf, pixels, grid):
    """-> per image a tuple: its (tokens, H) embedding, and Qwen3-VL's further levels for the first layers of the text model"""
    out = hf.model.get_image_features(pixels, grid, return_dict=True)
    return list(zip(out.pooler_output, *(getattr(out, "deepstack_features", None) or [])))


def smallest_image(hf, device):
    vision = hf.config.vision_config
    merge = vision.spatial_merge_size
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(merge * merge, size, device=device), torch.tensor(
        [[1, merge, merge]], device=device
    )


@torch.no_grad()
def encode_once(policy, prompts, device):
    """a frozen vision tower sees each image once a step: its output stays with the Prompt for every later pass"""
    for prompt in prompts:
        if prompt.pixel_values is not None and prompt.features is None:
            prompt.features = image_features(
                policy.hf, prompt.pixel_values.to(device), prompt.image_grid.to(device)
            )


class Policy(nn.Module):
    """the Hugging Face model and its head as one module, so that FSDP2 gathers the head with the root"""

    def __init__(self, hf, banned=None):
        super().__init__()
        self.hf = hf
        self.register_buffer("banned", banned, persistent=False)

    @property
    def visual(self):
        return self.hf.model.visual

    @property
    def vision_blocks(self):
        return self.visual.blocks

    def hidden(self, batch):
        return hidden_states(self.hf, batch)[
            batch.label_index
        ]  # (N, H): the prompt never reaches the head

    def forward(self, batch, temperature=1.0, judge=False):
        """-> logprobs (N,), entropy (N,) of the N labelled positions of the packed batch, in its order; with `judge`
        also (N,) whether the label is what the model would have said"""
        hidden, weight = self.hidden(batch), self.hf.get_output_embeddings().weight
        out = token_logprobs(hidden, weight, batch.labels, temperature, self.banned)
        return (*out, likeliest(hidden, weight, self.banned) == batch.labels) if judge else out


class Processor:
    """tokenizer, image processor and the ids that the code needs; torchvision is not needed (Pillow does the work)"""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        if not hasattr(self.image_processor, "merge_size"):
            raise ValueError(
                f"{path}: not a Qwen-VL model; of the others sft.py alone trains one kind, Llama-3.2-Vision"
            )
        token = self.tokenizer.convert_tokens_to_ids
        self.image_token = token("<|image_pad|>")
        self.merge_size = self.image_processor.merge_size
        # where a rollout ends: the turn marker of a chat model, the text's end of a base model
        self.eos_ids = sorted(
            {self.tokenizer.eos_token_id, token("<|im_end|>"), token("<|endoftext|>")} - {None}
        )

    def banned_ids(self, vocab_size):
        """ids that a policy must never sample: vision markers (an image that is not there), and padding of the table"""
        names = (
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
        )
        ids = {self.tokenizer.convert_tokens_to_ids(n) for n in names} - {None}
        return torch.tensor(sorted(ids | set(range(len(self.tokenizer), vocab_size))))

    def save(self, path):
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)


def load(path, device="cpu", dtype=torch.float32, freeze_vision=False):
    """a Hugging Face directory or hub name -> (Policy, Processor), whole on this device: to sample from, and for tests"""
    hf = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    policy, processor = wrap(hf, path, device, freeze_vision)
    return policy.to(device), processor


def wrap(hf, path, device="cpu", freeze_vision=False):
    """an HF model (its weights may still be missing) + the folder of its tokenizer -> (Policy, Processor)"""
    if not hasattr(hf.model, "visual") or not hasattr(hf.model, "language_model"):
        raise ValueError(
            f"{path}: {type(hf).__name__} has no vision tower that this code can place (Qwen-VL family)"
        )
    processor = Processor(path)
    hf.model.language_model.config._attn_implementation = "packed"
    if torch.device(device).type == "cuda":
        hf.model.visual.config._attn_implementation = "packed_flash"
    hf.model.visual.requires_grad_(not freeze_vision)
    vocab_size = hf.get_output_embeddings().weight.shape[0]
    return Policy(hf, processor.banned_ids(vocab_size)), processor


def load_sharded(
    path, device, dtype=torch.float32, freeze_vision=False, offload=False, wrap=wrap, **knobs
):
    """as `load`, but spread over the ranks by `shard` before a weight is read -> Policy.

    the model is made without memory (meta device); then every rank reads the slices of the safetensors that it keeps.
    `offload`: weights, gradients and with them the optimizer's state live in the CPU's memory, and visit the GPU block by block.
    """
    folder = path
    if not Path(path).is_dir():
        folder = snapshot_download(
            path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype
        )
    policy, processor = wrap(hf, folder, device, freeze_vision)
    shard(policy, device, offload=offload, **knobs)
    policy.to_empty(device="cpu" if offload else device)
    if freeze_vision:
        policy.visual.to_empty(device=device)
    for (
        module
    ) in hf.modules():  # what no checkpoint holds: the frequencies of the rotary embeddings
        if module._buffers:
            module.to(device)
            hf._init_weights(module)
    policy.banned = processor.banned_ids(hf.get_output_embeddings().weight.shape[0]).to(device)
    read_weights(policy, folder)
    return policy


@torch.no_grad()
def read_weights(policy, folder):
    """the values of a Hugging Face folder into the weights of a sharded policy (a collective)"""
    reader = HuggingFaceStorageReader(folder)
    names = {clean_name(n): p for n, p in policy.hf.named_parameters()}
    rules = get_model_conversion_mapping(
        policy.hf
    )  # checkpoints of Qwen2.5-VL carry older names than its modules
    wanted = {}
    for key in reader.read_metadata().state_dict_metadata:
        name, _ = rename_source_key(key, rules, [], policy.hf.base_model_prefix, names)
        if name in names:
            wanted[key] = names.pop(name).data
    if names:
        raise ValueError(
            f"{folder}: {len(names)} weights are not in its *.safetensors, e.g. {', '.join(list(names)[:3])}"
        )
    dcp.load(wanted, storage_reader=reader)


def blocks(policy):
    """the repeated layers: the units of sharding, activation checkpointing and compilation; a frozen vision tower has none"""
    return [
        *policy.hf.model.language_model.layers,
        *(policy.vision_blocks if is_trained(policy.visual) else []),
    ]


def is_trained(module):
    return any(p.requires_grad for p in module.parameters())


def shard(
    policy, device, activation_checkpointing=False, shard_size=0, offload=False, compile=False
):
    """FSDP2: every block its own unit, the rest (embeddings, head, merger) with the root.

    `shard_size` ranks share one copy of the weights (HSDP: one node's, say), 0 = all of them. a frozen vision tower stays whole
    on each rank (0.7B weights at most): then its features can be had without the other ranks.
    on a GPU the matmuls run in bf16 over float32 master weights and gradients are reduced in float32; on the CPU
    everything is float32. gradients come out as the mean over ranks (FSDP2's default): scale a summed loss by the
    number of ranks.
    """
    device, world = torch.device(device).type, dist.get_world_size()
    if activation_checkpointing:
        units = set(blocks(policy))
        apply_activation_checkpointing(policy, check_fn=lambda m: m in units)
    mesh = init_device_mesh(device, (world,))
    if shard_size and shard_size < world:
        mesh = init_device_mesh(
            device, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
        )
    visual = policy.visual
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if device == "cuda"
        else MixedPrecisionPolicy(),
        ignored_params=set() if is_trained(visual) else set(visual.parameters()),
        offload_policy=CPUOffloadPolicy() if offload and device == "cuda" else OffloadPolicy(),
    )
    for block in blocks(policy):
        if compile:
            block.compile(dynamic=True)
        fully_shard(block, **options)
    return fully_shard(policy, **options)


def rehearse(policy, optimizer, batch, temperature=1.0, reference=None):
    """one step that is thrown away: what runs out of memory at the greatest length does so now, and not after a night"""
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


def full(tensor):
    """a sharded tensor as a whole one (a collective: every rank must call it)"""
    return (
        tensor.to(tensor.device_mesh.device_type).full_tensor()
        if isinstance(tensor, DTensor)
        else tensor
    )


def clean_name(name):
    """parameter names without what the wrappers added"""
    return name.replace("_checkpoint_wrapped_module.", "")


def replica(policy):
    """a whole, unsharded HF model of the same shape, to sample from; its weights come from copy_weights"""
    device = next(policy.parameters()).device
    dtype = (
        torch.bfloat16 if device.type == "cuda" else torch.float32
    )  # as in the trainer's forward
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(copy.deepcopy(policy.hf.config), dtype=dtype)


@torch.no_grad()
def copy_weights(policy, replica):
    """the training weights of a (sharded) Policy -> a whole HF model with the same names, parameter by parameter"""
    target = dict(replica.named_parameters())
    for name, p in policy.hf.named_parameters():
        target[clean_name(name)].copy_(full(p))


@torch.no_grad()
def export(policy, processor, path):
    """write the whole model in the Hugging Face layout, bf16 on a GPU run, float32 on the CPU; gathered weight by weight"""
    state = {}
    for name, p in policy.hf.named_parameters():
        whole = full(p)
        if dist.get_rank() == 0:
            state[clean_name(name)] = (whole.bfloat16() if whole.is_cuda else whole.clone()).cpu()
    if dist.get_rank() == 0:
        policy.hf.save_pretrained(path, state_dict=state)
        processor.save(path)
    dist.barrier()
