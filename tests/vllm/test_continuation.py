"""An answer that one engine began and another goes on with is, byte for byte, the answer of one engine: wherever it is cut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec import Raw

from ingress.delivered import Delivered
from schemas.chat import decode_request
from schemas.errors import NotContinued
from schemas.frames import Delta
from schemas.ids import RequestId, RouteId
from schemas.jobs import Continuation, Continues
from schemas.settings import ModelSettings, RouteSettings, VllmSettings, WorkerSettings
from tests.factories import new_job
from tests.vllm.engine import MODEL, Engine, tiny_model_folder
from tests.vllm.tiny_model import COUNT, GREETING, HELLO, THINK, WEATHER_TOOL, Conversation
from tests.waiting import eventually
from workers.providers.base import Chunk
from workers.providers.sse import EventSplitter
from workers.providers.vllm import Vllm
from workers.seam import seamless

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def asking(conversation: Conversation, **members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": conversation.messages, "temperature": 0, "stream": True, **members}


CUTS_LEAST = 4
TRIES_MAX = 5  # a busy engine tells several tokens in an event, which leaves fewer places to cut at
CASES: dict[str, dict[str, Any]] = {
    "text": asking(HELLO),
    "half characters": asking(GREETING),
    "half characters, logprobs": asking(GREETING, logprobs=True, top_logprobs=2),
    "logprobs": asking(COUNT, logprobs=True),
    "stop": asking(COUNT, stop=[" twelve thirteen", "nothing"]),
    "stop that nearly comes": asking(COUNT, stop=["eleven twelve nothing", "ten eleven twelve!"]),
    "stop in a half character": asking(GREETING, stop=["Ünïcödé"]),
    "stops that end together": asking(COUNT, stop=["eight nine", " nine"]),
    "stop that is told, too": asking(COUNT, stop=["nine ten"], include_stop_str_in_output=True),
    "stop after some tokens": asking(COUNT, stop=["two", "fourteen"], min_tokens=4),
    "limit": asking(COUNT, max_tokens=12),
    "newer limit": asking(GREETING, max_completion_tokens=21),
    "repetition penalty": asking(HELLO, repetition_penalty=1.1, max_tokens=40),
    "bias": asking(COUNT, logit_bias={"100": 1.5}, max_tokens=30),
    "garbage": asking(HELLO, logit_bias={"2": -100}, max_tokens=60),  # the end of the answer is forbidden
    "garbage with a stop": asking(HELLO, logit_bias={"2": -100}, max_tokens=60, stop=["qqq", "\n\n\n"]),
    "parts": {**asking(HELLO), "messages": [{"role": "user", "content": [{"type": "text", "text": HELLO.question}]}]},
    "tools that may not be called": asking(HELLO, tools=[WEATHER_TOOL], tool_choice="none", max_tokens=30),
}


@dataclass
class Told:
    """What a client has."""

    text: str = ""
    reasoning: str = ""
    roles: int = 0
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0
    ids: list[int] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.tokens += chunk.tokens
        self.ids += chunk.token_ids
        for choice in [choice for piece in chunk.pieces for choice in json.loads(piece)["choices"]]:
            assert self.finish is None, "something behind the end"
            self.text += choice["delta"].get("content") or ""
            self.reasoning += choice["delta"].get("reasoning") or ""
            self.roles += "role" in choice["delta"]
            self.logprobs += (choice.get("logprobs") or {}).get("content") or []
            self.finish = choice.get("finish_reason")


@asynccontextmanager
async def provider_of(engine: Engine) -> AsyncIterator[Vllm]:
    route = RouteSettings(
        id=RouteId("r"),
        provider="vllm",
        base_url=f"{engine.base_url}/v1",
        models=(ModelSettings(name="m", upstream=MODEL),),
        vllm=VllmSettings(model=str(tiny_model_folder())),
    )
    provider = Vllm.from_route(route, WorkerSettings())
    told: list[str | None] = []
    provider.attach(told.append)
    await eventually(lambda: told and told[-1] is None, timeout_s=60, what="the engine is probed")
    yield provider
    await provider.aclose()


@pytest.fixture
async def first(engine: Engine) -> AsyncIterator[Vllm]:
    async with provider_of(engine) as provider:
        yield provider


@pytest.fixture
async def second(other_engine: Engine) -> AsyncIterator[Vllm]:
    async with provider_of(other_engine) as provider:
        yield provider


async def whole(provider: Vllm, body: dict[str, Any]) -> list[Chunk]:
    """Event by event, however many of them the engine sends together: an answer may break off between any two."""
    job = new_job(body)
    reader, events, patience = provider._reader(), EventSplitter(1024 * 1024), provider._patience(job)
    reader.habits.request = job.body
    answer = await provider._ask(job, patience)
    chunks: list[Chunk] = []
    while not reader.done:
        data = await answer.read(patience)
        assert data, "the answer ended early"
        chunks += [chunk for event in events.feed(data) if (chunk := reader.event(*event)) is not None]
    answer.close()
    return chunks


async def gone_on_with(provider: Vllm, body: dict[str, Any], before: Continuation) -> list[Chunk]:
    return [chunk async for chunk in seamless(provider.generate(new_job(body, continuation=before)))]


def delivered_of(body: dict[str, Any], chunks: list[Chunk]) -> Delivered:
    """As the ingress sees it."""
    raw = json.dumps(body).encode()
    delivered = Delivered(decode_request(raw), raw)
    for seq, chunk in enumerate(chunks):
        members = tuple(map(Raw, chunk.pieces))
        ids, prompt = chunk.token_ids, chunk.prompt_token_ids
        frame = Delta(
            request_id=RequestId("r"),
            epoch=1,
            seq=seq,
            chunks=members,
            tokens=chunk.tokens,
            token_ids=ids,
            prompt_token_ids=prompt,
        )
        delivered.add(frame)
    assert delivered.why_not() is None
    return delivered


def told(*parts: list[Chunk]) -> Told:
    found = Told()
    for chunk in (chunk for part in parts for chunk in part):
        found.add(chunk)
    return found


def comparable(logprobs: list[Any]) -> list[Any]:
    """Two engines may differ in the last bits; and of two alternatives that read the same (halves of characters) one is told."""
    return [(one["token"], round(one["logprob"], 2), {top["token"] for top in one["top_logprobs"]}) for one in logprobs]


async def test_reasoning_that_was_told_whole_is_followed_and_half_of_it_is_not(first: Vllm, second: Vllm) -> None:
    body = asking(THINK, reasoning_effort="low")
    unbroken = await whole(first, body)
    wanted = told(unbroken)
    assert wanted.reasoning
    assert wanted.text
    followed = 0
    for cut in range(2, len(unbroken) - 2):
        before = unbroken[:cut]
        continuation = delivered_of(body, before).continuation(exact=True)
        if told(before).text.strip():
            found = told(before, await gone_on_with(second, body, continuation))
            assert (found.text, found.ids, found.finish) == (wanted.text, wanted.ids, wanted.finish)
            followed += 1
        elif told(before).reasoning:
            with pytest.raises(NotContinued):
                await gone_on_with(second, body, continuation)
    assert followed


@pytest.mark.parametrize("body", [asking(HELLO), asking(COUNT, max_tokens=12)], ids=["text", "limit"])
async def test_without_ids_it_goes_on_behind_the_text(first: Vllm, second: Vllm, body: dict[str, Any]) -> None:
    """At the end of a token: this model tells where its tokens end in the same way when it reads them."""
    unbroken = await whole(first, body)
    wanted = told(unbroken)
    last = next(i for i, chunk in enumerate(unbroken) if chunk.finish_reason is not None)
    for cut in range(2, last):
        before = unbroken[:cut]
        onward = await gone_on_with(second, body, delivered_of(body, before).continuation(exact=False))
        found = told(before, onward)
        assert (found.text, found.finish, found.roles) == (wanted.text, wanted.finish, 1)
        assert found.tokens == wanted.tokens


async def test_the_engine_goes_on_exactly(first: Vllm) -> None:
    assert first.continues("m") is Continues.EXACT
    assert first.powers.prefix


@pytest.mark.parametrize("case", CASES)
async def test_a_continuation_is_the_unbroken_answer_wherever_it_is_cut(first: Vllm, second: Vllm, case: str) -> None:
    body = CASES[case]
    for _ in range(TRIES_MAX):
        unbroken = await whole(first, body)
        last = next(i for i, chunk in enumerate(unbroken) if chunk.finish_reason is not None)
        cuts = range(2, last + 1)  # behind the role and a first token, and before the end
        if len(cuts) >= CUTS_LEAST:
            break
    assert len(cuts) >= CUTS_LEAST
    wanted = told(unbroken)
    for cut in cuts:
        before = unbroken[:cut]
        if told(before).tokens < body.get("min_tokens", 0):
            continue  # then stops don't count yet, and it is not exact
        onward = await gone_on_with(second, body, delivered_of(body, before).continuation(exact=True))
        found = told(before, onward)
        at = f"cut behind {told(before).text!r}"
        assert found.text == wanted.text, at
        assert (found.finish, found.roles) == (wanted.finish, 1), at
        assert found.ids == wanted.ids, at
        assert found.tokens == wanted.tokens, at
        assert comparable(found.logprobs) == comparable(wanted.logprobs), at
        assert onward[-1].usage is not None
