"""Several hosts, and ranks that die: two network namespaces stand in for two machines; plain processes where none can be made.

What must never happen counts as much as what must: a rank that is slow, or frozen together with the others, is not dead.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_grpo import TIMES, log_of, weights_of

from nano import run
from nano.hosts import MISSING

BEAT = 0.3  # seconds, so that death is 3 s away instead of 30; twice that under torchrun, where more processes share the cores
WORLD = 3


# ---- the heartbeat alone: three processes, no torchrun, every scenario at the same time


def scenario(how, rank, port, folder):
    """one rank of a run in which rank 1 does something; stderr goes to a file"""
    os.dup2(os.open(folder / f"err-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    sys.modules["hosts"].BEAT = BEAT

    def main(config):
        run.start_ranks()
        run.all_sum({"x": 1})  # all are there
        (folder / f"up-{rank}").write_text(str(os.getpid()))
        life = 2 * MISSING * BEAT
        if (
            how == "slow"
        ):  # no collective for long, and one call that keeps Python's lock: slow, but alive
            ctypes.PyDLL(None).usleep(int(life / 4 * 1e6)) if rank == 1 else None
        if how == "early" and rank == 1:
            return  # a rank that is done long before the others
        if how == "error" and rank == 1:
            raise ValueError("the third record is bad")
        if how == "unshared":  # rank 1's --out is a folder of its own machine
            out = folder / ("mine" if rank == 1 else "ours")
            run.claim(type("Config", (), dict(out=str(out), resume=True, keep=1)), ())
        if how in ("error in a collective", "killed in a collective", "terminated"):
            if rank == 1:
                time.sleep(0.5)
                if how.startswith("error"):
                    raise ValueError("the third record is bad")
                time.sleep(600)
            run.all_sum({"x": 1})
        time.sleep(life if how in ("slow", "early", "frozen together") else 600)

    run.guard(main, None)


SCENARIOS = [
    "slow",
    "early",
    "frozen together",
    "error",
    "error in a collective",
    "killed",
    "killed in a collective",
    "frozen",
    "store killed",
    "terminated",
    "unshared",
]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """how -> [(exit code, stderr) of each rank]; all of it within a minute of what happened to rank 1"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run", "test_hosts"])
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # for the preload
    runs, happened, result = {}, {}, {}
    try:
        for (
            how
        ) in SCENARIOS:  # one after the other: thirty processes that start at once are slow to beat
            folder, port = tmp_path_factory.mktemp("ranks"), free_port()
            ranks = [
                context.Process(target=scenario, args=(how, r, port, folder), daemon=True)
                for r in range(WORLD)
            ]
            runs[how] = ranks, folder
            for p in ranks:
                p.start()
            wait_for(lambda folder=folder: len(list(folder.glob("up-*"))) == WORLD, 120)
            if how.startswith("killed") or how == "store killed":
                os.kill(ranks[0 if how == "store killed" else 1].pid, signal.SIGKILL)
            if how.startswith("frozen"):
                for p in ranks if how == "frozen together" else ranks[1:2]:
                    os.kill(p.pid, signal.SIGSTOP)
            if how == "terminated":
                os.kill(ranks[0].pid, signal.SIGTERM)
            happened[how] = time.monotonic()
        wait_for(lambda: time.monotonic() > happened["frozen together"] + 1.5 * MISSING * BEAT, 60)
        for p in runs["frozen together"][0]:
            os.kill(p.pid, signal.SIGCONT)
        for how, (ranks, folder) in runs.items():
            for p in ranks:
                if (how, p) != ("frozen", ranks[1]):
                    p.join(max(0.1, happened[how] + 60 - time.monotonic()))
            if how == "frozen":
                os.kill(
                    ranks[1].pid, signal.SIGCONT
                )  # when it wakes up it learns that the run is over
                ranks[1].join(30)
            result[how] = [
                (p.exitcode, (folder / f"err-{r}").read_text()) for r, p in enumerate(ranks)
            ]
    finally:
        for p in sum((ranks for ranks, _ in runs.values()), []):
            p.kill()  # pytest would wait for ever for one that is frozen
    return result


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["slow", "early", "frozen together"])
def test_who_lives_is_left_alone(outcomes, how):
    assert [code for code, _ in outcomes[how]] == [0] * WORLD and not any(
        "stopping" in err for _, err in outcomes[how]
    )


@pytest.mark.parametrize(
    "how, victim, words",
    [
        ("error", 1, "rank 1 on {host} failed: ValueError: the third record is bad"),
        (
            "error in a collective",
            1,
            "rank 1 on {host} failed: ValueError: the third record is bad",
        ),
        ("killed", 1, "rank 1 on {host} has given no sign of life for 3 s"),
        ("killed in a collective", 1, "rank 1 on {host} has given no sign of life for 3 s"),
        ("frozen", 1, "rank 1 on {host} has given no sign of life for 3 s"),
        ("store killed", 0, "the store of the run at localhost:"),
        ("terminated", 0, "rank 0 on {host} was told to stop"),
        ("unshared", 1, "rank 1 on {host} failed: {host} does not see what {host} wrote into"),
    ],
)
def test_a_lost_rank_ends_all_and_is_named(outcomes, how, victim, words):
    words = words.format(host=socket.gethostname())
    for rank, (code, err) in enumerate(outcomes[how]):
        if rank != victim:
            assert code == 1 and f"stopping rank {rank} on" in err and words in err, (
                rank,
                code,
                err,
            )
            assert "Run the same command again" in err and "Traceback" not in err
    code, err = outcomes[how][victim]
    if how.startswith("killed") or how == "store killed":
        assert code == -signal.SIGKILL
    elif how.startswith("error"):
        assert (
            code == 1 and "Traceback" in err and "stopping" not in err
        )  # its own error is what it shows
    else:
        assert code == 1 and ("stopping rank" in err or how == "unshared")


# ---- under torchrun


def torchrun(port, script, *words, nodes=2, endpoint="localhost", before=()):
    """the words of one host's torchrun; `before`: what enters the host"""
    return [
        *before,
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}:{port}",
        str(script),
        *map(str, words),
    ]


def start(command, said):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HEARTBEAT_SECONDS": str(2 * BEAT)}
    return subprocess.Popen(command, env=env, stdout=open(said, "w"), stderr=subprocess.STDOUT)


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def finish(processes, seconds=60):
    """exit codes; whatever is left is killed"""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            for child in children(p.pid) if p.poll() is None else ():
                os.kill(child, signal.SIGKILL)
            p.kill()


def test_a_killed_torchrun_leaves_no_rank_behind(tmp_path):
    """two torchruns on this machine, one is killed hard: its rank ends by itself, the other one too"""
    script, port = tmp_path / "rank.py", free_port()
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport run\n"
        "def main(_):\n    run.start_ranks()\n    print('up')\n    time.sleep(600)\n"
        "run.guard(main, None)\n"
    )
    said = [tmp_path / f"said-{i}" for i in range(2)]
    agents = [start(torchrun(port, script), path) for path in said]
    wait_for(lambda: all("up" in path.read_text() for path in said), 120)
    ranks = [children(a.pid)[0] for a in agents]
    agents[1].kill()
    assert finish(agents) == [1, -signal.SIGKILL]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 10)
    assert f"torchrun (process {agents[1].pid} on" in said[1].read_text()
    assert (
        "stopping rank" in said[0].read_text()
        and "Run the same command again" in said[0].read_text()
    )


# ---- two hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """two network namespaces joined by a cable -> {name: words that run a command there}"""
    folder, spaces = tmp_path_factory.mktemp("hosts"), [f"nvr{os.getpid()}{x}" for x in "ab"]
    addresses = "127.0.0.1 localhost\n10.213.0.1 hosta\n10.213.0.2 hostb\n"
    for x in "ab":  # as Debian has it: a host's own name leads to loopback
        (folder / x).write_text(f"127.0.1.1 host{x}\n{addresses}")
    setup = [
        f"netns add {spaces[0]}",
        f"netns add {spaces[1]}",
        f"link add eth0 netns {spaces[0]} type veth peer name net7 netns {spaces[1]}",
        f"-n {spaces[0]} addr add 10.213.0.1/24 dev eth0",
        f"-n {spaces[1]} addr add 10.213.0.2/24 dev net7",
        *(f"-n {s} link set {dev} up" for s, dev in zip(spaces * 2, ["lo", "lo", "eth0", "net7"])),
    ]
    inside = lambda x: [
        "ip",
        "netns",
        "exec",
        spaces["ab".index(x)],
        "unshare",
        "--mount",
        "--uts",
        "sh",
        "-c",
        f'mount --bind {folder / x} /etc/hosts && hostname host{x} && exec "$@"',
        "sh",
    ]
    try:
        try:
            for words in setup:
                subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
            for x in "ab":
                subprocess.run([*inside(x), "true"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(
                f"no network namespaces here (root, iproute2 and unshare are needed): {getattr(error, 'stderr', error)}"
            )
        yield {"hosta": inside("a"), "hostb": inside("b")}
    finally:
        for space in spaces:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", space], capture_output=True)


def on_both(hosts, stage, out, port=29500, **flags):
    """the same command on both hosts -> processes, files of what they say"""
    words = [w for k, v in (flags | dict(out=out)).items() for w in (f"--{k}", str(v))]
    said = [out.with_name(f"{out.name}-{host}") for host in hosts]
    commands = [
        torchrun(port, ROOT / stage, *words, endpoint="hosta", before=enter)
        for enter in hosts.values()
    ]
    return [start(c, s) for c, s in zip(commands, said)], said


def alone(stage, out, **flags):
    """the stage in this process"""
    import torch.distributed as dist

    if dist.is_initialized():  # another test's
        dist.destroy_process_group()
    words = [w for k, v in (flags | dict(out=out)).items() for w in (f"--{k}", str(v))]
    stage.main(run.parse_config(stage.Config, stage.RECIPES, words))


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    import toy
    from nano.data import write_parquet

    path, records = (
        tmp_path_factory.mktemp("problems") / "problems.parquet",
        toy.problems(32, 5, "h"),
    )
    for r in records:
        r.response = f"<think> I add {r.answer} </think> <answer> {r.answer} </answer>"
    write_parquet(path, records)
    return path


def test_sft_and_eval_on_two_hosts_are_one_process(hosts, problem_file, tmp_path):
    import eval as evaluation
    import sft

    base = dict(recipe="toy", model=ROOT / "toy" / "base", data=problem_file)
    tune = base | dict(epochs=1, batch_size=8, lr=1e-4, micro_tokens=300)
    ask = base | dict(
        samples=2,
        temperature=1.0,
        max_len=32,
        system_prompt="Think first , then answer in tags .",
        limit=16,
    )
    one, said_one = on_both(hosts, "sft.py", tmp_path / "sft", **tune)
    two, said_two = on_both(hosts, "eval.py", tmp_path / "eval", port=29501, **ask)
    alone(sft, tmp_path / "sft1", **tune)
    alone(evaluation, tmp_path / "eval1", **ask)
    assert finish(one + two, 120) == [0] * 4, "".join(s.read_text() for s in said_one + said_two)
    for a, b in zip(
        *(log_of(tmp_path / f, (*TIMES, "t_data", "tokens_per_s", "mfu")) for f in ("sft", "sft1")),
        strict=True,
    ):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) for k in a), (a, b)
    a, b = weights_of(tmp_path / "sft1"), weights_of(tmp_path / "sft")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    assert (
        "torchrun --nnodes=2 --nproc_per_node=1 sft.py"
        in (tmp_path / "sft" / "command.txt").read_text()
    )
    answers = [
        {
            (r["id"], r["sample"], r["completion"])
            for r in map(json.loads, open(tmp_path / f / "responses.jsonl"))
        }
        for f in ("eval", "eval1")
    ]
    assert len(answers[0]) == 32 and answers[0] == answers[1]
    assert (tmp_path / "eval" / "report.json").read_text() == (
        tmp_path / "eval1" / "report.json"
    ).read_text()


def test_grpo_loses_a_host_and_goes_on_with_one_rank(hosts, problem_file, tmp_path):
    import grpo

    flags = dict(
        recipe="toy-zero",
        model=ROOT / "toy" / "base",
        data=problem_file,
        stages="16x8x4,24x4x4",
        questions=8,
        lr=1e-4,
        save_every=2,
        seed=1,
    )
    out = tmp_path / "two"
    agents, said = on_both(hosts, "grpo.py", out, **flags)
    alone(grpo, tmp_path / "one", **flags)  # the run that nothing happens to
    wait_for(
        lambda: (out / "checkpoints" / "step-000004").exists() or agents[0].poll() is not None, 120
    )
    assert (out / "checkpoints" / "step-000004").exists(), said[0].read_text() + said[1].read_text()
    began = time.monotonic()
    os.kill(children(agents[1].pid)[0], signal.SIGKILL)
    assert finish(agents) == [1, 1] and time.monotonic() - began < 60
    assert (
        "stopping rank 0 on hosta: rank 1 on hostb has given no sign of life for 6 s"
        in said[0].read_text()
    )
    assert not (out / "final").exists()

    alone(grpo, out, **flags)
    done, expected = log_of(out), log_of(tmp_path / "one")
    assert [r["step"] for r in done] == list(range(1, 9))
    for a, b in zip(done, expected, strict=True):
        for key in set(a) - {
            "logprob_gap",
            "logprob_gap_max",
            "reward_faults",
        }:  # faults of this process count from its start
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    a, b = weights_of(out), weights_of(tmp_path / "one")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
