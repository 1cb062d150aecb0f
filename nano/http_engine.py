"""Evaluation by any OpenAI-compatible server: models that our engines cannot sample.

  vllm serve MODEL --generation-config vllm    (or SGLang, or a hosted service)

Without that flag vLLM adds the model's own settings, e.g. a repetition penalty. The key of a
server is EVAL_API_KEY or OPENAI_API_KEY.
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

WAITS = (0, 1, 2, 4, 8, 16, 32, 60)  # seconds before each try
PATIENCE = 30.0  # seconds until we ask if the server is alive
HINTS = {
    400: "Too long for the server? Lower --max_len or give it more context.",
    401: "Set EVAL_API_KEY to a key that it takes.",
    404: "The URL goes up to and with /v1, its /models must list the model.",
}
AGAIN = "Start it again and repeat the command: answered questions are kept."


class HTTPEngine:
    """Asks the servers at `urls`: rank r the r-th of them, modulo their number."""

    def __init__(self, urls: str, model_name: str, system_prompt: str = ""):
        servers = [url.strip().rstrip("/") for url in urls.split(",")]
        if not all(re.match("https?://", url) for url in servers):
            raise SystemExit(f"error: --url {urls!r}: it must look like http://HOST:8000/v1")
        self.url = servers[dist.get_rank() % len(servers)]
        self.model_name = model_name
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.key = os.environ.get("EVAL_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY"

    def prompt(self, record: Record) -> Prompt:
        """What generate takes: the server makes tokens and pixels."""
        return Prompt(record, [], None, None, None)

    def generate(self, prompts, group_size, max_len, seeds, temperature=1.0, top_p=1.0):
        """As TorchEngine.generate, but the Samples have no token ids."""
        settings = {"max_tokens": max_len, "temperature": temperature, "top_p": top_p}
        asks = [(p, (*seed, s)) for p, seed in zip(prompts, seeds) for s in range(group_size)]
        with for_people():
            flat = asyncio.run(self.answer_all(asks, settings))
        return [flat[i : i + group_size] for i in range(0, len(flat), group_size)]

    async def answer_all(self, asks, settings) -> list[Sample]:
        gate = asyncio.Semaphore(64)  # requests at a time
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=self.url.startswith("https"),  # proxies are for far servers
        ) as session:
            return await asyncio.gather(*(self.answer(session, gate, *a, settings) for a in asks))

    async def answer(self, session, gate, prompt, seed, settings) -> Sample:
        """One answer. A passing trouble is waited out, another ends the run."""
        async with gate:
            body = {"model": self.model_name, "messages": self.messages(prompt.record), **settings}
            body["seed"] = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)  # 31 bits
            for wait in WAITS:
                await asyncio.sleep(wait)
                try:
                    status, text = await self.patiently(session, body)
                    if status == 200:
                        return read_reply(prompt, text)
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                    status, text = 0, f"{type(error).__name__}: {error}"
                if 0 < status < 500 and status != 429:  # not busy, not broken
                    break
        text = text.replace(self.key, "***")[:300]  # Servers echo wrong keys.
        who = f"{self.url}, model {self.model_name!r}, question {prompt.record.id}"
        raise ValueError(f"{who}: status {status}, {text}\n{HINTS.get(status, AGAIN)}")

    def messages(self, record: Record) -> list[dict]:
        """A chat whose pictures stand at the <image> marks."""
        pictures, content = map(picture, record.images), []
        for part in filter(None, re.split(f"({MARK})", record.problem)):
            content.append(next(pictures) if part == MARK else {"type": "text", "text": part})
        return [*self.system, {"role": "user", "content": content}]

    async def patiently(self, session, body) -> tuple[int, str]:
        """Status and text; hours may pass, as long as the server is alive."""
        url = self.url + "/chat/completions"
        post = asyncio.ensure_future(read(session.post, url, json=body))
        try:
            while not (await asyncio.wait([post], timeout=PATIENCE))[0]:
                await asyncio.wait_for(read(session.get, self.url + "/models"), PATIENCE)
            return await post
        finally:
            post.cancel()


async def read(method, url, **body) -> tuple[int, str]:
    async with method(url, **body) as answer:
        return answer.status, await answer.text()


def picture(image: str | bytes) -> dict:
    raw = image if isinstance(image, bytes) else Path(image).read_bytes()
    with opened(image) as im:
        url = f"data:{Image.MIME[im.format]};base64,{base64.b64encode(raw).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def read_reply(prompt: Prompt, text: str) -> Sample:
    """A chat completion -> Sample; ValueError when it is none."""
    try:
        reply = json.loads(text)
        choice, length = reply["choices"][0], reply["usage"]["completion_tokens"]
        completion, finish = choice["message"]["content"] or "", choice["finish_reason"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"malformed answer {text[:99]!r}") from error
    if finish == "abort":
        raise ValueError("the answer was broken off")
    return Sample(prompt, [], [], "length" if finish == "length" else "stop", completion, length)
