"""What every stage does around its loop, and nothing of the method: read the configuration, start
the ranks, keep the run's folder (config.json, command.txt, log.jsonl), write and read checkpoints.

A stage's configuration is a dataclass. A recipe is a dict of its fields. The command line has the
last word.
"""

import argparse
import dataclasses
import difflib
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import get_args

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
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from nano import hub
from nano.trackers import TensorBoard, WandB

# Minutes after which a rank that does not take part counts as lost: in a collective, and where the
# ranks meet after work of very different length (sampling, downloads). Ours.
COLLECTIVE_MINUTES = float(os.environ.get("COLLECTIVE_MINUTES", 30))
MEETING_MINUTES = float(os.environ.get("MEETING_MINUTES", 240))

# -------------------------------------------------------------------------------------------------
# settings


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' for the most similar choice, or ''."""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


@contextmanager
def for_people():
    """What is wrong with the user's flags or files ends the run with one line, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if debug:
            raise
        raise SystemExit(f"error: {error}") from error


debug = False  # --debug: errors that a person can mend keep their traceback
DISK = {
    "No space left on device": "the disk is full",
    "Disk quota exceeded": "the quota of the disk is used up",
    "File too large": "a file would become larger than this system allows",
    "Read-only file system": "it cannot be written to; choose another --out",
    "Permission denied": "this user may not write or read there; choose another --out",
    "Input/output error": "the disk fails",
}


def disk_trouble(error: BaseException) -> str:
    """One line about a full, failing or read-only disk, or ''. Libraries wrap the system's error,
    and its words alone survive."""
    lines = [] if isinstance(error, SystemExit) else str(error).splitlines()
    found = [(line.strip(), DISK[words]) for words in DISK for line in lines if words in line]
    again = "When that is mended, the same command goes on from what was last saved."
    return f"error: {found[0][1]} ({found[0][0][-300:]}). {again}" if found else ""


def find_model(name: str) -> str:
    """The folder of a model; a hub name is downloaded, by rank 0 first (a collective)."""
    on_main_first(partial(hub.model, name))
    folder = hub.model(name)
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{name} is no model folder: there is no config.json in it")
    return folder


def moved(commands: dict[str, str]):
    """Ends the program with the new name when it is called with a sub-command of an old version."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in commands:
        print(f"{word!r} is a tool of its own now: {commands[word]}", file=sys.stderr)
        raise SystemExit(2)


def described(config_class) -> dict[str, tuple[str, str]]:
    """{field: (its group, its help)}: the comments of the dataclass are the help. A short comment
    that is a line for itself heads a group, a longer one belongs to the field below it."""
    group, notes, found = "settings", [], {}
    for line in inspect.getsource(config_class).splitlines():
        before, mark, comment = line.partition("  # ")
        if line.startswith("    # "):
            notes.append(line[6:])
        elif field := re.match(r"    (\w+):", line):
            if len(notes) == 1 and len(notes[0]) <= 50 and not notes[0].endswith("."):
                group, notes = notes[0], []
            found[field[1]] = group, " ".join([*notes, comment] if mark else notes)
            notes = []
    return found


def truth(word: str) -> bool:
    if word.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() in ("true", "1", "yes")


def make_parser(config_class) -> argparse.ArgumentParser:
    """A flag for each field of the dataclass, in its groups, with its comment and default."""
    stage, texts, groups = sys.modules[config_class.__module__], described(config_class), {}
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    usage = "%(prog)s [--FLAG VALUE ...]   (a switch is --FLAG or --no_FLAG)"
    about = dict(description=stage.__doc__, usage=usage, formatter_class=form, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    for field in dataclasses.fields(config_class):
        group, text = texts[field.name]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        options = dict(type=field.type, metavar=getattr(field.type, "__name__", "").upper())
        if field.type is bool:
            options = dict(type=truth, nargs="?", const=True, metavar="BOOL")
        elif choices := get_args(field.type):  # Literal
            options = dict(type=type(choices[0]), choices=choices)
        text = text.replace("%", "%%") + " [%(default)s]"
        groups[group].add_argument(f"--{field.name}", default=field.default, help=text, **options)
    return parser


def spelled(argv: list[str], config_class) -> list[str]:
    """--max-len as --max_len, --no_resume as --resume=False."""
    switches = {f"--no_{f.name}" for f in dataclasses.fields(config_class) if f.type is bool}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name[:2] == "--" else name
        words.append(f"--{name[5:]}=False" if name in switches else name + equals + value)
    return words


def parse_config(config_class, recipes: dict[str, dict], argv: list[str] | None = None):
    """Reads the command line: the dataclass's defaults < the recipe < the flags.

    The dataclass holds the paper's values. Without --recipe the toy's recipe is taken, unless
    --model, --data or --bench name something of one's own: then the paper's values hold.
    An unknown name ends the program and is answered with the nearest one.
    """
    global debug
    argv = spelled(sys.argv[1:] if argv is None else argv, config_class)
    parser, given = make_parser(config_class), {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        given[name] = value if equals else "".join(argv[i + 1 : i + 2])
    own = [given[f] for f in ("--model", "--data", "--bench") if f in given]
    default = "" if any(not value.startswith("toy:") for value in own) else "toy"
    if given.keys() & {"--help", "-h"}:
        default = ""  # the dataclass's values are shown, or those of a recipe that is named
    recipe = given.get("--recipe", default)
    if recipe and recipe not in recipes:
        known = ", ".join(recipes)
        parser.error(f"unknown recipe {recipe!r}{nearest(recipe, recipes)}; there are: {known}")
    chosen, texts = recipes[recipe] if recipe else {}, described(config_class)
    wrong = set(chosen) - set(texts)
    assert not wrong, f"recipe {recipe} sets fields that do not exist: {wrong}"
    parser.set_defaults(**{**chosen, "recipe": recipe})
    parser.epilog = f"recipes: {', '.join(recipes)}"
    values, rest = parser.parse_known_args(argv)
    if rest:
        # "--learning_rate" is found by the first words of the comment beside lr.
        flag = rest[0].split("=")[0]
        said = {re.split(r"[.,;:(]", text)[0].strip(): name for name, (_, text) in texts.items()}
        known = {f"--{name}": name for name in texts}
        known |= {"--" + words.replace(" ", "_"): name for words, name in said.items() if words}
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        hint = f" (did you mean --{known[close[0]]}?)" if close else ""
        parser.error(f"unknown argument {flag!r}{hint}")
    debug = values.debug
    return config_class(**{name: getattr(values, name) for name in texts})


# -------------------------------------------------------------------------------------------------
# ranks


def start_ranks() -> torch.device:
    """Joins torchrun's ranks (gloo on the CPU, NCCL on GPUs), or is the only one; -> the device."""
    global store, meeting, siblings
    disable_progress_bar()  # transformers' bars for reading and writing shards
    local = int(os.environ.get("LOCAL_RANK", 0))
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Every micro-batch has another shape: without this, CUDA's memory falls into fragments.
        # vLLM turns it off around the memory that it gives back when it sleeps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what is offloaded to the CPU talks through gloo
        # NCCL's flight recorder: after a time-out it tells which collective each rank was in.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        sys.stdout.reconfigure(line_buffering=True)  # a rank that is killed cannot flush
        store, rank, world = next(dist.rendezvous("env://"))
        store.set(f"host/{rank}", socket.gethostname())
    patience = timedelta(minutes=COLLECTIVE_MINUTES)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    meeting = dist.new_group(backend="gloo", timeout=timedelta(minutes=MEETING_MINUTES))
    everyone = [None] * world
    dist.all_gather_object(everyone, os.getpid())
    siblings = everyone[rank - local :][: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
    return device


store = None  # torchrun's key-value store, through which the ranks tell how they end
meeting = None  # a process group with much patience


def guard(main: Callable, config):
    """Runs main(config). When a rank fails, every rank says which one it was and why.

    torchrun ends the other ranks (SIGTERM) when one of its own dies. A frozen rank is noticed by
    the time-out of the collective in which the others wait for it. Nothing goes on with fewer
    ranks: that is what a resume is for, and a resume is exact.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    os.register_at_fork(after_in_child=leave_signals)
    try:
        main(config)
    except BaseException as error:  # DCP's is no Exception
        trouble = "" if debug else disk_trouble(error)
        if store is not None and dist.is_initialized() and dist.get_world_size() > 1:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                stop("a connection broke")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this rank shows its own error
            reason = trouble or f"{type(error).__name__}: {error}"
            store.set(f"end/{os.environ['RANK']}", reason[:1000])
            store.set("failed", "")
        if trouble:
            raise SystemExit(trouble) from None
        raise


working = False  # from the first line of the log on: a signal lets a step come to its end
told, told_at = 0, 0.0  # the signal that told this rank to stop, and when
siblings = []  # the processes of this host's ranks


def on_signal(number: int, frame):
    """SIGTERM or Ctrl-C: the step is finished and saved, then the run ends (end_step).

    It ends at once before the first step, at a second signal, and when a rank of this host is gone:
    then the signal is torchrun's, who ends the others, and a collective would never end. Slurm
    sends the same signal to torchrun, who hands it on: an echo within two seconds does not count.
    """
    global told, told_at
    try:
        lost = store is not None and store.check(["failed"])
    except dist.DistError:  # the first host's torchrun is gone
        lost = True
    lost = lost or not all(Path(f"/proc/{process}").exists() for process in siblings)
    if lost or not working or (told and time.monotonic() - told_at > 2):
        stop("it was told to", 1 if lost else 128 + number)
    if not told:
        told, told_at = number, time.monotonic()
        if int(os.environ.get("RANK", 0)) == 0:
            text = "told to stop: what is under way is finished and saved; a second signal ends it"
            os.write(2, f"\n{text} at once\n".encode())


def leave_signals():
    """A helper process ends with its rank, not at Ctrl-C, which all of a terminal get."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave(saved: str):
    """Ends a run that was told to stop, with what a shell expects: 130 or 143 (a collective)."""
    number = int(all_max(told))
    for each in (signal.SIGTERM, signal.SIGINT):  # torchrun signals the others when the first ends
        signal.signal(each, signal.SIG_IGN)
    meet()
    say(f"stopped by {signal.Signals(number).name}: {saved}. The same command goes on from there.")
    dist.destroy_process_group()
    raise SystemExit(128 + number)


def stop_if_told(kept: str):
    """Between two pieces of work that are saved (a collective)."""
    if all_max(told):
        leave(kept)


def stop(otherwise: str, code: int = 1):
    """Says which ranks failed or are silent, and ends this one at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # saying it once is enough
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    text = "stopped at once: " + otherwise if alone else lost_ranks(otherwise)
    os.write(2, f"\n{text}\n".encode())
    os._exit(code)  # threads may wait in a collective that never ends


def lost_ranks(otherwise: str, patience: float = 3.0) -> str:
    """A sentence about the ranks that failed or are silent. `patience` in seconds: until then the
    others have said how they ended."""
    rank, world, reasons = os.environ["RANK"], int(os.environ["WORLD_SIZE"]), []
    deadline = time.monotonic() + patience
    try:
        store.set(f"end/{rank}", "")
        while not store.check([f"end/{r}" for r in range(world)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for r in range(world):
            if not store.check([f"end/{r}"]):
                host = store.get(f"host/{r}").decode()
                reasons.append(f"rank {r} on {host} is silent (killed, frozen or cut off)")
            elif reason := store.get(f"end/{r}").decode():
                reasons.append(f"rank {r} failed ({reason})")
    except dist.DistError:
        reasons = ["the first host's torchrun is gone"]
    return (
        f"stopping rank {rank}: {'; '.join(reasons) or otherwise}. Run the same command again, "
        "also with other ranks: it goes on from what was last saved."
    )


def meet():
    """Waits for all ranks after work that may take one of them hours longer than the others."""
    dist.barrier(group=meeting)


def is_main() -> bool:
    return dist.get_rank() == 0


def say(text: str):
    """Rank 0 prints a line above its progress bars."""
    if text and (not dist.is_initialized() or is_main()):
        tqdm.write(text)


def on_main_first(act: Callable):
    """Rank 0 acts while the others wait; what it raises ends every rank. -> what it returns."""
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = act()
        except (Exception, SystemExit) as error:  # raised below, on every rank
            outcome[1] = error
    meet()
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def all_sum(values: dict[str, float], op=dist.ReduceOp.SUM) -> dict[str, float]:
    """Sums each value over the ranks, in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total, op=op)
    return dict(zip(values, total.tolist()))


def all_max(value: float) -> float:
    return all_sum({"value": value}, dist.ReduceOp.MAX)["value"]


# -------------------------------------------------------------------------------------------------
# the folder of a run


def default_out(stage: str, model: str, data: str) -> str:
    """runs/toy/STAGE for the toy's own model and data, else runs/STAGE-MODEL-DATA."""
    if model.startswith("toy:") and data.startswith("toy:"):
        return f"runs/toy/{stage}"
    words = []
    for name in (model, data):
        path = Path(name.split(",")[0].removeprefix("toy:"))
        plain = path.name.split(".json")[0].split(".parquet")[0]
        if plain in ("data", "train", "test", "final"):
            plain = path.parent.name
        words.append(plain)
    return f"runs/{stage}-{'-'.join(word for word in words if word)}"


def one_writer(out: Path):
    """Locks the folder for as long as this process lives: orphaned ranks may still be writing."""
    lock = open(out / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = f"another run (process {lock.read().strip()})"
        raise SystemExit(f"{out}: {owner} is writing to this folder; stop it first") from error
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


locks = []  # held until the process ends


def claim(config, how_only: tuple[str, ...]) -> dict:
    """Takes the run's folder: one writer at a time, and one run, so that two are never mixed.

    Every setting must be that of the run that is there, except those in `how_only` (paths, memory,
    speed, logging). --no_resume removes that run. Returns its settings, {} when there is none.
    """
    out = Path(config.out)
    there = out / "config.json"
    before = read_settings(there) if config.resume and there.exists() else {}
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    skipped = {"recipe", "out", "resume", *how_only}
    changed = [k for k in now if k in before and k not in skipped and before[k] != now[k]]

    def act():
        out.mkdir(parents=True, exist_ok=True)
        locks.append(one_writer(out))
        if not config.resume:
            start_over(out)
        if changed:
            old = ", ".join(f"{k} = {before[k]!r}" for k in changed)
            new = ", ".join(f"{now[k]!r}" for k in changed)
            raise SystemExit(
                f"{out} holds a run with {old}, now it is {new}; "
                "choose another --out, or --no_resume to start over"
            )

    on_main_first(act)
    must_share(out)
    return before


def read_settings(path: Path) -> dict:
    """The config.json of the run that is there."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    raise SystemExit(
        f"error: {path} is damaged, and says no longer which settings made what lies beside it: "
        "put back a good copy, or start over with --no_resume"
    )


def must_share(out: Path):
    """Several hosts must all see the run's folder: NFS, Lustre or the like."""
    text = on_main_first((out / ".lock").read_text)
    for _ in range(10):  # a network file system may take some seconds to show a new file elsewhere
        with suppress(OSError):
            if (out / ".lock").read_text() == text:
                return
        time.sleep(1)
    raise SystemExit(
        f"{socket.gethostname()} does not see what rank 0 wrote into {out.absolute()}: "
        "with several hosts --out must be a folder that all of them share, under the same path"
    )


def start_over(out: Path):
    """Removes what an earlier run left, and nothing else."""
    for name in ("checkpoints", "final"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = "log.jsonl samples.jsonl responses.jsonl report.json command.txt config.json"
    for name in files.split():
        (out / name).unlink(missing_ok=True)


def command_line() -> str:
    launcher = ["python"]
    if "RANK" in os.environ:
        nodes, ranks = os.environ.get("GROUP_WORLD_SIZE", 1), os.environ["LOCAL_WORLD_SIZE"]
        launcher = ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={ranks}"]
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]])


class Log:
    """config.json, command.txt, log.jsonl and samples.jsonl of a run, written by rank 0.

    Optional: Weights & Biases (config.wandb) and TensorBoard (config.tensorboard).
    """

    def __init__(self, out: Path, config, after_step: int = 0):
        """What an earlier try of the run wrote past `after_step` is cut off."""
        global working
        working = True  # on_signal
        self.out, self.file, self.trackers = Path(out), None, []
        if not is_main():
            return
        settings = dataclasses.asdict(config)
        (self.out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        with open(self.out / "command.txt", "a") as f:
            f.write(command_line() + "\n")
        for name in ("log.jsonl", "samples.jsonl"):
            cut_after_step(self.out / name, after_step)
        self.file = open(self.out / "log.jsonl", "a")
        for name, tracker in dict(wandb=WandB, tensorboard=TensorBoard).items():
            if settings.get(name):
                self.trackers.append(tracker(self.out, settings))

    def write(self, row: dict):
        """Writes one JSON line. Floats keep 6 significant digits; NaN (no wrong answer whose length
        could be measured, say) becomes null."""
        if self.file is None:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        line = {k: None if v != v else v for k, v in row.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.numbers(row, row["step"])

    def write_samples(self, rows: list[dict]):
        if self.file is not None and rows:
            with open(self.out / "samples.jsonl", "a") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def show(self, samples: list, step: int):
        """Some rollouts go to the trackers, with pictures."""
        for tracker in self.trackers:
            tracker.rollouts(samples, step)


def cut_after_step(path: Path, step: int):
    """Keeps the lines of steps 1..step; a half-written last line goes too."""
    if not path.exists():
        return
    kept, junk = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # the writer was killed within the last one
            junk += line.endswith(b"\n")
    if junk:
        shutil.copyfile(path, path.with_suffix(".damaged"))
        say(f"{path}: {junk} damaged lines are left out; the file as it was: *.damaged")
    aside = path.with_suffix(".tmp")
    aside.write_bytes(b"".join(kept))
    aside.replace(path)


def read_log(run: str | Path) -> list[dict]:
    """The steps in RUN/log.jsonl in order; of a step logged twice the last. ValueError if none."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; RUN is the folder that grpo.py wrote")
    steps, found = {}, "it is empty; has the first step ended?"
    wanted = {"step", "stage", "max_len", "group_size", "len_mean", "tokens"}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:  # the run is writing it just now, or was killed while it did
            print(f"{path}:{number}: skipped a half-written line", file=sys.stderr)
            continue
        if isinstance(row, dict) and wanted <= row.keys():
            steps[row["step"]] = row
        else:
            found = f"line {number} lacks some of {', '.join(sorted(wanted))}; is it a grpo.py run?"
    if not steps:
        raise ValueError(f"{path}: {found}")
    return [steps[step] for step in sorted(steps)]


class Timer:
    """Seconds spent in named parts of a step: `with timer("rollout"): ...`."""

    def __init__(self, *names: str):
        self.began, self.seconds = time.perf_counter(), dict.fromkeys(names, 0.0)

    @contextmanager
    def __call__(self, name: str):
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def row(self) -> dict[str, float]:
        """{t_rollout: seconds, ..., t_total: seconds since the timer was made}"""
        parts = {f"t_{name}": seconds for name, seconds in self.seconds.items()}
        return parts | {"t_total": time.perf_counter() - self.began}


def peak_memory() -> int:
    """Bytes: CUDA's peak since the last call, or the process's peak on the CPU."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------
# checkpoints: sharded weights and optimizer as safetensors. No pickle is written, none is read.

SUMS = "checksums.json"  # of a checkpoint: {file: [bytes, SHA-256]}
PART = 2 * 2**30  # bytes: about what one file of a rank holds, since it is put together in memory


def checkpoints(out: Path) -> list[Path]:
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

    return on_main_first(read)


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
        dist.all_gather_object(gathered, found, group=meeting)
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
    if all_max(not all(part.isfinite().all() for part in parts)):
        broken("some weights are not finite")


def save_checkpoint(out: Path, step: int, policy, optimizer, keep: int, best: int = 0):
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
        for old in [other for other in checkpoints(out) if other <= final][:-keep]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)

    on_main_first(lambda: clear() or aside.mkdir(parents=True))
    try:
        *_, stored = whole_state(policy, optimizer)
        ends = accumulate(tensor.numel() * tensor.element_size() for tensor in stored.values())
        parts = {name: 1 + end // (PART * dist.get_world_size()) for name, end in zip(stored, ends)}
        writer = HuggingFaceStorageWriter(aside, parts, save_distributed=True)
        dcp.save(stored, storage_writer=writer)
        meet()
        sums = checksums(aside.glob("*.safetensors"))
        on_main_first(finish)
    except BaseException:  # a full disk gets its room back
        clear()
        raise


def load_checkpoint(out: Path, policy, optimizer) -> int:
    """Reads the run's newest whole checkpoint into policy and optimizer -> its step, 0 without one.

    A run may go on with another number of ranks.
    """
    found = [checkpoints(out)]  # rank 0's view: another host's may be some seconds old
    dist.broadcast_object_list(found, src=0)
    for folder in reversed(found[0]):
        if wrong := damage(folder):
            say(f"{folder}: {wrong}. It is passed over: the checkpoint before it is looked at")
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
    stop, best = all_max(told), best_step(config.out) if getattr(config, "keep_best", 0) else 0
    if (stop or step in (total, best) or step % config.save_every == 0) and not refused:
        save_checkpoint(config.out, step, policy, optimizer, config.keep, best)
    if stop and step < total:
        leave(f"step {step} of {total} is done, {config.out}/checkpoints has what is saved")


refused = 0  # updates in a row that were not finite


def accept(loss: float, grad_norm: float) -> bool:
    """Whether an update may be taken: loss and norm are finite on all ranks (a collective)."""
    global refused
    refused = refused + 1 if all_max(not math.isfinite(loss + grad_norm)) else 0
    if refused:
        say(f"an update is not taken: loss {loss:.4g}, gradient norm {grad_norm:.4g} on rank 0")
    if refused == 3:
        broken("three updates in a row had a loss or gradient that is not finite")
    return not refused


def broken(what: str):
    raise SystemExit(
        f"error: {what}, and nothing of it is saved; the checkpoints and final/ are as they were. "
        "Likely causes: --lr is too high (a tenth of it?), no --warmup, --max_grad_norm is too "
        "large, or weights that were broken before: evaluate --model"
    )
