"""How a model is asked: the text around a problem, what the prompt already holds of the completion,
and the sizes of pictures. Both kinds of Processor are built on it (packing.py, generic.py).
"""

import copy
import json
import re
from pathlib import Path

from tokenizers import normalizers

from nano import run
from nano.data import MARK, BadRow, Record

VISION_MARK = "<|vision_start|><|image_pad|><|vision_end|>"  # Qwen-VL's, in a plain dialogue
GUARD = "\ufdd0"  # No text has this character. It parts what would else read as a control token.
SETTINGS = ("system_prompt", "prefill", "min_pixels", "max_pixels")
PROBE = Record("probe", f"{MARK}What is this?", "-", [b""])
ZERO_PROMPT = (  # of Vision-R1-Zero: ours, in the manner of R1-Zero's
    "Answer the user's question about the image. First think it through step by step inside "
    "<think> </think>, then give the final answer inside <answer> </answer>, that is: "
    "<think> reasoning here </think><answer> answer here </answer>."
)
BASE_PROMPT = (  # of arXiv 2503.05132; "User: ... Assistant:" and a prefill follow
    "A conversation between User and Assistant. The user asks a question about the image, and the "
    "Assistant solves it. The assistant first thinks about the reasoning process in the mind and "
    "then provides the user with the answer."
)


def settings(config) -> dict:
    """A stage's settings of how the model is asked."""
    return {name: getattr(config, name) for name in SETTINGS}


def as_trained(config):
    """What is not set is as it was when the model was trained: its export says so."""
    file = Path(config.model, "prompt.json")
    for name, value in json.loads(file.read_text()).items() if file.is_file() else ():
        if value and not getattr(config, name):
            run.say(f"as in training (--no_as_trained to leave it): --{name} {value!r}")
            setattr(config, name, value)


class Asking:
    """Needs a tokenizer and an image processor, then `set_up`."""

    def set_up(self, marks: set[str], system_prompt="", prefill="", min_pixels=0, max_pixels=0):
        """`marks`: the texts that stand for an image. 0 pixels: as the checkpoint has it."""
        self.asked = dict(zip(SETTINGS, (system_prompt, prefill, min_pixels, max_pixels)))
        self.system_prompt, self.prefill = system_prompt, prefill
        self.released_images = self.image_processor
        if min_pixels or max_pixels:
            self.image_processor = resized(self.image_processor, min_pixels, max_pixels)
        # Text from data is tokenized as text: `plain` parts its control tokens with GUARD, and the
        # tokenizer drops GUARD again, but only after it has looked for control tokens.
        added = self.tokenizer.added_tokens_decoder.values()
        control = marks | {token.content for token in added if token.special}
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        backend = self.tokenizer.backend_tokenizer
        self.normalizer, drop = backend.normalizer, [normalizers.Replace(GUARD, "")]
        backend.normalizer = normalizers.Sequence(drop + [self.normalizer] * bool(self.normalizer))
        # A chat template counts when a message comes out of it. That of the base Qwen2-VL-2B, for
        # example, takes a flat list of parts, and of messages it makes the empty text.
        self.chat = True
        try:
            text = self.text(PROBE)
            self.chat = PROBE.problem[len(MARK) :] in text and any(mark in text for mark in marks)
        except Exception:  # there is none, or it raises what it likes
            self.chat = False
        # What the prompt holds of the completion: from <think> on if that is in it. A template that
        # opens it (Qwen3-VL-Thinking's) leaves none for the prefill to write.
        opened = re.search(r"(<think>\s*)?\Z", self.text(PROBE).removesuffix(prefill))[0]
        before, think, rest = prefill.partition("<think>")
        if opened and think:
            self.prefill, think = before + rest.lstrip(), ""
        self.opening = opened + (think + rest if think else self.prefill)

    def plain(self, text: str) -> str:
        return self.control.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)

    def text(self, record: Record) -> str:
        """The chat template's own text with a mark for each image, and the prefill.

        A base model without a usable template gets the plain dialogue of arXiv 2503.05132.
        """
        parts = [part for part in re.split(f"({MARK})", record.problem) if part]
        system = self.plain(self.system_prompt or record.system)
        if not self.chat:
            problem = "".join(VISION_MARK if p == MARK else self.plain(p) for p in parts)
            return f"{system}\nUser: {problem} \nAssistant:".lstrip() + self.prefill
        content = [
            {"type": "image"} if part == MARK else {"type": "text", "text": self.plain(part)}
            for part in parts
        ]
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        how = dict(add_generation_prompt=True, tokenize=False)
        return self.tokenizer.apply_chat_template(messages, **how) + self.prefill

    def rest(self, response: str) -> str:
        """What is left to write of a response after what the prompt holds of it."""
        start, text = self.opening.strip(), response.lstrip()
        if start and not text.startswith(start):
            raise BadRow("response without the prefill", f"it must begin with {start!r}")
        text = text.removeprefix(start) if start else response
        return text.lstrip() if start and self.opening[-1].isspace() else text

    def __str__(self):
        kind = "the chat template" if self.chat else "a plain dialogue, as no chat template works"
        size = dict(getattr(self.image_processor, "size", None) or {})
        pixels = [f"{size[edge]:,}" for edge in ("shortest_edge", "longest_edge") if size.get(edge)]
        begins = f"completions begin with {self.opening!r}; " if self.opening else ""
        return f"prompts: {kind}; {begins}pixels of a picture: {' to '.join(pixels) or 'any'}"

    def save_asked(self, path: str):
        """Leaves to `as_trained` how the model was asked."""
        if any(self.asked.values()):
            Path(path, "prompt.json").write_text(json.dumps(self.asked, indent=1) + "\n")


def resized(image_processor, min_pixels: int, max_pixels: int):
    """A copy with other limits of an image's pixels; those of 0 stay."""
    if not hasattr(image_processor, "merge_size"):
        raise ValueError("--min_pixels and --max_pixels need Qwen-VL's image processor")
    image_processor, size = copy.copy(image_processor), image_processor.size
    low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if low > high:
        raise ValueError(f"--min_pixels {low} is more than --max_pixels {high}")
    image_processor.size = {"shortest_edge": low, "longest_edge": high}
    return image_processor
