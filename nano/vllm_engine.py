"""Rollouts from vLLM behind the interface of rollout.TorchEngine: sync(policy), generate(...).

  torchrun --nproc_per_node 8 grpo.py --engine vllm ...

Each rank, or each team of `tp` ranks, has one vLLM in the training process, which sleeps while the
policy is updated. Any act of a sync that fails ends the run. A vLLM that keeps an old vision tower
looks just like a policy that learns slowly, so a sync ends with a probe that has an image.

Written for vllm 0.32.0. Left out: pipeline parallelism, LoRA, quantized rollouts.
"""

import io
import os
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from nano import hub
from nano.data import MARK, Record, load_image
from nano.packing import Processor, Prompt, encode, pack
from nano.rollout import Sample, make_sample

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; only the CPU build reads it

try:
    from vllm import LLM, SamplingParams
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader import reload
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError as error:
    raise SystemExit(
        f"error: --engine vllm needs vLLM: pip install -r requirements-gpu.txt ({error})"
    ) from error

BUCKET = 256 << 20  # bytes of weights that any rank holds whole at a time
CHECK_EVERY = 50  # syncs between two probes; the first sync is always checked


def request(prompt: Prompt, processor: Processor) -> dict:
    """What vLLM is asked: ids with ONE image token per image, which it expands itself.

    The images are resized by the trainer's rule already, so that nothing is left to resize: vLLM
    resizes with torchvision, not with Pillow, which would move the log-probabilities.
    """
    token, before = processor.image_token, [None, *prompt.ids]
    ids = [t for t, last in zip(prompt.ids, before) if t != token or last != token]
    patch, resample = processor.image_processor.patch_size, processor.image_processor.resample
    images = [
        load_image(image).resize((width * patch, height * patch), resample)
        for image, (_, height, width) in zip(prompt.record.images, prompt.image_grid.tolist())
    ]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images} if images else {}}


def base_seed(seeds: tuple[int, ...]) -> int:
    """A tuple of ints -> 62 bits; sample s of the prompt draws with base_seed + s."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 2)


def check_rollout(prompt: Prompt, read_ids, finish: str, versions: set[str], version: str):
    """What holds for every rollout, or the trainer sees another prompt or policy than vLLM."""
    read = f"vLLM read {len(read_ids)} prompt tokens, the trainer other {len(prompt.ids)}"
    for fails, trouble in (
        (list(read_ids) != prompt.ids, read),
        (finish not in ("stop", "length"), f"a rollout of vLLM ended with {finish!r}"),
        (versions - {version}, f"vLLM sampled with weights {versions}, expected {version}"),
    ):
        if fails:
            raise RuntimeError(f"{prompt.record.id}: {trouble}")


class Ban(LogitsProcessor, LogitsProcessorV2):
    """Gives no probability to what a policy must never sample (both of vLLM's runners call it)."""

    def __init__(self, vllm_config, *_):
        config = vllm_config.model_config
        self.banned = Processor(config.model).banned_ids(config.get_vocab_size())

    def apply(self, logits, *_):
        self.banned = self.banned.to(logits.device)
        return logits.index_fill_(1, self.banned, -float("inf"))

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass  # Nothing is kept per request.


class BucketTransfer(WeightTransferEngine):
    """vLLM's weight-transfer calls, for buckets of named tensors in the same process.

    Each layer is processed anew when it is complete, since some builds keep weights packed for
    their kernels: on the CPU, an in-place copy would change nothing.
    """

    def start_weight_update(self):
        self.missing = {name for name, _ in self.model.named_parameters()}
        reload.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        tensors = [(name, tensor.to(self.device)) for name, tensor in update_info["tensors"]]
        self.missing -= self.model.load_weights(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def finish_weight_update(self):
        reload.finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # On the CPU a head that is tied to the embeddings keeps a packed copy of its own.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
        if self.missing:
            some = f"{len(self.missing)} parameters, e.g. {sorted(self.missing)[:3]}"
            raise RuntimeError(f"weight sync: nothing arrived for {some}")

    def shutdown(self, *_):
        pass  # Nobody has to be met or left in the same process.

    init_transfer_engine = receive_weights = shutdown


WeightTransferEngineFactory.register_engine("buckets", BucketTransfer)


def buckets(policy, dtype: torch.dtype, size: int = BUCKET):
    """The weights in lists of (name, whole tensor) of about `size` bytes (a collective).

    A tensor is gathered from its shards when its turn comes: no rank ever holds the whole model.
    """
    bucket = []
    for name, whole in policy.full_weights(dtype):
        bucket.append((name, whole))
        if sum(tensor.nbytes for _, tensor in bucket) >= size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def probe(processor: Processor) -> Prompt:
    """A fixed question about a picture of large soft spots, whose embeddings are no constant."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((112, 84), Image.BICUBIC).save(file, "PNG")
    return encode(Record("probe", f"{MARK}What do you see?", "-", [file.getvalue()]), processor)


class VLLMEngine:
    """One vLLM per rank, or per `tp` neighbouring ranks, beside the policy.

    `path` is a checkpoint: its weights hold until the first sync. `max_len` counts tokens of
    prompt and response, `memory` is vLLM's share of the GPU. With `may_sleep` it sleeps from the
    end of generate to the next sync (on a GPU).
    """

    def __init__(
        self,
        path: str,
        processor: Processor,
        max_len: int,
        device: torch.device,
        memory: float = 0.5,
        tp: int = 1,
        max_num_seqs: int = 256,
        may_sleep: bool = True,
    ):
        if dist.get_world_size() % tp:
            raise SystemExit(f"error: --vllm_tp {tp} does not divide {dist.get_world_size()} ranks")
        self.team = dist.new_subgroups(tp)[0] if tp > 1 else None
        self.processor, self.probe, self.syncs = processor, probe(processor), 0
        cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda else torch.float32  # as in the trainer's forward
        self.sleeps, self.asleep = may_sleep and cuda, False
        settings = dict(dtype=self.dtype, max_model_len=max_len, max_num_seqs=max_num_seqs)
        settings |= dict(gpu_memory_utilization=memory, enable_sleep_mode=self.sleeps)
        settings |= dict(tensor_parallel_size=tp, distributed_executor_backend="external_launcher")
        settings |= dict(limit_mm_per_prompt={"video": 0}, generation_config="vllm")
        if processor.image_processor is not processor.released_images:  # --min_, --max_pixels
            settings |= dict(mm_processor_kwargs={"size": processor.image_processor.size})
        # After temperature, ban and top_p; hence training refuses a top_p below 1.
        settings |= dict(logprobs_mode="processed_logprobs", logits_processors=[Ban])
        if cuda:  # vLLM's head rounds to bf16 unless it is told otherwise; ours is float32.
            settings |= dict(hf_overrides={"head_dtype": "float32"})
        else:  # For these vLLM asks a seeded generator for what it lacks on the CPU.
            settings |= dict(enforce_eager=True, enable_chunked_prefill=False)
            settings |= dict(max_num_batched_tokens=max(8192, max_len))
        # vLLM reads torchrun's variables, which a plain `python` lacks, and changes some of them.
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD")
        before = {name: os.environ[name] for name in names if name in os.environ}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0"} | before
        threads = torch.get_num_threads()
        self.llm = LLM(hub.model(path), weight_transfer_config={"backend": "buckets"}, **settings)
        torch.set_num_threads(threads)  # vLLM leaves one; the optimizer under offload wants all
        for name in names:
            os.environ.pop(name, None)
        os.environ |= before
        self.version = self.llm.get_weight_version()
        self.sleep()

    def close(self):
        """Shut vLLM down; it takes torch's process groups with it."""
        self.llm.llm_engine.engine_core.shutdown()

    def sleep(self):
        """Weights and KV cache leave the GPU; nothing is kept, since sync brings new weights."""
        if self.sleeps:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, policy):
        """Take over the weights of the training policy (a collective)."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.syncs += 1
        self.version = str(self.syncs)
        self.llm.start_weight_update()
        for bucket in buckets(policy, self.dtype):
            self.llm.update_weights({"update_info": {"tensors": bucket}})
        self.llm.finish_weight_update(self.version)
        self.drop_caches()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if (version := self.llm.get_weight_version()) != self.version:
            raise RuntimeError(f"weight sync: vLLM has version {version}, not {self.version}")
        if self.syncs % CHECK_EVERY == 1:
            self.check_probe(policy)

    def drop_caches(self):
        """Forget the keys, values and image embeddings that the old weights made."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("weight sync: requests still run, vLLM keeps its prefix cache")
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()  # what the vision tower has put out

    @torch.no_grad()
    def check_probe(self, policy):
        """Does vLLM see, with its weights, what the trainer sees? Greedy tokens (a collective)."""
        [[sample]] = self.sample([self.probe], 1, 16, [(0,)], temperature=0)
        device = next(policy.parameters()).device
        logprobs, _ = policy(pack([(self.probe, sample.ids)], device))
        self.gap = (logprobs.cpu() - torch.tensor(sample.logprobs)).abs().mean().item()
        limit = 0.1 if device.type == "cuda" else 1e-3  # rounding of bf16, of float32
        if not self.gap < limit:
            raise RuntimeError(
                f"weight sync: on the probe, vLLM's log-probabilities are off by {self.gap:.2g} "
                f"(limit {limit}): stale caches, or weights in the wrong place"
            )

    def generate(self, prompts, group_size, max_len, seeds, temperature=1.0, top_p=1.0):
        """As TorchEngine.generate. The draws follow from the seeds, but they are vLLM's own."""
        groups = self.sample(prompts, group_size, max_len, seeds, temperature, top_p)
        self.sleep()
        return groups

    def sample(self, prompts, group_size, max_len, seeds, temperature=1.0, top_p=1.0):
        """As generate, but vLLM stays awake."""
        asked, first = prompts, 0
        if self.team:  # The ranks of a team decode the same batch together: all of theirs.
            parts = [None] * dist.get_world_size(self.team)
            light = [replace(p, pixel_values=None) for p in prompts]  # The record has the images.
            dist.all_gather_object(parts, (light, seeds), group=self.team)
            first = sum(len(part) for part, _ in parts[: dist.get_rank(self.team)])
            asked, seeds = ([x for part in column for x in part] for column in zip(*parts))
        settings = dict(max_tokens=max_len, temperature=temperature, top_p=top_p)
        settings |= dict(n=group_size if temperature else 1)  # Greedy answers are all the same.
        settings |= dict(stop_token_ids=self.processor.eos_ids, detokenize=False)
        settings |= dict(logprobs=0, flat_logprobs=True)  # of the sampled tokens alone
        params = [SamplingParams(seed=base_seed(seed), **settings) for seed in seeds]
        requests = [request(prompt, self.processor) for prompt in asked]
        answers = self.llm.generate(requests, params, use_tqdm=False)
        return [self.group(p, a, group_size) for p, a in zip(prompts, answers[first:])]

    def group(self, prompt: Prompt, answer, group_size: int) -> list[Sample]:
        """vLLM's answer to a prompt -> its Samples."""
        samples = []
        for out in answer.outputs * (group_size // len(answer.outputs)):
            versions = {span.version for span in out.weight_versions or []}
            finish, ids = out.finish_reason, list(out.token_ids)
            check_rollout(prompt, answer.prompt_token_ids, finish, versions, self.version)
            logprobs = list(out.logprobs.logprobs)
            samples.append(make_sample(prompt, ids, logprobs, finish, self.processor))
        return samples
