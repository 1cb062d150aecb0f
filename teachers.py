"""The teachers of cold_start.py: OpenAI-compatible chat servers over HTTP, with a journal of every finished call.

  Journal     append-only file of calls; after a crash what is in it is not asked again
  Server      one chat server: retries with back-off, pauses while it is down, and tells apart what went wrong
  InProcess   the toy's scripted teacher behind the same `ask`
"""
import asyncio, errno, hashlib, json, os, random, re, time
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
        self.file, self.reader, self.places, self.end = open(path, "ab", buffering=0), open(path, "rb"), {}, 0
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

class InProcess:
    """the toy's scripted teacher behind the interface of Server"""

    def __init__(self, teacher, tally):
        self.teacher, self.tally = teacher, tally

    async def ask(self, record, step, prompt, seen=(), digests=()):
        self.tally["calls"] += 1
        return {"text": self.teacher.chat([{"role": "user", "content": [*seen, {"type": "text", "text": prompt}]}]), "finish": "stop"}

class Down(Exception):
    """nobody answers at the server's address: no record's fault"""

class Server:
    """an OpenAI-compatible chat server. https:// goes through the openai package, http:// (vLLM or SGLang next door) over keep-alive
    HTTP/1.1 by hand: 0.1 ms of CPU a call, where the package takes 2 to 4 ms and so gets no further than some 300 calls a second"""
    official = ("https",)

    def __init__(self, name, config, journal, tally):
        self.name, self.config, self.journal, self.tally = name, config, journal, tally
        self.url, self.model = getattr(config, f"{name}_url"), getattr(config, f"{name}_model")
        self.settings = {"max_tokens": getattr(config, f"{name}_tokens"), "temperature": config.temperature, "top_p": config.top_p}
        self.key = os.environ.get(f"{name.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self.pause, self.down_until, self.given_up, self.answers, self.idle, self.at = 0.0, 0.0, 0, 0, [], urlsplit(self.url.rstrip("/"))
        if self.at.scheme not in ("http", "https") or not self.at.hostname or self.at.username or not self.model:
            raise Stop(f"--{name}-url and --{name}-model are needed: a URL like http://host:8000/v1 (no key in it) and the model's name there")
        if self.at.scheme in self.official:
            import openai

            self.client, self.post = openai.AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=config.timeout), self.post_official

    async def ask(self, record, step, prompt, seen=(), digests=()):
        """the reply {text, finish, in, out} to a prompt with pictures, from the journal when it is there; raises Reject, Stop"""
        what = [record.id, step, self.model, self.settings, prompt, digests]
        key = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
        reply = self.journal.get(key)
        self.tally["calls" if reply is None else "from_journal"] += 1
        if reply is None:
            content = [*seen, {"type": "text", "text": prompt}] if seen else prompt
            self.tally["in_flight"] += 1
            try:
                reply = await self.call(step, json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}], **self.settings}).encode())
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
                    reply, self.pause, self.given_up, self.tally["trouble"] = parse_reply(raw), 0.0, 0, ""
                    self.answers += 1
                    return reply
            except Down as e:
                kind, text = "down", str(e)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as e:  # malformed, cut, or cut by us after the timeout
                kind, text = "failed", f"{type(e).__name__}: {e} ({time.monotonic() - asked_at:.1f} s after the question)"
            text = text.replace(self.key, "***")[:300]
            self.tally["trouble"] = f"{self.name} {kind}: {text[:80]}"
            if kind in ("wrong key", "unknown model", "out of quota"):
                hint = f"set {self.name.upper()}_API_KEY" if kind == "wrong key" else text  # servers echo a wrong key
                raise Stop(f"{self.name} at {self.url}, model {self.model!r}: {kind}: {hint}")
            if kind == "context overflow":
                return {"text": text, "finish": kind, "in": 0, "out": 0}
            failures += kind == "failed"
            if kind == "bad request" or failures > self.config.retries:
                self.given_up += 1
                if self.given_up > max(4, self.config.concurrency):
                    raise Stop(f"{self.name} at {self.url}: {self.given_up} records in a row had to be given up, the last with {kind}: {text}")
                raise Reject(step, "no answer", f"{kind}: {text}", again=True)
            asked = headers.get("retry-after", "")
            asked = float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0.0
            if kind == "down" and answers == self.answers:  # and nobody else had an answer meanwhile: the whole run waits
                if time.monotonic() >= self.down_until:
                    self.pause = min(2 * self.pause or self.config.backoff, 60)
                    self.down_until = time.monotonic() + max(asked, self.pause)
            else:
                await asyncio.sleep(asked or wait * (0.5 + random.random()))
                wait = min(2 * wait, 60)

    async def post(self, body):
        """-> (status, headers, body) over a connection that is kept"""
        reader = writer = None
        while self.idle and (reader is None or reader.at_eof()):
            reader, writer = self.idle.pop()
        try:
            if reader is None or reader.at_eof():
                reader, writer = await asyncio.open_connection(self.at.hostname, self.at.port or 80)
        except OSError as e:
            raise Down(str(e)) from e
        keep, timer = False, asyncio.get_running_loop().call_later(self.config.timeout, writer.transport.abort)
        try:
            writer.write(f"POST {self.at.path}/chat/completions HTTP/1.1\r\nHost: {self.at.netloc}\r\nAuthorization: Bearer {self.key}\r\n"
                         f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if headers.get("transfer-encoding", "").lower() == "chunked":
                raw = b""
                while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    raw += (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            else:
                raw = await (reader.readexactly(int(headers["content-length"])) if "content-length" in headers else reader.read())
            keep = headers.get("connection", "").lower() != "close"  # after a timeout or a cut we do not come here
            return int(first.split()[1]), headers, raw
        finally:
            timer.cancel()
            self.idle.append((reader, writer)) if keep else writer.close()

    async def post_official(self, body):
        """the same through the openai package, which knows certificates and proxies"""
        import openai

        try:
            answer = (await self.client.chat.completions.with_raw_response.create(**json.loads(body))).http_response
        except openai.APIStatusError as e:
            answer = e.response
        except openai.APIConnectionError as e:  # a timeout too
            raise (Down if type(e.__cause__).__name__ == "ConnectError" else ConnectionError)(str(e.__cause__ or e)) from e
        return answer.status_code, answer.headers, answer.content

def verdict(status, raw):
    """-> (what an HTTP answer means, its text)"""
    text = f"status {status} {raw[:500].decode('utf-8', 'replace')}"
    kind = {200: "ok", 401: "wrong key", 403: "wrong key", 404: "unknown model", 413: "context overflow", 429: "busy", 502: "down", 503: "down", 504: "down"}
    if status == 429 and re.search("insufficient_quota|billing", text):
        return "out of quota", text
    if status in (400, 422):
        return ("context overflow" if re.search(r"(?i)context.{0,40}(length|window)|max\w*.{0,20}(length|len\b)|too long", text) else "bad request"), text
    return kind.get(status, "failed"), text

def parse_reply(raw):
    """a chat completion -> {text, finish, in, out}; reasoning_content becomes <think> tags. ValueError when malformed"""
    try:
        reply = json.loads(raw)
        message, usage = reply["choices"][0]["message"], reply.get("usage") or {}
        text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        return {"text": f"<think>{thought}</think>{text}" if thought and "</think>" not in text else text, "finish": reply["choices"][0].get("finish_reason"),
                "in": int(usage.get("prompt_tokens") or 0), "out": int(usage.get("completion_tokens") or 0)}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"malformed answer ({e!r}): {raw[:80]!r}") from e
