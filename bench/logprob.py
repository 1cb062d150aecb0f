"""Benchmark of token_logprobs.

  python bench/logprob.py [--tokens N --hidden H --vocab V --repeats 3]

Log-probabilities of N tokens, forward and backward. On a CPU: N=4096, H=896, V=151,936
(Qwen2.5-0.5B's head), float32, one thread. With a GPU: N=16,384, H=3584, V=152,064 (Qwen2.5-VL-7B's
head), bfloat16, and the time of the three matrix products alone to compare with. Peers join the
table when they are installed: pip install --no-deps liger-kernel cut-cross-entropy. They give no
entropy, ours does.

Each run is a process of its own, in turn, so that peaks do not mix; where something is compiled, a
second pass is timed. Seconds are the CPU's, or with a GPU the wall's. The peak is what was needed
on top of the inputs; it counts the gradients of hidden and weight, which nobody can avoid, and the
column after it does not. The error is the largest of log-probabilities and of hidden's gradients
against float64 on the first 64 tokens.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nano import logprobs

GPU = torch.cuda.is_available()


def full(hidden, weight, labels):
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def liger(hidden, weight, labels):
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    width = 4096  # its own default
    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, labels, None, 1.0, width)


def cut(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        hidden, weight, labels, reduction="none", impl="cce" if GPU else "torch_compile"
    )


METHODS = {
    "full logits": full,
    "token_logprobs, torch": lambda *x: logprobs.token_logprobs(*x, fused=False)[0],
}
if GPU and logprobs.fused_runs(torch.device("cuda")):
    METHODS["token_logprobs, Triton"] = lambda *x: logprobs.token_logprobs(*x)[0]
if importlib.util.find_spec("liger_kernel"):
    METHODS["Liger selective log-prob"] = liger
if importlib.util.find_spec("cut_cross_entropy"):
    METHODS["Cut Cross-Entropy"] = cut


def inputs(args, dtype, tokens=None):
    torch.manual_seed(0)
    device, kind = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=kind)[:tokens]
    weight = torch.randn(args.vocab, args.hidden, device=device, dtype=kind)
    weight.mul_(args.hidden**-0.5)  # in place: no copy
    labels = torch.randint(args.vocab, (args.tokens,), device=device)[:tokens]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def peak():
    return (
        torch.cuda.max_memory_allocated()
        if GPU
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def clock():
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # one thread: its own seconds, whoever else is on the machine


def measure(name, args):
    """One method in this process -> seconds, bytes above the inputs, error."""
    torch.set_num_threads(1)
    hidden, weight, labels = inputs(args, torch.bfloat16 if GPU else torch.float32)
    if not GPU:
        before = peak()
    for _ in range(2 if GPU or METHODS[name] in (liger, cut) else 1):
        hidden.grad = weight.grad = logprob = None
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = clock()
        logprob = METHODS[name](hidden, weight, labels)
        logprob.sum().backward()
        seconds, memory = clock() - began, peak() - before
    h, w, y = inputs(args, torch.float64, 64)
    want = (h @ w.t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
    want.sum().backward()
    error = max(
        (logprob[:64] - want).abs().max().item(), (hidden.grad[:64] - h.grad).abs().max().item()
    )
    gradients = sum(x.grad.nbytes for x in (hidden, weight))
    return dict(seconds=seconds, memory=memory, extra=memory - gradients, error=error)


@torch.no_grad()
def products(args):
    """Seconds of the three matrix products that any forward and backward pass needs."""
    hidden, weight, _ = inputs(args, torch.bfloat16)
    times = []
    for _ in range(args.repeats + 1):
        began = clock()
        g = hidden @ weight.t()
        g @ weight, g.t() @ hidden
        times.append(clock() - began)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384 if GPU else 4096)
    parser.add_argument("--hidden", type=int, default=3584 if GPU else 896)
    parser.add_argument("--vocab", type=int, default=152064 if GPU else 151936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return print(json.dumps(measure(args.only, args)))
    runs, failed = {name: [] for name in METHODS}, {}
    for _ in range(args.repeats):
        for name in [m for m in METHODS if m not in failed]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            out = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if out.returncode:  # a peer that does not run here, or full logits that do not fit
                failed[name] = (out.stderr.strip() or f"killed ({out.returncode})").splitlines()[-1]
            else:
                runs[name].append(json.loads(out.stdout.splitlines()[-1]))
    where = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, one thread"
    kind = "bfloat16" if GPU else "float32"
    size = f"N={args.tokens} H={args.hidden} V={args.vocab}"
    print(f"{where}; {size} {kind}, forward + backward, medians of {args.repeats}")
    floor = products(args) if GPU else None
    if GPU:
        print(f"the three matrix products alone: {floor:.3f} s")
    print(
        "| method | s | of full | peak MB | of full | without gradients MB | error |"
        + " of products |" * GPU
    )
    print("|---|---|---|---|---|---|---|" + "---|" * GPU)
    medians = {
        n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items() if rs
    }
    base = medians.get("full logits", dict(seconds=float("nan"), memory=float("nan")))
    for name, r in medians.items():
        time_ratio, memory_ratio = (r[k] / base[k] for k in ("seconds", "memory"))
        cells = [name, f"{r['seconds']:.3g}", f"{time_ratio:.2f}", f"{r['memory'] / 1e6:.0f}"]
        cells += [f"{memory_ratio:.2f}", f"{r['extra'] / 1e6:.0f}", f"{r['error']:.1e}"]
        cells += [f"{r['seconds'] / floor:.2f}"] if GPU else []
        print("|", " | ".join(cells), "|")
    for name, why in failed.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()
