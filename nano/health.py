"""How a run goes: a line now and then, and each trouble once, with the knob that helps.

A rule holds the means over the last five steps (`new`) against those over the first five (`old`).
The limits are ours: far outside of what healthy runs of the toy show.
"""

import math
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace as Means

from nano.run import read_log

WINDOW = 5  # steps
RULES = {  # what is said -> when
    "no group has had different rewards for 5 steps, so that nothing is learned (mean reward "
    "{new.reward:.2f}). At 0 the problems are too hard, or the reward cannot read the answers "
    "(python -m tools.viewer RUN shows them); at 1 they are too easy: other --data": (
        lambda new, old: new.signal == 0
    ),
    "{new.truncated:.0%} of the answers are cut at the limit, hence wrong: a longer limit in "
    "--stages, or a start whose chains are shorter": lambda new, old: new.truncated > 0.5,
    "{new.format_rate:.0%} of the answers have the format: a cold start, a --system_prompt "
    "that asks for it, or --format_weight 1": (
        lambda new, old: new.format_rate + new.truncated < 0.5
    ),
    "the reward has fallen to {new.reward:.2f} from {old.best:.2f}: go on from an earlier "
    "checkpoint with a smaller --lr or a larger --kl_coef": (
        lambda new, old: new.reward < old.best / 2 and old.best > 0.2
    ),
    "answers have shrunk from {old.len_mean:.0f} to {new.len_mean:.0f} tokens: is there a shortcut "
    "to the reward (python -m tools.viewer RUN)?": lambda new, old: new.len_mean < old.len_mean / 3,
    "the entropy has grown from {old.entropy:.2f} to {new.entropy:.2f}, answers become noise: a "
    "smaller --lr, a larger --kl_coef, no --clip_eps_high": (
        lambda new, old: new.entropy > max(2 * old.entropy, old.entropy + 0.5)
    ),
    "the policy is {new.kl:.2f} nats per token from its start: a larger --kl_coef or a smaller "
    "--lr": lambda new, old: new.kl > 0.5,
    "sampler and trainer differ by {new.logprob_gap:.3f} nats per token, {old.logprob_gap:.3f} at "
    "first: --tis 2 bounds the harm; --engine torch shows whether it is vLLM": (
        lambda new, old: new.logprob_gap > min(0.1, max(0.02, 3 * old.logprob_gap))
    ),
}
KEYS = ("reward", "format_rate", "truncated", "len_mean", "entropy", "kl", "logprob_gap", "signal")


def means(rows: list[dict]) -> Means:
    """A number that is missing somewhere (null in the log) is nan, and no rule holds for it."""
    rows = [{k: math.nan if row[k] is None else row[k] for k in KEYS} for row in rows]
    return Means(**{k: sum(row[k] for row in rows) / len(rows) for k in KEYS})


class Health:
    """Sees each row of the log. A run that is gone on with does not repeat its warnings."""

    def __init__(self, out, total: int, questions: int):
        self.total, self.questions, self.rows, self.best = total, questions, [], 0.0
        self.open, self.clock = dict(RULES), deque([time.time()], maxlen=21)
        with suppress(ValueError):  # there is no log yet
            for row in read_log(out):
                self.warnings(row)

    def warnings(self, row: dict) -> list[str]:
        """The troubles that show for the first time."""
        self.rows.append(row | dict(signal=1 - row["zero_var_groups"] / self.questions))
        if len(self.rows) < WINDOW:
            return []
        new, old = means(self.rows[-WINDOW:]), means(self.rows[:WINDOW])
        old.best = self.best = max(self.best, new.reward)
        found = [words for words, shows in self.open.items() if shows(new, old)]
        return [
            f"warning: {words.format(new=new, old=old)}" for words in found if self.open.pop(words)
        ]

    def see(self, row: dict) -> list[str]:
        """What is to be said after a step."""
        self.clock.append(time.time())
        said, step = self.warnings(row), row["step"]
        due = step == 2 or step % max(5, self.total // 20) == 0
        if due and step < self.total:
            pace = (self.clock[-1] - self.clock[0]) / (len(self.clock) - 1)
            left = timedelta(seconds=round(pace * (self.total - step)))
            recent, times = self.rows[-20:], [key for key in row if key.startswith("t_")]
            sums = {key[2:]: sum(r.get(key, 0.0) for r in recent) for key in times}
            total = sums.pop("total")
            shares = ", ".join(f"{k} {v / total:.0%}" for k, v in sums.items() if v > total / 200)
            said.append(
                f"step {step}: {left} to go at the pace of the last {len(self.clock) - 1} steps; "
                f"{row['tokens_per_s']:,.0f} tokens/s; {shares}; "
                f"{means(recent).signal:.0%} of the groups have a signal"
            )
        return said
