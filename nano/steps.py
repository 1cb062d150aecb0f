"""Records with a response -> what each rank computes in each step of sft.py.

`shelve` puts the records into a file of the run's folder, one by one; every rank maps this file into memory, and no
process ever holds them all. `Steps` tells what a rank computes in step k, a function of the seed and k alone; `ahead`
has it made before it is needed; `batches` cuts it into micro-batches.
"""

import os
import pickle
import re
import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from nano import data, mllama, packing, run


def shelve(path, file, strict, say, holdout=0, seed=0):
    """records with a response of `path`, pickled one after the other, into `file`; what is wrong with others is said.

    beside it goes where each one ends and which are held out. called by one rank for all: pictures in a parquet file
    are more than eight ranks of a machine could hold, and a file without pictures, too, takes a while to parse.
    """
    problems, ends, pictures = data.Problems(strict), [0], []
    with open(file, "wb") as f:
        for source, row, record in data.stream(path, problems, check_images=False):
            if not record.response:
                problems.add("no response", "", source, row, record.id)
                continue
            f.write(pickle.dumps(record))
            ends.append(f.tell())
            pictures.append({hash(image) for image in record.images})
    if problems:
        say(problems.summary())
    if not pictures:
        raise ValueError(
            f"{path}: no record with a response in it; sft.py needs chains (cold_start.py makes them)"
        )
    held = hold_out(pictures, holdout, seed)
    if all(held):
        raise ValueError(
            f"{path}: --holdout {holdout} leaves none of {len(held)} records to train on"
        )
    np.savez(file.with_suffix(".npz"), ends=np.array(ends), held=np.array(held))


def hold_out(pictures, count, seed):
    """pictures of each record -> is it held out? `count` are, drawn by the seed, and all that share a picture with them"""
    drawn = set(
        torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[
            :count
        ].tolist()
    )
    seen = set().union(*(pictures[i] for i in drawn))
    return [i in drawn or not seen.isdisjoint(p) for i, p in enumerate(pictures)]


class Shelf:
    """the records that `shelve` put into a file, those held out or the others, read when they are asked for.

    forked workers share the file's pages; lists of objects they would copy bit by bit, since in Python to look at an
    object is to write to its count of references.
    """

    def __init__(self, file, held):
        index = np.load(file.with_suffix(".npz"))
        self.ends, self.block = index["ends"], np.memmap(file, np.uint8, "r")
        self.which = np.nonzero(index["held"] == held)[0]

    def __len__(self):
        return len(self.which)

    def __getitem__(self, i):
        i = self.which[i]
        return pickle.loads(self.block[self.ends[i] : self.ends[i + 1]])  # our own bytes


# -----------------------------------------------------------------------------------------------------------------
# record -> tokens


def kind(processor):
    """the module that makes tokens and batches: rows are packed, except for Llama-3.2-Vision's"""
    return mllama if isinstance(processor, mllama.Processor) else packing


def response_ids(record, processor, drop_chains):
    """token ids of the response and the end of turn; without its chain only <answer>...</answer> is left"""
    text = record.response
    if drop_chains:
        text = re.sub(r"<think>.*</think>\s*", "", text, flags=re.S)
    return processor.tokenizer(text, add_special_tokens=False).input_ids + [
        processor.tokenizer.eos_token_id
    ]


def encode(records, processor, config, problems):
    """records -> [(Prompt, response ids)]; what cannot be read or does not fit is reported and left out"""
    sequences = []
    for record in records:
        try:
            prompt = kind(processor).encode(record, processor, config.system_prompt)
            ids = response_ids(record, processor, config.drop_chains)
            if len(prompt.ids) + len(ids) > config.cutoff:
                raise data.BadRow(
                    "sequence too long",
                    f"{len(prompt.ids) + len(ids)} tokens, --cutoff is {config.cutoff}",
                )
            sequences.append((prompt, ids))
        except data.BadRow as bad:
            problems.add(*bad.args, record.source, None, record.id)
        except ValueError as error:
            problems.add("broken image", str(error), record.source, None, record.id)
    return sequences


def cost(record, processor, config, width):
    """the work of a sequence, known without decoding its images; nothing for one that encode() will leave out"""
    try:
        prompt = kind(processor).prompt_length(record, processor, config.system_prompt)
        return packing.work(
            prompt + len(response_ids(record, processor, config.drop_chains)), width
        )
    except (data.BadRow, ValueError):
        return 0


# -----------------------------------------------------------------------------------------------------------------
# steps


class Steps(Dataset):
    """item k -> what this rank computes in step k, [(Prompt, response ids)], and the Problems met while reading it.

    ranks get about the same work, every epoch an order of its own. all of it follows from the seed and k alone: worker
    processes may make the steps ahead of time, and a run can be resumed at any of them.
    """

    def __init__(self, records, processor, config, width):
        self.records, self.processor, self.config, self.width = records, processor, config, width
        self.rank, self.world = (
            dist.get_rank(),
            dist.get_world_size(),
        )  # a worker need not know of the others
        self.per_epoch = -(-len(records) // config.batch_size)

    def __len__(self):
        return self.config.epochs * self.per_epoch

    def __getitem__(self, step):
        config = self.config
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(
            len(self.records), generator=torch.Generator().manual_seed(config.seed * 1000 + epoch)
        )
        chosen = [
            self.records[i]
            for i in order[place * config.batch_size :][: config.batch_size].tolist()
        ]
        owners = [i % self.world for i in range(len(chosen))]
        if self.world > 1:
            costs = [cost(r, self.processor, config, self.width) for r in chosen]
            owners = packing.rebalance(costs, owners, self.world)
        bad = data.Problems()
        return encode(
            [r for r, owner in zip(chosen, owners) if owner == self.rank],
            self.processor,
            config,
            bad,
        ), bad


def forget(worker):
    """a worker lets go of what is its rank's: the lock on the run's folder, and the heartbeat's bell that signals ring"""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for lock in run.locks:
        lock.close()


def ahead(steps, start, workers):
    """the items of `steps` from `start` on, made by worker processes, or by a thread while the device computes"""
    if workers:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # or the tokenizer complains about the fork
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[
            1
        ]  # each tensor that comes from a worker is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    items = iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, len(steps)),
            num_workers=workers,
            collate_fn=tuple,
            worker_init_fn=forget,
            multiprocessing_context="fork" if workers else None,
        )
    )
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def batches(sequences, processor, config, width, device):
    """this rank's sequences as micro-batches, for Llama-3.2-Vision one by one; as many on every rank (a collective)"""
    lengths = [len(p.ids) + len(ids) for p, ids in sequences]
    micro_tokens = 1 if kind(processor) is mllama else config.micro_tokens
    for part in packing.micro_batches(lengths, micro_tokens, width):
        yield kind(processor).pack(sequences[part] or [kind(processor).blank(processor)], device)
