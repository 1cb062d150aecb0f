"""Cold-start data by modality bridging (Sec. 3.3.1, Fig. 2): problems with images in, Vision-R1-cold out.

DeepSeek-R1 writes good chains of thought but cannot see, so an MLLM turns the image into words in two calls:
pseudo-CoT -> detailed description -> the reasoner's chain -> filters -> word replacement -> <think> ... <answer> ...

  python cold_start.py                                     the toy, with scripted teachers, on the spot
  python cold_start.py --recipe vision-r1-cold --data problems.jsonl --mllm-url http://a:8000/v1 --reasoner-url http://b:8000/v1
  python cold_start.py stats FILE...                       Table 4: the words of self-reflection, for any such file
  python cold_start.py decontaminate TRAIN --against EVAL...   the training data without the problems of evaluation sets

Keys come from the environment: MLLM_API_KEY, REASONER_API_KEY, else OPENAI_API_KEY. Every finished call goes to OUT/journal.jsonl
at once: kill the run when you like, the same command goes on and ends with the same bytes.
"""

import asyncio
import base64
import errno
import fcntl
import gc
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from nano.data import MARK, Problems, stream
from nano.teachers import Journal, Reject, Server, Stop
from reward import is_equiv, loose_answer, unwrap


@dataclass
class Config:
    recipe: str = "toy"  # toy | vision-r1-cold
    data: str = ""  # problems with images and answers, any format of data.py; toy:NAME = the toy's, made if missing
    out: str = "runs/cold"  # the folder of this run
    fresh: bool = False  # forget an earlier run in `out`, its journal included
    strict: bool = False  # stop at the first bad input row instead of reporting it
    limit: int = 0  # only the first so many records; 0 = all
    mllm_url: str = ""  # OpenAI-compatible server that sees, up to and with /v1; toy:teachers = scripted ones, started for this run
    mllm_model: str = ""  # its model name
    reasoner_url: str = ""  # the same for the text-only reasoner
    reasoner_model: str = ""
    mllm_tokens: int = 4096  # longest answer of the MLLM. ours
    reasoner_tokens: int = 16384  # longest chain; the cutoff of the released SFT config
    temperature: float = 0.6  # DeepSeek-R1's model card; the paper is silent
    top_p: float = 0.95  # likewise
    concurrency: int = 256  # records in work at a time, one call each
    timeout: float = 1800.0  # seconds for one answer
    retries: int = (
        10  # failed answers (500, timeout, cut, malformed) after which a record is given up
    )
    backoff: float = 1.0  # seconds before the first retry, doubled each time, at most 60
    prices: list[float] = field(
        default_factory=lambda: [0.0] * 4
    )  # $ per million tokens: MLLM in, out, reasoner in, out
    skip_pseudo_cot: bool = (
        False  # ablation of App. B: the description is made without the pseudo-CoT
    )
    skip_description: bool = (
        False  # ablation: the reasoner gets the pseudo-CoT in place of the description (Fig. 5)
    )
    pseudo_cot_only: bool = (
        False  # a reviewer's question: the pseudo-CoT itself is the chain, no reasoner
    )
    template: str = (
        "<think>{chain}</think>\n<answer>Final Answer:{answer}</answer>"  # the released data's look
    )
    min_chars: int = 100  # shorter chains are dropped. ours
    max_chars: int = 50_000  # longer ones too: they would not fit SFT's 16,384 tokens. ours


RECIPES = {
    "toy": dict(
        out="runs/toy/cold",
        data="toy:cold-problems",
        mllm_url="toy:teachers",
        mllm_model="toy-mllm",
        reasoner_url="toy:teachers",
        reasoner_model="toy-reasoner",
        template="<think> {chain} </think> <answer> {answer} </answer>",
        min_chars=20,
    ),
    "vision-r1-cold": dict(
        out="runs/vision-r1-cold",
        mllm_url="http://localhost:8000/v1",
        mllm_model="Qwen/Qwen2.5-VL-72B-Instruct",
        reasoner_url="http://localhost:8001/v1",
        reasoner_model="deepseek-ai/DeepSeek-R1",
    ),  # Sec. 4.1
}
HOW_ONLY = (
    "out",
    "fresh",
    "strict",
    "mllm_url",
    "reasoner_url",
    "concurrency",
    "timeout",
    "retries",
    "backoff",
    "prices",
)  # not what

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
    (guard, re.compile(pattern, re.I), new)
    for guard, pattern, new in [  # the guard: what `plain` text has wherever the pattern matches
        (
            "description of ",
            rf"\b(?:the|a|this|that|your)(?: \w+)? descriptions? of (?:the|this|an?) {KIND}",
            r"the \1",
        ),  # "the description of the figure"
        (" description", rf"\b{KIND}(?:'s)? descriptions?\b", r"\1"),  # "the image description"
        (
            " description",
            r"\b(?:detailed|textual|written|verbal|text|given|provided) (?=descriptions?\b)",
            r"",
        ),
        (
            "description",
            r"\bdescription,? (?:says|states|mentions|tells (?:me|us)|reads|notes|specifies|indicates|describes)\b",
            r"image shows",
        ),
        (
            "description",
            r"\bdescription (?:said|stated|mentioned|told (?:me|us)|noted|specified|indicated|described)\b",
            r"image showed",
        ),
        ("read", r"\bread(ing)? (?:through )?(?=(?:the|this) descriptions?\b)", r"look\1 at "),
        (
            "describe",
            r"\bthe (?:user|problem|question) (?:described|describes)\b",
            r"the image shows",
        ),
        ("a description", r"\ba description\b", r"an image"),
        ("description", r"\bdescription(s?)\b", r"image\1"),
        ("described", r"\b(?:described) (?=as\b|in\b|by\b|here\b|above\b)", r"shown "),
        ("described", r"\b(as|is|are|was|were) described\b", r"\1 shown"),
        ("caption", r"\bthe captions?\b", r"the image"),
    ]
]


def plain(sentence):
    """what guards look at. " description" with its space is now one that no "the" precedes: most follow a "the", which some patterns cannot"""
    return (
        sentence.lower()
        .replace("descriptions", "description")
        .replace("the description", "the_description")
    )


def as_seen(chain):
    """the chain as if its writer had seen the image; a capital stays a capital"""

    def say(new, m):
        said = new.replace(r"\1", m[1] or "") if m.re.groups else new
        return said[:1].upper() + said[1:] if m[0][0].isupper() else said

    sentences = chain.split(
        "."
    )  # no rule reaches beyond one. a word is found in microseconds, a pattern in hundreds of them
    for i, sentence in enumerate(sentences):
        if "descri" in (low := sentence.lower()) or "caption" in low:
            low = plain(sentence)
            for guard, pattern, new in REPLACEMENTS:
                if guard in low:
                    sentence = pattern.sub(partial(say, new), sentence)
                    low = plain(sentence)
            sentences[i] = sentence
    return ".".join(sentences)


# ---- filters. the rules are ours, the paper says only "by rules"; each gives its evidence, something false when all is well

BLIND = re.compile(
    r"(?:can(?:'t|not| not)|unable to|don't|do not|couldn't) (?:actually |directly )?(?:see|view|access|look at) (?:the|any|an|this) (?:\w+ )?"
    + KIND
    + r"|\bno "
    + KIND
    + r" (?:is|was|has been|were) (?:provided|given|attached|shown|included)"
    + r"|(?:without|don't have|do not have) (?:seeing |access to |having )?(?:the|any|an) (?:actual )?"
    + KIND
    + r"|(?:image|picture|figure|diagram|description|data|information)s? (?:is|are|was|were) (?:missing|not (?:provided|given|available|attached)|incomplete)"
    + r"|(?:image|description|caption) (?:doesn't|does not|didn't|did not) (?:say|state|mention|specify|provide|give|include|show|describe|tell|indicate)"
    + r"|(?:not enough|insufficient|missing) (?:information|data) to (?:answer|determine|solve|find|compute)"
)  # for small letters: re.I takes five times as long
DENIALS = (
    "not ",
    "n't ",
    "unable ",
    "no ",
    "without ",
    "missing",
    "incomplete",
    "insufficient ",
)  # every way through BLIND has one of them
OTHER_SCRIPTS = re.compile(
    r"[\u0400-\u04ff\u0590-\u06ff\u0900-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)  # not Greek: maths
CONCLUSION = re.compile(
    r"\b(?i:answer|option|choice)\s*(?i:is|=|:|must be|should be|has to be)\s*(?i:option\s*)?[*$(]*"
    r"(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[A-H])(?![\w\\√π^*+/]|\.\d)"
)
CHOICE = re.compile(r"^\s*\(?([A-H])[:.)]\s*(.+?)\s*$", re.M)


def looping(text):
    """a loop compresses far better (12x) than prose (2-3x) or tables (5x): over 2,000 characters anywhere, or the whole"""
    for part in [text] + [
        text[i : i + 2000] for i in range(0, len(text), 1000) if len(text) > 2000
    ]:
        if len(part) >= 400 and len(raw := part.encode()) > 12 * len(
            zlib.compress(raw, 1)
        ):  # level 1: the fastest, and as telling
            return part[-120:]


def blind(text, question):
    """it says that it sees no image, or that data are missing (unless the question itself speaks so)"""
    low = text.lower().replace("\u2019", "'")
    for word in DENIALS:  # guards, as above
        at = low.find(word)
        while at >= 0:
            start, end = (
                low.rfind(".", 0, at) + 1,
                low.find(".", at) % (len(low) + 1),
            )  # of this sentence, the last one too
            if found := BLIND.search(low, start, end):
                return (
                    not BLIND.search(question.lower())
                    and text[max(0, found.start() - 40) : found.end() + 40]
                )
            at = low.find(word, end)


def language_mix(chain, question):
    """letters of another script in a chain whose question has none (R1 slips into Chinese)"""
    found = not chain.isascii() and OTHER_SCRIPTS.findall(chain)
    return found and len(found) > 2 and not OTHER_SCRIPTS.search(question) and "".join(found[:40])


def choices_of(record):
    """the options of a multiple-choice problem; Mulberry has them only as lines "A: 12" of the question"""
    letters, texts = (
        zip(*CHOICE.findall(record.problem)) if CHOICE.search(record.problem) else ((), ())
    )
    return record.choices or (
        list(texts) if texts and "".join(letters) == "ABCDEFGH"[: len(letters)] else None
    )


def contradiction(chain, record, choices):
    """the last conclusion near the chain's end, when it is a number or a letter, is not the answer"""
    end = chain[-600:]
    found = any(
        word in end.lower() for word in ("answer", "option", "choice")
    ) and CONCLUSION.findall(end)  # guards, as above
    if found and found[-1] not in re.findall(r"-?[\d.,/]*\d|\b[A-H]\b", record.answer):
        comparable = choices or found[-1].isalpha() == bool(re.fullmatch(r"[A-H]", record.answer))
        return (
            comparable
            and not is_equiv(found[-1], record.answer, choices)
            and f"the chain ends with {found[-1]!r}"
        )


def checked(step, reply, question):
    """the text of a call, by the rules that hold for all three steps"""
    text = reply["text"].strip()
    for rule, evidence in (
        ("refused", reply["finish"] == "content_filter" and (text[:200] or "content filter")),
        ("empty", not text and "no text"),
        ("truncated", reply["finish"] == "length" and text[-120:]),
        ("looping", looping(text)),
        ("can't see", blind(text, question)),
    ):
        if evidence:
            raise Reject(step, rule, evidence)
    return text


def objections(config, record, chain, answer):
    """what is wrong with a chain and its answer: (rule, evidence), the weightiest first"""
    choices = choices_of(record)
    yield "format", not chain and "no closed <think> part"
    yield "format", re.search(r"</?(?:think|answer)>", chain) and "a tag within the chain"
    yield "no answer", not answer and "nothing that reads as a final answer"
    yield (
        "wrong answer",
        not is_equiv(answer, record.answer, choices)
        and f"{answer!r}, the truth is {record.answer!r}",
    )
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
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S) or re.findall(
        r"(?i)final answer[\s*]*[:：][\s*]*([^\n]+)", text
    )
    found = found or [loose_answer(text) or ""]  # \boxed{}
    if not found[-1]:
        found = (
            re.findall(r"(?i)answer is[:\s*]*([^\n]+)", text)
            or re.findall(r"\A[^\n]{1,80}\Z", text.strip())
            or [""]
        )
    return unwrap(found[-1]) or None


# ---- the bridge: what happens to one record


def ending(image):
    """the kind of picture that these bytes are"""
    kinds = (
        (b"\x89PNG", "png"),
        (b"\xff\xd8", "jpeg"),
        (b"GIF8", "gif"),
        (b"RIFF", "webp"),
        (b"BM", "bmp"),
    )
    return next((kind for magic, kind in kinds if image.startswith(magic)), "png")


async def bridge(config, record, mllm, reasoner):
    """one record through the calls of Sec. 3.3.1 -> the reasoner's reply, or else the pseudo-CoT; raises Reject"""
    question = record.problem.replace(MARK, "").strip()
    try:
        images = [Path(i).read_bytes() for i in record.images]
    except FileNotFoundError as e:
        raise Reject("input", "missing image", str(e)) from e
    if not images:
        raise Reject("input", "no image", "there is nothing to bridge")
    seen = b"".join(
        b'{"type": "image_url", "image_url": {"url": "data:image/%s;base64,%s"}}, '
        % (ending(i).encode(), base64.b64encode(i))
        for i in images
    )
    seen = (
        seen,
        hashlib.sha256(seen).digest(),
    )  # the pictures' bytes as they are, encoded once for both calls
    pseudo_cot, draft = "", ""
    if not config.skip_pseudo_cot:  # step 1: caption and structured reasoning
        prompt = PSEUDO_COT.format(question=question, answer=record.answer)
        pseudo_cot = checked(
            "pseudo-CoT", await mllm.ask(record, "pseudo-CoT", prompt, *seen), question
        )
        draft = DRAFT.format(pseudo_cot=pseudo_cot)
    description = pseudo_cot
    if config.pseudo_cot_only:
        return pseudo_cot
    if not config.skip_description:  # step 2: every detail that the question needs
        prompt = DESCRIPTION.format(question=question) + draft
        description = checked(
            "description", await mllm.ask(record, "description", prompt, *seen), question
        )
    return await reasoner.ask(
        record, "chain", REASON.format(description=description, question=question)
    )  # step 3: the text-only reasoner


def finish(config, record, reply):
    """step 4: filter, reword, wrap -> the record's response; raises Reject"""
    chain, rest = (
        (re.split(r"(?i)\W*final answer\W*:", reply)[0], reply)
        if config.pseudo_cot_only
        else split(checked("chain", reply, record.problem))
    )
    for rule, evidence in objections(config, record, chain, final_answer(rest)):
        if evidence:
            raise Reject("filter", rule, evidence)
    return config.template.format(
        chain=as_seen(chain), answer=record.answer
    )  # the truth, in the form that the question asks for


# ---- the files of a run

RELEASED = {  # the layouts of Vision-R1-cold, which LLaMA-Factory reads: LLaVA-CoT's file, and Mulberry's for all other sources
    "vision_r1_llava_cot_full": ("image", "human", "gpt"),
    "vision_r1_mulberry_sft_full": ("images", "user", "assistant"),
}


def load(config, out):
    """the records, and what was wrong with the others. pictures that came as bytes (parquet) wait in a folder: memory would not hold them all"""
    for folder in ("waiting", "images"):
        (out / folder).mkdir(exist_ok=True)
    records, problems = [], Problems(config.strict)
    for _, _, record in stream(config.data, problems):
        record.images = [
            i if isinstance(i, str) else save(out, f"{record.id}-{k}" if k else record.id, i)
            for k, i in enumerate(record.images)
        ]
        records.append(record)
        if len(records) == config.limit:
            break
    return records, problems


def save(out, id, image):
    """encoded bytes as they are -> path"""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", id)[:80]
    path = (
        out
        / "waiting"
        / f"{safe if safe == id else safe + '-' + hashlib.sha256(id.encode()).hexdigest()[:8]}.{ending(image)}"
    )
    path.write_bytes(image)
    return str(path)


class Output:
    """kept and rejected records in the order of the input, whatever the order of arrival; the files appear when complete"""

    def __init__(self, out, records):
        self.out, self.waits, self.lists, self.waiting, self.next = (
            out,
            str(out / "waiting"),
            any(len(r.images) > 1 for r in records),
            {},
            0,
        )
        self.files = {
            name: open(out / f"{name}.part", "w", encoding="utf-8")
            for name in ["cold.jsonl", "rejected.jsonl", *[f"{name}.json" for name in RELEASED]]
        }
        self.kept, self.lost, self.again, self.rows = 0, Counter(), 0, Counter()

    def add(self, n, record, result):
        self.waiting[n] = (record, result)
        while self.next in self.waiting:
            self.write(*self.waiting.pop(self.next))
            self.next += 1

    def write(self, record, result):
        if isinstance(result, Reject):
            self.lost[result.step, result.rule] += 1
            self.again += result.again
            for image in record.images:
                if os.path.dirname(image) == self.waits and os.path.exists(image):
                    os.unlink(image)
            row = {
                "id": record.id,
                "step": result.step,
                "rule": result.rule,
                "evidence": result.evidence,
                "answer": record.answer,
                "source": record.source,
            }
            self.files["rejected.jsonl"].write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        self.kept += 1
        images = [self.place(i) for i in record.images]
        rest = {"choices": record.choices, "source": record.source}
        row = {
            "id": record.id,
            "images": images,
            "problem": record.problem,
            "answer": record.answer,
            **rest,
            "response": result,
        }
        self.files["cold.jsonl"].write(json.dumps(row, ensure_ascii=False) + "\n")
        name = list(RELEASED)["llava" not in record.source.lower()]
        key, user, assistant = RELEASED[name]
        turns = [{"from": user, "value": record.problem}, {"from": assistant, "value": result}]
        row = {
            "id": record.id,
            key: images if self.lists else images[0],
            "conversations": turns,
            **rest,
        }
        self.files[f"{name}.json"].write(
            (",\n" if self.rows[name] else "[\n") + json.dumps(row, ensure_ascii=False)
        )
        self.rows[name] += 1

    def place(self, image):
        """where a picture is when the run is complete, relative to the output: one that waits in images/, others where they are"""
        folder, name = os.path.split(image)
        return f"images/{name}" if folder == self.waits else os.path.relpath(image, self.out)

    def close(self):
        try:
            os.replace(
                self.waits, self.out / "images"
            )  # the whole folder at once, in place of an empty one
        except OSError:  # an earlier run's pictures are there: one after the other
            shutil.copytree(
                self.waits, self.out / "images", copy_function=os.replace, dirs_exist_ok=True
            )
            shutil.rmtree(self.waits)
        for name in self.rows:
            self.files[f"{name}.json"].write("\n]\n")
        info = {
            name: {
                "file_name": f"{name}.json",
                "formatting": "sharegpt",
                "columns": {"messages": "conversations", "images": RELEASED[name][0]},
                "tags": {
                    "role_tag": "from",
                    "content_tag": "value",
                    "user_tag": RELEASED[name][1],
                    "assistant_tag": RELEASED[name][2],
                },
            }
            for name in self.rows
        }
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
            lost = sorted(
                ((n, rule) for (at, rule), n in self.lost.items() if at == step), reverse=True
            )
            left -= sum(n for n, _ in lost)
            bars[step] = left
            lines += [f"    {rule:<32}{-n:>9,}" for n, rule in lost] + [
                f"{'left after ' + step:<36}{left:>9,}  {100 * left / max(total, 1):5.1f} %"
            ]
        plot(
            self.out / "funnel.png",
            lambda ax: (
                ax.bar_label(ax.barh(list(bars), list(bars.values()))),
                ax.invert_yaxis(),
                ax.set_title("records left after each step"),
            ),
        )
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
    """`concurrency` workers; each takes a record through all its calls, so that the steps of different records overlap"""
    from tqdm import tqdm

    numbered, start, cpu = iter(enumerate(records)), time.monotonic(), time.process_time()
    answered = asyncio.Queue(
        config.concurrency
    )  # bounded: from the journal answers come faster than they are filtered
    bar = tqdm(total=len(records), unit=" records", mininterval=1, desc="bridging")

    def show():
        cost = (
            sum(
                p * tally[k]
                for p, k in zip(
                    config.prices, ("mllm_in", "mllm_out", "reasoner_in", "reasoner_out")
                )
            )
            / 1e6
        )
        row = {
            "seconds": round(time.monotonic() - start, 2),
            "cpu": round(time.process_time() - cpu, 2),
            "done": bar.n,
            "records": len(records),
            "kept": output.kept,
            "cost": round(cost, 4),
            **tally,
        }
        log.write(json.dumps(row) + "\n")
        log.flush()
        bar.set_postfix_str(
            f"in flight {tally['in_flight']}, tokens {sum(v for k, v in tally.items() if k.endswith(('_in', '_out'))):,}, "
            f"kept {output.kept / max(output.next, 1):.0%}, ${cost:.2f} {tally['trouble']}"
        )

    async def worker():
        for n, record in numbered:
            try:
                reply = await bridge(config, record, mllm, reasoner)
            except Reject as reject:
                reply = reject
            await answered.put((n, record, reply))

    async def finisher():  # the filters can wait until the worker's next question is on its way
        for _ in records:
            n, record, result = await answered.get()
            try:
                result = result if isinstance(result, Reject) else finish(config, record, result)
            except Reject as reject:
                result = reject
            output.add(n, record, result)
            bar.update()

    async def ticker():
        while await asyncio.sleep(2, True):
            show()

    tasks = [
        asyncio.create_task(work)
        for work in [
            ticker(),
            finisher(),
            *[worker() for _ in range(min(config.concurrency, len(records)))],
        ]
    ]
    try:
        await asyncio.gather(*tasks[1:])
    finally:
        for task in tasks:
            task.cancel()
        show()
        bar.close()


def make(config):
    """the whole run, in the folder config.out"""
    if not config.data:
        raise Stop(
            "--data is needed: the problems to bridge, with images and answers, in any format of data.py"
        )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")  # held as long as this process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(
            f"another cold_start.py is writing to {out}; wait for it or give this one another --out"
        ) from None
    for name in ("done.json", "journal.jsonl", "log.jsonl", "command.txt") if config.fresh else ():
        (out / name).unlink(missing_ok=True)
    # finished before, with the same settings, code and data?
    same = [
        {k: v for k, v in asdict(config).items() if k not in HOW_ONLY},
        Path(__file__).read_text(),
        [
            [os.stat(f).st_size, os.stat(f).st_mtime_ns]
            for f in config.data.split(",")
            if os.path.isfile(f)
        ],
    ]
    same, done = hashlib.sha256(json.dumps(same).encode()).hexdigest(), out / "done.json"
    if (
        done.exists()
        and json.loads(done.read_text())["of"] == same
        and (out / "cold.jsonl").exists()
    ):
        return print(
            f"{out / 'cold.jsonl'} is finished; --fresh starts over\n{json.loads(done.read_text())['funnel']}"
        )
    done.unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    with open(out / "command.txt", "a") as f:
        f.write(shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\n")
    journal, tally = (
        Journal(out / "journal.jsonl"),
        dict(
            calls=0,
            from_journal=0,
            in_flight=0,
            mllm_in=0,
            mllm_out=0,
            reasoner_in=0,
            reasoner_out=0,
            trouble="",
        ),
    )
    if "toy:" in config.mllm_url + config.reasoner_url + config.data:
        import toy  # nothing else of this file knows of it

        config = replace(
            config,
            **{
                name: toy.find(getattr(config, name))
                for name in ("mllm_url", "reasoner_url", "data")
            },
        )
    mllm, reasoner = (
        Server("mllm", config, journal, tally),
        Server("reasoner", config, journal, tally),
    )
    if mllm.at[:2] == reasoner.at[:2]:
        reasoner.idle = mllm.idle  # one host with both models: its connections serve both
    try:
        records, problems = load(config, out)
    except ValueError as e:
        raise Stop(e) from e
    print(f"{len(records):,} records. {problems.summary()}", flush=True)
    output = Output(out, records)
    gc.freeze()  # what lives to the end, records and libraries, need not be searched for garbage again and again
    with open(out / "log.jsonl", "a") as log:
        asyncio.run(run_all(config, records, mllm, reasoner, tally, output, log))
    output.close()
    table = output.funnel(len(records))
    print(f"{table}\n{output.kept:,} records in {out / 'cold.jsonl'}")
    if output.again:
        print(
            f"{output.again} records had no answer from a server; the same command tries those again"
        )
    else:
        done.write_text(json.dumps({"of": same, "funnel": table}) + "\n")


# ---- stats: Table 4

WORDS = ("Wait", "Hmm", "Mistake", "Alternatively", "Check")
TABLE_4 = {
    "LLaVA-CoT": (100_000, 2300, 1, 183, 251, 8332),
    "Mulberry": (260_000, 1122, 0, 8784, 68, 26421),
    "Vision-R1-cold": (200_000, 585_719, 75_853, 26_697, 188_187, 100_148),
}


def responses(path):
    """the assistant's side of each row of a JSONL or JSON file; no image is looked at and no format asked for"""
    with open(path, encoding="utf-8") as f:
        first = f.read(1)
        f.seek(0)
        for row in json.load(f) if first == "[" else map(json.loads, f):
            turns = (
                row.get("conversations")
                or row.get("messages")
                or [{"from": "gpt", "value": row.get("response")}]
            )
            yield "\n".join(
                t.get("value", t.get("content")) or ""
                for t in turns
                if t.get("from", t.get("role")) in ("gpt", "assistant")
            )


def stats(files):
    """the words of self-reflection (whole words, any case), lengths and duplicates of each file, beside the paper's Table 4"""
    heads = [
        "records",
        *WORDS,
        *[f"{w} per record" for w in WORDS],
        *[f"records with {w}" for w in WORDS],
        "words: mean",
        "words: median",
        "words: 95 %",
        "duplicates",
    ]
    columns, lengths = {}, {}
    for file in files:
        name = file if len(file) < 32 else "..." + file[-29:]
        count, share, seen, words = Counter(), Counter(), set(), []
        for text in filter(None, responses(file)):
            found = Counter(
                w.capitalize() for w in re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text, re.I)
            )
            count.update(found)
            share.update(found.keys())
            seen.add(hashlib.md5(text.encode()).digest())
            words.append(len(text.split()))
        if not words:
            raise Stop(f"{file}: no responses in it (response, conversations or messages)")
        n, lengths[name] = len(words), sorted(words)
        columns[name] = [
            f"{n:,}",
            *[f"{count[w]:,}" for w in WORDS],
            *[f"{count[w] / n:.3f}" for w in WORDS],
            *[f"{share[w] / n:.1%}" for w in WORDS],
            f"{sum(words) / n:.0f}",
            f"{lengths[name][n // 2]}",
            f"{lengths[name][int(0.95 * n)]}",
            f"{n - len(seen):,}",
        ]
    for name, (n, *counts) in TABLE_4.items():
        columns[f"Table 4: {name}"] = [
            f"{n:,}",
            *[f"{c:,}" for c in counts],
            *[f"{c / n:.3f}" for c in counts],
            *[""] * 9,
        ]
    for head, *cells in zip(["", *heads], *([name, *column] for name, column in columns.items())):
        print(
            f"{head:<28}"
            + "".join(f"{cell:>{len(name) + 2}}" for cell, name in zip(cells, columns))
        )
    plot(
        "stats.png",
        lambda ax: (
            ax.hist(list(lengths.values()), bins=40, density=True, label=list(lengths)),
            ax.set_xlabel("words in a response"),
            ax.legend(),
        ),
    )
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
        sys.exit(
            f"stopped: the disk is full ({e}). make room and give the same command: the finished calls are kept"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the finished calls")


if __name__ == "__main__":
    if sys.argv[1:2] == ["stats"]:
        guarded(stats, sys.argv[2:] or sys.exit("usage: cold_start.py stats FILE..."))
    elif sys.argv[1:2] == ["decontaminate"]:
        from tools import decontaminate

        guarded(decontaminate.main, sys.argv[2:])
    else:
        from nano.run import parse_config

        guarded(make, parse_config(Config, RECIPES))
