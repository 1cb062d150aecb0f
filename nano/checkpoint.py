"""Checkpoints: sharded weights and the optimizer's state as safetensors, with checksums. No pickle
is written, and none is read.

A checkpoint is written aside and then renamed. Nothing else is needed to go on: every draw follows
from the seed and the step.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from nano import run

SUMS = "checksums.json"  # of a checkpoint: {file: [bytes, SHA-256]}
PART = 2 * 2**30  # bytes: about what one file of a rank holds, since it is put together in memory


def finished(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; unfinished ones have another name."""
    return sorted((Path(out) / "checkpoints").glob("step-*"))


def saved(policy) -> StateDictOptions:
    """What a checkpoint holds: all weights, but of a policy with adapters only these. The others
    are those of --model."""
    adapted = any(".lora_" in name for name, _ in policy.named_parameters())
    kind = dict(ignore_frozen_params=adapted, strict=not adapted)
    return StateDictOptions(flatten_optimizer_state_dict=True, **kind)


def best_step(out: Path) -> int:
    """The step of training with the best eval_accuracy, 0 before there is one (a collective)."""

    def read():
        rows = map(json.loads, open(Path(out) / "log.jsonl"))
        found = [(row["eval_accuracy"], -row["step"]) for row in rows if "eval_accuracy" in row]
        found = [pair for pair in found if pair[1]]  # step 0 has no checkpoint
        return -max(found, default=(0, 0))[1]

    return run.on_main_first(read)


def checksums(files: Iterable[Path]) -> dict[str, list]:
    """{name: [bytes, SHA-256]}; each rank reads some of the files (a collective)."""
    files, rank, world = sorted(files), 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    found, gathered = {}, [None] * world
    # A rank's own files are neighbours: mostly it reads what it has just written.
    for file in files[len(files) * rank // world : len(files) * (rank + 1) // world]:
        digest = hashlib.sha256()
        with open(file, "rb") as f:
            while piece := f.read(2**22):
                digest.update(piece)
            found[file.name] = [f.tell(), digest.hexdigest()]
    if world > 1:
        dist.all_gather_object(gathered, found, group=run.meeting)
        found = {name: sums for part in gathered for name, sums in part.items()}
    return found


def fingerprint(folder: str) -> str:
    """16 hex digits that change with any weight of a model folder, its tokenizer or its template
    (a collective). The files are read whole, which takes as long as to load them."""
    kinds = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
    sums = checksums({file for kind in kinds for file in Path(folder).glob(kind)})
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, '' when they are as written (a collective)."""
    try:
        expected = dict(json.loads((folder / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return f"its {SUMS} is missing or damaged"
    found = checksums(folder.glob("*.safetensors"))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            return f"{name} {'is missing' if name in expected else 'does not belong to it'}"
        if found[name] != expected[name]:
            return f"{name} is not as it was written ({found[name][0]} bytes on the disk)"
    return ""


def whole_state(policy, optimizer) -> tuple[dict, dict, dict]:
    """-> the weights, the optimizer's state, and as one dict what a checkpoint holds of both."""
    weights, moments = get_state_dict(policy, optimizer, options=saved(policy))
    every = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in policy.named_parameters()}  # stored under their first name
    stored = {f"model.{name}": weight for name, weight in weights.items() if name not in tied}
    stored |= {f"optimizer.{k}": v for k, v in moments.items() if isinstance(v, torch.Tensor)}
    return weights, moments, stored


def refuse_broken(policy):
    """Ends the run rather than write weights that are not finite (a collective)."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters())
    if run.all_max(not all(part.isfinite().all() for part in parts)):
        broken("some weights are not finite")


def save(out: Path, step: int, policy, optimizer, keep: int, best: int = 0):
    """Saves weights and optimizer. Written aside, then renamed: a checkpoint is never half there.
    The newest `keep` stay, and that of step `best`.

    Nothing else is needed to go on: every draw follows from the seed and the step.
    """
    folder = Path(out) / "checkpoints"
    aside, final = folder / f"writing-{step:06d}", folder / f"step-{step:06d}"
    refuse_broken(policy)

    def clear():
        for old in folder.glob("writing-*"):
            shutil.rmtree(old, ignore_errors=True)

    def finish():
        (aside / SUMS).write_text(json.dumps(sums, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in [other for other in finished(out) if other <= final][:-keep]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)

    run.on_main_first(lambda: clear() or aside.mkdir(parents=True))
    try:
        *_, stored = whole_state(policy, optimizer)
        ends = accumulate(tensor.numel() * tensor.element_size() for tensor in stored.values())
        parts = {name: 1 + end // (PART * dist.get_world_size()) for name, end in zip(stored, ends)}
        writer = HuggingFaceStorageWriter(aside, parts, save_distributed=True)
        dcp.save(stored, storage_writer=writer)
        run.meet()
        sums = checksums(aside.glob("*.safetensors"))
        run.on_main_first(finish)
    except BaseException:  # a full disk gets its room back
        clear()
        raise


def load(out: Path, policy, optimizer) -> int:
    """Reads the run's newest whole checkpoint into policy and optimizer -> its step, 0 without one.

    A run may go on with another number of ranks.
    """
    found = [finished(out)]  # rank 0's view: another host's may be some seconds old
    dist.broadcast_object_list(found, src=0)
    for folder in reversed(found[0]):
        if wrong := damage(folder):
            run.say(f"{folder}: {wrong}. It is passed over: the checkpoint before it is looked at")
            continue
        weights, moments, stored = whole_state(policy, optimizer)
        dcp.load(stored, storage_reader=HuggingFaceStorageReader(folder))
        set_state_dict(
            policy,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=saved(policy),
        )
        return int(folder.name.removeprefix("step-"))
    if found[0]:
        raise SystemExit(
            f"error: {out}/checkpoints: none of {len(found[0])} can be used; "
            "put back a good copy of one, or start over with --no_resume"
        )
    return 0


def end_step(config, step: int, total: int, policy, optimizer):
    """Saves what is due after `step` steps. A run that was told to stop is saved, and ends.

    While updates are refused nothing is saved: weights that may be lost would take the place of
    good ones, and a resume repeats these steps.
    """
    stop = run.all_max(run.told)
    best = best_step(config.out) if getattr(config, "keep_best", False) else 0
    if (stop or step in (total, best) or step % config.save_every == 0) and not refused:
        save(config.out, step, policy, optimizer, config.keep, best)
    if stop and step < total:
        run.leave(f"step {step} of {total} is done, {config.out}/checkpoints has what is saved")


refused = 0  # updates in a row that were not finite


def accept(loss: float, grad_norm: float) -> bool:
    """Whether an update may be taken: loss and norm are finite on all ranks (a collective)."""
    global refused
    refused = refused + 1 if run.all_max(not math.isfinite(loss + grad_norm)) else 0
    if refused:
        run.say(f"an update is not taken: loss {loss:.4g}, gradient norm {grad_norm:.4g} on rank 0")
    if refused == 3:
        broken("three updates in a row had a loss or gradient that is not finite")
    return not refused


def broken(what: str):
    raise SystemExit(
        f"error: {what}, and nothing of it is saved; the checkpoints and final/ are as they were. "
        "Likely causes: --lr is too high (a tenth of it?), no --warmup, --max_grad_norm is too "
        "large, or weights that were broken before: evaluate --model"
    )
