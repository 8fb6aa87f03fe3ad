"""The provider as a witness: it remembers every generation, what of it was sent, and who didn't wait for the end.

It speaks HTTP and shares no code with the product. The same application answers as a provider on a port and, behind
`engine.py`, as the engine of a worker's own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.faults.prompts import Prompt, Word

BODY_BYTES_MAX = 1024 * 1024
TOKEN_IDS_FROM = 1000  # the id of an answer's word is its place, from here on
STOP_WAIT_S = 1.0


@dataclass(slots=True)
class Generation:
    """One answer that was begun. *start* words of it, *given*, were there before."""

    prompt: Prompt
    number: int
    given: str
    start: int
    began_s: float
    said: int = 0  # words that were sent, those that were given not counted
    whole: bool = False
    ended_s: float | None = None

    @property
    def reached(self) -> int:
        """How far the answer has come, in words."""
        return self.start + self.said


class Witness:
    """``async with Witness() as witness``: it listens on *port*."""

    def __init__(self) -> None:
        self.generations: defaultdict[str, list[Generation]] = defaultdict(list)  # by the prompt's name
        self.answering = 0
        self.port = 0
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/health", _healthy)
        app.router.add_get("/v1/models", _models)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=STOP_WAIT_S)

    async def start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    def forget(self) -> None:
        self.generations.clear()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = Prompt.read(_asked(body["messages"]))
        if prompt is None:  # a worker asks what we can do
            prompt = Prompt("probe", 1, 0)
        generation = self._begin(prompt, _given(body))
        self.answering += 1
        try:
            said = await (_stream if body.get("stream") else _whole)(request, body, generation)
            generation.whole = True
        except ConnectionError:  # nobody waits for the rest
            return web.Response()
        finally:
            self.answering -= 1
            generation.ended_s = time.monotonic()
        return said

    def _begin(self, prompt: Prompt, given: str) -> Generation:
        earlier = self.generations[prompt.name]
        made = Generation(prompt, len(earlier) + 1, given, start=len(given.split()), began_s=time.monotonic())
        if prompt.name != "probe":
            earlier.append(made)
        return made


async def _stream(request: web.Request, body: dict[str, Any], generation: Generation) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    with_ids = body.get("return_token_ids") is True
    for place in range(generation.start, generation.prompt.words):
        await asyncio.sleep(generation.prompt.pace_ms / 1000)
        chunk = _chunk({"content": _word(generation, place)})
        if with_ids:
            chunk["choices"][0]["token_ids"] = [TOKEN_IDS_FROM + place]
            if place == generation.start:
                chunk["prompt_token_ids"] = list(generation.prompt.text.encode())
        await _say(answer, chunk)
        generation.said += 1
    await _say(answer, _chunk({}, finish="stop"))
    if (body.get("stream_options") or {}).get("include_usage"):
        await _say(answer, {**_chunk({}), "choices": [], "usage": _usage(generation)})
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


async def _whole(_: web.Request, body: dict[str, Any], generation: Generation) -> web.StreamResponse:
    prompt = generation.prompt
    await asyncio.sleep(prompt.pace_ms / 1000 * prompt.words)
    text = "".join(_word(generation, place) for place in range(prompt.words))
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if body.get("return_token_ids") is True:
        choice["token_ids"] = [TOKEN_IDS_FROM + place for place in range(prompt.words)]
    generation.said = prompt.words
    common = {"id": "chatcmpl-witness", "object": "chat.completion", "created": 1, "model": "witness"}
    return web.json_response({**common, "choices": [choice], "usage": _usage(generation)})


async def _say(answer: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await answer.write(f"data: {json.dumps(chunk)}\n\n".encode())


def _chunk(delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    common = {"id": "chatcmpl-witness", "object": "chat.completion.chunk", "created": 1, "model": "witness"}
    return {**common, "choices": [choice]}


def _word(generation: Generation, place: int) -> str:
    return Word(generation.prompt.name, place, generation.number).piece


def _usage(generation: Generation) -> dict[str, Any]:
    """As a provider counts: what it was given to continue is part of its prompt."""
    prompt_tokens = generation.prompt.tokens + generation.start
    completion_tokens = generation.prompt.words - generation.start
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.prompt.cached_tokens},
    }


def _asked(messages: list[dict[str, Any]]) -> str:
    return next(str(message["content"]) for message in reversed(messages) if message["role"] == "user")


def _given(body: dict[str, Any]) -> str:
    """The beginning of the answer that the request has: what is to be continued."""
    last = body["messages"][-1]
    return str(last["content"]) if last["role"] == "assistant" else ""


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({})


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "witness", "object": "model"}]})
