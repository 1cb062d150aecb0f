"""A checkpoint of sft.py or grpo.py as a Hugging Face folder: no ranks, no GPU, little memory.

  python -m tools.export RUN OUT [--step N] [--model START] [--dtype bfloat16]

Weights are read, cast and written file by file, so that 72B is never whole in memory. OUT appears
when all of it is written. Configuration, processor and type of the weights are those of the run's
final/, and before that is there those of START, the model where the run began (by default as its
config.json names it). Adapters (--lora_rank) are merged into START. RUN may also be a folder of
adapters in peft's format, such as RUN/adapter.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from model import names_in_files
from nano import asking, generic, packing, run
from nano.checkpoint import damage, finished

FILE_BYTES = 4 * 10**9  # of float32 that are in memory at a time, and about what a file holds


def find(folder: Path, step: int) -> Path:
    """The checkpoint of a step, or of the last one (0)."""
    found = {int(path.name.removeprefix("step-")): path for path in finished(folder)}
    if not found:
        raise ValueError(f"{folder}: no checkpoints in it; RUN is a folder of sft.py or grpo.py")
    if (step or max(found)) not in found:
        raise ValueError(f"{folder}: no checkpoint of step {step}, only of {[*found]}")
    return found[step or max(found)]


def parts(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, cut into lists whose sizes sum to `limit` at most, or of one name."""
    lists, room = [], 0
    for name, size in sizes.items():
        if size > room:
            lists.append([])
            room = limit
        lists[-1].append(name)
        room -= size
    return lists


def local(model: str) -> str:
    """The folder of a model that may be one of the hub's."""
    if Path(model).is_dir():
        return model
    try:
        return snapshot_download(model, allow_patterns=[*generic.FILES, "*.safetensors"])
    except (ValueError, OSError) as error:
        raise ValueError(f"{model}, where the run began, is not here: say --model START") from error


class Weights:
    """The weights of a checkpoint by name, some at a time. Of a run with adapters it has only
    these, and they are merged into what the run began with."""

    def __init__(self, checkpoint: Path, hf, start: str, settings: dict):
        peft = (checkpoint / "adapter_config.json").exists()
        if not peft and (wrong := damage(checkpoint)):
            raise ValueError(f"{checkpoint}: {wrong}; take another one with --step")
        self.reader, self.sizes = HuggingFaceStorageReader(checkpoint), {}
        self.there = self.reader.read_metadata().state_dict_metadata
        self.scale, self.source, weights = 0.0, self.reader, dict(hf.named_parameters())
        self.sizes = {name: p.shape for name, p in weights.items()}
        self.keys = {name: f"model.hf.{name}" for name in weights}
        if settings.get("lora_rank"):
            self.scale = settings["lora_alpha"] / settings["lora_rank"]
            self.adapter = "base_model.model.{}.lora_{}.weight" if peft else "model.hf.{}.lora_{}"
            names = [name.removesuffix(".weight") for name in weights]
            known = {self.adapter.format(name, kind) for name in names for kind in "AB"}
            if peft and (other := self.there.keys() - known):
                raise ValueError(f"{checkpoint}: {min(other)} fits no layer of {start}")
            self.source = HuggingFaceStorageReader(start)
            self.keys = names_in_files(hf, self.source)
        elif missing := [key for key in self.keys.values() if key not in self.there]:
            raise ValueError(f"{checkpoint}: {missing[0]} is not in it")

    def read(self, reader, sizes: dict) -> dict[str, torch.Tensor]:
        found = {key: torch.empty(size) for key, size in sizes.items()}  # float32
        dcp.load(found, storage_reader=reader, no_dist=True)
        return found

    def __call__(self, names: list[str]) -> dict[str, torch.Tensor]:
        found = self.read(self.source, {self.keys[name]: self.sizes[name] for name in names})
        found = {name: found[self.keys[name]] for name in names}
        for name in names if self.scale else []:
            pair = [self.adapter.format(name.removesuffix(".weight"), kind) for kind in "BA"]
            if pair[0] in self.there:
                b, a = self.read(self.reader, {key: self.there[key].size for key in pair}).values()
                found[name] += self.scale * (b @ a)
        return found


def export(folder, out, step: int = 0, start: str = "", dtype: str = "", limit=FILE_BYTES) -> Path:
    """Writes the checkpoint in the Hugging Face layout -> the checkpoint."""
    folder, out = Path(folder), Path(out)
    peft = folder / "adapter_config.json"
    checkpoint = folder if peft.exists() else find(folder, step)
    if out.exists():
        raise ValueError(f"{out} is there already")
    file = peft if peft.exists() else folder / "config.json"
    settings, final = json.loads(file.read_text()), folder / "final"
    if peft.exists():  # its names for what ours calls otherwise
        settings |= dict(model=settings["base_model_name_or_path"], lora_rank=settings["r"])
    start, merged = start or settings["model"], bool(settings.get("lora_rank"))
    source = str(final) if final.exists() else local(start)
    config = AutoConfig.from_pretrained(source)
    config.dtype = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
    library = generic if generic.packed_refusal(config) else packing
    how = {name: settings.get(name, "") for name in asking.SETTINGS}
    read = Weights(checkpoint, hf, local(start) if merged else "", settings)
    lists, where, total = parts({n: 4 * s.numel() for n, s in read.sizes.items()}, limit), {}, 0
    aside = out.with_name(f"writing-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        hf.config.architectures = [type(hf).__name__]
        for part in (hf.config, hf.generation_config):
            part.save_pretrained(aside)
        library.Processor(source, **how).save(aside)
        for number, names in enumerate(lists, 1):
            weights = {name: weight.to(hf.dtype) for name, weight in read(names).items()}
            weights = revert_weight_conversion(hf, weights)  # names as the hub's files have them
            weights = {name: weight.contiguous() for name, weight in weights.items()}
            file = f"model-{number:05d}-of-{len(lists):05d}.safetensors"
            file = file if len(lists) > 1 else "model.safetensors"
            save_file(weights, aside / file, {"format": "pt"})
            where |= dict.fromkeys(weights, file)
            total += sum(weight.nbytes for weight in weights.values())
        if len(lists) > 1:
            index = dict(metadata=dict(total_size=total), weight_map=where)
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        aside.rename(out)
    finally:  # a full disk gets its room back
        shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.export", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--step", type=int, default=0, help="of the checkpoint (default: the last)")
    parser.add_argument("--model", default="", metavar="START")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16", "float16"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what we want
    with run.for_people():
        found = export(args.run, args.out, args.step, args.model, args.dtype)
    print(f"{found} is now {args.out}")
