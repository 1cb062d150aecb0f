"""The toy's teachers stand in for the MLLM and DeepSeek-R1, behind an OpenAI-compatible server.

The MLLM knows what can be read in the picture; the reasoner sees no picture at all.
"""

import base64
import functools
import io
import random
import re
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

from aiohttp import web
from PIL import Image

from toy.world import CELLS, DIGITS


def read_messages(messages: list[dict]) -> tuple[str, list[int] | None]:
    """OpenAI-style messages -> (all the text, the picture's readable cells or None)."""
    text, cells = [], None
    for content in (message["content"] for message in messages):
        for part in [{"text": content}] if isinstance(content, str) else content:
            if "text" in part:
                text.append(part["text"])
            else:
                png = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
                cells = [int(c) for c in Image.open(io.BytesIO(png)).text["cells"].split()]
    return "\n".join(text), cells


def asked_level(text: str) -> int:
    return CELLS.index(re.search(r"from A1 to (\w\d)", text)[1]) + 1


class MLLM:
    """It misreads a digit now and then, and without a pseudo-CoT it leaves cells out (App. B)."""

    misread, forget = 0.005, 0.15  # Rates per cell.

    def chat(self, messages: list[dict]) -> str:
        text, cells = read_messages(messages)
        rng = random.Random(zlib.crc32(text.encode()) + sum(c * 7**i for i, c in enumerate(cells)))
        seen = [rng.randint(1, DIGITS) if c and rng.random() < self.misread else c for c in cells]
        listed = [f"{name} is {c or 'smudged'}" for name, c in zip(CELLS, seen)]
        if "description" not in text:  # The first call asks for a caption and a pseudo-CoT.
            answer = re.search(r"Correct answer: (\d+)", text)[1]
            steps = " , ".join(listed[: asked_level(text)])
            reasoning = f"Reasoning : {steps} . Adding gives {answer} ."
            return f"Caption : a grid of digits .\n{reasoning}\nFinal Answer: {answer}"
        if "Reasoning :" not in text:
            listed = [line for line in listed if rng.random() > self.forget]
        return f"A 3 by 3 grid of digits . {' , '.join(listed)} ."


class Reasoner:
    """It writes chains as DeepSeek-R1 does, unseeing: it guesses, slips, doubts and looks again."""

    slip = 0.003  # Rate per cell of a wrong digit or total.
    look = 0.7  # How often it works out a smudged digit that it has guessed so far.
    again = 0.6  # How often it goes one more round after a total, though nothing calls for it.
    doubt = 0.7  # The share of those rounds that start from a doubted digit.
    most_rounds = 8

    def chat(self, messages: list[dict]) -> str:
        text, _ = read_messages(messages)
        rng = random.Random(zlib.crc32(text.encode()))
        level, column = asked_level(text), int(re.search(r"column \d is (\d+)", text)[1])
        told = {name: int(digit) for name, digit in re.findall(r"\b([ABC][123]) is (\d)", text)}
        # It makes up what it was not told.
        digits = [told.get(name) or rng.randint(1, DIGITS) for name in CELLS]
        smudged = re.search(r"([ABC][123]) is smudged", text)
        guessed = CELLS.index(smudged[1]) if smudged else None
        words, total = self.scan(digits[:level], rng, guessed)
        chain = f"Okay , the description shows {words}"
        for _ in range(self.most_rounds - 1):
            shown, remark = digits[:level], "Wait , let me check again ."
            if guessed is not None and guessed < level and rng.random() < self.look:
                remark, shown[guessed] = self.work_out(digits, guessed, column, rng)
                digits[guessed], guessed, remark = shown[guessed], None, f"Hmm , {remark}"
            elif rng.random() > self.again:
                break
            elif rng.random() < self.doubt:
                cell = rng.randrange(level)
                shown[cell] = rng.randint(1, DIGITS)
                remark = f"Hmm , maybe {CELLS[cell]} is {shown[cell]} ."
            words, total = self.scan(shown, rng, guessed)
            chain += f" {remark} {words}"
        return f"<think> {chain} </think> {total}"

    def scan(self, digits, rng, guessed=None):
        """-> (the words "cell digit running total , ...", total). Slips are carried on."""
        words, total = [], 0
        for i, (name, digit) in enumerate(zip(CELLS, digits)):
            if rng.random() < self.slip:
                digit = rng.randint(1, DIGITS)
            total += digit
            if rng.random() < self.slip / 2:
                total += rng.choice([-1, 1])
            words.append(f"{name} {'maybe ' * (i == guessed)}{digit} {total}")
        return f"{' , '.join(words)} . so {total} .", total

    def work_out(self, digits: list[int], cell: int, left: int, rng):
        """The column's total less its other two digits, one by one -> (words, digit)."""
        words = f"{CELLS[cell]} is not clear . column {cell % 3 + 1} is {left}"
        for other in range(cell % 3, 9, 3):
            if other != cell:
                left -= digits[other] if rng.random() > self.slip else rng.randint(1, DIGITS)
                left = max(1, left)
                words += f" , {CELLS[other]} {digits[other]} {left}"
        return f"{words} . so {CELLS[cell]} is {left} .", left


TEACHERS = {"toy-mllm": MLLM(), "toy-reasoner": Reasoner()}


async def complete(request: web.Request) -> web.Response:
    """The answer to POST /v1/chat/completions."""
    asked = await request.json()
    try:
        text = TEACHERS[asked["model"]].chat(asked["messages"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"not a problem of the toy's world: {error!r}"
        return web.json_response({"error": {"message": message}}, status=400)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    # Tokens are counted roughly.
    usage = {"prompt_tokens": request.content_length // 4, "completion_tokens": len(text.split())}
    body = {"object": "chat.completion", "choices": [choice], "usage": usage}
    return web.json_response(body)


def serve():
    """Prints the server's URL and serves until standard input ends: its starter is gone then."""
    app, sock = web.Application(), socket.create_server(("127.0.0.1", 0))
    app.router.add_post("/v1/chat/completions", complete)
    how = dict(sock=sock, backlog=1024, handle_signals=False, access_log=None, print=None)
    threading.Thread(target=web.run_app, args=[app], kwargs=how, daemon=True).start()
    print(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", flush=True)
    sys.stdin.read()


@functools.cache
def start_teachers(again: float = Reasoner.again) -> str:
    """The URL of the teachers, served by a process that ends with this one, however it ends."""
    command = [sys.executable, "-m", "toy", "teachers", "--again", str(again)]
    root, pipe = Path(__file__).resolve().parents[1], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
    start_teachers.process = process  # The pipe to it stays open as long as this process lives.
    return process.stdout.readline().strip()
