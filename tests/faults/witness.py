"""The provider as a witness: it remembers every generation, what of it was sent, and who didn't wait for the end.

It speaks HTTP and shares no code with the product. The same application answers as a provider on a port and, behind
`engine.py`, as the engine of a worker's own, which can do what vLLM can: token ids, and going on with an answer behind its tokens
(``/v1/completions``) or behind its text (``continue_final_message``).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.faults.prompts import Prompt, Word

BODY_BYTES_MAX = 1024 * 1024
CONTEXT_TOKENS = 4096
ROLE_TOKENS = 4  # what a message more costs a prompt
STOP_WAIT_S = 1.0


@dataclass(slots=True)
class Generation:
    """One answer that was begun. *start* words of it, *given*, were there before."""

    prompt: Prompt
    number: int
    given: str
    start: int
    began_s: float
    asked_as: str = ""  # what who asked calls it: its request and attempt; an earlier release doesn't tell
    said: int = 0  # words that were sent, those that were given not counted
    whole: bool = False
    ended_s: float | None = None

    @property
    def name(self) -> str:
        """What the provider calls its answer; the worker's receipt has it."""
        return f"chatcmpl-{self.prompt.name}.{self.number}"

    @property
    def reached(self) -> int:
        """How far the answer has come, in words."""
        return self.start + self.said

    def word(self, place: int) -> str:
        return Word(self.prompt.name, place, self.number).piece

    def usage(self, *, roles: int = 0) -> dict[str, Any]:
        """As a provider counts: what it was given to continue is part of its prompt."""
        prompt_tokens = self.prompt.tokens + self.start + roles * ROLE_TOKENS
        completion_tokens = self.prompt.words - self.start
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.prompt.cached_tokens},
        }


class Vocabulary:
    """A number for each piece of text that was ever asked or said, as a tokenizer has."""

    def __init__(self) -> None:
        self._pieces: list[str] = [""]

    def ids_of(self, prompt: Prompt) -> list[int]:
        """As many as the prompt has tokens; all of its text is in the first."""
        return [self.id_of(prompt.text)] + [0] * (prompt.tokens - 1)

    def id_of(self, piece: str) -> int:
        self._pieces.append(piece)
        return len(self._pieces) - 1

    def text_of(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[number] for number in ids)


class Witness:
    """It listens on *port* once it is started."""

    def __init__(self) -> None:
        self.generations: defaultdict[str, list[Generation]] = defaultdict(list)  # by the prompt's name
        self.answering = 0
        self.port = 0
        self._vocabulary = Vocabulary()
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/health", _healthy)
        app.router.add_get("/v1/models", _models)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
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

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        messages = body["messages"]
        asked = next(str(message["content"]) for message in reversed(messages) if message["role"] == "user")
        last = messages[-1] if messages[-1]["role"] == "assistant" else None
        goes_on = body.get("continue_final_message") is True and last is not None
        given = str(last["content"]) if last is not None and goes_on else ""
        generation = self._begin(request, Prompt.read(asked), given)
        answer = ChatAnswer(generation, body, self._vocabulary, roles=int(last is not None and not goes_on))
        return await self._say(request, answer, generation, stream=bool(body.get("stream")))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked, *said = body["prompt"]
        prompt = Prompt.read(self._vocabulary.text_of([asked]))
        generation = self._begin(request, prompt, self._vocabulary.text_of(said))
        return await self._say(request, TokensAnswer(generation, body, self._vocabulary), generation, stream=True)

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": self._vocabulary.text_of((await request.json())["tokens"])})

    async def _say(
        self, request: web.Request, answer: ChatAnswer, generation: Generation, *, stream: bool
    ) -> web.StreamResponse:
        self.answering += 1
        try:
            said = await (_stream if stream else _whole)(request, answer, generation)
            generation.whole = True
        except ConnectionError:  # nobody waits for the rest
            return web.Response()
        finally:
            self.answering -= 1
            generation.ended_s = time.monotonic()
        return said

    def _begin(self, request: web.Request, prompt: Prompt | None, given: str) -> Generation:
        """Without a prompt of ours, a worker asks what we can do: that is forgotten."""
        known = prompt or Prompt("probe", 1, 0)
        earlier = self.generations[known.name] if prompt is not None else []
        made = Generation(known, len(earlier) + 1, given, start=len(given.split()), began_s=time.monotonic())
        made.asked_as = request.headers.get("x-client-request-id", "")
        earlier.append(made)
        return made


class ChatAnswer:
    """How a generation looks as a chat's answer."""

    kind = "chat.completion"

    def __init__(self, generation: Generation, body: dict[str, Any], vocabulary: Vocabulary, *, roles: int = 0) -> None:
        self.usage = generation.usage(roles=roles)
        self.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._generation = generation
        self._vocabulary = vocabulary
        self._with_ids = body.get("return_token_ids") is True

    def whole(self, text: list[str]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(text)}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if self._with_ids:
            choice["token_ids"] = [self._vocabulary.id_of(piece) for piece in text]
        return {**self._head(), "object": self.kind, "choices": [choice], "usage": self.usage}

    def chunk(self, piece: str, *, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, **self._said(piece), "finish_reason": None}
        made = {**self._head(), "choices": [choice]}
        if self._with_ids:
            choice["token_ids"] = [self._vocabulary.id_of(piece)]
            if first:
                made["prompt_token_ids"] = self._vocabulary.ids_of(self._generation.prompt)
        return made

    def last(self) -> dict[str, Any]:
        return {**self._head(), "choices": [{"index": 0, **self._said(""), "finish_reason": "stop"}]}

    def counted(self) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": self.usage}

    def _said(self, piece: str) -> dict[str, Any]:
        return {"delta": {"content": piece} if piece else {}}

    def _head(self) -> dict[str, Any]:
        return {"id": self._generation.name, "object": f"{self.kind}.chunk", "created": 1, "model": "witness"}


class TokensAnswer(ChatAnswer):
    """How it looks behind tokens."""

    kind = "text_completion"

    def _said(self, piece: str) -> dict[str, Any]:
        return {"text": piece}


async def _stream(request: web.Request, said: ChatAnswer, generation: Generation) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    for place in range(generation.start, generation.prompt.words):
        await asyncio.sleep(generation.prompt.pace_ms / 1000)
        await _event(answer, said.chunk(generation.word(place), first=place == generation.start))
        generation.said += 1
    await _event(answer, said.last())
    if said.wants_usage:
        await _event(answer, said.counted())
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


async def _whole(_: web.Request, said: ChatAnswer, generation: Generation) -> web.StreamResponse:
    prompt = generation.prompt
    await asyncio.sleep(prompt.pace_ms / 1000 * prompt.words)
    generation.said = prompt.words - generation.start
    return web.json_response(said.whole([generation.word(place) for place in range(generation.start, prompt.words)]))


async def _event(answer: web.StreamResponse, told: dict[str, Any]) -> None:
    await answer.write(f"data: {json.dumps(told)}\n\n".encode())


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({})


async def _models(_: web.Request) -> web.Response:
    served = [{"id": name, "object": "model", "max_model_len": CONTEXT_TOKENS} for name in ("rented", "owned")]
    return web.json_response({"object": "list", "data": served})
