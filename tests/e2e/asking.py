"""What clients do, and how it ended for them."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import openai

from tests.e2e.deployment import MODEL, Deployment
from tests.stopwatch import Stopwatch
from tests.waiting import eventually


class Heard(NamedTuple):
    """What one client got. *code* is the error's, None if there was none."""

    request_id: str
    text: str
    code: str | None = None
    status: int | None = None
    tokens: int | None = None  # as the usage says that it was told


def messages(content: str) -> Any:
    return [{"role": "user", "content": content}]


async def ask(client: openai.AsyncOpenAI, content: str = "one two three", **more: Any) -> Heard:
    """One answer without streaming, or the refusal."""
    asked = {"model": MODEL, "messages": messages(content), **more}
    try:
        raw = await client.chat.completions.with_raw_response.create(**asked)
    except openai.APIStatusError as error:
        return Heard(error.request_id or "", "", error.code, error.status_code)
    answer = raw.parse()
    assert answer.usage is not None
    texts = [choice.message.content or "" for choice in answer.choices]
    return Heard(raw.headers["x-request-id"], "|".join(texts), status=200, tokens=answer.usage.completion_tokens)


async def read(
    client: openai.AsyncOpenAI, content: str = "one two three", *, leave_after: int = 10**9, **more: Any
) -> Heard:
    """A stream to its end, or to the error in it, or up to so many chunks."""
    options = {"include_usage": True}
    asked = {"model": MODEL, "messages": messages(content), "stream": True, "stream_options": options, **more}
    try:
        stream = await client.chat.completions.create(**asked)
    except openai.APIStatusError as error:
        return Heard(error.request_id or "", "", error.code, error.status_code)
    request_id = stream.response.headers["x-request-id"]
    text, count, tokens = "", 0, None
    try:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            tokens = chunk.usage.completion_tokens if chunk.usage else None
            count += 1
            if count >= leave_after:
                break
    except openai.APIError as error:
        return Heard(request_id, text, error.code, 200)
    finally:
        await stream.close()
    return Heard(request_id, text, status=200, tokens=tokens)


async def row(up: Deployment, request_id: str) -> dict[str, Any]:
    """The ledger's one row of a request that is over."""

    def found() -> list[dict[str, Any]]:
        return up.sql("SELECT * FROM requests WHERE request_id = ? AND status <> 'open'", request_id)

    (only,) = await eventually(found, what=f"the row of {request_id}", every_s=0.05)
    return only


async def works(up: Deployment, *, timeout_s: float = 15.0) -> float:
    """How long it takes until a request is answered, without what its processes stood in line for a processor."""
    watch = Stopwatch()
    async with up.sdk() as client:
        while True:
            try:
                heard = await ask(client)
            except openai.APIConnectionError:
                heard = Heard("", "", "no connection")
            if heard.code is None:
                return watch.s
            assert watch.s < timeout_s, heard
            await asyncio.sleep(0.02)
