"""Ranks on several hosts: each learns when another one is gone, and gloo finds the network between them. Nothing of the method.

torchrun restarts nothing here and saves nothing: when a rank dies, the others end within half a minute and say why, and the same
command, also on another number of ranks, goes on from what was last saved.
"""

import fcntl
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from contextlib import suppress

import torch.distributed as dist

BEAT = float(os.environ.get("HEARTBEAT_SECONDS", "3"))  # between two signs of life
MISSING = 10  # so many missing ones are death: 30 s. one call may stop all of Python's threads: 7 s for 1 GB of JSON
JOIN = 300  # seconds for importing everything, from a slow shared disk too


class Heartbeat:
    """Two threads by which a rank learns that another one is gone; then it ends too and says who, where and why.

    Rollouts take minutes without a collective and a slow rank keeps the others waiting in the next one, so no time limit
    on collectives tells slow from dead. Instead each rank counts upwards in the store that torchrun has anyway, and looks
    whether the others do. A thread counts whatever its main thread computes: only a process that died or is frozen, or a
    machine or network that is down, stands still. Missing beats are counted in rounds of our own, not in seconds: ranks
    that were frozen together (a suspended machine) accuse nobody. Left out: going on with the ranks that are left. That is
    what a resume is for, and a resume is exact.
    """

    def __init__(self, store, rank, world):
        self.store, self.rank, self.world, self.host = store, rank, world, socket.gethostname()
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.end = None  # None: this rank runs; "": it is done; else what went wrong
        self.why = None  # the reason to end that the threads found
        self.silent = 0  # rounds since the store has answered
        self.wake, self.told = threading.Event(), threading.Event()
        self.alarm, bell = (
            os.pipe()
        )  # rung by beat() and by signals, which reach no main thread deep in a collective
        os.set_blocking(bell, False)
        self.ring = lambda: os.write(bell, b"\0")
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        for act in (self.beat, self.watch):
            threading.Thread(target=act, daemon=True).start()

    def beat(self):
        """talk to the store. nothing else may happen in this thread: a store on a lost machine does not even time out"""
        keys = [f"alive/{r}" for r in range(self.world)]
        last, missed, n = [0] * self.world, [-int(JOIN / BEAT)] * self.world, 0
        with suppress(RuntimeError):  # the store is gone: watch() sees that it is silent
            for key in keys:
                self.store.compare_set(key, "", json.dumps(["a host that never answered", 0, None]))
            while not self.told.is_set():
                n, mine = n + 1, self.end
                self.store.set(keys[self.rank], json.dumps([self.host, n, mine]))
                states = [json.loads(x) for x in self.store.multi_get(keys)]
                self.silent = 0
                for r, (host, count, end) in enumerate(states):
                    missed[r] = missed[r] + 1 if count == last[r] else 0
                    last[r] = count
                    if end:
                        self.why = self.why or end
                    elif end is None and missed[r] >= MISSING:
                        self.why = self.why or (
                            f"rank {r} on {host} has given no sign of life for {MISSING * BEAT:.0f} s: its process was killed "
                            "or is frozen, or its machine or network is down"
                            if count
                            else f"rank {r} has not started within {JOIN} s; see what torchrun says on the other hosts"
                        )
                if self.why and self.end is None:
                    self.ring()
                if mine == "" or mine and all(end is not None for _, _, end in states):
                    self.told.set()
                self.wake.wait(BEAT) if self.end is None else time.sleep(min(BEAT, 0.1))

    def watch(self):
        """end this process when beat() found a reason, when it hangs, or when torchrun is gone"""
        while self.end is None:
            rung = os.read(self.alarm, 99) if select.select([self.alarm], [], [], BEAT)[0] else b""
            self.silent += not rung  # the end of a DataLoader's worker rings too
            if {signal.SIGTERM, signal.SIGINT} & set(rung):
                self.why = (
                    self.why
                    or f"rank {self.rank} on {self.host} was told to stop (SIGTERM or Ctrl-C): another rank "
                    "on this host died, torchrun on another host is gone, or somebody stopped the run"
                )
            elif self.torchrun and os.getppid() != self.torchrun:
                self.why = f"torchrun (process {self.torchrun} on {self.host}) was killed"
            elif self.silent > MISSING:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                self.why = (
                    self.why
                    or f"the store of the run at {where} has not answered for {MISSING * BEAT:.0f} s: "
                    "torchrun on that host was killed or is frozen, or the host or the network is down"
                )
            if self.why and self.end is None:
                os.write(
                    2,
                    f"\nstopping rank {self.rank} on {self.host}: {self.why}. Run the same command again, also with "
                    "another number of ranks: it goes on from what was last saved.\n".encode(),
                )
                self.tell(self.why)
                os._exit(1)  # the main thread may wait in a collective that never ends

    def tell(self, end):
        """how this rank ends; waits until the others know, for torchrun may take the store down with the first rank"""
        self.end = end
        self.wake.set()
        self.told.wait(2 * BEAT)

    def reason(self, error):
        """the main thread's exception in words. a broken connection is only what another rank's end looks like from here"""
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            time.sleep(
                (MISSING + 3) * BEAT
            )  # by then watch() has named the one that is gone and ended this process
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        return f"rank {self.rank} on {self.host} failed: {kind}{error}"[:1000]


def choose_network(store, rank, world):
    """gloo uses the network that a host's own name leads to, on many machines loopback; take the one to the other hosts"""
    if str(world) == os.environ.get("LOCAL_WORLD_SIZE"):
        return

    def address(host):
        """from which this host would send to that one"""
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((host, 1))  # sends nothing
            return s.getsockname()[0]
        return "127.0.0.1"  # no IPv4 there: gloo's own choice stands

    # every rank tells its address towards the first host; that one itself may see only loopback there, so it asks for its
    # address towards one of the others
    store.set(f"address/{rank}", address(os.environ["MASTER_ADDR"]))
    known = [a.decode() for a in store.multi_get([f"address/{r}" for r in range(world)])]
    ours = address(next((a for a in known if not a.startswith("127.")), known[0]))
    if (
        ours.startswith("127.") or "GLOO_SOCKET_IFNAME" in os.environ
    ):  # all on this machine, or the user knows better
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))[
                    20:24
                ]  # SIOCGIFADDR
                if socket.inet_ntoa(found) == ours:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
