"""Stage 2 of Vision-R1: GRPO with the hard formatting result reward, under Progressive Thinking Suppression Training.

  python grpo.py                                              the toy, on the spot (makes what it needs first)
  torchrun --nproc_per_node 8 grpo.py --recipe vision-r1-7b --data Vision-R1-rl
  torchrun --nproc_per_node 2 grpo.py --model DIR --data FILE --stages 64x4x2,128x2x2

Sec. 3.4 of the paper, in the order in which it runs: questions -> rollouts -> rewards -> advantages -> log-probabilities
of the reference -> the clipped loss with its KL term (Eq. 1) -> a step; the length limit and the group size follow the
stage list (Eq. 2). A run that was stopped goes on where it stopped.
"""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import model
import ptst
import reward
from nano import budget, data, packing, run
from nano.rollout import check_engine, judge, make_engine


@dataclass
class Config:
    # what to run
    recipe: str = "toy"
    out: str = ""  # folder of the run; "" = named after model and data
    model: str = ""  # where RL starts: a Hugging Face folder or hub name; toy:NAME = the toy's, made if missing
    data: str = ""  # problems, any format of data.py, or toy:NAME
    strict: bool = False  # stop at the first bad record instead of reporting it
    seed: int = 0
    # PTST, Eq. 2
    stages: str = "96x16x60,192x8x60"  # (max_len, group_size, steps), e.g. 4Kx16x100,8Kx8x100
    questions: int = 8  # questions per step, over all ranks
    minibatches: int = 1  # parts of a rollout batch, an optimizer step each
    epochs: int = 1  # times that a rollout batch is gone through; with several steps a batch, pi_old of Eq. 1 is computed first
    # rollouts
    engine: str = "torch"  # torch: rollout.py; vllm: one vLLM per rank, in this process; http: servers of vllm_engine.py
    url: str = ""  # of the servers, separated by commas
    vllm_memory: float = 0.5  # share of a GPU that vLLM may take while it samples
    vllm_tp: int = 1  # neighbouring ranks that share one vLLM (tensor parallel)
    max_num_seqs: int = 256  # sequences that one vLLM decodes at a time
    async_steps: int = (
        0  # 1 = the next batch is sampled, with the last weights, while this one trains
    )
    temperature: float = 1.0
    top_p: float = 1.0
    max_rows: int = 256  # sequences that one rank decodes at a time
    max_prompt_len: int = 2048  # a longer prompt is reported and left out, never cut
    system_prompt: str = ""  # the paper: none after the cold start; Zero has one
    # reward
    format_weight: float = (
        0.0  # 0 = HFRRF, all or nothing (Sec. 3.4); 1 = Zero's format + result, weights 1:1
    )
    # the loss, Eq. 1
    clip_eps: float = 0.2
    clip_eps_high: float = 0.0  # 0 = clip_eps; larger = clip-higher
    tis: float = 0.0  # truncated importance sampling: a token counts min(pi_trainer / pi_rollout, tis). 0 = the paper: off
    kl_coef: float = 1e-2  # beta. 0 = no reference model is loaded
    std_norm: bool = True  # divide advantages by the group's std; off = Dr. GRPO
    loss_mean: str = (
        "sequence"  # mean over tokens, then over samples; token: over all tokens; fixed: / max_len
    )
    drop_zero_var: bool = False  # leave groups without an advantage out of the means
    # optimization
    lr: float = 3e-5
    warmup_steps: int = 5
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    micro_tokens: int = 16384  # tokens of a packed micro-batch on one rank
    freeze_vision: bool = False  # then each image is encoded once a step
    # memory and speed, for real models
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks
    offload: str = "none"  # to the CPU: none, reference, all (weights, gradients and optimizer too)
    shard_size: int = (
        0  # ranks that share one copy of the weights, e.g. those of a node (HSDP); 0 = all ranks
    )
    preflight: bool = (
        True  # first print what the memory will hold, and try a step at the greatest length
    )
    # the run
    save_every: int = 20  # steps; the last one is always saved
    keep: int = 2  # checkpoints
    resume: bool = True  # --no_resume starts over
    sample_questions: int = 1  # questions a step whose rollouts go to samples.jsonl
    wandb: bool = False
    tensorboard: bool = False


# what makes a run that run: a folder of other values of these is not gone on with
METHOD = (
    "model",
    "data",
    "seed",
    "questions",
    "minibatches",
    "epochs",
    "temperature",
    "top_p",
    "system_prompt",
    "format_weight",
    "clip_eps",
    "clip_eps_high",
    "tis",
    "kl_coef",
    "std_norm",
    "loss_mean",
    "drop_zero_var",
    "lr",
    "weight_decay",
    "max_grad_norm",
    "freeze_vision",
    "async_steps",
)

SYSTEM_PROMPT = (  # ours, in the manner of R1-Zero's
    "Answer the user's question about the image. First think it through step by step inside <think> </think>, then give "
    "the final answer inside <answer> </answer>, that is: <think> reasoning here </think><answer> answer here </answer>."
)
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
# the paper's: eps, beta, stages, no system prompt. EasyR1's, where the paper is silent: lr, batch, temperature, decay, clip
PAPER = dict(
    questions=512,
    minibatches=4,
    lr=1e-6,
    warmup_steps=0,
    max_prompt_len=4096,
    micro_tokens=20480,
    activation_checkpointing=True,
    save_every=5,
    keep=20,
    data="Osilly/Vision-R1-rl",
)
ZERO = PAPER | dict(model=QWEN, system_prompt=SYSTEM_PROMPT, format_weight=1.0)
TOY = dict(model="toy:ci", data="toy:rl-problems", freeze_vision=True)

RECIPES = {
    "toy": TOY,
    "toy-long": TOY | dict(stages=[(384, 4, 120)], out="runs/toy/long"),
    "toy-zero": TOY
    | dict(
        stages=[(96, 16, 120)],
        out="runs/toy/zero",
        model="toy:base",
        format_weight=1.0,
        system_prompt="Think first , then answer in tags .",
    ),  # the words that the toy's base was taught
    # App. A
    "vision-r1-7b": PAPER
    | dict(
        model="runs/vision-r1-ci-7b/final",
        out="runs/vision-r1-7b",
        stages=[(4096, 16, 100), (8192, 8, 100)],
    ),
    "vision-r1-long": PAPER
    | dict(model="runs/vision-r1-ci-7b/final", out="runs/vision-r1-long", stages=[(16384, 4, 300)]),
    "vision-r1-zero": ZERO | dict(out="runs/vision-r1-zero", stages=[(4096, 16, 300)]),
    "zero-ptst": ZERO | dict(out="runs/zero-ptst", stages=[(4096, 16, 100), (8192, 8, 100)]),
    "zero-sft-ptst": ZERO
    | dict(
        model="runs/zero-sft/final",
        out="runs/zero-sft-ptst",
        stages=[(4096, 16, 100), (8192, 8, 100)],
    ),
    # 32B and 72B go on with about 20K more problems in the setting of stage 2
    "vision-r1-32b": PAPER
    | dict(
        model="runs/vision-r1-ci-32b/final",
        out="runs/vision-r1-32b",
        stages=[(4096, 16, 100), (8192, 8, 200)],
    ),
    "vision-r1-72b": PAPER
    | dict(
        model="runs/vision-r1-ci-72b/final",
        out="runs/vision-r1-72b",
        stages=[(4096, 16, 100), (8192, 8, 200)],
    ),
    # the neighbour, arXiv 2503.05132: RL straight on a base model; `data` = your SAT file
    "r1-zero-base": ZERO
    | dict(model="Qwen/Qwen2-VL-2B", out="runs/r1-zero-base", data="SAT", stages=[(2048, 8, 300)]),
}


# -----------------------------------------------------------------------------------------------------------------
# the equations


def group_advantages(rewards, std_norm=True):
    """(questions, G) rewards -> advantages of the same shape, A_i = (r_i - mean) / std within each group (Eq. 1).

    the std is the unbiased one (EasyR1's); a group whose rewards are all the same gets zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if std_norm else centred


def k3(logprobs, ref_logprobs):
    """pi_ref / pi - log(pi_ref / pi) - 1 per token: unbiased for KL(pi || pi_ref) and never negative (Eq. 1)"""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, config):
    """Eq. 1 with its sign turned, all inputs (N,): one entry per sampled token -> (loss, clipped share of each token).

    `weights` hold the means of Eq. 1, so that the loss is a plain sum and does not depend on how tokens are batched.
    """
    ratio = (logprobs - old_logprobs).exp()
    high = config.clip_eps_high or config.clip_eps
    clipped = ratio.clamp(1 - config.clip_eps, 1 + high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if ref_logprobs is not None:
        objective = objective - config.kl_coef * k3(logprobs, ref_logprobs)
    return -(weights * objective).sum(), (clipped * advantages < ratio * advantages).float()


def token_weights(lengths, counted, max_len, loss_mean):
    """the weight of a token in each sequence: the mean of Eq. 1 over all ranks. lengths, counted: (S,), counted 0 or 1"""
    total = run.all_sum(
        {"sequences": counted.sum().item(), "tokens": (counted * lengths).sum().item()}
    )
    sequences, tokens = max(total["sequences"], 1), max(total["tokens"], 1)
    if loss_mean == "sequence":
        return counted / (sequences * lengths)
    return counted / (tokens if loss_mean == "token" else sequences * max_len)


# -----------------------------------------------------------------------------------------------------------------
# the run


def question_order(n, seed):
    """question numbers without end: every epoch in an order of its own that follows from the seed"""
    epoch = 0
    while True:
        yield from torch.randperm(
            n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)
        ).tolist()
        epoch += 1


class Sample(NamedTuple):
    """a rollout as the update needs it"""

    ids: list[int]
    logprobs: list[float]  # the engine's
    advantage: float
    weight: float  # of each of its tokens in the means of Eq. 1


def make_batches(pairs, budget, width, processor, device):
    """[(Prompt, Sample)] -> (samples, Batch) of each packed micro-batch; an empty one still takes part"""
    for part in packing.micro_batches([len(p.ids) + len(s.ids) for p, s in pairs], budget, width):
        chosen = [(p, s.ids) for p, s in pairs[part]] or [packing.blank(processor)]
        yield [s for _, s in pairs[part]], packing.pack(chosen, device)


def preflight(
    config, stages, records, policy, reference, engine, optimizer, processor, device, say
):
    """memory on paper, then one step at the greatest length: too little of it shows now, with the knob to turn"""
    prompt = packing.encode(
        max(records, key=lambda r: r.prompt_tokens), processor, config.system_prompt
    )
    longest = len(prompt.ids) + max(s.max_len for s in stages)
    rollouts = config.questions * max(s.group_size for s in stages) // dist.get_world_size()
    fits = max(1, min(config.micro_tokens // longest, rollouts))
    cuda = device.type == "cuda"
    stored = (
        {"none": "bfloat16" if cuda else "float32"}.get(config.offload, "cpu") if reference else ""
    )
    items = budget.memory(
        budget.shape(policy.hf.config),
        fits * longest,
        fits * int(prompt.image_grid.prod(-1).sum()),
        cuda=cuda,
        world=dist.get_world_size(),
        shard_size=config.shard_size or None,
        frozen_vision=config.freeze_vision,
        activation_checkpointing=config.activation_checkpointing,
        reference=stored,
        offload=config.offload == "all",
        replica=config.engine == "torch",
        rows=min(config.max_rows, rollouts),
        row_tokens=longest,
        vllm_bytes=config.vllm_memory * torch.cuda.get_device_properties(device).total_memory
        if cuda and config.engine == "vllm"
        else 0,
    )
    budget.announce(items, device, say)
    if config.freeze_vision:
        model.encode_once(policy, [prompt], device)
    if config.engine == "torch":
        engine.reserve(min(config.max_rows, rollouts), longest)
    answer = [processor.eos_ids[0]] * (longest - len(prompt.ids))
    model.rehearse(
        policy,
        optimizer,
        packing.pack([(copy.copy(prompt), answer) for _ in range(fits)], device),
        config.temperature,
        reference,
    )


def main(config):
    device = run.start_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    config.out = config.out or run.default_out("grpo", config.model, config.data)
    borrowed = config.recipe == "toy" and not config.model.startswith("toy:")
    out = Path(config.out)
    if "toy:" in config.model + config.data:
        import toy

        run.on_main_first(lambda: (toy.find(config.model), toy.find(config.data)))
        config.model, config.data = toy.find(config.model), toy.find(config.data)
    before = run.claim(config, METHOD)
    with run.for_people():
        stages = ptst.parse(config.stages)
    config.stages = ptst.format_stages(stages)
    total = ptst.total_steps(stages)
    say = tqdm.write if rank == 0 else lambda *_: None
    if config.questions % (world * config.minibatches):
        raise SystemExit(
            f"--questions {config.questions} must be a multiple of ranks x minibatches, {world} x {config.minibatches}"
        )
    several = config.minibatches * config.epochs > 1  # then pi moves on while pi_old stays
    for name, values in dict(
        loss_mean=("sequence", "token", "fixed"), offload=("none", "reference", "all")
    ).items():
        if getattr(config, name) not in values:
            raise SystemExit(f"--{name} {getattr(config, name)!r}: one of {', '.join(values)}")
    check_engine(config)

    # the questions
    processor = model.Processor(config.model)
    with run.for_people():
        records, problems = data.read(config.data, strict=config.strict)
        records = packing.usable(
            records, processor, config.max_prompt_len, problems, config.system_prompt
        )
    if problems:
        say(problems.summary())
    if not records:
        raise SystemExit(f"{config.data}: no usable problem in it")

    # the policy, its frozen start as the reference, and a whole replica to sample from
    policy = model.load_sharded(
        config.model,
        device,
        freeze_vision=config.freeze_vision,
        offload=config.offload == "all",
        shard_size=config.shard_size,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
    )
    reference = None
    if config.kl_coef:  # in bf16 on a GPU: its matmuls round to it anyway
        low = torch.bfloat16 if device.type == "cuda" else torch.float32
        away = config.offload != "none"
        reference = model.load_sharded(
            config.model,
            device,
            low,
            freeze_vision=True,
            offload=away,
            shard_size=config.shard_size,
        )
        reference.requires_grad_(False).eval()
    width = policy.hf.config.get_text_config().hidden_size
    engine = make_engine(config, policy, processor, max(s.max_len for s in stages), device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)

    if config.preflight:
        preflight(
            config, stages, records, policy, reference, engine, optimizer, processor, device, say
        )
    start, progress = run.load_checkpoint(out, policy, optimizer)
    if not ptst.agree(ptst.parse(before.get("stages", stages)), stages, start):
        raise SystemExit(
            f"{out} holds {start} steps of --stages {before['stages']}, not of {config.stages}; choose another --out, or --no_resume"
        )
    log = run.Log(out, config, start, config.wandb, config.tensorboard)
    resumed = f"; resumed after step {start}" if start else ""
    say(
        f"recipe {config.recipe}: {len(records)} questions, {config.questions} a step; stages {config.stages}"
    )
    say(f"{world} rank(s) on {device.type}; out {out}{resumed}")
    if borrowed:
        say(
            f"note: these are the toy's settings (lr {config.lr}, frozen vision tower): a real model wants another --recipe"
        )
    if note := ptst.budget_note(stages):
        say(note)
    order = question_order(len(records), config.seed)
    for _ in range(progress["cursor"] if progress else 0):
        next(order)
    mine = range(
        rank, config.questions, world
    )  # of each step's questions, those that this rank asks
    judges = ThreadPoolExecutor(4)
    bar = tqdm(total=total, initial=start, leave=False, disable=None if rank == 0 else True)

    def encode(numbers, asked):
        """{number of a question in its step: Prompt}, images included"""
        prompts = {
            q: packing.encode(records[asked[q]], processor, config.system_prompt) for q in numbers
        }
        if config.freeze_vision:
            model.encode_once(policy, prompts.values(), device)
        return prompts

    def ask(step, answers=None):
        """this rank's questions of a step and G answers to each, at most L tokens long (Eq. 2), or those of a checkpoint;
        each answer is judged while others are still sampled -> record numbers, prompts, answers, verdicts"""
        max_len, group_size, _ = ptst.stage_at(stages, step)[1]
        asked = [next(order) for _ in range(config.questions)]
        prompts = encode(mine, asked)
        verdicts = {}
        submit = lambda p, r: judges.submit(
            judge, records[asked[mine[p]]], r, processor, config.format_weight
        )
        done = lambda p, s, r: verdicts.update({(p, s): submit(p, r)})
        if answers is None:
            seeds = [(config.seed, step, q) for q in mine]
            answers = engine.generate(
                [*prompts.values()],
                group_size,
                max_len,
                seeds,
                config.temperature,
                config.top_p,
                done,
            )
        else:
            [done(p, s, r) for p, group in enumerate(answers) for s, r in enumerate(group)]
        return asked, prompts, answers, verdicts

    # with --async_steps 1: a thread that samples the next batch; what it has in hand at a checkpoint is saved there
    sampler = ThreadPoolExecutor(
        1, initializer=lambda: device.type == "cuda" and torch.cuda.set_device(device)
    )
    ahead = None
    if progress and progress.get("ahead") and progress["ranks"] == world:
        ahead = sampler.submit(ask, start, progress["ahead"])

    for step in range(start, total):  # counted from 0 here, from 1 in the log
        began = time.perf_counter()
        stage_number, stage = ptst.stage_at(stages, step)
        max_len, group_size, _ = stage
        bar.set_description(f"stage {stage_number + 1}: {max_len} x {group_size}")
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup_steps))

        # 1. questions, every rank its share, and 2. rollouts: G answers to each
        t_rollout = time.perf_counter()
        if ahead is None:
            engine.sync(policy)
        asked, prompts, answers, verdicts = ahead.result() if ahead else ask(step)
        ahead = None
        if config.async_steps and step + 1 < total:
            engine.sync(policy)
            ahead = sampler.submit(ask, step + 1)
        rollouts = [r for group in answers for r in group]
        t_rollout = time.perf_counter() - t_rollout

        # 3. rewards: format AND answer (Sec. 3.4)
        t_reward = time.perf_counter()
        text, scores = zip(
            *(verdicts[p, s].result() for p in range(len(mine)) for s in range(group_size))
        )
        rewards = torch.tensor([s.reward for s in scores]).view(
            -1, group_size
        )  # (questions of this rank, G)
        t_reward = time.perf_counter() - t_reward

        # 4. advantages within each group (Eq. 1)
        advantages = group_advantages(rewards, config.std_norm).flatten()  # (sequences,)
        flat = (rewards == rewards[:, :1]).all(1)
        counted = ~flat if config.drop_zero_var else torch.ones_like(flat)
        counted = counted.repeat_interleave(group_size).float()  # (sequences,)
        lengths = torch.tensor([float(len(r.ids)) for r in rollouts])

        # 5. balance: each optimizer step's groups change ranks, whole, until every rank has nearly the same work
        parts = []
        for first in range(0, len(mine), len(mine) // config.minibatches):
            here = range(first, first + len(mine) // config.minibatches)
            span = slice(here.start * group_size, here.stop * group_size)
            weights = token_weights(lengths[span], counted[span], max_len, config.loss_mean)
            samples = [
                Sample(r.ids, r.logprobs, a, w)
                for r, a, w in zip(rollouts[span], advantages[span].tolist(), weights.tolist())
            ]
            groups = {mine[i]: samples[(i - first) * group_size :][:group_size] for i in here}
            costs = {
                q: sum(packing.work(len(prompts[q].ids) + len(s.ids), width) for s in groups[q])
                for q in groups
            }
            parts.append(packing.exchange(groups, costs))
            prompts |= encode([q for q in parts[-1] if q not in prompts], asked)

        # 6. log-probabilities of the reference, and of pi_old where pi will have moved on before they are used
        t_logprob = time.perf_counter()
        updates = []
        for groups in parts:
            pairs = [(prompts[q], s) for q in sorted(groups) for s in groups[q]]
            batches = []
            for samples, batch in make_batches(
                pairs, config.micro_tokens, width, processor, device
            ):
                with torch.no_grad():
                    ref = reference(batch, config.temperature)[0] if reference else None
                    old = (
                        policy(batch, config.temperature)[0]
                        if several and not config.async_steps
                        else None
                    )
                of_each = lambda values: torch.tensor(values, device=device)[
                    batch.rows
                ]  # (samples,) -> (N,)
                sampled = torch.tensor([x for s in samples for x in s.logprobs], device=device)
                if config.async_steps:
                    old = sampled  # pi_old is the policy that sampled: one step behind
                batches.append(
                    (
                        batch,
                        ref,
                        old,
                        of_each([s.advantage for s in samples]),
                        of_each([s.weight for s in samples]),
                        sampled,
                    )
                )
            updates.append(batches)
        t_logprob = time.perf_counter() - t_logprob

        # 7. update: the clipped loss with the k3 penalty (Eq. 1)
        t_update = time.perf_counter()
        sums = dict(tokens=0, entropy=0, kl=0, clip=0, gap=0, gap_kl=0)
        gap_max, grad_norm = 0.0, 0.0
        for batches in updates * config.epochs:
            for batch, ref, old, advantage, weight, sampled in batches:
                logprobs, entropy = policy(batch, config.temperature)
                now = logprobs.detach()
                apart = (
                    now if old is None or config.async_steps else old
                ) - sampled  # trainer against rollout
                if config.tis:
                    advantage = advantage * apart.exp().clamp(max=config.tis)
                loss, clipped = policy_loss(
                    logprobs, now if old is None else old, ref, advantage, weight, config
                )
                (
                    loss * world
                ).backward()  # FSDP takes the mean over ranks; the weights already hold it
                sums["tokens"] += len(now)
                sums["entropy"] += entropy.sum().item()
                sums["kl"] += k3(now, ref).sum().item() if ref is not None else 0
                sums["clip"] += clipped.sum().item()
                sums["gap"] += apart.abs().sum().item()
                sums["gap_kl"] += (
                    k3(sampled, sampled + apart).sum().item()
                )  # KL(rollout || trainer)
                gap_max = max(gap_max, apart.abs().max().item() if len(apart) else 0)
            grad_norm += model.full(
                torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            ).item()
            optimizer.step()
            optimizer.zero_grad()
        t_update = time.perf_counter() - t_update

        # 8. what happened, summed over ranks
        right = torch.tensor([float(s.correct and s.format_ok) for s in scores])
        cut = torch.tensor([float(r.finish == "length") for r in rollouts])
        sums |= dict(
            n=len(rollouts),
            reward=rewards.sum().item(),
            right=right.sum().item(),
            length=lengths.sum().item(),
            format=sum(s.format_ok for s in scores),
            cut=cut.sum().item(),
            length_right=(lengths * right).sum().item(),
            flat=flat.sum().item(),
            faults=reward.stats()["timeouts"] + reward.stats()["crashes"],
        )
        s = run.all_sum(sums)
        n, nan = s["n"], float("nan")
        t_total = time.perf_counter() - began
        log.write(
            dict(
                step=step + 1,
                stage=stage_number,
                max_len=max_len,
                group_size=group_size,
                reward=s["reward"] / n,
                format_rate=s["format"] / n,
                accuracy=s["right"] / n,
                len_mean=s["length"] / n,
                len_correct=s["length_right"] / s["right"] if s["right"] else nan,
                len_wrong=(s["length"] - s["length_right"]) / (n - s["right"])
                if s["right"] < n
                else nan,
                truncated=s["cut"] / n,
                entropy=s["entropy"] / s["tokens"],
                kl=s["kl"] / s["tokens"],
                clip_frac=s["clip"] / s["tokens"],
                grad_norm=grad_norm / (config.minibatches * config.epochs),
                lr=optimizer.param_groups[0]["lr"],
                tokens=int(s["length"]),
                zero_var_groups=int(s["flat"]),
                reward_faults=int(s["faults"]),
                logprob_gap=s["gap"] / s["tokens"],
                logprob_gap_max=run.all_max(gap_max),
                logprob_gap_kl=s["gap_kl"] / s["tokens"],
                t_rollout=t_rollout,
                t_reward=t_reward,
                t_logprob=t_logprob,
                t_update=t_update,
                t_total=t_total,
                mem_peak=run.peak_memory(),
            )
        )
        records_of = [records[asked[q]] for q in mine for _ in range(group_size)]
        shown = list(zip(records_of, text, scores, advantages.tolist(), rollouts))[
            : config.sample_questions * group_size
        ]
        log.write_samples(
            [
                dict(
                    step=step + 1,
                    max_len=max_len,
                    id=a.id,
                    source=a.source,
                    problem=a.problem,
                    answer=a.answer,
                    choices=a.choices,
                    completion=t,
                    reward=x.reward,
                    why=x.why,
                    advantage=round(v, 4),
                    length=len(r.ids),
                    finish=r.finish,
                )
                for a, t, x, v, r in shown
            ]
        )
        say(
            f"step {step + 1:4d}/{total}  {max_len}x{group_size}  reward {s['reward'] / n:.3f}  acc {s['right'] / n:.3f}  "
            f"format {s['format'] / n:.2f}  len {s['length'] / n:6.1f}  cut {s['cut'] / n:.2f}  kl {s['kl'] / s['tokens']:.4f}  "
            f"entropy {s['entropy'] / s['tokens']:.3f}  {t_total:.2f} s"
        )
        bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == total:
            cursor = (step + 1) * config.questions
            progress = dict(
                stage=stage_number,
                cursor=cursor,
                ahead=ahead.result()[2] if ahead else None,
                ranks=world,
            )
            run.save_checkpoint(out, step + 1, policy, optimizer, progress, config.keep)

    bar.close()
    model.export(policy, processor, out / "final")
    ended = "nothing left to do" if start == total else "done"
    say(f"{ended}: the model is in {out / 'final'}; curves: python ptst.py plot {out}")
    if config.engine == "vllm":
        engine.close()  # and the process groups with it
    else:
        dist.destroy_process_group()


if __name__ == "__main__":
    run.guard(main, run.parse_config(Config, RECIPES))
