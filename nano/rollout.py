"""Rollouts: prompts in, groups of sampled answers with their log-probabilities out.

`TorchEngine` samples with a KV cache over a whole replica of the training weights, which `sync`
refreshes. On one rank or many, each rank may then sample as much as it likes without the others.
The prompt and image of a group are encoded once; finished rows leave the batch and waiting ones
take their place. The draws of a sample follow from its seed alone, so that results do not depend
on how rows were batched, on the number of ranks, or on a resume.

nano/vllm_engine.py has the same interface (sync, generate). Left out: paging, speculative decoding.
"""

from collections import deque
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nano.packing import Processor, Prompt, pack


@dataclass(eq=False)
class Sample:
    """One answer to a question, from the engine to the gradient."""

    prompt: Prompt | None
    ids: list[int]  # with the end token, if it was reached
    logprobs: list[float]  # of these ids, under the distribution that they were drawn from
    finish: str  # "stop": the model ended its turn; "length": cut at max_len
    text: str  # from what the prompt holds of it (Asking.opening) to before the end token
    length: int = -1  # in tokens; a server tells it where the ids are not known
    score: object = None  # reward.Score: what was found in the text
    reward: float = 0.0
    advantage: float | list[float] = 0.0  # one number, or one for each token
    weight: float = 0.0  # of each of its tokens in the means of Eq. 1

    def __post_init__(self):
        if self.length < 0:
            self.length = len(self.ids)

    def row(self) -> dict:
        """The answer as samples.jsonl and the viewer show it."""
        asked = ("id", "source", "problem", "answer", "choices")
        row = {name: getattr(self.prompt.record, name) for name in asked}
        row |= dict(completion=self.text, reward=self.reward, why=self.score.why)
        a = self.advantage if isinstance(self.advantage, list) else round(self.advantage, 4)
        return row | dict(advantage=a, length=self.length, finish=self.finish)


def make_sample(prompt: Prompt, ids, logprobs, finish: str, processor: Processor) -> Sample:
    """A Sample with its text, to which what the prompt holds of it belongs."""
    text = processor.tokenizer.decode(ids if finish == "length" else ids[:-1])
    return Sample(prompt, ids, logprobs, finish, processor.opening + text)


class KVCache:
    """Keys and values of up to `rows` sequences, each filled from the left.

    It grows along the length as needed, up to `most` tokens.
    """

    def __init__(self, config, rows: int, most: int, device, dtype):
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        empty = torch.zeros(
            2, rows, config.num_key_value_heads, 0, head_dim, device=device, dtype=dtype
        )
        self.layers = [empty.clone() for _ in range(config.num_hidden_layers)]  # (2, B, kv, S, d)
        self.recorded = None  # while prompts are encoded: layer -> (k, v), each (1, kv, T, d)
        self.active, self.length, self.where, self.most = 0, 0, None, most

    def reserve(self, length: int):
        have = self.layers[0].shape[3]
        if length > have:
            more = max(length, min(max(2 * have, 256), self.most)) - have
            self.layers = [F.pad(layer, (0, 0, 0, more)) for layer in self.layers]

    def move(self, source: list[int], target: list[int]):
        """Moves rows, so that the active ones stay together at the top."""
        for layer in self.layers:
            layer[:, target, :, : self.length] = layer[:, source, :, : self.length]

    def update(self, k, v, layer, *_, **__):
        """transformers' attention calls this: keeps the new keys, returns all that queries see."""
        if self.recorded is not None:
            self.recorded[layer] = (k, v)
            return k, v
        store = self.layers[layer]
        rows = torch.arange(self.active, device=k.device)
        store[0, rows, :, self.where] = k[:, :, 0]
        store[1, rows, :, self.where] = v[:, :, 0]
        return store[0, : self.active, :, : self.length], store[1, : self.active, :, : self.length]

    def get_seq_length(self, *_):
        return 0  # positions are given explicitly


class TorchEngine:
    """Batched sampling with a whole Policy of this rank, at most `max_rows` sequences at a time."""

    def __init__(self, policy, processor: Processor, max_rows: int = 256, prefill_tokens=8192):
        self.policy = policy.eval().requires_grad_(False)
        self.processor, self.max_rows, self.prefill_tokens = processor, max_rows, prefill_tokens

    def reserve(self, rows: int, tokens: int):
        """Makes a cache of this size once and lets it go: too little memory shows at the start."""
        weight = self.policy.hf.get_output_embeddings().weight
        config = self.policy.hf.model.language_model.config
        rows = min(rows, self.max_rows)
        KVCache(config, rows, tokens, weight.device, weight.dtype).reserve(tokens)

    @torch.no_grad()
    def sync(self, policy):
        """Takes over the weights of the training policy (a collective when it is sharded)."""
        own = dict(self.policy.hf.named_parameters())
        for name, whole in policy.full_weights(self.policy.hf.dtype):
            own[name].copy_(whole)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_len: int,
        seeds: list[tuple],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """group_size Samples of each prompt, at most max_len tokens each.

        `seeds`: a tuple of ints per prompt, e.g. (seed, step, question); the sample's number is
        added to it. Temperature 0 takes the likeliest token.
        """
        groups = [[None] * group_size for _ in prompts]
        if prompts:
            work = Sampling(self, prompts, group_size, max_len, seeds, temperature, top_p)
            while work.waiting or work.active:
                work.admit()
                for p, s, sample in work.retire():
                    groups[p][s] = sample
                work.decode()
        return groups

    def close(self):
        """The end of the run: the ranks part."""
        dist.destroy_process_group()


class Sampling:
    """One call of generate: rows that decode together, samples that wait for a row."""

    def __init__(self, engine, prompts, group_size, max_len, seeds, temperature, top_p):
        self.engine, self.prompts, self.group_size = engine, prompts, group_size
        self.max_len, self.seeds = max_len, seeds
        self.temperature, self.top_p = temperature, top_p
        hf = engine.policy.hf
        self.text, self.head = hf.model.language_model, hf.get_output_embeddings().weight
        device = self.device = self.head.device
        self.waiting = deque((p, s) for p in range(len(prompts)) for s in range(group_size))
        self.rows = rows = min(engine.max_rows, len(self.waiting))
        most = max(len(p.ids) for p in prompts) + max_len
        self.cache = KVCache(self.text.config, rows, most, device, self.head.dtype)
        self.eos = torch.tensor(engine.processor.eos_ids, device=device)
        # prompt number -> [keys and values per layer, logits of the first token, samples to come]
        self.encoded = {}
        self.active = 0  # rows 0..active-1 are at work
        self.owner = [None] * rows  # (prompt number, sample number)
        # Per row: tokens so far, next place in the cache and on the rotary axes, the last token.
        state = torch.zeros(4, rows, dtype=torch.long, device=device)
        self.count, self.where, self.rope, self.token = state
        self.ids = torch.zeros(rows, max_len, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_len, device=device)
        self.draws = torch.zeros(rows, max_len, dtype=torch.float64, device=device)

    def admit(self):
        """Waiting samples take the free rows; each prompt goes through the model once."""
        free = min(self.rows - self.active, len(self.waiting))
        new = [self.waiting.popleft() for _ in range(free)]
        self.encode(list(dict.fromkeys(p for p, _ in new if p not in self.encoded)))
        for p, group in groupby(new, key=lambda pair: pair[0]):
            numbers = [s for _, s in group]
            here = slice(self.active, self.active + len(numbers))
            keys_values, logits, _ = self.encoded[p]
            prompt = self.prompts[p]
            length = len(prompt.ids)
            self.cache.reserve(length)
            for layer, stored in zip(self.cache.layers, keys_values):
                layer[:, here, :, :length] = stored  # (2, 1, kv, P, d) to every row
            self.owner[here] = [(p, s) for s in numbers]
            self.count[here] = 0
            self.where[here] = length
            self.rope[here] = prompt.next_position
            draws = [uniforms((*self.seeds[p], s), self.max_len) for s in numbers]
            self.draws[here] = torch.stack(draws).to(self.device)
            self.active += len(numbers)
            self.take(logits.expand(len(numbers), -1), here)
            self.encoded[p][2] -= len(numbers)
            if not self.encoded[p][2]:
                del self.encoded[p]

    def encode(self, numbers: list[int]):
        """Encodes these prompts in packed rows of at most prefill_tokens."""
        while numbers:
            some, total = [], 0
            while numbers:
                length = len(self.prompts[numbers[0]].ids)
                if some and total + length > self.engine.prefill_tokens:
                    break
                some.append(numbers.pop(0))
                total += length
            self.cache.recorded = {}
            batch = pack([(self.prompts[p], []) for p in some], self.device)
            hidden = self.engine.policy.hidden_states(batch, self.cache)  # (T, H)
            ends = batch.packing.cu_seqlens[1:].long()
            logits = hidden[ends - 1] @ self.head.t()
            recorded, self.cache.recorded = self.cache.recorded, None
            layers = [torch.stack(recorded[i]) for i in range(len(recorded))]  # (2, 1, kv, T, d)
            for i, p in enumerate(some):
                span = slice(ends[i] - len(self.prompts[p].ids), ends[i])
                own = [layer[:, :, :, span] for layer in layers]
                self.encoded[p] = [own, logits[i : i + 1], self.group_size]

    def decode(self):
        """One more token for every active row."""
        if not self.active:
            return
        here, cache = slice(0, self.active), self.cache
        where = self.where[here]
        cache.active, cache.where, cache.length = self.active, where, int(where.max()) + 1
        cache.reserve(cache.length)
        seen = torch.arange(cache.length, device=self.device) <= where[:, None]  # (B, S)
        hidden = self.text(
            input_ids=self.token[here, None],
            position_ids=self.rope[here].expand(3, -1)[..., None],  # (3, B, 1)
            past_key_values=cache,
            use_cache=True,
            decode_mask=seen[:, None, None],
        ).last_hidden_state[:, 0]
        self.where[here] += 1
        self.rope[here] += 1
        self.take(hidden @ self.head.t(), here)

    def take(self, logits: torch.Tensor, here: slice):
        """Samples one token for each row of the slice and notes it."""
        rows = torch.arange(here.start, here.stop, device=self.device)
        count = self.count[here]
        draws, banned = self.draws[rows, count], self.engine.policy.banned
        picked, logprobs = pick(logits, draws, self.temperature, self.top_p, banned)
        self.ids[rows, count] = picked
        self.logprobs[rows, count] = logprobs
        self.token[here] = picked
        self.count[here] += 1

    def retire(self) -> list[tuple[int, int, Sample]]:
        """Gives out the finished samples; rows from the end close the gaps."""
        stopped = torch.isin(self.token[: self.active], self.eos)
        done = stopped | (self.count[: self.active] >= self.max_len)
        finished, stopped = done.nonzero()[:, 0].tolist(), stopped.tolist()
        out = []
        for row in finished:
            p, s = self.owner[row]
            count = int(self.count[row])
            ids, logprobs = self.ids[row, :count].tolist(), self.logprobs[row, :count].tolist()
            finish = "stop" if stopped[row] else "length"
            sample = make_sample(self.prompts[p], ids, logprobs, finish, self.engine.processor)
            out.append((p, s, sample))
        left = self.active - len(finished)
        source = (~done[left:]).nonzero()[:, 0].add(left).tolist()
        target = [row for row in finished if row < left]
        if source:
            self.cache.length = int(self.where[source].max())
            self.cache.move(source, target)
            for x in (self.count, self.where, self.rope, self.token):
                x[target] = x[source]
            for x in (self.ids, self.logprobs, self.draws):
                x[target] = x[source]
            for a, b in zip(source, target):
                self.owner[b] = self.owner[a]
        self.active = left
        return out


def uniforms(seed: tuple, n: int) -> torch.Tensor:
    """n numbers in [0, 1) that follow from a tuple of ints: (seed, step, question, sample)."""
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.random(n))


def pick(logits, draws, temperature: float, top_p: float, banned):
    """logits (B, V), draws (B,) in [0, 1) -> tokens (B,) and their log-probabilities (B,).

    The log-probabilities are those at this temperature (at 1 if greedy), before top_p cuts.
    """
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill(1, banned, -1e30)
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        picked = logprobs.argmax(-1)
    else:
        p = logprobs.double().exp()
        if top_p < 1:
            # The smallest set of tokens that holds top_p of the mass.
            ranked, order = p.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
            p = torch.zeros_like(p).scatter_(1, order, ranked)
        # The first token whose cumulated probability exceeds the draw. A banned or cut token has
        # an empty interval.
        cdf = p.cumsum(-1)
        picked = torch.searchsorted(cdf, (draws * cdf[:, -1])[:, None], right=True)[:, 0]
        picked = picked.clamp_(max=logits.shape[1] - 1)
    return picked, logprobs.gather(1, picked[:, None])[:, 0]
