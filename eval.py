"""Evaluation: answers to any file of problems, scored by published rules, with an interval.

  python eval.py                                              the toy: base, CI and Vision-R1 side by side
  torchrun --nproc_per_node 8 eval.py --model runs/vision-r1-7b/final --data problems.jsonl --out runs/eval --samples 4

Accuracy counts the hard format (Sec. 3.4): exactly one <think> and one <answer> block, the answer right. Every response
goes to responses.jsonl; a run that was stopped goes on where it stopped. Benchmarks with rules of their own: not yet.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model
import packing
import run
from rollout import TorchEngine, judge


@dataclass
class Config:
    recipe: str = "toy"
    model: str = ""  # a Hugging Face folder or hub name; toy:all = the toy's three models side by side
    data: str = ""  # problems, any format of data.py, or toy:NAME
    out: str = ""  # folder of the run; "" = named after model and data
    name: str = ""  # in the table; default: the model's folder
    strict: bool = False  # stop at the first bad record instead of reporting it
    limit: int = 0  # only the first so many problems; 0 = all
    samples: int = 1  # answers per question
    temperature: float = 0.6  # the paper's; 0 = greedy
    top_p: float = 0.95  # the paper's
    max_len: int = 16384  # new tokens, the paper's
    max_prompt_len: int = 8192  # a longer prompt is reported and left out
    system_prompt: str = ""
    max_rows: int = 256  # sequences that one rank decodes at a time
    chunk: int = 256  # questions between two writes to responses.jsonl
    seed: int = 0
    resume: bool = True  # --no_resume throws earlier responses away


RECIPES = {
    "toy": dict(model="toy:all", data="toy:test-problems", max_len=256, top_p=1.0, limit=1000, max_prompt_len=2048),
    "vision-r1": dict(),
}


def interval(scores, groups, seed=0, draws=2000):
    """95 % bootstrap interval of the mean: questions are drawn with replacement, their samples stay together.

    scores, groups: (N,) a score and the number of its question per response.
    """
    _, question = np.unique(groups, return_inverse=True)
    total, count = np.bincount(question, scores), np.bincount(question)  # (Q,)
    picks = np.random.default_rng(seed).integers(len(total), size=(draws, len(total)))
    means = total[picks].sum(1) / count[picks].sum(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


def summarize(rows):
    """responses -> accuracy with its interval, mean length (tokens), format rate, share cut at the limit"""
    right = np.array([float(r["right"]) for r in rows])
    low, high = interval(right, [r["id"] for r in rows])
    mean = lambda key: float(np.mean([r[key] for r in rows]))
    return dict(n=len(rows), accuracy=float(right.mean()), low=low, high=high, length=mean("length"),
                format_rate=mean("format_ok"), truncated=float(np.mean([r["finish"] == "length" for r in rows])))  # fmt: skip


def table(reports):
    """[(name, summary)] -> lines of a Markdown table"""
    lines = ["| | accuracy % (95 % interval) | mean length | format % | cut % | answers |", "|---|---|---|---|---|---|"]
    for name, s in reports:
        lines.append(f"| {name} | {100 * s['accuracy']:.1f} ({100 * s['low']:.1f} - {100 * s['high']:.1f}) | {s['length']:.1f} | "
                     f"{100 * s['format_rate']:.1f} | {100 * s['truncated']:.1f} | {s['n']} |")  # fmt: skip
    return "\n".join(lines)


def read_responses(path):
    """what an earlier try finished; a half-written last line is dropped from the file too"""
    rows, good = [], 0
    for line in open(path, "rb") if path.exists() else []:
        try:
            rows.append(json.loads(line))
            good += len(line)
        except json.JSONDecodeError:
            break
    if path.exists():
        with open(path, "r+b") as f:
            f.truncate(good)
    return rows


def evaluate(config, device):
    """answers of one model -> its report {"all": summary, source: summary, ...}, also written to out/report.json"""
    rank, world = dist.get_rank(), dist.get_world_size()
    say = tqdm.write if rank == 0 else lambda *_: None
    out = Path(config.out)
    run.claim(config, ("model", "data", "samples", "temperature", "top_p", "max_len", "system_prompt", "seed"))
    log = run.Log(out, config, 10**9)
    done = [None]
    run.on_main_first(lambda: done.__setitem__(0, read_responses(out / "responses.jsonl")))
    dist.broadcast_object_list(done, src=0)
    rows = done[0]

    policy, processor = model.load(config.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    with run.for_people():
        records, problems = data.read(config.data, strict=config.strict)
        records = packing.usable(
            records[: config.limit or None], processor, config.max_prompt_len, problems, config.system_prompt
        )
    if problems:
        say(problems.summary())
    if not records:
        raise SystemExit(f"{config.data}: no usable problem in it")
    order = {r.id: i for i, r in enumerate(records)}
    rows = [r for r in rows if r["id"] in order]
    finished = {r["id"] for r in rows}
    todo = [r for r in records if r.id not in finished]
    engine = TorchEngine(policy.hf, processor, policy.banned, config.max_rows)
    bar = tqdm(
        total=len(records),
        initial=len(finished),
        desc=config.name or Path(config.model).name,
        leave=False,
        disable=None if rank == 0 else True,
    )
    for first in range(0, len(todo), config.chunk):
        mine = todo[first : first + config.chunk][rank::world]
        prompts = [packing.encode(r, processor, config.system_prompt) for r in mine]
        seeds = [(config.seed, 0, order[r.id]) for r in mine]
        groups = engine.generate(prompts, config.samples, config.max_len, seeds, config.temperature, config.top_p)
        answers = []
        for r, group in zip(mine, groups):
            for sample, x in enumerate(group):
                text, s = judge(r, x, processor)
                answers.append(dict(id=r.id, sample=sample, source=r.source, problem=r.problem, choices=r.choices,
                                    completion=text, answer=r.answer,
                                    given=s.answer, right=s.correct and s.format_ok, why=s.why, format_ok=s.format_ok,
                                    length=len(x.ids), finish=x.finish))  # fmt: skip
        gathered = [None] * world
        dist.all_gather_object(gathered, answers)
        new = [a for part in gathered for a in part]
        rows += new
        if rank == 0:
            with open(out / "responses.jsonl", "a") as f:
                f.writelines(json.dumps(a, ensure_ascii=False) + "\n" for a in new)
        bar.update(len(todo[first : first + config.chunk]))
        bar.set_postfix(accuracy=f"{np.mean([r['right'] for r in rows]):.3f}")
    bar.close()

    rows.sort(key=lambda r: (order[r["id"]], r["sample"]))
    by_source = defaultdict(list)
    for r in rows:
        by_source[r["source"]].append(r)
    report = {"all": summarize(rows)} | {source: summarize(part) for source, part in sorted(by_source.items())}
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    log.write(dict(step=len(rows), **report["all"]))
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
            one = replace(config, model=toy.find(model_name), data=toy.find(config.data), name=f"{name}, {how}", out=folder,
                          temperature=temperature, system_prompt=toy.ZERO_PROMPT if name == "base" else "")  # fmt: skip
            lines.append((one.name, evaluate(one, device)["all"]))
    return lines


def main(config):
    device = run.start_ranks()
    config.out = config.out or run.default_out("eval", config.model, config.data)
    if config.model == "toy:all":
        lines = toy_table(config, device)
    else:
        if "toy:" in config.model + config.data:
            import toy

            run.on_main_first(lambda: (toy.find(config.model), toy.find(config.data)))
            config.model, config.data = toy.find(config.model), toy.find(config.data)
        report = evaluate(config, device)
        name = config.name or Path(config.model).name
        lines = [(name, report["all"])] + [
            (f"{name}: {k}", v) for k, v in report.items() if k != "all" and len(report) > 2
        ]
    if run.is_main():
        text = table(lines)
        (Path(config.out) / "table.md").write_text(text + "\n")
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    run.guard(main, run.parse_config(Config, RECIPES))
