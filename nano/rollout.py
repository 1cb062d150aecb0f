"""Rollouts: prompts in, sampled token ids with their log-probabilities out.

`TorchEngine` samples with a KV cache over a whole replica of the training weights, which `sync` refreshes: on one rank
or many, each rank may then sample as much as it likes without the others. The prompt and image of a group are encoded
once; finished rows leave the batch and waiting ones take their place. The draws of a sample follow from its seed alone,
so that results do not depend on how rows were batched, on the number of ranks, or on a resume.

The interface (sync, generate) is the one that a vLLM engine implements too. Left out: paging, speculative decoding.
"""

from collections import deque
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

import reward
from model import copy_weights, hidden_states, replica
from nano.packing import pack


@dataclass
class Rollout:
    ids: list[int]  # with the end token, if it was reached
    logprobs: list[
        float
    ]  # of the sampled tokens, under the distribution that they were drawn from (top_p aside)
    finish: str  # "stop": the model ended its turn; "length": cut at max_len


def judge(record, rollout, processor, format_weight=0.0):
    """-> the completion's text without the end token, and its reward.Score; what may be slow is judged by a worker"""
    cut = rollout.finish == "length"
    text = processor.tokenizer.decode(rollout.ids if cut else rollout.ids[:-1])
    return text, reward.reward_batch(
        [text], [record.answer], [record.choices], [cut], format_weight
    )[0]


class KVCache:
    """keys and values of up to `rows` sequences, each filled from the left; grows along the length as needed, to `most`"""

    def __init__(self, config, rows, most, device, dtype):
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads
        self.kv = [
            torch.zeros(2, rows, heads, 0, dim, device=device, dtype=dtype)
            for _ in range(config.num_hidden_layers)
        ]  # (2, B, kv, S, d) per layer
        self.recorded = None  # in prefill: layer -> (k, v), each (1, kv, T, d)
        self.active, self.length, self.where, self.most = 0, 0, None, most

    def reserve(self, length):
        have = self.kv[0].shape[3]
        if length > have:
            more = max(length, min(max(2 * have, 256), self.most)) - have
            self.kv = [F.pad(layer, (0, 0, 0, more)) for layer in self.kv]

    def move(self, src, dst):
        """rows src -> rows dst, so that the active ones stay together at the top"""
        for layer in self.kv:
            layer[:, dst, :, : self.length] = layer[:, src, :, : self.length]

    def update(self, k, v, layer, *_, **__):
        """called by transformers' attention: keep the new keys, give back all that the queries may see"""
        if self.recorded is not None:
            self.recorded[layer] = (k, v)
            return k, v
        store = self.kv[layer]
        rows = torch.arange(self.active, device=k.device)
        store[0, rows, :, self.where] = k[:, :, 0]
        store[1, rows, :, self.where] = v[:, :, 0]
        return store[0, : self.active, :, : self.length], store[1, : self.active, :, : self.length]

    def get_seq_length(self, *_):
        return 0  # positions are given explicitly


class TorchEngine:
    """batched sampling over the live weights; at most `max_rows` sequences at a time"""

    def __init__(self, replica, processor, banned=None, max_rows=256, prefill_tokens=8192):
        self.hf = replica.eval().requires_grad_(False)
        self.processor, self.banned, self.max_rows, self.prefill_tokens = (
            processor,
            banned,
            max_rows,
            prefill_tokens,
        )

    def reserve(self, rows, tokens):
        """make a cache of this size once and let it go: what cannot be had is known before the run"""
        weight = self.hf.get_output_embeddings().weight
        config = self.hf.model.language_model.config
        KVCache(config, min(rows, self.max_rows), tokens, weight.device, weight.dtype).reserve(
            tokens
        )

    def sync(self, policy):
        """take over the weights of the training policy (a collective when it is sharded)"""
        copy_weights(policy, self.hf)

    @torch.no_grad()
    def generate(self, prompts, n, max_len, seeds, temperature=1.0, top_p=1.0, on_done=None):
        """n samples of each prompt, at most max_len tokens each -> a list of n Rollouts per prompt.

        `seeds` gives one tuple of ints per prompt, e.g. (seed, step, prompt number); the sample's number is added to it.
        temperature 0 takes the likeliest token. `on_done(prompt number, sample number, rollout)` is called as each one ends.
        """
        results = [[None] * n for _ in prompts]
        if prompts:
            batch = Sampling(self, prompts, n, max_len, seeds, temperature, top_p)
            while batch.waiting or batch.active:
                batch.admit()
                for p, s, rollout in batch.retire():
                    results[p][s] = rollout
                    if on_done:
                        on_done(p, s, rollout)
                batch.decode()
        return results


class Sampling:
    """one call of generate: rows that decode together, samples that wait for a row"""

    def __init__(self, engine, prompts, n, max_len, seeds, temperature, top_p):
        self.engine, self.prompts, self.n, self.max_len, self.seeds = (
            engine,
            prompts,
            n,
            max_len,
            seeds,
        )
        self.temperature, self.top_p = temperature, top_p
        self.text, self.head = (
            engine.hf.model.language_model,
            engine.hf.get_output_embeddings().weight,
        )
        device = self.device = self.head.device
        self.waiting = deque((p, s) for p in range(len(prompts)) for s in range(n))
        self.rows = rows = min(engine.max_rows, len(self.waiting))
        most = max(len(p.ids) for p in prompts) + max_len
        self.cache = KVCache(self.text.config, rows, most, device, self.head.dtype)
        self.eos = torch.tensor(engine.processor.eos_ids, device=device)
        self.encoded = {}  # prompt number -> [keys and values per layer, logits of the first token, samples to come]
        self.active = 0  # rows 0..active-1 are at work
        self.owner = [None] * rows  # (prompt number, sample number)
        # per row: tokens so far, next place in the cache and on the rotary axes, the last token
        self.count, self.where, self.rope, self.token = torch.zeros(
            4, rows, dtype=torch.long, device=device
        )
        self.ids = torch.zeros(rows, max_len, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_len, device=device)
        self.draws = torch.zeros(rows, max_len, dtype=torch.float64, device=device)

    def admit(self):
        """waiting samples take the free rows; each prompt goes through the model once, whatever its number of samples"""
        new = [
            self.waiting.popleft() for _ in range(min(self.rows - self.active, len(self.waiting)))
        ]
        self.encode(list(dict.fromkeys(p for p, _ in new if p not in self.encoded)))
        for p, group in groupby(new, key=lambda sample: sample[0]):
            samples = [s for _, s in group]
            here = slice(self.active, self.active + len(samples))
            kv, logits, _ = self.encoded[p]
            length = len(self.prompts[p].ids)
            self.cache.reserve(length)
            for layer, stored in zip(self.cache.kv, kv):
                layer[:, here, :, :length] = stored  # (2, 1, kv, P, d) to every row
            self.owner[here] = [(p, s) for s in samples]
            self.count[here], self.where[here], self.rope[here] = (
                0,
                length,
                self.prompts[p].next_position,
            )
            draws = [uniforms((*self.seeds[p], s), self.max_len) for s in samples]
            self.draws[here] = torch.stack(draws).to(self.device)
            self.active += len(samples)
            self.take(logits.expand(len(samples), -1), here)
            self.encoded[p][2] -= len(samples)
            if not self.encoded[p][2]:
                del self.encoded[p]

    def encode(self, numbers):
        """packed prefill of these prompts, so many tokens at a time"""
        while numbers:
            some, total = [], 0
            while numbers and (
                not some or total + len(self.prompts[numbers[0]].ids) <= self.engine.prefill_tokens
            ):
                some.append(numbers.pop(0))
                total += len(self.prompts[some[-1]].ids)
            self.cache.recorded = {}
            batch = pack([(self.prompts[p], []) for p in some], self.device)
            hidden = hidden_states(self.engine.hf, batch, self.cache)
            ends = batch.packing.cu_seqlens[1:].long()
            logits = hidden[ends - 1] @ self.head.t()
            layers = [
                torch.stack(self.cache.recorded[i]) for i in range(len(self.cache.kv))
            ]  # (2, 1, kv, T, d)
            self.cache.recorded = None
            for i, p in enumerate(some):
                span = slice(ends[i] - len(self.prompts[p].ids), ends[i])
                self.encoded[p] = [
                    [layer[:, :, :, span] for layer in layers],
                    logits[i : i + 1],
                    self.n,
                ]

    def decode(self):
        """one more token for every active row"""
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

    def take(self, logits, here):
        """sample one token for each row of the slice and note it"""
        rows = torch.arange(here.start, here.stop, device=self.device)
        count = self.count[here]
        picked, logprobs = sample(
            logits, self.draws[rows, count], self.temperature, self.top_p, self.engine.banned
        )
        self.ids[rows, count], self.logprobs[rows, count], self.token[here] = (
            picked,
            logprobs,
            picked,
        )
        self.count[here] += 1

    def retire(self):
        """give out the finished samples; rows from the end close the gaps"""
        stopped = torch.isin(self.token[: self.active], self.eos)
        done = stopped | (self.count[: self.active] >= self.max_len)
        finished, stopped = done.nonzero()[:, 0].tolist(), stopped.tolist()
        out = []
        for r in finished:
            k = int(self.count[r])
            rollout = Rollout(
                self.ids[r, :k].tolist(),
                self.logprobs[r, :k].tolist(),
                "stop" if stopped[r] else "length",
            )
            out.append((*self.owner[r], rollout))
        left = self.active - len(finished)
        src = (~done[left:]).nonzero()[:, 0].add(left).tolist()
        dst = [r for r in finished if r < left]
        if src:
            self.cache.length = int(self.where[src].max())
            self.cache.move(src, dst)
            for x in (
                self.count,
                self.where,
                self.rope,
                self.token,
                self.ids,
                self.logprobs,
                self.draws,
            ):
                x[dst] = x[src]
            for a, b in zip(src, dst):
                self.owner[b] = self.owner[a]
        self.active = left
        return out


def uniforms(seed, n):
    """n numbers in [0, 1) that follow from a tuple of ints: (seed, step, prompt, sample)"""
    return torch.from_numpy(
        np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(n)
    )


def sample(logits, u, temperature, top_p, banned):
    """logits (B, V), draws u (B,) -> tokens (B,), their log-probabilities (B,) at this temperature (at 1 if greedy)"""
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
            ranked, order = p.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = (
                0  # the smallest set of tokens that holds top_p of the mass
            )
            p = torch.zeros_like(p).scatter_(1, order, ranked)
        cdf = p.cumsum(-1)
        # the first token whose cumulated probability exceeds u; a banned or cut token has an empty interval
        picked = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_(
            max=logits.shape[1] - 1
        )
    return picked, logprobs.gather(1, picked[:, None])[:, 0]


def make_engine(config, policy, processor, max_len, device):
    """what samples: all three give sync(policy) and generate(prompts, ...). policy None: evaluation with vLLM, which keeps
    the weights that it read from the checkpoint and never sleeps"""
    if config.engine == "torch":
        return TorchEngine(replica(policy), processor, policy.banned, config.max_rows)
    from nano import vllm_engine

    if config.engine == "http":
        return vllm_engine.HTTPEngine(config.url, processor, device)
    return vllm_engine.VLLMEngine(
        config.model,
        processor,
        config.max_prompt_len + max_len,
        device,
        config.vllm_memory,
        config.vllm_tp,
        config.max_num_seqs,
        may_sleep=policy is not None and not config.async_steps,
    )


def check_engine(config):
    """flags that do not go together -> one line for people"""
    if config.engine not in ("torch", "vllm", "http"):
        raise SystemExit(f"--engine {config.engine!r}: one of torch, vllm, http")
    if config.engine != "torch" and config.top_p < 1:
        raise SystemExit(
            "--top_p below 1: vLLM's log-probabilities would be those of the cut distribution, not the policy's"
        )
    if config.async_steps not in (0, 1) or (
        config.async_steps and (config.vllm_tp > 1 or config.tis)
    ):
        raise SystemExit(
            "--async_steps is 0 or 1; 1 goes neither with --vllm_tp above 1 (two threads in collectives) "
            "nor with --tis (its ratio is already that of trainer and rollout)"
        )
