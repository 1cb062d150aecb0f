"""The toy's model: a tiny Qwen2.5-VL plays the pretrained one. It reads, and answers tersely."""

import random
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model
from nano.data import Record
from nano.packing import encode, pack
from toy.world import BASE, CELLS, DIGITS, SIDE, ZERO_PROMPT, column_total, draw, question

WORDS = f"""
{" ".join(map(str, range(1, 60)))} {" ".join(CELLS)} . , {ZERO_PROMPT} {question(2, [1] * 9, 1)}
Okay the image shows so Wait let me check again Hmm maybe is I add them one by smudged not clear
column Take Describe the picture The answer The sum is <think> </think> <answer> </answer> user
assistant system
"""
STARTS = "<think> <answer> Add Think Describe The user assistant system"  # No space before these.
SPECIAL = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, bos_token_id=None)
TEXT |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768)
ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
# The vision towers of the families by model_type: patch size, and what the configuration holds.
WIDE = dict(hidden_size=96, intermediate_size=192, num_heads=4, out_hidden_size=128)
DEEP = dict(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
VISION = {
    "qwen2_5_vl": (14, WIDE | dict(depth=2, fullatt_block_indexes=[0, 1])),
    "qwen2_vl": (14, dict(depth=2, embed_dim=96, num_heads=4, hidden_size=128, mlp_ratio=2)),
    "qwen3_vl": (16, WIDE | DEEP),
}


def tokenizer():
    """Byte-level BPE: any text can be encoded, and each word of the world is one token."""
    bpe, to_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    words_only = to_bytes(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, words_only])
    bpe.decoder = decoders.ByteLevel()
    special = [f"<|{name}|>" for name in SPECIAL.split()]
    how = dict(special_tokens=special, initial_alphabet=sorted(to_bytes.alphabet()))
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, **how)
    words = [f" {word}" for word in sorted(set(WORDS.split()))]
    bpe.train_from_iterator(words * 2 + STARTS.split() * 2, trainer)
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **ends)


def random_model(path, seed: int = 0, max_pixels: int = SIDE * SIDE, family="qwen2_5_vl", **text):
    """Saves a random model of a million parameters, with tokenizer and processor, to `path`.

    `text` overrides fields of the language model's configuration.
    """
    tok, (patch, vision) = tokenizer(), VISION[family]
    marks = [name for name in SPECIAL.split()[3:] if name != "vision_pad"]
    ids = {mark.removesuffix("_pad"): tok.convert_tokens_to_ids(f"<|{mark}|>") for mark in marks}
    ids = {f"{name}_token_id": number for name, number in ids.items()}
    own = dict(vocab_size=len(tok), eos_token_id=tok.eos_token_id, rope_parameters=ROPE)
    text = TEXT | own | text
    if "out_hidden_size" in vision:
        vision = vision | dict(out_hidden_size=text["hidden_size"])
    parts = dict(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(seed)
    hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts, **ids))
    hf.generation_config.eos_token_id = tok.eos_token_id
    pixels = dict(min_pixels=4 * patch**2, max_pixels=max_pixels)
    for part in (hf, tok, Qwen2VLImageProcessorPil(patch_size=patch, **pixels)):
        part.save_pretrained(path)


def random_relative(path, family: str, seed: int = 0) -> str:
    """Saves a tiny random qwen2_vl or qwen3_vl, for tests of the other families."""
    more = dict(head_dim=32) if family == "qwen3_vl" else {}
    random_model(path, seed, 64 * VISION[family][0] ** 2, family, **more)
    return str(path)


def lesson(rng: random.Random) -> tuple[str, list[bytes], str, str]:
    """-> (problem, images, system prompt, response): the skills of a pretrained model, no more."""
    cells, level = [rng.randint(1, DIGITS) for _ in CELLS], rng.randint(2, 9)
    smudged = rng.randrange(9) if rng.random() < 0.5 else None
    images, kind, column = [draw(cells, rng, smudged)], rng.random(), rng.randrange(3)
    if kind < 0.3:  # It says what it sees and what it is told, if need be a digit it cannot see.
        told, hint = column_total(cells, column), ""
        if smudged is not None and rng.random() < 0.5:
            hint, smudged = f"{CELLS[smudged]} is {cells[smudged]} . ", None
        seen = ["smudged" if i == smudged else digit for i, digit in enumerate(cells)]
        listed = " , ".join(f"{name} is {digit}" for name, digit in zip(CELLS, seen))
        return f"<image>{told} {hint}Describe the picture .", images, "", f"{listed} . {told}"
    digits = [rng.randint(1, DIGITS) for _ in range(rng.randint(2, 10))]
    if kind >= 0.6:  # It answers, in the paper's format only when a system prompt asks for it.
        problem, total = f"<image>{question(level, cells, column)}", sum(cells[:level])
        if kind < 0.8:
            return problem, images, "", f"The answer is {total} ."
        thought = "<think> I add them one by one . </think>"
        return problem, images, ZERO_PROMPT, f"{thought} <answer> {total} </answer>"
    if kind < 0.4:  # It takes away.
        (a, b), left = digits[:2], rng.randint(1, DIGITS)
        return f"Take {a} {b} from {left + a + b} .", [], "", f"{a} {left + b} , {b} {left} ."
    shown = [str(digit) for digit in digits]
    problem = f"Add {' '.join(shown)} ."
    if kind >= 0.5:  # It looks up what it adds.
        named = rng.sample(list(zip(CELLS, cells)), rng.randint(2, 9))
        told = " , ".join(f"{name} is {digit}" for name, digit in rng.sample(named, len(named)))
        names, digits = zip(*named)
        problem = f"{told} . Add {' '.join(names)} ."
        shown = [f"{name} {digit}" for name, digit in named]
    sums = [f"{words} {total}" for words, total in zip(shown, accumulate(digits))]
    return problem, [], "", " , ".join(sums) + " ."


def _lesson_loss(policy, processor, rng, batch):
    examples = []
    for _ in range(batch):
        problem, images, system, response = lesson(rng)
        ids = processor.tokenizer(response).input_ids + [processor.tokenizer.eos_token_id]
        record = Record("", problem, "-", images)
        processor.system_prompt = system
        examples.append((encode(record, processor), ids))
    return -policy(pack(examples))[0].mean()


def _reading_loss(policy, processor, rng, probe):
    """Cross-entropy of a linear probe that reads each cell's digit from its vision token."""
    prompts, truth = [], []
    grids = [[rng.randint(1, DIGITS) for _ in CELLS] for _ in range(128)]
    blots = [rng.randrange(18) for _ in grids]  # Nine of 18 are cells: half the grids get a blot.
    for cells, blot in zip(grids, blots):
        record = Record("", "<image>Describe the picture .", "-", [draw(cells, rng, blot)])
        prompts.append((encode(record, processor), []))
        truth += [0 if i == blot else digit for i, digit in enumerate(cells)]
    features = torch.cat(model.encode_images(policy.hf, pack(prompts)).pooler_output)
    return F.cross_entropy(probe(features), torch.tensor(truth))  # features: (128 * 9, 128)


def _train(name, loss_of, steps, warmup, optimizer):
    """Adam's steps on `loss_of()`; the gradient of the first group of parameters is clipped."""
    first = optimizer.param_groups[0]
    peak = first["lr"]
    for step in (bar := tqdm(range(steps), name)):
        loss = loss_of()
        cosine = torch.cos(torch.tensor(3.14159265 * step / steps)).item()
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + cosine))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(first["params"], 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain(out=BASE, steps: int = 1300, batch: int = 64, warm: int = 200, seed: int = 1):
    """Trains the base model from nothing, a few minutes on a CPU.

    The vision tower learns first, with a linear probe. Then it is frozen and the language model
    takes lessons: with the tower unfrozen, perception collapsed.
    """
    random_model(out, seed)
    policy, processor = model.load(out)
    rng, probe = random.Random(seed), torch.nn.Linear(TEXT["hidden_size"], DIGITS + 1)
    visual = policy.hf.model.visual
    groups = [{"params": list(part.parameters())} for part in (visual, probe)]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    _train("vision", partial(_reading_loss, policy, processor, rng, probe), warm, 20, optimizer)
    visual.requires_grad_(False)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    _train("lessons", partial(_lesson_loss, policy, processor, rng, batch), steps, 50, optimizer)
    policy.hf.bfloat16().save_pretrained(out)  # Released checkpoints are bfloat16; 2 MB.
    processor.save(out)
