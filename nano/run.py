"""What every stage does around its loop, and nothing of the method: start the ranks and end them,
keep the run's folder (config.json, command.txt, log.jsonl). Settings are in nano/settings.py,
checkpoints in nano/checkpoint.py.
"""

from nano.settings import disk_trouble, for_people, moved, nearest, parse_config  # noqa: F401

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from nano import hub, settings
from nano.trackers import TensorBoard, WandB

# Minutes after which a rank that does not take part counts as lost: in a collective, and where the
# ranks meet after work of very different length (sampling, downloads). Ours.
COLLECTIVE_MINUTES = float(os.environ.get("COLLECTIVE_MINUTES", 30))
MEETING_MINUTES = float(os.environ.get("MEETING_MINUTES", 240))

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
        trouble = "" if settings.debug else disk_trouble(error)
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


def lost_ranks(otherwise: str) -> str:
    """A sentence about the ranks that failed or are silent: the others say how they ended within
    3 seconds. After a failure torchrun tells each to end: one that computes hears it later."""
    rank, world, reasons = os.environ["RANK"], int(os.environ["WORLD_SIZE"]), []
    began = time.monotonic()
    try:
        store.set(f"end/{rank}", "")
        while not store.check([f"end/{r}" for r in range(world)]):
            if time.monotonic() - began > (20 if store.check(["failed"]) else 3):
                break
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


def find_model(name: str) -> str:
    """The folder of a model; a hub name is downloaded, by rank 0 first (a collective)."""
    on_main_first(partial(hub.model, name))
    folder = hub.model(name)
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{name} is no model folder: there is no config.json in it")
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"{name}: there is no *.safetensors in it. Weights in a pickle (pytorch_model.bin) are "
            "not read, since a pickle can run any program; convert them where you trust them"
        )
    return folder


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
