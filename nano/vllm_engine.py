"""Rollouts from vLLM behind the interface of rollout.TorchEngine: sync(policy), generate(prompts, ...).

  torchrun --nproc_per_node 8 grpo.py --engine vllm ...                   one vLLM per rank, in the training process
  python vllm_engine.py MODEL --port 8000                                 a server of its own, and the run that asks it:
  torchrun --nproc_per_node 8 grpo.py --engine http --url http://HOST:8000 ...

`VLLMEngine` sleeps while the policy is updated; `HTTPEngine` pushes the weights to servers on other devices. A sync is a
fixed order of acts, and any of them that fails ends the run: wake the weights, stream the shards bucket by bucket, drop
what was cached under the old weights, wake the KV cache, check. A vLLM that silently keeps an old vision tower looks
just like a policy that learns slowly, so the check compares log-probabilities of a probe with an image.

Written for vllm 0.32.0. Left out: pipeline parallelism, LoRA, quantized rollouts.
"""

import base64
import io
import json
import os
import queue
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

import model
from nano.data import MARK, Record, load_image
from nano.packing import encode, pack
from nano.rollout import Rollout

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; only the CPU build reads it

try:
    import httpx
    from vllm import LLM, SamplingParams
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError as error:
    raise SystemExit(
        f"--engine vllm and http need vLLM: pip install -r requirements-gpu.txt ({error})"
    ) from error

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUCKET = 256 << 20  # bytes of weights that are whole at a time, on any rank
CHECK_EVERY = 50  # syncs between two probes; the first is always checked
FRESH = "default"  # what vLLM calls the weights that it read itself

# -----------------------------------------------------------------------------------------------------------------
# what both engines share


def unexpanded(prompt, processor):
    """the prompt's ids with ONE image token per image, as vLLM wants them: it expands them itself"""
    counts = iter((prompt.image_grid.prod(-1) // processor.merge_size**2).tolist())
    ids, t = [], 0
    while t < len(prompt.ids):
        ids.append(prompt.ids[t])
        t += next(counts) if prompt.ids[t] == processor.image_token else 1
    return ids


def resized_images(prompt, processor):
    """its PIL images, resized by the trainer's rule: vLLM's own processor then finds nothing left to resize.

    the two image processors resize differently (Pillow here, torchvision there), which would move the log-probabilities.
    """
    tool, out = processor.image_processor, []
    for image, (_, h, w) in zip(prompt.record.images, prompt.image_grid.tolist()):
        out.append(
            load_image(image).resize((w * tool.patch_size, h * tool.patch_size), tool.resample)
        )
    return out


def base_seed(seed):
    """a tuple of ints -> 62 bits; sample s of the prompt draws with base_seed + s"""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 2)


def sampling(processor, max_len, temperature, top_p):
    """plain sampling. the log-probabilities are those after temperature and ban (logprobs_mode=processed_logprobs);
    with top_p < 1 they would be those of the cut distribution, which is why training refuses it"""
    return dict(
        max_tokens=max_len,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        logprobs=0,
        stop_token_ids=processor.eos_ids,
        detokenize=False,
    )


def check_rollout(prompt, used, finish, versions, version, where):
    """what must hold for every rollout, or the trainer would see another prompt or another policy than the sampler"""
    if list(used) != prompt.ids:
        raise RuntimeError(
            f"{where}: {prompt.record.id}: vLLM read {len(used)} prompt tokens, the trainer {len(prompt.ids)}, "
            "or other ones: the image processors or tokenizers of the two differ"
        )
    if finish not in ("stop", "length"):
        raise RuntimeError(f"{where}: {prompt.record.id}: a rollout ended with {finish!r}")
    if any(v != version for v in versions):
        raise RuntimeError(
            f"{where}: {prompt.record.id}: sampled with weights {versions}, expected {version}"
        )


def buckets(policy, dtype, size=BUCKET):
    """the weights as lists of (name, whole tensor) of about `size` bytes; a collective: all ranks walk it together.

    a bucket is gathered from the FSDP2 shards when it is asked for, so that no rank ever holds the whole model.
    """
    bucket, held = [], 0
    for name, p in policy.hf.named_parameters():
        whole = model.full(p.detach()).to(dtype)
        bucket.append((model.clean_name(name), whole))
        held += whole.nbytes
        if held >= size:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


class Probe:
    """a fixed picture and question: does the sampler see, with its weights, what the trainer sees?"""

    def __init__(self, processor):
        from PIL import Image

        noise = np.random.default_rng(0).integers(
            0, 256, (8, 8, 3), dtype=np.uint8
        )  # large soft spots, not flat
        out = io.BytesIO()
        Image.fromarray(noise).resize((112, 84), Image.BICUBIC).save(out, "PNG")
        self.prompt = encode(
            Record("probe", f"{MARK}What do you see?", "-", [out.getvalue()]), processor
        )

    @torch.no_grad()
    def compare(self, engine, policy):
        """greedy tokens and their log-probabilities from the engine, against the trainer's (a collective)"""
        rollout = engine.sample([self.prompt], 1, 16, [(0,)], temperature=0)[0][0]
        device = next(policy.parameters()).device
        mine, _ = policy(pack([(self.prompt, rollout.ids)], device))
        gap = (mine.cpu() - torch.tensor(rollout.logprobs)).abs().mean().item()
        limit = 0.05 if device.type == "cuda" else 1e-3  # bf16's rounding, float32's
        if not gap < limit:
            raise RuntimeError(
                f"weight sync: on the probe, vLLM's log-probabilities are {gap:.2g} away from the trainer's on "
                f"average, {limit} is the limit: stale caches or weights that landed in the wrong place"
            )
        return gap


# -----------------------------------------------------------------------------------------------------------------
# inside vLLM's worker


class Ban(LogitsProcessor, LogitsProcessorV2):
    """the tokens that a policy must never sample get no probability at all (both of vLLM's model runners call it)"""

    def __init__(self, vllm_config, *_):
        config = vllm_config.model_config
        self.banned = model.Processor(config.model).banned_ids(config.get_vocab_size())

    def apply(self, logits, *_):
        self.banned = self.banned.to(logits.device)
        return logits.index_fill_(1, self.banned, -float("inf"))

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        """nothing to keep per request"""


@dataclass
class Nothing:
    """our transport needs no rendezvous"""


@dataclass
class Weights:
    """one bucket: tensors in the same process, or over HTTP their shapes and bytes"""

    tensors: list = field(default_factory=list)  # (name, tensor)
    entries: list = field(default_factory=list)  # (name, dtype, shape)
    data: str = ""  # all of them, one after the other, base64

    def unpacked(self):
        raw, at = bytearray(base64.b64decode(self.data)), 0
        for name, dtype, shape in self.entries:
            dtype = getattr(torch, dtype)
            count = int(np.prod(shape))
            yield name, torch.frombuffer(raw, dtype=dtype, count=count, offset=at).view(shape)
            at += count * dtype.itemsize


class BucketTransfer(WeightTransferEngine):
    """vLLM's weight-transfer calls for buckets of named tensors; each layer is processed anew when it is complete, since
    some builds keep weights packed for their kernels (on the CPU an in-place copy would change nothing)"""

    init_info_cls, update_info_cls = Nothing, Weights

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        self.missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def receive_weights(self, update_info):
        tensors = update_info.tensors or list(update_info.unpacked())
        self.missing -= self.model.load_weights([(name, t.to(self.device)) for name, t in tensors])

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)
        for module in (
            self.model.modules()
        ):  # a head tied to the embeddings keeps a packed copy of its own on the CPU
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
        if self.missing:
            raise RuntimeError(
                f"weight sync: nothing arrived for {len(self.missing)} parameters, e.g. {sorted(self.missing)[:3]}"
            )

    def shutdown(self):
        pass


WeightTransferEngineFactory.register_engine("buckets", BucketTransfer)

# -----------------------------------------------------------------------------------------------------------------
# vLLM in the training process


@contextmanager
def rank_in_environment():
    """vLLM's external launcher reads torchrun's variables, which a plain `python` lacks; it changes some on the way"""
    before = dict(os.environ)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD"):
            os.environ.pop(key, None)
            if key in before:
                os.environ[key] = before[key]


class VLLMEngine:
    """one engine per rank, or per `tp` neighbouring ranks; on a GPU it sleeps from the end of generate to the next sync"""

    def __init__(
        self, path, processor, max_len, device, memory=0.5, tp=1, max_num_seqs=256, may_sleep=True
    ):
        """path: the checkpoint that the run started from; its weights are replaced by the first sync. max_len: prompt + response"""
        if dist.get_world_size() % tp:
            raise SystemExit(
                f"--vllm_tp {tp}: the number of ranks, {dist.get_world_size()}, must be a multiple of it"
            )
        self.processor, self.tp = processor, tp
        self.dtype = (
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )  # as in the trainer's forward
        self.sleeps = may_sleep and device.type == "cuda"
        self.syncs, self.probe = 0, Probe(processor)
        first = dist.get_rank() // tp * tp
        groups = (
            [dist.new_group(range(r, r + tp)) for r in range(0, dist.get_world_size(), tp)]
            if tp > 1
            else []
        )
        self.team, self.place = (groups[first // tp] if groups else None), dist.get_rank() - first
        # on the CPU: no compilation, and no prompt in pieces, since vLLM then asks a seeded generator for what it lacks there
        cpu = dict(
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8192, max_len),
        )
        with rank_in_environment():
            self.llm = LLM(
                path,
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=max_len,
                seed=0,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tp,
                gpu_memory_utilization=memory,
                max_num_seqs=max_num_seqs,
                enable_sleep_mode=self.sleeps,
                limit_mm_per_prompt={"video": 0},
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                logits_processors=[Ban],
                weight_transfer_config={"backend": "buckets"},
                **(cpu if device.type == "cpu" else {}),
            )
        self.version, self.asleep = self.llm.get_weight_version(), False
        self.sleep()

    def close(self):
        """shut vLLM down; it takes torch's process groups with it"""
        self.llm.llm_engine.engine_core.shutdown()

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(
                level=2
            )  # weights and KV cache leave the GPU; nothing is kept, sync brings the next ones
            self.asleep = True

    def sync(self, policy):
        """take over the weights of the training policy (a collective)"""
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
        if (got := self.llm.get_weight_version()) != self.version:
            raise RuntimeError(f"weight sync: vLLM is at version {got}, expected {self.version}")
        if self.syncs % CHECK_EVERY == 1:
            self.gap = self.probe.compare(self, policy)

    def drop_caches(self):
        """keys, values and image embeddings that the old weights made"""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "weight sync: vLLM would not drop its prefix cache: requests are still running"
            )
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()  # the vision tower's outputs, which reset_mm_cache leaves alone

    def generate(self, *args, **kwargs):
        """as TorchEngine.generate; the draws follow from the seeds, but they are vLLM's: the samples are other ones"""
        results = self.sample(*args, **kwargs)
        self.sleep()
        return results

    def sample(self, prompts, n, max_len, seeds, temperature=1.0, top_p=1.0, on_done=None):
        mine, offset = len(prompts), 0
        if self.team:  # the ranks of a team decode the same batch together: all of theirs
            parts = [None] * self.tp
            light = [
                replace(p, pixel_values=None) for p in prompts
            ]  # vLLM takes the pictures from the record
            dist.all_gather_object(parts, (light, seeds), group=self.team)
            offset = sum(len(p) for p, _ in parts[: self.place])
            prompts, seeds = sum((p for p, _ in parts), []), sum((s for _, s in parts), [])
        engine, plain = self.llm.llm_engine, sampling(self.processor, max_len, temperature, top_p)
        for p, prompt in enumerate(prompts):
            request = dict(prompt_token_ids=unexpanded(prompt, self.processor))
            if prompt.record.images:
                request["multi_modal_data"] = {"image": resized_images(prompt, self.processor)}
            (request,) = engine.renderer.render_cmpl([request])
            for s in range(n):
                params = SamplingParams(
                    seed=base_seed(seeds[p]) + s,
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    **plain,
                )
                engine.add_request(f"{p} {s}", request, params)
        results = [[None] * n for _ in range(mine)]
        while engine.has_unfinished_requests():
            for done in engine.step():
                (p, s), out = map(int, done.request_id.split()), done.outputs[0]
                versions = {span.version for span in out.weight_versions or []}
                check_rollout(
                    prompts[p],
                    done.prompt_token_ids,
                    out.finish_reason,
                    versions,
                    self.version,
                    "vLLM",
                )
                if offset <= p < offset + mine:
                    rollout = Rollout(
                        list(out.token_ids), list(out.logprobs.logprobs), out.finish_reason
                    )
                    results[p - offset][s] = rollout
                    if on_done:
                        on_done(p - offset, s, rollout)
        return results


# -----------------------------------------------------------------------------------------------------------------
# vLLM servers on other devices


class Source(WeightSource):
    """the policy as vLLM's NCCL trainer wants it: gathered one tensor at a time, in the same order on all ranks"""

    def __init__(self, policy, dtype):
        self.policy, self.dtype = policy, dtype

    def metadata(self):
        parameters = self.policy.hf.named_parameters()
        return [
            ParamMeta(model.clean_name(name), self.dtype, tuple(p.shape)) for name, p in parameters
        ]

    def __iter__(self):
        for bucket in buckets(self.policy, self.dtype, size=1):
            yield from bucket


class HTTPEngine:
    """rollouts from vLLM servers (`python vllm_engine.py MODEL`); rank r asks server r modulo their number"""

    def __init__(self, urls, processor, device):
        self.urls = [u.rstrip("/") for u in urls.split(",") if u]
        if not self.urls:
            raise SystemExit(
                "--engine http needs --url http://HOST:PORT (several: separated by commas)"
            )
        self.processor, self.device = processor, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.url = self.urls[dist.get_rank() % len(self.urls)]
        self.client = httpx.Client(
            limits=httpx.Limits(max_connections=None), trust_env=False
        )  # no proxy in between
        self.syncs, self.probe, self.senders = 0, Probe(processor), None
        self.ask("GET", self.url, "/health", timeout=30)
        self.version = self.version_of(self.url)

    def version_of(self, url):
        return self.ask("GET", url, "/weight_info")["weight_version"]

    def must_serve(self, path, max_len):
        """evaluation, which pushes no weights: every server must hold this checkpoint, as it read it, and have the room.

        a path that does not exist here is a server's on another machine: then its last two folders must be the same.
        """
        place = lambda p: os.path.realpath(p) if os.path.exists(p) else p
        for url in self.urls:
            card = self.ask("GET", url, "/v1/models")["data"][0]
            theirs, ours = place(card["root"]), place(path)
            if theirs != ours and (
                os.path.exists(theirs) or theirs.split("/")[-2:] != ours.split("/")[-2:]
            ):
                raise SystemExit(
                    f"the vLLM server at {url} serves {card['root']}, not {path}: start one that does"
                )
            if self.version_of(url) != FRESH:
                raise SystemExit(
                    f"the vLLM server at {url} holds the weights of a training run, no longer those of {path}: "
                    "start it again"
                )
            if card["max_model_len"] < max_len:
                raise SystemExit(
                    f"the vLLM server at {url} takes {card['max_model_len']} tokens, --max_prompt_len and --max_len "
                    f"are {max_len} together: start it with --max-model-len {max_len}"
                )

    def ask(self, how, url, path, body=None, timeout=600):
        """one request; whatever goes wrong names the server and ends the run"""
        try:
            answer = self.client.request(
                how, url + path, json=body, timeout=httpx.Timeout(timeout, connect=10)
            )
        except httpx.HTTPError as error:
            raise SystemExit(
                f"the vLLM server at {url} did not answer {path} ({type(error).__name__}: {error}). "
                "Start it again and run the same command: the run goes on from its checkpoint"
            ) from error
        if answer.status_code != 200:
            raise SystemExit(
                f"the vLLM server at {url} refused {path}: {answer.status_code} {answer.text[:500]}"
            )
        return answer.json() if answer.text else None

    def sync(self, policy):
        """take over the weights of the training policy (a collective): rank 0 sends, all ranks gather"""
        self.syncs += 1
        self.version = str(self.syncs)
        sender = dist.get_rank() == 0
        if sender:
            for url in self.urls:  # no request may run; keys, values, images and the vision tower's outputs are dropped
                self.ask("POST", url, "/pause?mode=abort&clear_cache=true")
        if self.device.type == "cuda":
            self.send_nccl(policy)
        else:
            self.send_json(policy, sender)
        if sender:
            for url in self.urls:
                self.ask("POST", url, "/update_weight_version", {"new_version": self.version})
                self.ask("POST", url, "/resume")
        dist.barrier()
        if (got := self.version_of(self.url)) != self.version:
            raise RuntimeError(
                f"weight sync: {self.url} is at version {got}, expected {self.version}"
            )
        if self.syncs % CHECK_EVERY == 1:
            self.gap = self.probe.compare(self, policy)

    def send_nccl(self, policy):
        """vLLM's own trainer side: packed broadcasts from rank 0 to the servers' workers"""
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if self.senders is None:
            self.senders = []
            for url in self.urls:
                world = self.ask("GET", url, "/get_world_size")["world_size"]
                with socket.socket() as s:
                    s.bind(("", 0))
                    port = s.getsockname()[1]
                info = NCCLTrainerInitInfo(
                    os.environ.get("MASTER_ADDR", "127.0.0.1"),
                    port,
                    1 + world,
                    rank=dist.get_rank(),
                )
                client = HTTPVLLMWeightSyncClient(url)
                self.senders.append(
                    WeightTransferTrainerFactory.trainer_init(
                        info, client=client, source=Source(policy, self.dtype)
                    )
                )
        for sender in self.senders:
            sender.send_weights()

    def send_json(self, policy, sender):
        """where there is no NCCL: the buckets as bytes in the requests (one machine, small models, tests)"""
        each = lambda path, body=None: [
            self.ask("POST", url, path, body) for url in self.urls if sender
        ]
        if self.senders is None:
            self.senders = each("/init_weight_transfer_engine", {"init_info": {}})
        each("/start_weight_update")
        for bucket in buckets(policy, self.dtype):
            entries = [
                (name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket
            ]
            data = b"".join(
                t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for _, t in bucket
            )
            each(
                "/update_weights",
                {"update_info": dict(entries=entries, data=base64.b64encode(data).decode())},
            )
        each("/finish_weight_update")

    def generate(self, prompts, n, max_len, seeds, temperature=1.0, top_p=1.0, on_done=None):
        """as TorchEngine.generate; one request per prompt, whose n samples come back together"""
        results, plain, finished = (
            [None] * len(prompts),
            sampling(self.processor, max_len, temperature, top_p),
            queue.Queue(),
        )

        def work(p):
            try:
                finished.put((p, self.group(prompts[p], n, seeds[p], plain)))
            except BaseException as error:  # raised below, where the run can end
                finished.put((p, error))

        for p in range(
            len(prompts)
        ):  # daemons: the end of the run does not wait for a server that hangs
            threading.Thread(target=work, args=(p,), daemon=True).start()
        for _ in prompts:
            p, group = self.patiently(finished)
            if isinstance(group, BaseException):
                raise group
            results[p] = group
            for s, rollout in enumerate(group):
                if on_done:
                    on_done(p, s, rollout)
        return results

    sample = generate

    def patiently(self, finished):
        """the next of the answers, which may take hours as long as the server is well"""
        while True:
            try:
                return finished.get(timeout=20)
            except queue.Empty:
                self.ask("GET", self.url, "/health", timeout=20)

    def group(self, prompt, n, seed, plain):
        """the n rollouts of one prompt"""
        parts = []
        for image in resized_images(prompt, self.processor):
            out = io.BytesIO()
            image.save(out, "PNG", compress_level=1)
            parts.append(
                dict(
                    type="image_url",
                    url="data:image/png;base64," + base64.b64encode(out.getvalue()).decode(),
                )
            )
        body = dict(
            token_ids=unexpanded(prompt, self.processor),
            return_token_ids=True,
            sampling_params=plain | dict(n=n, seed=base_seed(seed)),
        )
        if parts:
            body["content_parts"] = parts
        answer = self.ask("POST", self.url, "/inference/v1/generate", body, timeout=None)
        rollouts = [None] * n
        for c in answer["choices"]:
            versions = {v["version"] for v in c["weight_versions"] or []}
            check_rollout(
                prompt,
                answer["prompt_token_ids"],
                c["finish_reason"],
                versions,
                self.version,
                self.url,
            )
            logprobs = [x["logprob"] for x in c["logprobs"]["content"]]
            rollouts[c["index"]] = Rollout(c["token_ids"], logprobs, c["finish_reason"])
        return rollouts


def serve(path, *flags):
    """`vllm serve` with what HTTPEngine counts on; further flags are vLLM's own and have the last word"""
    path = (
        os.path.abspath(path) if os.path.isdir(path) else path
    )  # evaluation asks which folder it is
    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "buckets"
    if not gpu:
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the worker in the engine's process: one process less
    os.environ |= {
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")])),
    }
    words = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        path,
        "--enable-scale-out",
        "--generation-config",
        "vllm",
        "--logprobs-mode",
        "processed_logprobs",
        "--logits-processors",
        "nano.vllm_engine:Ban",
        "--weight-transfer-config",
        json.dumps({"backend": backend}),
        "--limit-mm-per-prompt",
        json.dumps({"video": 0}),
        "--dtype",
        "bfloat16" if gpu else "float32",
        *(
            []
            if gpu
            else [
                "--enforce-eager",
                "--no-enable-chunked-prefill",
                "--max-num-batched-tokens",
                "8192",
            ]
        ),
        *flags,
    ]
    os.execv(sys.executable, words)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(
            "python vllm_engine.py MODEL [--port 8000 and other flags of `vllm serve`]"
        )
    serve(*sys.argv[1:])
