"""Price a recipe of grpo.py in advance: `python -m tools.cost --recipe vision-r1-7b --gpus 8`.

Every assumption is a flag and stands in the output; every answer has the mean length. Each step of
sampling reads the text weights once, and the keys and values of each row. Left out are rewards,
weight sync, the optimizer, FSDP's gathers, and the last answers that others wait for.
"""

import argparse
import contextlib
import re
from dataclasses import asdict

from transformers import AutoConfig

import grpo
import ptst
from nano import budget
from nano.run import for_people

ASSUMED = {  # flag: (default, meaning)
    "mfu": (0.3, "model FLOPs utilization of forwards and backwards; bench/gpu.py measures it"),
    "bandwidth-share": (0.6, "share of the memory's bandwidth that sampling reaches"),
    "mean-fill": (0.5, "mean length of an answer over its limit"),
    "rows": (256, "answers that one engine decodes at a time"),
    "image-tokens": (512, "tokens of a question's image"),
    "prompt-tokens": (128, "tokens of a question's text"),
}


def find_shape(model: str) -> tuple[budget.Shape, str]:
    """Find a folder's or a cached hub name's shape, or the published one of the size in a name.

    A name without a family ("runs/vision-r1-ci-7b/final") is taken for Qwen2.5-VL, the paper's.
    """
    with contextlib.suppress(OSError):
        return budget.shape(AutoConfig.from_pretrained(model, local_files_only=True)), model
    family = re.search(r"qwen[\d.]+-vl", model.lower())
    size = re.search(r"(?<![\d.])\d+b\b", model.lower())
    name = f"{family[0] if family else 'qwen2.5-vl'}-{size[0] if size else ''}"
    if name in budget.PUBLISHED:
        return budget.shape(budget.published_config(name)), f"{name}, published shape"
    raise ValueError(f"{model}: no config.json is there; known are {', '.join(budget.PUBLISHED)}")


def cost(s: budget.Shape, stage: tuple, recipe: dict, gpu: budget.GPU, gpus: int, assumed: dict):
    """Price a step of a stage -> {part of the step: (FLOPs of all GPUs, seconds)}."""
    questions, group = recipe["questions"], stage[1]
    answers, length = questions * group, assumed["mean-fill"] * stage[0]
    patches = assumed["image-tokens"] * s.vision.spatial_merge_size**2
    prompt = assumed["image-tokens"] + assumed["prompt-tokens"]
    image = budget.flops(s, [], 0, [(1, 32, patches / 32)])
    asked, whole = budget.flops(s, [prompt]), budget.flops(s, [prompt + length], length)
    # A group spans several micro-batches, and each of them encodes the image once.
    parts = min(group, 1 + group * (prompt + length) / (recipe["micro_tokens"] or 20480))
    images, frozen = questions * parts, recipe["freeze_vision"]
    forward = answers * whole.forward + images * image.forward
    prompts = questions * (asked.forward + image.forward)
    flops = {
        "sampling": prompts + answers * (whole.forward - asked.forward),
        "reference": forward if recipe["kl_coef"] else 0,
        # With one epoch, the first mini-batch is updated by the policy that it was sampled from.
        "old": forward * (1 - (recipe["epochs"] == 1) / recipe["minibatches"]),
        "training": answers * whole.training() + images * image.training(frozen),
    }
    speed = gpus * gpu.tera * 1e12 * assumed["mfu"]
    seconds = {part: flops[part] / speed for part in flops}
    rows = min(assumed["rows"], answers / gpus)
    kv_bytes = 2 * 2 * s.text.num_hidden_layers * s.kv  # of one token in bf16
    read = 2 * (s.text_matrices + s.head_matrix) / rows + kv_bytes * (prompt + length / 2)
    bandwidth = gpus * gpu.bandwidth * 1e12 * assumed["bandwidth-share"]
    seconds["sampling"] = max(seconds["sampling"], answers * length * read / bandwidth)
    return {part: (count, seconds[part]) for part, count in flops.items() if count}


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.cost", description=__doc__)
    parser.add_argument("--recipe", default="vision-r1-7b", choices=list(grpo.RECIPES))
    parser.add_argument("--model", help="folder or name that tells the shape (the recipe's)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="H100", help=", ".join(gpu.name for gpu in budget.GPUS))
    for flag, (default, meaning) in ASSUMED.items():
        parser.add_argument(f"--{flag}", type=float, default=default, help=f"{meaning} ({default})")
    args = parser.parse_args()
    assumed = {flag: getattr(args, flag.replace("-", "_")) for flag in ASSUMED}
    gpu, recipe = budget.gpu(args.gpu), asdict(grpo.Config()) | grpo.RECIPES[args.recipe]
    if not gpu or min(args.gpus, *assumed.values()) <= 0:
        parser.error("--gpu must be in the list of --help, and all numbers positive")
    s, source = find_shape(args.model or recipe["model"])
    print(f"{args.recipe}: {source}, {s.params / 1e9:.2f} G parameters, {args.gpus} x {gpu.name}")
    told = ", ".join(f"{flag} {value:g}" for flag, value in assumed.items())
    print(f"{recipe['questions']} questions a step; assumed: {told}")
    print(
        "mfu is " + ("expected, not measured" if assumed["mfu"] == ASSUMED["mfu"][0] else "given")
    )
    hours = sampled = 0
    for stage in ptst.parse(recipe["stages"]):
        parts = cost(s, stage, recipe, gpu, args.gpus, assumed)
        seconds = sum(part for _, part in parts.values())
        print(f"{ptst.format_stages([stage])}: {seconds:.0f} s a step, of it")
        for name, (flops, part) in parts.items():
            print(f"  {name:10} {part:6.1f} s, {flops / 1e15:6.1f} PFLOP")
        hours += seconds * stage.steps / 3600
        sampled += ptst.total_tokens([stage]) * recipe["questions"] * assumed["mean-fill"]
    whole = f"{hours:.1f} hours, {hours * args.gpus:.0f} GPU hours"
    print(f"the run: {whole}, {sampled / 1e9:.2f} G tokens sampled")


if __name__ == "__main__":
    with for_people():
        main()
