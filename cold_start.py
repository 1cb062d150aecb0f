"""Cold-start data by modality bridging (Sec. 3.3.1, Fig. 2): problems with images in, Vision-R1-cold out.

DeepSeek-R1 writes good chains of thought but cannot see, so an MLLM turns the image into words in two calls:
pseudo-CoT -> detailed description -> the reasoner's chain -> filters -> word replacement -> <think> ... <answer> ...

  python cold_start.py                                     the toy, with scripted teachers, on the spot
  python cold_start.py --recipe vision-r1-cold --data problems.jsonl --mllm-url http://a:8000/v1 --reasoner-url http://b:8000/v1
  python cold_start.py stats FILE...                       Table 4: the words of self-reflection, for any such file

Keys come from the environment: MLLM_API_KEY, REASONER_API_KEY, else OPENAI_API_KEY. Every finished call goes to OUT/journal.jsonl
at once: kill the run when you like, the same command goes on and ends with the same bytes.
"""
import asyncio
import base64
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from data import MARK, read
from reward import is_equiv

@dataclass
class Config:
    recipe: str = "toy"             # toy | vision-r1-cold
    data: str = ""                  # problems with images and answers, any format of data.py; "" = the toy's own
    out: str = "runs/cold"          # the folder of this run
    fresh: bool = False             # forget an earlier run in `out`, its journal included
    strict: bool = False            # stop at the first bad input row instead of reporting it
    limit: int = 0                  # only the first so many records; 0 = all
    mllm_url: str = ""              # OpenAI-compatible server that sees, up to and with /v1; "toy" = the scripted teacher
    mllm_model: str = ""            # its model name
    reasoner_url: str = ""          # the same for the text-only reasoner
    reasoner_model: str = ""
    mllm_tokens: int = 4096         # longest answer of the MLLM. ours
    reasoner_tokens: int = 16384    # longest chain; the cutoff of the released SFT config
    temperature: float = 0.6        # DeepSeek-R1's model card; the paper is silent
    top_p: float = 0.95             # likewise
    concurrency: int = 256          # records in work at a time, one call each
    timeout: float = 1800.0         # seconds for one answer
    retries: int = 10               # failed answers (500, timeout, cut, malformed) after which a record is given up
    backoff: float = 1.0            # seconds before the first retry, doubled each time, at most 60
    prices: list[float] = field(default_factory=lambda: [0.0] * 4)  # $ per million tokens: MLLM in, out, reasoner in, out
    skip_pseudo_cot: bool = False   # ablation of App. B: the description is made without the pseudo-CoT
    skip_description: bool = False  # ablation: the reasoner gets the pseudo-CoT in place of the description (Fig. 5)
    pseudo_cot_only: bool = False   # a reviewer's question: the pseudo-CoT itself is the chain, no reasoner
    template: str = "<think>{chain}</think>\n<answer>Final Answer:{answer}</answer>"  # the released data's look
    min_chars: int = 100            # shorter chains are dropped. ours
    max_chars: int = 50_000         # longer ones too: they would not fit SFT's 16,384 tokens. ours

RECIPES = {
    "toy": dict(out="runs/toy/cold", mllm_url="toy", mllm_model="scripted", reasoner_url="toy", reasoner_model="scripted",
                template="<think> {chain} </think> <answer> {answer} </answer>", min_chars=20),
    "vision-r1-cold": dict(out="runs/vision-r1-cold", mllm_url="http://localhost:8000/v1", mllm_model="Qwen/Qwen2.5-VL-72B-Instruct",
                           reasoner_url="http://localhost:8001/v1", reasoner_model="deepseek-ai/DeepSeek-R1"),  # Sec. 4.1
}
HOW_ONLY = ("out", "fresh", "strict", "mllm_url", "reasoner_url", "concurrency", "timeout", "retries", "backoff", "prices")  # not what

# ---- prompts. ours; the paper shows what goes into each call (Fig. 2), not the wording

PSEUDO_COT = """Look at the image and answer the question about it.
First write a caption of the whole image. Then reason step by step: name what the question asks for, read from the image \
what is needed, and compute. The correct answer is given so that your steps lead to it; write as if you had found it yourself.
End with one line: Final Answer: <answer>

Question: {question}
Correct answer: {answer}"""

DESCRIPTION = """Write a detailed description of the image for someone who cannot see it and has to answer the question below \
from your words alone. Give every visual detail that the question needs: objects and how they lie to each other, labels, numbers, \
marks, axes, units, colours, text as written. Describe only: do not solve the question and do not state its answer.

Question: {question}"""

DRAFT = """

A draft caption and reasoning shows which details matter:
{pseudo_cot}"""

REASON = """An image is given to you in words. Follow the image description, think step by step, and answer the question directly.
End with one line: Final Answer: <answer>

Image description:
{description}

Question: {question}"""

# ---- post-processing: text about "the description" becomes text about the image (Sec. 3.3.1). ours, in this order

KIND = r"(image|picture|figure|diagram|chart|graph|photo|plot|table|map)"
REPLACEMENTS = [
    (rf"\b(?:the|a|this|that|your)(?: \w+)? descriptions? of (?:the|this|an?) {KIND}", r"the \1"),  # "the description of the figure"
    (rf"\b{KIND}(?:'s)? descriptions?\b", r"\1"),                                      # "the image description"
    (r"\b(?:detailed|textual|written|verbal|text|given|provided) (?=descriptions?\b)", r""),
    (r"\bdescription,? (?:says|states|mentions|tells (?:me|us)|reads|notes|specifies|indicates|describes)\b", r"image shows"),
    (r"\bdescription (?:said|stated|mentioned|told (?:me|us)|noted|specified|indicated|described)\b", r"image showed"),
    (r"\bread(ing)? (?:through )?(?=(?:the|this) descriptions?\b)", r"look\1 at "),
    (r"\bthe (?:user|problem|question) (?:described|describes)\b", r"the image shows"),
    (r"\ba description\b", r"an image"),
    (r"\bdescription(s?)\b", r"image\1"),
    (r"\b(?:described) (?=as\b|in\b|by\b|here\b|above\b)", r"shown "),
    (r"\b(as|is|are|was|were) described\b", r"\1 shown"),
    (r"\bthe captions?\b", r"the image"),
]
REPLACEMENTS = [(re.compile(pattern, re.I), new) for pattern, new in REPLACEMENTS]

def as_seen(chain):
    """the chain as if its writer had seen the image; a capital stays a capital"""
    def replace(match, new):
        text = match.expand(new)
        return text[:1].upper() + text[1:] if match[0][0].isupper() else text
    for pattern, new in REPLACEMENTS:
        chain = pattern.sub(lambda m: replace(m, new), chain)
    return chain

# ---- filters. each returns the evidence, "" when all is well. the rules are ours: the paper says "by rules"

BLIND = re.compile(
    r"(?:can(?:'t|not| not)|unable to|don't|do not|couldn't) (?:actually |directly )?(?:see|view|access|look at) (?:the|any|an|this) (?:\w+ )?" + KIND
    + r"|\bno " + KIND + r" (?:is|was|has been|were) (?:provided|given|attached|shown|included)"
    + r"|(?:without|don't have|do not have) (?:seeing |access to |having )?(?:the|any|an) (?:actual )?" + KIND
    + r"|(?:image|picture|figure|diagram|description|data|information)s? (?:is|are|was|were) (?:missing|not (?:provided|given|available|attached)|incomplete)"
    + r"|(?:image|description|caption) (?:doesn't|does not|didn't|did not) (?:say|state|mention|specify|provide|give|include|show|describe|tell|indicate)"
    + r"|(?:not enough|insufficient|missing) (?:information|data) to (?:answer|determine|solve|find|compute)", re.I)
OTHER_SCRIPTS = re.compile(r"[\u0400-\u04ff\u0590-\u06ff\u0900-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # not Greek: maths
CONCLUSION = re.compile(r"\b(?i:answer|option|choice)\s*(?i:is|=|:|must be|should be|has to be)\s*(?i:option\s*)?[*$(]*"
                        r"(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[A-H])(?![\w\\√π^*+/]|\.\d)")
CHOICE = re.compile(r"^\s*\(?([A-H])[:.)]\s*(.+?)\s*$", re.M)

def looping(text):
    """a loop is what compresses far better than prose (2-3x) or tables (5x): 12x, over 2,000 characters anywhere or the whole"""
    for part in [text] + [text[i:i + 2000] for i in range(0, len(text), 1000) if len(text) > 2000]:
        if len(part) >= 400 and len(part.encode()) > 12 * len(zlib.compress(part.encode())):
            return part[-120:]
    return ""

def blind(text, question):
    found = BLIND.search(text)
    return text[max(0, found.start() - 40):found.end() + 40] if found and not BLIND.search(question) else ""

def language_mix(chain, question):
    """letters of another script in a chain whose question has none (R1 slips into Chinese)"""
    found = OTHER_SCRIPTS.findall(chain)
    return "".join(found[:40]) if len(found) > 2 and not OTHER_SCRIPTS.search(question) else ""

def contradiction(chain, record, choices):
    """the last conclusion near the chain's end, when it is a number or a letter, against the ground truth"""
    found = CONCLUSION.findall(chain[-600:])
    if not found or found[-1] in re.findall(r"-?[\d.,/]*\d|\b[A-H]\b", record.answer):
        return ""
    comparable = choices or found[-1].isalpha() == (re.fullmatch(r"[A-H]", record.answer) is not None)
    return f"the chain ends with {found[-1]!r}" if comparable and not is_equiv(found[-1], record.answer, choices) else ""

def choices_of(record):
    """the options of a multiple-choice problem; Mulberry has them only as lines "A: 12" of the question"""
    found = CHOICE.findall(record.problem)
    return record.choices or ([text for _, text in found] if [x for x, _ in found] == list("ABCDEFGH")[:len(found)] and found else None)

class Reject(Exception):
    """one record is left out: Reject(step, rule, evidence); `again` when a later run should try it once more"""
    def __init__(self, step, rule, evidence, again=False):
        self.step, self.rule, self.evidence, self.again = step, rule, evidence, again

class Stop(Exception):
    """the run ends here with this message for a person; the journal keeps what is finished"""

def checked(step, reply, question):
    """the text of a call if it is usable at all: the rules that hold for all three steps"""
    text = reply["text"].strip()
    if reply["finish"] == "content_filter":
        raise Reject(step, "refused", text[:200])
    for rule, evidence in (("empty", "" if text else "no text"), ("truncated", text[-120:] if reply["finish"] == "length" else ""),
                           ("looping", looping(text)), ("can't see", blind(text, question))):
        if evidence:
            raise Reject(step, rule, evidence)
    return text

def split(text):
    """an answer of the reasoner -> (chain, what it says afterwards); (None, text) without a closed think part"""
    chain, end, rest = text.rpartition("</think>")
    return (chain.replace("<think>", "").strip(), rest.strip()) if end else (None, text)

def final_answer(text):
    """what a text says its answer is, None when it does not say"""
    for pattern in (r"<answer>(.*?)</answer>", r"final answer\W*?[::]\W*?([^\n]+)", r"(\\boxed\{.*)", r"\banswer(?: is|:)\s*([^\n]+)", r"^([^\n]{1,80})$"):
        found = re.findall(pattern, text.strip(), re.I | re.S if "<" in pattern else re.I)
        if found:
            boxed = re.search(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", found[-1])
            return re.sub(r"(?i)^final answer\s*:", "", (boxed[1] if boxed else found[-1]).strip(" *$\n")).strip().rstrip(".") or None
    return None

def filtered(config, record, chain, answer):
    """the chain and answer of one record through the filters (Sec. 3.3.1) -> the response to train on"""
    choices, question = choices_of(record), record.problem
    rules = [("format", "" if chain else "no closed <think> part"),
             ("no answer", "" if answer else "nothing that reads as a final answer"),
             ("wrong answer", "" if answer and is_equiv(answer, record.answer, choices) else f"{answer!r}, the truth is {record.answer!r}")]
    for rule, evidence in rules:
        if evidence:
            raise Reject("filter", rule, evidence)
    for rule, evidence in (("contradiction", contradiction(chain, record, choices)), ("language mix", language_mix(chain, question)),
                           ("too short", f"{len(chain)} characters" if len(chain) < config.min_chars else ""),
                           ("too long", f"{len(chain)} characters" if len(chain) > config.max_chars else ""),
                           ("tags", "a tag within the chain" if re.search(r"</?(?:think|answer)>", chain) else "")):
        if evidence:
            raise Reject("filter", rule, evidence)
    return config.template.format(chain=as_seen(chain), answer=record.answer)  # the truth in the form that the question asks for

# ---- the bridge: what happens to one record

def picture(image):
    """path or bytes -> (bytes, ending), as they are: nothing is encoded anew"""
    image = Path(image).read_bytes() if isinstance(image, str) else image
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
    return image, next((kind for magic, kind in kinds if image.startswith(magic)), "png")

async def bridge(config, record, mllm, reasoner):
    """one record through the steps of Sec. 3.3.1 -> its response; raises Reject"""
    question = record.problem.replace(MARK, "").strip()
    images = [picture(i) for i in record.images]
    digest = [hashlib.sha256(i).hexdigest() for i, _ in images]
    seen = [{"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(i).decode()}"}} for i, kind in images]
    pseudo_cot = draft = ""
    if not config.skip_pseudo_cot:  # step 1: caption and structured reasoning
        prompt = PSEUDO_COT.format(question=question, answer=record.answer)
        pseudo_cot = checked("pseudo-CoT", await mllm.ask(record, "pseudo-CoT", prompt, seen, digest), question)
        draft = DRAFT.format(pseudo_cot=pseudo_cot)
    if config.pseudo_cot_only:
        return filtered(config, record, re.split(r"(?i)\W*final answer\W*:", pseudo_cot)[0], final_answer(pseudo_cot))
    description = pseudo_cot
    if not config.skip_description:  # step 2: every detail that the question needs
        prompt = DESCRIPTION.format(question=question) + draft
        description = checked("description", await mllm.ask(record, "description", prompt, seen, digest), question)
    prompt = REASON.format(description=description, question=question)  # step 3: the text-only reasoner
    text = checked("chain", await reasoner.ask(record, "chain", prompt), question)
    chain, rest = split(text)
    return filtered(config, record, chain, final_answer(rest))  # step 4

# ---- teachers: servers over HTTP, or the toy's in this process

class Journal:
    """every finished call, one line each, written before anything is done with it. key -> place in the file of earlier runs"""

    def __init__(self, path):
        self.file, self.places, self.end = open(path, "ab", buffering=0), {}, 0
        self.reader = open(path, "rb")
        for line in self.reader:
            if not line.endswith(b"}\n"):
                break  # killed in the middle of this line: the call is made again
            self.places[line[9:41].decode()] = self.end
            self.end += len(line)
        self.file.truncate(self.end)

    def get(self, key):
        place = self.places.get(key)
        if place is None:
            return None
        self.reader.seek(place)
        return json.loads(self.reader.readline())

    def add(self, key, reply):
        line = json.dumps({"key": key, **reply}, ensure_ascii=False).encode() + b"\n"
        try:
            written = self.file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            self.file.truncate(self.end)  # not half a line
            raise
        self.end += len(line)

class InProcess:
    """the toy's scripted teacher behind the interface of Server"""
    calls, repeated, busy, tokens, trouble = 0, 0, 0, (0, 0), ""

    def __init__(self, teacher):
        self.teacher = teacher

    async def ask(self, record, step, prompt, seen=(), digest=()):
        self.calls += 1
        content = [*seen, {"type": "text", "text": prompt}]
        return {"text": self.teacher.chat([{"role": "user", "content": content}]), "finish": "stop"}

class Down(Exception):
    """nobody answers at the server's address: no record's fault"""

class Server:
    """one OpenAI-compatible chat server: retries, pauses, and tells apart what went wrong"""

    def __init__(self, name, url, model, max_tokens, config, journal, lean=None):
        self.name, self.url, self.model, self.journal, self.config = name, url.rstrip("/"), model, journal, config
        self.settings = {"max_tokens": max_tokens, "temperature": config.temperature, "top_p": config.top_p}
        self.key = os.environ.get(f"{name.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self.calls, self.repeated, self.busy, self.tokens, self.trouble = 0, 0, 0, [0, 0], ""
        self.pause, self.down_until, self.given_up, self.idle = 0.0, 0.0, 0, []
        at = urlsplit(self.url)
        if at.scheme not in ("http", "https") or not at.hostname or at.username or not model:
            raise Stop(f"--{name}-url {url!r} with --{name}-model {model!r}: a URL like http://host:8000/v1 (without a key in it) and the model's name are needed")
        self.at, self.send = at, self.send_lean
        if not (at.scheme == "http" if lean is None else lean):  # hosted: TLS, proxies and all, by the official client
            import openai

            self.client, self.send = openai.AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=config.timeout), self.send_openai

    async def ask(self, record, step, prompt, seen=(), digest=()):
        """the reply {text, finish, in, out} to one prompt with pictures, from the journal when it has it; raises Reject, Stop"""
        what = [record.id, step, self.model, self.settings, prompt, digest]
        key = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
        reply = self.journal.get(key)
        if reply is None:
            content = [*seen, {"type": "text", "text": prompt}] if seen else prompt
            self.busy += 1
            try:
                reply = await self.call(step, {"model": self.model, "messages": [{"role": "user", "content": content}], **self.settings})
            finally:
                self.busy -= 1
            self.journal.add(key, reply)
            self.calls += 1
        else:
            self.repeated += 1
        self.tokens = [self.tokens[0] + reply["in"], self.tokens[1] + reply["out"]]
        if "error" in reply:
            raise Reject(step, reply["error"], reply["text"])
        return reply

    async def call(self, step, body):
        """one answer, however long it takes. busy or down: wait for ever; failed: so many times, then the record is given up"""
        failures, wait = 0, self.config.backoff
        while True:
            while (rest := self.down_until - time.monotonic()) > 0:
                await asyncio.sleep(rest + random.random() * self.config.backoff / 10)
            try:
                status, headers, raw = await asyncio.wait_for(self.send(body), self.config.timeout)
                kind, text = verdict(status, raw)
                if kind == "ok":
                    reply, self.pause, self.given_up, self.trouble = parse_reply(raw), 0.0, 0, ""
                    return reply
            except asyncio.TimeoutError:
                kind, text, headers = "failed", f"no answer within {self.config.timeout:g} s", {}
            except (OSError, EOFError, ValueError) as e:  # cut connection, malformed answer
                kind, text, headers = "failed", f"{type(e).__name__}: {e}", {}
            except Down as e:
                kind, text, headers = "down", str(e), {}
            text = text.replace(self.key, "***")[:300]
            if kind in ("wrong key", "unknown model", "out of quota"):
                hint = {"wrong key": f"set {self.name.upper()}_API_KEY", "unknown model": f"{self.model!r} at this URL? {text}", "out of quota": text}[kind]
                raise Stop(f"{self.name} at {self.url}: {kind}: {hint}")
            if kind == "context overflow":
                return {"error": kind, "text": text, "finish": "error", "in": 0, "out": 0}
            if kind == "bad request" or kind == "failed" and failures == self.config.retries:
                self.given_up += 1
                if self.given_up == 5:
                    raise Stop(f"{self.name} at {self.url}: gave up on 5 records in a row, the last with: {text}")
                raise Reject(step, "bad request" if kind == "bad request" else "no answer", text, again=True)
            if kind == "down" and time.monotonic() >= self.down_until:
                self.pause = min(2 * self.pause or self.config.backoff, 60)
                self.down_until = time.monotonic() + self.pause
            self.trouble = f"{self.name} {kind}: {text[:80]}"
            failures += kind == "failed"
            if kind != "down":
                asked = headers.get("retry-after", "")
                await asyncio.sleep(float(asked) if re.fullmatch(r"[\d.]+", asked) else wait * (0.5 + random.random()))
                wait = min(2 * wait, 60)

    async def send_openai(self, body):
        """-> (status, headers, body) through the official client; 2-4 ms of CPU a call"""
        import openai

        try:
            answer = (await self.client.chat.completions.with_raw_response.create(**body)).http_response
        except openai.APIStatusError as e:
            answer = e.response
        except openai.APITimeoutError as e:
            raise asyncio.TimeoutError from e
        except openai.APIConnectionError as e:
            if type(e.__cause__).__name__ == "ConnectError":
                raise Down(str(e.__cause__)) from e
            raise ConnectionError(str(e.__cause__ or e)) from e
        return answer.status_code, answer.headers, answer.content

    async def send_lean(self, body):
        """the same for http://, in 0.1 ms: keep-alive HTTP/1.1 by hand, so that hundreds of fast answers need no second core"""
        reader, writer = self.idle.pop() if self.idle else (None, None)
        if reader is None or reader.at_eof():
            try:
                reader, writer = await asyncio.open_connection(self.at.hostname, self.at.port or 80, limit=1 << 20)
            except OSError as e:
                raise Down(str(e)) from e
        try:
            payload = json.dumps(body).encode()
            writer.write((f"POST {self.at.path}/chat/completions HTTP/1.1\r\nHost: {self.at.netloc}\r\nAuthorization: Bearer {self.key}\r\n"
                          f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n").encode() + payload)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            if headers.get("transfer-encoding", "").lower() == "chunked":
                raw = b""
                while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    raw += (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            elif "content-length" in headers:
                raw = await reader.readexactly(int(headers["content-length"]))
            else:
                raw, headers["connection"] = await reader.read(), "close"
            if headers.get("connection", "").lower() != "close":
                self.idle.append((reader, writer))
                writer = None
            return int(first.split()[1]), headers, raw
        finally:
            if writer is not None:
                writer.close()

def verdict(status, raw):
    """-> (what an HTTP answer means, its text)"""
    text = raw.decode("utf-8", "replace") if status != 200 else ""
    if status in (401, 403):
        return "wrong key", text
    if status == 404:
        return "unknown model", text
    if status == 429:
        return ("out of quota" if re.search("insufficient_quota|billing", text) else "busy"), text
    if status in (502, 503, 504):
        return "down", text
    if status in (400, 413, 422):
        return ("context overflow" if status == 413 or re.search(r"context.{0,40}(length|window)|max.{0,20}(length|len\b)|too (long|large)", text, re.I) else "bad request"), text
    return ("ok" if status == 200 else "failed"), f"status {status} {text}"

def parse_reply(raw):
    """a chat completion -> {text, finish, in, out}; reasoning_content comes back as <think> tags. ValueError when malformed"""
    try:
        reply = json.loads(raw)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"].get("content") or ""
        thought = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
        if thought and "</think>" not in text:
            text = f"<think>{thought}</think>{text}"
        return {"text": text, "finish": choice.get("finish_reason") or "stop", "in": int(usage.get("prompt_tokens") or 0),
                "out": int(usage.get("completion_tokens") or 0)}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"malformed answer ({e!r}): {raw[:80]!r}") from e

# ---- the files of a run

class Output:
    """kept and rejected records in the order of the input, whatever the order of arrival; the files appear when complete"""

    def __init__(self, out, lists):
        self.out, self.lists, self.waiting, self.next = out, lists, {}, 0
        self.names = {"kept": "cold.jsonl", "rejected": "rejected.jsonl", "llava": "vision_r1_llava_cot_full.json", "other": "vision_r1_mulberry_sft_full.json"}
        self.files = {k: open(out / f"{name}.part", "w", encoding="utf-8") for k, name in self.names.items()}
        self.count, self.passed, self.lost = Counter(), Counter(), Counter()

    def add(self, n, record, result):
        self.waiting[n] = (record, result)
        while self.next in self.waiting:
            self.write(*self.waiting.pop(self.next))
            self.next += 1

    def write(self, record, result):
        if isinstance(result, Reject):
            self.lost[result.step, result.rule] += 1
            row = {"id": record.id, "step": result.step, "rule": result.rule, "evidence": result.evidence, "source": record.source, "answer": record.answer}
            self.files["rejected"].write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        images = [os.path.relpath(i, self.out) if isinstance(i, str) else self.save(record.id, i) for i in record.images]
        row = {"id": record.id, "images": images, "problem": record.problem, "answer": record.answer, "choices": record.choices,
               "source": record.source, "response": result}
        self.count["kept"] += 1
        self.files["kept"].write(json.dumps(row, ensure_ascii=False) + "\n")
        # the released layouts: LLaVA-CoT's as human/gpt with `image`, Mulberry's (and any other) as user/assistant with `images`
        file, key, role, who, text = ("llava", "image", "from", ("human", "gpt"), "value") if "llava" in record.source.lower() else (
            "other", "images", "from", ("user", "assistant"), "value")
        turns = [{role: who[0], text: record.problem}, {role: who[1], text: result}]
        row = {"id": record.id, key: images if self.lists else images[0], "conversations": turns, "choices": record.choices, "source": record.source}
        self.files[file].write(("[\n" if not self.count[file] else ",\n") + json.dumps(row, ensure_ascii=False))
        self.count[file] += 1

    def save(self, id, image):
        """encoded bytes as they are -> path relative to the output"""
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", id)[:80]
        name = f"images/{safe}{'' if safe == id else '-' + hashlib.sha256(id.encode()).hexdigest()[:8]}.{picture(image)[1]}"
        (self.out / name).write_bytes(image)
        return name

# ---- the run

def funnel(out, total, output):
    """how many records are left after each step, and what took the others: a table -> text, a picture -> funnel.png"""
    left, names, lefts, lines = total, ["records"], [total], [f"{'records':<34}{total:>9,}   100.0 %"]
    for step in ("pseudo-CoT", "description", "chain", "filter"):
        lost = {rule: n for (at, rule), n in output.lost.items() if at == step}
        left -= sum(lost.values())
        lines += [f"    - {rule:<28}{-n:>9,}" for rule, n in sorted(lost.items(), key=lambda x: -x[1])]
        lines.append(f"{'after ' + step:<34}{left:>9,}  {100 * left / max(total, 1):>6.1f} %")
        names, lefts = [*names, step], [*lefts, left]
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    ax.bar_label(ax.barh(names, lefts, color="#4477aa"), [f"{n:,} ({n / max(total, 1):.0%})" for n in lefts], padding=3)
    ax.set(title="records left after each step", xlim=(0, 1.25 * max(total, 1)))
    ax.invert_yaxis()
    fig.savefig(out / "funnel.png", dpi=120, metadata={"Software": None})
    plt.close(fig)
    return "\n".join(lines)

async def run_all(config, records, teachers, output, log):
    """`concurrency` workers; each takes a record through all its steps, so that the steps of different records overlap"""
    from tqdm import tqdm

    numbered, start, last, mllm, reasoner = iter(enumerate(records)), time.monotonic(), [0.0], *teachers
    bar = tqdm(total=len(records), unit="rec", mininterval=1, desc="bridging")

    def show(force=False):
        now = time.monotonic() - start
        if now - last[0] < 2 and not force:
            return
        last[0], done = now, bar.n
        cost = sum(p * t for p, t in zip(config.prices, [*mllm.tokens, *reasoner.tokens])) / 1e6
        row = {"seconds": round(now, 1), "done": done, "records": len(records), "kept": output.count["kept"], "in_flight": mllm.busy + reasoner.busy,
               "calls": mllm.calls + reasoner.calls, "from_journal": mllm.repeated + reasoner.repeated, "tokens_in": mllm.tokens[0] + reasoner.tokens[0],
               "tokens_out": mllm.tokens[1] + reasoner.tokens[1], "cost": round(cost, 4), "trouble": mllm.trouble or reasoner.trouble}
        log.write(json.dumps(row) + "\n")
        log.flush()
        bar.set_postfix_str(f"in flight {row['in_flight']}, tokens {row['tokens_in'] + row['tokens_out']:,}, kept {row['kept'] / max(output.next, 1):.0%}, "
                            f"${cost:.2f} {row['trouble']}")

    async def worker():
        for n, record in numbered:
            try:
                result = await bridge(config, record, mllm, reasoner)
            except Reject as reject:
                result = reject
            output.add(n, record, result)
            bar.update()
            show()

    async def ticker():
        while True:
            await asyncio.sleep(2)
            show()

    tasks = [asyncio.create_task(worker()) for _ in range(min(config.concurrency, len(records)))]
    tick = asyncio.create_task(ticker())
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in [*tasks, tick]:
            task.cancel()
        show(force=True)
        bar.close()

def make(config):
    """the whole run, in the folder config.out"""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(f"another cold_start.py is writing to {out}; wait for it or give this one another --out") from None
    if config.fresh:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink() if path.name != "lock" else None
    # finished before? the same settings, prompts, rules and data
    what = [{k: v for k, v in asdict(config).items() if k not in HOW_ONLY}, PSEUDO_COT, DESCRIPTION, DRAFT, REASON, [(p.pattern, n) for p, n in REPLACEMENTS]]
    what += [[os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in config.data.split(",") if os.path.isfile(f)]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    done = out / "done.json"
    if done.exists() and json.loads(done.read_text())["fingerprint"] == fingerprint:
        print(f"{out / 'cold.jsonl'} is finished; --fresh starts over\n{json.loads(done.read_text())['funnel']}")
        return
    done.unlink(missing_ok=True)
    from run import command_line

    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    with open(out / "command.txt", "a") as f:
        f.write(command_line() + "\n")
    teachers, data, journal = [], config.data, Journal(out / "journal.jsonl")
    if "toy" in (config.mllm_url, config.reasoner_url) or not data:
        import toy
    for name in ("mllm", "reasoner"):
        url, model, tokens = (getattr(config, f"{name}_{x}") for x in ("url", "model", "tokens"))
        teachers.append(InProcess(toy.MLLM() if name == "mllm" else toy.Reasoner()) if url == "toy" else Server(name, url, model, tokens, config, journal))
    records, problems = read(data or toy.ensure("cold-problems"), strict=config.strict)
    print(problems.summary() or f"{len(records):,} records, no problem in the data")
    records = records[:config.limit or None]
    if any(not r.images for r in records):
        print(f"{sum(not r.images for r in records)} records have no image and are left out")
        records = [r for r in records if r.images]
    (out / "images").mkdir(exist_ok=True)
    output = Output(out, lists=any(len(r.images) > 1 for r in records))
    with open(out / "log.jsonl", "a") as log:
        asyncio.run(run_all(config, records, teachers, output, log))
    output.close()
    table = funnel(out, len(records), output)
    print(f"{table}\n{output.count['kept']:,} records in {out / 'cold.jsonl'}")
    if output.again:
        print(f"{output.again} records got no answer from a server; the same command tries those again")
    else:
        done.write_text(json.dumps({"fingerprint": fingerprint, "funnel": table}) + "\n")

# ---- stats: Table 4

WORDS = ("Wait", "Hmm", "Mistake", "Alternatively", "Check")
TABLE_4 = {"LLaVA-CoT 100K": (100_000, 2300, 1, 183, 251, 8332), "Mulberry 260K": (260_000, 1122, 0, 8784, 68, 26421),
           "Vision-R1-cold 200K": (200_000, 585_719, 75_853, 26_697, 188_187, 100_148)}

def responses(path):
    """the answers in a file as (response or turns of the assistant) texts; no image is looked at, no format is asked for"""
    with open(path, encoding="utf-8") as f:
        rows = json.load(f) if f.read(1) == "[" and not f.seek(0) else (f.seek(0), map(json.loads, f))[1]
        for row in rows:
            turns = row.get("conversations") or row.get("messages")
            if turns:
                yield "\n".join(t.get("value", t.get("content")) for t in turns if t.get("from", t.get("role")) in ("gpt", "assistant"))
            elif row.get("response"):
                yield row["response"]

def stats(files, png):
    """reflection words, lengths and duplicates of each file, beside the paper's Table 4. counted: whole words, any case"""
    columns, lengths = {}, {}
    for file in files:
        count, share, seen, n = Counter(), Counter(), set(), 0
        words = lengths[file] = []
        for text in responses(file):
            found = Counter(w.lower() for w in re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text, re.I))
            count.update(found)
            share.update(found.keys())
            seen.add(hashlib.md5(text.encode()).digest())
            words.append(len(text.split()))
            n += 1
        if not n:
            raise Stop(f"{file}: no responses in it (response, conversations or messages)")
        middle = sorted(words)
        columns[file] = [f"{n:,}", *[f"{count[w.lower()]:,} ({share[w.lower()] / n:.0%})" for w in WORDS],
                         *[f"{count[w.lower()] / n:.3f}" for w in WORDS], f"{sum(words) / n:.0f}", f"{middle[n // 2]}", f"{middle[int(0.95 * n)]}", f"{n - len(seen):,}"]
    for name, (n, *counts) in TABLE_4.items():
        columns[f"paper: {name}"] = [f"{n:,}", *[f"{c:,}" for c in counts], *[f"{c / n:.3f}" for c in counts], "", "", "", ""]
    heads = ["records", *[f"{w} (share of records)" for w in WORDS], *[f"{w} per record" for w in WORDS], "words: mean", "words: median", "words: 95 %", "duplicates"]
    width = {name: max(len(name), *map(len, column)) + 2 for name, column in columns.items()}
    print(" " * 32 + "".join(f"{name:>{width[name]}}" for name in columns))
    for i, head in enumerate(heads):
        print(f"{head:<32}" + "".join(f"{column[i]:>{width[name]}}" for name, column in columns.items()))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    ax.hist(list(lengths.values()), bins=40, label=list(lengths), density=True)
    ax.set(xlabel="words in a response", ylabel="share", title="lengths")
    ax.legend()
    fig.savefig(png, dpi=120)
    print(f"histogram: {png}")

def main():
    try:
        if sys.argv[1:2] == ["stats"]:
            import argparse

            parser = argparse.ArgumentParser(prog="cold_start.py stats", description=stats.__doc__)
            parser.add_argument("files", nargs="+", metavar="FILE")
            parser.add_argument("--png", default="stats.png", help="where the histogram of lengths goes")
            args = parser.parse_args(sys.argv[2:])
            stats(args.files, args.png)
        else:
            from run import parse_config

            make(parse_config(Config, RECIPES))
    except Stop as stop:
        sys.exit(f"stopped: {stop}")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"stopped: the disk is full ({e}). make room and run the same command: the finished calls are kept")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the finished calls")

if __name__ == "__main__":
    main()
