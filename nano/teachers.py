"""The teachers of cold_start.py: OpenAI-compatible servers, a journal of finished calls."""

import asyncio
import base64
import errno
import hashlib
import json
import os
import random
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

MAX_ANSWER = 64 * 2**20  # bytes; a chain of 16,384 tokens takes about 64 KB
IMAGE_KINDS = {b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}  # else PNG
STATUSES = dict.fromkeys((401, 403), "wrong key") | dict.fromkeys((400, 422), "bad request")
STATUSES |= dict.fromkeys((429, 502, 503, 504), "busy or down")
STATUSES |= {404: "unknown model", 413: "context overflow"}
TOO_LONG = re.compile(r"(?i)context.{0,40}(length|window)|max\w*.{0,20}(length|len\b)|too long")
STOPS = ("wrong key", "unknown model", "out of quota", "bad certificate")  # end the whole run


class Reject(Exception):
    """One record is left out; for "no answer" it is not to blame, and a later run asks again."""

    def __init__(self, step: str, rule: str, evidence: str):
        self.step, self.rule, self.evidence = step, rule, evidence


class Stop(ValueError):
    """The run ends with this message for a person; the journal keeps what is finished."""


class Journal:
    """Every finished call as one line, written at once; earlier runs' calls are found by key."""

    def __init__(self, path: str | Path):
        self.file = open(path, "ab", buffering=0)
        self.reader = open(path, "rb")
        self.places, self.end = {}, 0  # key -> where its line starts; where the last one ends
        for line in self.reader:
            if not line.endswith(b"}\n"):
                break  # A run was killed within this line: the call is made again.
            self.places[line[9:41].decode()] = self.end  # The line begins with {"key": "
            self.end += len(line)
        self.file.truncate(self.end)

    def get(self, key: str) -> dict | None:
        if key not in self.places:
            return None
        self.reader.seek(self.places[key])
        return json.loads(self.reader.readline())

    def add(self, key: str, reply: dict) -> None:
        line = json.dumps({"key": key, **reply}).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            self.file.truncate(self.end)  # Half a line must not stay.
            raise
        self.end += len(line)


def image_kind(image: bytes) -> str:
    return next((kind for magic, kind in IMAGE_KINDS.items() if image.startswith(magic)), "png")


def image_part(image: bytes) -> dict:
    """A picture, as it is, as a part of a message."""
    url = f"data:image/{image_kind(image)};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def open_session(timeout: float | None) -> aiohttp.ClientSession:
    """The connections to all servers; `timeout`: seconds for one answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # The caller limits the calls.
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=60),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Client:
    """The chat of one OpenAI-compatible server; `session` must be set before the first question."""

    def __init__(self, url: str, key_name: str):
        self.url, self.key_name, at = url, key_name, urlsplit(url)
        self.key = os.environ.get(key_name) or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        # aiohttp's trust_env would look it up at every call, and stumble over ~/.netrc.
        direct = at.hostname in ("localhost", "127.0.0.1", "::1") or proxy_bypass(at.hostname)
        proxy = None if direct else getproxies().get(at.scheme)
        self.how = {"headers": headers, "proxy": proxy, "allow_redirects": False}

    async def attempt(self, body: bytes) -> tuple[str, dict | str, float]:
        """-> (what the answer means, the reply or what went wrong, seconds to wait)"""
        kind, reply, retry_after = await self.post(body)
        if kind != "ok":
            reply = reply.replace(self.key, "***")[:300]  # Servers echo a wrong key.
        return kind, reply, retry_after

    async def post(self, body: bytes) -> tuple[str, dict | str, float]:
        url = f"{self.url}/chat/completions"
        try:
            async with self.session.post(url, data=body, **self.how) as answer:
                raw = bytearray()
                async for piece in answer.content.iter_any():
                    raw += piece
                    if len(raw) > MAX_ANSWER:
                        raise ValueError(f"an answer of more than {MAX_ANSWER:,} bytes")
        except aiohttp.ClientConnectorCertificateError as error:
            return "bad certificate", f"{error} (trusted: SSL_CERT_FILE)", 0.0
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return "busy or down", str(error), 0.0
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            return "failed", f"{type(error).__name__}: {error}", 0.0
        asked = re.fullmatch(r"\d+(\.\d+)?", answer.headers.get("Retry-After", ""))
        meant = parse_reply(raw) if answer.status == 200 else meaning(answer.status, raw)
        return *meant, float(asked[0]) if asked else 0.0


class Server(Client):
    """A teacher: what it was asked before comes from the journal."""

    def __init__(self, name: str, config, journal: Journal, tally: dict):
        self.name, self.config, self.journal, self.tally = name, config, journal, tally
        url, model = (getattr(config, f"{name}_{what}").rstrip("/") for what in ("url", "model"))
        at = urlsplit(url)
        if at.scheme not in ("http", "https") or not at.hostname or at.username or not model:
            raise Stop(
                f"--{name}_url and --{name}_model are needed: like http://host:8000/v1 "
                "(no key in it), and the model's name"
            )
        super().__init__(url, f"{name.upper()}_API_KEY")
        self.label = f"{name} at {url}, model {model}"
        settings = {"model": model, "max_tokens": getattr(config, f"{name}_tokens")}
        settings |= {"temperature": config.temperature, "top_p": config.top_p}
        self.head = json.dumps(settings)[:-1]  # Every request begins with it.
        self.given_up, self.trouble = 0, ""  # records in a row; what went wrong last

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
        while True:
            kind, reply, retry_after = await self.attempt(body)
            if kind == "ok":
                self.given_up, self.trouble = 0, ""
                return reply
            self.trouble = f"{self.name} {kind}: {reply[:80]}"
            if kind == "context overflow":
                return {"text": reply, "finish": kind, "in": 0, "out": 0}
            if kind in STOPS:
                hint = f"set {self.key_name}" if kind == "wrong key" else reply
                raise Stop(f"{self.label}: {kind}: {hint}")
            failures += kind == "failed"
            if kind == "bad request" or failures > self.config.retries:
                self.given_up += 1
                if self.given_up <= max(4, self.config.concurrency):
                    raise Reject(step, "no answer", f"{kind}: {reply}")
                lost = f"{self.given_up} records in a row were given up"
                raise Stop(f"{self.label}: {lost}; {kind}: {reply}")
            await asyncio.sleep(retry_after or wait * (0.5 + random.random()))
            wait = min(2 * wait, 60)


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
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, text = choice["message"], choice["message"].get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning")
        if thought and "</think>" not in text:
            text = f"<think>{thought}</think>{text}"
        reply = {"text": text, "finish": choice.get("finish_reason")}
        sizes = (int(usage.get(f"{side}_tokens") or 0) for side in ("prompt", "completion"))
        return "ok", reply | dict(zip(("in", "out"), sizes))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return "failed", f"malformed answer ({error!r}): {bytes(raw[:80])!r}"
