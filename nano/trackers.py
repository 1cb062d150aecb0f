"""Weights & Biases and TensorBoard: the numbers of every step, and now and then some rollouts with
their picture, reward and its reason."""

import importlib
from pathlib import Path

import numpy as np

from nano.data import load_image

COLUMNS = ("problem", "completion", "answer", "reward", "why", "advantage", "length", "finish")


def optional(module: str, package: str):
    """Imports what only a flag asks for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"--{package} needs a package: pip install {package}") from error


def pictures(prompt) -> list:
    return [load_image(image) for image in prompt.record.images]


class WandB:
    def __init__(self, out: Path, settings: dict):
        self.wandb = optional("wandb", "wandb")
        self.wandb.init(project="nano-vision-r1", name=out.name, config=settings)

    def numbers(self, row: dict, step: int):
        self.wandb.log(row, step=step)

    def rollouts(self, samples: list, step: int):
        """A table; a cell holds all pictures of its problem."""
        table = self.wandb.Table(columns=["picture", *COLUMNS])
        for sample in samples:
            row, images = sample.row(), [self.wandb.Image(p) for p in pictures(sample.prompt)]
            table.add_data(images, *(row[name] for name in COLUMNS))
        self.wandb.log({"rollouts": table}, step=step)


class TensorBoard:
    def __init__(self, out: Path, settings: dict):
        module = optional("torch.utils.tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(str(out / "tensorboard"))

    def numbers(self, row: dict, step: int):
        for key, value in row.items():
            if isinstance(value, (int, float)) and value == value:
                self.writer.add_scalar(key, value, step)

    def rollouts(self, samples: list, step: int):
        """A text for each sample, verbatim, and each problem's pictures once."""
        for number, sample in enumerate(samples):
            lines = [f"{name}: {sample.row()[name]}" for name in COLUMNS]
            text = "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())
            self.writer.add_text(f"rollouts/{number}", text, step)
        for number, prompt in enumerate(dict.fromkeys(s.prompt for s in samples)):
            for k, image in enumerate(pictures(prompt)):
                name = f"pictures/{number}-{k}"
                self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
