"""Text rules of the cold start (Sec. 3.3.1), and the layout of the released data.

The paper says only "by rules" and "words are replaced"; every rule and pattern here is ours.
"""

import re
import zlib
from functools import partial

from nano.data import Record
from nano.teachers import Reject

KIND = r"(image|picture|figure|diagram|chart|graph|photo|plot|table|map)"
SAYS = "says|states|mentions|tells (?:me|us)|reads|notes|specifies|indicates|describes"
SAID = "said|stated|mentioned|told (?:me|us)|noted|specified|indicated|described"

# ---- Words replaced: text about "the description" becomes text about the image.

REPLACEMENTS = [  # (pattern in any case, new text), in this order
    # "the description of the figure", "the image description"
    (rf"\b(?:the|a|this|that|your)(?: \w+)? descriptions? of (?:the|this|an?) {KIND}", r"the \1"),
    (rf"\b{KIND}(?:'s)? descriptions?\b", r"\1"),
    (r"\b(?:detailed|textual|written|verbal|text|given|provided) (?=descriptions?\b)", r""),
    (rf"\bdescription,? (?:{SAYS})\b", r"image shows"),
    (rf"\bdescription (?:{SAID})\b", r"image showed"),
    (r"\bread(ing)? (?:through )?(?=(?:the|this) descriptions?\b)", r"look\1 at "),
    (r"\bthe (?:user|problem|question) (?:described|describes)\b", r"the image shows"),
    (r"\ba description\b", r"an image"),
    (r"\bdescription(s?)\b", r"image\1"),
    (r"\b(?:described) (?=as\b|in\b|by\b|here\b|above\b)", r"shown "),
    (r"\b(as|is|are|was|were) described\b", r"\1 shown"),
    (r"\bthe captions?\b", r"the image"),
]
REPLACEMENTS = [  # Before each a guard for small letters: without re.I and \b it is much faster.
    (re.compile(pattern.removeprefix(r"\b")), re.compile(pattern, re.I), new)
    for pattern, new in REPLACEMENTS
]


def reword(new: str, match: re.Match) -> str:
    """The new text with the match's group in it; a capital stays a capital."""
    text = new.replace(r"\1", match[1] or "") if match.re.groups else new
    return text[:1].upper() + text[1:] if match[0][0].isupper() else text


def as_seen(chain: str) -> str:
    """The chain as if its writer had seen the image."""
    sentences = chain.split(".")  # No pattern reaches over a full stop.
    for i, sentence in enumerate(sentences):
        # Every pattern has one of these two in it, and most sentences have neither.
        if "descri" in sentence.lower() or "caption" in sentence.lower():
            for guard, pattern, new in REPLACEMENTS:
                if guard.search(sentence.lower()):
                    sentence = pattern.sub(partial(reword, new), sentence)
            sentences[i] = sentence
    return ".".join(sentences)


# ---- Filters: each returns its evidence, or None when all is well.

BLIND = re.compile(  # for text in small letters: re.I would take five times as long
    r"(?:can(?:'t|not| not)|unable to|don't|do not|couldn't) (?:actually |directly )?"
    rf"(?:see|view|access|look at) (?:the|any|an|this) (?:\w+ )?{KIND}"
    rf"|\bno {KIND} (?:is|was|has been|were) (?:provided|given|attached|shown|included)"
    r"|(?:without|don't have|do not have) (?:seeing |access to |having )?(?:the|any|an)"
    rf" (?:actual )?{KIND}"
    r"|(?:image|picture|figure|diagram|description|data|information)s? (?:is|are|was|were)"
    r" (?:missing|not (?:provided|given|available|attached)|incomplete)"
    r"|(?:image|description|caption) (?:doesn't|does not|didn't|did not)"
    r" (?:say|state|mention|specify|provide|give|include|show|describe|tell|indicate)"
    r"|(?:not enough|insufficient|missing) (?:information|data)"
    r" to (?:answer|determine|solve|find|compute)"
)
# Every way through BLIND has one of these, and they are found much faster.
DENIALS = ("not ", "n't ", "unable ", "no ", "without ", "missing", "incomplete", "insufficient ")
OTHER_SCRIPTS = re.compile(  # Greek is not among them: it is mathematics.
    r"[\u0400-\u04ff\u0590-\u06ff\u0900-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)


def looping(text: str) -> str | None:
    """A loop, anywhere, compresses far better (12x) than prose (2 to 3x) or tables (5x)."""
    starts = range(0, len(text), 1000) if len(text) > 2000 else []
    for part in [text, *(text[i : i + 2000] for i in starts)]:
        raw = part.encode()
        if len(part) >= 400 and len(raw) > 12 * len(zlib.compress(raw, 1)):
            return part[-120:]
    return None


def blind(text: str, question: str) -> str | None:
    """The text says that it sees no image or lacks data, and the question itself does not."""
    low = text.lower().replace("\u2019", "'")
    maybe = any(word in low for word in DENIALS)  # Most texts of the MLLM have none of them.
    for sentence in text.split(".") if maybe else ():  # BLIND does not reach over a full stop.
        low = sentence.lower().replace("\u2019", "'")
        if any(word in low for word in DENIALS) and (found := BLIND.search(low)):
            evidence = sentence[max(0, found.start() - 40) : found.end() + 40]
            return None if BLIND.search(question.lower()) else evidence
    return None


def language_mix(chain: str, question: str) -> str | None:
    """Letters of a script that the question has not: R1 slips into Chinese."""
    found = OTHER_SCRIPTS.findall(chain)
    return "".join(found[:40]) if len(found) > 2 and not OTHER_SCRIPTS.search(question) else None


def checked(step: str, reply: dict, question: str) -> str:
    """The text of a reply, by the rules that hold for all three calls; raises Reject."""
    text = reply["text"].strip()
    for rule, evidence in (
        ("refused", reply["finish"] == "content_filter" and (text[:200] or "content filter")),
        ("empty", not text and "no text"),
        ("truncated", reply["finish"] == "length" and text[-120:]),
        ("looping", looping(text)),
        ("can't see", blind(text, question)),
    ):
        if evidence:
            raise Reject(step, rule, evidence)
    return text


CHOICE = re.compile(r"^\s*\(?([A-H])[:.)]\s*(.+?)\s*$", re.M)
CONCLUSION = re.compile(
    r"\b(?i:answer|option|choice)\s*(?i:is|=|:|must be|should be|has to be)\s*(?i:option\s*)?[*$(]*"
    r"(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[A-H])(?![\w\\√π^*+/]|\.\d)"
)


def choices_in(problem: str) -> list[str] | None:
    """The options of a problem that has them as lines "A: 12", as Mulberry's do."""
    found = CHOICE.findall(problem)
    letters = "".join(letter for letter, _ in found)
    return [text for _, text in found] if found and "ABCDEFGH".startswith(letters) else None


# ---- The files of a run: our own layout, and that of Vision-R1-cold, which LLaMA-Factory reads.

FIELDS = ("id", "images", "problem", "answer", "choices", "source", "response")
RELEASED = {  # file -> its column of images and its two roles
    "vision_r1_llava_cot_full": ("image", "human", "gpt"),
    "vision_r1_mulberry_sft_full": ("images", "user", "assistant"),  # all other sources too
}


def released(record: Record, several: bool) -> tuple[str, dict]:
    """-> (name of the file, row); `several`: a picture stands in a list even when it is alone."""
    name = list(RELEASED)["llava" not in record.source.lower()]
    column, user, assistant = RELEASED[name]
    turns = ((user, record.problem), (assistant, record.response))
    row = {"id": record.id, column: record.images if several else record.images[0]}
    row["conversations"] = [{"from": role, "value": text} for role, text in turns]
    return name, {**row, "choices": record.choices, "source": record.source}


def dataset_info(name: str) -> dict:
    """What LLaMA-Factory's dataset_info.json says about one of the files."""
    column, user, assistant = RELEASED[name]
    columns = {"messages": "conversations", "images": column}
    tags = dict(role_tag="from", content_tag="value", user_tag=user, assistant_tag=assistant)
    return dict(file_name=f"{name}.json", formatting="sharegpt", columns=columns, tags=tags)
