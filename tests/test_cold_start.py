"""cold_start.py against scripted teachers and a small OpenAI-compatible server on 127.0.0.1.

The server can misbehave on demand.
"""

import asyncio
import base64
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cold_start
from cold_start import Config
from nano import chains
from nano.data import Record, read, write_parquet
from nano.teachers import Client, Journal, Reject, Stop, image_part, open_session
from tools import stats

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "formats"
CHAIN = (
    "Okay, let's see. The description says there are {a} red and {b} blue balls. Wait, I count "
    "again. So {a} plus {b} makes {total}."
)


# ---- a server: adds two numbers, and fails as often and in the ways that it is told


def completion(text, finish="stop", **message):
    return {
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20},
    }


def answer(body):
    """what the two teachers say: a pure function of the request"""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else " ".join(p.get("text", "") for p in content)
    a, b = (
        int(x)
        for x in text.split("red plus ")[0].split()[-1:] + text.split("red plus ")[1].split()[:1]
    )
    if body["model"] == "sees":
        return completion(
            f"The picture has {a} red and {b} blue balls ."
            if "description" in text
            else f"Caption: balls. Final Answer: {a + b}"
        )
    total = a + b + (a % 5 == 0)  # some answers are wrong
    return completion(
        f"<think>\n{CHAIN.format(a=a, b=b, total=total)}\n</think>\nFinal Answer: {total}"
    )


class Teachers:
    """The server, in a thread of its own.

    `script(body) -> (status, object or bytes, headers)` replaces the scripted answers."""

    def __init__(self, latency=0.0, faults=0.0, script=None, seed=0, port=0, tls=None):
        self.latency, self.faults, self.script, self.random, self.requests, self.most, self.now = (
            latency,
            faults,
            script,
            random.Random(seed),
            [],
            0,
            0,
        )
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start():
            server = await asyncio.start_server(
                self.serve, "127.0.0.1", port, backlog=1024, ssl=tls
            )
            self.listening, self.port = server, server.sockets[0].getsockname()[1]
            ready.set()

        def work():
            asyncio.set_event_loop(self.loop)
            self.loop.create_task(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert ready.wait(10)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.requests.append((head, body))
                self.now += 1
                self.most = max(self.most, self.now)
                await asyncio.sleep(self.latency)
                self.now -= 1
                fault = (
                    self.random.choice(["429", "500", "hang", "cut", "json"])
                    if self.random.random() < self.faults
                    else ""
                )
                status, reply, headers = (
                    self.script(body) if self.script else (200, answer(body), {})
                )
                if fault == "429":
                    status, reply, headers = 429, {"error": "slow down"}, {"Retry-After": "0.05"}
                elif fault == "500":
                    status, reply = 500, {"error": "oops"}
                elif fault == "hang":
                    await asyncio.sleep(1)
                raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                raw = raw[: len(raw) // 2] if fault == "json" else raw
                fields = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
                if "Transfer-Encoding" in headers:
                    raw = (
                        b"".join(
                            b"%x\r\n%s\r\n" % (len(raw[i : i + 7]), raw[i : i + 7])
                            for i in range(0, len(raw), 7)
                        )
                        + b"0\r\n\r\n"
                    )
                else:
                    fields += f"Content-Length: {len(raw)}\r\n"
                message = f"HTTP/1.1 {status} X\r\n{fields}\r\n".encode() + raw
                writer.write(message[: len(message) // 2] if fault == "cut" else message)
                if fault == "cut":
                    break
        except (OSError, EOFError):
            pass
        writer.close()

    def close(self):
        async def stop():
            self.listening.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.loop.stop()

        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(stop()))
        self.thread.join(5)


@pytest.fixture
def serve():
    started = []

    def start(*args, **kwargs):
        started.append(Teachers(*args, **kwargs))
        return started[-1]

    yield start
    for server in started:
        server.close()


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def problems(folder, n=20, source="mulberry"):
    records = [
        Record(
            f"p/{i}",
            f"<image>What is {i} red plus {i % 7} blue?",
            str(i + i % 7),
            [png((i % 256, i // 256, 0))],
            source,
        )
        for i in range(n)
    ]
    write_parquet(folder / "problems.parquet", records)
    return str(folder / "problems.parquet")


def config(folder, server, **more):
    url = server if isinstance(server, str) else server.url
    return Config(
        **{
            **dict(
                data=str(folder / "problems.parquet"),
                out=str(folder / "out"),
                mllm_url=url,
                mllm_model="sees",
                reasoner_url=url,
                reasoner_model="thinks",
                concurrency=8,
                timeout=0.3,
                backoff=0.02,
                min_chars=20,
            ),
            **more,
        }
    )


def rows(path):
    return [json.loads(line) for line in open(path)]


FINAL_FILES = (
    "cold.jsonl",
    "rejected.jsonl",
    "vision_r1_mulberry_sft_full.json",
    "dataset_info.json",
)


def contents(out):
    return {name: (Path(out) / name).read_bytes() for name in FINAL_FILES} | {
        p.name: p.read_bytes() for p in sorted((Path(out) / "images").iterdir())
    }


# ---- the pipeline


def test_run_writes_the_released_look_and_reads_back(tmp_path, serve):
    problems(tmp_path, 20)
    cold_start.main(config(tmp_path, serve()))
    out = tmp_path / "out"
    kept, rejected = rows(out / "cold.jsonl"), rows(out / "rejected.jsonl")
    assert [r["id"] for r in rejected] == ["p/0", "p/5", "p/10", "p/15"] and len(
        kept
    ) == 16  # in the order of the input
    assert {(r["step"], r["rule"]) for r in rejected} == {("filter", "wrong answer")} and rejected[
        1
    ]["evidence"] == "'11', the truth is '10'"
    assert kept[0]["response"] == (
        "<think>Okay, let's see. The image shows there are 1 red and 1 blue balls. Wait, I count "
        "again. So 1 plus 1 makes 2.</think>\n"
        "<answer> Final Answer:2 </answer>"
    )
    ours, bad = read(out / "cold.jsonl")
    assert len(ours) == 16 and not len(bad)
    theirs, bad = read(out / "vision_r1_mulberry_sft_full.json")
    assert (
        not len(bad) and ours == theirs
    )  # ids, problems, answers, choices, sources, responses and images
    assert (
        Path(ours[3].images[0]).read_bytes() == read(tmp_path / "problems.parquet")[0][4].images[0]
    )
    assert {p.name for p in (out / "images").iterdir()} == {
        Path(r.images[0]).name for r in ours
    } and not (out / "waiting").exists()  # none of a rejected record
    info = json.loads((out / "dataset_info.json").read_text())
    sample = SAMPLES / "vision_r1_cold" / "dataset_info.json"
    if sample.exists():
        assert (
            info["vision_r1_mulberry_sft_full"]
            == json.loads(sample.read_text())["vision_r1_mulberry_sft_full"]
        )
    assert (
        list(info) == ["vision_r1_mulberry_sft_full"]
        and not (out / "vision_r1_llava_cot_full.json").exists()
    )
    assert (out / "funnel.png").stat().st_size > 1000 and json.loads(
        (out / "config.json").read_text()
    )["mllm_model"] == "sees"
    last = rows(out / "log.jsonl")[-1]
    assert (last["done"], last["kept"], last["calls"], last["mllm_out"], last["reasoner_in"]) == (
        20,
        16,
        60,
        800,
        200,
    )


def test_llava_sources_get_their_own_file_and_byte_images_are_kept_as_they_are(tmp_path, serve):
    from nano.data import write_parquet

    image = png((1, 2, 3))
    write_parquet(
        tmp_path / "problems.parquet",
        [
            Record(f"x {i}", f"<image>What is {i} red plus 2 blue?", str(i + 2), [image], s)
            for i, s in [(1, "LLaVA-CoT/chartqa"), (2, "geo3k")]
        ],
    )
    cold_start.main(config(tmp_path, serve(), data=str(tmp_path / "problems.parquet")))
    [ours] = read(tmp_path / "out" / "vision_r1_llava_cot_full.json")[0]
    assert (
        ours.id == "x 1"
        and Path(ours.images[0]).read_bytes() == image
        and Path(ours.images[0]).suffix == ".png"
    )
    assert [r.id for r in read(tmp_path / "out" / "cold.jsonl")[0]] == ["x 1", "x 2"]
    row = json.loads((tmp_path / "out" / "vision_r1_llava_cot_full.json").read_text())[0]
    assert row["image"].startswith("images/") and [t["from"] for t in row["conversations"]] == [
        "human",
        "gpt",
    ]


@pytest.mark.parametrize(
    "flags, steps",
    [
        ({}, ["step 1", "step 2", "reason"]),
        ({"skip_pseudo_cot": True}, ["step 2", "reason"]),
        ({"skip_description": True}, ["step 1", "reason"]),
        ({"pseudo_cot_only": True}, ["step 1"]),
    ],
)
def test_prompts_of_the_steps_and_ablations(tmp_path, serve, flags, steps):
    problems(tmp_path, 2)
    server = serve()
    cold_start.main(config(tmp_path, server, concurrency=1, min_chars=1, **flags))
    found = []
    for head, body in server.requests[-len(steps) :]:  # the second record: "1 red plus 1 blue"
        content = body["messages"][0]["content"]
        assert (
            "authorization: bearer" in head.lower()
            and "What is 1 red plus 1 blue?" in str(content)
            and "<image>" not in str(content)
        )
        if body["model"] == "thinks":
            assert (
                isinstance(content, str)
                and (
                    "Caption: balls."
                    if "skip_description" in flags
                    else "has 1 red and 1 blue balls ."
                )
                in content
            )
            found.append("reason")
        else:
            assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
            found.append("step 2" if "description" in content[1]["text"] else "step 1")
            assert ("Correct answer: 2" in content[1]["text"]) == (
                found[-1] == "step 1"
            )  # the description is made without the answer
            if found[-1] == "step 2":
                assert ("Caption: balls. Final Answer: 2" in content[1]["text"]) == (
                    "skip_pseudo_cot" not in flags
                )
    assert found == steps
    kept = rows(tmp_path / "out" / "cold.jsonl")
    assert kept[-1]["id"] == "p/1" and ("Caption: balls" in kept[-1]["response"]) == (
        "pseudo_cot_only" in flags
    )


def test_toy_recipe(tmp_path):
    pytest.importorskip("toy")
    from toy import problems as toy_problems

    write_parquet(tmp_path / "toy.parquet", toy_problems(60, 0, "t"))
    toy = Config(
        **{
            **cold_start.RECIPES["toy"],
            "data": str(tmp_path / "toy.parquet"),
            "out": str(tmp_path / "out"),
        }
    )
    cold_start.main(toy)
    kept = rows(tmp_path / "out" / "cold.jsonl")
    assert 10 < len(kept) < 60 and len(kept) + len(rows(tmp_path / "out" / "rejected.jsonl")) == 60
    for row in kept:
        assert row["response"].startswith("<think> Okay , the image shows A1 ") and row[
            "response"
        ].endswith(f"</think> <answer> {row['answer']} </answer>")


def test_a_finished_run_makes_no_call_and_other_settings_reuse_its_calls(tmp_path, serve, capsys):
    problems(tmp_path, 6)
    server = serve()
    cold_start.main(config(tmp_path, server))
    before, files = len(server.requests), contents(tmp_path / "out")
    capsys.readouterr()
    cold_start.main(config(tmp_path, server, concurrency=3))
    said = capsys.readouterr().out
    assert "0 calls, 18 from the journal" in said and " was " not in said
    assert len(server.requests) == before and contents(tmp_path / "out") == files
    cold_start.main(config(tmp_path, server, max_chars=10))  # another filter: no new call
    said = capsys.readouterr().out
    assert "max_chars was 50000 and is 10 now" in said and "--fresh" in said and "--out" in said
    assert len(server.requests) == before
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert {r["rule"] for r in rejected} == {"wrong answer", "too long"}
    cold_start.main(config(tmp_path, server, temperature=0.0))
    assert len(server.requests) == 2 * before
    cold_start.main(config(tmp_path, server, fresh=True))
    assert len(server.requests) == 3 * before


def test_the_calls_of_runs_by_earlier_versions_are_found(tmp_path, serve):
    """the keys were printed by the version that wrote them first: a finished run must go on"""
    gif = (
        b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01"
        b"\x00\x00\x02\x02D\x01\x00;"
    )
    record = Record("p/1", "<image>What is 1 red plus 2 blue, in é?", "3", [gif], "mulberry")
    write_parquet(tmp_path / "problems.parquet", [record])
    server = serve()
    cold_start.main(config(tmp_path, server))
    assert [r["key"] for r in rows(tmp_path / "out" / "journal.jsonl")] == [
        "a96473f8d85581c8616d82bf0097fb1d",
        "1843702dff164aec770b849b85151276",
        "949fdb11546f21d280670524419e3726",
    ]
    [kept] = rows(tmp_path / "out" / "cold.jsonl")
    assert kept["images"] == ["images/p_1-e08bb000.gif"]
    url = server.requests[0][1]["messages"][0]["content"][0]["image_url"]["url"]
    kind, data = url.split(";base64,")
    assert kind == "data:image/gif" and base64.b64decode(data) == gif


def test_requests_carry_the_settings_of_the_model_cards(tmp_path, serve):
    """DeepSeek-R1's model card: temperature .6, top-p .95; 16,384 tokens as in the SFT config"""
    problems(tmp_path, 1)
    server = serve()
    cold_start.main(config(tmp_path, server))
    found = {
        (b["model"], b["temperature"], b["top_p"], b["max_tokens"]) for _, b in server.requests
    }
    assert found == {("sees", 0.6, 0.95, 4096), ("thinks", 0.6, 0.95, 16384)}


def test_pictures_of_two_records_never_share_a_file(tmp_path, serve):
    """ "a" with two pictures and "a-1" with one: both would be called a-1.png"""
    red, green, blue = (png(color) for color in ("red", "green", "blue"))
    question = "<image>What is 1 red plus 1 blue?"
    both = Record("a", "<image>" + question, "2", [red, green])
    write_parquet(tmp_path / "problems.parquet", [both, Record("a-1", question, "2", [blue])])
    cold_start.main(config(tmp_path, serve()))
    kept = [r.images for r in read(tmp_path / "out" / "cold.jsonl")[0]]
    assert [[Path(i).read_bytes() for i in images] for images in kept] == [[red, green], [blue]]


def test_records_that_cannot_be_bridged_are_accounted_for(tmp_path, serve):
    write_parquet(
        tmp_path / "problems.parquet",
        [
            Record("text", "What is 1 red plus 1 blue?", "2", []),
            Record("seen", "<image>What is 1 red plus 1 blue?", "2", [png("red")]),
        ],
    )
    cold_start.main(config(tmp_path, serve()))
    assert [(r["id"], r["step"], r["rule"]) for r in rows(tmp_path / "out" / "rejected.jsonl")] == [
        ("text", "input", "no image")
    ]
    assert [r["id"] for r in rows(tmp_path / "out" / "cold.jsonl")] == ["seen"]


@pytest.mark.parametrize(
    "file", ["geometry3k/data.jsonl", "mathvista/data.jsonl", "formats/vision_r1_rl/test.parquet"]
)
def test_real_problems_and_a_model_that_talks_garbage(tmp_path, serve, file):
    """every record of real files goes through, and is kept or rejected with a reason"""
    path = SAMPLES.parent / file
    if not path.exists():
        pytest.skip("no sample data beside this checkout")
    talk = random.Random(0)

    def script(body):
        if body["model"] == "thinks":
            return (
                200,
                completion(
                    talk.choice(
                        [
                            "<think>zzz",
                            "<think>" + "la " * 900 + "</think>B",
                            "<think>" + OK + "</think>\nFinal Answer: B",
                            "{}\n{}",
                            "",
                        ]
                    )
                ),
                {},
            )
        return (
            200,
            completion(
                talk.choice(
                    [
                        "{curly} \\frac{1}{2} seen",
                        "I cannot see the image.",
                        "A triangle with sides 3, 4, 5.",
                    ]
                )
            ),
            {},
        )

    cold_start.main(
        config(
            tmp_path,
            serve(script=script),
            data=str(path),
            limit=60,
            template=cold_start.Config.template,
        )
    )
    kept, rejected = (
        rows(tmp_path / "out" / "cold.jsonl"),
        rows(tmp_path / "out" / "rejected.jsonl"),
    )
    records = read(path)[0][:60]
    assert sorted(r["id"] for r in kept + rejected) == sorted(r.id for r in records)
    assert {"format", "can't see"} < {r["rule"] for r in rejected} and all(
        r["evidence"] for r in rejected
    )
    if kept:
        again, bad = read(tmp_path / "out" / "cold.jsonl")
        assert len(again) == len(kept) and not len(bad)


# ---- replies


@pytest.mark.parametrize(
    "message, headers",
    [
        (
            completion("Final Answer: 3", reasoning_content="A long enough thought about 1 and 2."),
            {},
        ),
        (completion("3", reasoning="A long enough thought about 1 and 2."), {}),
        (completion("<think>A long enough thought about 1 and 2.</think>3"), {}),
        (
            completion(
                "A long enough thought about 1 and 2.</think>\n\n**Final Answer:** \\boxed{3}"
            ),
            {"Transfer-Encoding": "chunked"},
        ),
    ],
)
def test_reasoning_is_found_wherever_the_server_puts_it(tmp_path, serve, message, headers):
    write_parquet(
        tmp_path / "problems.parquet",
        [Record("a", "<image>What is 1 red plus 2 blue?", "3", [png("red")])],
    )
    cold_start.main(
        config(
            tmp_path,
            serve(
                script=lambda body: (
                    200,
                    answer(body) if body["model"] == "sees" else message,
                    headers,
                )
            ),
        )
    )
    assert (
        rows(tmp_path / "out" / "cold.jsonl")[0]["response"]
        == "<think>A long enough thought about 1 and 2.</think>\n<answer> Final Answer:3 </answer>"
    )


OK_BODY = json.dumps(completion("hé")).encode()
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(OK_BODY)
REST = OK_BODY[5:]
CHUNKS = b"5\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (OK_BODY[:5], len(REST), REST)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "raw, expected",
    [
        (OK_HEAD + OK_BODY, "ok"),
        (b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n" + OK_BODY, "ok"),  # ends with the connection
        (CHUNKED + CHUNKS, "ok"),
        (b"HTTP/1.1 503 Busy Now\r\ncontent-length:0\r\n\r\n", "busy or down"),
        (b"HTTP/1.1 302 X\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "failed"),
        (OK_HEAD + OK_BODY[:-1], "failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "failed"),
        (b"HTTP/1.1 200", "failed"),
        (b"", "failed"),
        (CHUNKED + CHUNKS[:-5], "failed"),
        (b"what is this\r\n\r\n", "failed"),
        (b"\r\n\r\n", "failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "failed"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_answers_in_pieces(tmp_path, raw, expected, piece):
    async def serve_raw(reader, writer):
        await reader.readuntil(b"?")
        for i in range(0, len(raw), piece):
            writer.write(raw[i : i + piece])
            await asyncio.sleep(0.0002)
        writer.close()

    async def talk():
        tcp = await asyncio.start_server(serve_raw, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{tcp.sockets[0].getsockname()[1]}/v1"
        async with open_session(20) as session, tcp:
            return await Client(url, "MLLM_API_KEY").attempt(session, b"?")

    kind, reply, _ = asyncio.run(talk())
    assert kind == expected, reply
    if kind == "ok":
        assert reply == {"text": "hé", "finish": "stop", "in": 10, "out": 20}


def test_an_endless_answer_is_cut_and_counts_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("nano.teachers.MAX_ANSWER", 100_000)
    sent = 0

    async def serve_without_end(reader, writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while sent < 100_000_000:
                writer.write(b"x" * 10_000)
                sent += 10_000
                await writer.drain()
        except OSError:
            pass

    async def talk():
        tcp = await asyncio.start_server(serve_without_end, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{tcp.sockets[0].getsockname()[1]}/v1"
        async with open_session(20) as session, tcp:
            return await Client(url, "MLLM_API_KEY").attempt(session, b"?")

    kind, text, _ = asyncio.run(talk())
    assert kind == "failed" and "more than 100,000 bytes" in text and sent < 50_000_000


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Final Answer: 12", "12"),
        ("So it is done.\n**Final Answer:** B", "B"),
        ("Final Answer:\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<answer>Final Answer:B</answer>", "B"),
        ("The value is \\boxed{7}.", "7"),
        ("Adding up.\nThe answer is 42.", "42."),
        ("6", "6"),
        ("", None),
        ("First this.\nThen that, I think.", None),
    ],
)
def test_final_answer(text, expected):
    assert (cold_start.final_answer(text) or "").rstrip(".") == (expected or "").rstrip(".")


# ---- word replacement: every rule has a line


@pytest.mark.parametrize(
    "before, after",
    [
        ("The description of the figure gives AB = 5.", "The figure gives AB = 5."),
        ("From the detailed description of the image, x is 3.", "From the image, x is 3."),
        ("The image description has two circles.", "The image has two circles."),
        ("According to the textual description, it is red.", "According to the image, it is red."),
        ("the description states that AB = 5", "the image shows that AB = 5"),
        ("The description mentioned a bar.", "The image showed a bar."),
        (
            "Let me read the description again. Reading through the description, I see",
            "Let me look at the image again. Looking at the image, I see",
        ),
        ("The user described a circle.", "The image shows a circle."),
        ("It is a description that helps.", "It is an image that helps."),
        ("Based on the description, there are 4.", "Based on the image, there are 4."),
        ("the angles described in the figure", "the angles shown in the figure"),
        ("As described, the bar is tall.", "As shown, the bar is tall."),
        ("The points are described .", "The points are shown ."),
        ("the caption has it", "the image has it"),
        (
            "A descriptive word about prescriptions stays.",
            "A descriptive word about prescriptions stays.",
        ),
    ],
)
def test_word_replacement(before, after):
    assert chains.as_seen(before) == after


def test_the_guards_before_patterns_change_nothing():
    """random sentences of the words that matter, against the plain patterns over the whole text"""
    words = (
        "the a this image figure description descriptions Description described DESCRIBED says "
        "read reading detailed caption The is not cannot can't see view any no without missing "
        "data provided given information to solve doesn't mention unable to of in . , user as İ ’ "
        "diagram was were another note"
    ).split()
    rng = random.Random(0)

    def substitute(pattern, new, text):
        def said(match):
            return match.expand(new[:1].upper() + new[1:] if match[0][0].isupper() else new)

        return pattern.sub(said, text)

    for _ in range(3000):
        text = plain = " ".join(rng.choices(words, k=rng.randint(3, 25)))
        for _, pattern, new in chains.REPLACEMENTS:
            plain = substitute(pattern, new, plain)
        assert chains.as_seen(text) == plain
        blind = re.search(chains.BLIND.pattern, text.replace("’", "'"), re.I)
        assert bool(chains.blind(text, "")) == bool(blind), text


def test_every_replacement_rule_is_used_by_a_test_line():
    lines = next(m for m in test_word_replacement.pytestmark if m.name == "parametrize").args[1]
    for _, pattern, _ in chains.REPLACEMENTS:
        assert any(pattern.search(before) for before, _ in lines), pattern.pattern


# ---- filters: every rule has a line that it takes and one that it leaves

OK = (
    "Okay, so I look at the figure and add 5 and 7, which makes 12. Let me check: 12 - 7 = 5. Good."
)


def verdict_of(chain, answer="12", gold="12", problem="<image>How many?", choices=None, **more):
    record = Record("a", problem, gold, ["x"], choices=choices)
    settings = SimpleNamespace(**{"min_chars": 20, "max_chars": 5000, **more})
    return next(
        (
            rule
            for rule, evidence in cold_start.objections(settings, record, chain, answer)
            if evidence
        ),
        None,
    )


@pytest.mark.parametrize(
    "rule, arguments",
    [
        (None, dict(chain=OK)),
        ("format", dict(chain="")),
        ("format", dict(chain=OK + "</think>")),
        ("no answer", dict(chain=OK, answer=None)),
        ("wrong answer", dict(chain=OK, answer="13")),
        (None, dict(chain=OK, answer="12.0")),
        ("contradiction", dict(chain=OK + " So the answer is 13.")),
        (None, dict(chain=OK + " So the answer is 12.")),
        (None, dict(chain="Is the answer is 13? " + OK * 10)),
        (
            "contradiction",
            dict(
                chain=OK + " The correct option is C.",
                answer="B",
                gold="B",
                choices=["11", "12", "13"],
            ),
        ),
        (
            None,
            dict(chain=OK + " The answer is 12.", answer="B", gold="B", choices=["11", "12", "13"]),
        ),
        (
            None,
            dict(
                chain=OK + " The answer is 12.",
                answer="12",
                gold="B",
                problem="<image>How many?\nChoices:\nA: 11\nB: 12\nC: 13",
            ),
        ),
        (
            "contradiction",
            dict(
                chain=OK + " The answer is 13.",
                answer="12",
                gold="B",
                problem="<image>How many?\nChoices:\nA: 11\nB: 12\nC: 13",
            ),
        ),
        (
            None,
            dict(chain=OK + " The answer is 12.", answer="B", gold="B"),
        ),  # a number against a letter, options unknown: not comparable
        (None, dict(chain=OK + " So the answer is 12 cm.", answer="12 cm", gold="12 cm")),
        (None, dict(chain=OK + r" The answer is 2\pi.", answer=r"2\pi", gold=r"2\pi")),
        ("language mix", dict(chain=OK + " 所以答案是十二。")),
        (None, dict(chain=OK + " 所以答案是十二。", problem="<image>图中有多少个?")),
        (None, dict(chain=OK + " Here α + β = π.")),
        ("too short", dict(chain="It is 12.")),
        ("too long", dict(chain=OK * 100)),
    ],
)
def test_filters_of_the_chain(rule, arguments):
    assert verdict_of(**arguments) == rule


@pytest.mark.parametrize(
    "rule, reply",
    [
        (None, dict(text=OK)),
        ("empty", dict(text="  \n")),
        ("refused", dict(text="", finish="content_filter")),
        ("truncated", dict(text=OK, finish="length")),
        ("looping", dict(text=OK + " I count again, it is 5 and 7." * 60)),
        ("looping", dict(text="哈" * 600)),
        (
            None,
            dict(
                text="".join(f"Row {i} has {i * 37 % 11} and {i * 71 % 13}. " for i in range(200))
            ),
        ),
        ("can't see", dict(text="I cannot see the image, so I guess 12.")),
        ("can't see", dict(text="I'm unable to view any diagram here.")),
        ("can't see", dict(text="Hmm, no image was provided, only words.")),
        ("can't see", dict(text="Without seeing the actual picture it is hard.")),
        ("can't see", dict(text="The data are missing for 2014.")),
        ("can't see", dict(text="But the description doesn't mention the radius.")),
        ("can't see", dict(text="There is not enough information to determine x.")),
        (
            None,
            dict(
                text="There is not enough information to determine x.",
                question="Is there not enough information to determine x?",
            ),
        ),
        (None, dict(text="I see in the image that x = 3.")),
    ],
)
def test_filters_of_every_step(rule, reply):
    reply = {"finish": "stop", "question": "Find x.", **reply}
    if rule is None:
        assert chains.checked("chain", reply, reply["question"]) == reply["text"].strip()
        return
    with pytest.raises(Reject) as reject:
        chains.checked("chain", reply, reply["question"])
    assert (reject.value.step, reject.value.rule) == ("chain", rule) and reject.value.evidence


def test_real_prose_is_no_loop():
    path = SAMPLES.parent / "model_responses" / "mathvista.jsonl"
    if not path.exists():
        pytest.skip("no sample of model responses beside this checkout")
    assert not [
        r for r in rows(path) if any(chains.looping(v) for v in r.values() if isinstance(v, str))
    ]


# ---- faults


def status_script(status, text="x", headers=None):
    return lambda body: (status, {"error": {"message": text}}, headers or {})


@pytest.mark.parametrize(
    "status, text, says",
    [
        (401, "Incorrect API key provided: sk-secret", "wrong key: set MLLM_API_KEY"),
        (403, "no", "wrong key"),
        (404, "The model `sees` does not exist", "unknown model"),
        (429, "insufficient_quota: check your billing", "out of quota"),
        (400, "invalid temperature", "given up"),
        (500, "boom", "given up"),
    ],
)
def test_what_stops_the_run(tmp_path, serve, monkeypatch, status, text, says):
    monkeypatch.setenv("MLLM_API_KEY", "sk-secret")
    problems(tmp_path, 20)
    server = serve(script=status_script(status, text))
    with pytest.raises(Stop, match=says) as stop:
        cold_start.main(config(tmp_path, server, retries=1, concurrency=4))
    assert "Bearer sk-secret" in server.requests[0][0]
    assert "sk-secret" not in str(stop.value) + "".join(
        p.read_text() for p in (tmp_path / "out").iterdir() if p.is_file()
    )
    assert not (tmp_path / "out" / "cold.jsonl").exists()


def test_each_server_gets_its_own_key(tmp_path, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-general")
    monkeypatch.setenv("REASONER_API_KEY", "sk-other")
    problems(tmp_path, 2)
    server = serve()
    cold_start.main(config(tmp_path, server))
    keys = {body["model"]: re.search("Bearer (.*)\r", head)[1] for head, body in server.requests}
    assert keys == {"sees": "sk-general", "thinks": "sk-other"}


def test_a_proxy_is_taken_from_the_environment(tmp_path, serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = serve()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    problems(tmp_path, 2)
    cold_start.main(config(tmp_path, "http://teachers.invalid:81/v1"))
    wanted = "POST http://teachers.invalid:81/v1/chat/completions HTTP/1.1"
    assert len(proxy.requests) == 6 and {h.split("\r\n")[0] for h, _ in proxy.requests} == {wanted}
    direct = serve()  # this machine's own servers are not asked through it
    cold_start.main(config(tmp_path, direct, out=str(tmp_path / "direct")))
    assert len(direct.requests) == 6 and len(proxy.requests) == 6


def test_https_is_spoken_and_a_certificate_that_nobody_trusts_stops_the_run(tmp_path, serve):
    """in processes of their own: SSL_CERT_FILE is read when Python's certificates are loaded"""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [*command.split(), "subjectAltName=DNS:localhost", *files]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    server = serve(tls=tls)
    problems(tmp_path, 6)
    settings = vars(config(tmp_path, f"https://localhost:{server.port}/v1", timeout=20))
    code = f"import cold_start; cold_start.guarded(cold_start.Config(**{settings!r}))"
    root = str(Path(cold_start.__file__).parent)

    def run(**more):
        env = os.environ | more
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)

    done = run()
    assert done.returncode == 1 and "bad certificate" in done.stderr.splitlines()[-1], done.stderr
    done = run(SSL_CERT_FILE=str(certificate))
    assert done.returncode == 0 and len(server.requests) == 18, done.stderr
    assert len(rows(tmp_path / "out" / "cold.jsonl")) == 4


def test_context_overflow_is_the_records_own_fault(tmp_path, serve):
    problems(tmp_path, 12)
    overflow = (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 4096 tokens. You requested 5000"
            }
        },
        {},
    )
    server = serve(
        script=lambda body: (
            overflow
            if "What is 3 red" in str(body) and body["model"] == "thinks"
            else (200, answer(body), {})
        )
    )
    cold_start.main(config(tmp_path, server))
    assert ("p/3", "chain", "context overflow") in [
        (r["id"], r["step"], r["rule"]) for r in rows(tmp_path / "out" / "rejected.jsonl")
    ]
    before = len(server.requests)
    cold_start.main(config(tmp_path, server))
    assert len(server.requests) == before  # it is not asked again


def test_a_record_that_always_fails_is_given_up_and_tried_again_next_time(tmp_path, serve):
    problems(tmp_path, 12)
    broken = [True]
    server = serve(
        script=lambda body: (
            (500, {}, {}) if broken[0] and "What is 3 red" in str(body) else (200, answer(body), {})
        )
    )
    cold_start.main(config(tmp_path, server, retries=2))
    assert ("p/3", "no answer") in [
        (r["id"], r["rule"]) for r in rows(tmp_path / "out" / "rejected.jsonl")
    ]
    assert sum("What is 3 red" in str(b) for _, b in server.requests) == 3  # once, and two retries
    broken[0], before = False, len(server.requests)
    cold_start.main(config(tmp_path, server, retries=2))
    assert len(server.requests) == before + 3 and "p/3" in [
        r["id"] for r in rows(tmp_path / "out" / "cold.jsonl")
    ]
    assert {i for r in rows(tmp_path / "out" / "cold.jsonl") for i in r["images"]} == {
        f"images/{p.name}" for p in (tmp_path / "out" / "images").iterdir()
    }


def test_data_and_servers_must_be_named(tmp_path):
    with pytest.raises(Stop, match="--data is needed"):
        cold_start.main(
            Config(
                recipe="vision-r1-cold", out=str(tmp_path / "out"), mllm_url="http://localhost:1/v1"
            )
        )
    problems(tmp_path, 1)
    for url in ("", "localhost:8000", "http://user:secret@host/v1"):
        with pytest.raises(Stop, match="--mllm_url and --mllm_model are needed"):
            cold_start.main(config(tmp_path, url))
    (tmp_path / "problems.parquet").write_text("what is this\n")
    with pytest.raises(ValueError, match="problems.parquet"):
        cold_start.main(config(tmp_path, "toy:teachers"))


def test_retry_after_is_honoured(tmp_path, serve):
    problems(tmp_path, 1)
    times = []

    def script(body):
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "0.6"}) if len(times) == 1 else (200, answer(body), {})

    cold_start.main(config(tmp_path, serve(script=script)))
    assert times[1] - times[0] >= 0.6


def test_a_kept_connection_gives_every_question_its_own_time(tmp_path):
    """Answers after 0.1 s pass a timeout of 0.25 s however long the connection lives, idle times
    included; a late one does not."""
    connections = []

    async def serve_slowly(reader, writer):
        connections.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                await asyncio.sleep(float(await reader.readexactly(length)))
                writer.write(OK_HEAD + OK_BODY)
        except (EOFError, OSError):
            pass

    async def talk():
        tcp = await asyncio.start_server(serve_slowly, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{tcp.sockets[0].getsockname()[1]}/v1"
        server = Client(url, "MLLM_API_KEY")
        async with open_session(0.25) as session:
            for delay in (b"0.1", b"0.1", b"0.1", b"0", b"0.1"):
                assert (await server.attempt(session, delay))[0] == "ok"
                await asyncio.sleep(0.4 if delay == b"0" else 0)
            assert len(connections) == 1
            for delay in (b"9", b"9"):  # on the kept connection, and on a new one
                start = time.monotonic()
                kind, text, _ = await server.attempt(session, delay)
                assert kind == "failed" and "Timeout" in text
                assert 0.24 < time.monotonic() - start < 2
            assert (await server.attempt(session, b"0"))[0] == "ok" and len(connections) == 3
        tcp.close()

    asyncio.run(talk())


def test_a_server_that_is_down_pauses_the_run(tmp_path, serve):
    problems(tmp_path, 12)
    with socket.socket() as s:  # a port where nobody listens
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threading.Timer(0.7, lambda: serve(port=port)).start()
    start = time.monotonic()
    cold_start.main(config(tmp_path, f"http://127.0.0.1:{port}/v1", retries=0))
    assert time.monotonic() - start > 0.6
    assert {r["rule"] for r in rows(tmp_path / "out" / "rejected.jsonl")} == {
        "wrong answer"
    } and len(rows(tmp_path / "out" / "cold.jsonl")) == 9


@pytest.fixture(scope="module")
def fork():
    """start(settings, limit=0) -> (pid, finish)

    A process that has imported cold_start forks each run: the imports take seconds."""
    code = f"""
import json, os, resource, sys
sys.path.insert(0, {str(Path(cold_start.__file__).parent)!r})
import cold_start
for line in sys.stdin:
    settings, limit, log = json.loads(line)
    pid = os.fork()
    if not pid:
        for f in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), f)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        cold_start.teachers.GRACE = settings.pop("grace", 20)
        cold_start.guarded(cold_start.Config(**settings))
        sys.exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def start(settings, limit=0):
        log = str(Path(settings["data"]).with_name("child.log"))
        print(json.dumps([settings, limit, log]), file=parent.stdin, flush=True)
        pid = int(parent.stdout.readline())
        return pid, lambda: (
            os.waitstatus_to_exitcode(int(parent.stdout.readline())),
            Path(log).read_text(),
        )

    yield start
    parent.stdin.close()
    parent.wait(10)


def test_faults_and_kill_9_leave_the_same_bytes_and_repeat_no_finished_call(tmp_path, serve, fork):
    """20 % of 429, 500, timeouts, cuts and malformed JSON, and SIGKILL at 5 random moments"""
    n = 150
    problems(tmp_path, n)
    cold_start.main(config(tmp_path, serve(), out=str(tmp_path / "calm")))
    server = serve(latency=0.02, faults=0.2, seed=1)
    settings = vars(config(tmp_path, server, retries=20))
    journal, kills, rng = tmp_path / "out" / "journal.jsonl", 0, random.Random(2)
    for k in range(5):
        pid, finish = fork(settings)
        goal = (k + 1) * 3 * n // 8 + rng.randrange(20)  # so many finished calls, then the axe
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (
            not journal.exists() or journal.read_bytes().count(b"\n") < goal
        ):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        kills += finish()[0] == -signal.SIGKILL
    assert kills == 5
    finished = {json.loads(line)["key"] for line in open(journal) if line.endswith("\n")}
    status, text = fork(settings)[1]()
    assert status == 0, text
    keys = [r["key"] for r in rows(journal)]
    assert len(keys) == len(set(keys)) == 3 * n and finished <= set(keys)  # every call once
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    ids = [
        r["id"] for name in ("cold.jsonl", "rejected.jsonl") for r in rows(tmp_path / "out" / name)
    ]
    assert sorted(ids) == sorted(f"p/{i}" for i in range(n))


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_calls_in_flight_come_to_their_end_when_the_run_is_told_to_stop(
    tmp_path, serve, fork, number
):
    """All eight are journaled, no other one begins, and no call is made twice."""
    problems(tmp_path, 12)
    cold_start.main(config(tmp_path, serve(), out=str(tmp_path / "calm")))
    server = serve(latency=1.0)
    settings = vars(config(tmp_path, server, timeout=30))
    pid, finish = fork(settings)
    within(20, lambda: len(server.requests) == 8)
    os.kill(pid, number)
    status, text = finish()
    assert status == 128 + number, text
    assert "calls in flight get up to 20 s" in text and "goes on from the finished calls" in text
    assert "Traceback" not in text
    assert len(server.requests) == len(rows(tmp_path / "out" / "journal.jsonl")) == 8
    server.latency = 0
    status, text = fork(settings)[1]()
    assert status == 0, text
    assert len(server.requests) == 36 and "28 calls, 8 from the journal" in text
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


@pytest.mark.parametrize("grace", [0.5, 60])
def test_calls_that_do_not_end_are_given_up_in_time_and_at_once_at_a_second_signal(
    tmp_path, serve, fork, grace
):
    problems(tmp_path, 12)
    server = serve(latency=300)
    pid, finish = fork(vars(config(tmp_path, server, timeout=300)) | dict(grace=grace))
    within(20, lambda: len(server.requests) == 8)
    os.kill(pid, signal.SIGTERM)
    start = time.monotonic()
    if grace == 60:
        within(5, lambda: "told to stop" in (tmp_path / "child.log").read_text())
        os.kill(pid, signal.SIGTERM)
    status, text = finish()
    assert status == 143 and "goes on from the finished calls" in text, text
    assert time.monotonic() - start < (10 if grace < 60 else 1.5)
    assert rows(tmp_path / "out" / "journal.jsonl") == []


def test_half_a_journal_line_is_dropped(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.add("a" * 32, {"text": "één", "in": 1})
    journal.add("b" * 32, {"text": "two\nlines"})
    with open(tmp_path / "j", "ab") as f:
        f.write(b'{"key": "' + b"c" * 32 + b'", "text": "hal')
    journal = Journal(tmp_path / "j")
    assert (
        journal.get("a" * 32)["text"] == "één"
        and journal.get("b" * 32)["text"] == "two\nlines"
        and journal.get("c" * 32) is None
    )
    journal.add("d" * 32, {"text": "three"})
    assert [r["key"][0] for r in rows(tmp_path / "j")] == ["a", "b", "d"]


def test_one_writer_per_output(tmp_path, serve):
    problems(tmp_path, 2)
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
            "print(1, flush=True); time.sleep(30)",
            str(tmp_path / "out" / "lock"),
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(Stop, match="another cold_start.py"):
        cold_start.main(config(tmp_path, serve()))
    holder.kill()
    holder.wait()
    cold_start.main(config(tmp_path, serve()))


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_later(tmp_path, serve, fork):
    problems(tmp_path, 40)
    settings = vars(config(tmp_path, serve()))
    status, text = fork(settings, limit=6000)[1]()
    assert status == 1 and "the disk is full" in text and "Traceback" not in text, text
    journal = tmp_path / "out" / "journal.jsonl"
    assert journal.read_bytes().endswith(b"}\n") and 0 < len(rows(journal)) < 120
    assert not (tmp_path / "out" / "cold.jsonl").exists()
    assert (
        fork(settings)[1]()[0] == 0
        and len(rows(journal)) == 120
        and len(rows(tmp_path / "out" / "cold.jsonl")) == 32
    )


def test_many_in_flight_and_bounded(tmp_path, serve):
    """100 calls at a time, and the last step of early records beside the first of late ones

    (how fast: bench/cold_start.py)"""
    problems(tmp_path, 300)
    server = serve(latency=0.05)
    cold_start.main(config(tmp_path, server, concurrency=100, timeout=30))
    assert server.most == 100
    models = [body["model"] for _, body in server.requests]
    assert len(models) == 900 and models.index("thinks") < 400 < 899 - models[::-1].index("sees")


# ---- real servers


@pytest.fixture(scope="module")
def vllm_servers(tmp_path_factory):
    """two vLLM servers with tiny random checkpoints, one of which gets pictures -> their URLs"""
    if not importlib.util.find_spec("vllm"):
        pytest.skip(
            "vLLM is not installed: bash tests/run.sh --vllm makes an environment that has it"
        )
    import toy

    servers = []
    for k, name in enumerate(("sees", "thinks")):
        folder = tmp_path_factory.mktemp(name)
        toy.random_model(folder, seed=k)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder),
            "--served-model-name",
            name,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--max-model-len",
            "4096",
            "--max-num-seqs",
            "32",
            "--enforce-eager",
            "--dtype",
            "float32",
            "--seed",
            "0",
            "--api-key",
            "sk-tiny",
        ]
        env = os.environ | dict(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_LOGGING_LEVEL="ERROR",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
            TORCHDYNAMO_DISABLE="1",
        )
        log = open(folder / "log", "w")
        servers.append(
            (
                f"http://127.0.0.1:{port}/v1",
                folder / "log",
                subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True),
            )
        )
    yield [(url, log) for url, log, _ in servers]
    for *_, process in servers:
        os.killpg(process.pid, signal.SIGTERM)  # the engine is a process of its own
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.vllm
def test_two_real_vllm_servers(tmp_path, vllm_servers, monkeypatch):
    """All steps run, and the garbage of random weights is filtered with reasons.

    A too long question and a wrong name or key are told apart."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-tiny")
    records = [
        Record(f"p{i}", f"<image>What is {i} red plus {i} blue?", str(2 * i), [png((i * 20, 0, 0))])
        for i in range(12)
    ]
    records[5].problem += " It is late ." * 1500  # more than 4,096 tokens of this tokenizer
    write_parquet(tmp_path / "problems.parquet", records)
    (mllm, log), (reasoner, _) = vllm_servers
    settings = dict(
        mllm_url=mllm,
        reasoner_url=reasoner,
        mllm_tokens=1200,
        reasoner_tokens=600,
        temperature=1.0,
        top_p=1.0,
        timeout=300,
        backoff=0.5,
    )
    cold_start.main(
        config(tmp_path, mllm, **settings)
    )  # servers that are not up yet are waited for
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert len(rejected) + len(rows(tmp_path / "out" / "cold.jsonl")) == 12 and all(
        r["rule"] and r["evidence"] for r in rejected
    ), log.read_text()[-2000:]
    assert [(r["step"], r["rule"]) for r in rejected if r["id"] == "p5"] == [
        ("pseudo-CoT", "context overflow")
    ]
    last, calls = rows(tmp_path / "out" / "log.jsonl")[-1], rows(tmp_path / "out" / "journal.jsonl")
    assert (
        {"chain", "filter"} & {r["step"] for r in rejected}
        and last["reasoner_out"] > 0
        and last["mllm_in"] > 300 * 9
    )  # records came to the last step
    assert all(
        c["in"] > 0 and c["out"] > 0 and c["finish"] in ("stop", "length")
        for c in calls
        if c["finish"] != "context overflow"
    )
    for wrong, says in (
        (dict(mllm_model="nobody"), "unknown model"),
        (dict(key="sk-wrong"), "wrong key"),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", wrong.pop("key", "sk-tiny"))
        with pytest.raises(Stop, match=says):
            cold_start.main(config(tmp_path, mllm, out=str(tmp_path / says), **settings | wrong))


# ---- stats


def test_stats_on_the_released_layouts(tmp_path, monkeypatch, capsys):
    files = sorted((SAMPLES / "vision_r1_cold").glob("*full.json"))
    if not files:
        pytest.skip("no format samples beside this checkout")
    monkeypatch.chdir(tmp_path)
    stats.main([str(f) for f in files])
    table = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["records"][:2] == ["3", "6"] and table["Wait"] == [
        "6",
        "2",
        "2,300",
        "1,122",
        "585,719",
    ]  # Table 4 beside ours
    assert (
        table["Hmm"][:2] == ["0", "2"]
        and table["duplicates"] == ["0", "0"]
        and Path("stats.png").stat().st_size > 1000
    )


def test_stats_counts_words_lengths_and_duplicates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [
        "Wait, wait. Check it; unchecked waiters.",
        "Hmm. A mistake? Alternatively: no.",
        "Hmm. A mistake? Alternatively: no.",
        "plain",
    ]
    Path("a.jsonl").write_text("".join(json.dumps({"response": t}) + "\n" for t in texts))
    Path("b.json").write_text(
        json.dumps(
            [
                {
                    "messages": [
                        {"role": "user", "content": "Wait?"},
                        {"role": "assistant", "content": "<CONCLUSION> 5 </CONCLUSION>"},
                    ]
                }
            ]
        )
    )
    stats.main(["a.jsonl", "b.json"])
    table = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()}
    assert [table[w][0] for w in ("Wait", "Hmm", "Mistake", "Alternatively", "Check")] == [
        "2",
        "2",
        "2",
        "2",
        "1",
    ] and table["Wait"][1] == "0"
    assert (
        table["records with Wait"][0] == "25.0%"
        and table["duplicates"] == ["1", "0"]
        and table["words: median"] == ["5", "3"]
    )
    stats.main(["a.jsonl"], "there.png")
    assert Path("there.png").stat().st_size > 1000
    Path("c.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no responses"):
        stats.main(["c.jsonl"])


def test_an_old_command_says_where_it_went():
    command = [sys.executable, str(Path(cold_start.__file__)), "stats", "a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "python -m tools.stats" in done.stderr


def test_it_needs_no_torch_before_it_starts():
    code = "import cold_start, sys; sys.exit('torch' in sys.modules)"
    root = str(Path(cold_start.__file__).parent)
    assert not subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode


@pytest.mark.parametrize(
    "low, high, size", [(0, 0, (60, 40)), (0, 600, (30, 20)), (9600, 0, (120, 80))]
)
def test_a_picture_is_sent_with_as_many_pixels_as_asked(low, high, size):
    """Shape and area, read back from the message; without limits the bytes are the file's."""
    out = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(out, "PNG")
    part = image_part(out.getvalue(), low, high)
    sent = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == size
    assert (sent == out.getvalue()) == (size == (60, 40))
