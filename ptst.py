"""Progressive Thinking Suppression Training: the stage list (paper Sec. 3.4, Eq. 2).

In stage s every answer is cut at L_s tokens and every question is answered G_s times. Training
starts with a short limit, which suppresses overthinking, and may think longer later on.
`python ptst.py [NAME or STAGES ...]` prints schedules with their token budgets.
"""

import difflib
import re
import sys
from itertools import accumulate
from typing import NamedTuple

FORM = "a stage is LENGTHxGROUPxSTEPS such as 4Kx16x100 (K = 1024 tokens); commas separate stages"


class Stage(NamedTuple):
    max_len: int  # L_s of Eq. 2: the most tokens that an answer may have
    group_size: int  # G_s: answers per question
    steps: int  # optimisation steps of the stage


def parse(stages: str | list) -> list[Stage]:
    """Read "4Kx16x100,8Kx8x100", a name of SCHEDULES, or a list of tuples or of such parts."""
    stages = SCHEDULES.get(str(stages).strip(), stages)
    parts = stages.split(",") if isinstance(stages, str) else list(stages)
    if not parts:
        raise ValueError(f"no stages are given; {FORM}")
    return [_parse_stage(part, f"stage {i} ({part!r})") for i, part in enumerate(parts, 1)]


def _parse_stage(part: str | tuple, where: str) -> Stage:
    if isinstance(part, str):
        text = re.sub(r"\s", "", part).upper()
        if found := re.fullmatch(r"(\d+)(K?)[X×](\d+)[X×](\d+)", text, re.ASCII):
            length, kilo, group_size, steps = found.groups()
            part = int(length) * (1024 if kilo else 1), int(group_size), int(steps)
    if not isinstance(part, (list, tuple)) or [type(field) for field in part] != [int] * 3:
        near = ", ".join(difflib.get_close_matches(str(part), SCHEDULES, n=1) or SCHEDULES)
        wrong = f"{where} has no whole max_len, group_size and steps"
        raise ValueError(f"{wrong}; {FORM}, or one by name: {near}")
    for name, field, least in zip(Stage._fields, part, (1, 2, 1)):
        if field < least:
            why = "; a group of one has no advantage (Eq. 1)" if field == 1 else ""
            raise ValueError(f"{where}: {name} is {field}, it must be at least {least}{why}")
    return Stage(*part)


def format_stages(stages: list) -> str:
    """Write stages as text, the inverse of `parse`: "4Kx16x100,8Kx8x100"."""
    return ",".join(f"{tokens(length)}x{group}x{steps}" for length, group, steps in stages)


def tokens(n: int) -> str:
    """Write 4096 as "4K"; what is no multiple of 1024 stays as it is."""
    return f"{n // 1024}K" if n and n % 1024 == 0 else str(n)


def total_steps(stages: list) -> int:
    """Count the steps of all stages."""
    return sum(steps for _, _, steps in stages)


def stage_at(stages: list, step: int) -> tuple[int, Stage]:
    """Find the stage of a step -> (index of the stage, stage). Both count from 0."""
    for index, end in enumerate(accumulate(stage[2] for stage in stages)):
        if 0 <= step < end:
            return index, Stage(*stages[index])
    raise ValueError(f"step {step} is not in {format_stages(stages)}: its steps are 0 to {end - 1}")


def agree(before: list, now: list, steps: int) -> bool:
    """Tell whether both schedules have the same limit and group in each of the first `steps`."""
    alike = (stage_at(before, i)[1][:2] == stage_at(now, i)[1][:2] for i in range(steps))
    return min(total_steps(before), total_steps(now)) >= steps and all(alike)


def token_budget(stage: tuple) -> int:
    """Return L_s x G_s: the most tokens that one question costs in a step."""
    return stage[0] * stage[1]


def total_tokens(stages: list) -> int:
    """Return the most tokens of a whole run that asks one question per step."""
    return sum(token_budget(stage) * stage[2] for stage in stages)


def budget_note(stages: list) -> str:
    """Return a note where L x G changes between stages, else "". Ablations do that: no error."""
    budgets = [tokens(token_budget(stage)) for stage in stages]
    note = f"note: L x G is {', '.join(budgets)} tokens per question; Sec. 3.4 keeps it at 64K"
    return note if len(set(budgets)) > 1 else ""


SCHEDULES: dict[str, list[Stage]] = {}
SCHEDULES |= {
    "vision-r1": parse("4Kx16x100,8Kx8x100"),  # Sec. 3.4, App. A; Table 5, last row
    "vision-r1-zero": parse("4Kx16x300"),  # App. A
    "vision-r1-long": parse("16Kx4x300"),  # App. A
    "zero-ptst": parse("4Kx16x100,8Kx8x100"),  # App. A, Table 6
    "zero-sft-ptst": parse("4Kx16x100,8Kx8x100"),  # App. A, Table 6
    "three-stage": parse("4Kx16x100,8Kx8x100,16Kx4x100"),  # Sec. 3.4
    # Table 5, rows 1 to 5. It gives no steps: 100 per stage are ours, after Sec. 3.4.
    "table5-4kx16-4kx16": parse("4Kx16x100,4Kx16x100"),
    "table5-4kx16-8kx16": parse("4Kx16x100,8Kx16x100"),
    "table5-4kx16-6kx12-8kx8": parse("4Kx16x100,6Kx12x100,8Kx8x100"),
    "table5-16kx4-16kx4": parse("16Kx4x100,16Kx4x100"),
    "table5-16kx16-16kx16": parse("16Kx16x100,16Kx16x100"),
}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] in ("plot", "cost", "ablate"):
        print(f"python ptst.py {words[0]} is now: python -m tools.{words[0]}", file=sys.stderr)
        sys.exit(2)
    print(f"{'schedule':24} {'L x G x steps':29} {'most tokens of a question':>25}  L x G")
    for word in words or SCHEDULES:
        try:
            stages = parse(word)
        except ValueError as error:
            sys.exit(f"ptst.py: {error}")
        budgets = ", ".join(tokens(token_budget(stage)) for stage in stages)
        print(f"{word:24} {format_stages(stages):29} {total_tokens(stages):25,}  {budgets}")
