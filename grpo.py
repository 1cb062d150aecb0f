"""Stage 2 of Vision-R1: GRPO with the hard formatting result reward, under Progressive Thinking
Suppression Training (Sec. 3.4).

  python grpo.py                                          the toy, on the spot
  torchrun --nproc_per_node 8 grpo.py --recipe vision-r1-7b
  torchrun --nproc_per_node 2 grpo.py --model DIR --data FILE --stages 1Kx8x50,2Kx4x50

The loop in `main` follows the paper: questions -> rollouts -> rewards -> advantages -> the
reference's log-probabilities -> the clipped loss with its KL term (Eq. 1) -> an optimizer step. The
length limit and the group size follow STAGES (Eq. 2). A run that was stopped goes on where it was.
"""

import nano.settings  # noqa: F401, answers --help before torch is loaded

import copy
import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import model
import ptst
import reward
import toy
from benchmarks.validate import validate
from nano import asking, budget, checkpoint, lora, packing, run
from nano.device import compute_dtype, micro_tokens
from nano.health import Health
from nano.questions import Questions, rounds
from nano.rollout import Sample, TorchEngine
from nano.steps import load_questions

# PTST (Eq. 2): (max_len, group_size, steps) of each stage. Think short and try often, then longer.
STAGES = [(4096, 16, 100), (8192, 8, 100)]


@dataclass
class Config:
    """The paper's values, or where it is silent EasyR1's: lr, questions, minibatches, temperature,
    weight_decay, max_grad_norm. The toy is a recipe that overrides them."""

    # what to run
    recipe: str = "toy"
    out: str = ""  # folder of the run; "" = named after model and data
    model: str = ""  # where RL starts: a Hugging Face folder or hub name, or toy:NAME
    data: str = "Osilly/Vision-R1-rl"  # problems, any format of nano/data.py, or toy:NAME
    eval_data: str = ""  # problems for validation, before the first step and every eval_every
    holdout: int = 0  # without eval_data: so many problems of `data` are held out for it
    split: str = "train"  # of a folder or a hub name that has several
    image_root: str = ""  # folders, with commas, where pictures are looked for besides the data's
    strict: bool = False  # stop at the first bad record instead of reporting it
    seed: int = 0
    # Sec. 3.4
    stages: str = ptst.format_stages(STAGES)  # as text, 4Kx16x100,8Kx8x100, or by name (ptst.py)
    questions: int = 512  # per rollout batch, over all ranks
    minibatches: int = 4  # optimizer steps per rollout batch
    epochs: int = 1  # times that a rollout batch is gone through
    resample: int = 1  # ask up to so many times the questions for such with a signal; 1 = off
    system_prompt: str = ""  # none after the cold start; Zero has one
    prefill: str = ""  # the prompt ends in it, the completion begins with it, e.g. <think>
    min_pixels: int = 0  # a smaller picture is enlarged; 0 = as the checkpoint says
    max_pixels: int = 0  # a larger one is made smaller; 0 = as the checkpoint says
    format_weight: float = 0.0  # 0 = all or nothing (HFRRF); 1 = Zero's format + result, 1:1
    # Eq. 1
    clip_eps: float = 0.2
    clip_eps_high: float = 0.0  # 0 = clip_eps; larger = clip-higher (DAPO)
    kl_coef: float = 1e-2  # beta; 0 = no reference model is loaded
    std_norm: bool = True  # divide advantages by the group's std; off = Dr. GRPO
    # over tokens, then samples (Eq. 1); over all tokens (DAPO, and EasyR1 when the paper was
    # written: its runs may have used that); over samples x max_len (Dr. GRPO)
    loss_mean: Literal["sequence", "token", "fixed"] = "sequence"
    drop_zero_var: bool = False  # leave groups without an advantage out of the means
    tis: float = 0.0  # truncated importance sampling: at most this weight per token; 0 = off
    # rollouts
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_len: int = 4096  # a longer prompt is reported and left out, never cut
    engine: Literal["torch", "vllm"] = "torch"  # vllm: one per rank, in this process
    max_rows: int = 256  # sequences that one rank decodes at a time
    vllm_memory: float = 0.5  # share of a GPU that vLLM may take while it samples
    vllm_tp: int = 1  # neighbouring ranks that share one vLLM (tensor parallel)
    # optimization
    lr: float = 1e-6  # learning rate
    warmup_steps: int = 0
    lr_decay: Literal["constant", "cosine"] = "constant"  # cosine: to 0 at the end of all stages
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    freeze_vision: bool = False  # then each image is encoded once a step
    lora_rank: int = 0  # train adapters of this rank and nothing else; 0 = all weights
    lora_alpha: float = 32.0  # the adapters' part is scaled by alpha / rank
    lora_vision: bool = False  # adapters for the vision tower too; else it is frozen
    # memory and speed
    micro_tokens: int = 0  # of a packed micro-batch on one rank; 0: GPU 20480, CPU 2560
    activation_checkpointing: bool = True
    checkpoint_share: float = 1.0  # of the blocks whose activations are computed again
    compile: bool = False  # torch.compile of the MLPs
    offload: Literal["none", "reference", "all"] = "none"  # to the CPU; all = the optimizer too
    shard_size: int = 0  # ranks that share one copy of the weights (HSDP); 0 = all ranks
    preflight: bool = True  # first print what the memory will hold, and try the longest step
    force: bool = False  # start although the memory on paper is more than the GPU has
    # the run
    eval_every: int = 20  # steps; and before the first and after the last one
    eval_temperature: str = "0.6"  # the paper's; several with commas, 0 = greedy: 0.6,0
    eval_top_p: float = 0.95  # the paper's evaluation
    eval_max_len: int = 0  # new tokens; 0 = the greatest limit of `stages`
    keep_best: bool = False  # save the checkpoint with the best eval_accuracy, and never remove it
    save_every: int = 5  # steps; the last one is always saved
    keep: int = 10  # checkpoints: every fifth of the last 50 steps, as for Tables 5 and 6
    resume: bool = True  # --no_resume starts over
    sample_questions: int = 1  # questions a step whose rollouts go to samples.jsonl
    wandb: bool = False
    tensorboard: bool = False


# What only says how a run is computed. All else must be the same when a run is gone on with.
HOW_ONLY = (
    *("stages", "strict", "max_rows", "vllm_memory", "vllm_tp", "micro_tokens", "compile"),
    *("activation_checkpointing", "offload", "shard_size", "preflight", "save_every", "keep"),
    *("force", "sample_questions", "wandb", "tensorboard", "eval_data", "eval_every", "keep_best"),
    *("eval_temperature", "eval_top_p", "eval_max_len", "image_root", "checkpoint_share"),
)

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
# Ours: a model of this size needs vLLM, which sleeps while training runs.
PAPER = dict(engine="vllm", vllm_memory=0.7, max_rows=1024)
ZERO = PAPER | dict(model=QWEN, system_prompt=asking.ZERO_PROMPT, format_weight=1.0)
CI_7B, CI_32B, CI_72B = (f"runs/vision-r1-ci-{size}/final" for size in ("7b", "32b", "72b"))
LORA = PAPER | dict(lora_rank=16, lr=1e-5)  # ours: adapters want about ten times the rate
# 32B, 72B: 20K more problems, which are not released: bring yours, --data Osilly/Vision-R1-rl,FILE
LARGER = [(4096, 16, 100), (8192, 8, 200)]
TOY = dict(model="toy:ci", data="toy:rl-problems", stages=[(96, 16, 60), (192, 8, 60)], questions=8)
TOY |= dict(minibatches=1, lr=3e-5, warmup_steps=5, freeze_vision=True, max_prompt_len=2048)
TOY |= dict(micro_tokens=16384, activation_checkpointing=False, save_every=20, keep=2)
TOY |= dict(eval_temperature="1,0", eval_top_p=1.0, eval_max_len=384)

RECIPES = {
    "toy": TOY,
    "toy-long": TOY | dict(stages=[(384, 4, 120)], out="runs/toy/long"),
    "toy-zero": TOY
    | dict(stages=[(96, 16, 120)], out="runs/toy/zero", model="toy:base", format_weight=1.0)
    | dict(system_prompt=toy.ZERO_PROMPT),
    # App. A
    "vision-r1-7b": PAPER | dict(model=CI_7B, out="runs/vision-r1-7b"),  # 8 x 80 GB
    "vision-r1-32b": PAPER  # 32 x 80 GB
    | dict(model=CI_32B, out="runs/vision-r1-32b", stages=LARGER, vllm_tp=4),
    "vision-r1-72b": PAPER  # 64 x 80 GB
    | dict(model=CI_72B, out="runs/vision-r1-72b", stages=LARGER, vllm_tp=8)
    | dict(offload="all", micro_tokens=12288),
    # On one GPU, computed: 66 GiB of 79, and 20 of 24 with half of the sampler's rows.
    "vision-r1-7b-lora-1gpu": LORA
    | dict(model=CI_7B, out="runs/vision-r1-7b-lora", vllm_memory=0.65),
    "vision-r1-3b-lora-24gb": LORA
    | dict(model="runs/vision-r1-ci-3b/final", out="runs/vision-r1-3b-lora", vllm_memory=0.55)
    | dict(micro_tokens=12288, max_rows=512),
    # One GPU of 80 GB, all weights; computed: 70 GiB.
    "vision-r1-3b": PAPER
    | dict(model="runs/vision-r1-ci-3b/final", out="runs/vision-r1-3b", offload="reference")
    | dict(vllm_memory=0.35, max_rows=256),
    "vision-r1-long": PAPER
    | dict(model=CI_7B, out="runs/vision-r1-long", stages=[(16384, 4, 300)]),
    "vision-r1-zero": ZERO | dict(out="runs/vision-r1-zero", stages=[(4096, 16, 300)]),
    "zero-ptst": ZERO | dict(out="runs/zero-ptst"),
    "zero-sft-ptst": ZERO | dict(model="runs/zero-sft/final", out="runs/zero-sft-ptst"),
    # the neighbour, arXiv 2503.05132, RL straight on a base model. The values are of its script or
    # TRL's defaults; it goes twice through 15K problems of SAT
    "r1-zero-base": PAPER
    | dict(model="Qwen/Qwen2-VL-2B", out="runs/r1-zero-base", data="array/SAT")
    | dict(stages=[(700, 8, 3750)], questions=8, minibatches=1, max_pixels=401_408)
    | dict(system_prompt=asking.BASE_PROMPT, prefill=" Let me solve this step by step.\n<think>")
    | dict(format_weight=1.0, kl_coef=0.04, weight_decay=0.0, save_every=100),
}


# -------------------------------------------------------------------------------------------------
# the equations


def score(sample: Sample, format_weight: float = 0.0) -> reward.Score:
    """The hard formatting result reward: 1 when format AND answer are right, else 0 (Sec. 3.4).

    An answer that was cut at the limit is never closed, hence 0. `format_weight` 1 is Zero's.
    """
    record, cut = sample.prompt.record, sample.finish == "length"
    return reward.score(sample.text, record.answer, record.choices, cut, format_weight)


def group_advantages(rewards: torch.Tensor, std_norm: bool = True) -> torch.Tensor:
    """A_i = (r_i - mean) / std within each group (Eq. 1); rewards (Q, G) -> advantages (Q, G).

    The std is the unbiased one, as in EasyR1. A group of equal rewards gets zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if std_norm else centred


def k3(logprobs, ref_logprobs):
    """pi_ref / pi - log(pi_ref / pi) - 1 per token: an estimate of KL(pi || pi_ref) without bias
    that is never negative (Eq. 1)."""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def set_token_weights(groups: list[list[Sample]], max_len: int, config: Config):
    """The means of Eq. 1 over the samples of all ranks (a collective), as a weight of each token.

    With these weights the loss is a plain sum and does not depend on how tokens are batched.
    """
    counted = [g for g in groups if not (config.drop_zero_var and zero_variance(g))]
    samples = list(chain(*counted))
    local = {"sequences": len(samples), "tokens": sum(s.length for s in samples)}
    total = run.all_sum(local)
    for sample in samples:
        if config.loss_mean == "sequence":
            sample.weight = 1 / (total["sequences"] * sample.length)
        elif config.loss_mean == "token":
            sample.weight = 1 / total["tokens"]
        else:
            sample.weight = 1 / (total["sequences"] * max_len)


def zero_variance(group: list[Sample]) -> bool:
    return len({sample.reward for sample in group}) == 1


def policy_loss(logprobs: torch.Tensor, batch: packing.Batch, config: Config):
    """Eq. 1 with its sign turned -> loss, clipped (N,): 1 where the clip acts.

    logprobs (N,) of pi, one per response token of the batch; its old_logprobs, ref_logprobs,
    advantages and weights have the same shape.
    """
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    ratio = (logprobs - old).exp()
    advantages = batch.advantages
    if config.tis:  # the sampler's pi differs a little from the trainer's
        advantages = advantages * (old - batch.logprobs).exp().clamp(max=config.tis)
    clipped = ratio.clamp(1 - config.clip_eps, 1 + (config.clip_eps_high or config.clip_eps))
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if batch.ref_logprobs is not None:
        objective = objective - config.kl_coef * k3(logprobs, batch.ref_logprobs)
    return -(batch.weights * objective).sum(), (clipped * advantages < ratio * advantages).float()


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then constant or a cosine. `step` is counted from 0."""
    rate = config.lr * min(1, (step + 1) / max(1, config.warmup_steps))
    done = step / ptst.total_steps(ptst.parse(config.stages))
    return rate if config.lr_decay == "constant" else rate * 0.5 * (1 + math.cos(math.pi * done))


# -------------------------------------------------------------------------------------------------
# questions and engine


def rollouts(engine, policy, questions, config, step, stage, numbers: range):
    """G answers, at most L tokens each, to this rank's share of these questions of a step."""
    engine.sync(policy)
    prompts = questions.prompts(step, numbers)
    seeds = [(config.seed, step, prompt.number) for prompt in prompts]
    how = (config.temperature, config.top_p)
    groups = engine.generate(prompts, stage.group_size, stage.max_len, seeds, *how)
    run.meet()  # one rank may sample much longer than the others
    return groups


def make_engine(config, policy, processor, stages, device):
    """What samples: sync(policy) hands it the weights, generate(prompts, ...) makes Samples."""
    if config.engine == "torch":
        return TorchEngine(model.replica(policy), processor, config.max_rows)
    from nano.vllm_engine import VLLMEngine

    longest = max(config.eval_max_len, *(stage.max_len for stage in stages))
    longest += config.max_prompt_len
    settings = dict(memory=config.vllm_memory, tp=config.vllm_tp, max_num_seqs=config.max_rows)
    return VLLMEngine(config.model, processor, longest, device, **settings)


def check(config: Config, world: int) -> list[ptst.Stage]:
    """What the flags must fulfil together -> the stages."""
    temperatures = config.eval_temperature.split(",")
    if not config.model:
        raise ValueError("say --model or --recipe; with neither, and without --data, the toy runs")
    if config.questions % (world * config.minibatches):
        raise ValueError(
            f"--questions {config.questions} must be a multiple of ranks x minibatches, "
            f"{world} x {config.minibatches}"
        )
    if config.engine == "vllm" and config.top_p < 1:
        raise ValueError("--top_p below 1: vLLM's logprobs would be of the cut distribution")
    if config.keep_best and not (config.eval_data or config.holdout):
        raise ValueError("--keep_best needs --eval_data or --holdout")
    if not all(word.strip().replace(".", "", 1).isdigit() for word in temperatures):
        raise ValueError(
            f"--eval_temperature {config.eval_temperature}: numbers with commas, as 0.6,0"
        )
    return ptst.parse(config.stages)


def check_schedule(before: dict, stages: list[ptst.Stage], start: int, config: Config):
    """Steps that were done must have had the limit and the group size that they have now."""
    earlier = before.get("stages", stages)
    if not ptst.agree(ptst.parse(earlier), stages, start):
        raise ValueError(
            f"{config.out} holds {start} steps of --stages {earlier}, not of {config.stages}; "
            "choose another --out, or --no_resume"
        )


def preflight(config, stages, questions, policy, reference, engine, optimizer, device):
    """Memory on paper, then one step at the greatest length: too little of it shows now."""
    longest_record = max(questions.records, key=lambda record: record.prompt_tokens)
    prompt = packing.encode(longest_record, questions.processor)
    longest = len(prompt.ids) + max(stage.max_len for stage in stages)
    samples = config.questions * max(stage.group_size for stage in stages) // dist.get_world_size()
    copies = max(1, min(config.micro_tokens // longest, samples))
    rest = config.micro_tokens - copies * longest  # a shorter sequence that fills the row
    lengths = [longest] * copies + [rest] * (rest > len(prompt.ids) and copies < samples)
    rows = min(config.max_rows, samples)
    more = dict(replica=config.engine == "torch", rows=rows, row_tokens=longest)
    if reference and not config.lora_rank:
        where = str(compute_dtype(device)).removeprefix("torch.")
        more["reference"] = "cpu" if config.offload != "none" else where
    tokens, patches = sum(lengths), len(lengths) * int(prompt.image_grid.prod(-1).sum())
    budget.announce_run(config, policy, device, run.say, tokens, patches, **more)
    if config.freeze_vision:
        model.encode_once(policy, [prompt], device)
    if config.engine == "torch":
        engine.reserve(rows, longest)
    end, before = questions.processor.eos_ids[:1], len(prompt.ids)
    batch = packing.pack([(copy.copy(prompt), end * (n - before)) for n in lengths], device)
    model.rehearse(policy, optimizer, batch, config.temperature, reference)


# -------------------------------------------------------------------------------------------------
# the run


class Stats:
    """The numbers of a step's log line, each named once. Sums over tokens, then over ranks."""

    def __init__(self):
        names = ("entropy", "kl", "clip_frac", "logprob_gap", "logprob_gap_kl")
        self.per_token, self.trained = dict.fromkeys(names, 0.0), 0
        self.gap_max, self.norms = 0.0, []

    def add(self, batch: packing.Batch, logprobs, entropy, clipped):
        """One micro-batch of the update: logprobs, entropy, clipped (N,)."""
        trainer = logprobs if batch.old_logprobs is None else batch.old_logprobs
        gap = (trainer - batch.logprobs).abs()  # between trainer and sampler
        gap_kl = k3(batch.logprobs, trainer)  # KL(sampler || trainer)
        kl = k3(logprobs, batch.ref_logprobs) if batch.ref_logprobs is not None else 0 * logprobs
        parts = (entropy, kl, clipped, gap, gap_kl)
        for name, values in zip(self.per_token, parts, strict=True):
            self.per_token[name] += values.sum().item()
        self.trained += len(logprobs)
        self.gap_max = max(self.gap_max, gap.max().item() if len(gap) else 0.0)

    def row(self, groups: list[list[Sample]]) -> dict:
        """The log line's entries, over the samples and tokens of all ranks (a collective)."""
        samples = list(chain(*groups))
        right = [s for s in samples if s.score.correct and s.score.format_ok]
        per_sample = dict(
            reward=sum(s.reward for s in samples),
            format_rate=sum(s.score.format_ok for s in samples),
            accuracy=len(right),
            len_mean=sum(s.length for s in samples),
            truncated=sum(s.finish == "length" for s in samples),
        )
        counts = dict(
            samples=len(samples),
            trained=self.trained,
            length_right=sum(s.length for s in right),
            zero_var_groups=sum(zero_variance(group) for group in groups),
            reward_faults=reward.stats()["crashes"],
        )
        s = run.all_sum(per_sample | self.per_token | counts)
        length, right, wrong = s["len_mean"], s["accuracy"], s["samples"] - s["accuracy"]
        row = {name: s[name] / s["samples"] for name in per_sample}
        row |= {name: s[name] / s["trained"] for name in self.per_token}
        return row | dict(
            len_correct=s["length_right"] / right if right else math.nan,
            len_wrong=(length - s["length_right"]) / wrong if wrong else math.nan,
            grad_norm=sum(self.norms) / len(self.norms),
            refused_updates=sum(map(math.isnan, self.norms)),
            logprob_gap_max=run.all_max(self.gap_max),
            tokens=int(length),
            zero_var_groups=int(s["zero_var_groups"]),
            reward_faults=int(s["reward_faults"]),
        )


LINE = (
    "step {step:4d}/{total}  {max_len}x{group_size}  reward {reward:.3f}  acc {accuracy:.3f}  "
    "format {format_rate:.2f}  len {len_mean:6.1f}  cut {truncated:.2f}  kl {kl:.4f}  "
    "entropy {entropy:.3f}  {t_total:.2f} s"
)


def load_models(config: Config, device):
    """-> the policy, its frozen start as the reference (None without a KL term), the optimizer."""
    knobs = dict(adapters=(config.lora_rank, config.lora_alpha, config.lora_vision))
    knobs |= dict(
        activation_checkpointing=config.activation_checkpointing * config.checkpoint_share
    )
    knobs |= dict(freeze_vision=config.freeze_vision, offload=config.offload == "all")
    shards = dict(shard_size=config.shard_size)
    policy = model.load_sharded(config.model, device, compile=config.compile, **shards, **knobs)
    reference = None
    if config.kl_coef and config.lora_rank:
        reference = lora.without(policy)
    elif config.kl_coef:
        # In bf16 on a GPU, since its matrix products round to it anyway.
        away = config.offload != "none"
        knobs = dict(freeze_vision=True, offload=away) | shards
        reference = model.load_sharded(config.model, device, compute_dtype(device), **knobs)
        reference.requires_grad_(False).eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    fused = device.type == "cuda" or config.offload == "all"  # on a CPU ten times as fast, too
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=fused)
    return policy, reference, optimizer


def main(config: Config):
    # ---- settings
    device = run.start_ranks()
    config.micro_tokens = micro_tokens(config, device)
    rank, world = dist.get_rank(), dist.get_world_size()
    with run.for_people():
        stages = check(config, world)
    total, config.stages = ptst.total_steps(stages), ptst.format_stages(stages)
    out = Path(config.out or run.default_out("grpo", config.model, config.data))
    config.out = str(out)
    toy.resolve(config)
    config.freeze_vision = not config.lora_vision if config.lora_rank else config.freeze_vision
    before = run.claim(config, HOW_ONLY)

    # ---- data and models
    with run.for_people():
        run.find_model(config.model)
        processor = packing.Processor(config.model, **asking.settings(config))
        records, held = load_questions(config, processor)
    policy, reference, optimizer = load_models(config, device)
    width = policy.hf.config.get_text_config().hidden_size
    engine = make_engine(config, policy, processor, stages, device)
    see = partial(model.encode_once, policy, device=device) if config.freeze_vision else None
    questions = Questions(records, processor, config, see)
    if config.preflight:
        preflight(config, stages, questions, policy, reference, engine, optimizer, device)

    # ---- where an earlier try stopped
    start = checkpoint.load(out, policy, optimizer)
    with run.for_people():
        check_schedule(before, stages, start, config)
    log = run.Log(out, config, start or -1)  # the validation before step 1 is step 0
    resumed = f"; resumed after step {start}" if start else ""
    run.say(f"recipe {config.recipe or 'none'}: {len(records)} questions, stages {config.stages}")
    run.say(f"{world} rank(s) on {device.type}; out {out}{resumed}\n{processor}")
    run.say(ptst.budget_note(stages))
    encode = partial(packing.encode, processor=processor)
    health = Health(out, total, config.questions)
    exam = partial(validate, engine, policy, encode, held, config, stages)
    if held and not start:
        log.write(dict(step=0, **exam(0)))

    for step in tqdm(range(start, total), initial=start, total=total, disable=rank > 0 or None):
        stage_number, stage = ptst.stage_at(stages, step)  # Eq. 2: L and G of this step
        timer = run.Timer("rollout", "reward", "logprob", "update", "eval")
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)

        # 1. Questions, each rank its share, and 2. rollouts: G answers to each, at most L tokens.
        with timer("rollout"):
            ask = partial(rollouts, engine, policy, questions, config, step, stage)
            groups, used, drawn = rounds(ask, score, config)

        # 3. Rewards: format AND answer (Sec. 3.4). Reshape sample.reward here: all below sees it.
        with timer("reward"):
            for sample in chain(*groups):
                sample.score = score(sample, config.format_weight)
                sample.reward = sample.score.reward

        # 4. Advantages within each group (Eq. 1).
        rewards = torch.tensor([sample.reward for sample in chain(*groups)])
        rewards = rewards.view(-1, stage.group_size)  # (Q, G); a rank may have Q = 0
        advantages = group_advantages(rewards, config.std_norm)  # (Q, G)
        for sample, advantage in zip(chain(*groups), advantages.flatten().tolist()):
            sample.advantage = advantage

        # 5. Pack: whole groups change ranks until each rank has nearly the same work.
        minibatches, size = [], config.questions // config.minibatches
        for first in range(0, config.questions, size):
            part = [g for g in groups if g[0].prompt.number in used[first : first + size]]
            set_token_weights(part, stage.max_len, config)
            part = packing.balance(part, width, partial(questions.prompt, step))
            samples = list(chain(*part))
            minibatches.append(packing.batches(samples, config.micro_tokens, width, processor))

        # 6. Log-probabilities of the reference, and of pi_old where pi moves before they are used.
        with timer("logprob"), torch.no_grad():
            for number, batches in enumerate(minibatches):
                needs_old = number > 0 or config.epochs > 1
                for batch in batches:
                    here = batch.to(device)  # one micro-batch at a time
                    if reference:
                        batch.ref_logprobs, _ = reference(here, config.temperature)
                    if needs_old:
                        batch.old_logprobs, _ = policy(here, config.temperature)

        # 7. Update (Eq. 1): all of the objective is in policy_loss.
        stats = Stats()
        with timer("update"):
            for batches in minibatches * config.epochs:
                loss_sum = 0.0
                for batch in (waiting.to(device) for waiting in batches):
                    logprobs, entropy = policy(batch, config.temperature)
                    loss, clipped = policy_loss(logprobs, batch, config)
                    (loss * world).backward()  # FSDP takes the mean over ranks
                    loss_sum += loss.item()
                    stats.add(batch, logprobs.detach(), entropy, clipped)
                stats.norms.append(model.update(policy, optimizer, config.max_grad_norm, loss_sum))

        # 8. What happened, and now and then what the held-out problems say.
        row = dict(step=step + 1, stage=stage_number, lr=learning_rate(step, config))
        row |= dict(max_len=stage.max_len, group_size=stage.group_size) | stats.row(groups) | drawn
        look = (step + 1) % config.eval_every == 0 or step + 1 == total
        if look and held:
            with timer("eval"):
                row |= exam(step + 1)
        row |= timer.row() | dict(mem_peak=run.peak_memory())
        row["tokens_per_s"] = row["tokens"] / row["t_total"]
        log.write(row)
        shown = list(chain(*groups[: config.sample_questions]))
        at = dict(step=step + 1, max_len=stage.max_len)
        log.write_samples([at | sample.row() for sample in shown])
        if look:
            log.show(shown, step + 1)
        run.say("\n".join([LINE.format(total=total, **row), *health.see(row)]))
        checkpoint.end_step(config, step + 1, total, policy, optimizer)

    model.export(policy, processor, out / "final")
    ended = "nothing left to do" if start == total else "done"
    run.say(f"{ended}: the model is in {out / 'final'}; curves: python -m tools.plot {out}")
    engine.close()


if __name__ == "__main__":
    run.guard(main, run.parse_config(Config, RECIPES))
