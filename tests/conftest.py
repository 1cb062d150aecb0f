"""Shared by the tests: one thread, a tiny random model, records with pictures, runs of grpo.py.

The repository is put on the path, so that pytest can be called from anywhere.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch's store asks for the name behind every connection: a name server that does not answer would
# cost 5 s each time.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def single_rank():
    """This process becomes the only rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


# -------------------------------------------------------------------------------------------------
# models and data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a random Qwen2.5-VL in the Hugging Face layout."""
    import toy

    path = tmp_path_factory.mktemp("tiny")
    toy.random_model(path, seed=3, max_pixels=16 * 28 * 28)
    return str(path)


@pytest.fixture(scope="session")
def real():
    """The folder of real problems with images."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real problems (../shared/data) are not here")
    return path


@pytest.fixture()
def pictures():
    """Records of the toy world with images of several sizes, one with two images, one with none."""
    from PIL import Image

    import toy
    from nano.data import Record

    records = toy.problems(4, 0, "t")
    for i, size in enumerate([(56, 84), (140, 56)]):
        out = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(out, "PNG")
        records[i].images = [out.getvalue()]
    both = [records[0].images[0], records[3].images[0]]
    records.append(Record("two", "<image>Add the numbers of<image>both .", "7", both))
    records.append(Record("none", "Add 2 and 3 .", "5", []))
    return records


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory):
    """Forty problems of the toy with a response each, as Parquet."""
    import toy
    from nano.data import write_parquet

    path = tmp_path_factory.mktemp("problems") / "problems.parquet"
    records = toy.problems(40, 5, "g")
    for record in records:
        answer = record.answer
        record.response = f"<think> I add {answer} </think> <answer> {answer} </answer>"
    write_parquet(path, records)
    return path


# -------------------------------------------------------------------------------------------------
# runs


TIMES = ("t_rollout", "t_reward", "t_logprob", "t_update", "t_eval", "t_total")
TIMES += ("mem_peak", "tokens_per_s")
SMALL = dict(recipe="toy-zero", model=ROOT / "toy" / "base", stages="16x8x3,24x4x3", questions=8)
SMALL |= dict(lr=1e-4, save_every=2, seed=1, sample_questions=2)


def words(flags: dict) -> list[str]:
    """{"lr": 1, "resume": False} -> --lr 1 --no_resume"""
    out = []
    for name, value in flags.items():
        out += [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return out


def torchrun(ranks: int, *options: str) -> list[str]:
    """The words that start so many ranks on this machine, before those of the script."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*launch, *(options or ["--standalone"])]


def command(out, problem_file, ranks=1, **flags) -> list[str]:
    """A small run of grpo.py: the base model is asked in Zero's way.

    It answers in the format and often wrongly, so that groups have advantages.
    """
    launch = torchrun(ranks) if ranks > 1 else [sys.executable]
    flags = SMALL | dict(data=problem_file, out=out) | flags
    return [*launch, str(ROOT / "grpo.py"), *words(flags)]


def environment(**more: str) -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run_grpo(out, problem_file, ranks=1, **flags) -> str:
    """What the run says; it must end well."""
    call = command(out, problem_file, ranks, **flags)
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def alone(stage, **flags):
    """The stage in this process, which saves the imports."""
    import torch.distributed as dist

    from nano import run

    if dist.is_initialized():
        dist.destroy_process_group()
    try:
        stage.main(run.parse_config(stage.Config, stage.RECIPES, words(flags)))
    finally:
        for lock in run.locks:  # as when the process ends
            lock.close()
        run.locks.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def start(call: list[str], said: Path, **more: str) -> subprocess.Popen:
    """The command in the background; `said` gets what it prints."""
    out = open(said, "w")
    return subprocess.Popen(call, env=environment(**more), stdout=out, stderr=subprocess.STDOUT)


def wait_for(condition, seconds: float, what=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain {what()}"
        time.sleep(0.02)


def processes(word: str) -> list[int]:
    """Those with this word on their command line, but not this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except (OSError, UnicodeDecodeError):
            continue  # it has ended in the meantime
    return found


def kill_all(word: str):
    """SIGKILL to torchrun and its ranks, as when a machine goes down."""
    for process in processes(word):
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            continue


def log_of(out, drop=TIMES) -> list[dict]:
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def weights_of(out) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "final" / "model.safetensors")
