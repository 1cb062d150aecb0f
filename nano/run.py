"""What every stage does around its loop, and nothing of the method: parse the configuration, start the ranks, keep the
run's folder (config.json, command.txt, log.jsonl), write and read checkpoints.

A stage's configuration is a dataclass; a recipe is a dict of its fields; the command line has the last word.
"""

import dataclasses
import difflib
import fcntl
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from nano.hosts import Heartbeat, choose_network


def nearest(word, choices):
    """' (did you mean X?)' or ''"""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


@contextmanager
def for_people():
    """what is wrong with the user's flags or files ends the run with one line, not with a stack of calls"""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def parse_config(config_class, recipes, argv=None):
    """the command line -> a config: defaults of the dataclass < the recipe < flags. an unknown name ends the program"""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        config_class, description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False
    )
    fields = {f.name for f in dataclasses.fields(config_class)}
    recipe = config_class.recipe
    for i, word in enumerate(
        argv
    ):  # the recipe comes first, since it sets the defaults of the other flags
        if word.startswith("--recipe="):
            recipe = word.split("=", 1)[1]
        elif word == "--recipe" and argv[i + 1 :]:
            recipe = argv[i + 1]
    if recipe not in recipes:
        parser.error(
            f"unknown recipe {recipe!r}{nearest(recipe, recipes)}; there are: {', '.join(recipes)}"
        )
    wrong = set(recipes[recipe]) - fields
    assert not wrong, f"recipe {recipe} sets fields that do not exist: {wrong}"
    parser.set_defaults(**recipes[recipe])
    config, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        flags = [f"--{name}" for name in fields]
        flag = rest[0].split("=")[0].replace("_", "-") if rest[0].startswith("--") else rest[0]
        parser.error(
            f"unknown argument {rest[0]!r}{nearest(flag.replace('-', '_').replace('__', '--', 1), flags)}"
        )
    return config


# -----------------------------------------------------------------------------------------------------------------
# ranks


def start_ranks():
    """join torchrun's ranks (gloo on the CPU, NCCL on GPUs), or be the only one -> device"""
    global heart
    disable_progress_bar()  # transformers' bars for reading and writing shards
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = (
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    )  # what is offloaded to the CPU talks through gloo
    if "RANK" in os.environ:
        sys.stdout.reconfigure(line_buffering=True)  # a rank that must end at once cannot flush
        store, rank, world = next(dist.rendezvous("env://"))
        heart = Heartbeat(store.clone(), rank, world)
        choose_network(store, rank, world)
        # long: how much slower than the others a rank may be that is alive. a dead one is the heartbeat's affair
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2)
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


heart = None  # only under torchrun


def guard(main, config):
    """main(config); the other ranks are told how it ends"""
    end = ""
    try:
        main(config)
    except BaseException as error:
        end = heart and heart.reason(error)
        raise
    finally:
        if heart:
            heart.tell(end)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_main():
    return dist.get_rank() == 0


def on_main_first(act):
    """rank 0 does it while the others wait; what it raises ends every rank"""
    failure = [None]
    if is_main():
        try:
            act()
        except (
            Exception,
            SystemExit,
        ) as e:  # handed on below, on every rank: a rank that waits for ever helps nobody
            failure = [e]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def all_sum(values):
    """a dict of numbers, summed over ranks (float64)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def all_max(value):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.item()


# -----------------------------------------------------------------------------------------------------------------
# the folder of a run


def default_out(stage, model, data):
    """runs/toy/STAGE for the toy's own model and data, else a folder of their own: runs/STAGE-MODEL-DATA"""
    if model.startswith("toy:") and data.startswith("toy:"):
        return f"runs/toy/{stage}"
    names = [Path(p.split(",")[0].removeprefix("toy:")) for p in (model, data)]
    plain = lambda p: p.name.split(".json")[0].split(".parquet")[0]
    words = [
        p.parent.name if plain(p) in ("data", "train", "test", "final") else plain(p) for p in names
    ]
    return f"runs/{stage}-{'-'.join(w for w in words if w)}"


def one_writer(out):
    """a lock on the folder for as long as this process lives; ranks orphaned by a killed torchrun may still be writing"""
    lock = open(out / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        raise SystemExit(
            f"{out}: another run (process {lock.read().strip()}) is writing to this folder; stop it first"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def claim(config, keys):
    """take the run's folder: one writer at a time, and one run, since going on with another model or loss would mix two.

    `keys`: the settings that must be those of the run that is there. --no_resume removes what is there instead. -> the settings
    of the run that is there, {} if none is.
    """
    out = Path(config.out)
    there = out / "config.json"
    before = (
        json.loads(there.read_text()) if config.resume and there.exists() else {}
    )  # before the first log line replaces it

    def act():
        out.mkdir(parents=True, exist_ok=True)
        locks.append(one_writer(out))
        if not config.resume:
            start_over(out)
        for key in keys:
            if key in before and before[key] != getattr(config, key):
                raise SystemExit(
                    f"{out} holds a run with {key} = {before[key]!r}, now it is {getattr(config, key)!r}; "
                    "choose another --out, or --no_resume to start over"
                )

    on_main_first(act)
    if hasattr(
        config, "keep"
    ):  # every rank writes its part of a checkpoint (eval.py: rank 0 alone writes)
        must_share(out)
    return before


def must_share(out):
    """with several hosts the run's folder must be one that all of them see: NFS, Lustre or the like"""
    wrote = [(socket.gethostname(), (out / ".lock").read_text()) if is_main() else None]
    dist.broadcast_object_list(wrote, src=0)
    host, text = wrote[0]
    for _ in range(10):  # a network file system may take some seconds to show a new file elsewhere
        with suppress(OSError):
            if (out / ".lock").read_text() == text:
                return
        time.sleep(1)
    raise SystemExit(
        f"{socket.gethostname()} does not see what {host} wrote into {out.absolute()}: with several hosts --out "
        "must be a folder that all of them share, under the same path"
    )


locks = []  # held until the process ends


def start_over(out):
    """remove what an earlier run left, and nothing else"""
    for name in ("checkpoints", "final"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (
        "log.jsonl",
        "samples.jsonl",
        "responses.jsonl",
        "report.json",
        "command.txt",
        "config.json",
    ):
        (out / name).unlink(missing_ok=True)


def command_line():
    launcher = ["python"]
    if "RANK" in os.environ:
        hosts = (
            [f"--nnodes={os.environ['GROUP_WORLD_SIZE']}"]
            if os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
            else []
        )
        launcher = ["torchrun", *hosts, f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join(launcher + [os.path.basename(sys.argv[0]), *sys.argv[1:]])


class Log:
    """config.json, command.txt and log.jsonl of a run; optional Weights & Biases or TensorBoard. rank 0 writes"""

    def __init__(self, out, config, after_step=0, wandb=False, tensorboard=False):
        """`after_step` > 0: a resumed run; what an earlier try wrote past that step is cut off"""
        self.out, self.file, self.sinks = Path(out), None, []
        if not is_main():
            return
        (self.out / "config.json").write_text(
            json.dumps(dataclasses.asdict(config), indent=1) + "\n"
        )
        with open(self.out / "command.txt", "a") as f:
            f.write(command_line() + "\n")
        for name in ("log.jsonl", "samples.jsonl"):
            cut_after_step(self.out / name, after_step)
        self.file = open(self.out / "log.jsonl", "a")
        if wandb:
            wb = wanted("wandb", "wandb")
            wb.init(project="nano-vision-r1", name=self.out.name, config=dataclasses.asdict(config))
            self.sinks.append(lambda row: wb.log(row, step=row["step"]))
        if tensorboard:
            writer = wanted("torch.utils.tensorboard", "tensorboard").SummaryWriter(
                str(self.out / "tensorboard")
            )
            self.sinks.append(
                lambda row: [
                    writer.add_scalar(k, v, row["step"]) for k, v in row.items() if is_number(v)
                ]
            )

    def write(self, row):
        """one JSON line; floats keep 6 significant digits, a missing value (no wrong answer to measure) is null"""
        if self.file is None:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.file.write(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink(row)

    def write_samples(self, rows):
        if self.file is not None and rows:
            with open(self.out / "samples.jsonl", "a") as f:
                f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def wanted(module, package):
    """a module that only a flag asks for"""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"--{package} needs a package that is not installed: pip install {package}"
        ) from error


def is_number(v):
    return isinstance(v, (int, float)) and v == v


def cut_after_step(path, step):
    """keep the lines of steps 1..step; a half-written last line goes too"""
    if not path.exists():
        return
    kept = []
    for line in open(path):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # the writer was killed in the middle of this line; its step is done again
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept))
    aside.replace(path)


def peak_memory():
    """bytes: CUDA's peak since the last call, or the process's peak on the CPU"""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -----------------------------------------------------------------------------------------------------------------
# checkpoints: sharded weights and optimizer through torch.distributed.checkpoint, one small file per rank beside them


def checkpoints(out):
    """the finished checkpoints of a run, oldest first; unfinished ones have another name"""
    return sorted((Path(out) / "checkpoints").glob("step-*"))


def save_checkpoint(out, step, policy, optimizer, progress, keep):
    """`progress`: what else the loop must know to go on (a dict). written aside, then renamed: never half there"""
    folder = Path(out) / "checkpoints"
    aside, final = folder / f"writing-{step:06d}", folder / f"step-{step:06d}"
    if is_main():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(policy, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside)
    rng = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    torch.save(
        {"step": step, "progress": progress, "rng": rng}, aside / f"rank-{dist.get_rank()}.pt"
    )
    dist.barrier()
    if is_main():
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(out, policy, optimizer):
    """the newest checkpoint of the run, into policy and optimizer -> (step, progress); (0, None) when there is none"""
    newest = [
        checkpoints(out)[-1:]
    ]  # rank 0's view: another host's of the shared folder may be some seconds old
    dist.broadcast_object_list(newest, src=0)
    if not newest[0]:
        return 0, None
    found = newest[0]
    weights, moments = get_state_dict(policy, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1])
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    mine = found[-1] / f"rank-{dist.get_rank()}.pt"
    state = torch.load(
        mine if mine.exists() else found[-1] / "rank-0.pt", weights_only=False
    )  # our own file
    if mine.exists():  # a run resumed on more ranks: the new ones start fresh, every draw that counts is seeded by step
        torch.set_rng_state(state["rng"]["torch"])
        np.random.set_state(state["rng"]["numpy"])
        random.setstate(state["rng"]["python"])
        if "cuda" in state["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["step"], state["progress"]
