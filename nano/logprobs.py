"""Log-probabilities straight from hidden states, without the (tokens x vocabulary) tensor.

`token_logprobs` goes over the vocabulary in tiles of columns. Each tile is one matrix product
(N, H) x (H, tile) with a float32 result, absorbed into four numbers per token before the next one:

    m        the largest logit so far
    s        sum of e^(x - m)               so that  log sum e^x = m + log s
    t        sum of (x - m) e^(x - m)       so that  entropy = log s - t / s
    picked   the logit of the label

When a tile brings a larger maximum m', the sums so far move to it: with a = e^(m - m'), s becomes
a s and t becomes a (t + (m - m') s). This is the online softmax (Milakov & Gimelshein, arXiv
1805.02867) with t for the entropy. Sums of (x - m), not of x, keep their digits when logits are
large.

The backward pass makes each tile's logits once more instead of keeping them. Since
logprob = x[label] - log sum e^x,

    d logprob / d x[j] = [j = label] - p[j]
    d entropy / d x[j] = -p[j] (log p[j] + entropy) = -p[j] (x[j] - m - t / s)

which turns the tile of logits into the tile of their gradient, and two more products carry it on. A
tile holds all tokens of its columns, so that its rows of the weight's gradient are complete after
one product: no float32 copy of the whole (V, H) gradient is needed, only one of hidden's, (N, H).

The products are left to cuBLAS (or the CPU's BLAS). What lies between them would read a tile many
times if it were written in torch; on a GPU two Triton kernels do it in one pass each. The price is
four products where a pass that keeps its logits has three.
"""

import functools

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; `absorb` and `to_gradient` do the same in plain torch
    triton = None

IGNORE = -100  # a label that asks for nothing, as in torch's cross_entropy
FLOOR = -1e30  # the logit of a banned id. e^FLOOR is 0, and unlike -inf it survives 0 * x and x - x
BLOCK = 4096  # logits that one Triton program holds at a time


# -------------------------------------------------------------------------------------------------
# between the products, in plain torch


def absorb(logits, first, labels, banned, scale, state):
    """Takes the logits (N, w) of columns first..first+w into the state (4, N): m, s, t, picked.

    Overwrites logits.
    """
    m, s, t, picked = state
    columns = slice(first, first + logits.shape[1])
    if scale != 1.0:
        logits *= scale
    logits[:, banned[columns]] = FLOOR
    label = labels - first
    here = (label >= 0) & (label < logits.shape[1])
    x = logits.gather(1, label.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    picked.copy_(torch.where(here, x, picked))
    top = torch.maximum(m, logits.amax(1))
    a = (m - top).exp()
    e = logits.sub_(top[:, None]).exp()
    t.add_((m - top) * s).mul_(a).add_(torch.linalg.vecdot(e, logits))
    s.mul_(a).add_(e.sum(1))
    m.copy_(top)


def to_gradient(logits, first, labels, banned, scale, state, grad, grad_entropy, dtype):
    """Logits (N, w) -> d loss / d logits (N, w) in `dtype`, given grad (N,) = d loss / d logprob
    and grad_entropy (N,), or None when the loss has no entropy.

    Overwrites logits.
    """
    m, s, t, _ = state
    columns = slice(first, first + logits.shape[1])
    if scale != 1.0:
        logits *= scale
    grad = grad * scale
    logits.sub_(m[:, None])
    push = (-grad / s)[:, None]
    if grad_entropy is not None:
        push = push - (grad_entropy * scale / s)[:, None] * (logits - (t / s)[:, None])
    logits.exp_().mul_(push)
    label = labels - first
    here = (label >= 0) & (label < logits.shape[1])
    logits.scatter_add_(
        1, label.clamp(0, logits.shape[1] - 1)[:, None], torch.where(here, grad, 0.0)[:, None]
    )
    logits[:, banned[columns]] = 0  # their logit is a constant, even where it is the label's
    return logits.to(dtype)


# -------------------------------------------------------------------------------------------------
# the same two steps as Triton kernels: one read of the tile, all else in registers

if triton is not None:
    LOWEST = tl.constexpr(FLOOR)

    @triton.jit
    def scaled_logits(logits, row, at, width, banned, first, scale):
        """One row's logits over temperature; banned ids and what lies past its end are at FLOOR."""
        x = tl.load(logits + row * width + at, mask=at < width, other=LOWEST)
        dead = tl.load(banned + first + at, mask=at < width, other=1) != 0
        return tl.where(dead, LOWEST, x * scale), dead

    @triton.jit
    def absorb_kernel(logits, width, first, labels, banned, scale, state, n, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # one program per token: row * width may pass 2^31
        label = tl.load(labels + row) - first
        m, s = tl.load(state + row), tl.load(state + n + row)
        t, picked = tl.load(state + 2 * n + row), tl.load(state + 3 * n + row)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x, dead = scaled_logits(logits, row, at, width, banned, first, scale)
            here = (at == label) & (at < width)  # past the end lies the next tile's label
            picked += tl.sum(tl.where(here, x, 0.0))
            top = tl.maximum(m, tl.max(x))
            a = tl.exp(m - top)
            x -= top
            e = tl.exp(x)
            t = a * (t + (m - top) * s) + tl.sum(x * e)
            s = a * s + tl.sum(e)
            m = top
        tl.store(state + row, m)
        tl.store(state + n + row, s)
        tl.store(state + 2 * n + row, t)
        tl.store(state + 3 * n + row, picked)

    @triton.jit
    def gradient_kernel(
        logits, width, first, labels, banned, scale, state, n, grads, out, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(labels + row) - first
        m, s, t = tl.load(state + row), tl.load(state + n + row), tl.load(state + 2 * n + row)
        g, h = tl.load(grads + row) * scale, tl.load(grads + n + row) * scale  # h: the entropy's
        x, dead = scaled_logits(logits, row, at, width, banned, first, scale)
        d = tl.where(at == label, g, 0.0) - tl.exp(x - m) * ((g + h * (x - m - t / s)) / s)
        d = tl.where(dead, 0.0, d)
        tl.store(out + row * width + at, d.to(out.dtype.element_ty), mask=at < width)


def absorb_fused(logits, first, labels, banned, scale, state):
    n, width = logits.shape
    where = (labels, banned.view(torch.uint8), scale, state, n)
    absorb_kernel[(n,)](logits, width, first, *where, BLOCK=BLOCK, num_warps=8)


def to_gradient_fused(logits, first, labels, banned, scale, state, grad, grad_entropy, dtype):
    n, width = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    grads = torch.stack([grad, torch.zeros_like(grad) if grad_entropy is None else grad_entropy])
    where = (labels, banned.view(torch.uint8), scale, state, n, grads, out)
    grid = (n, triton.cdiv(width, BLOCK))
    gradient_kernel[grid](logits, width, first, *where, BLOCK=BLOCK, num_warps=8)
    return out


@functools.cache
def fused_runs(device):
    """Whether the kernels run on this device: Triton needs a C compiler too."""
    if triton is None or device.type != "cuda":
        return False
    try:
        zero = torch.zeros(1, 1, device=device)
        absorb_fused(zero, 0, zero.long()[0], zero.bool()[0], 1.0, zero.repeat(4, 1))
    except Exception as error:
        print(f"token_logprobs: plain torch instead of Triton, slower ({error})", flush=True)
        return False
    return True


# -------------------------------------------------------------------------------------------------
# the products, and the whole


def product(a, b):
    """a @ b with a float32 result: logits rounded to bf16 cost 1e-2 in log-probabilities."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total, a, b):
    """Adds a @ b to total, which is float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, banned, width, fused):
        ctx.step, ctx.scale, ctx.fused = width, 1 / temperature, fused
        state = torch.zeros(4, len(hidden), device=hidden.device)
        state[0] = FLOOR
        for i in range(0, len(weight), width):
            logits = product(hidden, weight[i : i + width].t())  # (N, w)
            (absorb_fused if fused else absorb)(logits, i, labels, banned, ctx.scale, state)
            del logits  # or two tiles would be alive at a time
        m, s, t, picked = state
        asked = labels != IGNORE
        logprobs = torch.where(asked, picked - m - s.log(), 0.0)
        entropy = torch.where(asked, s.log() - t / s, 0.0)
        ctx.save_for_backward(hidden, weight, labels, banned, state)
        ctx.set_materialize_grads(False)  # an output that is not used has None, not zeros
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy):
        hidden, weight, labels, banned, state = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        asked = labels != IGNORE
        grad = torch.where(asked, 0.0 if grad is None else grad, 0.0).contiguous()
        if grad_entropy is not None:
            grad_entropy = torch.where(asked, grad_entropy, 0.0)
        for i in range(0, len(weight), ctx.step):
            rows = weight[i : i + ctx.step]  # (w, H)
            logits = product(hidden, rows.t())
            turn = to_gradient_fused if ctx.fused else to_gradient
            grads = (grad, grad_entropy)
            g = turn(logits, i, labels, banned, ctx.scale, state, *grads, hidden.dtype)
            del logits
            if needs_hidden:
                add_product(grad_hidden, g, rows)
            if needs_weight:
                grad_weight[i : i + ctx.step] = product(g.t(), hidden)
            del g
        return (grad_hidden.to(hidden.dtype) if needs_hidden else None, grad_weight, *[None] * 5)


@torch.no_grad()
def likeliest(hidden, weight, banned, rows=1024):
    """The likeliest id at each position, hidden (N, H), weight (V, H) -> (N,); `rows` at a time."""
    out = []
    for part in hidden.split(rows):
        logits = product(part, weight.t())
        logits[:, banned] = FLOOR
        out.append(logits.argmax(-1))
    return torch.cat(out)


def token_logprobs(hidden, weight, labels, temperature=1.0, banned=None, width=None, fused=None):
    """Log-probability of each label, and entropy of softmax(hidden @ weight.T / temperature).

    hidden (N, H), weight (V, H) of the same dtype, labels (N,) -> logprobs (N,), entropy (N,), both
    float32, in nats; N may be 0. A label of -100 gives 0 and 0 and no gradient; any other outside
    0..V-1 is an error. `banned` (K,) ids have probability 0: the policy is the softmax over the
    tokens that it may sample. Gradients of both go to hidden and weight.

    Memory: `width` columns of logits at a time, by default 2^27 logits on a GPU (0.5 GiB, and 0.25
    more for their bf16 gradient), 2^22 on a CPU, where they then stay near the caches. `fused`:
    Triton or plain torch, by default Triton where it runs on a GPU. A sharded weight (DTensor) is
    refused: FSDP2 gathers it inside the forward of the module that owns it.
    """
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        raise TypeError("token_logprobs got a DTensor: call it within the FSDP2 module's forward")
    ok = ((labels == IGNORE) | (labels >= 0) & (labels < len(weight))).all()
    message = f"token_logprobs: a label is neither {IGNORE} nor an id below {len(weight)}"
    torch._assert_async(ok, message)  # without a wait for the GPU
    mask = torch.zeros(len(weight), dtype=torch.bool, device=hidden.device)
    if banned is not None:
        mask[banned] = True
    if fused is None:
        fused = fused_runs(hidden.device)
    # In narrower tiles the sums of hidden's gradient would cost too much.
    budget, least = (2**27, 2048) if hidden.is_cuda else (2**22, 1024)
    width = width or max(least, budget // max(len(hidden), 1) // 256 * 256)
    fused = fused and len(hidden) > 0  # a grid of no programs is an error
    return TokenLogprobs.apply(
        hidden.contiguous(), weight, labels.contiguous(), temperature, mask, width, fused
    )
