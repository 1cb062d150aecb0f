"""The model of nano-vision-r1: a Hugging Face vision-language model behind one small wrapper.

`load` reads a checkpoint (Qwen2-VL, Qwen2.5-VL, Qwen3-VL: whatever AutoModelForImageTextToText knows that places
images by M-RoPE), `shard` spreads it with FSDP2, `Policy.forward` turns a packed batch into the log-probabilities of
its labels, `token_logprobs` does so without ever making the (tokens x vocabulary) tensor, and `export` writes the
result back in the Hugging Face layout. No forward here pads: sequences lie one after the other in one row (T,), and
`packed_attention` keeps them apart.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# -----------------------------------------------------------------------------------------------------------------
# attention over packed rows


def packed_attention(module, q, k, v, attention_mask, scaling=None, packing=None, decode_mask=None, **kwargs):
    """causal attention that never looks across sequence borders.

    training and prefill: q (1, h, T, d), k, v (1, kv, T, d); `packing` says where the sequences lie.
    decoding: q (B, h, 1, d), k, v (B, kv, S, d) from the cache; `decode_mask` (B, 1, 1, S) is True where a row has keys.
    returns (1, T, h, d) or (B, 1, h, d), None as transformers' attention functions do.
    """
    groups = q.shape[1] // k.shape[1]
    if packing is None:  # the query heads that share a key head look like queries of one head: nothing is repeated
        q = q.view(q.shape[0], k.shape[1], groups, -1)  # (B, kv, h / kv, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=decode_mask, scale=scaling)
        return out.reshape(q.shape[0], 1, -1, q.shape[-1]), None
    if q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn  # flash attention that ships with torch

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (T, h, d)
        if packing.keys is not None:
            k, v = k[packing.keys], v[packing.keys]
        # causal, the last query of a piece at its last key: a response sees all of its prompt
        out = varlen_attn(q, k, v, packing.cu_seqlens, packing.cu_keys, packing.longest, packing.longest_keys,
                          scale=scaling, window_size=(-1, 0), enable_gqa=groups > 1)  # fmt: skip
        return out[None], None
    # elsewhere one call per piece: nothing is padded, copied or repeated
    queries, keys, values = (x.split(packing.lengths, 2) for x in (q, k, v))
    outs = []
    for query, key, value, prompt in zip(queries, keys, values, packing.after):
        mask = None
        if prompt is not None:
            key, value = torch.cat([keys[prompt], key], 2), torch.cat([values[prompt], value], 2)
            mask = packing.lower[key.shape[2] - query.shape[2] : key.shape[2], : key.shape[2]]  # (r, p + r)
        outs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None,
                                                   scale=scaling, enable_gqa=groups > 1))  # fmt: skip
    return torch.cat(outs, 2).transpose(1, 2), None  # (1, T, h, d)


# registered without a mask function, so that transformers builds no (T, T) mask
AttentionInterface.register("packed", packed_attention)


# -----------------------------------------------------------------------------------------------------------------
# log-probabilities straight from hidden states


def head_logits(hidden, weight, temperature, banned):
    """(n, H), (V, H) -> (n, V) float32 logits over temperature, with the banned ids out of reach"""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # rounding to bf16 here costs 1e-2 in log-prob
    else:
        logits = hidden.float() @ weight.float().t()
    if temperature != 1.0:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = -1e30  # not -inf: p * logit must stay 0 in the entropy
    return logits


class TokenLogprobs(torch.autograd.Function):
    """chunks of tokens; the backward pass makes each chunk's logits again instead of keeping them"""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, banned, chunk):
        lse = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        logprobs, entropy = torch.empty_like(lse), torch.empty_like(lse)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = head_logits(hidden[rows], weight, temperature, banned)  # (c, V)
            lse[rows] = logits.logsumexp(-1)
            logits -= lse[rows, None]  # now log p
            logprobs[rows] = logits.gather(1, labels[rows, None])[:, 0]
            entropy[rows] = -logits.exp().mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.temperature, ctx.banned, ctx.chunk = temperature, banned, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            g = head_logits(hidden[rows], weight, ctx.temperature, ctx.banned)
            scale = grad[rows, None] / ctx.temperature
            g = g.sub_(lse[rows, None]).exp_().mul_(-scale)  # d logprob / d logit = onehot - p
            g.scatter_add_(1, labels[rows, None], scale)
            g = g.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = g @ weight
            if grad_weight is not None:
                grad_weight.addmm_(g.t().float(), hidden[rows].float())
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def token_logprobs(hidden, weight, labels, temperature=1.0, banned=None, chunk=256):
    """log-probability of each label and the entropy of each distribution, softmax(hidden @ weight.T / temperature).

    hidden (N, H), weight (V, H), labels (N,) -> logprobs (N,), entropy (N,), both float32, in nats.
    `banned` (K,) ids have probability 0: the policy is the softmax over the tokens that it may sample.
    memory: chunk x V floats at a time, forward and backward. the entropy carries no gradient: no loss here needs it.
    """
    return TokenLogprobs.apply(hidden, weight, labels, temperature, banned, chunk)


# -----------------------------------------------------------------------------------------------------------------
# the policy


def hidden_states(hf, batch, cache=None, images=None):
    """one forward over a packed batch (see packing.Batch) -> (T, H) float; `images` = what `encode_images` gave before"""
    images = images or encode_images(hf, batch)
    out = hf.model(
        input_ids=batch.ids[None],
        position_ids=batch.position_ids[:, None],  # (3, 1, T): M-RoPE's time, height, width
        mm_encoder_outputs={"image": images} if len(batch.image_index) else None,
        past_key_values=cache,
        use_cache=cache is not None,
        packing=batch.packing,
    )
    hidden = out.last_hidden_state[0]
    if images is not None and not len(batch.image_index):
        # every rank must run the vision tower in every forward, or FSDP's collectives wait for it for ever
        hidden = hidden + 0.0 * images.pooler_output[0].sum().to(hidden.dtype)
    return hidden


def encode_images(hf, batch):
    """the vision tower, once per distinct image; repeated for each place where the image stands in the packed row"""
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in hf.model.visual.parameters())):
        pixels, grid = batch.pixel_values, batch.image_grid
        if pixels is None:  # a text-only batch: the smallest image there is, see hidden_states
            vision = hf.config.vision_config
            merge = vision.spatial_merge_size
            grid = torch.tensor([[1, merge, merge]], device=batch.ids.device)
            size = 3 * vision.temporal_patch_size * vision.patch_size**2
            pixels = torch.zeros(merge * merge, size, device=batch.ids.device)
        out = hf.model.get_image_features(pixels, grid, return_dict=True)
    if pixels is not None and len(batch.image_index):
        out.pooler_output = [out.pooler_output[i] for i in batch.image_index]
        if getattr(out, "deepstack_features", None):  # Qwen3-VL feeds vision features into its first layers too
            out.deepstack_features = [[level[i] for i in batch.image_index] for level in out.deepstack_features]
    return out


class Policy(nn.Module):
    """the Hugging Face model and its head as one module, so that FSDP2 gathers the head with the root"""

    def __init__(self, hf, banned=None):
        super().__init__()
        self.hf = hf
        self.register_buffer("banned", banned, persistent=False)

    def forward(self, batch, temperature=1.0):
        """-> logprobs (N,), entropy (N,) of the N labelled positions of the packed batch, in its order"""
        hidden = hidden_states(self.hf, batch)[batch.label_index]  # (N, H): the prompt never reaches the head
        weight = self.hf.get_output_embeddings().weight
        return token_logprobs(hidden, weight, batch.labels, temperature, self.banned)


class Processor:
    """tokenizer, image processor and the ids that the code needs; torchvision is not needed (Pillow does the work)"""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        token = self.tokenizer.convert_tokens_to_ids
        self.image_token = token("<|image_pad|>")
        self.merge_size = self.image_processor.merge_size
        # where a rollout ends: the turn marker of a chat model, the text's end of a base model
        self.eos_ids = sorted({self.tokenizer.eos_token_id, token("<|im_end|>"), token("<|endoftext|>")} - {None})

    def banned_ids(self, vocab_size):
        """ids that a policy must never sample: vision markers (an image that is not there), and padding of the table"""
        names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
        ids = {self.tokenizer.convert_tokens_to_ids(n) for n in names} - {None}
        return torch.tensor(sorted(ids | set(range(len(self.tokenizer), vocab_size))))

    def save(self, path):
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)


def load(path, device="cpu", dtype=torch.float32, freeze_vision=False):
    """a Hugging Face directory or hub name -> (Policy, Processor); float32 master weights unless told otherwise"""
    hf = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return wrap(hf, path, device, freeze_vision)


def wrap(hf, path, device="cpu", freeze_vision=False):
    """an HF model that is in memory + the folder of its tokenizer -> (Policy, Processor)"""
    if not hasattr(hf.model, "visual") or not hasattr(hf.model, "language_model"):
        raise ValueError(f"{path}: {type(hf).__name__} has no vision tower that this code can place (Qwen-VL family)")
    processor = Processor(path)
    hf.model.language_model.config._attn_implementation = "packed"
    hf.model.visual.requires_grad_(not freeze_vision)
    vocab_size = hf.get_output_embeddings().weight.shape[0]
    return Policy(hf, processor.banned_ids(vocab_size)).to(device), processor


def blocks(policy):
    """the repeated layers of text and vision: the units of sharding and of activation checkpointing"""
    return [*policy.hf.model.language_model.layers, *policy.hf.model.visual.blocks]


def shard(policy, activation_checkpointing=False):
    """FSDP2 over all ranks: every block its own unit, the rest (embeddings, head, merger) with the root.

    on a GPU the matmuls run in bf16 over float32 master weights and gradients are reduced in float32; on the CPU
    everything is float32. gradients come out as the mean over ranks (FSDP2's default): scale a summed loss by the
    number of ranks.
    """
    device = next(policy.parameters()).device.type
    if activation_checkpointing:
        units = set(blocks(policy))
        apply_activation_checkpointing(policy, check_fn=lambda m: m in units)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device == "cuda" else MixedPrecisionPolicy()
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


def full(tensor):
    """a sharded tensor as a whole one (a collective: every rank must call it)"""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clean_name(name):
    """parameter names without what the wrappers added"""
    return name.replace("_checkpoint_wrapped_module.", "")


def replica(policy):
    """a whole, unsharded HF model of the same shape, to sample from; its weights come from copy_weights"""
    device = next(policy.parameters()).device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as in the trainer's forward
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(copy.deepcopy(policy.hf.config), dtype=dtype)


@torch.no_grad()
def copy_weights(policy, replica):
    """the training weights of a (sharded) Policy -> a whole HF model with the same names, parameter by parameter"""
    target = dict(replica.named_parameters())
    for name, p in policy.hf.named_parameters():
        target[clean_name(name)].copy_(full(p))


def export(policy, processor, path):
    """write the whole model in the Hugging Face layout, bf16 on a GPU run, float32 on the CPU (rank 0 writes)"""
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        on_gpu = next(policy.parameters()).is_cuda
        state = {clean_name(k).removeprefix("hf."): v.bfloat16() if on_gpu else v for k, v in state.items()}
        policy.hf.save_pretrained(path, state_dict=state)
        processor.save(path)
    dist.barrier()
