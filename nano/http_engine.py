"""Evaluation through any OpenAI-compatible server, for models that our engines cannot sample.

  vllm serve MODEL --generation-config vllm          (or SGLang, or a hosted service)

Without that flag vLLM adds what the model's generation_config.json asks for, e.g. a repetition
penalty. A server that wants a key gets EVAL_API_KEY or OPENAI_API_KEY.
"""

import asyncio
import base64
import json
import os
import re
from pathlib import Path

import aiohttp
import numpy as np
import torch.distributed as dist
from PIL import Image

from nano.data import MARK, Record, opened
from nano.packing import Prompt
from nano.rollout import Sample
from nano.run import for_people

CONCURRENCY = 64  # requests at a time
WAITS = (0, 1, 2, 4, 8, 16, 32, 60)  # seconds before each try of a request
PATIENCE = 20.0  # seconds without an answer after which we ask whether the server is alive
PASSING = (0, 408, 429, 500, 502, 503, 504)  # Worth another try; 0: no answer at all.
HINTS = {
    400: "If the question is too long for the server, lower --max_len or give it more context.",
    401: "Set EVAL_API_KEY to a key that the server takes.",
    404: "The URL must go up to and with /v1, and its /models must list that model.",
}
AGAIN = "Mend or restart it, then give the same command again: answered questions are kept."


class HTTPEngine:
    """Samples from the servers at `urls`: each goes up to and with /v1, commas between them."""

    def __init__(self, urls: str, model_name: str, system_prompt: str = ""):
        servers = [url.strip().rstrip("/") for url in urls.split(",")]
        if not all(re.match("https?://", url) for url in servers):
            raise SystemExit(f"error: --url {urls!r}: it must look like http://HOST:8000/v1")
        self.url = servers[dist.get_rank() % len(servers)]
        self.model_name, self.system_prompt = model_name, system_prompt
        self.key = os.environ.get("EVAL_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"

    def prompt(self, record: Record) -> Prompt:
        """What generate takes: the server itself makes tokens and pixels of the record."""
        return Prompt(record, [], None, None, None)

    def generate(self, prompts, group_size, max_len, seeds, temperature=1.0, top_p=1.0):
        """As TorchEngine.generate; the Samples have a text and a length, but no token ids."""
        settings = {"max_tokens": max_len, "temperature": temperature, "top_p": top_p}
        asks = [(p, (*seed, s)) for p, seed in zip(prompts, seeds) for s in range(group_size)]
        with for_people():
            flat = asyncio.run(self.answer_all(asks, settings))
        return [flat[i : i + group_size] for i in range(0, len(flat), group_size)]

    async def answer_all(self, asks, settings) -> list[Sample]:
        gate = asyncio.Semaphore(CONCURRENCY)
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=self.url.startswith("https"),  # a proxy for hosted servers only
        ) as session:
            return await asyncio.gather(
                *(self.answer(session, gate, prompt, seed, settings) for prompt, seed in asks)
            )

    async def answer(self, session, gate, prompt, seed, settings) -> Sample:
        """One answer. A passing trouble is waited out, any other one ends the run."""
        async with gate:
            body = {"model": self.model_name, "messages": self.messages(prompt.record), **settings}
            body["seed"] = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)  # 31 bits
            for wait in WAITS:
                await asyncio.sleep(wait)
                try:
                    status, text = await self.patiently(session, body)
                    if status == 200:
                        return read_reply(prompt, text)
                except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                    status, text = 0, f"{type(error).__name__}: {error}"
                if status not in PASSING:
                    break
        text = text.replace(self.key, "***")[:300]  # Servers echo a wrong key.
        where = f"{self.url}, model {self.model_name!r}, question {prompt.record.id}"
        raise ValueError(f"{where}: status {status}, {text}\n{HINTS.get(status, AGAIN)}")

    def messages(self, record: Record) -> list[dict]:
        """The record as a chat: its pictures stand where its <image> marks are."""
        pictures = iter([{"url": picture_url(image)} for image in record.images])
        content = [
            {"type": "image_url", "image_url": next(pictures)}
            if part == MARK
            else {"type": "text", "text": part}
            for part in re.split(f"({MARK})", record.problem)
            if part
        ]
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": content}]

    async def patiently(self, session, body) -> tuple[int, str]:
        """Status and text of an answer, which may take hours as long as the server is alive."""
        post = session.post(f"{self.url}/chat/completions", json=body)
        post = asyncio.ensure_future(read(post))
        try:
            while not (await asyncio.wait([post], timeout=PATIENCE))[0]:
                await asyncio.wait_for(read(session.get(f"{self.url}/models")), PATIENCE)
            return await post
        finally:
            post.cancel()


async def read(request) -> tuple[int, str]:
    async with request as answer:
        return answer.status, await answer.text(errors="replace")


def picture_url(image: str | bytes) -> str:
    """The picture's own bytes with their own type: nothing is encoded anew."""
    raw = image if isinstance(image, bytes) else Path(image).read_bytes()
    with opened(image) as picture:
        mime = Image.MIME[picture.format]
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


def read_reply(prompt: Prompt, text: str) -> Sample:
    """A chat completion -> Sample; ValueError when it is malformed or was broken off."""
    try:
        reply = json.loads(text)
        choice, length = reply["choices"][0], reply["usage"]["completion_tokens"]
        completion, finish = choice["message"]["content"] or "", choice["finish_reason"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"malformed answer {text[:200]!r}") from error
    if finish == "abort":
        raise ValueError("the server broke the answer off")
    sample = Sample(prompt, [], [], "length" if finish == "length" else "stop", completion)
    sample.length = length
    return sample
