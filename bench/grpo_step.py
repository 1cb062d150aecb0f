"""Benchmark of whole GRPO steps.

  python bench/grpo_step.py [--size tiny --completion 128 --ragged --rounds 3]
  python bench/grpo_step.py --size 3b --completion 2048 --image-tokens 512 --max_rows 128 \
                            --activation_checkpointing True     (unknown flags go to grpo.py)
  python bench/grpo_step.py --share     the worth of encoding image and prompt of a group once

Ours is `grpo.py` itself on a random Qwen2.5-VL; its log gives seconds of rollout, log-probabilities
of the reference and update. TRL's GRPOTrainer, when it is installed, runs the same checkpoint,
prompts, reward function and settings. They take turns, each in a process of its own, one thread on
the CPU. Seconds are CPU seconds there, since the machine may have other work; wall seconds stand
beside them. Ratios are medians over the rounds.

Lengths are a matter of the weights, so that nobody's sampler is changed: one dimension of the
residual stream is constant, and through it the end token has probability 0 (every completion
reaches the limit), or with --ragged the same small one at every token, so that the mean length is
half the limit. Left out: vLLM, several ranks, published checkpoints.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--threads" not in sys.argv:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

GPU = torch.cuda.is_available()
QUESTIONS, GROUP, MICRO = 8, 16, 16  # MICRO: sequences of a micro-batch of TRL

# the vision tower that the 3B and the 7B share
TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
TOWER |= dict(fullatt_block_indexes=[7, 15, 23, 31])

# text and vision of the published configurations; tiny is ours
SIZES = {
    "tiny": (
        dict(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            mrope=[8, 12, 12],
            tied=True,
        ),
        dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            fullatt_block_indexes=[0, 1],
        ),
    ),
    "3b": (
        dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            mrope=[16, 24, 24],
            tied=True,
        ),
        TOWER,
    ),
    "7b": (
        dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            mrope=[16, 24, 24],
            tied=False,
        ),
        TOWER,
    ),
}


# -------------------------------------------------------------------------------------------------
# the workload


def end_probability(limit):
    """p of a geometric length that is cut at `limit` and has the mean limit / 2."""
    low, high = 1e-9, 0.5
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > limit / 2 else (low, p)
    return p


@torch.no_grad()
def set_end_probability(hf, p, end, never):
    """Dimension 0 of the residual stream becomes a constant that rules the head: P(end) = p
    everywhere, P(never) = 0."""
    text, width = hf.model.language_model, hf.config.text_config.hidden_size
    table, head = text.embed_tokens.weight, hf.get_output_embeddings().weight
    # After the last norm it is then sqrt(width), whatever the token.
    table[:, 0] = 100 * table[:, 1:].norm(dim=1).mean()
    for layer in text.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    others = len(table) - len(never) - 1
    head[never, 0] -= 50 / width**0.5
    head[end, 0] += (
        torch.tensor(p * others / (1 - p)).log().item() / width**0.5 if p else -50 / width**0.5
    )


def make_workload(folder, size, image_tokens, limit, ragged, questions=QUESTIONS):
    """A random checkpoint and `questions` problems with one image each, in `folder`."""
    from PIL import Image
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    import toy
    from nano.data import Record, write_parquet

    folder = Path(folder)
    text, vision = (dict(x) for x in SIZES[size])
    mrope, tied = text.pop("mrope"), text.pop("tied")
    tok = toy.tokenizer()
    chat_template = tok.chat_template
    tok.save_pretrained(folder)
    # the toy's tokenizer, with words that never occur up to the size of the embedding table
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"] |= {f"~{i}~": i for i in range(len(tok), text["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tok = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tok) == text["vocab_size"] and tok.chat_template == chat_template
    token = tok.convert_tokens_to_ids
    marks = {
        f"{m}_token_id": token(
            f"<|{m.replace('image', 'image_pad').replace('video', 'video_pad')}|>"
        )
        for m in ("image", "video", "vision_start", "vision_end")
    }
    text |= dict(
        max_position_embeddings=32768,
        eos_token_id=token("<|im_end|>"),
        bos_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=mrope),
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | dict(out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=tied,
        **marks,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        hf = Qwen2_5_VLForConditionalGeneration(config)
    never = [*marks.values(), token("<|vision_pad|>"), token("<|endoftext|>")]
    set_end_probability(
        hf, end_probability(limit) if ragged else 0, token("<|im_end|>"), sorted(set(never))
    )
    hf.generation_config.eos_token_id = token("<|im_end|>")
    (hf.bfloat16() if GPU else hf).save_pretrained(folder)
    high = int(image_tokens**0.5)
    while image_tokens % high:
        high -= 1
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=image_tokens * 28 * 28).save_pretrained(
        folder
    )
    records = []
    for i in range(questions):
        out = io.BytesIO()
        Image.effect_noise((28 * image_tokens // high, 28 * high), 80).convert("RGB").save(
            out, "PNG"
        )
        task = f"Add the numbers from A1 to {toy.CELLS[1 + i % 8]} ."
        records.append(
            Record(
                f"q{i}",
                f"<image>Describe the picture . Okay , {task}",
                str(i),
                [out.getvalue()],
            )
        )
    write_parquet(folder / "problems.parquet", records)
    return records


# -------------------------------------------------------------------------------------------------
# one process each: seconds of CPU and wall of every step, of its parts, tokens, peak memory

clock = time.perf_counter if GPU else time.process_time


def ours(args, rest):
    """grpo.py's own loop; its clock is the one of the CPU."""
    from types import SimpleNamespace

    import grpo
    from nano import run

    stamps, write = [], run.Log.write

    def stamped(log, row):
        stamps.append((clock(), time.perf_counter()))
        write(log, row)

    run.Log.write = stamped
    run.time = SimpleNamespace(perf_counter=clock, sleep=time.sleep)
    out = Path(args.folder) / f"run-{os.getpid()}"
    flags = [
        "--recipe",
        "toy",
        "--model",
        args.folder,
        "--data",
        f"{args.folder}/problems.parquet",
        "--out",
        str(out),
    ]
    flags += [
        "--stages",
        f"{args.completion}x{GROUP}x{args.steps + 1}",
        "--questions",
        str(QUESTIONS),
        "--lr",
        "1e-6",
    ]
    flags += ["--freeze_vision", "False", "--save_every", "1000000", *rest]
    with contextlib.redirect_stdout(sys.stderr):
        grpo.main(run.parse_config(grpo.Config, grpo.RECIPES, flags))
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [
        dict(
            seconds=b[0] - a[0],
            wall=b[1] - a[1],
            rollout=r["t_rollout"] + r["t_reward"],
            logprob=r["t_logprob"],
            update=r["t_update"],
            tokens=r["tokens"],
            memory=r["mem_peak"],
        )
        for a, b, r in zip(stamps, stamps[1:], rows[1:])
    ]


def trl_data(args):
    """-> TRL's processor and rows for the same checkpoint and problems."""
    import datasets
    from PIL import Image
    from transformers import Qwen2_5_VLProcessor

    import model
    from nano import data

    class Processor(Qwen2_5_VLProcessor):
        """A video processor would need torchvision, and no video is here."""

        def check_argument_for_proper_class(self, *_):
            pass

    parts = model.Processor(args.folder)
    processor = Processor(
        parts.image_processor, parts.tokenizer, None, chat_template=parts.tokenizer.chat_template
    )
    records, _ = data.read(f"{args.folder}/problems.parquet")
    rows = datasets.Dataset.from_list(
        [
            dict(
                prompt=[{"role": "user", "content": r.problem.removeprefix("<image>")}],
                answer=r.answer,
                image=Image.open(io.BytesIO(r.images[0])),
            )
            for r in records
        ]
    )
    return processor, rows


def judge(completions, answer, **_):
    import reward

    texts = [c[0]["content"] for c in completions]
    return [reward.score(text, gold).reward for text, gold in zip(texts, answer)]


def timed_trainer(spent):
    """TRL's trainer whose rollouts and log-probabilities add their seconds to `spent`."""
    import trl

    class Trainer(trl.GRPOTrainer):
        def _generate(self, *a, **k):
            return timed("rollout", super()._generate, a, k)

        def _calculate_rewards(self, *a, **k):
            return timed("rollout", super()._calculate_rewards, a, k)

        def _get_per_token_logps_and_entropies(self, *a, **k):
            call = super()._get_per_token_logps_and_entropies
            return call(*a, **k) if torch.is_grad_enabled() else timed("logprob", call, a, k)

    def timed(what, call, a, k):
        began = clock()
        result = call(*a, **k)
        spent[what] += clock() - began
        return result

    return Trainer


def trl(args, rest):
    """TRL's GRPOTrainer with the settings that do the same work: no recomputation, no old
    log-probabilities, Eq. 1's mean."""
    import trl
    from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback

    from nano import run

    processor, rows = trl_data(args)
    spent = dict(rollout=0.0, logprob=0.0)

    stamps = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append((clock(), time.perf_counter(), dict(spent), run.peak_memory()))

    config = trl.GRPOConfig(
        output_dir=f"{args.folder}/trl",
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=QUESTIONS * GROUP // MICRO,
        num_generations=GROUP,
        max_completion_length=args.completion,
        beta=0.01,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=args.steps + 1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        gradient_checkpointing="--activation_checkpointing" in rest,
        bf16=GPU,
        use_cpu=not GPU,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        args.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer = timed_trainer(spent)(
            hf, judge, config, rows, processing_class=processor, callbacks=[Stamp()]
        )
        trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    out = []
    for a, b, length in zip(stamps, stamps[1:], lengths[1:]):
        part = {k: b[2][k] - a[2][k] for k in spent}
        seconds = b[0] - a[0]
        out.append(
            dict(
                seconds=seconds,
                wall=b[1] - a[1],
                **part,
                update=seconds - sum(part.values()),
                tokens=round(length * QUESTIONS * GROUP),
                memory=b[3],
            )
        )
    return out


def share(args, rest):
    """Forward + backward of one group whose rollouts share a Prompt, so that image and prompt go
    through once, and of one where they do not."""
    import copy

    import model
    from nano import data, packing

    policy, processor = model.load(
        args.folder, "cuda" if GPU else "cpu", torch.bfloat16 if GPU else torch.float32
    )
    prompt = packing.encode(data.read(f"{args.folder}/problems.parquet")[0][0], processor)
    rng = random.Random(0)
    answers = [
        [rng.randrange(len(processor.tokenizer)) for _ in range(args.completion)]
        for _ in range(GROUP)
    ]
    answers = [[t for t in a if t != processor.image_token] for a in answers]
    seconds = {"one": [], "each": []}
    for _ in range(args.steps + 1):
        for name, sequences in (
            ("one", [(prompt, a) for a in answers]),
            ("each", [(copy.copy(prompt), a) for a in answers]),
        ):
            batch = packing.pack(sequences, policy.banned.device)
            began = clock()
            policy(batch)[0].sum().backward()
            if GPU:
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {k: statistics.median(v[1:]) for k, v in seconds.items()} | dict(prompt=len(prompt.ids))


# -------------------------------------------------------------------------------------------------
# the table


def update_flops(args, length):
    """Of one update, forward + backward, the same for both: each prompt and its image once.

    6 x weights per token, 12 x hidden x keys per token and layer for attention, where a response
    token sees half of its response on the average. Recomputation and padding do not count.
    """
    text, vision = SIZES[args.size]
    h, kv = (
        text["hidden_size"],
        text["num_key_value_heads"] * (text["hidden_size"] // text["num_attention_heads"]),
    )
    layers, prompt, answers = text["num_hidden_layers"], args.prompt_tokens, QUESTIONS * GROUP
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * text["intermediate_size"])
    flops = (
        6 * weights * (QUESTIONS * prompt + answers * length)
        + 6 * h * text["vocab_size"] * answers * length
    )
    flops += (
        12 * layers * h * (QUESTIONS * prompt**2 / 2 + answers * length * (prompt + length / 2))
    )
    v = vision["hidden_size"]
    tower = (
        vision["depth"] * (4 * v * v + 3 * v * vision["intermediate_size"]) * 4
        + (4 * v) ** 2
        + 4 * v * h
    )
    return flops + QUESTIONS * args.image_tokens * 6 * tower


def peak_rate():
    """FLOP/s: the data sheet's dense bf16 for an H100 or H200, else what a large float32 matrix
    product reaches here."""
    if GPU and ("H100" in torch.cuda.get_device_name() or "H200" in torch.cuda.get_device_name()):
        return 989e12
    a, best = torch.randn(2, 1024, 1024), 1e9
    for _ in range(20):
        began = clock()
        a[0] @ a[1]
        best = min(best, clock() - began)
    return 2 * 1024**3 / best


def speed(rows):
    """Tokens per second."""
    return sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows)


def child(name, args, rest, folder):
    words = [
        "--size",
        args.size,
        "--completion",
        str(args.completion),
        "--steps",
        str(args.steps),
        "--only",
        name,
        "--folder",
        folder,
    ]
    done = subprocess.run([sys.executable, __file__, *words, *rest], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def where():
    threads = torch.get_num_threads()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = next(
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    return torch.cuda.get_device_name() if GPU else f"{name}, {threads} thread{'s' * (threads > 1)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument(
        "--completion", type=int, default=128, help="limit of the completion in tokens"
    )
    parser.add_argument("--image-tokens", type=int, default=4)
    parser.add_argument("--ragged", action="store_true", help="lengths vary, mean half the limit")
    parser.add_argument(
        "--share",
        action="store_true",
        help="instead: update of one group with image and prompt encoded once, and per rollout",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps of a round, after one that is not"
    )
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--only", choices=["ours", "trl", "share"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.only:
        return print(json.dumps(dict(ours=ours, trl=trl, share=share)[args.only](args, rest)))

    import model
    from nano import data, packing

    with tempfile.TemporaryDirectory() as folder:
        make_workload(folder, args.size, args.image_tokens, args.completion, args.ragged)
        processor = model.Processor(folder)
        args.prompt_tokens = packing.prompt_length(
            data.read(f"{folder}/problems.parquet")[0][0], processor
        )
        unit = "wall" if GPU else "CPU"
        print(f"{where()}; Qwen2.5-VL {args.size}, random; {unit} seconds")
        print(f"{args.prompt_tokens} prompt tokens, {args.image_tokens} of them image")
        if args.share:
            s = child("share", args, rest, folder)
            print(f"update of {GROUP} rollouts x {args.completion} tokens: image and prompt once")
            print(f"{s['one']:.2f} s, per rollout {s['each']:.2f} s, {s['each'] / s['one']:.2f}x")
            return
        compare(args, rest, folder)


def compare(args, rest, folder):
    """The table of both, and their ratios."""
    kind = "ragged" if args.ragged else "fixed"
    names = ["ours"] if args.no_trl or not importlib.util.find_spec("trl") else ["ours", "trl"]
    print(
        f"{QUESTIONS} prompts x {GROUP} rollouts, limit {args.completion}, {kind} lengths; "
        f"medians of {args.rounds} rounds x {args.steps} steps"
    )
    rounds = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            rounds[name].append(child(name, args, rest, folder))
    print(
        "| | s/step | wall | rollout + reward | reference | update | mean length | tokens/s "
        "| peak MB | update, of peak FLOP/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    peak = peak_rate()
    for name in names:
        rows = [r for one in rounds[name] for r in one]
        m = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
        length = m["tokens"] / QUESTIONS / GROUP
        mfu = (
            statistics.median(
                update_flops(args, r["tokens"] / QUESTIONS / GROUP) / r["update"] for r in rows
            )
            / peak
        )
        rate = statistics.median(r["tokens"] / r["seconds"] for r in rows)
        print(
            f"| {name} | {m['seconds']:.2f} | {m['wall']:.2f} | {m['rollout']:.2f} "
            f"| {m['logprob']:.2f} | {m['update']:.2f} | {length:.1f} | {rate:.0f} "
            f"| {m['memory'] / 1e6:.0f} | {mfu:.0%} of {peak / 1e9:.0f} GFLOP/s |"
        )
    if len(names) > 1:
        step, token = [], []
        for a, b in zip(*rounds.values()):
            medians = [statistics.median(r["seconds"] for r in rows) for rows in (a, b)]
            step.append(medians[1] / medians[0])
            token.append(speed(a) / speed(b))
        for what, ratios in (("step", step), ("token", token)):
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"TRL / ours: {statistics.median(ratios):.2f}x per {what} ({each})")


if __name__ == "__main__":
    main()
