"""Evaluation by any OpenAI-compatible server: models that our engines cannot sample.

  vllm serve MODEL --generation-config vllm    (or SGLang, or a hosted service)

Without that flag vLLM adds the model's own settings, e.g. a repetition penalty. The key is
EVAL_API_KEY or OPENAI_API_KEY.
"""

import asyncio
import hashlib
import json
import re
from pathlib import Path

import aiohttp
import numpy as np
import torch.distributed as dist

from nano.data import MARK, Record, opened
from nano.packing import Prompt
from nano.rollout import Sample
from nano.run import for_people
from nano.teachers import Client, image_part, open_session

WAITS = (0, 1, 2, 4, 8, 16, 32, 60)  # seconds before each try
PATIENCE = 30.0  # seconds until we ask if the server is alive
AGAIN = "Start it again and repeat the command: answered questions are kept."
TOO_LONG = "Too long for the server? Lower --max_len or give it more context."
TOO_LONG += " Few servers go on with a --prefill: vLLM and SGLang do."
HINTS = {"bad request": TOO_LONG, "context overflow": TOO_LONG}
HINTS["wrong key"] = "Set EVAL_API_KEY to a key that it takes."
HINTS["unknown model"] = "The URL goes up to and with /v1, its /models must list the model."


class HTTPEngine(Client):
    """Asks the servers at `urls`: rank r the r-th of them, modulo their number."""

    def __init__(
        self, urls: str, model_name: str, system_prompt="", prefill="", min_pixels=0, max_pixels=0
    ):
        servers = [url.strip().rstrip("/") for url in urls.split(",")]
        if not all(re.match("https?://", url) for url in servers):
            raise SystemExit(f"error: --url {urls!r}: it must look like http://HOST:8000/v1")
        super().__init__(servers[dist.get_rank() % len(servers)], "EVAL_API_KEY")
        self.model_name = model_name
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        # What vLLM and SGLang must be told beside the messages.
        pixels = dict(min_pixels=min_pixels, max_pixels=max_pixels)
        pixels = {name: limit for name, limit in pixels.items() if limit}
        self.more = {"mm_processor_kwargs": pixels} if pixels else {}
        if prefill:
            self.more |= {"continue_final_message": True, "add_generation_prompt": False}
        self.prefill = [{"role": "assistant", "content": prefill}] if prefill else []
        self.opening = prefill[max(0, prefill.find("<think>")) :]

    def fingerprint(self) -> str:
        """What can be known of the weights: the model's name and what the server says of it."""

        async def models() -> dict:
            async with open_session(PATIENCE) as session:
                async with session.get(f"{self.url}/models", **self.how) as answer:
                    return json.loads(await answer.text())

        try:
            known = {str(model["id"]): model for model in asyncio.run(models())["data"]}
            about = known.get(self.model_name, {})
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError, TypeError):
            about = {}  # some services do not list their models
        about = {k: v for k, v in about.items() if k not in ("created", "permission")}  # change
        text = json.dumps([self.model_name, about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
        async with open_session(None) as self.session:
            return await asyncio.gather(*(self.answer(gate, *ask, settings) for ask in asks))

    async def answer(self, gate, prompt: Prompt, seed: tuple, settings: dict) -> Sample:
        """One answer. A passing trouble is waited out, another ends the run."""
        async with gate:
            body = {"model": self.model_name, "messages": self.messages(prompt.record), **settings}
            body |= self.more
            body["seed"] = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)  # 31 bits
            for wait in WAITS:
                await asyncio.sleep(wait)
                kind, reply = await self.patiently(json.dumps(body).encode())
                if kind == "ok" and reply["finish"] != "abort":
                    finish = "length" if reply["finish"] == "length" else "stop"
                    text = self.opening + reply["text"]
                    return Sample(prompt, [], [], finish, text, reply["out"])
                if kind not in ("ok", "busy or down", "failed"):
                    break
        who = f"{self.url}, model {self.model_name!r}, question {prompt.record.id}"
        raise ValueError(f"{who}: {reply}\n{HINTS.get(kind, AGAIN)}")

    def messages(self, record: Record) -> list[dict]:
        """A chat whose pictures stand at the <image> marks."""
        pictures, content = map(picture, record.images), []
        for part in filter(None, re.split(f"({MARK})", record.problem)):
            content.append(next(pictures) if part == MARK else {"type": "text", "text": part})
        own = [{"role": "system", "content": record.system}] if record.system else []
        return [*(self.system or own), {"role": "user", "content": content}, *self.prefill]

    async def patiently(self, body: bytes) -> tuple[str, dict | str]:
        """As attempt, but hours may pass, as long as the server is alive."""
        post = asyncio.ensure_future(self.attempt(self.session, body))
        alive = {"timeout": aiohttp.ClientTimeout(total=PATIENCE), **self.how}
        try:
            while not (await asyncio.wait([post], timeout=PATIENCE))[0]:
                (await self.session.get(f"{self.url}/models", **alive)).release()
            return (await post)[:2]
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return "failed", f"{type(error).__name__}: {error}"
        finally:
            post.cancel()


def picture(image: str | bytes) -> dict:
    with opened(image):  # It names a broken file.
        return image_part(image if isinstance(image, bytes) else Path(image).read_bytes())
