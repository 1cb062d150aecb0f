"""From records with a response to what each rank computes in each step of sft.py.

`shelve` writes the records into one file, which every rank maps into memory: no process ever holds
them all. `Steps` makes what a rank computes in step k, `ahead` has it made before it is needed,
`batches` cuts it into micro-batches.
"""

import os
import pickle
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from nano import data, generic, packing, run


def shuffled(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def shelve(config, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pickles the records that have a response into `file`, and reports the others.

    Returns where they lie: (begin, end) of each one to train on, and of each one held out. One rank
    does it for all: the pictures of a parquet file are more than the ranks of a host could hold.
    """
    paths = [path for path in (config.data, config.eval_data) if path]
    problems, ends, pictures, counts = data.Problems(config.strict), [0], [], []
    with open(file, "wb") as f:
        for path in paths:
            before = len(pictures)
            for source, row, record in data.stream(path, problems, check_images=False):
                if not record.response:
                    problems.add("no response", "", source, row, record.id)
                    continue
                f.write(pickle.dumps(record))
                ends.append(f.tell())
                pictures.append({hash(image) for image in record.images})
            counts.append(len(pictures) - before)
    if problems:
        run.say(problems.summary())
    if 0 in counts:
        path = paths[counts.index(0)]
        raise ValueError(f"{path}: no record with a response in it; cold_start.py makes them")
    n = counts[0]
    held = hold_out(pictures[:n], 0 if config.eval_data else config.holdout, config.seed)
    if all(held):
        raise ValueError(f"--holdout {config.holdout} leaves none of {n} records to train on")
    held = np.array(held + [True] * (len(pictures) - n))  # all of eval_data
    spans = np.stack([ends[:-1], ends[1:]], 1)
    return spans[~held], spans[held]


def hold_out(pictures: list[set], count: int, seed: int) -> list[bool]:
    """Draws `count` records, and holds out all that share a picture with them."""
    drawn = set(shuffled(len(pictures), seed)[:count])
    seen = set().union(*(pictures[i] for i in drawn))
    return [i in drawn or not seen.isdisjoint(own) for i, own in enumerate(pictures)]


class Shelf:
    """Some records of a file of `shelve`, read when they are asked for.

    Forked workers share the file's pages. They would copy lists of objects, since Python changes an
    object's count of references when it looks at it.
    """

    def __init__(self, file: Path, spans: np.ndarray):
        self.bytes, self.spans = np.memmap(file, np.uint8, "r"), spans

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        begin, end = self.spans[i]
        return pickle.loads(self.bytes[begin:end])  # we wrote them ourselves


def kind(processor):
    """The module that makes prompts and batches for this processor."""
    return generic if isinstance(processor, generic.Processor) else packing


def response_ids(record: data.Record, processor, drop_chains: bool) -> list[int]:
    """Token ids of the response and the end of turn; without its chain only the answer is left."""
    text = record.response
    if drop_chains:
        text = re.sub(r"<think>.*</think>\s*", "", text, flags=re.S)
    tokenizer = processor.tokenizer
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def encode(records: list, processor, config, problems: data.Problems) -> list[tuple]:
    """[(Prompt, response ids)]; what cannot be read or does not fit is reported and left out."""
    sequences = []
    for record in records:
        try:
            prompt = kind(processor).encode(record, processor, config.system_prompt)
            ids = response_ids(record, processor, config.drop_chains)
            tokens = len(prompt.ids) + len(ids)
            if tokens > config.cutoff:
                limit = f"{tokens} tokens, --cutoff is {config.cutoff}"
                raise data.BadRow("sequence too long", limit)
            sequences.append((prompt, ids))
        except data.BadRow as bad:
            problems.add(*bad.args, record.source, None, record.id)
        except ValueError as error:
            problems.add("broken image", str(error), record.source, None, record.id)
    return sequences


class Steps(Dataset):
    """Item k is what this rank computes in step k, [(Prompt, response ids)], and what was wrong.

    Ranks get about the same work. All follows from the seed and k, so that steps can be made ahead
    of time and a run can be resumed at any of them.
    """

    def __init__(self, records: Shelf, processor, config, width: int):
        self.records, self.processor, self.config, self.width = records, processor, config, width
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.per_epoch = -(-len(records) // config.batch_size)

    def __len__(self):
        return self.config.epochs * self.per_epoch

    def __getitem__(self, step):
        epoch, place = divmod(step, self.per_epoch)
        order = shuffled(len(self.records), self.config.seed * 1000 + epoch)
        size = self.config.batch_size
        chosen = [self.records[i] for i in order[place * size : (place + 1) * size]]
        owners = [i % self.world for i in range(len(chosen))]
        if self.world > 1:
            owners = packing.rebalance([self.cost(r) for r in chosen], owners, self.world)
        mine = [record for record, owner in zip(chosen, owners) if owner == self.rank]
        problems = data.Problems()
        return encode(mine, self.processor, self.config, problems), problems

    def cost(self, record):
        """The work of a sequence, known without its images; 0 for one that will be left out."""
        config, processor = self.config, self.processor
        try:
            tokens = kind(processor).prompt_length(record, processor, config.system_prompt)
            tokens += len(response_ids(record, processor, config.drop_chains))
            return packing.work(tokens, self.width)
        except ValueError:
            return 0


def close_locks(worker):
    """A worker must not hold the lock on the run's folder longer than its rank lives."""
    for lock in run.locks:
        lock.close()


def ahead(steps: Steps, start: int, workers: int):
    """Yields the items of `steps` from `start` on, made before they are needed."""
    if workers:
        # A tokenizer's threads do not survive a fork, and each tensor of a worker is an open file.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        collate_fn=tuple,
        worker_init_fn=close_locks,
        multiprocessing_context="fork" if workers else None,
    )
    items = iter(loader)
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def batches(sequences: list, steps: Steps, device):
    """This rank's sequences as micro-batches, of which every rank gets as many (a collective)."""
    module, processor = kind(steps.processor), steps.processor
    lengths = [len(prompt.ids) + len(ids) for prompt, ids in sequences]
    micro_tokens = steps.config.micro_tokens if module is packing else 1  # else one by one
    for part in packing.micro_batches(lengths, micro_tokens, steps.width):
        yield module.pack(sequences[part] or [module.blank(processor)], device)
