"""Cold-start data by modality bridging (Sec. 3.3.1, Fig. 2): image problems -> Vision-R1-cold.

DeepSeek-R1 writes good chains of thought but cannot see, so an MLLM turns the image into words in
two calls: pseudo-CoT -> detailed description -> the reasoner's chain -> filter -> words replaced.

  python cold_start.py                       the toy, with scripted teachers, on the spot
  python cold_start.py --recipe vision-r1-cold --data problems.jsonl \\
      --mllm_url http://a:8000/v1 --reasoner_url http://b:8000/v1

Keys: MLLM_API_KEY and REASONER_API_KEY, else OPENAI_API_KEY. Every finished call goes to
OUT/journal.jsonl at once: after a kill the same command goes on and ends with the same bytes.
"""

from nano.settings import disk_trouble, moved, parse_config

import asyncio
import fcntl
import gc
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from answers.text import unwrap
from nano import chains, teachers
from nano.data import MARK, Problems, Record, stream
from nano.teachers import Journal, Reject, Server, Stop, image_kind, image_part, open_session
from reward import is_equiv, loose_answer


@dataclass
class Config:
    recipe: str = "toy"  # toy | vision-r1-cold
    data: str = ""  # problems with images and answers, in any format of nano/data.py, or toy:NAME
    out: str = "runs/cold"  # the folder of this run
    split: str = "train"  # of a folder or a hub name that has several
    image_root: str = ""  # folders, with commas, where pictures are looked for besides the data's
    fresh: bool = False  # forget the calls of an earlier run in `out`
    strict: bool = False  # stop at the first bad input row instead of reporting it
    limit: int = 0  # use only the first so many records; 0 means all
    mllm_url: str = "http://localhost:8000/v1"  # OpenAI-compatible servers that see, with commas
    mllm_model: str = "Qwen/Qwen2.5-VL-72B-Instruct"  # its model name. Sec. 4.1
    reasoner_url: str = "http://localhost:8001/v1"  # the same for the text-only reasoner
    reasoner_model: str = "deepseek-ai/DeepSeek-R1"  # Sec. 4.1
    mllm_tokens: int = 4096  # longest answer of the MLLM. ours
    reasoner_tokens: int = 16384  # longest chain; the cutoff length of the released SFT config
    min_pixels: int = 0  # a smaller picture is enlarged before it is sent; 0 means as it is
    max_pixels: int = 0  # a larger one is made smaller
    temperature: float = 0.6  # DeepSeek-R1's model card; the paper is silent
    top_p: float = 0.95  # likewise
    skip_pseudo_cot: bool = False  # ablation of App. B: the description without the pseudo-CoT
    skip_description: bool = False  # ablation: the pseudo-CoT in place of the description (Fig. 5)
    # Fig. 2 gives the reasoner description and question; the first author says that it saw the
    # answer too (Osilly/Vision-R1, issue 17). Off: only an answer that it found can be checked.
    reasoner_sees_answer: bool = False
    pseudo_cot_only: bool = False  # a reviewer's question: the pseudo-CoT is the chain, no reasoner
    # The authors' evaluation reads an answer with exactly these spaces.
    template: str = "<think>{chain}</think>\n<answer> Final Answer:{answer} </answer>"
    min_chars: int = 100  # shorter chains are dropped. ours
    max_chars: int = 50_000  # longer ones too: they would not fit SFT's 16,384 tokens. ours
    concurrency: int = 256  # records in work at a time, one call each
    timeout: float = 1800.0  # seconds for one answer
    retries: int = 10  # failed answers (500, timeout, cut, malformed) that a record survives
    backoff: float = 1.0  # seconds before the first retry, doubled each time, at most 60 times this


RECIPES = {
    "toy": dict(out="runs/toy/cold", data="toy:cold-problems", min_chars=20)
    | dict(mllm_url="toy:teachers", mllm_model="toy-mllm")
    | dict(reasoner_url="toy:teachers", reasoner_model="toy-reasoner")
    | dict(template="<think> {chain} </think> <answer> {answer} </answer>"),
    "vision-r1-cold": dict(out="runs/vision-r1-cold"),  # the defaults
}
HOW_ONLY = ("recipe", "out", "fresh", "strict", "image_root", "mllm_url", "reasoner_url")
HOW_ONLY += ("concurrency", "timeout", "retries", "backoff")

# ---- Prompts. The wording is ours; the paper shows what goes into each call (Fig. 2).

PSEUDO_COT = """Look at the image and answer the question about it.
First write a caption of the whole image. Then reason step by step: name what the question asks \
for, read from the image what is needed, and compute. The correct answer is given so that your \
steps lead to it; write as if you had found it yourself.
End with one line: Final Answer: <answer>

Question: {question}
Correct answer: {answer}"""

DESCRIPTION = """Write a detailed description of the image for someone who cannot see it and has \
to answer the question below from your words alone. Give every visual detail that the question \
needs: objects and how they lie to each other, labels, numbers, marks, axes, units, colours, text \
as written. Describe only: do not solve the question and do not state its answer.

Question: {question}"""
DRAFT = """

A draft caption and reasoning shows which details matter:
{pseudo_cot}"""
REASON = """An image is given to you in words. Follow the image description, think step by step, \
and answer the question directly.
End with one line: Final Answer: <answer>

Image description:
{description}

Question: {question}"""
KNOWN = """
Correct answer: {answer}. Reason as if you had found it yourself; do not say that you were told."""

# ---- The bridge: what happens to one record (Sec. 3.3.1, Fig. 2).


async def bridge(config: Config, record: Record, mllm: Server, reasoner: Server) -> str:
    """One record -> its response: chain of thought and answer. Raises Reject."""
    question = record.problem.replace(MARK, "").strip()
    if not record.images:
        raise Reject("input", "no image", "there is nothing to bridge")
    try:
        pixels, images = (config.min_pixels, config.max_pixels), map(Path, record.images)
        parts = [json.dumps(image_part(path.read_bytes(), *pixels)) + ", " for path in images]
    except FileNotFoundError as error:
        raise Reject("input", "missing image", str(error)) from error
    images = "".join(parts)

    # 1. The MLLM sees image, question and answer -> pseudo-CoT: a caption and structured reasoning.
    pseudo_cot = draft = ""
    if not config.skip_pseudo_cot:
        prompt = PSEUDO_COT.format(question=question, answer=record.answer)
        reply = await mllm.ask(record.id, "pseudo-CoT", prompt, images)
        pseudo_cot = chains.checked("pseudo-CoT", reply, question)
        draft = DRAFT.format(pseudo_cot=pseudo_cot)

    # 2. The MLLM sees the pseudo-CoT too -> description: every detail that is needed (App. B).
    description = pseudo_cot
    if not config.skip_description and not config.pseudo_cot_only:
        prompt = DESCRIPTION.format(question=question) + draft
        reply = await mllm.ask(record.id, "description", prompt, images)
        description = chains.checked("description", reply, question)

    # 3. The reasoner sees only words -> a chain of thought, and what it answers after it.
    if config.pseudo_cot_only:
        chain, rest = re.split(r"(?i)\W*final answer\W*:", pseudo_cot)[0], pseudo_cot
    else:
        prompt = REASON.format(description=description, question=question)
        if config.reasoner_sees_answer:
            prompt += KNOWN.format(answer=record.answer)
        reply = await reasoner.ask(record.id, "chain", prompt)
        chain, _, rest = chains.checked("chain", reply, question).rpartition("</think>")
        chain = chain.strip().removeprefix("<think>").strip()

    # 4. Rules drop chains with a wrong answer or wrong logic.
    for rule, evidence in objections(config, record, chain, final_answer(rest)):
        if evidence:
            raise Reject("filter", rule, evidence)

    # 5. Words are replaced; the answer is the true one, in the form that the question asks for.
    return config.template.format(chain=chains.as_seen(chain), answer=record.answer)


def objections(config: Config, record: Record, chain: str, answer: str | None):
    """What is wrong with a chain and its answer: pairs (rule, evidence), the weightiest first."""
    choices = record.choices or chains.choices_in(record.problem)
    wrong = f"{answer!r}, the truth is {record.answer!r}"
    yield "format", not chain and "no closed <think> part"
    yield "format", re.search(r"</?(?:think|answer)>", chain) and "a tag within the chain"
    yield "no answer", not answer and "nothing that reads as a final answer"
    yield "wrong answer", not is_equiv(answer, record.answer, choices) and wrong
    yield "contradiction", contradiction(chain, record.answer, choices)
    yield "language mix", chains.language_mix(chain, record.problem)
    yield "too short", len(chain) < config.min_chars and f"{len(chain)} characters"
    yield "too long", len(chain) > config.max_chars and f"{len(chain)} characters"


def contradiction(chain: str, truth: str, choices: list[str] | None) -> str | None:
    """The chain's last conclusion is not the truth, and can be compared with it."""
    found = (chains.CONCLUSION.findall(chain[-600:]) or [""])[-1]
    if not found or found in re.findall(r"-?[\d.,/]*\d|\b[A-H]\b", truth):
        return None
    same_kind = found.isalpha() == bool(re.fullmatch(r"[A-H]", truth))
    differs = (choices or same_kind) and not is_equiv(found, truth, choices)
    return f"the chain ends with {found!r}" if differs else None


def final_answer(text: str) -> str | None:
    """What a text says its answer is; None when it does not say."""
    # An <answer> that nothing closes would be searched for its end from each opening tag on.
    found = re.findall(r"<answer>(.*?)</answer>", text[: text.rfind("</answer>") + 9], re.S)
    found = found or re.findall(r"(?i)final answer[\s*]*[:：][\s*]*([^\n]+)", text)
    found = found or [loose_answer(text)]  # \boxed{}
    if not found[-1]:
        found = re.findall(r"(?i)answer is[:\s*]*([^\n]+)", text)
        found = found or re.findall(r"\A[^\n]{1,80}\Z", text.strip()) or [""]
    return unwrap(found[-1]) or None


# ---- The run, and its files.


def claim(config: Config):
    """Take the run's folder, and name what differs from the run that is there -> its lock."""
    out, settings = Path(config.out), asdict(config)
    (out / "images").mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(f"another cold_start.py writes to {out}; give this one another --out") from None
    for name in ("config.json", "journal.jsonl", "log.jsonl") if config.fresh else ():
        (out / name).unlink(missing_ok=True)
    path = out / "config.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    for name, now in settings.items():
        if name not in HOW_ONLY and before.get(name) != now:
            print(
                f"{out}: {name} was {before.get(name)!r} and is {now!r} now. Equal calls are not "
                "repeated (--fresh repeats them, another --out keeps the files)"
            )
    path.write_text(json.dumps(settings, indent=1) + "\n")
    return lock


class Output:
    """Kept and rejected records, in the order of the input whatever the order of arrival."""

    def __init__(self, out: Path):
        self.out = out
        names = ("cold.jsonl", "rejected.jsonl", *(f"{name}.json" for name in chains.RELEASED))
        self.files = {name: open(out / f"{name}.part", "w", encoding="utf-8") for name in names}
        self.early, self.next = {}, 0  # results that wait for an earlier one; the next to write
        self.kept, self.lost = Counter(), Counter()
        self.pictures = set()  # paths of those that this run wrote
        self.several = False  # some record has several pictures

    def save(self, name: str, image: bytes) -> str:
        """A picture that came as bytes becomes a file: memory would not hold them all."""
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
        path = f"{self.out}/images/{safe}.{image_kind(image)}"
        if safe != name or path in self.pictures:
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            path = f"{self.out}/images/{safe}-{digest}.{image_kind(image)}"
        Path(path).write_bytes(image)
        self.pictures.add(path)
        return path

    def add(self, n: int, record: Record, result: str | Reject) -> None:
        self.early[n] = (record, result)
        while self.next in self.early:
            record, result = self.early.pop(self.next)
            self.next += 1
            write = self.reject if isinstance(result, Reject) else self.keep
            write(record, result)

    def write(self, name: str, row: dict, before: str = "", after: str = "\n") -> None:
        self.files[name].write(before + json.dumps(row, ensure_ascii=False) + after)

    def reject(self, record: Record, why: Reject) -> None:
        self.lost[why.step, why.rule] += 1
        for image in self.pictures.intersection(record.images):
            os.unlink(image)
        more = {"answer": record.answer, "source": record.source}
        self.write("rejected.jsonl", {"id": record.id, **vars(why), **more})

    def keep(self, record: Record, response: str) -> None:
        record.response = response
        record.images = [os.path.relpath(image, self.out) for image in record.images]
        self.write("cold.jsonl", {name: getattr(record, name) for name in chains.FIELDS})
        name, row = chains.released(record, self.several)
        self.write(f"{name}.json", row, ",\n" if self.kept[name] else "[\n", "")
        self.kept[name] += 1

    def close(self) -> None:
        """The files get their names when they are complete."""
        info = {name: chains.dataset_info(name) for name in self.kept}
        (self.out / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for name in self.kept:
            self.files[f"{name}.json"].write("\n]\n")
        for name, file in self.files.items():
            file.close()
            os.replace(self.out / f"{name}.part", self.out / name)
        for name in chains.RELEASED.keys() - self.kept.keys():
            (self.out / f"{name}.json").unlink()

    def funnel(self) -> str:
        """How many records are left after each step and what took the others; funnel.png too."""
        from matplotlib.figure import Figure  # It takes a second to import.

        left = total = self.next
        lines, bars = [f"{'records':<36}{total:>9,}  100.0 %"], {"records": total}
        for step in ("input", "pseudo-CoT", "description", "chain", "filter"):
            lost = [(n, rule) for (at, rule), n in self.lost.items() if at == step]
            lines += [f"    {rule:<32}{-n:>9,}" for n, rule in sorted(lost, reverse=True)]
            left = bars[step] = left - sum(n for n, _ in lost)
            share = 100 * left / (total or 1)
            lines.append(f"{'left after ' + step:<36}{left:>9,}  {share:5.1f} %")
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot(title="records left after each step")
        axes.bar_label(axes.barh(list(bars), list(bars.values())))
        axes.invert_yaxis()
        figure.savefig(self.out / "funnel.png", dpi=120)
        return "\n".join(lines)


def load(config: Config, output: Output) -> list[Record]:
    records, problems, where = [], Problems(config.strict), (config.split, config.image_root)
    for _, _, record in stream(config.data, problems, True, *where):
        for k, image in enumerate(record.images):
            if isinstance(image, bytes):
                record.images[k] = output.save(f"{record.id}-{k}" if k else record.id, image)
        output.several |= len(record.images) > 1
        records.append(record)
        if len(records) == config.limit:
            break
    print(f"{len(records):,} records. {problems.summary()}", flush=True)
    return records


async def work(config: Config, todo, mllm: Server, reasoner: Server, output: Output) -> None:
    """One of `concurrency` workers: it takes a record through all its calls, then the next one."""
    for n, record in todo:
        try:
            result = await bridge(config, record, mllm, reasoner)
        except Reject as reject:
            result = reject
        output.add(n, record, result)
        await asyncio.sleep(0)  # Replies from the journal come without waiting; others go on here.


async def work_all(config: Config, records, mllm: Server, reasoner: Server, output: Output) -> None:
    """All workers at once; every two seconds the log gets a row and the progress bar is moved."""
    todo, start, cpu = iter(enumerate(records)), time.monotonic(), time.process_time()
    bar = tqdm(total=len(records), unit=" records", desc="bridging")
    async with open_session(config.timeout) as mllm.session:
        reasoner.session = mllm.session
        crew = [work(config, todo, mllm, reasoner, output) for _ in range(config.concurrency)]
        crew = asyncio.gather(*crew)
        teachers.working = True
        while not crew.done():
            await asyncio.wait([crew], timeout=2)
            teachers.leave_if_told(mllm, reasoner)
            row = dict(seconds=time.monotonic() - start, cpu=time.process_time() - cpu)
            row |= dict(done=output.next + len(output.early), kept=output.kept.total())
            row |= dict(records=len(records), **mllm.tally)
            hosts = [(s.name, host) for s in (mllm, reasoner) for host in s.hosts]
            row["servers"] = {f"{name} at {host.url}": host.rate() for name, host in hosts}
            row |= dict(trouble=mllm.trouble or reasoner.trouble)
            with open(output.out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            rates = " ".join(row["servers"].values())
            bar.set_postfix_str(f"kept {row['kept']:,}, servers {rates} {row['trouble']}")
            bar.update(row["done"] - bar.n)
        teachers.working = False
        bar.close()
        await crew  # raises what ended one of them


def main(config: Config) -> int:
    """-> how many records survived"""
    if not config.data:
        raise Stop("--data is needed: problems with images and answers (formats: nano/data.py)")
    with claim(config):
        if "toy:" in config.data + config.mllm_url + config.reasoner_url:
            import toy  # It brings torch, and nothing else here needs it.

            for name in ("data", "mllm_url", "reasoner_url"):
                setattr(config, name, toy.find(getattr(config, name)))
        journal, tally = Journal(f"{config.out}/journal.jsonl"), Counter(calls=0, from_journal=0)
        mllm, reasoner = (Server(name, config, journal, tally) for name in ("mllm", "reasoner"))

        output = Output(Path(config.out))
        records = load(config, output)
        gc.freeze()  # Else each collection would look at all the records again.
        asyncio.run(work_all(config, records, mllm, reasoner, output))
        output.close()

        print(output.funnel())
        calls = f"{tally['calls']:,} calls, {tally['from_journal']:,} from the journal"
        print(f"{output.kept.total():,} records in {config.out}/cold.jsonl; {calls}")
        if again := sum(n for (_, rule), n in output.lost.items() if rule == "no answer"):
            print(f"{again} had no answer from a server; the same command tries them again")
        if not output.kept:
            why = output.lost.most_common(3)
            why = ", ".join(f"{n:,} x {rule} ({step})" for (step, rule), n in why)
            print(f"no record survived: {why or 'no usable data'}; see {config.out}/rejected.jsonl")
    return output.kept.total()


def guarded(config: Config) -> None:
    """main(config); what a person can mend ends the program with a sentence."""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, teachers.on_signal)
    try:
        sys.exit(0 if main(config) else 1)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"stopped: {error}")
    except OSError as error:
        if trouble := disk_trouble(error):
            sys.exit(trouble)
        raise


if __name__ == "__main__":
    moved({name: f"python -m tools.{name}" for name in ("stats", "decontaminate")})
    guarded(parse_config(Config, RECIPES))
