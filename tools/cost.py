"""Price a recipe of grpo.py before it is run: `python -m tools.cost --recipe vision-r1-7b --gpus 8`.

This is arithmetic, not a measurement. Every assumption is a flag and stands in the output. Every
answer has the mean length; a forward or a backward runs at the MFU; sampling decodes a fixed
number of rows at a time, and each of its steps reads the text weights and the rows' keys and
values. Rewards, the weight sync, the optimizer, and the gathers of FSDP are left out.
"""

import argparse
import re
from dataclasses import asdict
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

import grpo
import ptst
from nano import budget
from nano.run import for_people

FLAGS = {  # name: (default, meaning)
    "gpus": (8, "number of GPUs"),
    "questions": (0, "questions per step; 0: the recipe's"),
    "mfu": (0.45, "model FLOPs utilization of forwards and backwards"),
    "bandwidth_share": (0.6, "share of the memory's bandwidth that sampling reaches"),
    "mean_fill": (0.5, "mean length of an answer over its limit"),
    "rows": (256, "answers that one engine decodes at a time"),
    "image_tokens": (512, "tokens of a question's image"),
    "prompt_tokens": (128, "tokens of a question's text"),
}


def find_config(model: str) -> tuple[PreTrainedConfig, str]:
    """Find the config of a folder, a cached hub name or a name with a size, without a download.

    A name without a family ("runs/vision-r1-ci-7b/final") is taken for Qwen2.5-VL, the paper's.
    """
    if Path(model).is_dir() or not model.startswith(("runs/", "toy:")):
        try:
            return AutoConfig.from_pretrained(model, local_files_only=True), model
        except (OSError, ValueError):
            pass  # It is neither a checkpoint nor in the hub's cache: the name may tell.
    family = re.search(r"qwen\d(\.\d)?-vl", model.lower())
    size = re.search(r"(?<![\d.])\d+b\b", model.lower())
    key = f"{family[0] if family else 'qwen2.5-vl'}-{size[0] if size else ''}"
    if key not in budget.PUBLISHED:
        known = ", ".join(budget.PUBLISHED)
        raise ValueError(
            f"{model}: no config.json there, no known size in the name; known: {known}"
        )
    return budget.published_config(key), f"{key}, published shape"


def cost(s: budget.Shape, stage: tuple, recipe: dict, gpu: budget.GPU, assumed: dict) -> dict:
    """Price one step of a stage -> {part of the step: (FLOPs, seconds)}, on all GPUs together."""
    limit, group, _ = stage
    answers, length = assumed["questions"] * group, assumed["mean_fill"] * limit
    prompt = assumed["image_tokens"] + assumed["prompt_tokens"]
    patches = assumed["image_tokens"] * s.vision.spatial_merge_size**2
    image = budget.flops(s, [], 0, [(1, 2, patches / 2)])
    text = budget.flops(s, [prompt + length], length)
    # A group lies in several micro-batches, each of which encodes the image once.
    parts = min(group, 1 + group * (prompt + length) / recipe["micro_tokens"])
    images = assumed["questions"] * parts
    forward = answers * text.forward + images * image.forward
    frozen = recipe["freeze_vision"]
    flops = {"sampling": answers * budget.flops(s, [prompt + length], length).forward}
    # Sampling: the prompts once per question, then every answer token by token.
    once = budget.flops(s, [prompt]).forward
    flops["sampling"] = answers * (text.forward - once) + assumed["questions"] * (
        once + image.forward
    )
    if recipe["kl_coef"]:
        flops["reference"] = forward
    if recipe["minibatches"] * recipe["epochs"] > 1:
        flops["old"] = forward
    flops["training"] = answers * text.training() + images * image.training(frozen)
    speed = assumed["gpus"] * gpu.tera * 1e12 * assumed["mfu"]
    seconds = {part: flops[part] / speed for part in flops}
    rows = min(assumed["rows"], answers / assumed["gpus"])
    weights = 2 * (s.text_matrices + s.head_matrix) / rows
    read = answers * length * (weights + s.kv_bytes * (prompt + length / 2))
    bandwidth = assumed["gpus"] * gpu.bandwidth * 1e12 * assumed["bandwidth_share"]
    seconds["sampling"] = max(seconds["sampling"], read / bandwidth)
    return {part: (flops[part], seconds[part]) for part in flops}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cost", description=__doc__)
    parser.add_argument("--recipe", default="vision-r1-7b", choices=list(grpo.RECIPES))
    parser.add_argument(
        "--model", help="folder or name that tells the shape; default: the recipe's"
    )
    parser.add_argument(
        "--gpu", default="H100", help=f"of {', '.join(g.name for g in budget.GPUS)}"
    )
    for name, (default, meaning) in FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=type(default), default=default, help=f"{meaning} ({default})"
        )
    args = parser.parse_args()
    recipe = asdict(grpo.Config()) | grpo.RECIPES[args.recipe]
    assumed = {name: getattr(args, name) for name in FLAGS}
    assumed["questions"] = assumed["questions"] or recipe["questions"]
    gpu = budget.gpu(args.gpu)
    if gpu is None or min(assumed.values()) <= 0:
        parser.error("--gpu is one of the above, and numbers are positive")
    config, source = find_config(args.model or recipe["model"])
    s = budget.shape(config)
    print(f"{args.recipe}: {source}, {s.params / 1e9:.2f} G parameters, on {gpu.name}")
    print("assumed: " + ", ".join(f"{name} {value:g}" for name, value in assumed.items()))
    hours = 0
    for stage in ptst.parse(recipe["stages"]):
        print(f"\n{ptst.format_stages([stage])}: a step samples ... tokens")


if __name__ == "__main__":
    with for_people():
        main()
