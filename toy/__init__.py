"""Vision-R1 in miniature: a small visual world, teachers that can talk about it, a tiny Qwen2.5-VL.

The toy recipes name their inputs toy:NAME: base is the shipped model; cold-problems, rl-problems,
test-problems are drawn; cold, ci and rl are what stages make of these; teachers is a server's URL.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from nano.data import write_parquet
from toy.teachers import MLLM, Reasoner, read_messages, start_teachers  # noqa: F401
from toy.world import BASE, CELLS, DIGITS, SIDE, ZERO_PROMPT, problems  # noqa: F401

RUNS = Path("runs/toy")
PROBLEMS = {"cold-problems": 10_000, "rl-problems": 6_000, "test-problems": 2_000}
STAGES = {"cold": "cold_start cold/cold.jsonl", "ci": "sft sft/final", "rl": "grpo grpo/final"}
# A stage that we start is not one of torchrun's ranks: these stay here, LOCAL_ in front or not.
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_NUM_THREADS")


def __getattr__(name):
    # toy.tiny imports torch, which the teachers and the cold start do without.
    if name in ("pretrain", "random_model", "random_relative", "tokenizer"):
        return getattr(importlib.import_module("toy.tiny"), name)
    raise AttributeError(f"toy has no {name}")


def resolve(config):
    """Puts paths in place of toy:NAME in config.model and config.data; rank 0 makes them."""
    from nano.run import on_main_first  # It imports torch too.

    names = config.model, config.data
    if any(name.startswith("toy:") for name in names):
        config.model, config.data = on_main_first(lambda: [find(name) for name in names])


def find(name: str) -> str:
    """toy:NAME -> a path (of the teachers: a URL), made first if it is missing. Others stay."""
    if not name.startswith("toy:"):
        return name
    what = name.removeprefix("toy:")
    if what.startswith("teachers"):  # "teachers?again=0.7" overthink more.
        return start_teachers(*map(float, re.findall(r"\?again=(.+)", what)))
    if what == "base":
        return str(BASE)
    if what in PROBLEMS:
        path = RUNS / "data" / f"{what}.parquet"
        if not path.exists():
            print(f"[toy] drawing {PROBLEMS[what]} problems: {path}", flush=True)
            write_parquet(path, problems(PROBLEMS[what], 0, what.removesuffix("-problems")))
        return str(path)
    if what not in STAGES:
        known = ", ".join(["base", *PROBLEMS, *STAGES, "teachers"])
        raise ValueError(f"the toy has no {what!r}; it has {known}")
    stage, made = STAGES[what].split()
    script, path = Path(__file__).parents[1] / f"{stage}.py", RUNS / made
    if not path.exists():
        print(f"[toy] {path} is missing: running {script.name} --recipe toy first", flush=True)
        env = os.environ.items()
        env = {k: v for k, v in env if not k.removeprefix("LOCAL_").startswith(TORCHRUN)}
        subprocess.run([sys.executable, str(script), "--recipe", "toy"], check=True, env=env)
    return str(path)
