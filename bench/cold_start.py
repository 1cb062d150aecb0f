"""How fast is cold_start.py against a server that answers at once?

  python bench/cold_start.py [--records 2000 20000] [--concurrency 256] [--latency 0.05]

The whole of cold_start.py runs, as a process of its own, against a lean server (another process)
that answers every call after `latency` seconds. Ideal = calls x latency / concurrency. Printed are
the time of the calls (from the first to the last record, as the run's own log has it), its ratio to
the ideal (the bar is 2.0), CPU time per call of client and server, the time of the whole command
with its imports, and the highest resident memory: it must not grow with the number of records.
"""

import argparse
import asyncio
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

THOUGHT = (
    "Okay, let's see. The description says that there are {a} red balls on the left and {b} blue "
    "ones on the right of the table. I am asked for {a} plus {b}. First I take {a}, then I go on "
    "counting by {b}, which gives {c}. Wait, let me check that the other way round: {b} and then "
    "{a} more, which is {c} again. Hmm, could any ball be hidden behind another one? Row {a} shows "
    "them all in front. Alternatively, I could take {b} from {c}, and then {a} are left, as they "
    "should be. "
)


class Teacher(asyncio.Protocol):
    """Keep-alive HTTP/1.1 and two answers, with as little work as Python allows.

    It shares the machine with what is measured."""

    def connection_made(self, transport):
        self.transport, self.buffer, self.need = transport, bytearray(), 0

    def data_received(self, data):
        self.buffer += data
        if not self.need and (end := self.buffer.find(b"\r\n\r\n") + 4) > 3:
            self.need = end + int(re.search(rb"(?i)content-length: *(\d+)", self.buffer[:end])[1])
        if self.need and len(self.buffer) == self.need:  # one request at a time on a connection
            a, b = map(int, re.search(rb"What is (\d+) plus (\d+)\?", self.buffer[-3000:]).groups())
            text = f"Caption: balls. {a} red ones and {b} blue ones. Final Answer: {a + b}"
            if b'"thinks"' in self.buffer[:400]:
                text = (
                    "<think>"
                    + THOUGHT.format(a=a, b=b, c=a + b) * 4
                    + f"</think>\nFinal Answer: {a + b + (a % 10 == 0)}"
                )
            choice = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 900, "completion_tokens": 400}
            raw = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.buffer.clear()
            self.need = 0
            asyncio.get_running_loop().call_later(
                self.latency,
                self.transport.write,
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw),
            )


async def serve(latency):
    Teacher.latency = latency
    server = await asyncio.get_running_loop().create_server(Teacher, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def problems(path, n, kb):
    """n records with pictures of noise; one in ten gets a wrong answer from the reasoner"""
    from PIL import Image

    from nano.data import Record, write_parquet

    pictures, side = [], round((1024 * kb / 2.2) ** 0.5)
    for _ in range(50):
        out = io.BytesIO()
        Image.effect_noise((side, side), 60).save(out, "PNG")
        pictures.append(out.getvalue())
    records = []
    for i in range(n):
        question, answer = f"<image>What is {i} plus {i % 7}?", str(i + i % 7)
        records.append(Record(f"p{i}", question, answer, [pictures[i % 50]], "mulberry"))
    write_parquet(path, records)
    return sum(map(len, pictures)) / 50 / 1024


def seconds_of(pid):
    """CPU seconds of a process so far"""
    ticks = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def measure(args, n, folder, server, url):
    data, out = f"{folder}/{n}.parquet", Path(folder) / str(n)
    kb = problems(data, n, args.image_kb)
    before, served = resource.getrusage(resource.RUSAGE_CHILDREN), seconds_of(server.pid)
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "cold_start.py"), "--recipe", "vision-r1-cold"]
    command += ["--data", data, "--out", str(out), "--concurrency", str(args.concurrency)]
    command += ["--mllm_url", url, "--mllm_model", "sees"]
    command += ["--reasoner_url", url, "--reasoner_model", "thinks"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, **quiet)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    log = [json.loads(line) for line in open(out / "log.jsonl")][-1]
    calls, ideal = log["calls"], log["calls"] * args.latency / args.concurrency
    assert calls == 3 * n and log["kept"] == n - -(-n // 10), log
    client, served = 1e6 * log["cpu"] / calls, 1e6 * (seconds_of(server.pid) - served) / calls
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{n:,} records ({kb:.0f} KB a picture), {calls:,} calls: {log['seconds']:.2f} s, "
        f"ideal {ideal:.2f} s, ratio {log['seconds'] / ideal:.2f}; CPU per call: "
        f"client {client:.0f} us, server {served:.0f} us; whole command {wall:.1f} s, "
        f"CPU {cpu:.1f} s; peak memory so far {after.ru_maxrss / 1024:.0f} MB",
        flush=True,
    )


def main(args):
    command = [sys.executable, __file__, "--serve", str(args.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            for n in args.records:
                measure(args, n, folder, server, url)
    finally:
        server.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, nargs="*", default=[2000, 20000])
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--image-kb", type=float, default=8)
    parser.add_argument("--serve", type=float)
    args = parser.parse_args()
    asyncio.run(serve(args.serve)) if args.serve is not None else main(args)
