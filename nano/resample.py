"""Dynamic sampling (DAPO, arXiv 2503.14476): a question whose answers all got the same reward
teaches nothing, and gives way to a further one. The paper does without it.

Each step has its own places in the order of the data, `times` as many as it wants, and leaves
unused what it does not need. So what it asks follows from the seed and the step alone, and a run
that was stopped goes on exactly without anything to be saved.
"""

import math
from collections.abc import Callable

import torch.distributed as dist


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
