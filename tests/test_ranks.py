"""Ranks that die, freeze or fail end the run in bounded time, and each says which one it was; the
same command goes on. Two network namespaces stand in for two hosts."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    SMALL,
    alone,
    command,
    environment,
    kill_all,
    log_of,
    processes,
    start,
    torchrun,
    wait_for,
    weights_of,
    words,
)

import grpo

COLLECTIVE, MEETING = 0.15, 0.2  # minutes; 30 and 240 otherwise
PATIENCE = dict(COLLECTIVE_MINUTES=str(COLLECTIVE), MEETING_MINUTES=str(MEETING))
TORCHRUN = 40  # seconds: torchrun gives a rank 30 s to end after a SIGTERM, then it kills it


def logged(out) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def rank_process(out, rank: int) -> int:
    """The process of this rank of the run in `out`."""
    for process in processes(str(out)):
        with contextlib.suppress(OSError):
            if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
                return process
    raise AssertionError(f"no rank {rank} in {out}")


def hit(out, problem_file, number: int, after: int):
    """Starts the run on two ranks; after so many steps rank 1 gets the signal."""
    said = out.with_name(f"{out.name}-{after}.txt")
    run = start(command(out, problem_file, ranks=2, save_every=1), said, **PATIENCE)
    wait_for(lambda: logged(out) >= after or run.poll() is not None, 120)
    assert run.poll() is None, said.read_text()
    os.kill(rank_process(out, 1), number)
    return run, said, time.time()


def assert_ended(out, run, said, since, seconds):
    """In time, with a sentence about rank 1, and nothing is left."""
    assert run.wait(120) != 0
    text, host = said.read_text(), socket.gethostname()
    assert f"stopping rank 0: rank 1 on {host} is silent (killed, frozen or cut off)" in text
    assert "Run the same command again" in text
    assert said.stat().st_mtime - since < seconds  # torchrun's last words
    assert not processes(str(out))
    assert logged(out) < 6


def assert_equal(out, expected):
    """Two ranks sum in another order than one: up to float32's rounding."""
    for a, b in zip(log_of(out), log_of(expected), strict=True):
        for key in set(a) - {"logprob_gap", "logprob_gap_max", "reward_faults"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    a, b = weights_of(out), weights_of(expected)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


@pytest.fixture(scope="module")
def uninterrupted(problem_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    alone(grpo, **SMALL, data=problem_file, out=out)
    return out


@pytest.fixture(scope="module", autouse=True)
def frozen(problem_file, tmp_path_factory):
    """A run whose rank 1 is frozen. It takes its time to end, and the other tests go on."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    try:
        yield (out, *hit(out, problem_file, signal.SIGSTOP, after=2))
    finally:
        kill_all(str(out))


SCRIPT = """
import signal, sys, time
sys.path.insert(0, {root!r})
import torch.distributed as dist
from nano import run

def main(config):
    run.start_ranks()
    run.all_sum(dict(ready=1))
    if dist.get_rank() == 1:
        raise ValueError("the third record is bad")
    if dist.get_rank() == 0:
        run.all_sum(dict(waiting=1))
    # A signal waits until what computes comes back to Python; on a busy machine it is late, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(6)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(600)

run.guard(main, None)
"""


def test_an_exception_is_named_by_the_ranks_that_wait_and_by_those_that_work(tmp_path):
    """Rank 1 fails, rank 0 waits for it in a collective, rank 2 computes: torchrun ends it, and
    it hears of it seconds later than rank 0."""
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    call = [*torchrun(3), str(script)]
    began = time.monotonic()
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    for rank in (0, 2):
        sentence = f"stopping rank {rank}: rank 1 failed (ValueError: the third record is bad)."
        assert sentence in done.stderr, done.stderr
    assert "stopping rank 1" not in done.stderr  # it shows its own error
    assert 'raise ValueError("the third record is bad")' in done.stderr
    assert time.monotonic() - began < 200  # rank 2 would have slept longer


# -------------------------------------------------------------------------------------------------
# two hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two network namespaces joined by a cable -> (words that enter the host, its interface).

    As in Debian, a host's own name leads to loopback, and the interfaces have different names.
    """
    folder, spaces = tmp_path_factory.mktemp("hosts"), [f"nvr{os.getpid()}{x}" for x in "ab"]
    addresses = "127.0.0.1 localhost\n10.213.0.1 hosta\n10.213.0.2 hostb\n"
    a, b = spaces
    setup = [f"netns add {a}", f"netns add {b}"]
    setup += [f"link add eth0 netns {a} type veth peer name net7 netns {b}"]
    setup += [f"-n {a} addr add 10.213.0.1/24 dev eth0", f"-n {b} addr add 10.213.0.2/24 dev net7"]
    setup += [f"-n {a} link set lo up", f"-n {b} link set lo up"]
    setup += [f"-n {a} link set eth0 up", f"-n {b} link set net7 up"]
    entered = []
    for space, x in zip(spaces, "ab"):
        (folder / x).write_text(f"127.0.1.1 host{x}\n{addresses}")
        inside = f'mount --bind {folder / x} /etc/hosts && hostname host{x} && exec "$@"'
        enter = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts"]
        entered.append([*enter, "sh", "-c", inside, "sh"])
    try:
        for line in setup:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)
        for enter in entered:
            subprocess.run([*enter, "true"], check=True, capture_output=True, text=True)
        yield list(zip(entered, ("eth0", "net7")))
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", error)
        pytest.skip(f"no network namespaces: root, iproute2 and unshare are needed ({why})")
    finally:
        for space in spaces:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", space], capture_output=True)


def test_two_hosts_are_one_process(hosts, uninterrupted, problem_file, tmp_path):
    """As README says: one torchrun on each host, and gloo is told the interface between them."""
    out = tmp_path / "run"
    meet = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=hosta:29500")
    flags = words(SMALL | dict(data=problem_file, out=out))
    runs, texts = [], []
    for i, (enter, interface) in enumerate(hosts):
        call = [*enter, *torchrun(1, *meet), str(ROOT / "grpo.py"), *flags]
        texts.append(tmp_path / f"said-{i}.txt")
        runs.append(start(call, texts[-1], GLOO_SOCKET_IFNAME=interface))
    try:
        codes = [run.wait(120) for run in runs]
    finally:
        kill_all(str(out))
    assert codes == [0, 0], "".join(text.read_text() for text in texts)
    assert_equal(out, uninterrupted)
    wrote = (out / "command.txt").read_text()
    assert wrote.startswith("torchrun --nnodes=2 --nproc_per_node=1 grpo.py")


# -------------------------------------------------------------------------------------------------
# the last test: the run whose rank was frozen at first has ended by now


def test_a_frozen_and_a_killed_rank_end_a_run_which_then_goes_on(
    frozen, problem_file, uninterrupted
):
    """The same command three times; the third one comes to the end, as if nothing had happened."""
    out, *run = frozen
    assert_ended(out, *run, seconds=60 * max(COLLECTIVE, MEETING) + TORCHRUN)
    run, said, since = hit(out, problem_file, signal.SIGKILL, after=4)
    assert_ended(out, run, said, since, seconds=30)
    assert "resumed after step" in said.read_text()
    assert "(SIGKILL)" in said.read_text()  # torchrun's own account has the signal
    said = out.with_name("last.txt")
    assert start(command(out, problem_file, ranks=2), said).wait(120) == 0, said.read_text()
    assert "resumed after step" in said.read_text()
    assert_equal(out, uninterrupted)
