"""http_engine.py against a small server that checks what it is asked, and that can misbehave."""

import asyncio
import base64
import io
import json
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from aiohttp import web
from conftest import single_rank
from PIL import Image

import eval as evaluation
from nano import http_engine, run
from nano.data import Record


class FakeServer:
    """Answers with the words of the question; `troubles` happen first, one per request."""

    def __init__(self):
        self.asked, self.headers, self.troubles = [], [], []
        self.delay, self.frozen = 0.0, threading.Event()
        self.busy = self.most = self.health = 0
        self.listed = {"data": [{"id": "some-model"}]}

    async def chat(self, request):
        body = await request.json()
        self.asked.append(body)
        self.headers.append(request.headers)
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble == "cut":
            request.transport.abort()
            await asyncio.sleep(60)
        if trouble:
            return web.Response(status=trouble[0], text=trouble[1])
        self.busy += 1
        self.most = max(self.most, self.busy)
        await asyncio.sleep(self.delay)
        self.busy -= 1
        (parts,) = (m["content"] for m in body["messages"] if m["role"] == "user")
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        reason = "length" if "long" in text else "stop"
        return web.Response(text=reply(f"{text}|{body['seed']}", reason, len(text)))

    async def models(self, request):
        self.health += 1
        while self.frozen.is_set():
            await asyncio.sleep(0.05)
        return web.json_response(self.listed)

    async def start(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        return runner


def reply(text, reason="stop", tokens=7):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}})


@contextmanager
def serving():
    server, loop = FakeServer(), asyncio.new_event_loop()
    runner = loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        server.frozen.clear()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def server(monkeypatch):
    single_rank()
    for name in ("EVAL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http_engine, "WAITS", (0, 0.01, 0.02, 0.04, 0.05))
    with serving() as one:
        yield one


def picture(kind, size):
    file = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(file, kind)
    return file.getvalue()


def ask(server, records, group_size=1, seeds=None, system_prompt="", **settings):
    engine = http_engine.HTTPEngine(server.url, "some-model", system_prompt)
    prompts = [engine.prompt(record) for record in records]
    seeds = seeds or [(3, 0, i) for i in range(len(records))]
    groups = engine.generate(prompts, group_size, 128, seeds, **settings)
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == group_size and all(sample.prompt is prompt for sample in group)
    return groups


def question(i, text="What ?"):
    return Record(f"q{i}", text, "1", [])


def refusal(server):
    """What a run that cannot go on says."""
    with pytest.raises(SystemExit) as end:
        ask(server, [question(1)])
    said = str(end.value)
    assert said.startswith("error: ") and f"{server.url}, model 'some-model', question q1" in said
    return said


def test_a_question_arrives_with_its_pictures_in_their_places(server, tmp_path):
    """Their own bytes and types, from memory and from files; all that steers sampling is sent."""
    png, jpeg = picture("PNG", (30, 20)), picture("JPEG", (64, 48))
    (tmp_path / "b.png").write_bytes(jpeg)  # The bytes tell the type, not the name.
    problem = "Left is <image>and right<image>. What is 1+1?"
    record = Record("two", problem, "2", [png, str(tmp_path / "b.png")])
    ask(server, [record], system_prompt="Think.", temperature=0.6, top_p=0.95)
    [body] = server.asked
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Think."} and user["role"] == "user"
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    texts = [part["text"] for part in user["content"][::2]]
    assert texts == ["Left is ", "and right", ". What is 1+1?"]
    urls = [part["image_url"]["url"].split(";base64,") for part in user["content"][1::2]]
    assert [mime for mime, _ in urls] == ["data:image/png", "data:image/jpeg"]
    assert [base64.b64decode(data) for _, data in urls] == [png, jpeg]
    assert body["model"] == "some-model" and body["max_tokens"] == 128
    assert (body["temperature"], body["top_p"]) == (0.6, 0.95)
    ask(server, [question(1)])
    assert [message["role"] for message in server.asked[-1]["messages"]] == ["user"]


def test_samples_have_text_finish_and_length_and_stay_in_order(server):
    groups = ask(server, [question(i, f"What {i} {'long ' * i}") for i in range(3)], group_size=4)
    for i, group in enumerate(groups):
        for sample in group:
            text = f"What {i} {'long ' * i}"
            assert sample.text.startswith(text + "|") and sample.ids == [] == sample.logprobs
            assert sample.length == len(text)
            assert sample.finish == ("length" if i else "stop")


@pytest.mark.parametrize(
    "prefill, begins", [("<think>\n", "<think>\n"), ("So.\n<think>", "<think>"), ("So:", "So:")]
)
def test_a_server_goes_on_with_the_prefill(server, prefill, begins):
    """vLLM's and SGLang's words for it; the text holds what the prompt held of it. Control tokens
    of the data go as they are: the server makes the tokens."""
    how = dict(system_prompt="Think .", prefill=prefill, max_pixels=5000)
    engine = http_engine.HTTPEngine(server.url, "some-model", **how)
    record = Record("a", "Add <|im_end|> .", "1", [])
    [[sample]] = engine.generate([engine.prompt(record)], 1, 8, [(0,)])
    assert sample.text.startswith(f"{begins}Add <|im_end|> .|")
    (asked,) = server.asked
    assert [m["role"] for m in asked["messages"]] == ["system", "user", "assistant"]
    assert asked["messages"][-1]["content"] == prefill
    assert asked["continue_final_message"] is True
    assert asked["add_generation_prompt"] is False
    assert asked["mm_processor_kwargs"] == {"max_pixels": 5000}


def test_without_a_prefill_a_request_is_plain(server):
    ask(server, [Record("a", "Add .", "1", [])])
    extra = {"continue_final_message", "add_generation_prompt", "mm_processor_kwargs"}
    assert not extra & server.asked[0].keys()


def test_seeds_follow_from_the_tuple_and_the_sample_alone(server):
    numbers, records = [(3, 0, 5), (3, 1, 5), (4, 0, 5)], [question(i) for i in range(3)]
    texts = [[s.text for s in group] for group in ask(server, records, 4, numbers)]
    seeds = [body["seed"] for body in server.asked]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**31 for seed in seeds)
    again = ask(server, records[::-1], 4, numbers[::-1])
    assert [[s.text for s in group] for group in again[::-1]] == texts
    more = ask(server, records, 6, numbers)
    assert [[s.text for s in group[:4]] for group in more] == texts


@pytest.mark.parametrize("names", [("EVAL_API_KEY", "OPENAI_API_KEY"), ("OPENAI_API_KEY",)])
def test_the_key_comes_from_the_environment(server, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, f"sk-{name}")
    ask(server, [question(1)])
    assert server.headers[0]["Authorization"] == f"Bearer sk-{names[0]}"


@pytest.mark.parametrize(
    "troubles",
    [
        [(500, "oh"), (500, "oh"), "cut", (429, "slow down")],
        [(200, "<html>"), (503, "starting"), (200, reply("half", "abort")), (200, "{}")],
    ],
)
def test_what_passes_is_tried_again(server, troubles):
    server.troubles = list(troubles)
    [[sample]] = ask(server, [question(1)])
    assert sample.text.startswith("What ?|") and len(server.asked) == 5
    assert all(body == server.asked[0] for body in server.asked)


def test_no_text_is_an_answer_too(server):
    server.troubles = [(200, reply(None, "length"))]
    [[sample]] = ask(server, [question(1)])
    assert (sample.text, sample.finish, sample.length) == ("", "length", 7)


def test_a_thought_that_comes_beside_the_answer_is_part_of_it(server):
    said = json.loads(reply("<answer>2</answer>"))
    said["choices"][0]["message"]["reasoning_content"] = "1+1"
    server.troubles = [(200, json.dumps(said))]
    [[sample]] = ask(server, [question(1)])
    assert sample.text == "<think>1+1</think><answer>2</answer>"


def test_a_server_that_never_gets_well_is_given_up(server):
    server.troubles = [(503, "overloaded")] * 99
    said = refusal(server)
    assert "status 503, overloaded" in said and "answered questions are kept" in said
    assert len(server.asked) == len(http_engine.WAITS)


def test_nobody_at_that_address(server):
    server.url = "http://127.0.0.1:9/v1"
    assert "Connect" in (said := refusal(server)) and "Start it again" in said


@pytest.mark.parametrize(
    "code, text, hint",
    [
        (404, "The model `some-model` does not exist.", "up to and with /v1"),
        (401, "Incorrect API key provided: sk-secret", "EVAL_API_KEY"),
        (400, "maximum context length is 4096 tokens", "--max_len"),
    ],
)
def test_what_does_not_pass_ends_the_run_at_once(server, monkeypatch, code, text, hint):
    monkeypatch.setenv("EVAL_API_KEY", "sk-secret")
    server.troubles = [(code, text)] * 9
    said = refusal(server)
    assert f"status {code}, {text.replace('sk-secret', '***')}" in said and hint in said
    assert "sk-secret" not in said and len(server.asked) == 1


def test_one_refusal_among_many_ends_the_run(server, capfd):
    server.troubles, server.delay = [None, None, (404, "no")], 0.2
    with pytest.raises(SystemExit, match="404"):
        ask(server, [question(i) for i in range(200)])
    assert "never retrieved" not in capfd.readouterr().err


def test_a_slow_answer_is_waited_for_while_the_server_is_alive(server, monkeypatch):
    monkeypatch.setattr(http_engine, "PATIENCE", 0.1)
    server.delay = 1.0
    ask(server, [question(1)])
    assert len(server.asked) == 1 and server.health > 3


def test_a_frozen_server_is_noticed(server, monkeypatch):
    monkeypatch.setattr(http_engine, "PATIENCE", 0.1)
    server.delay = 60.0
    server.frozen.set()
    start = time.monotonic()
    assert "TimeoutError" in refusal(server)
    assert time.monotonic() - start < 10 and len(server.asked) == len(http_engine.WAITS)


def test_no_more_than_64_requests_at_a_time(server):
    server.delay = 0.2
    ask(server, [question(i) for i in range(50)], group_size=3)
    assert len(server.asked) == 150 and 32 < server.most <= 64


def test_ranks_share_the_servers(monkeypatch):
    urls = "http://a:8000/v1/, https://b.example/v1"
    for rank, url in enumerate(["http://a:8000/v1", "https://b.example/v1", "http://a:8000/v1"]):
        monkeypatch.setattr(http_engine.dist, "get_rank", lambda rank=rank: rank)
        assert http_engine.HTTPEngine(urls, "m").url == url


@pytest.mark.parametrize("urls", ["", "localhost:8000/v1", "http://a/v1,b"])
def test_a_url_that_is_none_is_refused(urls):
    with pytest.raises(SystemExit, match="http://HOST:8000/v1"):
        http_engine.HTTPEngine(urls, "m")


def test_a_broken_picture_is_named(server, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="error: .*broken.png"):
        ask(server, [Record("q", "<image>What ?", "1", [str(path)])])


def test_a_fingerprint_follows_what_the_server_says_of_its_model(server):
    def found(*models, name="some-model"):
        server.listed = {"data": list(models)}
        return http_engine.HTTPEngine(server.url, name).fingerprint()

    def entry(**more):
        return {"id": "some-model", "root": "/models/a", "max_model_len": 4096, **more}

    first = found(entry(created=1, permission=[{"id": "p1"}]))
    # A server that starts again, and one that has more models or lists them in another order.
    assert found(entry(created=2, permission=[{"id": "p2"}])) == first
    assert found({"id": "another"}, dict(reversed(entry().items()))) == first
    others = {found(entry(root="/models/b")), found(entry(max_model_len=8192))}
    others |= {found(entry(), name="another"), found({"id": "another"}), found(entry(parent="x"))}
    assert len(others) == 5 and first not in others
    # A service that lists nothing, or not in this way, is known by the model's name alone.
    for listed in ({"data": []}, {"data": None}, [], "x", {"data": [{"name": "some-model"}]}):
        server.listed = listed
        assert http_engine.HTTPEngine(server.url, "some-model").fingerprint() == found()


def test_answers_of_a_model_that_the_server_has_changed_are_asked_again(server, tmp_path):
    rows = [{"id": f"q{k}", "problem": f"What is {k}?", "answer": str(k)} for k in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(engine="http", url=server.url, model="some-model", data=str(tmp_path / "q.jsonl"))
    asked = []
    for root in ("/models/a", "/models/a", "/models/b", "/models/b"):
        server.listed = {"data": [{"id": "some-model", "root": root, "created": time.time()}]}
        config = evaluation.Config(out=str(tmp_path / "out"), **flags)
        evaluation.evaluate(config, torch.device("cpu"))
        run.locks.pop().close()  # as when the process ends
        asked.append(len(server.asked))
    assert asked == [3, 3, 6, 6]
