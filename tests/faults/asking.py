"""One request by the official SDK, in each way that there is, written down as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx2
import openai
from openai.types.chat import ChatCompletionChunk

from tests.faults.records import End, Record

RESUME_S = 30
AGAIN_S = 0.2
GONE = (404, 410)  # nobody has the answer any more
Events = openai.AsyncStream[ChatCompletionChunk]


async def ask(sdk: openai.AsyncOpenAI, record: Record, *, leaves_after_s: float | None = None) -> None:
    """Asks once; hangs up after *leaves_after_s*. Raises: nothing that a service can do."""
    await _heard(record, _read(sdk, record, {}) if record.stream else _receive(sdk, record), leaves_after_s)


async def read_on(pick: Callable[[], openai.AsyncOpenAI], record: Record, *, tries: int) -> None:
    """Asks for a stream, and goes on behind the last event when its connection breaks, at whichever ingress *pick* gives."""
    await _heard(record, _read(pick(), record, {"x-penstock-resume": str(RESUME_S)}))
    for _ in range(tries):
        if record.end is not End.BROKEN or record.request_id is None:
            return
        await asyncio.sleep(AGAIN_S)
        record.resumed += 1
        await _heard(record, _resume(pick(), record))
        if record.end is End.FAILED and record.status != 200:  # there is nothing to go on with: the break was the end
            gone = record.status in GONE
            record.end, record.status, record.code = End.BROKEN, 200, None
            if gone:
                return


async def _heard(record: Record, asking: Awaitable[None], leaves_after_s: float | None = None) -> None:
    record.end = End.SILENT
    try:
        # Not asyncio.timeout: who is cancelled by that while httpx closes several connections leaves them open but the first
        with anyio.move_on_after(leaves_after_s) as staying:
            await asking
        if staying.cancelled_caught:
            record.end = End.LEFT
    except openai.APITimeoutError:
        record.end = End.HUNG
    except openai.APIStatusError as error:
        record.end, record.status, record.code = End.FAILED, error.status_code, error.code
        record.request_id = error.request_id or record.request_id
    except (openai.APIConnectionError, httpx2.HTTPError):
        record.end = End.BROKEN
    except openai.APIError as error:  # said in the stream
        record.end, record.code = End.FAILED, error.code
    finally:
        record.ended_s = time.monotonic()


async def _receive(sdk: openai.AsyncOpenAI, record: Record) -> None:
    raw = await sdk.chat.completions.with_raw_response.create(**_asked(record, {}))
    _note_head(record, raw.http_response)
    answer = raw.parse()
    (choice,) = answer.choices
    record.text, record.finish_reason = choice.message.content or "", choice.finish_reason
    if answer.usage is not None:
        record.usage = answer.usage.prompt_tokens, answer.usage.completion_tokens
    record.end = End.COMPLETED


async def _read(sdk: openai.AsyncOpenAI, record: Record, headers: dict[str, str]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await sdk.chat.completions.create(**_asked(record, headers), **options)
    _note_head(record, stream.response)
    await _follow(stream, record)


async def _resume(sdk: openai.AsyncOpenAI, record: Record) -> None:
    stream = await sdk.get(
        f"/chat/completions/{record.request_id}",
        cast_to=ChatCompletionChunk,
        options={"headers": {"Last-Event-ID": str(record.events)}},
        stream=True,
        stream_cls=Events,
    )
    await _follow(stream, record)


async def _follow(stream: Events, record: Record) -> None:
    try:
        async for chunk in stream:
            record.events += 1
            for choice in chunk.choices:
                record.text += choice.delta.content or ""
                record.finish_reason = choice.finish_reason or record.finish_reason
            if chunk.usage is not None:  # the last one before [DONE]
                record.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if record.usage is not None:
            record.end = End.COMPLETED
    finally:
        await stream.close()


def _asked(record: Record, headers: dict[str, str]) -> dict[str, Any]:
    keyed = headers if record.key is None else {**headers, "Idempotency-Key": record.key}
    return {"model": record.model, "messages": record.prompt.messages, "extra_headers": keyed}


def _note_head(record: Record, response: httpx2.Response) -> None:
    record.status = response.status_code
    record.request_id = response.headers.get("x-request-id")
    record.attempts = int(response.headers.get("x-penstock-attempts", "1"))
