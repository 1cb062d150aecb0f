"""Held-out problems, scored by one rule: by eval.py, and by grpo.py while it trains.

The seeds are those of eval.py, so that an evaluation of the finished model repeats the last
validation answer by answer, and all validations of a run draw the same random numbers.
"""

from itertools import chain

import torch.distributed as dist

import ptst
import reward
from benchmarks import rules
from benchmarks.report import summarize
from nano import data, run
from nano.rollout import Sample

DROPPED = ("bench", "tags", "query", "query_cot")  # of a record's meta: found elsewhere in the row
COUNTED = ("id", "sample", "right", "format_ok", "length", "finish")  # what `summarize` reads


def answer(record: data.Record, number: int, sample: Sample) -> dict:
    """A line of responses.jsonl: the text of the answer, its verdicts, and why."""
    score = reward.score(sample.text, record.answer, record.choices, sample.finish == "length")
    row = dict(id=record.id, sample=number, source=record.source, problem=record.problem)
    row |= dict(choices=record.choices, completion=sample.text, answer=record.answer)
    row |= dict(given=score.answer, right=score.correct and score.format_ok, why=score.why)
    row |= dict(format_ok=score.format_ok, length=sample.length, finish=sample.finish)
    if bench := record.meta.get("bench"):
        strict, fork = rules.Verdict(False, score.why), rules.fork(bench, sample.text, record)
        if score.format_ok:
            strict = rules.official(bench, score.answer, record)
        meta = {k: v for k, v in record.meta.items() if k not in DROPPED}
        row |= dict(bench=bench, tags=record.meta["tags"], meta=meta, training_right=row["right"])
        row |= strict._asdict() | {f"fork_{k}": v for k, v in fork._asdict().items()}
    return row


def under(row: dict, max_len: int) -> dict:
    """The same draw under a shorter limit: a longer answer would have been cut, and is wrong."""
    fits = row["length"] <= max_len
    return row if fits else row | dict(right=False, format_ok=False, finish="length")


def validate(engine, policy, encode, records, config, stages, done: int) -> dict:
    """After `done` steps: eval_accuracy, eval_format, ... for the log (a collective).

    Answers are drawn once, under the evaluation's limit; what they are worth under that of the
    stage follows from their length. The first temperature has the plain names, the others have
    theirs at the end.
    """
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    longest = config.eval_max_len or max(stage.max_len for stage in stages)
    mine = range(rank, len(records), world)
    _, stage = ptst.stage_at(stages, max(0, done - 1))  # the stage of the last step
    for number, word in enumerate(config.eval_temperature.split(",")):
        engine.sync(policy)
        prompts, seeds = [encode(records[i]) for i in mine], [(config.seed, 0, i) for i in mine]
        sampling = (longest, seeds, float(word), config.eval_top_p)
        groups = engine.generate(prompts, 1, *sampling)
        run.meet()  # one rank may sample much longer than the others
        rows = [answer(records[i], 0, sample) for i, (sample,) in zip(mine, groups)]
        gathered = [None] * world
        dist.all_gather_object(gathered, [{k: row[k] for k in COUNTED} for row in rows])
        rows = list(chain(*gathered))
        s, short = summarize(rows), summarize([under(row, stage.max_len) for row in rows])
        names = dict(accuracy=s["accuracy"], low=s["low"], high=s["high"], format=s["format_rate"])
        names |= dict(len=s["length"], cut=s["truncated"])
        names |= dict(accuracy_stage=short["accuracy"], cut_stage=short["truncated"])
        end = f"_t{word.strip()}" if number else ""
        found |= {f"eval_{name}{end}": value for name, value in names.items()}
        how = f"T={word}" if float(word) else "greedy"
        run.say(
            f"after step {done}: {len(records)} held out, {how}: "
            "accuracy {accuracy:.3f} ({low:.3f} - {high:.3f})  format {format:.2f}  len {len:.1f}  "
            "cut {cut:.2f}  at this stage's limit {accuracy_stage:.3f}".format(**names)
        )
    return found
