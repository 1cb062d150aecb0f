"""The teachers of cold_start.py: OpenAI-compatible chat servers over HTTP, with a journal of every finished call.

Journal     append-only file of calls; after a crash what is in it is not asked again
Server      one chat server: retries with back-off, pauses while it is down, and tells apart what went wrong
Line        one kept connection to a server next door
"""

import asyncio
import errno
import hashlib
import json
import os
import random
import re
import time
from urllib.parse import urlsplit


class Reject(Exception):
    """one record is left out; `again`: through no fault of its own, a later run tries it once more"""

    def __init__(self, step, rule, evidence, again=False):
        self.step, self.rule, self.evidence, self.again = step, rule, evidence, again


class Stop(Exception):
    """the run ends here with this message for a person; the journal keeps what is finished"""


class Journal:
    """every finished call, one line each, written at once; what earlier runs wrote is found by key, and read when needed"""

    def __init__(self, path):
        self.file, self.reader, self.places, self.end = (
            open(path, "ab", buffering=0),
            open(path, "rb"),
            {},
            0,
        )
        for line in self.reader:
            if not line.endswith(b"}\n"):
                break  # killed in the middle of this line: the call is made again
            self.places[line[9:41].decode()] = self.end
            self.end += len(line)
        self.file.truncate(self.end)

    def get(self, key):
        if key in self.places:
            self.reader.seek(self.places[key])
            return json.loads(self.reader.readline())

    def add(self, key, reply):
        line = json.dumps({"key": key, **reply}).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            self.file.truncate(self.end)  # not half a line
            raise
        self.end += len(line)


class Down(Exception):
    """nobody answers at the server's address: no record's fault"""


class Line(asyncio.Protocol):
    """one kept HTTP/1.1 connection, one request at a time -> (status, headers, body); ConnectionError or ValueError when cut or malformed"""

    def connection_made(self, transport):
        self.transport, self.open, self.answer = transport, True, None

    def ask(self, request):
        self.answer, self.buffer, self.head, self.asked_at = (
            asyncio.get_running_loop().create_future(),
            bytearray(),
            None,
            time.monotonic(),
        )
        self.transport.write(request)
        return self.answer

    def watch(self, timeout):
        """cuts the connection when an answer is late: one timer for all its questions, where one for each costs 4 % of a call"""
        rest = self.asked_at + timeout - time.monotonic()
        if rest <= 0 and not self.answer.done():
            self.transport.abort()
        elif self.open:
            asyncio.get_running_loop().call_later(
                rest if rest > 0 else timeout, self.watch, timeout
            )

    def data_received(self, data):
        if self.answer is None or self.answer.done():
            return self.transport.abort()  # nobody asked
        self.buffer += data
        try:
            if self.head is None and (end := self.buffer.find(b"\r\n\r\n")) >= 0:
                first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
                self.head = (
                    int(first.split()[1]),
                    {
                        name.lower(): value.strip()
                        for name, _, value in (line.partition(":") for line in lines)
                    },
                )
                del self.buffer[: end + 4]
            if self.head and (body := self.body(self.head[1])) is not None:
                self.answer.set_result((*self.head, body))
        except (ValueError, IndexError) as e:
            self.answer.set_exception(ValueError(f"no HTTP: {e}"))
            self.transport.abort()

    def body(self, headers):
        """the body when it is complete; None before"""
        if "content-length" in headers:
            size = int(headers["content-length"])
            return bytes(self.buffer[:size]) if len(self.buffer) >= size else None
        if headers.get("transfer-encoding", "").lower() == "chunked" and self.buffer.endswith(
            b"0\r\n\r\n"
        ):
            parts, at = [], 0
            while (end := self.buffer.find(b"\r\n", at)) >= 0:
                size = int(self.buffer[at:end].split(b";")[0], 16)
                if not size:
                    return b"".join(parts)
                parts.append(self.buffer[end + 2 : end + 2 + size])
                at = end + 4 + size

    def connection_lost(self, error):
        self.open = False
        if self.answer and not self.answer.done():
            endless = (
                self.head and not {"content-length", "transfer-encoding"} & self.head[1].keys()
            )  # such a body ends with the connection
            self.answer.set_result(
                (*self.head, bytes(self.buffer))
            ) if endless and not error else self.answer.set_exception(
                ConnectionError(
                    f"the connection was cut after {len(self.buffer)} bytes of the answer"
                )
            )


class Server:
    """an OpenAI-compatible chat server. https:// goes through the openai package. http:// (vLLM or SGLang next door) goes over `Line`: a call costs
    the package 3 to 4 ms of CPU, 1.2 of them before a byte is sent, which ends at some 300 calls a second; over Line it is 0.1 (NOTES.md)"""

    official = ("https",)

    def __init__(self, name, config, journal, tally):
        self.name, self.config, self.journal, self.tally = name, config, journal, tally
        self.url, self.model = getattr(config, f"{name}_url"), getattr(config, f"{name}_model")
        settings = {
            "max_tokens": getattr(config, f"{name}_tokens"),
            "temperature": config.temperature,
            "top_p": config.top_p,
        }
        self.head = json.dumps({"model": self.model, **settings})[
            :-1
        ].encode()  # the body of every request begins with it
        self.key = (
            os.environ.get(f"{name.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        )
        self.pause, self.down_until, self.given_up, self.answers, self.idle, self.at = (
            0.0,
            0.0,
            0,
            0,
            [],
            urlsplit(self.url.rstrip("/")),
        )
        if (
            self.at.scheme not in ("http", "https")
            or not self.at.hostname
            or self.at.username
            or not self.model
        ):
            raise Stop(
                f"--{name}-url and --{name}-model are needed: a URL like http://host:8000/v1 (no key in it) and the model's name there"
            )
        self.request = f"POST {self.at.path}/chat/completions HTTP/1.1\r\nHost: {self.at.netloc}\r\nAuthorization: Bearer {self.key}\r\nContent-Type: application/json".encode()
        if self.at.scheme in self.official:
            import openai

            self.client, self.post = (
                openai.AsyncOpenAI(
                    base_url=self.url, api_key=self.key, max_retries=0, timeout=config.timeout
                ),
                self.post_official,
            )

    async def ask(self, record, step, prompt, seen=b"", digests=b""):
        """the reply {text, finish, in, out} to a prompt, from the journal when it is there; raises Reject, Stop

        `seen`: pictures as parts of the request's JSON, each with a comma behind it; `digests` stands for them in the journal's key."""
        text = json.dumps(prompt).encode()
        key = hashlib.blake2b(
            b"\0".join([record.id.encode(), step.encode(), self.head, text, digests]),
            digest_size=16,
        ).hexdigest()
        reply = self.journal.get(key)
        self.tally["calls" if reply is None else "from_journal"] += 1
        if reply is None:
            content = b'[%s{"type": "text", "text": %s}]' % (seen, text) if seen else text
            self.tally["in_flight"] += 1
            try:
                reply = await self.call(
                    step,
                    b'%s, "messages": [{"role": "user", "content": %s}]}' % (self.head, content),
                )
            finally:
                self.tally["in_flight"] -= 1
            self.journal.add(key, reply)
        self.tally[f"{self.name}_in"] += reply["in"]
        self.tally[f"{self.name}_out"] += reply["out"]
        if reply["finish"] == "context overflow":
            raise Reject(step, "context overflow", reply["text"])
        return reply

    async def call(self, step, body):
        """one answer, however long it takes. busy or down: wait for ever; failed too often: the record is given up"""
        failures, wait = 0, self.config.backoff
        while True:
            while (rest := self.down_until - time.monotonic()) > 0:
                await asyncio.sleep(rest + random.random() * wait / 10)
            headers, answers, asked_at = {}, self.answers, time.monotonic()
            try:
                status, headers, raw = await self.post(body)
                kind, text = verdict(status, raw)
                if kind == "ok":
                    reply, self.pause, self.given_up, self.tally["trouble"] = (
                        parse_reply(raw),
                        0.0,
                        0,
                        "",
                    )
                    self.answers += 1
                    return reply
            except Down as e:
                kind, text = "down", str(e)
            except (OSError, ValueError) as e:  # malformed, cut, or cut by us after the timeout
                kind, text = (
                    "failed",
                    f"{type(e).__name__}: {e} ({time.monotonic() - asked_at:.1f} s after the question)",
                )
            text = text.replace(self.key, "***")[:300]
            self.tally["trouble"] = f"{self.name} {kind}: {text[:80]}"
            if kind in ("wrong key", "unknown model", "out of quota"):
                hint = (
                    f"set {self.name.upper()}_API_KEY" if kind == "wrong key" else text
                )  # servers echo a wrong key
                raise Stop(f"{self.name} at {self.url}, model {self.model!r}: {kind}: {hint}")
            if kind == "context overflow":
                return {"text": text, "finish": kind, "in": 0, "out": 0}
            failures += kind == "failed"
            if kind == "bad request" or failures > self.config.retries:
                self.given_up += 1
                if self.given_up > max(4, self.config.concurrency):
                    raise Stop(
                        f"{self.name} at {self.url}: {self.given_up} records in a row had to be given up, the last with {kind}: {text}"
                    )
                raise Reject(step, "no answer", f"{kind}: {text}", again=True)
            asked = headers.get("retry-after", "")
            asked = float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0.0
            if (
                kind == "down" and answers == self.answers
            ):  # and nobody else had an answer meanwhile: the whole run waits
                if time.monotonic() >= self.down_until:
                    self.pause = min(2 * self.pause or self.config.backoff, 60)
                    self.down_until = time.monotonic() + max(asked, self.pause)
            else:
                await asyncio.sleep(asked or wait * (0.5 + random.random()))
                wait = min(2 * wait, 60)

    async def post(self, body):
        """-> (status, headers, body) over a connection that is kept"""
        line, loop, keep = None, asyncio.get_running_loop(), False
        while self.idle and (line is None or not line.open):
            line = self.idle.pop()
        try:
            if line is None or not line.open:
                _, line = await loop.create_connection(Line, self.at.hostname, self.at.port or 80)
                loop.call_later(self.config.timeout, line.watch, self.config.timeout)
        except OSError as e:
            raise Down(str(e)) from e
        try:
            status, headers, raw = await line.ask(
                b"%s\r\nContent-Length: %d\r\n\r\n%s" % (self.request, len(body), body)
            )
            keep = (
                headers.get("connection", "").lower() != "close"
            )  # after a timeout or a cut we do not come here
            return status, headers, raw
        finally:
            self.idle.append(line) if keep else line.transport.close()

    async def post_official(self, body):
        """the same through the openai package, which knows certificates and proxies"""
        import openai

        try:
            answer = (
                await self.client.chat.completions.with_raw_response.create(**json.loads(body))
            ).http_response
        except openai.APIStatusError as e:
            answer = e.response
        except openai.APIConnectionError as e:  # a timeout too
            raise (Down if type(e.__cause__).__name__ == "ConnectError" else ConnectionError)(
                str(e.__cause__ or e)
            ) from e
        return answer.status_code, answer.headers, answer.content


def verdict(status, raw):
    """-> (what an HTTP answer means, its text)"""
    if status == 200:
        return "ok", ""
    text = f"status {status} {raw[:500].decode('utf-8', 'replace')}"
    kind = {
        401: "wrong key",
        403: "wrong key",
        404: "unknown model",
        413: "context overflow",
        429: "busy",
        502: "down",
        503: "down",
        504: "down",
    }
    if status == 429 and re.search("insufficient_quota|billing", text):
        return "out of quota", text
    if status in (400, 422):
        return (
            "context overflow"
            if re.search(
                r"(?i)context.{0,40}(length|window)|max\w*.{0,20}(length|len\b)|too long", text
            )
            else "bad request"
        ), text
    return kind.get(status, "failed"), text


def parse_reply(raw):
    """a chat completion -> {text, finish, in, out}; reasoning_content becomes <think> tags. ValueError when malformed"""
    try:
        reply = json.loads(raw)
        message, usage = reply["choices"][0]["message"], reply.get("usage") or {}
        text, thought = (
            message.get("content") or "",
            message.get("reasoning_content") or message.get("reasoning"),
        )
        return {
            "text": f"<think>{thought}</think>{text}"
            if thought and "</think>" not in text
            else text,
            "finish": reply["choices"][0].get("finish_reason"),
            "in": int(usage.get("prompt_tokens") or 0),
            "out": int(usage.get("completion_tokens") or 0),
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"malformed answer ({e!r}): {raw[:80]!r}") from e
