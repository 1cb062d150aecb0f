"""From records with a response to what each rank computes in each step of sft.py.

`shelve` writes the records into one file, which every rank maps into memory, since the pictures of
a parquet file are more than the ranks of a host could hold. `batches` cuts a step's sequences into
micro-batches.
"""

import json
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from nano import data, generic, packing, run


def shuffled(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def shelve(config, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes the records that have a response into `file`, and reports the others.

    Returns where they lie: (begin, end) of each one to train on, and of each one held out.
    """
    problems, shelves, pictures = data.Problems(config.strict), [], []
    paths = [path for path in (config.data, config.eval_data) if path]
    with open(file, "wb") as f:
        for path in paths:
            ends = [f.tell()]
            split = "held-out" if shelves else config.split
            where = (False, split, config.image_root)
            for source, row, record in data.stream(path, problems, *where):
                if record.response:
                    f.write(to_bytes(record))
                    ends.append(f.tell())
                    pictures.append({hash(image) for image in record.images})
                else:
                    problems.add("no response", "", source, row, record.id)
            shelves.append(np.stack([ends[:-1], ends[1:]], 1))
    run.say(problems.summary())
    for path, spans in zip(paths, shelves):
        if not len(spans):
            raise ValueError(f"{path}: no record with a response in it; cold_start.py makes them")
    if config.eval_data:
        return shelves[0], shelves[1]
    held = np.array(hold_out(pictures, config.holdout, config.seed))
    if held.all():
        raise ValueError(f"--holdout {config.holdout} leaves none of {len(held)} records")
    return shelves[0][~held], shelves[0][held]


def to_bytes(record: data.Record) -> bytes:
    """A line of JSON, and behind it the pictures that are bytes; there stand their sizes."""
    sizes = [len(image) if isinstance(image, bytes) else image for image in record.images]
    line = json.dumps(vars(record) | {"images": sizes}, default=str).encode() + b"\n"
    return line + b"".join(image for image in record.images if isinstance(image, bytes))


def from_bytes(raw: bytes) -> data.Record:
    line, _, rest = raw.partition(b"\n")
    record = data.Record(**json.loads(line))
    record.place = tuple(record.place)
    for i, size in enumerate(record.images):
        if isinstance(size, int):
            record.images[i], rest = rest[:size], rest[size:]
    return record


def hold_out(pictures: list[set], count: int, seed: int) -> list[bool]:
    """Draws `count` records, and holds out all that share a picture with them."""
    drawn = set(shuffled(len(pictures), seed)[:count])
    seen = set().union(*(pictures[i] for i in drawn))
    return [i in drawn or not seen.isdisjoint(own) for i, own in enumerate(pictures)]


def split(records: list[data.Record], count: int, seed: int) -> tuple[list, list]:
    """-> the records to train on, and `count` held out with all that share a picture with them."""
    held = hold_out([{hash(image) for image in r.images} for r in records], count, seed)
    if all(held):
        raise ValueError(f"--holdout {count} leaves none of {len(held)} records")
    parts = [[r for r, out in zip(records, held) if out == wanted] for wanted in (False, True)]
    return parts[0], parts[1]


def load_questions(config, processor) -> tuple[list[data.Record], list[data.Record]]:
    """For grpo.py: the usable records of --data, and those of validation, which it never trains on.

    What is wrong with the others is said and counted.
    """
    found = []
    for path, part in ((config.data, config.split), (config.eval_data, "held-out")):
        if not path:
            continue
        where = dict(split=part, image_root=config.image_root)
        records, problems = data.read(path, config.strict, **where)
        found.append(packing.usable(records, processor, config.max_prompt_len, problems))
        if problems:
            run.say(problems.summary())
        if not found[-1]:
            raise ValueError(f"{path}: no usable problem in it")
    if config.eval_data:
        return found[0], found[1]
    return split(found[0], config.holdout, config.seed)


def kind(processor):
    """The module that makes prompts and batches for this processor."""
    return generic if isinstance(processor, generic.Processor) else packing


def response_ids(record: data.Record, processor, drop_chains: bool) -> list[int]:
    """Token ids of the response and the end of turn; without its chain only the answer is left."""
    text, tokenizer = record.response, processor.tokenizer
    if drop_chains:
        text = re.sub(r"<think>.*</think>\s*", "", text, flags=re.S)
    text = processor.plain(processor.rest(text))
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def encode(records: list, processor, config, problems: data.Problems) -> list[tuple]:
    """[(Prompt, response ids)]; what cannot be read or does not fit is reported and left out."""
    sequences = []
    for record in records:
        try:
            prompt = kind(processor).encode(record, processor)
            ids = response_ids(record, processor, config.drop_chains)
            tokens = len(prompt.ids) + len(ids)
            if tokens > config.cutoff:
                detail = f"{tokens} tokens, --cutoff is {config.cutoff}"
                raise data.BadRow("sequence too long", detail)
            sequences.append((prompt, ids))
        except ValueError as error:
            bad_row = isinstance(error, data.BadRow)
            what = error.args if bad_row else ("broken image", str(error))
            problems.add(*what, *record.place, record.id)
    return sequences


class Steps(Dataset):
    """Item k is what this rank computes in step k, [(Prompt, response ids)], and what was wrong.

    `file` and `spans` are of `shelve`; forked workers share the file's pages. All follows from the
    seed and k, so that a run can be resumed at any step.
    """

    def __init__(self, file: Path, spans: np.ndarray, processor, config, width: int):
        self.bytes, self.spans = np.memmap(file, np.uint8, "r"), spans
        self.processor, self.config, self.width = processor, config, width
        self.per_epoch = -(-len(spans) // config.batch_size)

    def __len__(self):
        return self.config.epochs * self.per_epoch

    def record(self, i: int) -> data.Record:
        begin, end = self.spans[i]
        return from_bytes(self.bytes[begin:end].tobytes())

    def __getitem__(self, step):
        rank, world, size = dist.get_rank(), dist.get_world_size(), self.config.batch_size
        epoch, place = divmod(step, self.per_epoch)
        order = shuffled(len(self.spans), self.config.seed * 1000 + epoch)
        chosen = [self.record(i) for i in order[place * size : (place + 1) * size]]
        owners = [i % world for i in range(len(chosen))]
        if world > 1:
            owners = packing.rebalance([self.cost(record) for record in chosen], owners, world)
        mine = [record for record, owner in zip(chosen, owners) if owner == rank]
        problems = data.Problems()
        return encode(mine, self.processor, self.config, problems), problems

    def cost(self, record: data.Record) -> float:
        """The work of a sequence, known without its images; 0 for one that will be left out."""
        config, processor = self.config, self.processor
        try:
            tokens = kind(processor).prompt_length(record, processor)
            tokens += len(response_ids(record, processor, config.drop_chains))
            return packing.work(tokens, self.width)
        except ValueError:
            return 0


def start_worker(_):
    """It must not hold the lock on the run's folder longer than its rank lives. A signal to all
    processes of a rank tells the rank to finish its step, for which it needs its workers."""
    for lock in run.locks:
        lock.close()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ahead(steps: Steps, start: int, workers: int) -> DataLoader:
    """The items of `steps` from `start` on, made by worker processes before they are needed."""
    options = dict(sampler=range(start, len(steps)), batch_size=None, collate_fn=tuple)
    if workers:
        # A tokenizer's threads do not survive a fork, and each tensor of a worker is an open file.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        options |= dict(worker_init_fn=start_worker, multiprocessing_context="fork")
    return DataLoader(steps, num_workers=workers, **options)


def batches(sequences: list, steps: Steps, device):
    """This rank's sequences as micro-batches, of which every rank gets as many (a collective)."""
    module, processor = kind(steps.processor), steps.processor
    lengths = [len(prompt.ids) + len(ids) for prompt, ids in sequences]
    micro_tokens = steps.config.micro_tokens if module is packing else 1  # else one by one
    for part in packing.micro_batches(lengths, micro_tokens, steps.width):
        yield module.pack(sequences[part] or [module.blank(processor)], device)
