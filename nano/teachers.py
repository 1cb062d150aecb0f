"""The teachers of cold_start.py: OpenAI-compatible servers, a journal of finished calls."""

import asyncio
import base64
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from PIL import Image

MAX_ANSWER = 2**20  # bytes; a chain of 16,384 tokens takes about 64 KB
GRACE = 20  # seconds that calls in flight get to end when the run is told to stop
PER_TOKEN = 32  # bytes that a teacher may send for each token it was asked for, and 64 KB more
MOST_WAIT = 60  # times the first wait: the longest one, whatever a server asks for
START = b'{"key": "'  # of a line of the journal; within a text its quotes are escaped
IMAGE_KINDS = {b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}  # else PNG
STATUSES = dict.fromkeys((401, 403), "wrong key") | dict.fromkeys((400, 422), "bad request")
STATUSES |= dict.fromkeys((429, 502, 503, 504), "busy or down")
STATUSES |= {404: "unknown model", 413: "context overflow"}
TOO_LONG = re.compile(r"(?i)context.{0,40}(length|window)|max\w*.{0,20}(length|len\b)|too long")
STOPS = ("wrong key", "unknown model", "out of quota", "bad certificate")  # end the whole run


class Reject(Exception):
    """One record is left out; for "no answer" it is not to blame, and a later run asks again."""

    def __init__(self, step: str, rule: str, evidence: str):
        self.step, self.rule, self.evidence = step, rule, evidence[:500]


class Stop(ValueError):
    """The run ends with this message for a person; the journal keeps what is finished."""


working = False  # calls are made: a signal lets those in flight come to their end
told, until = 0, 0.0  # the signal that told the run to stop, and how long it waits for them


def on_signal(number: int, frame):
    """SIGTERM or Ctrl-C: no call begins any more, and those in flight get GRACE seconds. The run
    ends at once at a second signal, and while no calls are made."""
    global told, until
    at_once, told, until = told or not working, number, time.monotonic() + GRACE
    if at_once:
        leave()
    text = f"told to stop: calls in flight get up to {GRACE} s; a second signal ends it at once"
    os.write(2, f"\n{text}\n".encode())


def leave_if_told(*servers: "Server"):
    """Ends a run that was told to, once its calls in flight are journaled or take too long."""
    late = time.monotonic() > until
    if told and (late or not any(host.in_flight for one in servers for host in one.hosts)):
        leave()


def leave():
    os.write(2, b"\nstopped; the same command goes on from the finished calls\n")
    os._exit(128 + told)  # what the run wrote besides the journal is made again


class Journal:
    """Every finished call as one line, written at once; earlier runs' calls are found by key."""

    def __init__(self, path: str | Path):
        self.file = open(path, "ab", buffering=0)
        self.places, self.end, damaged = {}, 0, 0  # key -> where its line starts; the file's end
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # A run was killed within this line: the call is made again.
                start = max(0, line.rfind(START))  # A lost line end leaves two lines in one.
                key = sound(line[start:])
                damaged += not key or start > 0
                self.places |= {key: self.end + start} if key else {}
                self.end += len(line)
        self.file.truncate(self.end)
        self.reader = open(path, "rb")
        if damaged:
            backup = f"{path}.damaged-{time.time_ns()}"
            shutil.copyfile(path, backup)
            with open(f"{path}.part", "wb") as good:
                for place in self.places.values():
                    self.reader.seek(place)
                    good.write(self.reader.readline())
            os.replace(f"{path}.part", path)
            print(f"{path}: {damaged} damaged lines (kept in {backup}): these calls are made again")
            self.__init__(path)

    def get(self, key: str) -> dict | None:
        if key not in self.places:
            return None
        self.reader.seek(self.places[key])
        return {"finish": None, "in": 0, "out": 0} | json.loads(self.reader.readline())

    def add(self, key: str, reply: dict) -> None:
        line = json.dumps({"key": key, **reply}).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            self.file.truncate(self.end)  # Half a line must not stay.
            raise
        self.end += len(line)


def sound(line: bytes) -> str | None:
    """The key of a line of the journal, or None when the line is damaged."""
    try:
        row = json.loads(line)
        row["text"].encode()  # No half characters: no file would take them.
        f"{row.get('in', 0):d} {row.get('out', 0):d}"
        return bytes.fromhex(row["key"]).hex()
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return None


def image_kind(image: bytes) -> str:
    return next((kind for magic, kind in IMAGE_KINDS.items() if image.startswith(magic)), "png")


def image_part(image: bytes, min_pixels: int = 0, max_pixels: int = 0) -> dict:
    """A picture as a part of a message: as it is, unless it has fewer or more pixels than that."""
    if min_pixels or max_pixels:
        picture = Image.open(io.BytesIO(image))
        size = picture.width * picture.height
        scale = math.sqrt(max(min_pixels, min(size, max_pixels or size)) / size)
        if scale != 1:
            rounded = math.floor if scale < 1 else math.ceil
            sides = [max(1, rounded(side * scale)) for side in picture.size]
            out = io.BytesIO()
            picture.convert("RGB").resize(sides, Image.Resampling.BICUBIC).save(out, "PNG")
            image = out.getvalue()
    url = f"data:image/{image_kind(image)};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def open_session(timeout: float | None) -> aiohttp.ClientSession:
    """The connections to all servers; `timeout`: seconds for one answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # The caller limits the calls.
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # A small answer could become a huge one.
    )


class Client:
    """The chat of one OpenAI-compatible server, and how it is doing."""

    def __init__(self, url: str, key_name: str, max_answer: int = 0):
        self.url, self.key_name, at = url, key_name, urlsplit(url)
        self.max_answer = max_answer or MAX_ANSWER
        self.key = os.environ.get(key_name) or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        headers["Accept-Encoding"] = "identity"
        # aiohttp's trust_env would look it up at every call, and stumble over ~/.netrc.
        direct = at.hostname in ("localhost", "127.0.0.1", "::1") or proxy_bypass(at.hostname)
        proxy = None if direct else getproxies().get(at.scheme)
        self.how = {"headers": headers, "proxy": proxy, "allow_redirects": False}
        self.in_flight = self.answered = self.failures = 0  # calls; the last ones failed in a row
        self.down, self.rest_until = False, 0.0
        self.looked_at = time.monotonic(), 0  # when rate() was called last, and `answered` then

    def rate(self) -> str:
        """Answers per second since this was called last, or that the server is down."""
        (then, before), self.looked_at = self.looked_at, (time.monotonic(), self.answered)
        rate = (self.answered - before) / max(1e-3, self.looked_at[0] - then)
        return "down" if self.down else f"{rate:.1f}/s"

    async def attempt(self, session: aiohttp.ClientSession, body: bytes):
        """-> (what the answer means, the reply or what went wrong, seconds to wait)"""
        self.in_flight += 1
        try:
            kind, reply, retry_after = await self.post(session, body)
        finally:
            self.in_flight -= 1
        if kind in ("ok", "context overflow", "bad request"):
            self.failures, self.down, self.rest_until = 0, False, 0.0
            self.answered += 1
        else:
            self.failures += 1
        if kind != "ok":  # Servers echo a wrong key, and may send what no file or terminal takes.
            reply = reply.replace(self.key, "***")[:300]
            reply = "".join(c if c.isprintable() else " " for c in reply)
        return kind, reply, retry_after

    async def post(self, session, body: bytes) -> tuple[str, dict | str, float]:
        try:
            url = f"{self.url}/chat/completions"
            async with session.post(url, data=body, **self.how) as answer:
                raw = bytearray()
                async for piece in answer.content.iter_any():
                    raw += piece
                    if len(raw) > self.max_answer:
                        raise ValueError(f"an answer of more than {self.max_answer:,} bytes")
        except aiohttp.ClientConnectorCertificateError as error:
            return "bad certificate", f"{error} (trusted: SSL_CERT_FILE)", 0.0
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return "busy or down", str(error), 0.0
        except Exception as error:  # Whatever a server sends must not end the run.
            return "failed", f"{type(error).__name__}: {error}", 0.0
        asked = re.fullmatch(r"\d+(\.\d+)?", answer.headers.get("Retry-After", ""))
        meant = parse_reply(raw) if answer.status == 200 else meaning(answer.status, raw)
        return *meant, float(asked[0]) if asked else 0.0


class Server:
    """A teacher, on one or several servers. What it was asked before comes from the journal.

    `session` must be set before the first question."""

    def __init__(self, name: str, config, journal: Journal, tally: dict):
        self.name, self.config, self.journal, self.tally = name, config, journal, tally
        urls, self.model = (getattr(config, f"{name}_{what}") for what in ("url", "model"))
        urls, self.model = urls.replace(" ", "").split(","), self.model.rstrip("/")
        for at in map(urlsplit, urls):
            good = at.scheme in ("http", "https") and at.hostname and not at.username
            if not good or not self.model:
                raise Stop(
                    f"--{name}_url and --{name}_model are needed: like http://host:8000/v1 "
                    "(no key in it; several with commas), and the model's name"
                )
        tokens, key_name = getattr(config, f"{name}_tokens"), f"{name.upper()}_API_KEY"
        most = PER_TOKEN * tokens + 2**16
        self.hosts = [Client(url.rstrip("/"), key_name, most) for url in urls]
        settings = {"model": self.model, "max_tokens": tokens}
        settings |= {"temperature": config.temperature, "top_p": config.top_p}
        self.head = json.dumps(settings)[:-1]  # Every request begins with it.
        self.given_up, self.trouble = 0, ""  # records in a row; what went wrong last

    def rested(self) -> list[Client]:
        return [host for host in self.hosts if time.monotonic() >= host.rest_until]

    def pick(self) -> Client:
        """The server with the fewest calls in flight. One that is down gets one now and then."""
        host = min(self.rested() or self.hosts, key=lambda host: (host.in_flight, host.answered))
        if host.down:
            host.rest_until = time.monotonic() + 10 * self.config.backoff
        return host

    async def ask(self, id: str, step: str, prompt: str, images: str = "") -> dict:
        """The reply {text, finish, in, out} for record `id`, from the journal if it is there.

        `images`: parts of the message as JSON, with a comma behind each.
        """
        text = json.dumps(prompt)
        digest = hashlib.sha256(images.encode()).digest() if images else b""
        key = "\0".join([id, step, self.head, text, ""]).encode() + digest
        key = hashlib.blake2b(key, digest_size=16).hexdigest()
        if reply := self.journal.get(key):
            self.tally["from_journal"] += 1
        else:
            self.tally["calls"] += 1
            content = f'[{images}{{"type": "text", "text": {text}}}]' if images else text
            body = f'{self.head}, "messages": [{{"role": "user", "content": {content}}}]}}'
            reply = await self.call(step, body.encode())
            self.journal.add(key, reply)
        self.tally[f"{self.name}_in"] += reply["in"]
        self.tally[f"{self.name}_out"] += reply["out"]
        if reply["finish"] == "context overflow":
            raise Reject(step, "context overflow", reply["text"])
        return reply

    async def call(self, step: str, body: bytes) -> dict:
        """One answer. A server that is busy or down is waited for without end; too many failed
        answers end the record (Reject), and too many such records in a row end the run (Stop)."""
        failures, wait = 0, self.config.backoff
        longest = MOST_WAIT * wait
        while True:
            if told:
                await asyncio.Event().wait()  # leave_if_told ends the run
            host = self.pick()
            kind, reply, asked = await host.attempt(self.session, body)
            if kind == "ok":
                self.given_up, self.trouble = 0, ""
                return reply
            if kind == "context overflow":
                return {"text": reply, "finish": kind, "in": 0, "out": 0}
            label = f"{self.name} at {host.url}, model {self.model}"
            self.trouble = f"{label}: {kind}: {reply[:80]}"
            # One odd answer is not believed: a proxy may have sent it, and not the server.
            patience = max(4, self.config.concurrency) if host.answered else 2
            if kind in STOPS and host.failures > patience:
                hint = f"set {host.key_name}" if kind == "wrong key" else reply
                raise Stop(f"{label}: {kind}: {hint}")
            failures += kind != "busy or down"
            if kind == "bad request" or failures > self.config.retries:
                self.given_up += 1
                if self.given_up <= max(4, self.config.concurrency):
                    raise Reject(step, "no answer", f"{kind}: {reply}")
                lost = f"{self.given_up} records in a row were given up"
                raise Stop(f"{label}: {lost}; {kind}: {reply}")
            if asked or kind == "busy or down" or host.failures > 2:
                host.down = True
                host.rest_until = time.monotonic() + min(asked or 10 * wait, longest)
            pause = wait * (0.5 + random.random())
            await asyncio.sleep(min(pause if self.rested() else asked or pause, longest))
            wait = min(2 * wait, longest)


def meaning(status: int, raw: bytes) -> tuple[str, str]:
    """-> (what an HTTP status other than 200 means, its text)"""
    text = f"status {status}, {raw[:500].decode('utf-8', 'replace')}"
    if status == 429 and re.search("insufficient_quota|billing", text):
        return "out of quota", text
    if status in (400, 422) and TOO_LONG.search(text):
        return "context overflow", text
    return STATUSES.get(status, "failed"), text


def parse_reply(raw: bytes) -> tuple[str, dict | str]:
    """A completion -> ("ok", {text, finish, in, out}) or ("failed", why)"""
    try:
        answer = json.loads(raw)
        choice, usage = answer["choices"][0], answer.get("usage")
        message, finish = choice["message"], choice.get("finish_reason")
        text = "" if message.get("content") is None else message["content"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        if thought and "</think>" not in text:
            text = "<think>" + thought + "</think>" + text
        if b"\0" in text.encode():  # Half characters raise here: no file would take them.
            raise ValueError("a NUL in the text")
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return "failed", f"malformed answer ({error!r}): {bytes(raw[:80])!r}"
    usage = usage if isinstance(usage, dict) else {}
    sizes = [usage.get(f"{side}_tokens") for side in ("prompt", "completion")]
    sizes = [n if type(n) is int and 0 <= n < 2**32 else 0 for n in sizes]
    finish = finish[:40] if isinstance(finish, str) else None
    return "ok", dict(zip(("text", "finish", "in", "out"), (text, finish, *sizes)))
