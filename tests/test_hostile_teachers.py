# ruff: noqa: F401, F811 (fixtures of another file)
"""cold_start.py against servers that send whatever they like, and journals that were damaged.

No reply may end the run for good, be lost, or take much memory: every record is accounted for
once, and the same command goes on, with the bytes that a calm server gives.
"""

import asyncio
import gzip
import json
import os
import random
import signal
import threading
import time

import pytest
from aiohttp import web
from test_cold_start import (
    Teachers,
    answer,
    completion,
    config,
    contents,
    fork,
    problems,
    rows,
    serve,
)

import cold_start
from nano import teachers
from nano.teachers import Stop, parse_reply

WORDS = [f"word{i}" for i in range(5000)]


def message(**fields):
    """a completion whose message is not what the field's says"""
    reply = completion("fine")
    reply["choices"][0]["message"].update(fields)
    return json.dumps(reply).encode()


def ended(reason):
    reply = completion("fine")
    reply["choices"][0]["finish_reason"] = reason
    return json.dumps(reply).encode()


# kind -> the body of an answer with status 200
BODIES = {
    "content is a list": message(content=[{"type": "text", "text": "fine"}]),
    "content is a number": message(content=7),
    "content is an object": message(content={"text": "fine"}),
    "content is false": message(content=False),
    "content is an empty list": message(content=[]),
    "half a character": message(content="half \ud83d of it"),
    "half a character in the thought": message(reasoning_content="half \udc00"),
    "NUL": message(content="a\0b"),
    "thought is a list": message(reasoning=["a"]),
    "thought is an object": message(reasoning_content={"a": 1}),
    "no choices": b'{"choices": [], "usage": {}}',
    "choices is an object": b'{"choices": {"0": {}}}',
    "choices is null": b'{"choices": null}',
    "a choice is text": b'{"choices": ["fine"]}',
    "message is null": b'{"choices": [{"message": null}]}',
    "message is a list": b'{"choices": [{"message": [1]}]}',
    "an error with status 200": b'{"error": {"message": "overloaded"}}',
    "a list": b"[1, 2]",
    "a text": b'"fine"',
    "null": b"null",
    "no JSON": b"<html>502 Bad Gateway</html>",
    "an event stream": b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n',
    "nothing": b"",
    "half of it": message(content="long" * 99)[:-200],
    "deeply nested": b'{"choices": ' + b"[" * 200_000,
    "deep and closed": b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "not UTF-8": b"\xff\xfe\x00\xd8" * 50,
    "a number of 9,000 digits": b'{"choices": ' + b"9" * 9000 + b"}",
    "more than the limit": message(content="a b " * 500_000),
}
RAW = {  # kind -> the bytes on the wire, after which the connection is closed
    "closed without a word": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a header of 100 KB": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "1,000 headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "cut body": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + BODIES["NUL"],
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Length: 7\r\n\r\n123456789",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "odd chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "headers that are no text": b"HTTP/1.1 500 \xff\r\n\xed\xa0\x80: \xff\r\n\r\n\x1b[2J\xed",
}
STATUSES = {  # kind -> status, body, headers
    "204": (204, b"", {}),
    "redirect to itself": (302, b"", {"Location": "/v1/chat/completions"}),
    "418": (418, b"\x1b[2J\0 teapot " + b"\xed\xa0\x80", {}),
    "500 with a wait of a day": (500, b"{}", {"Retry-After": "86400"}),
    "500 with a wait without end": (500, b"{}", {"Retry-After": "9" * 400}),
    "500 with a wait of -1": (500, b"{}", {"Retry-After": "-1"}),
    "gzip bomb": (200, gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"}),
    "unknown encoding": (200, b"\x01\x02", {"Content-Encoding": "br"}),
    "wrong key, once": (401, b"who?", {}),
    "no such model, once": (404, b"which?", {}),
    "bad request": (400, b"what?", {}),
}
# Replies of which the text must be used: only what stands around it is odd.
USAGES = [
    "9" * 4000,
    "9" * 9,
    "Infinity",
    "NaN",
    "-5",
    '"12"',
    "[3]",
    "{}",
    "true",
    "1e300",
    "null",
]
FINE = [f'{{"prompt_tokens": {n}, "completion_tokens": {n}}}' for n in USAGES]
FINE = [usage.encode() for usage in [*FINE, "[1]", '"much"', "7"]]
# Texts that are good JSON: they are kept in the journal, and rejected with a reason.
TEXTS = {
    "an empty text": message(content=""),
    "finish is an object": ended({"a": [1]}),
    "finish is very long": ended("\ud800" * 9999),
    "finish is our own word": ended("context overflow"),
    "opening tags only": message(content=" ".join(f"<answer>{w}" for w in WORDS * 5)),
    "spaces": message(content="a" + " " * 300_000 + "b final answer" + " *" * 99_999 + "c"),
    "no full stop": message(content=" ".join(WORDS * 10)),
}
SLOW = ("endless", "one byte at a time")  # sent until the other side hangs up
HOSTILE = [*BODIES, *RAW, *STATUSES]


class Hostile:
    """An aiohttp server in a thread: `choose(body) -> kind or None`, None for a good answer."""

    def __init__(self, choose):
        self.choose, self.loop, ready = choose, asyncio.new_event_loop(), threading.Event()
        self.kinds = set()

        async def start():
            app = web.Application(client_max_size=2**24)
            app.router.add_post("/v1/chat/completions", self.reply)
            self.runner = web.AppRunner(app)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            port = site._server.sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}/v1"
            ready.set()

        def work():
            asyncio.set_event_loop(self.loop)
            self.loop.create_task(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert ready.wait(10)

    async def reply(self, request):
        body = await request.json()
        kind = self.choose(body)
        self.kinds.add(kind)
        if kind in RAW or kind in SLOW:
            request.transport.write(RAW.get(kind, b"HTTP/1.1 200 OK\r\n\r\n"))
            while kind not in RAW and not request.transport.is_closing():
                request.transport.write(b"x" * (1 if kind[0] == "o" else 100_000))
                await asyncio.sleep(0.001)
            request.transport.close()
            return web.Response()
        if kind in STATUSES:
            status, raw, headers = STATUSES[kind]
            return web.Response(status=status, body=raw, headers=headers)
        raw = {**BODIES, **TEXTS}.get(kind) or json.dumps(answer(body)).encode()
        raw = BODIES.get(kind, raw)
        if kind in FINE:
            raw = raw.replace(b'{"prompt_tokens": 10, "completion_tokens": 20}', kind)
        return web.Response(body=raw, content_type="application/json")

    def close(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)


@pytest.fixture
def hostile():
    started = []

    def start(choose):
        started.append(Hostile(choose))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(cold_start.Output, "funnel", lambda self: "")


def once_each(out, n):
    ids = [r["id"] for name in ("cold.jsonl", "rejected.jsonl") for r in rows(out / name)]
    assert sorted(ids) == sorted(f"p/{i}" for i in range(n))


def test_every_kind_on_every_call_ends_with_a_sentence_and_the_run_goes_on(
    tmp_path,
    serve,
    hostile,
    no_figure,
    capsys,
):
    problems(tmp_path, 3)
    calm = serve()
    cold_start.main(config(tmp_path, calm, out=str(tmp_path / "calm")))
    kind = None
    server = hostile(lambda body: kind)
    assert len(HOSTILE) + len(TEXTS) >= 50
    for k, kind in enumerate([*HOSTILE, *TEXTS, *SLOW]):
        how = dict(out=str(tmp_path / str(k)), retries=1, backoff=0.001, concurrency=3)
        start = time.monotonic()
        try:
            timeout = 0.3 if kind in SLOW else 5
            assert not cold_start.main(config(tmp_path, server, **how, timeout=timeout))
            said = capsys.readouterr().out
        except Stop as stop:
            said = str(stop)
        assert time.monotonic() - start < 4, kind
        if "once" in kind:
            assert "wrong key" in said or "unknown model" in said
        else:
            once_each(tmp_path / str(k), 3)
            assert "no record survived: 3 x " in said, kind
        if kind in TEXTS:
            continue
        for row in rows(tmp_path / str(k) / "rejected.jsonl") if "once" not in kind else []:
            assert row["rule"] == "no answer" and len(row["evidence"]) < 600
            assert row["evidence"].isprintable(), kind
        assert not (tmp_path / str(k) / "journal.jsonl").read_bytes(), kind
        cold_start.main(config(tmp_path, calm, **how))  # the same command, and a good server
        assert contents(tmp_path / str(k)) == contents(tmp_path / "calm"), kind


def test_odd_usage_does_not_lose_an_answer(tmp_path, serve, hostile, no_figure):
    problems(tmp_path, 20)
    cold_start.main(config(tmp_path, serve(), out=str(tmp_path / "calm")))
    rng = random.Random(0)
    server = hostile(lambda body: rng.choice(FINE))
    cold_start.main(config(tmp_path, server))
    assert server.kinds == set(FINE) and len(rows(tmp_path / "out" / "journal.jsonl")) == 60
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    last = rows(tmp_path / "out" / "log.jsonl")[-1]
    assert 0 <= last["mllm_in"] < 10**12


def test_a_mix_of_all_kinds_killed_and_resumed_in_bounded_memory(
    tmp_path,
    serve,
    hostile,
    fork,
):
    """30 % hostile replies, SIGKILL twice; then the rest is asked from a calm server"""
    n = 120
    problems(tmp_path, n)
    calm = serve()
    cold_start.main(config(tmp_path, calm, out=str(tmp_path / "calm")))
    rng = random.Random(3)
    server = hostile(
        lambda body: rng.choice([*HOSTILE, *FINE, "endless"]) if rng.random() < 0.3 else None
    )
    how = dict(retries=30, backoff=0.005, timeout=5, concurrency=32)
    settings, journal = (
        vars(config(tmp_path, server, **how)),
        tmp_path / "out" / "journal.jsonl",
    )
    for k in range(2):
        pid, finish = fork(settings)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (
            not journal.exists() or journal.read_bytes().count(b"\n") < (k + 1) * n
        ):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert finish()[0] == -signal.SIGKILL
    status, text = fork(settings)[1]()
    assert status == 0, text
    once_each(tmp_path / "out", n)
    assert len(server.kinds) > 50
    cold_start.main(config(tmp_path, calm, **how))  # what had a 400 is asked again
    keys = [r["key"] for r in rows(journal)]
    assert len(keys) == len(set(keys)) == 3 * n
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_256_huge_replies_at_once_stay_below_1_gb(tmp_path, hostile, fork):
    """replies just below the limit on every call, all in flight at the same time"""
    BODIES["as large as allowed"] = b"x" * (teachers.PER_TOKEN * 4096 + 2**16 - 100)
    try:
        problems(tmp_path, 256)
        server = hostile(lambda body: "as large as allowed")
        settings = vars(config(tmp_path, server, concurrency=256, timeout=60, retries=0))
        pid, finish = fork(settings)
        peak = 0
        while (now := resident(pid)) is not None:
            peak = max(peak, now)
            time.sleep(0.02)
        status, said = finish()
        assert status == 1 and "no record survived: 256 x no answer" in said, said
        once_each(tmp_path / "out", 256)
        assert 0 < peak < 1024, f"{peak} MB"
    finally:
        BODIES.pop("as large as allowed")


def resident(pid):
    """the highest resident memory of a process so far in MB, None when it has ended"""
    try:
        status = open(f"/proc/{pid}/status").read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) // 1024 if found else None


@pytest.mark.parametrize("kind", BODIES)
def test_what_cannot_be_used_is_told_before_it_is_kept(kind):
    if kind != "more than the limit":
        assert parse_reply(bytearray(BODIES[kind]))[0] == "failed"


def test_a_long_wait_is_not_believed(tmp_path, serve):
    problems(tmp_path, 2)
    asked = []

    def script(body):
        asked.append(time.monotonic())
        if len(asked) == 1:
            return 429, {}, {"Retry-After": "86400"}
        return 200, answer(body), {}

    cold_start.main(config(tmp_path, serve(script=script)))
    assert len(asked) == 7 and asked[-1] - asked[0] < 10


# ---- a journal that was damaged

LINES = 36  # of a finished journal of 12 records


def cut(lines):
    lines[5] = lines[5][:40] + b"\n"
    return 1


def glued(lines):  # half a line, and the next one behind it
    lines[5] = lines[5][:-60]
    return 1


def crlf(lines):
    lines[:] = [line[:-1] + b"\r\n" for line in lines]
    return 0


def garbled(lines):
    lines[0] = bytes(reversed(lines[0][:-1])) + b"\n"
    lines[7] = b"\0" * 50 + b"\n"
    lines[20] = lines[20].replace(b'"in": 10', b'"in": "x"')
    return 3


def not_utf8(lines):
    lines[9] = lines[9][:60] + b"\xff\xfe\x80" + lines[9][60:]
    return 1


def odd_reply(lines):  # versions before wrote replies unseen
    key = json.loads(lines[3])["key"]
    lines[3] = json.dumps(dict(key=key, text="\ud800", finish="stop")).encode() + b"\n"
    key = json.loads(lines[4])["key"]
    lines[4] = json.dumps(dict(key=key, text=["a"], finish="stop")).encode() + b"\n"
    return 2


def foreign(lines):  # the line of no call: nothing has to be asked again
    lines.insert(2, b"<<<<<<< HEAD\n")
    lines.insert(2, b"\n")
    return 0


@pytest.mark.parametrize("damage", [cut, glued, crlf, garbled, not_utf8, odd_reply, foreign])
def test_a_damaged_line_loses_that_call_alone(tmp_path, serve, no_figure, capsys, damage):
    problems(tmp_path, 12)
    server, journal = serve(), tmp_path / "out" / "journal.jsonl"
    cold_start.main(config(tmp_path, server))
    before, asked = contents(tmp_path / "out"), len(server.requests)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == asked == LINES
    lost = damage(lines)
    journal.write_bytes(b"".join(lines))
    capsys.readouterr()
    cold_start.main(config(tmp_path, server))
    said = capsys.readouterr().out
    assert len(server.requests) - asked == lost
    assert contents(tmp_path / "out") == before
    backups = list((tmp_path / "out").glob("journal.jsonl.damaged-*"))
    if damage is crlf:
        assert not backups
        return
    assert "damaged lines" in said and str(backups[0]) in said
    assert backups[0].read_bytes() == b"".join(lines)
    assert len(rows(journal)) == LINES  # all lines are whole again
    cold_start.main(config(tmp_path, server))
    said = capsys.readouterr().out
    assert "damaged lines" not in said and "0 calls, 36 from the journal" in said


def test_a_run_without_survivors_ends_with_1_and_the_reasons(tmp_path, serve, capsys):
    problems(tmp_path, 9)
    settings = config(tmp_path, serve(), min_chars=10_000)
    with pytest.raises(SystemExit) as end:
        cold_start.guarded(settings)
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert "no record survived: 7 x too short (filter), 2 x wrong answer (filter)" in said
    with pytest.raises(SystemExit) as end:
        cold_start.guarded(config(tmp_path, serve(), min_chars=10))
    assert not end.value.code


# ---- several servers for a role


def test_two_servers_one_of_which_dies_and_comes_back(tmp_path, serve):
    n = 400
    problems(tmp_path, n)
    cold_start.main(config(tmp_path, serve(), out=str(tmp_path / "one"), concurrency=32))
    steady, dying = serve(latency=0.1), serve(latency=0.1)
    again = []

    def die_and_come_back():
        while len(dying.requests) < 150:
            time.sleep(0.01)
        dying.close()
        goal = len(steady.requests) + 60
        while len(steady.requests) < goal:
            time.sleep(0.01)
        again.append(serve(port=dying.port, latency=0.1))

    threading.Thread(target=die_and_come_back, daemon=True).start()
    urls = f"{steady.url}, {dying.url}/"
    cold_start.main(config(tmp_path, urls, concurrency=32, timeout=5, backoff=0.02))
    once_each(tmp_path / "out", n)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    one, two = (
        {r.pop("key"): r for r in rows(tmp_path / out / "journal.jsonl")} for out in ("one", "out")
    )
    assert one == two
    assert 150 <= len(dying.requests) < 250 and len(again[0].requests) > 5
    last = rows(tmp_path / "out" / "log.jsonl")[-1]["servers"]
    assert list(last) == [
        f"{role} at {server.url}" for role in ("mllm", "reasoner") for server in (steady, dying)
    ]


def test_a_slow_server_gets_fewer_calls_and_a_failing_one_few(tmp_path, serve):
    """calls go where the fewest are in flight; answers of 500 at once must not attract them all"""
    problems(tmp_path, 200)
    quick, slow = serve(latency=0.01), serve(latency=0.1)
    broken = serve(script=lambda body: (500, {"error": "no memory"}, {}))
    urls = ",".join(s.url for s in (quick, slow, broken))
    how = dict(concurrency=16, retries=5, timeout=5, backoff=0.05)
    cold_start.main(config(tmp_path, urls, **how))
    assert len(rows(tmp_path / "out" / "cold.jsonl")) == 160
    assert len(quick.requests) > 2 * len(slow.requests) > 50
    assert len(broken.requests) < 60
    last = rows(tmp_path / "out" / "log.jsonl")[-1]["servers"]
    assert last[f"mllm at {broken.url}"] == "down" and last[f"mllm at {quick.url}"] != "down"
