"""Records -> prompts -> packed batches. Nothing is padded, no prompt is ever cut, and image tokens are right by construction.

`encode` makes a record a `Prompt`: the chat template's text, one image token per merged patch of the image's grid, M-RoPE
positions. `pack` lays prompts and responses one after the other in one row, a `Batch`; `Packing` says where each one lies.
`usable` leaves out, with a reason, the records that do not fit.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import ImageOps
from tqdm import tqdm

from nano import run
from nano.data import MARK, BadRow, Record, load_image, opened


@dataclass(eq=False)
class Prompt:
    """A problem as the model reads it; rollouts of one group share one Prompt, and with it the image."""

    record: Record
    ids: list[int]  # image tokens expanded: one <|image_pad|> per merged patch
    position_ids: torch.Tensor  # (3, P) M-RoPE: time, height, width
    pixel_values: torch.Tensor | None  # (patches, patch_dim) of all its images
    image_grid: torch.Tensor  # (n_images, 3) in patches
    features: list | None = (
        None  # per image what a frozen vision tower made of it (model.encode_once)
    )

    @property
    def next_position(self):
        return int(self.position_ids.max()) + 1  # where the response begins, on all three axes


def prompt_text(record, tokenizer, system_prompt=""):
    """The chat template's own text, with one <|image_pad|> per image; a base model without one gets a plain dialogue."""
    parts = re.split(f"({MARK})", record.problem)
    if tokenizer.chat_template:
        content = [
            {"type": "image"} if p == MARK else {"type": "text", "text": p} for p in parts if p
        ]
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": content})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    problem = record.problem.replace(MARK, "<|vision_start|><|image_pad|><|vision_end|>")
    return (
        f"{system_prompt}\n\nUser: {problem}\nAssistant:".lstrip()
    )  # ours, after arXiv 2503.05132's setting


def prompt_ids(record, processor, patches, system_prompt=""):
    """Token ids with each image mark expanded to patches / merge^2 tokens; BadRow if the text itself holds image tokens."""
    ids = processor.tokenizer(
        prompt_text(record, processor.tokenizer, system_prompt), add_special_tokens=False
    ).input_ids
    if ids.count(processor.image_token) != len(record.images):
        raise BadRow(
            "image marks",
            f"{ids.count(processor.image_token)} image tokens in the text, {len(record.images)} images",
        )
    counts = iter(patches)
    return [
        t
        for i in ids
        for t in (
            [i] * (next(counts) // processor.merge_size**2) if i == processor.image_token else [i]
        )
    ]


def prompt_length(record, processor, system_prompt=""):
    """Tokens of the prompt, from the headers of its images: nothing is decoded."""
    patches = []
    for image in record.images:
        with opened(image) as im:
            width, height = (
                ImageOps.exif_transpose(im).size if im.getexif().get(0x0112, 1) > 4 else im.size
            )
        patches.append(processor.image_processor.get_number_of_image_patches(height, width, {}))
    return len(prompt_ids(record, processor, patches, system_prompt))


def usable(records, processor, max_prompt_len, problems, system_prompt=""):
    """The records whose prompt fits; the others are reported and left out, never cut."""
    kept = []
    for record in tqdm(
        records, "prompt lengths", leave=False, disable=True if len(records) < 5000 else None
    ):
        try:
            record.prompt_tokens = prompt_length(record, processor, system_prompt)
            if record.prompt_tokens > max_prompt_len:
                raise BadRow(
                    "prompt too long",
                    f"{record.prompt_tokens} tokens, the limit is {max_prompt_len} (--max-prompt-len)",
                )
            kept.append(record)
        except BadRow as bad:
            problems.add(*bad.args, record.source, None, record.id)
    return kept


def encode(record, processor, system_prompt=""):
    """Record -> Prompt, its images decoded and cut into patches."""
    pixels, grid = None, torch.zeros(0, 3, dtype=torch.long)
    if record.images:
        out = processor.image_processor(
            images=[load_image(i) for i in record.images], return_tensors="pt"
        )
        pixels, grid = out["pixel_values"], out["image_grid_thw"]
    ids = prompt_ids(record, processor, grid.prod(-1).tolist(), system_prompt)
    return Prompt(record, ids, mrope(ids, grid, processor), pixels, grid)


def blank(processor):
    """A sequence without a label, for a rank that has none left but must still take part."""
    record = Record("blank", "", "-", [])
    ids = [processor.tokenizer.eos_token_id]
    return Prompt(
        record, ids, torch.zeros(3, 1, dtype=torch.long), None, torch.zeros(0, 3, dtype=torch.long)
    ), []


def mrope(ids, grid, processor):
    """(3, P) positions of Qwen-VL: text counts up on all axes, an image spans a (time, height, width) box of them."""
    out, here, t = [], 0, 0
    boxes = iter(grid.tolist())
    while t < len(ids):
        if ids[t] == processor.image_token:
            time, height, width = next(boxes)
            box = torch.cartesian_prod(
                *(
                    torch.arange(n)
                    for n in (time, height // processor.merge_size, width // processor.merge_size)
                )
            )
            out.append(box.T + here)
            t, here = t + len(box), here + max(height, width) // processor.merge_size
        else:
            out.append(torch.full((3, 1), here))
            t, here = t + 1, here + 1
    return torch.cat(out, 1)


class Packing:
    """Where the pieces of a packed row lie, of lengths [l_0, l_1, ...] that add up to T, and what each may look at.

    A piece is a sequence, or a prompt, or a response that continues the prompt `after[i]` (None for the others), whose keys
    its queries see before its own. So the prompt of a group goes through the model once, as in arXiv 2506.05433.
    """

    def __init__(self, lengths, after=None, device="cpu"):
        self.lengths, self.after = lengths, after or [None] * len(lengths)
        before = [0 if a is None else lengths[a] for a in self.after]
        cumulated = lambda sizes: torch.tensor(
            [0, *accumulate(sizes)], dtype=torch.int32, device=device
        )
        self.cu_seqlens, self.longest = cumulated(lengths), max(lengths)  # (pieces + 1,)
        self.keys, self.cu_keys, self.longest_keys = None, self.cu_seqlens, self.longest
        if any(
            before
        ):  # for attention over ranges: the places of each piece's keys, a prompt's again for each response
            spans = [torch.arange(end - n, end) for n, end in zip(lengths, accumulate(lengths))]
            self.keys = torch.cat(
                [
                    x
                    for i, a in enumerate(self.after)
                    for x in ([] if a is None else [spans[a]]) + [spans[i]]
                ]
            ).to(device)
            total = [n + b for n, b in zip(lengths, before)]
            self.cu_keys, self.longest_keys = cumulated(total), max(total)

    @cached_property
    def lower(self):
        """(L, L) lower triangle for the longest piece with its prompt; rows p to p + r: a response of r after p tokens."""
        return torch.ones(
            self.longest_keys, self.longest_keys, dtype=torch.bool, device=self.cu_keys.device
        ).tril()


class Batch(NamedTuple):
    """Sequences one after the other in a row of T tokens (B sequences, N labelled positions, I distinct images)."""

    ids: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (3, T)
    packing: Packing  # where the sequences begin and end
    pixel_values: torch.Tensor | None  # (patches of the I images, patch_dim)
    image_grid: torch.Tensor | None  # (I, 3)
    image_index: list[int]  # the image at each place in the row where one stands
    features: list | None  # of the I images, if they were encoded before: then there are no pixels
    label_index: (
        torch.Tensor
    )  # (N,) positions whose next token is a response token; a shared prompt's last one recurs
    labels: torch.Tensor  # (N,) that token
    rows: torch.Tensor  # (N,) which of the B sequences it belongs to


def pack(sequences, device="cpu"):
    """[(Prompt, response ids)] -> Batch. A Prompt that comes several times brings its tokens and images once."""
    ids, positions, index, labels, rows, image_index, first = [], [], [], [], [], [], {}
    pixels, grids, features, lengths, after, n_images = [], [], [], [], [], 0
    uses, shared = (
        Counter(prompt for prompt, response in sequences if response),
        {},
    )  # Prompt -> its piece, its last place

    def piece(new_ids, new_positions, prompt=None):
        lengths.append(len(new_ids))
        after.append(prompt)
        ids.extend(new_ids)
        positions.append(new_positions)

    for row, (prompt, response) in enumerate(sequences):
        r = len(response)
        following = (torch.arange(r) + prompt.next_position).expand(3, -1)
        if prompt not in first:
            first[prompt] = n_images
            n_images += len(prompt.image_grid)
            if prompt.features is not None:
                features += prompt.features
            elif prompt.pixel_values is not None:
                pixels.append(prompt.pixel_values)
                grids.append(prompt.image_grid)
        alone = uses[prompt] < 2 or not response
        if alone or prompt not in shared:
            image_index += range(first[prompt], first[prompt] + len(prompt.image_grid))
        if alone:
            piece(prompt.ids + response, torch.cat([prompt.position_ids, following], 1))
            index.append(torch.arange(len(ids) - r - 1, len(ids) - 1))
        else:
            if prompt not in shared:
                piece(prompt.ids, prompt.position_ids)
                shared[prompt] = len(lengths) - 1, len(ids) - 1
            piece(response, following, shared[prompt][0])
            index.append(torch.tensor([shared[prompt][1], *range(len(ids) - r, len(ids) - 1)]))
        labels += response
        rows += [row] * r
    assert not (features and pixels), (
        "some images of this batch are encoded, others not: encode_once takes all of a step"
    )
    tensors = (
        torch.tensor(ids),
        torch.cat(positions, 1),
        torch.cat(pixels) if pixels else None,
        torch.cat(grids) if grids else None,
        torch.cat(index),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(rows, dtype=torch.long),
    )
    ids, positions, pixels, grids, index, labels, rows = (
        x if x is None else x.to(device) for x in tensors
    )
    return Batch(
        ids,
        positions,
        Packing(lengths, after, device),
        pixels,
        grids,
        image_index,
        features or None,
        index,
        labels,
        rows,
    )


# -----------------------------------------------------------------------------------------------------------------
# who computes what


def work(tokens, width):
    """what a sequence costs, in tokens: a layer's matrix products take 24 width^2 FLOPs a token, its causal attention 4 width
    for each token before it, 2 width tokens on average; so that attention doubles the price at 12 width tokens"""
    return tokens * (1 + tokens / (12 * width))


def rebalance(costs, owners, ranks):
    """costs of groups and the ranks where they are -> the ranks where they should be; few move, and no two runs differ"""
    owners, load = list(owners), [0.0] * ranks
    for cost, owner in zip(costs, owners):
        load[owner] += cost
    while True:
        high, low = load.index(max(load)), load.index(min(load))
        gap = load[high] - load[low]
        there = [i for i, owner in enumerate(owners) if owner == high]
        best = min(
            there, key=lambda i: abs(gap - 2 * costs[i]), default=None
        )  # what brings the two closest together
        if best is None or abs(gap - 2 * costs[best]) > 0.9 * gap or gap < 0.02 * max(load):
            return owners
        owners[best] = low
        load[high] -= costs[best]
        load[low] += costs[best]


def exchange(groups, costs):
    """{number: a group's samples} of this rank, {number: cost} -> the same, after groups changed ranks (a collective).

    only what moves is sent; a group stays together, so that its image is encoded where its rollouts are.
    """
    if dist.get_world_size() == 1:
        return groups
    rank, everywhere = dist.get_rank(), [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, costs)
    known = [
        (number, cost, owner)
        for owner, part in enumerate(everywhere)
        for number, cost in part.items()
    ]
    numbers, costs, owners = zip(*sorted(known))
    goal = dict(zip(numbers, rebalance(costs, owners, len(everywhere))))
    dist.all_gather_object(everywhere, {n: g for n, g in groups.items() if goal[n] != rank})
    arriving = {n: g for part in everywhere for n, g in part.items()}
    return {n: g for n, g in (groups | arriving).items() if goal[n] == rank}


def cut(lengths, costs, budget, limit):
    """slices of consecutive sequences of at most `budget` tokens and `limit` cost (a longer sequence gets one alone)"""
    out, first, tokens, cost = [], 0, 0, 0
    for i, (n, c) in enumerate(zip(lengths, costs)):
        if i > first and (tokens + n > budget or cost + c > limit):
            out.append(slice(first, i))
            first, tokens, cost = i, 0, 0
        tokens, cost = tokens + n, cost + c
    return out + [slice(first, len(lengths))]


def micro_batches(lengths, budget, width):
    """slices of this rank's sequences: as few as the token budget allows, of nearly equal work; one may be empty.

    consecutive, so that the rollouts of one image stay together. every rank gets the same number (a collective): FSDP's
    collectives in forward and backward must meet.
    """
    costs = [work(n, width) for n in lengths]
    count = int(run.all_max(len(cut(lengths, costs, budget, float("inf")))))
    low, high = max(costs, default=0), sum(costs)
    for _ in range(30):  # the smallest limit that needs no more than `count` slices
        middle = (low + high) / 2
        low, high = (
            (low, middle) if len(cut(lengths, costs, budget, middle)) <= count else (middle, high)
        )
    out = cut(lengths, costs, budget, high)
    return out + [slice(0, 0)] * (count - len(out))
