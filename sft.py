"""Stage 1 of Vision-R1: cold-start initialization, that is supervised fine-tuning on chains of
thought. Its result is Vision-R1-CI.

  python sft.py                                          the toy, on the spot
  torchrun --nproc_per_node 8 sft.py --recipe vision-r1-ci-7b --data Vision-R1-cold
  torchrun --nproc_per_node 8 sft.py --recipe vision-r1-llamav-ci --data Vision-R1-cold

Sequences are packed without padding, the loss counts the response alone, and the learning rate
falls along a cosine. A run that was stopped goes on where it was, within an epoch too.
"""

import nano.settings  # noqa: F401, answers --help before torch is loaded

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig

import model
import toy
from nano import asking, budget, checkpoint, data, generic, hub, run
from nano.device import micro_tokens
from nano.steps import Steps, ahead, batches, encode, kind, shelve


@dataclass
class Config:
    """Defaults are the released configuration's where it has them; the toy overrides some."""

    # what to run
    recipe: str = "toy"
    out: str = ""  # folder of the run; "" is named after model and data
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # a folder or hub name; toy:NAME is the toy's
    data: str = "Osilly/Vision-R1-cold"  # records with a response, in any format of data.py
    eval_data: str = ""  # held-out records: their loss and accuracy are logged now and then
    holdout: int = 0  # without eval_data: so many records of `data` are held out for it
    split: str = "train"  # of a folder or a hub name that has several
    image_root: str = ""  # folders, with commas, where pictures are looked for besides the data's
    strict: bool = False  # stop at the first bad record instead of reporting it
    seed: int = 0
    # the task
    drop_chains: bool = False  # answers without chains, for Zero+SFT+PTST (Table 6)
    system_prompt: str = ""
    prefill: str = ""  # the prompt ends in it, and the response must begin with it
    min_pixels: int = 0  # a smaller picture is enlarged; 0 means as the checkpoint says
    max_pixels: int = 0  # a larger one is made smaller; 0 means as the checkpoint says
    cutoff: int = 16384  # tokens; a longer sequence is reported and left out (released config)
    # optimization
    epochs: int = 2  # Sec. 4.1
    batch_size: int = 32  # sequences per step over all ranks (released config: 8 GPUs x 1 x 4)
    lr: float = 5e-6  # learning rate (released config)
    warmup_ratio: float = 0.05  # released config
    beta2: float = 0.999  # Adam's; the released file leaves it at this default
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    freeze_vision: bool = False
    lora_rank: int = 0  # train adapters of this rank and nothing else; 0 is all weights
    lora_alpha: float = 32.0  # the adapters' part is scaled by alpha / rank
    lora_vision: bool = False  # adapters for the vision tower too; else it is frozen
    # memory and speed
    micro_tokens: int = 0  # of a packed micro-batch on one rank; 0: GPU 20480, CPU 2560
    workers: int = 2  # processes of each rank that prepare images ahead of time
    activation_checkpointing: bool = True
    checkpoint_share: float = 1.0  # of the blocks whose activations are computed again
    compile: bool = False  # torch.compile of the MLPs
    offload: bool = False  # weights, gradients and optimizer live in the CPU's memory
    shard_size: int = 0  # ranks that share one copy of the weights (HSDP); 0 means all ranks
    force: bool = False  # start although the memory on paper is more than the GPU has
    preflight: bool = True  # first show what memory will hold, and try a step at the cutoff
    # the run
    eval_every: int = 250  # steps; and after the last one
    save_every: int = 500  # steps; and after the last one
    keep: int = 1  # checkpoints
    resume: bool = True  # --no_resume starts over
    wandb: bool = False
    tensorboard: bool = False


# What only says how a run is computed. All else must be the same when a run is gone on with.
HOW_ONLY = (
    *("eval_data", "strict", "micro_tokens", "workers", "activation_checkpointing", "compile"),
    *("offload", "shard_size", "preflight", "eval_every", "save_every", "keep"),
    *("force", "wandb", "tensorboard", "image_root", "checkpoint_share"),
)

TOY = dict(model="toy:base", data="toy:cold", lr=2e-3, epochs=5, freeze_vision=True, cutoff=1024)
TOY |= dict(
    beta2=0.95, micro_tokens=4096, workers=0, activation_checkpointing=False, save_every=200
)
LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"  # Table 2's has no chat template; this one has

RECIPES = {
    "toy": TOY,
    # App. A: Vision-R1-CI in three sizes, and the answers-only start of Zero+SFT+PTST
    "vision-r1-ci-7b": dict(out="runs/vision-r1-ci-7b"),  # Sec. 4.1: all parameters
    # the released file: tower and projector are frozen, pictures have at most 768 x 768 pixels
    "vision-r1-ci-7b-released": dict(freeze_vision=True, max_pixels=768 * 768),
    "vision-r1-ci-3b": dict(model="Qwen/Qwen2.5-VL-3B-Instruct", out="runs/vision-r1-ci-3b"),
    "vision-r1-ci-32b": dict(model="Qwen/Qwen2.5-VL-32B-Instruct", out="runs/vision-r1-ci-32b"),
    "vision-r1-ci-72b": dict(model="Qwen/Qwen2.5-VL-72B-Instruct", out="runs/vision-r1-ci-72b")
    | dict(micro_tokens=16384),
    "zero-sft": dict(out="runs/zero-sft", drop_chains=True),
    "vision-r1-llamav-ci": dict(model=LLAMA, out="runs/vision-r1-llamav"),
}


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to 0. `step` is counted from 0."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    turn = (step - warmup) / max(1, total - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * turn))


def sft_loss(logprobs: torch.Tensor, tokens: int) -> torch.Tensor:
    """A micro-batch's part of the mean over the response tokens of all ranks; logprobs (N,)."""
    return -logprobs.sum() / max(tokens, 1)


@torch.no_grad()
def evaluate(steps: Steps, policy, device, told: set) -> dict:
    """Held-out records: mean loss of response tokens, share that the model finds likeliest.

    Every rank takes part (a collective).
    """
    loss = right = tokens = 0
    for sequences, problems in ahead(steps, 0, steps.config.workers):
        report(problems, told, steps.config.strict)
        for batch in batches(sequences, steps, device):
            logprobs, _, likeliest = policy(batch, judge=True)
            loss -= logprobs.sum().item()
            right += likeliest.sum().item()
            tokens += len(logprobs)
    total = run.all_sum(dict(loss=loss, right=right, tokens=tokens))
    tokens = max(1, total["tokens"])
    return {"eval_loss": total["loss"] / tokens, "eval_accuracy": total["right"] / tokens}


def report(problems: data.Problems, told: set, strict: bool):
    """The rank that met a problem says it once, not in every epoch; --strict ends the run."""
    for problem in problems:
        if strict:
            raise SystemExit(f"error: {problem}; without --strict it is reported and left out")
        if problem not in told:
            tqdm.write(str(problem))
            told.add(problem)


def model_flops(shape: budget.Shape, sequences: list, config: Config) -> float:
    """What these sequences cost, forward and backward."""
    grids = [grid for prompt, _ in sequences for grid in prompt.image_grid.tolist()]
    lengths = [len(prompt.ids) + len(ids) for prompt, ids in sequences]
    labels = sum(len(ids) for _, ids in sequences)
    whole = budget.flops(shape, lengths, labels, grids)
    return whole.training(config.freeze_vision, lora=config.lora_rank > 0)


def preflight(config: Config, steps: Steps, policy, optimizer, device):
    """Memory on paper, then one step at the cutoff: too little of it shows now."""
    processor, module, copies = steps.processor, kind(steps.processor), 1
    some = [steps.record(i) for i in range(min(20, len(steps.spans)))]
    sequences = encode(some, processor, config, data.Problems()) or [module.blank(processor)]
    prompt = max((prompt for prompt, _ in sequences), key=lambda prompt: len(prompt.ids))
    if module is generic:
        run.say("no table of its memory: budget.py knows the Qwen-VL models")
    else:
        share = config.batch_size // dist.get_world_size()
        copies = max(1, min(config.micro_tokens // config.cutoff, share))
        tokens, patches = copies * config.cutoff, copies * int(prompt.image_grid.prod(-1).sum())
        budget.announce_run(config, policy, device, run.say, tokens, patches, reference="")
    answer = [processor.eos_ids[0]] * (config.cutoff - len(prompt.ids))
    batch = module.pack([(copy.copy(prompt), answer) for _ in range(copies)], device)
    model.rehearse(policy, optimizer, batch)


def main(config: Config):
    # ---- settings
    device = run.start_ranks()
    config.micro_tokens = micro_tokens(config, device)
    world = dist.get_world_size()
    config.out = config.out or run.default_out("sft", config.model, config.data)
    out = Path(config.out)
    toy.resolve(config)
    config.freeze_vision = not config.lora_vision if config.lora_rank else config.freeze_vision
    run.claim(config, HOW_ONLY)

    # ---- data
    file = out / "records.bin"
    with run.for_people():
        run.find_model(config.model)
        spans, held_spans = run.on_main_first(lambda: shelve(config, file))

    # ---- model
    knobs = dict(offload=config.offload, shard_size=config.shard_size, compile=config.compile)
    share = config.activation_checkpointing * config.checkpoint_share
    knobs |= dict(activation_checkpointing=share)
    knobs |= dict(adapters=(config.lora_rank, config.lora_alpha, config.lora_vision))
    with run.for_people():
        # What cannot be packed goes through the model one sequence per forward.
        packable = not generic.packed_refusal(AutoConfig.from_pretrained(hub.model(config.model)))
        library = model if packable else generic
        policy = model.load_sharded(
            config.model, device, wrap=library.wrap, freeze_vision=config.freeze_vision, **knobs
        )
        processor = library.Processor(config.model, **asking.settings(config))
    shape = budget.shape(policy.hf.config) if packable else None
    trained = [p for p in policy.parameters() if p.requires_grad]
    settings = dict(lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    fused = device.type == "cuda" or config.offload  # on a CPU ten times as fast, too
    optimizer = torch.optim.AdamW(trained, fused=fused, **settings)
    width = policy.hf.config.get_text_config().hidden_size
    steps = Steps(file, spans, processor, config, width)
    exam = Steps(file, held_spans, processor, replace(config, epochs=1), width)
    if config.preflight:
        preflight(config, steps, policy, optimizer, device)
    start = checkpoint.load(out, policy, optimizer)
    total, told = len(steps), set()
    log = run.Log(out, config, start)
    resumed = f"; resumed after step {start}" if start else ""
    run.say(
        f"recipe {config.recipe or '(none)'}: {len(spans)} records, {len(held_spans)} held out; "
        f"{config.epochs} epochs of {steps.per_epoch} steps\n"
        f"{world} rank(s) on {device.type}; out {out}{resumed}\n{processor}"
    )

    # ---- training
    items, hide_bar = ahead(steps, start, config.workers), not run.is_main() or None
    items = tqdm(items, "sft", total=total, initial=start, disable=hide_bar)
    began = time.perf_counter()
    for step, (sequences, problems) in enumerate(items, start):
        t_data = time.perf_counter() - began  # how long the device waited for them
        report(problems, told, config.strict)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total, config)
        counts = {"tokens": sum(len(ids) for _, ids in sequences), "left_out": len(problems)}
        counts = {name: int(n) for name, n in run.all_sum(counts).items()}

        loss_sum = 0.0
        for batch in batches(sequences, steps, device):
            logprobs, _ = policy(batch)
            loss = sft_loss(logprobs, counts["tokens"])
            (loss * world).backward()  # FSDP takes the mean over ranks
            loss_sum += loss.item()
        grad_norm = model.update(policy, optimizer, config.max_grad_norm, loss_sum)

        flops = model_flops(shape, sequences, config) if shape else 0.0
        sums = run.all_sum({"loss": loss_sum, "flops": flops})
        seconds = time.perf_counter() - began
        mfu = budget.mfu(sums["flops"] / world, seconds, device) if shape else None
        row = dict(step=step + 1, epoch=step / steps.per_epoch, loss=sums["loss"], lr=lr)
        row |= dict(grad_norm=grad_norm, refused_updates=int(math.isnan(grad_norm)), **counts)
        row |= dict(tokens_per_s=counts["tokens"] / seconds)
        row |= dict(mfu=mfu, t_data=t_data, t_total=seconds, mem_peak=run.peak_memory())
        last, place = step + 1 == total, f"step {step + 1:5d}/{total}"
        if len(held_spans) and (last or (step + 1) % config.eval_every == 0):
            exams = evaluate(exam, policy, device, told)
            run.say(f"{place}  held out: {', '.join(f'{k} {v:.4f}' for k, v in exams.items())}")
            row |= exams
        log.write(row)
        if (step + 1) % max(1, total // 20) == 0:
            numbers = "loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:.0f} tokens/s".format(**row)
            run.say(f"{place}  {numbers}")
        checkpoint.end_step(config, step + 1, total, policy, optimizer)
        began = time.perf_counter()

    # ---- result
    if run.is_main():
        file.unlink()
    model.export(policy, processor, out / "final")
    ended = "nothing left to do" if start == total else "done"
    run.say(f"{ended}: the model is in {out / 'final'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run.guard(main, run.parse_config(Config, RECIPES))
