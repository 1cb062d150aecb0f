"""Benchmark of token_logprobs: python bench/logprob.py [--tokens 4096 --hidden 896 --vocab 151936 --repeats 3]

Forward and backward, float32, one thread (or the GPU): full logits + log_softmax against the chunks of model.py. Each
method runs in a process of its own, in turn, so that peaks do not mix; the peak counts the gradients of hidden and weight.
The error is that of log-probabilities and gradients against float64 on a slice of 64 tokens.
"""
import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import model


def full(hidden, weight, labels):
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


METHODS = {"full logits": full, "model.token_logprobs": lambda h, w, y: model.token_logprobs(h, w, y)[0]}


def inputs(args, dtype=torch.float32, tokens=None):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(args.tokens, args.hidden, device=device)[:tokens]
    weight = torch.randn(args.vocab, args.hidden, device=device).mul_(args.hidden**-0.5)  # in place: no copy in the peak
    labels = torch.randint(args.vocab, (args.tokens,), device=device)[:tokens]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def peak():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, args):
    """one method in this process -> seconds, bytes above the inputs, error"""
    torch.set_num_threads(1)
    hidden, weight, labels = inputs(args)
    before = peak()
    began = time.perf_counter()
    logprobs = METHODS[name](hidden, weight, labels)
    logprobs.sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, memory = time.perf_counter() - began, peak() - before
    h, w, y = inputs(args, torch.float64, 64)
    want = (h @ w.t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
    want.sum().backward()
    error = max((logprobs[:64] - want).abs().max().item(), (hidden.grad[:64] - h.grad).abs().max().item())
    return dict(seconds=seconds, memory=memory, error=error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return print(json.dumps(measure(args.only, args)))
    runs = {name: [] for name in METHODS}
    for _ in range(args.repeats):
        for name in METHODS:
            out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True, check=True)
            runs[name].append(json.loads(out.stdout.splitlines()[-1]))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, one thread"
    print(f"{where}; N={args.tokens} H={args.hidden} V={args.vocab}, forward + backward, medians of {args.repeats}")
    print("| method | s | of full | peak MB | of full | error |\n|---|---|---|---|---|---|")
    base = {k: statistics.median(r[k] for r in runs["full logits"]) for k in ("seconds", "memory")}
    for name, results in runs.items():
        s, m = (statistics.median(r[k] for r in results) for k in ("seconds", "memory"))
        error = max(r["error"] for r in results)
        print(f"| {name} | {s:.1f} | {s / base['seconds']:.2f} | {m / 1e6:.0f} | {m / base['memory']:.2f} | {error:.1e} |")


if __name__ == "__main__":
    main()
