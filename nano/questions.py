"""Which questions a step asks: the order of training, and dynamic sampling.

Dynamic sampling (DAPO, arXiv 2503.14476): a question whose answers all got the same reward teaches
nothing, and gives way to a further one. The paper does without it. Each step has its own places in
the order of the data, `resample` as many as it wants, and leaves unused what it does not need. So
what it asks follows from the seed and the step alone, and a run that was stopped goes on exactly
without anything to be saved.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist

from nano import data, packing


@lru_cache(maxsize=8)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Every epoch goes through the records in an order of its own."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    return torch.randperm(count, generator=generator).tolist()


class Questions:
    """The problems in their order of training, a function of the seed and the step alone.

    look([Prompt]) encodes images where the vision tower is frozen: it sees each once a step.
    """

    def __init__(self, records, processor, config, look: Callable | None = None):
        self.records, self.processor, self.config, self.look = records, processor, config, look
        self.ahead = packing.Ahead(processor)
        self.mine = range(dist.get_rank(), config.questions, dist.get_world_size())

    def record(self, step: int, number: int) -> data.Record:
        """The record of question `number` of a step."""
        place = step * self.config.questions * max(1, self.config.resample) + number
        epoch, place = divmod(place, len(self.records))
        return self.records[epoch_order(len(self.records), self.config.seed, epoch)[place]]

    def prompt(self, step: int, number: int) -> packing.Prompt:
        """The question as the model reads it."""
        record = self.record(step, number)
        made = self.ahead.take((step, number), record)
        prompt = packing.encode(record, self.processor, made)
        prompt.number = number
        if self.look:
            self.look([prompt])
        return prompt

    def prompts(self, step: int, numbers: range) -> list[packing.Prompt]:
        """This rank's share of these. Threads begin with the pictures of the next step."""
        prompts = [self.prompt(step, n) for n in numbers[self.mine.start :: self.mine.step]]
        self.ahead.start({(step + 1, n): self.record(step + 1, n) for n in self.mine})
        return prompts


def rounds(ask: Callable, judge: Callable, config) -> tuple:
    """Asks until enough questions have a signal, at most config.resample times (a collective).

    ask(numbers) gives this rank's groups for its share of these questions, `judge` is grpo.score.
    Returns this rank's groups to train on, the numbers of those of all ranks in order, and what
    the log says of all that were drawn. Questions without a signal fill up what is missing.
    """
    wanted, times = config.questions, config.resample
    if times <= 1:
        return ask(range(wanted)), list(range(wanted)), {}
    groups, seen, numbers = [], {}, range(wanted)  # number -> (signal, mean reward, tokens)
    while numbers:
        more = ask(numbers)
        groups += more
        own, parts = {}, [None] * dist.get_world_size()
        for group in more:
            given = [judge(sample, config.format_weight).reward for sample in group]
            told = (len(set(given)) > 1, sum(given) / len(given), sum(s.length for s in group))
            own[group[0].prompt.number] = told
        dist.all_gather_object(parts, own)
        for part in parts:
            seen |= part
        drawn, good = len(seen), sum(signal for signal, *_ in seen.values())
        # As many more as will do if the share of those with a signal stays.
        more = math.ceil((wanted - good) * drawn / max(good, 1))
        numbers = range(drawn, min(drawn + more, wanted * times))
    used = sorted(sorted(seen, key=lambda n: (not seen[n][0], n))[:wanted])
    _, means, tokens = zip(*(seen[n] for n in sorted(seen)))
    row = dict(drawn=drawn, drawn_signal=good / drawn, drawn_reward=sum(means) / drawn)
    groups = [group for group in groups if group[0].prompt.number in used]
    return groups, used, row | dict(drawn_tokens=sum(tokens))
