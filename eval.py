"""Evaluation: answers to the paper's benchmarks, or to any file of problems, with intervals.

  python eval.py                                        the toy: base, CI and Vision-R1 side by side
  torchrun --nproc_per_node 8 eval.py --model DIR --bench mathvista,mathverse [--engine vllm]
  python eval.py --model DIR --bench mathvista=FOLDER   files that you have, without a network
  python eval.py --model DIR --data problems.jsonl      any file, scored by the training reward
  python eval.py --model NAME --bench mathvista --engine http --url http://HOST:8000/v1

Two scores of a benchmark stand side by side. The strict one wants one <think> and one <answer>
block (Sec. 3.4) and follows the authors' rules. The paper's own wants no format, and draws up to
four more answers while </answer> is missing. A killed run goes on where it stopped.
"""

import nano.settings  # noqa: F401, answers --help before torch is loaded

import json
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import model
import toy
from benchmarks import judge, rules
from benchmarks.report import bench_report, bench_tables, counted, grouped, summarize, table
from benchmarks.validate import answer
from nano import asking, checkpoint, data, kept, packing, run
from nano.device import compute_dtype
from nano.http_engine import HTTPEngine
from nano.rollout import TorchEngine


@dataclass
class Config:
    # what to run
    recipe: str = "toy"
    out: str = ""  # folder of the run; "" = named after model and data
    model: str = ""  # a Hugging Face folder or hub name; toy:all = the toy's three models
    bench: str = ""  # NAME from the hub, NAME=FOLDER or NAME=FILE, with commas
    data: str = ""  # instead: problems, any format of nano/data.py
    split: str = "test"  # of --data, if it is a folder or a hub name that has several
    image_root: str = ""  # folders, with commas, where pictures are looked for besides the data's
    name: str = ""  # in the table; "" = the model's folder
    strict: bool = False  # stop at the first bad record
    limit: int = 0  # only so many problems (of each benchmark); 0 = all
    seed: int = 0
    # sampling, as in the paper
    temperature: float = 0.6  # 0 = greedy
    top_p: float = 0.95
    max_len: int = 16384  # new tokens
    samples: int = 1  # answers per question
    max_prompt_len: int = 8192  # a longer prompt is left out
    system_prompt: str = ""
    prefill: str = ""  # the prompt ends in it, the completion begins with it, e.g. <think>
    min_pixels: int = 0  # a smaller picture is enlarged; 0 = as the checkpoint says
    max_pixels: int = 0  # a larger one is made smaller; 0 = as the checkpoint says
    as_trained: bool = True  # what is not given of these four is as it was in training
    judge_url: str = ""  # of a server for what the rules leave undecided
    judge_model: str = "gpt-4o-mini"  # the paper's
    # memory and speed
    engine: str = "torch"  # torch; vllm: one per rank, in this process; http: servers at --url
    url: str = ""  # of servers, with commas
    max_rows: int = 256  # sequences that one rank decodes at a time
    vllm_memory: float = 0.9  # share of a GPU that vLLM may take
    vllm_tp: int = 1  # neighbouring ranks that share one vLLM (tensor parallel)
    chunk: int = 256  # questions between two writes to responses.jsonl
    resume: bool = True  # --no_resume throws earlier responses away


# More benchmarks or more of their questions may join the answers of an earlier run.
HOW_ONLY = tuple(
    """bench name strict image_root limit max_prompt_len judge_url judge_model
    url max_rows vllm_memory vllm_tp chunk""".split()
)

PLACES = ("recipe", "out", "model", "data", "resume")  # by these an answer is no other one

RECIPES = {
    "toy": dict(model="toy:all", data="toy:test-problems", limit=1000)
    | dict(max_len=384, max_prompt_len=2048, top_p=1.0),
    "vision-r1": {},  # the defaults
}
TOY_MODELS = {"toy:base": "base", "toy:ci": "CI (cold start)", "toy:rl": "Vision-R1 (PTST)"}
DRAWS = 5  # the paper's evaluation: one answer, and up to four more while </answer> is missing


def check(config: Config):
    """What the flags must fulfil together."""
    if config.engine not in ("torch", "vllm", "http"):
        raise ValueError(f"--engine {config.engine!r}: one of torch, vllm, http")
    if not config.model or bool(config.bench) == bool(config.data):
        raise ValueError("say --model, and one of --bench and --data")
    if config.model == "toy:all" and config.engine != "torch":
        raise ValueError("toy:all is three models: say --model toy:base, toy:ci or toy:rl")


def make_engine(config: Config, device):
    """(engine, processor); a server needs no processor here."""
    if config.engine == "http":
        return HTTPEngine(config.url, config.model, **asking.settings(config)), None
    processor = packing.Processor(config.model, **asking.settings(config))
    run.say(str(processor))
    if config.engine == "torch":
        policy, _ = model.load(config.model, device, compute_dtype(device))
        return TorchEngine(policy, processor, config.max_rows), processor
    from nano.vllm_engine import VLLMEngine

    longest = config.max_prompt_len + config.max_len
    settings = dict(memory=config.vllm_memory, tp=config.vllm_tp, max_num_seqs=config.max_rows)
    settings["may_sleep"] = False
    return VLLMEngine(config.model, processor, longest, device, **settings), processor


def questions(config: Config, processor) -> list[data.Record]:
    """The records whose prompts fit; what is wrong with the others is said."""
    records, problems, limit = [], data.Problems(config.strict), config.limit or None
    if config.data:
        where = dict(split=config.split, image_root=config.image_root)
        records, problems = data.read(config.data, config.strict, **where)
        records = records[:limit]
    for word in filter(None, map(str.strip, config.bench.split(","))):
        name, _, path = word.partition("=")
        some, wrong = rules.load(name, path, config.strict, config.image_root)
        records += some[:limit]
        problems += wrong
        run.say(f"{name}: {len(some):,} of {rules.BENCHMARKS[name].full:,} questions are there")
    if processor:  # A server knows itself what is too long.
        records = packing.usable(records, processor, config.max_prompt_len, problems)
    if problems:
        run.say(problems.summary())
    if not records:
        raise ValueError(f"{config.bench or config.data}: no usable problem in it")
    return records


def ask(engine, encode, config: Config, records, number: dict[str, int]) -> list[dict]:
    """The rows of each question: its samples, then what the paper's evaluation draws once more."""
    rows, todo, attempt = [[] for _ in records], range(len(records)), 0
    # Ranks that share a vLLM ask together, as long as one of them has a question.
    while run.all_max(len(todo)) if config.vllm_tp > 1 else todo:
        prompts = [encode(records[i]) for i in todo]
        # A later draw is seeded by its attempt: it does not depend on who else needed one.
        seeds = [(config.seed, attempt, number[records[i].id]) for i in todo]
        sampling = (config.max_len, seeds, config.temperature, config.top_p)
        groups = engine.generate(prompts, 1 if attempt else config.samples, *sampling)
        asked, todo = todo, []
        for i, group in zip(asked, groups):
            for sample in group:
                row = answer(records[i], len(rows[i]), sample)
                rows[i].append(row | ({"resampled": True} if attempt else {}))
            closed = any("</answer>" in row["completion"] for row in rows[i])
            if config.bench and config.temperature > 0 and len(rows[i]) < DRAWS and not closed:
                todo.append(i)
        attempt += 1
    for group in rows:
        for k, row in enumerate(group[:-1], 1):
            row["more"] = len(group) - k  # lines of this question that follow
    return list(chain(*rows))


def evaluate(config: Config, device) -> dict:
    """One model's report: {"all": summary, source: summary, ...} or {benchmark: ...}."""
    rank, world, out = dist.get_rank(), dist.get_world_size(), Path(config.out)
    if config.as_trained:
        asking.as_trained(config)
    run.claim(config, HOW_ONLY)
    responses, served = out / "responses.jsonl", config.engine == "http"
    with run.for_people():
        weights = "" if served else checkpoint.fingerprint(run.find_model(config.model))
        engine, processor = make_engine(config, device)
        weights = run.on_main_first(engine.fingerprint) if served else weights
        records = questions(config, processor)
    log = run.Log(out, config, after_step=10**9)
    # An answer belongs to the weights, the question and these settings.
    settings = {k: v for k, v in asdict(config).items() if k not in (*HOW_ONLY, *PLACES)}
    old = (responses, weights, records, settings, run.say)
    done = run.on_main_first(lambda: kept.read(*old))
    encode = partial(packing.encode, processor=processor)
    encode = encode if processor else engine.prompt
    order = {r.id: i for i, r in enumerate(records)}
    # With --bench a question's seed is its own, whatever else is asked.
    number = {id: zlib.crc32(id.encode()) if config.bench else i for id, i in order.items()}
    rows = [r for r in done if r["id"] in order]
    finished = {r["id"] for r in rows}
    todo = [r for r in records if r.id not in finished]

    # 1. answers, some questions at a time
    bar = tqdm(total=len(records), initial=len(finished), leave=False, disable=rank > 0 or None)
    for first in range(0, len(todo), config.chunk):
        some = todo[first : first + config.chunk]
        gathered, mine = [None] * world, some[rank::world]
        new = ask(engine, encode, config, mine, number)
        asked = {record.id: kept.asked(record, settings) for record in mine}
        new = [row | dict(weights=weights, asked=asked[row["id"]]) for row in new]
        dist.all_gather_object(gathered, new)
        new = list(chain(*gathered))
        if rank == 0:
            with open(responses, "a") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
        rows += new
        bar.update(len(some))
        bar.set_postfix(accuracy=f"{np.mean([r['right'] for r in counted(rows)]):.3f}")
        run.stop_if_told(f"{len(rows)} answers are in {responses}")
    bar.close()
    rows.sort(key=lambda r: (order[r["id"]], r["sample"]))

    # 2. what the rules leave undecided goes to the judge
    if config.judge_url:
        with run.for_people():
            verdicts = run.on_main_first(lambda: judge.ask(config, rows, run.say))
        for i, which, right in verdicts:
            settled = dict(right=right, decided=True, judged=config.judge_model)
            rows[i] |= {f"{which}{key}": value for key, value in settled.items()}

    # 3. the report
    parts = grouped(rows, lambda row: [row["bench" if config.bench else "source"]])
    if config.bench:
        report = {b: bench_report(b, part, rules.BENCHMARKS[b].full) for b, part in parts.items()}
        brief = {bench: summary["accuracy"] for bench, summary in report.items()}
    else:
        brief = summarize(rows)
        report = {"all": brief} | {name: summarize(part) for name, part in sorted(parts.items())}
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    log.write(dict(step=len(rows), **brief))
    if config.engine == "vllm":
        engine.close()  # and torch's process groups with it
    return report


def evaluate_toy(config: Config, device) -> list[tuple[str, dict]]:
    """The story in one table: base (asked in Zero's way), after the cold start, after PTST."""
    lines = []
    for model_name, name in TOY_MODELS.items():
        for how, temperature in (("T=1", 1.0), ("greedy", 0.0)):
            asked = toy.ZERO_PROMPT if name == "base" else ""
            one = replace(config, model=model_name, temperature=temperature, system_prompt=asked)
            one.name, one.out = f"{name}, {how}", f"{config.out}/{name.split()[0].lower()}-{how}"
            toy.resolve(one)
            lines.append((one.name, evaluate(one, device)["all"]))
    return lines


def main(config: Config):
    device, first = run.start_ranks(), run.is_main()
    with run.for_people():
        check(config)
    asked = config.data or config.bench.replace("=", ",")
    config.out = config.out or run.default_out("eval", config.model, asked)
    if config.model == "toy:all":
        text = table(evaluate_toy(config, device))
    else:
        toy.resolve(config)
        report, name = evaluate(config, device), config.name or Path(config.model).name
        if config.bench:
            titles = {bench: rules.BENCHMARKS[bench].title for bench in report}
            text = bench_tables(name, report, titles)
        else:
            whole = [(name, report.pop("all"))]
            sources = [(f"{name}: {source}", summary) for source, summary in report.items()]
            text = table(whole + (sources if len(sources) > 1 else []))
    if first:
        (Path(config.out) / "table.md").write_text(text + "\n")
        print(text)
    if dist.is_initialized():  # vLLM has taken the ranks along
        dist.destroy_process_group()


if __name__ == "__main__":
    tools = dict(compare="compare RUN_A RUN_B", agree="agree FILE...", view="viewer RUN_OR_FILE")
    run.moved({word: f"python -m tools.{tool}" for word, tool in tools.items()})
    run.guard(main, run.parse_config(Config, RECIPES))
