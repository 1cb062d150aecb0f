"""Stage 1 of Vision-R1: cold-start initialization. Supervised fine-tuning on chains of thought -> Vision-R1-CI.

  python sft.py                                               the toy (bridges its cold-start data first)
  torchrun --nproc_per_node 8 sft.py --recipe vision-r1-ci-7b --data Vision-R1-cold
  torchrun --nproc_per_node 8 sft.py --recipe vision-r1-llamav-ci --data Vision-R1-cold

Sequences are packed without padding, the loss counts the response alone, the learning rate falls along a cosine. A run
that was stopped goes on where it stopped, in the middle of an epoch too.
"""

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import model
from nano import budget, data, mllama, packing, run
from nano.steps import Shelf, Steps, ahead, batches, encode, kind, shelve


@dataclass
class Config:
    # what to run
    recipe: str = "toy"
    out: str = ""  # folder of the run; "" = named after model and data
    model: str = ""  # a Hugging Face folder or hub name; toy:NAME = the toy's, made if missing
    data: str = ""  # records with a response: Vision-R1-cold as downloaded, cold_start.py's, any format of data.py
    eval_data: str = (
        ""  # held-out records of the same kind: their loss and accuracy are logged now and then
    )
    holdout: int = 0  # without eval_data: so many records of `data` are left out of training for it
    strict: bool = False  # stop at the first bad record instead of reporting it
    seed: int = 0
    # the task
    drop_chains: bool = False  # answers without chains, for Zero+SFT+PTST (Table 6)
    system_prompt: str = ""
    cutoff: int = (
        16384  # a longer sequence is reported and left out, never cut (released config: 16,384)
    )
    # optimization
    epochs: int = 2  # Sec. 4.1
    batch_size: int = (
        32  # sequences per optimizer step, over all ranks (released config: 8 GPUs x 1 x 4 = 32)
    )
    lr: float = 5e-6  # released config
    warmup_ratio: float = 0.05  # released config
    min_lr: float = 0.0  # where the cosine ends
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 16384  # tokens of a packed micro-batch on one rank
    freeze_vision: bool = False
    # memory and speed, for real models
    workers: int = (
        2  # processes of each rank that read images and cut them into patches ahead of time
    )
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks
    offload: bool = False  # weights, gradients and optimizer live in the CPU's memory
    shard_size: int = (
        0  # ranks that share one copy of the weights, e.g. those of a node (HSDP); 0 = all ranks
    )
    preflight: bool = (
        True  # first print what the memory will hold, and try a step at the greatest length
    )
    # the run
    eval_every: int = 250  # steps; and after the last one
    save_every: int = 500  # steps; the last one is always saved
    keep: int = 1  # checkpoints
    resume: bool = True  # --no_resume starts over
    wandb: bool = False
    tensorboard: bool = False


PAPER = dict(activation_checkpointing=True, data="Osilly/Vision-R1-cold")
RECIPES = {
    "toy": dict(
        model="toy:base",
        data="toy:cold",
        lr=2e-3,
        epochs=5,
        freeze_vision=True,
        cutoff=1024,
        micro_tokens=4096,
        workers=0,
        save_every=200,
    ),
    # App. A: Vision-R1-CI in its three sizes, and the answers-only start of Zero+SFT+PTST
    "vision-r1-ci-7b": PAPER
    | dict(model="Qwen/Qwen2.5-VL-7B-Instruct", out="runs/vision-r1-ci-7b"),
    "vision-r1-ci-32b": PAPER
    | dict(model="Qwen/Qwen2.5-VL-32B-Instruct", out="runs/vision-r1-ci-32b"),
    "vision-r1-ci-72b": PAPER
    | dict(model="Qwen/Qwen2.5-VL-72B-Instruct", out="runs/vision-r1-ci-72b"),
    # Table 2: the same data on another base; "Llama-3.2-11B-Vision" there, of which we take the one with a chat template
    "vision-r1-llamav-ci": PAPER
    | dict(model="meta-llama/Llama-3.2-11B-Vision-Instruct", out="runs/vision-r1-llamav"),
    "zero-sft": PAPER
    | dict(model="Qwen/Qwen2.5-VL-7B-Instruct", out="runs/zero-sft", drop_chains=True),
}


def learning_rate(step, total, config):
    """linear warm-up, then a cosine down to min_lr; a function of the step alone, so that there is no state to save"""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    turn = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * turn))


def report(problems, told, strict):
    """say each problem once, from the rank that met it, and not again in every epoch; under --strict end the run"""
    for problem in [p for p in problems if p not in told]:
        if strict:
            raise SystemExit(
                f"error: {problem}; without --strict such data is reported and the rest goes on"
            )
        tqdm.write(str(problem))
        told.add(problem)


def model_flops(shape, sequences, frozen_vision):
    """what these sequences cost by budget.py, forward and backward; 0 where it does not know the model"""
    if shape is None:
        return 0.0
    grids = [grid for p, _ in sequences for grid in p.image_grid.tolist()]
    lengths = [len(p.ids) + len(ids) for p, ids in sequences]
    return budget.flops(shape, lengths, sum(len(ids) for _, ids in sequences), grids).training(
        frozen_vision
    )


@torch.no_grad()
def evaluate(steps, policy, config, device, told):
    """held-out records: mean loss per response token, and the share of response tokens that the model would have said
    itself, given those before. every rank takes part, with or without records of its own"""
    total = {"loss": 0.0, "right": 0, "tokens": 0}
    for sequences, bad in ahead(steps, 0, config.workers):
        report(bad, told, config.strict)
        for batch in batches(sequences, steps.processor, config, steps.width, device):
            logprobs, _, right = policy(batch, judge=True)
            total["loss"] -= logprobs.sum().item()
            total["right"] += right.sum().item()
            total["tokens"] += len(logprobs)
    total = run.all_sum(total)
    tokens = max(1, total["tokens"])
    return {"eval_loss": total["loss"] / tokens, "eval_accuracy": total["right"] / tokens}


def preflight(config, shape, records, policy, optimizer, processor, device, say):
    """memory on paper, then one step at the cutoff: too little of it shows now, with the knob to turn"""
    some = [records[i] for i in range(min(20, len(records)))]
    sequences = encode(some, processor, config, data.Problems()) or [
        kind(processor).blank(processor)
    ]
    prompt = max((p for p, _ in sequences), key=lambda p: len(p.ids))
    response = [processor.eos_ids[0]] * (config.cutoff - len(prompt.ids))
    if shape is None:
        say("no table of its memory: budget.py knows the Qwen-VL models")
        return model.rehearse(policy, optimizer, mllama.pack([(prompt, response)], device))
    fits = max(
        1, min(config.micro_tokens // config.cutoff, config.batch_size // dist.get_world_size())
    )
    cuda = device.type == "cuda"
    items = budget.memory(
        shape,
        fits * config.cutoff,
        fits * int(prompt.image_grid.prod(-1).sum()),
        cuda=cuda,
        world=dist.get_world_size(),
        shard_size=config.shard_size or None,
        frozen_vision=config.freeze_vision,
        activation_checkpointing=config.activation_checkpointing,
        reference="",
        offload=config.offload,
    )
    budget.announce(items, device, say)
    model.rehearse(
        policy,
        optimizer,
        packing.pack([(copy.copy(prompt), response) for _ in range(fits)], device),
    )


def main(config):
    device = run.start_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    config.out = config.out or run.default_out("sft", config.model, config.data)
    out = Path(config.out)
    if "toy:" in config.model + config.data:
        import toy

        run.on_main_first(lambda: (toy.find(config.model), toy.find(config.data)))
        config.model, config.data = toy.find(config.model), toy.find(config.data)
    run.claim(
        config,
        (
            "model",
            "data",
            "seed",
            "batch_size",
            "epochs",
            "holdout",
            "drop_chains",
            "system_prompt",
            "cutoff",
            "lr",
            "warmup_ratio",
            "min_lr",
            "weight_decay",
            "max_grad_norm",
            "freeze_vision",
        ),
    )
    say = tqdm.write if rank == 0 else lambda *_: None

    shelf, shelf_held = out / "records.pkl", out / "held-out.pkl"

    def read():
        holdout = 0 if config.eval_data else config.holdout
        shelve(config.data, shelf, config.strict, say, holdout, config.seed)
        if config.eval_data:
            shelve(config.eval_data, shelf_held, config.strict, say)

    with run.for_people():
        run.on_main_first(read)
    records = Shelf(shelf, held=False)
    held = Shelf(shelf_held, held=False) if config.eval_data else Shelf(shelf, held=True)

    library = mllama if mllama.is_one(config.model) else model
    processor = library.Processor(config.model)
    policy = library.load_sharded(
        config.model,
        device,
        freeze_vision=config.freeze_vision,
        offload=config.offload,
        shard_size=config.shard_size,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
    )
    width = policy.hf.config.get_text_config().hidden_size
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )

    steps = Steps(records, processor, config, width)
    per_epoch, total = steps.per_epoch, len(steps)
    shape = (
        None if library is mllama else budget.shape(policy.hf.config)
    )  # which budget.py cannot count
    if config.preflight:
        preflight(config, shape, records, policy, optimizer, processor, device, say)
    start, _ = run.load_checkpoint(out, policy, optimizer)
    log = run.Log(out, config, start, config.wandb, config.tensorboard)
    resumed = f"; resumed after step {start}" if start else ""
    about = f"recipe {config.recipe}: {len(records)} records, {len(held)} held out"
    say(f"{about}; {config.epochs} epochs of {per_epoch} steps")
    exam = Steps(held, processor, replace(config, epochs=1), width) if len(held) else None
    told = set()
    say(f"{world} rank(s) on {device.type}; out {out}{resumed}")

    bar = tqdm(total=total, initial=start, desc="sft", disable=None if rank == 0 else True)
    began = time.perf_counter()
    for step, (sequences, bad) in enumerate(ahead(steps, start, config.workers), start):
        t_data = time.perf_counter() - began  # how long the device had to wait for them
        report(bad, told, config.strict)
        lr = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        counts = run.all_sum(
            {"tokens": sum(len(ids) for _, ids in sequences), "left_out": len(bad)}
        )
        tokens = counts["tokens"]
        loss_sum = 0.0
        for batch in batches(sequences, processor, config, width, device):
            logprobs, _ = policy(batch)
            loss = -logprobs.sum() / max(tokens, 1)  # mean over the response tokens of all ranks
            (loss * world).backward()  # FSDP takes the mean over ranks
            loss_sum += loss.item()
        grad_norm = model.full(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)).item()
        optimizer.step()
        optimizer.zero_grad()

        sums = run.all_sum(
            {"loss": loss_sum, "flops": model_flops(shape, sequences, config.freeze_vision)}
        )
        loss, seconds = sums["loss"], time.perf_counter() - began
        mfu = budget.mfu(sums["flops"] / world, seconds, device) if shape else None
        last, exams = step + 1 == total, {}
        if exam and (last or (step + 1) % config.eval_every == 0):
            exams = evaluate(exam, policy, config, device, told)
            say(
                f"step {step + 1:5d}/{total}  held out: {', '.join(f'{k} {v:.4f}' for k, v in exams.items())}"
            )
        log.write(
            dict(
                step=step + 1,
                epoch=step / per_epoch,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens=int(tokens),
                left_out=int(counts["left_out"]),
                tokens_per_s=tokens / seconds,
                mfu=mfu,
                t_data=t_data,
                t_total=seconds,
                mem_peak=run.peak_memory(),
                **exams,
            )
        )
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens / seconds:.0f}")
        if (step + 1) % max(1, total // 20) == 0:
            say(
                f"step {step + 1:5d}/{total}  loss {loss:.4f}  lr {lr:.2e}  {tokens / seconds:.0f} tokens/s"
            )
        if last or (step + 1) % config.save_every == 0:
            run.save_checkpoint(out, step + 1, policy, optimizer, {}, config.keep)
        began = time.perf_counter()
    bar.close()

    if rank == 0:
        for file in (shelf, shelf_held):
            file.unlink(missing_ok=True)
            file.with_suffix(".npz").unlink(missing_ok=True)
    model.export(policy, processor, out / "final")
    say(f"{'nothing left to do' if start == total else 'done'}: the model is in {out / 'final'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run.guard(main, run.parse_config(Config, RECIPES))
