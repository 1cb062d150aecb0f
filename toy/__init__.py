"""Vision-R1 in miniature: a small visual world, teachers that can talk about it, and a tiny real Qwen2.5-VL.

The world: a 3 x 3 picture of digits; "Column 2 is 11. Add the numbers from A1 to B3." asks for the sum of the first cells
in reading order (level 2 to 9 = how many). Reading takes the vision tower, adding takes several steps. In a hard problem
one of the cells is smudged: a short chain can only guess, a longer one works its digit out from the column's total.
The teachers stand in for the MLLM and for DeepSeek-R1, behind an OpenAI-compatible server like theirs. The MLLM knows what
can be read from a text chunk of the PNG (the model never sees it: it gets pixels); the reasoner sees no picture at all.
The tiny model plays the pretrained Qwen2.5-VL: it reads digits and answers tersely. `python toy.py pretrain` makes it.

  python toy.py pretrain [--out DIR]   train the base model from nothing (a few CPU minutes; the result is in assets/)
  python toy.py random --out DIR       a random checkpoint in the same layout, for any data (tests, smoke runs)
  python toy.py show [--out FILE]      print problems with chains and draw a sheet of pictures
  python toy.py teachers               serve the teachers until standard input ends; prints the URL for cold_start.py
"""

import asyncio
import base64
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

HERE = Path(__file__).resolve().parents[1]
BASE = HERE / "toy" / "base"  # the shipped base model
CELLS = [f"{row}{column}" for row in "ABC" for column in "123"]
SIDE, DIGITS = 84, 5  # pixels; the digits are 1..5. one cell = 28 px = one merged vision token
ZERO_PROMPT = "Think first , then answer in tags ."  # the system prompt that the base model has learnt to follow

# -----------------------------------------------------------------------------------------------------------------
# the world


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def draw(cells, rng, smudged=None):
    """nine digits -> PNG bytes; the number of a smudged cell; what can be read is in a text chunk for the scripted MLLM"""
    light = rng.random() < 0.5
    shade = lambda lo, hi: tuple(rng.randint(lo, hi) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), shade(200, 255) if light else shade(0, 60))
    pen = ImageDraw.Draw(image)
    for i, digit in enumerate(cells):
        x, y = 28 * (i % 3) + 14 + rng.randint(-3, 3), 28 * (i // 3) + 14 + rng.randint(-3, 3)
        ink = shade(0, 110) if light else shade(150, 255)
        if i == smudged:  # a blot, and no trace of the digit
            pen.ellipse(
                (
                    x - rng.randint(8, 11),
                    y - rng.randint(8, 11),
                    x + rng.randint(8, 11),
                    y + rng.randint(8, 11),
                ),
                fill=ink,
            )
        else:
            pen.text((x, y), str(digit), fill=ink, font=font(rng.randint(16, 22)), anchor="mm")
    truth, out = PngImagePlugin.PngInfo(), io.BytesIO()
    truth.add_text(
        "cells", " ".join("0" if i == smudged else str(digit) for i, digit in enumerate(cells))
    )
    image.save(out, "PNG", pnginfo=truth)
    return out.getvalue()


def question(level, cells, column):
    return f"column {column + 1} is {sum(cells[column::3])} . Add the numbers from A1 to {CELLS[level - 1]} ."


def problems(n, seed, name, hard=0.5):
    """n records of the world, levels 2 to 9 in turn; in a share `hard` of them one of the cells to add is smudged"""
    from nano.data import Record

    records = []
    for i in range(n):
        rng = random.Random(f"{seed}-{name}-{i}")
        cells, level = [rng.randint(1, DIGITS) for _ in CELLS], 2 + i % 8
        smudged = rng.randrange(level) if rng.random() < hard else None
        column = rng.randrange(3) if smudged is None else smudged % 3
        text, source = (
            f"<image>{question(level, cells, column)}",
            f"level {level}" + ", smudged" * (smudged is not None),
        )
        records.append(
            Record(
                f"{name}-{i}", text, str(sum(cells[:level])), [draw(cells, rng, smudged)], source
            )
        )
    return records


# -----------------------------------------------------------------------------------------------------------------
# the teachers


def read_messages(messages):
    """-> (all the text, the cells of the picture or None): what a server would see of an OpenAI-style request"""
    text, cells = [], None
    for message in messages:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        for part in parts:
            if part["type"] == "text":
                text.append(part["text"])
            else:
                image = Image.open(
                    io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",", 1)[1]))
                )
                cells = [int(c) for c in image.text["cells"].split()]
    return "\n".join(text), cells


class MLLM:
    """sees the picture; misreads a digit now and then, and leaves cells out when it has no pseudo-CoT to go by (App. B)"""

    misread, forget = 0.005, 0.15  # per cell

    def chat(self, messages):
        text, cells = read_messages(messages)
        rng = random.Random(zlib.crc32(text.encode()) + sum(c * 7**i for i, c in enumerate(cells)))
        seen = [rng.randint(1, DIGITS) if c and rng.random() < self.misread else c for c in cells]
        listed = [f"{name} is {c or 'smudged'}" for name, c in zip(CELLS, seen)]
        if "description" not in text:  # step 1: caption and reasoning. the prompt tells the answer
            level = CELLS.index(re.search(r"from A1 to (\w\d)", text)[1]) + 1
            answer = re.search(r"Correct answer: (\d+)", text)[1]
            return f"Caption : a grid of digits .\nReasoning : {' , '.join(listed[:level])} . Adding gives {answer} .\nFinal Answer: {answer}"
        if "Reasoning :" not in text:
            listed = [line for line in listed if rng.random() > self.forget]
        return f"A 3 by 3 grid of digits . {' , '.join(listed)} ."


class Reasoner:
    """writes chains the way DeepSeek-R1 does, without seeing: it guesses, slips, doubts, looks again, and often sets it right.

    nothing here knows which chains will be kept. `slip`: a wrong digit or total, per cell; `look`: it works out a smudged
    digit that it has guessed so far; `again`: one more round when nothing calls for it, after each total; `doubt`: share
    of those rounds that start from a doubted digit.
    """

    slip, look, again, doubt, most_rounds = 0.003, 0.7, 0.6, 0.7, 8

    def chat(self, messages):
        text, _ = read_messages(messages)
        rng = random.Random(zlib.crc32(text.encode()))
        level = CELLS.index(re.search(r"from A1 to (\w\d)", text)[1]) + 1
        column = int(re.search(r"column \d is (\d+)", text)[1])
        told = {name: int(digit) for name, digit in re.findall(r"\b([ABC][123]) is (\d)", text)}
        digits = [
            told.get(name) or rng.randint(1, DIGITS) for name in CELLS
        ]  # it makes up what it was not told
        guessed = re.search(r"([ABC][123]) is smudged", text)
        guessed = CELLS.index(guessed[1]) if guessed else None
        chain, total = self.scan(digits[:level], rng, guessed)
        chain = f"Okay , the description shows {chain}"
        for _ in range(self.most_rounds - 1):
            if guessed is not None and guessed < level and rng.random() < self.look:
                words, digits[guessed] = self.work_out(digits, guessed, column, rng)
                guessed, (scan, total) = None, self.scan(digits[:level], rng)
                chain += f" Hmm , {words} {scan}"
            elif rng.random() > self.again:
                break
            elif rng.random() < self.doubt:
                cell, other = rng.randrange(level), rng.randint(1, DIGITS)
                words, total = self.scan(
                    [*digits[:cell], other, *digits[cell + 1 : level]], rng, guessed
                )
                chain += f" Hmm , maybe {CELLS[cell]} is {other} . {words}"
            else:
                words, total = self.scan(digits[:level], rng, guessed)
                chain += f" Wait , let me check again . {words}"
        return f"<think> {chain} </think> {total}"

    def scan(self, digits, rng, guessed=None):
        """cell, digit, running total, ...; a slip is carried on, a guess is marked"""
        words, total = [], 0
        for i, (name, digit) in enumerate(zip(CELLS, digits)):
            if rng.random() < self.slip:
                digit = rng.randint(1, DIGITS)
            total += digit
            if rng.random() < self.slip / 2:
                total += rng.choice([-1, 1])
            words.append(f"{name} {'maybe ' * (i == guessed)}{digit} {total}")
        return f"{' , '.join(words)} . so {total} .", total

    def work_out(self, digits, cell, left, rng):
        """the column's total less its other two digits, one after the other -> words, digit"""
        words = f"{CELLS[cell]} is not clear . column {cell % 3 + 1} is {left}"
        for other in range(cell % 3, 9, 3):
            if other != cell:
                left -= digits[other] if rng.random() > self.slip else rng.randint(1, DIGITS)
                left = max(1, left)
                words += f" , {CELLS[other]} {digits[other]} {left}"
        return f"{words} . so {CELLS[cell]} is {left} .", left


async def serve(reader, writer):
    """one connection to the teachers: POST /v1/chat/completions over HTTP/1.1, as vLLM and the real services have it"""
    teachers = {"toy-mllm": MLLM(), "toy-reasoner": Reasoner()}
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])
            asked, status = json.loads(await reader.readexactly(length)), "200 OK"
            try:
                text = teachers[asked["model"]].chat(asked["messages"])
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
                usage = {
                    "prompt_tokens": length // 4,
                    "completion_tokens": len(text.split()),
                }  # roughly
                reply = {
                    "object": "chat.completion",
                    "model": asked["model"],
                    "choices": [choice],
                    "usage": usage,
                }
            except (KeyError, TypeError, ValueError) as e:
                status, reply = (
                    "400 Bad Request",
                    {"error": {"message": f"not a problem of the toy's world: {e!r}"}},
                )
            raw = json.dumps(reply).encode()
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            writer.write(head.encode() + raw)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def teachers():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    threading.Thread(
        target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True
    ).start()  # gone with whoever started it
    await server.serve_forever()


@functools.cache
def start_teachers(again=Reasoner.again):
    """the URL of the teachers, served by a process of their own that ends with this one, however it ends"""
    command = [sys.executable, "-m", "toy", "teachers", "--again", str(again)]
    start_teachers.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
    )
    return start_teachers.process.stdout.readline().strip()


# -----------------------------------------------------------------------------------------------------------------
# the tiny model


def tokenizer():
    """byte-level BPE, so that any text can be encoded, whose merges make each word of the world one token"""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = " ".join(map(str, range(1, 60))) + " " + " ".join(CELLS)
    words += f" . , {ZERO_PROMPT} {question(2, [1] * 9, 1)} Okay the image shows so Wait let me check again Hmm maybe is I add them one by"
    words += " smudged not clear column Take Describe the picture The answer The sum is <think> </think> <answer> </answer> user assistant system"
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
    ]
    special += ["<|image_pad|>", "<|video_pad|>"]
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    starts = [
        "<think>",
        "<answer>",
        "Add",
        "Think",
        "Describe",
        "The",
        "user",
        "assistant",
        "system",
    ]
    bpe.train_from_iterator([" " + w for w in sorted(set(words.split()))] * 2 + starts * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def random_model(path, seed=0, max_pixels=SIDE * SIDE, **text):
    """save a random Qwen2.5-VL of about a million parameters, with tokenizer and processor files, to `path`"""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tok = tokenizer()
    token = tok.convert_tokens_to_ids
    text = (
        dict(
            vocab_size=len(tok),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            eos_token_id=token("<|im_end|>"),
            bos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
        )
        | text
    )
    vision = dict(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=4,
        out_hidden_size=text["hidden_size"],
        fullatt_block_indexes=[0, 1],
    )
    ids = {
        f"{name}_token_id": token(f"<|{mark}|>")
        for name, mark in [
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        ]
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.save_pretrained(path)
    tok.save_pretrained(path)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=max_pixels).save_pretrained(path)


def random_relative(path, family, seed=0):
    """a tiny random Qwen2-VL or Qwen3-VL beside it, for tests of the other architectures"""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    random_model(path, seed)
    ours = AutoConfig.from_pretrained(path).to_dict()
    text = {
        k: ours["text_config"][k]
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rope_parameters",
        )
    }
    token = {k: v for k, v in ours.items() if k.endswith("_token_id")}
    if family == "qwen2_vl":
        vision, patch = (
            dict(depth=2, embed_dim=96, num_heads=4, hidden_size=text["hidden_size"], mlp_ratio=2),
            14,
        )
    else:
        text |= dict(head_dim=32)
        vision, patch = (
            dict(
                depth=3,
                hidden_size=96,
                intermediate_size=192,
                num_heads=4,
                out_hidden_size=text["hidden_size"],
                num_position_embeddings=64,
                deepstack_visual_indexes=[0, 1],
            ),
            16,
        )
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=True, **token
    )
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=4 * patch**2, max_pixels=64 * patch**2
    ).save_pretrained(path)
    return str(path)


def lesson(rng):
    """one pretraining example -> (record, system prompt, response): the skills of a pretrained model, and no more"""
    from nano.data import Record

    cells, level = [rng.randint(1, DIGITS) for _ in CELLS], rng.randint(2, 9)
    smudged = rng.randrange(9) if rng.random() < 0.5 else None
    total, png = sum(cells[:level]), draw(cells, rng, smudged)
    kind = rng.random()
    column = rng.randrange(3)
    if (
        kind < 0.3
    ):  # a pretrained model can say what it sees and what it was told, a digit that it cannot see too
        told = f"column {column + 1} is {sum(cells[column::3])} ."
        hidden = None if smudged is None or rng.random() < 0.5 else smudged
        hint = (
            f"{CELLS[smudged]} is {cells[smudged]} . "
            if smudged is not None and hidden is None
            else ""
        )
        describe = " , ".join(
            f"{name} is {'smudged' if i == hidden else digit}"
            for i, (name, digit) in enumerate(zip(CELLS, cells))
        )
        return (
            Record("", f"<image>{told} {hint}Describe the picture .", "-", [png]),
            "",
            f"{describe} . {told}",
        )
    digits = [rng.randint(1, DIGITS) for _ in range(rng.randint(2, 10))]
    if kind < 0.4:  # take away
        a, b = digits[:2]
        left = rng.randint(1, DIGITS)
        return (
            Record("", f"Take {a} {b} from {left + a + b} .", "-", []),
            "",
            f"{a} {left + b} , {b} {left} .",
        )
    if kind < 0.5:  # add
        sums = " , ".join(f"{d} {sum(digits[: i + 1])}" for i, d in enumerate(digits))
        return Record("", f"Add {' '.join(map(str, digits))} .", "-", []), "", f"{sums} ."
    if kind < 0.6:  # and look up what it adds
        named = rng.sample(list(zip(CELLS, cells)), rng.randint(2, 9))
        told = " , ".join(f"{name} is {digit}" for name, digit in rng.sample(named, len(named)))
        sums = " , ".join(
            f"{name} {digit} {sum(d for _, d in named[: i + 1])}"
            for i, (name, digit) in enumerate(named)
        )
        return (
            Record("", f"{told} . Add {' '.join(name for name, _ in named)} .", "-", []),
            "",
            f"{sums} .",
        )
    record = Record("", f"<image>{question(level, cells, column)}", "-", [png])
    if kind < 0.8:
        return record, "", f"The answer is {total} ."
    return (
        record,
        ZERO_PROMPT,
        f"<think> I add them one by one . </think> <answer> {total} </answer>",
    )


def pretrain(out=BASE, steps=1300, batch=64, lr=3e-3, warm=200, seed=1):
    """vision warm-up with a linear probe, then lessons with the vision tower frozen (unfrozen, perception collapses)"""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from model import encode_images, load
    from nano.data import Record
    from nano.packing import encode, pack

    random_model(out, seed)
    policy, processor = load(out)
    rng = random.Random(seed)
    probe = torch.nn.Linear(128, DIGITS + 1)

    def cosine(step, total):
        return 0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(3.14159265 * step / total)).item())

    visual = policy.hf.model.visual
    optimizer = torch.optim.AdamW([*visual.parameters(), *probe.parameters()], lr=2e-3)
    for step in (bar := tqdm(range(warm), "vision")):
        truth = [[rng.randint(1, DIGITS) for _ in CELLS] for _ in range(128)]
        blots = [
            rng.randrange(18) for _ in truth
        ]  # of 18 numbers nine are cells: half the pictures have one
        prompts = [
            encode(Record("", "<image>Describe the picture .", "-", [draw(c, rng, b)]), processor)
            for c, b in zip(truth, blots)
        ]
        truth = [
            [0 if i == b else digit for i, digit in enumerate(c)] for c, b in zip(truth, blots)
        ]
        feats = torch.cat(
            encode_images(policy.hf, pack([(p, []) for p in prompts])).pooler_output
        )  # (128 * 9, 128)
        logits, truth = probe(feats), torch.tensor(truth).flatten()
        loss = F.cross_entropy(logits, truth)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * cosine(step, warm)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(
            loss=f"{loss.item():.3f}",
            digits=f"{(logits.argmax(-1) == truth).float().mean().item():.3f}",
        )
    visual.requires_grad_(False)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := tqdm(range(steps), "lessons")):
        examples = []
        for _ in range(batch):
            record, system, response = lesson(rng)
            ids = processor.tokenizer(response).input_ids + [processor.tokenizer.eos_token_id]
            examples.append((encode(record, processor, system), ids))
        logprobs, _ = policy(pack(examples))
        loss = -logprobs.mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * cosine(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    policy.hf.bfloat16().save_pretrained(out)  # as released checkpoints are; 2 MB
    processor.save(out)


# -----------------------------------------------------------------------------------------------------------------
# what the stages' toy recipes ask for


def find(name):
    """ "toy:ci" -> its path, made first if it is missing; any other name as it is"""
    return ensure(name.removeprefix("toy:")) if name.startswith("toy:") else name


def ensure(what, root="runs/toy"):
    """path of a piece of the toy, made first if it is missing: base, {cold,rl,test}-problems, cold, ci, rl; URL of teachers"""
    root = Path(root)
    if what.startswith("teachers"):  # teachers?again=0.7: another strength of overthinking
        return start_teachers(*map(float, re.findall(r"\?again=(.+)", what)))
    if what == "base":
        if not (BASE / "config.json").exists():
            print("[toy] no base model here: pretraining it, a few minutes")
            pretrain()
        return str(BASE)
    if what.endswith("-problems"):
        from nano.data import write_parquet

        path = root / "data" / f"{what}.parquet"
        if not path.exists():
            n = {"cold-problems": 10000, "rl-problems": 6000, "test-problems": 2000}[what]
            print(f"[toy] drawing {n} problems: {path}", flush=True)
            write_parquet(path, problems(n, 0, what.removesuffix("-problems")))
        return str(path)
    stages = {
        "cold": ("cold_start.py", "cold/cold.jsonl"),
        "ci": ("sft.py", "sft/final"),
        "rl": ("grpo.py", "grpo/final"),
    }
    stage, result = stages[what]
    if not (root / result).exists():
        print(f"[toy] {root / result} is missing: running {stage} --recipe toy first", flush=True)
        ours = (
            "RANK",
            "WORLD_SIZE",
            "MASTER_",
            "TORCHELASTIC_",
            "GROUP_",
            "ROLE_",
            "OMP_NUM_THREADS",
        )
        plain = {
            k: v for k, v in os.environ.items() if not k.removeprefix("LOCAL_").startswith(ours)
        }  # not torchrun's
        subprocess.run(
            [sys.executable, str(HERE / stage), "--recipe", "toy"], check=True, env=plain
        )
    return str(root / result)


def resolve(config):
    """TEMPORARY."""
    from nano import run
    if "toy:" in config.model + config.data:
        run.on_main_first(lambda: (find(config.model), find(config.data)))
        config.model, config.data = find(config.model), find(config.data)
