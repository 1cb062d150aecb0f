"""Evaluation: a model's answers to the paper's benchmarks or to any file of problems, scored by published rules, with intervals.

  python eval.py                                                     the toy: base, CI and Vision-R1 side by side
  torchrun --nproc_per_node 8 eval.py --model DIR --bench mathvista,mathverse --out runs/eval [--limit N] [--samples N]
  torchrun --nproc_per_node 8 eval.py --model DIR --bench mathvista --engine vllm        (http: servers of vllm_engine.py)
  python eval.py --model DIR --bench mathvista=FOLDER,mm-math=FOLDER  where there is no network: files that you have
  python eval.py --model DIR --data problems.jsonl                   any file, scored by the training reward
  python eval.py compare RUN_A RUN_B                                 paired differences with a significance test
  python eval.py agree FILE...                                       our verdicts against official ones, and where they differ
  python eval.py view RUN_OR_FILE                                    rollouts or answers as one HTML page (viewer.py)

Two scores stand side by side: strict (one sample; exactly one <think> and one <answer> block, Sec. 3.4; the authors' rules), and
the rules of the paper's own evaluation (no format needed, up to four more draws while </answer> is missing; benchmarks.fork).
Every response goes to responses.jsonl with its verdicts and why; a run that was killed goes on where it stopped.
"""

import importlib
import json
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import model
from benchmarks import judge as llm_judge
from benchmarks import report as reports
from benchmarks import rules as benchmarks
from benchmarks.report import summarize, table
from nano import data, packing, run
from nano.rollout import TorchEngine, judge
from nano.rollout import make_engine as make_vllm


@dataclass
class Config:
    recipe: str = "toy"
    model: str = (
        ""  # a Hugging Face folder or hub name; toy:all = the toy's three models side by side
    )
    bench: str = (
        ""  # benchmarks by name, fetched from the hub, or name=FOLDER or FILE; separated by commas
    )
    data: str = ""  # instead: problems, any format of data.py, or toy:NAME
    out: str = ""  # folder of the run; "" = named after model and data
    name: str = ""  # in the table; default: the model's folder
    strict: bool = False  # stop at the first bad record instead of reporting it
    limit: int = 0  # only the first so many problems (of each benchmark); 0 = all
    samples: int = 1  # answers per question
    temperature: float = 0.6  # the paper's; 0 = greedy
    top_p: float = 0.95  # the paper's
    max_len: int = 16384  # new tokens, the paper's
    max_prompt_len: int = 8192  # a longer prompt is reported and left out
    system_prompt: str = ""
    engine: str = "torch"  # torch: rollout.py; vllm: one vLLM per rank, in this process; http: servers of vllm_engine.py
    url: str = ""  # of the servers, separated by commas
    vllm_memory: float = 0.9  # share of a GPU that vLLM may take: nothing else is there
    vllm_tp: int = 1  # neighbouring ranks that share one vLLM (tensor parallel)
    max_num_seqs: int = 256  # sequences that one vLLM decodes at a time
    max_rows: int = 256  # sequences that one rank decodes at a time
    chunk: int = 256  # questions between two writes to responses.jsonl
    judge_url: str = ""  # OpenAI-compatible server for what the rules leave undecided; the key: JUDGE_API_KEY or OPENAI_API_KEY
    judge_model: str = "gpt-4o-mini"  # the paper's judge
    seed: int = 0
    resume: bool = True  # --no_resume throws earlier responses away


RECIPES = {
    "toy": dict(
        model="toy:all",
        data="toy:test-problems",
        max_len=384,
        top_p=1.0,
        limit=1000,
        max_prompt_len=2048,
    ),
    "vision-r1": dict(),
}
DRAWS = 5  # the paper's fork: one answer, and up to four more while </answer> is missing
DROPPED = (
    "bench",
    "tags",
    "query",
    "query_cot",
)  # of a question's meta: stands beside it or in the prompt already


def make_engine(config, device):
    """-> (engine with generate(prompts, n, max_len, seeds, temperature, top_p, on_done), processor): --engine is chosen here.

    nothing is synced here: a vLLM samples with the weights that it read from the checkpoint itself.
    """
    if config.engine not in (known := ("torch", "vllm", "http")):
        raise SystemExit(
            f"error: no engine {config.engine!r}{run.nearest(config.engine, known)}; there are: {', '.join(known)}"
        )
    if config.engine == "torch":
        policy, processor = model.load(
            config.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        return TorchEngine(policy.hf, processor, policy.banned, config.max_rows), processor
    processor = model.Processor(config.model)
    engine = make_vllm(config, None, processor, config.max_len, device)
    if config.engine == "http":
        engine.must_serve(config.model, config.max_prompt_len + config.max_len)
    return engine, processor


def questions(config, processor, say):
    """the records of --bench or --data whose prompts fit; what was wrong with the others is said"""
    if config.bench:
        records, problems = [], data.Problems(config.strict)
        for word in filter(None, map(str.strip, config.bench.split(","))):
            name, _, path = word.partition("=")
            some, wrong = benchmarks.load(name, path, config.strict)
            records += some[: config.limit or None]
            problems += wrong
            full = benchmarks.BENCHMARKS[name].full
            say(
                f"{name}: {len(some):,} questions read"
                + (f", {full:,} when complete" if len(some) < full else "")
            )
    else:
        records, problems = data.read(config.data, strict=config.strict)
        records = records[: config.limit or None]
    records = packing.usable(
        records, processor, config.max_prompt_len, problems, config.system_prompt
    )
    if problems:
        say(problems.summary())
    if not records:
        raise ValueError(f"{config.bench or config.data}: no usable problem in it")
    return records


def answer(record, sample, x, processor):
    """a rollout -> a line of responses.jsonl: the text, its verdicts, and why"""
    text, s = judge(record, x, processor)
    row = dict(
        id=record.id,
        sample=sample,
        source=record.source,
        problem=record.problem,
        choices=record.choices,
        completion=text,
        answer=record.answer,
        given=s.answer,
        right=s.correct and s.format_ok,
        why=s.why,
        format_ok=s.format_ok,
        length=len(x.ids),
        finish=x.finish,
    )
    bench = record.meta.get("bench")
    if bench:
        strict = (
            benchmarks.official(bench, s.answer, record)
            if s.format_ok
            else benchmarks.Verdict(False, s.why)
        )
        fork = benchmarks.fork(bench, text, record)
        row |= dict(
            bench=bench,
            tags=record.meta["tags"],
            meta={k: v for k, v in record.meta.items() if k not in DROPPED},
            training_right=row["right"],
            right=strict.right,
            why=strict.why,
            given=strict.given,
            decided=strict.decided,
            fork_right=fork.right,
            fork_why=fork.why,
            fork_given=fork.given,
            fork_decided=fork.decided,
        )
    return row


def read_responses(path):
    """what an earlier try finished, by whole questions; the rest (half a line, half a question) is dropped from the file too"""
    rows, some, good, size = [], [], 0, 0
    for line in open(path, "rb") if path.exists() else []:
        try:
            some.append(json.loads(line))
            size += len(line)
        except json.JSONDecodeError:
            break
        if not some[-1].get("more") and line.endswith(b"\n"):
            rows, some, good = rows + some, [], size
    if path.exists():
        with open(path, "r+b") as f:
            f.truncate(good)
    return rows


def generate(engine, processor, config, mine, order, on_row):
    """answers to these records: a list of rows for each; on_row(number of the record, row) as each one is ready"""
    got, todo, attempt, n = [[] for _ in mine], list(range(len(mine))), 0, config.samples
    # ranks that share a vLLM ask together, as long as one of them has a question
    while run.all_max(len(todo)) if config.vllm_tp > 1 else todo:
        prompts = [packing.encode(mine[i], processor, config.system_prompt) for i in todo]
        # a later draw is seeded by its number, so that it does not depend on who else needed one
        number = lambda id: (
            zlib.crc32(id.encode()) if config.bench else order[id]
        )  # whatever else --bench and --limit say
        seeds = [(config.seed, attempt, number(mine[i].id)) for i in todo]
        first, ready = config.samples + attempt - 1 if attempt else 0, set()

        def done(p, s, x, todo=todo, first=first, ready=ready):
            row = answer(mine[todo[p]], first + s, x, processor) | (
                {"resampled": True} if first else {}
            )
            ready.add((p, s))
            got[todo[p]].append(row)
            on_row(todo[p], row)

        groups = engine.generate(
            prompts, n, config.max_len, seeds, config.temperature, config.top_p, done
        )
        for p, group in enumerate(groups):
            for s, x in enumerate(group):
                if (p, s) not in ready:  # an engine that tells nothing before its end
                    done(p, s, x)
        for i in todo:
            got[i].sort(key=lambda row: row["sample"])
        attempt, n = attempt + 1, 1
        again = bool(config.bench) and config.temperature > 0
        todo = [
            i
            for i in todo
            if again
            and len(got[i]) < DRAWS
            and not any("</answer>" in r["completion"] for r in got[i])
        ]
    for rows in got:
        for k, row in enumerate(rows[:-1], 1):
            row["more"] = (
                len(rows) - k
            )  # lines of this question that follow: a killed run drops what is not whole
    return got


def evaluate(config, device):
    """answers of one model -> its report {"all": summary, source: summary, ...} or {benchmark: ...}, also in out/report.json"""
    rank, world = dist.get_rank(), dist.get_world_size()
    say = tqdm.write if rank == 0 else lambda *_: None
    out = Path(config.out)
    run.claim(
        config,
        (
            "model",
            "data",
            "samples",
            "temperature",
            "top_p",
            "max_len",
            "system_prompt",
            "seed",
            "engine",
        ),
    )
    log = run.Log(out, config, 10**9)
    done = [None]
    run.on_main_first(lambda: done.__setitem__(0, read_responses(out / "responses.jsonl")))
    dist.broadcast_object_list(done, src=0)
    with run.for_people():
        engine, processor = make_engine(config, device)
        records = questions(config, processor, say)
    order = {r.id: i for i, r in enumerate(records)}
    rows = [r for r in done[0] if r["id"] in order]
    finished = {r["id"] for r in rows}
    todo = [r for r in records if r.id not in finished]
    bar = tqdm(
        total=len(records),
        initial=len(finished),
        desc=config.name or Path(config.model).name,
        leave=False,
        disable=None if rank == 0 else True,
    )
    right = [r["right"] for r in rows if not r.get("resampled")]
    for first in range(0, len(todo), config.chunk):
        mine, before, ready = todo[first : first + config.chunk][rank::world], bar.n, Counter()

        def on_row(i, row, ready=ready):
            ready[i] += 1
            if not row.get("resampled"):
                right.append(row["right"])
                bar.update(ready[i] == config.samples)
                bar.set_postfix(accuracy=f"{np.mean(right):.3f}", refresh=False)

        answers = [
            row
            for group in generate(engine, processor, config, mine, order, on_row)
            for row in group
        ]
        gathered = [None] * world
        dist.all_gather_object(gathered, answers)
        new = [a for part in gathered for a in part]
        rows += new
        if rank == 0:
            with open(out / "responses.jsonl", "a") as f:
                f.writelines(json.dumps(a, ensure_ascii=False) + "\n" for a in new)
        right = [r["right"] for r in rows if not r.get("resampled")]
        bar.n = before + len(todo[first : first + config.chunk])
        bar.set_postfix(accuracy=f"{np.mean(right):.3f}")
    bar.close()

    rows.sort(key=lambda r: (order[r["id"]], r["sample"]))
    if config.judge_url:
        verdicts = [None]
        run.on_main_first(lambda: verdicts.__setitem__(0, llm_judge.ask(config, rows, say)))
        dist.broadcast_object_list(verdicts, src=0)
        for i, which, right in verdicts[0]:
            rows[i] |= {
                f"{which}right": right,
                f"{which}decided": True,
                f"{which}judged": config.judge_model,
            }
    parts = defaultdict(list)
    for r in rows:
        parts[r["bench"] if config.bench else r["source"]].append(r)
    if config.bench:
        report = {
            name: reports.bench_report(name, part, benchmarks.BENCHMARKS[name].full)
            for name, part in parts.items()
        }
        brief = {name: s["accuracy"] for name, s in report.items()}
    else:
        report = {"all": summarize(rows)} | {
            source: summarize(part) for source, part in sorted(parts.items())
        }
        brief = report["all"]
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    log.write(dict(step=len(rows), **brief))
    if config.engine == "vllm":
        engine.close()  # and torch's process groups with it
    return report


def toy_table(config, device):
    """the story in one table: the base (asked in Zero's way), CI after the cold start, Vision-R1 after PTST"""
    import toy

    names = {"toy:base": "base", "toy:ci": "CI (cold start)", "toy:rl": "Vision-R1 (PTST)"}
    run.on_main_first(lambda: [toy.find(x) for x in (*names, config.data)])
    lines = []
    for model_name, name in names.items():
        for how, temperature in [("T=1", 1.0), ("greedy", 0.0)]:
            folder = f"{config.out}/{name.split()[0].lower()}-{how}"
            one = replace(
                config,
                model=toy.find(model_name),
                data=toy.find(config.data),
                name=f"{name}, {how}",
                out=folder,
                temperature=temperature,
                system_prompt=toy.ZERO_PROMPT if name == "base" else "",
            )
            lines.append((one.name, evaluate(one, device)["all"]))
    return lines


def agree(*paths):
    """prints how often our verdicts on released answers are the official ones, and every disagreement"""
    matchers = {"mathvista": benchmarks.mathvista_match, "mathvision": benchmarks.mathvision_match}
    for path in paths:
        groups = defaultdict(list)
        for n, r in enumerate(reports.read_run(path), 1):
            first = lambda *keys: next((r[k] for k in keys if r.get(k) is not None), None)
            bench = str(
                first("bench", "benchmark")
                or re.split(r"[-_]\d", str(first("item_id", "id") or Path(path).stem))[0]
            ).lower()
            right = first("correct", "true_false", "judgement", "official")
            if bench not in benchmarks.BENCHMARKS or right is None:
                raise ValueError(
                    f"{path}:{n}: no official verdict (correct, true_false or judgement), or no benchmark {bench!r}"
                )
            meta = {**r, **(r.get("meta") or {})}
            q = SimpleNamespace(
                answer=str(first("gt_answer", "answer")), choices=r.get("choices"), meta=meta
            )
            extracted, response = (
                first("extracted", "extraction", "model_answer"),
                first("response", "completion"),
            )
            group = (bench, str(r.get("question_type", "")))
            if extracted is not None:
                groups[(*group, "extracted")].append(
                    (
                        r,
                        matchers.get(bench, benchmarks.BENCHMARKS[bench].official)(
                            str(extracted), q
                        ),
                        right,
                    )
                )
            if response is not None:
                groups[(*group, "response")].append(
                    (r, benchmarks.official(bench, str(response), q), right)
                )
        for (bench, kind, what), cases in groups.items():
            wrong = [(r, v) for r, v, right in cases if v.right != bool(int(right))]
            open_ = sum(not v.decided for _, v, _ in cases)
            from_ = "the official extraction" if what == "extracted" else "the whole response"
            print(
                f"{path}: {bench} {kind} {len(cases)} answers, from {from_}: {1 - len(wrong) / len(cases):.2%} judged as officially, {open_} undecided"
            )
            for r, v in wrong:
                print(
                    f"  {r.get('item_id', r.get('id'))} ({r.get('model', '')}): {'right' if v.right else 'wrong'} by us ({v.why}), "
                    f"officially {'wrong' if v.right else 'right'}; gold {r.get('gt_answer', r.get('answer'))!r}, "
                    f"extracted {str(r.get('extracted', ''))[:60]!r}, ends {str(r.get('response', ''))[-80:]!r}"
                )


def main(config):
    if not config.model or bool(config.bench) + bool(config.data) != 1:
        raise SystemExit(
            "error: say --model, and one of --bench (mathvista, mathverse=FOLDER, ...) and --data"
        )
    if config.model == "toy:all" and config.engine != "torch":
        raise SystemExit(
            "error: a vLLM holds one model, toy:all is three: say --model toy:base, toy:ci or toy:rl"
        )
    device = run.start_ranks()
    first = run.is_main()
    config.out = config.out or run.default_out(
        "eval", config.model, config.data or config.bench.replace("=", ",")
    )
    if config.model == "toy:all":
        lines = toy_table(config, device)
    else:
        if "toy:" in config.model + config.data:
            import toy

            run.on_main_first(lambda: (toy.find(config.model), toy.find(config.data)))
            config.model, config.data = toy.find(config.model), toy.find(config.data)
        report = evaluate(config, device)
        name = config.name or Path(config.model).name
        lines = (
            [(name, report["all"])]
            + [(f"{name}: {k}", v) for k, v in report.items() if k != "all" and len(report) > 2]
            if not config.bench
            else []
        )
    if first:
        text = (
            table(lines)
            if lines
            else reports.bench_tables(
                name, report, {k: b.title for k, b in benchmarks.BENCHMARKS.items()}
            )
        )
        (Path(config.out) / "table.md").write_text(text + "\n")
        print(text)
    if dist.is_initialized():  # vLLM has taken them along
        dist.destroy_process_group()


def configure(argv):
    """the toy's recipe is the default for the toy alone: anything else gets the paper's setting, unless a recipe is named"""
    config = run.parse_config(Config, RECIPES, argv)
    named = any(word.split("=")[0] == "--recipe" for word in argv)
    own = config.bench or not config.data.startswith("toy:")
    return (
        run.parse_config(Config, RECIPES, ["--recipe", "vision-r1", *argv])
        if own and not named
        else config
    )


COMMANDS = {
    "compare": reports.compare_runs,
    "agree": agree,
    "view": lambda *argv: importlib.import_module("tools.viewer").main(list(argv)),
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        if sys.argv[1] == "compare" and len(sys.argv) != 4:
            sys.exit("usage: python eval.py compare RUN_A RUN_B, two folders of eval.py")
        with run.for_people():
            COMMANDS[sys.argv[1]](*sys.argv[2:])
    else:
        run.guard(main, configure(sys.argv[1:]))
