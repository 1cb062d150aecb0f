"""A stand-in for the flash attention kernel, so that the GPU's path can be tried on a CPU: it
refuses what the kernel refuses and computes the same in float32. Used by bench/gpu.py --cpu and by
tests/test_gpu_path.py."""

import sys
import types

import torch
import torch.nn.attention
import torch.nn.functional as F


def varlen_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """q (T, h, d), k, v (S, kv, d), offsets of the pieces (pieces + 1,) -> (T, h, d)."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16), q.dtype
    assert all(x.is_contiguous() and x.shape[-1] % 8 == 0 for x in (q, k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths_q), max(lengths_k)) and type(max_q) is int
    assert min(lengths_q) > 0 and (enable_gqa or q.shape[1] == k.shape[1])
    outs = []
    for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        mask = None
        if window_size == (-1, 0):  # causal, aligned at the bottom right
            mask = torch.ones(len(a), len(b), dtype=torch.bool).tril(len(b) - len(a))
        a, b, c = (x.transpose(0, 1)[None].float() for x in (a, b, c))
        out = F.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outs)


def install():
    """From now on this process takes the GPU's path, with the stand-in as its kernel."""
    import nano.device

    nano.device.forced = True
    sys.modules["torch.nn.attention.varlen"] = types.SimpleNamespace(varlen_attn=varlen_attn)
