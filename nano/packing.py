"""Records -> prompts -> packed batches. Nothing is padded, no prompt is ever cut.

`encode` makes a record a `Prompt`: the chat template's text, one image token for each merged patch
of the image's grid, M-RoPE positions. `pack` lays prompts and responses one after the other in one
row, a `Batch`; its `Packing` says where each one lies. `balance` and `batches` share out the work.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.distributed as dist
from PIL import ImageOps
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from nano import hub, run
from nano.asking import Asking
from nano.data import BadRow, Problems, Record, load_image, opened

VISION_TOKENS = "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <|vision_pad|>".split()


class Processor(Asking):
    """Tokenizer, image processor (Pillow does the work) and the token ids that the code needs.

    `how`: see Asking.set_up.
    """

    def __init__(self, path: str, **how):
        path = hub.model(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        if not hasattr(self.image_processor, "merge_size"):
            raise ValueError(f"{path}: its image processor is not Qwen-VL's; sft.py trains others")
        token = self.tokenizer.convert_tokens_to_ids
        self.image_token = token("<|image_pad|>")
        self.merge_size = self.image_processor.merge_size
        # A rollout ends at the turn marker of a chat model or at the text's end of a base model.
        ends = {self.tokenizer.eos_token_id, token("<|im_end|>"), token("<|endoftext|>")}
        self.eos_ids = sorted(ends - {None})
        self.set_up({"<|image_pad|>"}, **how)

    def banned_ids(self, vocab_size: int) -> torch.Tensor:
        """Ids that a policy must never sample: vision markers, since there is no such image, and
        the rows beyond the tokenizer's vocabulary that only pad the embedding table."""
        ids = {self.tokenizer.convert_tokens_to_ids(name) for name in VISION_TOKENS} - {None}
        return torch.tensor(sorted(ids | set(range(len(self.tokenizer), vocab_size))))

    def save(self, path: str):
        backend = self.tokenizer.backend_tokenizer
        ours, backend.normalizer = backend.normalizer, self.normalizer
        self.tokenizer.save_pretrained(path)
        backend.normalizer = ours
        self.released_images.save_pretrained(path)
        self.save_asked(path)


@dataclass(eq=False)
class Prompt:
    """A problem as the model reads it. The rollouts of a group share one, and with it the image."""

    record: Record
    ids: list[int]  # the image tokens are expanded: one <|image_pad|> per merged patch
    position_ids: torch.Tensor | None  # (3, P) M-RoPE: time, height, width
    pixel_values: torch.Tensor | None  # (patches, patch_dim) of all its images
    image_grid: torch.Tensor | None  # (images, 3) in patches
    features: list | None = None  # per image, what a frozen vision tower made of it
    number: int = 0  # of the question in its training step, the same on every rank

    @property
    def next_position(self) -> int:
        """Where the response begins, on all three axes."""
        return int(self.position_ids.max()) + 1


def prompt_ids(record: Record, processor, patches: list[int]) -> list[int]:
    """Token ids, each image mark expanded to patches / merge^2 tokens.

    `patches`: of each image. Raises BadRow if the template does not show each image once.
    """
    text = processor.text(record)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    found, counts, out = ids.count(processor.image_token), iter(patches), []
    if found != len(record.images):
        raise BadRow("image marks", f"{found} image tokens in it, {len(record.images)} images")
    for token in ids:
        is_image = token == processor.image_token
        out += [token] * (next(counts) // processor.merge_size**2 if is_image else 1)
    return out


@contextmanager
def accepted():
    """An image processor may refuse a picture in any way; here that is a BadRow."""
    try:
        yield
    except Exception as error:
        raise BadRow("odd image", f"the image processor refuses it: {error}") from error


def prompt_length(record: Record, processor) -> int:
    """Tokens of the prompt, from the headers of its images: nothing is decoded."""
    patches = []
    for image in record.images:
        with opened(image) as picture:
            turned = picture.getexif().get(0x0112, 1) > 4  # EXIF: stored lying on its side
            width, height = ImageOps.exif_transpose(picture).size if turned else picture.size
        with accepted():
            counted = processor.image_processor.get_number_of_image_patches(height, width, {})
        patches.append(counted)
    return len(prompt_ids(record, processor, patches))


def usable(
    records: list[Record], processor, max_prompt_len: int, problems: Problems
) -> list[Record]:
    """The records whose prompt fits; the others are reported and left out, never cut."""
    kept = []
    hide_bar = True if len(records) < 5000 else None
    for record in tqdm(records, "prompt lengths", leave=False, disable=hide_bar):
        try:
            length = record.prompt_tokens = prompt_length(record, processor)
            if length > max_prompt_len:
                limit = f"the limit is {max_prompt_len} (--max-prompt-len)"
                raise BadRow("prompt too long", f"{length} tokens, {limit}")
            kept.append(record)
        except ValueError as error:
            bad = error.args if isinstance(error, BadRow) else ("broken image", str(error))
            problems.add(*bad, *record.place, record.id)
    return kept


def image_patches(record: Record, processor):
    """A record's images, decoded and cut -> (patches, patch_dim) or None, grid (images, 3)."""
    if not record.images:
        return None, torch.zeros(0, 3, dtype=torch.long)
    images = [load_image(image) for image in record.images]
    with accepted():
        out = processor.image_processor(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


class Ahead:
    """Patches that threads make before they are asked for, while the device computes."""

    def __init__(self, processor, threads: int = 4):
        self.processor, self.pool, self.made = processor, ThreadPoolExecutor(threads), {}

    def start(self, records: dict):
        """{key: record}; what was made before and never taken is forgotten."""
        submit = partial(self.pool.submit, image_patches, processor=self.processor)
        self.made = {k: self.made.get(k) or submit(record) for k, record in records.items()}

    def take(self, key, record: Record):
        made = self.made.pop(key, None)
        return made.result() if made else image_patches(record, self.processor)


def encode(record: Record, processor, made=None) -> Prompt:
    """Record -> Prompt. `made`: its patches and grid, where they were made before."""
    pixels, grid = made or image_patches(record, processor)
    ids = prompt_ids(record, processor, grid.prod(-1).tolist())
    return Prompt(record, ids, mrope(ids, grid, processor), pixels, grid)


def blank(processor) -> tuple[Prompt, list[int]]:
    """A sequence without a label, for a rank that has none left but must still take part."""
    ids, grid = [processor.tokenizer.eos_token_id], torch.zeros(0, 3, dtype=torch.long)
    position_ids = torch.zeros(3, 1, dtype=torch.long)
    return Prompt(Record("blank", "", "-", []), ids, position_ids, None, grid), []


def mrope(ids: list[int], grid: torch.Tensor, processor) -> torch.Tensor:
    """Qwen-VL's positions (3, P): text counts up on all axes, an image spans a box of them."""
    out, here, t = [], 0, 0
    grids, merge = iter(grid.tolist()), processor.merge_size
    while t < len(ids):
        if ids[t] == processor.image_token:
            time, height, width = next(grids)
            axes = [torch.arange(n) for n in (time, height // merge, width // merge)]
            box = torch.cartesian_prod(*axes)  # (tokens, 3)
            out.append(box.T + here)
            t, here = t + len(box), here + max(height, width) // merge
        else:
            out.append(torch.full((3, 1), here))
            t, here = t + 1, here + 1
    return torch.cat(out, 1)


# -------------------------------------------------------------------------------------------------
# packed rows


class Packing:
    """Where the pieces of a packed row lie, and what each of them may look at.

    `lengths` [l_0, l_1, ...] add up to T. A piece is a sequence, or a prompt, or a response that
    continues the prompt `after[i]` (None for the others), whose keys its queries see before their
    own. So the prompt of a group goes through the model once, as in arXiv 2506.05433.
    """

    def __init__(self, lengths: list[int], after: list[int | None] | None = None, device="cpu"):
        self.lengths, self.after = lengths, after or [None] * len(lengths)
        before = [0 if a is None else lengths[a] for a in self.after]
        self.cu_seqlens, self.longest = cumulated(lengths, device), max(lengths)  # (pieces + 1,)
        self.keys, self.cu_keys, self.longest_keys = None, self.cu_seqlens, self.longest
        if any(before):
            # For attention over ranges: the places of each piece's keys, a prompt's once more for
            # each of its responses.
            spans = [torch.arange(e - n, e) for n, e in zip(lengths, accumulate(lengths))]
            keys = []
            for piece, prompt in enumerate(self.after):
                keys += [spans[piece]] if prompt is None else [spans[prompt], spans[piece]]
            totals = [n + b for n, b in zip(lengths, before)]
            self.keys = torch.cat(keys).to(device)
            self.cu_keys, self.longest_keys = cumulated(totals, device), max(totals)

    @cached_property
    def lower(self) -> torch.Tensor:
        """(L, L) lower triangle for the longest piece with its prompt. Rows p to p + r of it are
        the mask of a response of r tokens after p."""
        size, device = self.longest_keys, self.cu_keys.device
        return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def cumulated(sizes: list[int], device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)


@dataclass(eq=False)
class Batch:
    """Sequences one after the other in a row of T tokens.

    B sequences, N labelled positions (the response tokens), I distinct images.
    """

    ids: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (3, T)
    packing: Packing
    pixel_values: torch.Tensor | None  # (patches of the I images, patch_dim)
    image_grid: torch.Tensor | None  # (I, 3)
    image_index: list[int]  # the image at each place in the row where one stands
    features: list | None  # of the I images, if they were encoded before: then there are no pixels
    label_index: torch.Tensor  # (N,) positions whose next token is a response token
    labels: torch.Tensor  # (N,) that token
    lengths: list[int]  # of the B responses; they add up to N

    # What GRPO adds, one entry per response token (N,)
    logprobs: torch.Tensor | None = None  # the sampler's
    old_logprobs: torch.Tensor | None = None  # of pi_old, None = those of this very forward
    ref_logprobs: torch.Tensor | None = None  # None without a KL term
    advantages: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # the means of Eq. 1: 1 / (sequences x length)

    def to(self, device) -> "Batch":
        """The batch on this device. Only the one that is computed is there, with its pictures."""
        if self.ids.device == torch.device(device):
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        packing = Packing(self.packing.lengths, self.packing.after, device)
        return replace(self, packing=packing, **tensors)


def pack(sequences: list[tuple[Prompt, list[int]]], device="cpu") -> Batch:
    """[(Prompt, response ids)] -> Batch. A Prompt that recurs brings its tokens and images once."""
    ids, positions, index, labels = [], [], [], []
    lengths, after = [], []
    image_index, first, pixels, grids, features = [], {}, [], [], []
    uses = Counter(prompt for prompt, response in sequences if response)
    shared = {}  # Prompt -> (its piece, the place of its last token)

    def piece(new_ids, new_positions, prompt=None):
        lengths.append(len(new_ids))
        after.append(prompt)
        ids.extend(new_ids)
        positions.append(new_positions)

    for prompt, response in sequences:
        r = len(response)
        following = (torch.arange(r) + prompt.next_position).expand(3, -1)
        if prompt not in first:
            first[prompt] = sum(len(p.image_grid) for p in first)
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
            prompt_piece, last_place = shared[prompt]
            piece(response, following, prompt_piece)
            index.append(torch.tensor([last_place, *range(len(ids) - r, len(ids) - 1)]))
        labels += response
    assert not (features and pixels), "encode_once must take all images of a step, or none"
    return Batch(
        ids=torch.tensor(ids, device=device),
        position_ids=torch.cat(positions, 1).to(device),
        packing=Packing(lengths, after, device),
        pixel_values=torch.cat(pixels).to(device) if pixels else None,
        image_grid=torch.cat(grids).to(device) if grids else None,
        image_index=image_index,
        features=features or None,
        label_index=torch.cat(index).to(device),
        labels=torch.tensor(labels, dtype=torch.long, device=device),
        lengths=[len(response) for _, response in sequences],
    )


# -------------------------------------------------------------------------------------------------
# who computes what


def work(tokens: int, width: int) -> float:
    """What a sequence costs, in tokens of a model of hidden size `width`.

    A layer's matrix products take 24 width^2 FLOPs a token. Its causal attention takes 4 width for
    each token before it, 2 width x tokens on average: it doubles the price at 12 width tokens.
    """
    return tokens * (1 + tokens / (12 * width))


def rebalance(costs: list[float], owners: list[int], ranks: int) -> list[int]:
    """Costs of groups and the ranks where they are -> the ranks where they should be.

    Few groups move, and the result is the same on every rank.
    """
    owners, load = list(owners), [0.0] * ranks
    for cost, owner in zip(costs, owners):
        load[owner] += cost
    while True:
        high, low = load.index(max(load)), load.index(min(load))
        gap = load[high] - load[low]
        misfit = {i: abs(gap - 2 * costs[i]) for i, owner in enumerate(owners) if owner == high}
        best = min(misfit, key=misfit.get, default=None)  # brings the two ranks closest together
        if best is None or misfit[best] > 0.9 * gap or gap <= 0.02 * max(load):
            return owners
        owners[best] = low
        load[high] -= costs[best]
        load[low] += costs[best]


def balance(groups: list[list], width: int, encode: Callable[[int], Prompt]) -> list[list]:
    """Groups of Samples change ranks until all ranks have nearly the same work (a collective).

    A group stays whole, so that its image is encoded where its rollouts are. Pictures do not
    travel: `encode(number)` makes the Prompt of a question anew where its group arrives.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return groups
    own = {group[0].prompt.number: group for group in groups}
    costs = {}
    for number, group in own.items():
        costs[number] = sum(work(len(s.prompt.ids) + len(s.ids), width) for s in group)
    everywhere = [None] * world
    dist.all_gather_object(everywhere, costs)
    known = sorted((n, cost, r) for r, part in enumerate(everywhere) for n, cost in part.items())
    numbers, costs, owners = zip(*known)
    goal = dict(zip(numbers, rebalance(costs, owners, world)))
    leaving = {}
    for number, group in own.items():
        if goal[number] != rank:
            leaving[number] = [replace(sample, prompt=None) for sample in group]
    dist.all_gather_object(everywhere, leaving)
    for number, group in (item for part in everywhere for item in part.items()):
        if goal[number] == rank:
            prompt = encode(number)
            own[number] = [replace(sample, prompt=prompt) for sample in group]
    return [own[number] for number in sorted(own) if goal[number] == rank]


def cut(lengths: list[int], costs: list[float], budget: int, limit: float) -> list[slice]:
    """Slices of consecutive sequences of at most `budget` tokens and `limit` cost. A longer
    sequence gets one alone."""
    out, first, tokens, cost = [], 0, 0, 0
    for i, (n, c) in enumerate(zip(lengths, costs)):
        if i > first and (tokens + n > budget or cost + c > limit):
            out.append(slice(first, i))
            first, tokens, cost = i, 0, 0
        tokens, cost = tokens + n, cost + c
    return out + [slice(first, len(lengths))]


def micro_batches(lengths: list[int], budget: int, width: int) -> list[slice]:
    """Slices of this rank's sequences: as few as the token budget allows, of nearly equal work.

    They are consecutive, so that the rollouts of one image stay together. Every rank gets the same
    number (a collective), since FSDP's collectives must meet; a slice may be empty.
    """
    costs = [work(n, width) for n in lengths]
    count = int(run.all_max(len(cut(lengths, costs, budget, float("inf")))))
    low, high = max(costs, default=0), sum(costs)
    for _ in range(30):  # bisects for the smallest limit that needs no more than `count` slices
        middle = (low + high) / 2
        enough = len(cut(lengths, costs, budget, middle)) <= count
        low, high = (low, middle) if enough else (middle, high)
    out = cut(lengths, costs, budget, high)
    return out + [slice(0, 0)] * (count - len(out))


def batches(samples: list, budget: int, width: int, processor) -> list[Batch]:
    """This rank's Samples as packed micro-batches of at most `budget` tokens (a collective).

    A Sample's advantage may be one number or one for each of its tokens.
    """
    out = []
    for part in micro_batches([len(s.prompt.ids) + len(s.ids) for s in samples], budget, width):
        chosen = samples[part]
        batch = pack([(s.prompt, s.ids) for s in chosen] or [blank(processor)])
        batch.logprobs = per_token([s.logprobs for s in chosen], chosen)
        batch.advantages = per_token([s.advantage for s in chosen], chosen)
        batch.weights = per_token([s.weight for s in chosen], chosen)
        out.append(batch)
    return out


def per_token(values: list, samples: list) -> torch.Tensor:
    """A number or a list of numbers per sample -> one number per response token (N,)."""
    parts = [torch.zeros(0)]
    for value, sample in zip(values, samples):
        parts.append(torch.tensor(value, dtype=torch.float32).expand(len(sample.ids)))
    return torch.cat(parts)
