"""Cold-start data by modality bridging (Sec. 3.3.1, Fig. 2): problems with images in, Vision-R1-cold out.

DeepSeek-R1 writes good chains of thought but cannot see, so an MLLM turns the image into words in two calls:
pseudo-CoT -> detailed description -> the reasoner's chain -> filters -> word replacement -> <think> ... <answer> ...

  python cold_start.py                                     the toy, with scripted teachers, on the spot
  python cold_start.py --recipe vision-r1-cold --data problems.jsonl --mllm-url http://a:8000/v1 --reasoner-url http://b:8000/v1
  python cold_start.py stats FILE...                       Table 4: the words of self-reflection, for any such file

Keys come from the environment: MLLM_API_KEY, REASONER_API_KEY, else OPENAI_API_KEY. Every finished call goes to OUT/journal.jsonl
at once: kill the run when you like, the same command goes on and ends with the same bytes.
"""
import asyncio, base64, errno, fcntl, hashlib, json, os, random, re, shlex, sys, time, zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from data import MARK, read
from reward import is_equiv, loose_answer, unwrap

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

# ---- filters. the rules are ours, the paper says only "by rules"; each gives its evidence, something false when all is well

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

class Reject(Exception):
    """one record is left out; `again`: through no fault of its own, a later run tries it once more"""
    def __init__(self, step, rule, evidence, again=False):
        self.step, self.rule, self.evidence, self.again = step, rule, evidence, again

class Stop(Exception):
    """the run ends here with this message for a person; the journal keeps what is finished"""

def looping(text):
    """a loop compresses far better (12x) than prose (2-3x) or tables (5x): over 2,000 characters anywhere, or the whole"""
    for part in [text] + [text[i:i + 2000] for i in range(0, len(text), 1000) if len(text) > 2000]:
        if len(part) >= 400 and len(part.encode()) > 12 * len(zlib.compress(part.encode())):
            return part[-120:]

def blind(text, question):
    """it says that it sees no image, or that data are missing (unless the question itself speaks so)"""
    found = BLIND.search(text)
    return found and not BLIND.search(question) and text[max(0, found.start() - 40):found.end() + 40]

def language_mix(chain, question):
    """letters of another script in a chain whose question has none (R1 slips into Chinese)"""
    found = OTHER_SCRIPTS.findall(chain)
    return len(found) > 2 and not OTHER_SCRIPTS.search(question) and "".join(found[:40])

def choices_of(record):
    """the options of a multiple-choice problem; Mulberry has them only as lines "A: 12" of the question"""
    letters, texts = zip(*CHOICE.findall(record.problem)) if CHOICE.search(record.problem) else ((), ())
    return record.choices or (list(texts) if texts and "".join(letters) == "ABCDEFGH"[:len(letters)] else None)

def contradiction(chain, record, choices):
    """the last conclusion near the chain's end, when it is a number or a letter, is not the answer"""
    found = CONCLUSION.findall(chain[-600:])
    if found and found[-1] not in re.findall(r"-?[\d.,/]*\d|\b[A-H]\b", record.answer):
        comparable = choices or found[-1].isalpha() == bool(re.fullmatch(r"[A-H]", record.answer))
        return comparable and not is_equiv(found[-1], record.answer, choices) and f"the chain ends with {found[-1]!r}"

def checked(step, reply, question):
    """the text of a call, by the rules that hold for all three steps"""
    text = reply["text"].strip()
    for rule, evidence in (("refused", reply["finish"] == "content_filter" and (text[:200] or "content filter")), ("empty", not text and "no text"),
                           ("truncated", reply["finish"] == "length" and text[-120:]), ("looping", looping(text)), ("can't see", blind(text, question))):
        if evidence:
            raise Reject(step, rule, evidence)
    return text

def objections(config, record, chain, answer):
    """what is wrong with a chain and its answer: (rule, evidence), the weightiest first"""
    choices = choices_of(record)
    yield "format", not chain and "no closed <think> part"
    yield "format", re.search(r"</?(?:think|answer)>", chain) and "a tag within the chain"
    yield "no answer", not answer and "nothing that reads as a final answer"
    yield "wrong answer", not is_equiv(answer, record.answer, choices) and f"{answer!r}, the truth is {record.answer!r}"
    yield "contradiction", contradiction(chain, record, choices)
    yield "language mix", language_mix(chain, record.problem)
    yield "too short", len(chain) < config.min_chars and f"{len(chain)} characters"
    yield "too long", len(chain) > config.max_chars and f"{len(chain)} characters"

def split(text):
    """an answer of the reasoner -> (chain, what it says afterwards); ("", text) without a closed think part"""
    chain, _, rest = text.rpartition("</think>")
    return chain.strip().removeprefix("<think>").strip(), rest.strip()

def final_answer(text):
    """what a text says its answer is; None when it does not say"""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S) or re.findall(r"(?i)final answer[\s*]*[:：][\s*]*([^\n]+)", text)
    found = found or [loose_answer(text) or ""]  # \boxed{}
    if not found[-1]:
        found = re.findall(r"(?i)answer is[:\s*]*([^\n]+)", text) or re.findall(r"\A[^\n]{1,80}\Z", text.strip()) or [""]
    return unwrap(found[-1]) or None

# ---- the bridge: what happens to one record

def ending(image):
    """the kind of picture that these bytes are"""
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
    return next((kind for magic, kind in kinds if image.startswith(magic)), "png")

async def bridge(config, record, mllm, reasoner):
    """one record through the steps of Sec. 3.3.1 -> its response; raises Reject"""
    question = record.problem.replace(MARK, "").strip()
    try:
        images = [Path(i).read_bytes() if isinstance(i, str) else i for i in record.images]
    except FileNotFoundError as e:
        raise Reject("input", "missing image", str(e)) from e
    if not images:
        raise Reject("input", "no image", "there is nothing to bridge")
    urls = [f"data:image/{ending(i)};base64,{base64.b64encode(i).decode()}" for i in images]  # as they are, once for both calls
    seen = [{"type": "image_url", "image_url": {"url": url}} for url in urls], [hashlib.sha256(i).hexdigest() for i in images]
    pseudo_cot, draft = "", ""
    if not config.skip_pseudo_cot:  # step 1: caption and structured reasoning
        prompt = PSEUDO_COT.format(question=question, answer=record.answer)
        pseudo_cot = checked("pseudo-CoT", await mllm.ask(record, "pseudo-CoT", prompt, *seen), question)
        draft = DRAFT.format(pseudo_cot=pseudo_cot)
    description, chain, rest = pseudo_cot, re.split(r"(?i)\W*final answer\W*:", pseudo_cot)[0], pseudo_cot
    if not config.pseudo_cot_only:
        if not config.skip_description:  # step 2: every detail that the question needs
            prompt = DESCRIPTION.format(question=question) + draft
            description = checked("description", await mllm.ask(record, "description", prompt, *seen), question)
        prompt = REASON.format(description=description, question=question)  # step 3: the text-only reasoner
        chain, rest = split(checked("chain", await reasoner.ask(record, "chain", prompt), question))
    for rule, evidence in objections(config, record, chain, final_answer(rest)):  # step 4: filter, reword, wrap
        if evidence:
            raise Reject("filter", rule, evidence)
    return config.template.format(chain=as_seen(chain), answer=record.answer)  # the truth, in the form that the question asks for

# ---- teachers: servers over HTTP, or the toy's in this process

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
    """an OpenAI-compatible chat server. keep-alive HTTP/1.1 by hand: 0.1 ms of CPU a call, where the openai package takes 2 to
    4 ms and so holds hundreds of requests in flight down to 250 a second"""

    def __init__(self, name, config, journal, tally):
        self.name, self.config, self.journal, self.tally = name, config, journal, tally
        self.url, self.model = getattr(config, f"{name}_url"), getattr(config, f"{name}_model")
        self.settings = {"max_tokens": getattr(config, f"{name}_tokens"), "temperature": config.temperature, "top_p": config.top_p}
        self.key = os.environ.get(f"{name.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self.pause, self.down_until, self.given_up, self.answers, self.idle, self.at = 0.0, 0.0, 0, 0, [], urlsplit(self.url.rstrip("/"))
        if self.at.scheme not in ("http", "https") or not self.at.hostname or self.at.username or not self.model:
            raise Stop(f"--{name}-url and --{name}-model are needed: a URL like http://host:8000/v1 (no key in it) and the model's name there")

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
                tls = self.at.scheme == "https"
                reader, writer = await asyncio.open_connection(self.at.hostname, self.at.port or (443 if tls else 80), ssl=tls or None)
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

# ---- the files of a run

RELEASED = {  # the layouts of Vision-R1-cold, which LLaMA-Factory reads: LLaVA-CoT's file, and Mulberry's for all other sources
    "vision_r1_llava_cot_full": ("image", "human", "gpt"), "vision_r1_mulberry_sft_full": ("images", "user", "assistant")}

class Output:
    """kept and rejected records in the order of the input, whatever the order of arrival; the files appear when complete"""

    def __init__(self, out, records):
        self.out, self.lists, self.waiting, self.next = out, any(len(r.images) > 1 for r in records), {}, 0
        self.files = {name: open(out / f"{name}.part", "w", encoding="utf-8") for name in
                      ["cold.jsonl", "rejected.jsonl", *[f"{name}.json" for name in RELEASED]]}
        self.kept, self.lost, self.again, self.rows = 0, Counter(), 0, Counter()
        (out / "images").mkdir(exist_ok=True)

    def add(self, n, record, result):
        self.waiting[n] = (record, result)
        while self.next in self.waiting:
            self.write(*self.waiting.pop(self.next))
            self.next += 1

    def write(self, record, result):
        if isinstance(result, Reject):
            self.lost[result.step, result.rule] += 1
            self.again += result.again
            row = {"id": record.id, "step": result.step, "rule": result.rule, "evidence": result.evidence, "answer": record.answer, "source": record.source}
            self.files["rejected.jsonl"].write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        self.kept += 1
        images = [os.path.relpath(i, self.out) if isinstance(i, str) else self.save(f"{record.id}-{k}" if k else record.id, i) for k, i in enumerate(record.images)]
        rest = {"choices": record.choices, "source": record.source}
        row = {"id": record.id, "images": images, "problem": record.problem, "answer": record.answer, **rest, "response": result}
        self.files["cold.jsonl"].write(json.dumps(row, ensure_ascii=False) + "\n")
        name = list(RELEASED)["llava" not in record.source.lower()]
        key, user, assistant = RELEASED[name]
        turns = [{"from": user, "value": record.problem}, {"from": assistant, "value": result}]
        row = {"id": record.id, key: images if self.lists else images[0], "conversations": turns, **rest}
        self.files[f"{name}.json"].write((",\n" if self.rows[name] else "[\n") + json.dumps(row, ensure_ascii=False))
        self.rows[name] += 1

    def save(self, id, image):
        """encoded bytes as they are -> path relative to the output"""
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", id)[:80]
        name = f"images/{safe if safe == id else safe + '-' + hashlib.sha256(id.encode()).hexdigest()[:8]}.{ending(image)}"
        (self.out / name).write_bytes(image)
        return name

    def close(self):
        for name in self.rows:
            self.files[f"{name}.json"].write("\n]\n")
        info = {name: {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "images": RELEASED[name][0]},
                       "tags": {"role_tag": "from", "content_tag": "value", "user_tag": RELEASED[name][1], "assistant_tag": RELEASED[name][2]}} for name in self.rows}
        (self.out / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for name, file in self.files.items():
            file.close()
            os.replace(self.out / f"{name}.part", self.out / name)
        for name in set(RELEASED) - set(self.rows):
            (self.out / f"{name}.json").unlink()

    def funnel(self, total):
        """how many records are left after each step and what took the others -> a table; funnel.png"""
        left, lines, bars = total, [f"{'records':<36}{total:>9,}  100.0 %"], {"records": total}
        for step in ("input", "pseudo-CoT", "description", "chain", "filter"):
            lost = sorted(((n, rule) for (at, rule), n in self.lost.items() if at == step), reverse=True)
            left -= sum(n for n, _ in lost)
            bars[step] = left
            lines += [f"    {rule:<32}{-n:>9,}" for n, rule in lost] + [f"{'left after ' + step:<36}{left:>9,}  {100 * left / max(total, 1):5.1f} %"]
        plot(self.out / "funnel.png", lambda ax: (ax.barh(list(bars), list(bars.values())), ax.invert_yaxis(), ax.set_title("records left after each step")))
        return "\n".join(lines)

def plot(path, draw):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
    draw(ax)
    fig.savefig(path, dpi=120)
    plt.close(fig)

# ---- the run

async def run_all(config, records, mllm, reasoner, tally, output, log):
    """`concurrency` workers; each takes a record through all its steps, so that the steps of different records overlap"""
    from tqdm import tqdm

    numbered, start = iter(enumerate(records)), time.monotonic()
    bar, shown = tqdm(total=len(records), unit=" records", mininterval=1, desc="bridging"), start

    def show():
        cost = sum(p * tally[k] for p, k in zip(config.prices, ("mllm_in", "mllm_out", "reasoner_in", "reasoner_out"))) / 1e6
        row = {"seconds": round(time.monotonic() - start, 1), "done": bar.n, "records": len(records), "kept": output.kept, "cost": round(cost, 4), **tally}
        log.write(json.dumps(row) + "\n")
        log.flush()
        bar.set_postfix_str(f"in flight {tally['in_flight']}, tokens {sum(v for k, v in tally.items() if k.endswith(('_in', '_out'))):,}, "
                            f"kept {output.kept / max(output.next, 1):.0%}, ${cost:.2f} {tally['trouble']}")

    async def worker():
        nonlocal shown
        for n, record in numbered:
            try:
                result = await bridge(config, record, mllm, reasoner)
            except Reject as reject:
                result = reject
            output.add(n, record, result)
            bar.update()
            if time.monotonic() > shown + 2:  # teachers in this process never let the ticker in
                shown = time.monotonic()
                show()

    async def ticker():
        while await asyncio.sleep(10, True):
            show()

    tasks = [asyncio.create_task(work) for work in [ticker(), *[worker() for _ in range(min(config.concurrency, len(records)))]]]
    try:
        await asyncio.gather(*tasks[1:])
    finally:
        for task in tasks:
            task.cancel()
        show()
        bar.close()

def make(config):
    """the whole run, in the folder config.out"""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")  # held as long as this process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(f"another cold_start.py is writing to {out}; wait for it or give this one another --out") from None
    for name in ("done.json", "journal.jsonl", "log.jsonl", "command.txt") if config.fresh else ():
        (out / name).unlink(missing_ok=True)
    # finished before, with the same settings, code and data?
    same = [{k: v for k, v in asdict(config).items() if k not in HOW_ONLY}, Path(__file__).read_text(),
            [[os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in config.data.split(",") if os.path.isfile(f)]]
    same, done = hashlib.sha256(json.dumps(same).encode()).hexdigest(), out / "done.json"
    if done.exists() and json.loads(done.read_text())["of"] == same:
        print(f"{out / 'cold.jsonl'} is finished; --fresh starts over\n{json.loads(done.read_text())['funnel']}")
        return
    done.unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    with open(out / "command.txt", "a") as f:
        f.write(shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\n")
    if "toy" in (config.mllm_url, config.reasoner_url) or not config.data:
        import toy
    journal, tally = Journal(out / "journal.jsonl"), dict(calls=0, from_journal=0, in_flight=0, mllm_in=0, mllm_out=0, reasoner_in=0, reasoner_out=0, trouble="")
    mllm = InProcess(toy.MLLM(), tally) if config.mllm_url == "toy" else Server("mllm", config, journal, tally)
    reasoner = InProcess(toy.Reasoner(), tally) if config.reasoner_url == "toy" else Server("reasoner", config, journal, tally)
    try:
        records, problems = read(config.data or toy.ensure("cold-problems"), strict=config.strict)
    except ValueError as e:
        raise Stop(e) from e
    records = records[:config.limit or None]
    print(f"{len(records):,} records. {problems.summary()}", flush=True)
    output = Output(out, records)
    with open(out / "log.jsonl", "a") as log:
        asyncio.run(run_all(config, records, mllm, reasoner, tally, output, log))
    output.close()
    table = output.funnel(len(records))
    print(f"{table}\n{output.kept:,} records in {out / 'cold.jsonl'}")
    if output.again:
        print(f"{output.again} records had no answer from a server; the same command tries those again")
    else:
        done.write_text(json.dumps({"of": same, "funnel": table}) + "\n")

# ---- stats: Table 4

WORDS = ("Wait", "Hmm", "Mistake", "Alternatively", "Check")
TABLE_4 = {"LLaVA-CoT": (100_000, 2300, 1, 183, 251, 8332), "Mulberry": (260_000, 1122, 0, 8784, 68, 26421),
           "Vision-R1-cold": (200_000, 585_719, 75_853, 26_697, 188_187, 100_148)}

def responses(path):
    """the assistant's side of each row of a JSONL or JSON file; no image is looked at and no format asked for"""
    with open(path, encoding="utf-8") as f:
        first = f.read(1)
        f.seek(0)
        for row in json.load(f) if first == "[" else map(json.loads, f):
            turns = row.get("conversations") or row.get("messages") or [{"from": "gpt", "value": row.get("response")}]
            yield "\n".join(t.get("value", t.get("content")) or "" for t in turns if t.get("from", t.get("role")) in ("gpt", "assistant"))

def stats(files):
    """the words of self-reflection (whole words, any case), lengths and duplicates of each file, beside the paper's Table 4"""
    heads = ["records", *WORDS, *[f"{w} per record" for w in WORDS], *[f"records with {w}" for w in WORDS],
             "words: mean", "words: median", "words: 95 %", "duplicates"]
    columns, lengths = {}, {}
    for file in files:
        name = file if len(file) < 32 else "..." + file[-29:]
        count, share, seen, words = Counter(), Counter(), set(), []
        for text in filter(None, responses(file)):
            found = Counter(w.capitalize() for w in re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text, re.I))
            count.update(found)
            share.update(found.keys())
            seen.add(hashlib.md5(text.encode()).digest())
            words.append(len(text.split()))
        if not words:
            raise Stop(f"{file}: no responses in it (response, conversations or messages)")
        n, lengths[name] = len(words), sorted(words)
        columns[name] = [f"{n:,}", *[f"{count[w]:,}" for w in WORDS], *[f"{count[w] / n:.3f}" for w in WORDS], *[f"{share[w] / n:.1%}" for w in WORDS],
                         f"{sum(words) / n:.0f}", f"{lengths[name][n // 2]}", f"{lengths[name][int(0.95 * n)]}", f"{n - len(seen):,}"]
    for name, (n, *counts) in TABLE_4.items():
        columns[f"Table 4: {name}"] = [f"{n:,}", *[f"{c:,}" for c in counts], *[f"{c / n:.3f}" for c in counts], *[""] * 9]
    for head, *cells in zip(["", *heads], *([name, *column] for name, column in columns.items())):
        print(f"{head:<28}" + "".join(f"{cell:>{len(name) + 2}}" for cell, name in zip(cells, columns)))
    plot("stats.png", lambda ax: (ax.hist(list(lengths.values()), bins=40, density=True, label=list(lengths)), ax.set_xlabel("words in a response"), ax.legend()))
    print("lengths: stats.png")

def guarded(act, *args):
    """what goes wrong in a way that a person can mend ends the program with a sentence"""
    try:
        act(*args)
    except (Stop, FileNotFoundError) as stop:
        sys.exit(f"stopped: {stop}")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"stopped: the disk is full ({e}). make room and give the same command: the finished calls are kept")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the finished calls")

if __name__ == "__main__":
    if sys.argv[1:2] == ["stats"]:
        guarded(stats, sys.argv[2:] or sys.exit("usage: cold_start.py stats FILE..."))
    else:
        from run import parse_config

        guarded(make, parse_config(Config, RECIPES))
