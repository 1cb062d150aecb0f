"""nano/logprobs.py against float64 autograd over the full logits: plain torch and Triton kernels.

Without a GPU the kernels run under Triton's interpreter. It must be chosen before Triton is
imported, so `test_kernels_under_the_interpreter` runs the cases of this file again in a process of
its own. With a GPU the compiled kernels are tested too; without one they are at least compiled.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import single_rank

from nano import logprobs
from nano.logprobs import IGNORE, token_logprobs

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = ["triton"] if interpreting else ["torch"]
needs_triton = pytest.mark.skipif(logprobs.triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the compiled kernels need a CUDA GPU"
)


@pytest.fixture(params=PATHS)
def fused(request, monkeypatch):
    # Several blocks in a tile of a test, the last one ragged.
    monkeypatch.setattr(logprobs, "BLOCK", 32)
    return request.param == "triton"


def reference(hidden, weight, labels, grad, temperature=1.0, banned=()):
    """float64 over the full logits by autograd -> logprobs, entropy, d hidden, d weight."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ids = torch.tensor(banned, dtype=torch.long, device=h.device)
    logits = (h @ w.T / temperature).index_fill(1, ids, -torch.inf)
    log_p = logits.log_softmax(-1)
    asked = labels != IGNORE
    picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    (picked[asked] * grad.double()[asked]).sum().backward()
    p = log_p.detach().exp()
    entropy = -torch.where(p > 0, p * log_p.detach(), 0.0).sum(-1)
    return picked.detach().masked_fill(~asked, 0), entropy.masked_fill(~asked, 0), h.grad, w.grad


def inputs(n, v, size, scale=1.0, dtype=torch.float32, device="cpu"):
    """Logits of standard deviation `scale`; every third label is ignored."""
    g = torch.Generator().manual_seed(n * v)
    hidden = torch.randn(n, size, generator=g)
    weight = torch.randn(v, size, generator=g) * scale / size**0.5
    labels, grad = torch.randint(4, v, (n,), generator=g), torch.randn(n, generator=g)
    labels[1::3] = IGNORE
    labels[-1] = v - 1  # the last id
    return [x.to(device) for x in (hidden.to(dtype), weight.to(dtype), labels, grad)]


def check(hidden, weight, labels, grad, temperature, banned, width, fused, value=1e-5, slope=1e-5):
    """Errors are relative to the largest entry, or to 1 where all are smaller."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ids = torch.tensor(banned, device=h.device) if banned else None
    logprob, entropy = token_logprobs(h, w, labels, temperature, ids, width, fused)
    (logprob * grad).sum().backward()
    assert logprob.dtype == entropy.dtype == torch.float32
    assert h.grad.dtype == h.dtype
    assert w.grad.dtype == w.dtype
    want = reference(hidden, weight, labels, grad, temperature, banned)
    names, found = (
        ("logprobs", "entropy", "d hidden", "d weight"),
        (logprob, entropy, h.grad, w.grad),
    )
    limits = (value, value, slope, slope)
    for name, got, ref, tolerance in zip(names, found, want, limits, strict=True):
        error = (got.detach().double() - ref).abs().max() / ref.abs().max().clamp(min=1)
        assert error < tolerance, (name, error.item())
    ignored = labels == IGNORE
    assert not logprob[ignored].any() and not entropy[ignored].any() and not h.grad[ignored].any()
    assert not w.grad[list(banned)].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "n, v, size, width", [(7, 33, 16, 16), (5, 201, 13, 77), (7, 130, 7, 1000), (1, 5, 1, 2)]
)
def test_values_and_gradients(n, v, size, width, temperature, fused):
    check(*inputs(n, v, size), temperature, (0, 3), width, fused)
    check(*inputs(n, v, size), temperature, (), width, fused)


def test_extreme_logits(fused):
    """At logits of 1e4 a float32 step is 1e-3, and no more error is allowed; nothing overflows."""
    # With powers of two the logits are exact: what is measured is the softmax, not the product.
    hidden, weight, labels, grad = inputs(6, 90, 8)
    hidden, weight = hidden.sign() * 64, weight.sign() * 2.0 ** torch.randint(0, 6, (90, 1))
    assert (hidden @ weight.T).abs().max() > 1e4
    check(hidden, weight, labels, grad, 1.0, (0, 3), 50, fused)
    check(hidden, weight, labels, grad, 0.5, (0, 3), 50, fused)
    check(*inputs(6, 90, 8, scale=1e4), 0.7, (0, 3), 50, fused, value=1e-6, slope=1e-2)


def test_bfloat16(fused):
    """float32 inside: values as good as float32's; gradients are rounded twice, as those of the
    logits and as the result's."""
    check(*inputs(6, 150, 24, dtype=torch.bfloat16), 0.7, (0, 3), 77, fused, slope=1e-2)


def test_a_first_tile_that_is_banned_whole_leaves_no_trace(fused):
    check(*inputs(6, 18, 8), 1.0, (0, 1, 2, 3), 4, fused)


def test_a_banned_label_is_next_to_impossible_and_pushes_only_the_others(fused):
    hidden, weight, _, _ = inputs(4, 50, 8)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    banned, labels = torch.tensor([2, 9]), torch.tensor([7, 7, 2, 7])
    logprob, _ = token_logprobs(h, w, labels, 1.0, banned, 16, fused)
    assert logprob[2] < -1e29 and (logprob[[0, 1, 3]] > -20).all()
    logprob[2].backward()
    logits = (hidden.double() @ weight.double().T).index_fill(1, banned, -torch.inf)
    p = logits.softmax(-1)
    assert (h.grad[2] + p[2] @ weight.double()).abs().max() < 1e-5
    assert not w.grad[banned].any()


@pytest.mark.parametrize("temperature, banned", [(1.0, []), (0.7, [0, 5, 40])])
def test_gradient_of_the_entropy(temperature, banned, fused):
    """A loss of log-probability and entropy, against float64 autograd over the full logits."""
    hidden, weight, labels, grad = inputs(13, 101, 16, scale=2.0)
    extra = torch.randn(13, generator=torch.Generator().manual_seed(1))
    want = []
    for double in (True, False):
        h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        if double:
            h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
            ids = torch.tensor(banned, dtype=torch.long)
            log_p = (h @ w.T / temperature).index_fill(1, ids, -1e9).log_softmax(-1)
            picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            asked = labels != IGNORE
            picked, entropy = picked * asked, entropy * asked
        else:
            banned_ids = torch.tensor(banned, dtype=torch.long)
            options = dict(banned=banned_ids, width=37, fused=fused)
            picked, entropy = token_logprobs(h, w, labels, temperature, **options)
        (picked * grad).sum().add((entropy * extra).sum()).backward()
        want.append((h.grad, w.grad))
    for got, reference_grad in zip(want[1], want[0]):
        torch.testing.assert_close(got.double(), reference_grad, atol=2e-5, rtol=1e-4)


def test_entropy_alone_in_the_loss(fused):
    hidden, weight, labels, _ = inputs(4, 50, 8)
    hidden.requires_grad_()
    token_logprobs(hidden, weight, labels, fused=fused)[1].sum().backward()
    assert hidden.grad.abs().sum() > 0 and not hidden.grad[1].any()  # label 1 is ignored


def test_all_labels_ignored(fused):
    hidden, weight, labels, grad = inputs(4, 50, 8)
    check(hidden, weight, torch.full_like(labels, IGNORE), grad, 1.0, (), 16, fused)


def test_no_tokens(fused):
    h, w = torch.empty(0, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    logprob, entropy = token_logprobs(h, w, torch.empty(0, dtype=torch.long), fused=fused)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert h.grad.shape == (0, 8) and w.grad.shape == (33, 8) and not w.grad.any()


def test_tied_embeddings(fused):
    """The head's weight is the input's table as well: both gradients arrive."""
    g = torch.Generator().manual_seed(0)
    table, ids = torch.randn(40, 8, generator=g), torch.randint(40, (6,), generator=g)
    labels = ids.roll(-1)
    mine, want = table.clone().requires_grad_(), table.double().requires_grad_()
    token_logprobs(mine[ids].tanh(), mine, labels, width=16, fused=fused)[0].sum().backward()
    (want[ids].tanh() @ want.T).log_softmax(-1).gather(1, labels[:, None]).sum().backward()
    assert (mine.grad - want.grad).abs().max() < 1e-5


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen, fused):
    hidden, weight, labels, grad = inputs(5, 50, 8)
    want = reference(hidden, weight, labels, grad)
    (weight if frozen == "hidden" else hidden).requires_grad_()
    (token_logprobs(hidden, weight, labels, width=16, fused=fused)[0] * grad).sum().backward()
    got, ref = (weight.grad, want[3]) if frozen == "hidden" else (hidden.grad, want[2])
    assert (got - ref).abs().max() < 1e-5


def test_nothing_larger_than_a_tile_is_ever_made(fused):
    n, v, width, size = 8, 32, 8, 4
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple) else (out,)
            seen.extend(x.nbytes for x in made if isinstance(x, torch.Tensor))
            return out

    h, w = torch.randn(n, size, requires_grad=True), torch.randn(v, size, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.long)
    with Watch():
        logprob, _ = token_logprobs(h, w, labels, width=width, fused=fused)
        logprob.sum().backward()
    assert max(seen) <= 4 * max(v * size, n * width) < 4 * n * v


@pytest.mark.skipif(interpreting, reason="one path is enough")
def test_bad_labels_and_sharded_weights_are_refused():
    hidden, weight, labels, _ = inputs(4, 50, 8)
    for bad in (50, -1, -101):
        with pytest.raises(RuntimeError, match="neither -100 nor an id below 50"):
            token_logprobs(hidden, weight, labels.index_fill(0, torch.tensor([2]), bad))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    single_rank()
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match="FSDP2"):
        token_logprobs(hidden, sharded, labels)


@pytest.mark.skipif(interpreting, reason="one path is enough")
def test_without_triton_plain_torch_does_it(monkeypatch, capsys):
    gpu = torch.device("cuda")
    if not torch.cuda.is_available():  # Triton may be there but cannot run
        logprobs.fused_runs.cache_clear()
        assert not logprobs.fused_runs(gpu)
        assert logprobs.triton is None or "plain torch" in capsys.readouterr().out
    monkeypatch.setattr(logprobs, "triton", None)
    logprobs.fused_runs.cache_clear()
    assert not logprobs.fused_runs(gpu)
    hidden, weight, labels, grad = inputs(4, 50, 8)
    check(hidden, weight, labels, grad, 1.0, (), None, None)
    logprobs.fused_runs.cache_clear()


@needs_triton
@pytest.mark.skipif(interpreting, reason="this is the interpreter")
def test_kernels_under_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    call = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.skipif(interpreting, reason="the interpreter has no compiler")
@pytest.mark.parametrize("out", ["*bf16", "*fp32"])
def test_kernels_compile_for_hopper(out, tmp_path, monkeypatch):
    """Triton brings its own assembler: types, shapes and registers are checked without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("logits", "state", "grads"), "*fp32") | {"scale": "fp32", "out": out}
    kinds |= {"labels": "*i64", "banned": "*u8", "BLOCK": "constexpr"}
    for kernel in (logprobs.absorb_kernel, logprobs.gradient_kernel):
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"BLOCK": logprobs.BLOCK})
        hopper = GPUTarget("cuda", 90, 32)
        binary = logprobs.triton.compile(source, target=hopper, options={"num_warps": 8})
        assert ".target sm_90" in binary.asm["ptx"]
        assert len(binary.asm["cubin"]) > 1000
        assert ".local " not in binary.asm["ptx"]  # everything stays in registers


@needs_gpu
@pytest.mark.skipif(interpreting, reason="the compiled kernels are meant")
@pytest.mark.parametrize("dtype, slope", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_on_a_gpu(path, dtype, slope):
    fused = path == "triton"
    assert logprobs.fused_runs(torch.device("cuda")) or not fused
    check(*inputs(300, 10_001, 65, 3.0, dtype, "cuda"), 0.7, (0, 3), 2500, fused, slope=slope)
    check(*inputs(3, 151, 64, 3.0, dtype, "cuda"), 1.0, (), None, fused, slope=slope)


@needs_gpu
@needs_triton
@pytest.mark.skipif(interpreting, reason="the compiled kernels are meant")
def test_peak_memory_on_a_gpu():
    n, v, size = 16384, 152064, 512
    h = torch.randn(n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(v, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(h, w, torch.zeros(n, dtype=torch.long, device="cuda"))[0].sum().backward()
    gradients = 2 * size * (n + v)
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5 * 2**30
