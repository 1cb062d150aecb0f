"""Benchmark of sampling: python bench/rollout.py [--size tiny --limits 64,256 --rounds 3]

TorchEngine against transformers' generate, 8 prompts x 16 samples with one image each, temperature
1: all as long as the limit, or ragged with half of it as the mean (see grpo_step.py for how the
weights make it so). The engines take turns in one process, one thread on the CPU; tokens per second
count what was sampled up to the end token. Ratios are medians over rounds.
"""

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from grpo_step import GPU, GROUP, SIZES, clock, make_workload, where
from transformers import AutoModelForImageTextToText

import model
from nano import data, packing, rollout


def engines(policy, processor, prompts, limit, folder):
    """Name -> a function of the round's number that samples once and gives the lengths."""
    ours = rollout.TorchEngine(model.replica(policy), processor)
    ours.sync(policy)
    hf = AutoModelForImageTextToText.from_config(
        copy.deepcopy(policy.hf.config),
        attn_implementation="sdpa",
        dtype=torch.bfloat16 if GPU else torch.float32,
    ).to(policy.banned.device)
    hf.load_state_dict(dict(policy.full_weights()), strict=False)

    def torch_engine(engine):
        def sample(number):
            groups = engine.generate(
                prompts, GROUP, limit, [(number, i) for i in range(len(prompts))]
            )
            return [sample.length for group in groups for sample in group]

        return sample

    def generate(number):
        torch.manual_seed(number)
        # All prompts are equally long here: nothing is padded.
        rows = [p for p in prompts for _ in range(GROUP)]
        ids = torch.tensor([p.ids for p in rows], device=policy.banned.device)
        out = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=True,
            top_k=0,
            mm_token_type_ids=(ids == processor.image_token).int(),
            eos_token_id=processor.eos_ids,
            pad_token_id=0,
            pixel_values=torch.cat([p.pixel_values for p in rows]).to(ids.device),
            image_grid_thw=torch.cat([p.image_grid for p in rows]).to(ids.device),
        )
        ended = torch.isin(
            out[:, ids.shape[1] :], torch.tensor(processor.eos_ids, device=ids.device)
        )
        return (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()

    found = {"transformers generate": generate, "TorchEngine": torch_engine(ours)}
    if importlib.util.find_spec("vllm"):
        from nano.vllm_engine import VLLMEngine

        vllm = VLLMEngine(folder, processor, len(prompts[0].ids) + limit, policy.banned.device)
        vllm.sync(policy)
        found["vLLM"] = torch_engine(vllm)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--limits", default="64,256")
    parser.add_argument("--image-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    unit = "wall" if GPU else "CPU"
    print(
        f"{where()}; Qwen2.5-VL {args.size}, random; {unit} seconds, {args.rounds} rounds, medians"
    )
    print("| limit | lengths | engine | s | wall | mean length | tokens/s | of generate's |")
    print("|---|---|---|---|---|---|---|---|")
    for limit in map(int, args.limits.split(",")):
        for ragged in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                make_workload(folder, args.size, args.image_tokens, limit, ragged)
                policy, processor = model.load(folder, "cuda" if GPU else "cpu")
                prompts = [
                    packing.encode(r, processor) for r in data.read(f"{folder}/problems.parquet")[0]
                ]
                methods = engines(policy, processor, prompts, limit, folder)
            runs = {name: [] for name in methods}
            for number in range(args.rounds + 1):
                for name, sample in methods.items():
                    began, wall = clock(), time.perf_counter()
                    lengths = sample(number)
                    if GPU:
                        torch.cuda.synchronize()
                    runs[name].append((clock() - began, time.perf_counter() - wall, sum(lengths)))
            for name, rows in runs.items():
                rows, base = rows[1:], runs["transformers generate"][1:]  # the first round warms up
                seconds, wall, tokens = map(statistics.median, zip(*rows))
                rate = statistics.median(t / s for s, _, t in rows)
                ratio = statistics.median((a[2] / a[0]) / (b[2] / b[0]) for a, b in zip(rows, base))
                kind, mean = "ragged" if ragged else "fixed", tokens / len(lengths)
                cells = (limit, kind, name, f"{seconds:.2f}", f"{wall:.2f}", f"{mean:.1f}")
                print("|", " | ".join(map(str, cells)), f"| {rate:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
