"""Steady load from real SDK clients, and a record of what each of them was told, word by word."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

import httpx
import openai

from tests.faults.deployment import API_KEY
from tests.faults.prompts import Prompt

CLIENT_TIMEOUT_S = 60.0  # longer than any answer may take: who waits longer was forgotten
WORDS_MAX = 40
PACES_MS = (2, 5, 10, 20)
STREAMS = 0.6  # of the requests; the others want the answer whole
LEAVERS = 0.2
REFUSED_WAIT_S = 0.2  # before the next request, as a client does that was told to retry


class End(StrEnum):
    """How it ended for the client."""

    COMPLETED = "completed"
    FAILED = "failed"  # with an error that says so
    LEFT = "left"  # it hung up
    BROKEN = "broken"  # its connection did
    SILENT = "silent"  # the answer stopped without an error or a reason
    HUNG = "hung"  # nothing came, not even an end


@dataclass(slots=True)
class Record:
    """One request as its client saw it."""

    prompt: Prompt
    model: str
    stream: bool
    began_s: float
    ended_s: float = 0.0
    end: End = End.SILENT
    request_id: str | None = None
    status: int | None = None
    code: str | None = None
    text: str = ""
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None  # tokens of the prompt and of the answer
    attempts: int | None = None  # as the header says


class Load:
    """*clients* of them, each with one request at a time, until `stop`."""

    def __init__(self, base_urls: Sequence[str], models: Sequence[str], *, clients: int, seed: str) -> None:
        self.records: list[Record] = []
        self._models = models
        self._sdks = [
            openai.AsyncOpenAI(base_url=url, api_key=API_KEY, max_retries=0, timeout=CLIENT_TIMEOUT_S)
            for url in base_urls
        ]
        self._clients = clients
        self._seed = seed
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def under_way(self) -> int:
        return sum(1 for task in self._tasks if not task.done())

    def start(self, *, series: str) -> None:
        """*series* makes the prompts' names unique in a run."""
        self._stopping.clear()
        self._tasks = [
            asyncio.create_task(self._client(f"{series}{number}", Random(f"{self._seed}/{series}/{number}")))
            for number in range(self._clients)
        ]

    async def stop(self) -> list[Record]:
        """Returns the records when the last request has ended, and forgets them."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        records, self.records = self.records, []
        return records

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sdk in self._sdks:
            await sdk.close()

    async def _client(self, name: str, dice: Random) -> None:
        number = 0
        while not self._stopping.is_set():
            number += 1
            prompt = Prompt(f"{name}-{number}", dice.randint(1, WORDS_MAX), dice.choice(PACES_MS))
            record = Record(prompt, dice.choice(self._models), dice.random() < STREAMS, time.monotonic())
            leaves_after_s = dice.uniform(0, 0.5) if dice.random() < LEAVERS else None
            self.records.append(record)
            await ask(dice.choice(self._sdks), record, leaves_after_s=leaves_after_s)
            if record.end in (End.FAILED, End.BROKEN):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), REFUSED_WAIT_S)


async def ask(sdk: openai.AsyncOpenAI, record: Record, *, leaves_after_s: float | None = None) -> None:
    """Makes the request of *record* and writes down what comes. Raises: nothing that a service can do."""
    try:
        async with asyncio.timeout(leaves_after_s):
            await (_read if record.stream else _receive)(sdk, record)
    except TimeoutError:
        record.end = End.LEFT
    except openai.APITimeoutError:
        record.end = End.HUNG
    except openai.APIStatusError as error:
        record.end, record.status, record.code = End.FAILED, error.status_code, error.code
        record.request_id = error.request_id
    except (openai.APIConnectionError, httpx.HTTPError):
        record.end = End.BROKEN
    except openai.APIError as error:  # said in the stream
        record.end, record.code = End.FAILED, error.code
    finally:
        record.ended_s = time.monotonic()


async def _receive(sdk: openai.AsyncOpenAI, record: Record) -> None:
    raw = await sdk.chat.completions.with_raw_response.create(**_asked(record))
    _note_head(record, raw.http_response)
    answer = raw.parse()
    (choice,) = answer.choices
    record.text, record.finish_reason = choice.message.content or "", choice.finish_reason
    if answer.usage is not None:
        record.usage = answer.usage.prompt_tokens, answer.usage.completion_tokens
    record.end = End.COMPLETED


async def _read(sdk: openai.AsyncOpenAI, record: Record) -> None:
    stream = await sdk.chat.completions.create(**_asked(record), stream=True, stream_options={"include_usage": True})
    try:
        _note_head(record, stream.response)
        async for chunk in stream:
            for choice in chunk.choices:
                record.text += choice.delta.content or ""
                record.finish_reason = choice.finish_reason or record.finish_reason
            if chunk.usage is not None:  # the last one before [DONE]
                record.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                record.end = End.COMPLETED
    finally:
        await stream.close()


def _asked(record: Record) -> dict[str, Any]:
    return {"model": record.model, "messages": record.prompt.messages}


def _note_head(record: Record, response: httpx.Response) -> None:
    record.status = response.status_code
    record.request_id = response.headers.get("x-request-id")
    record.attempts = int(response.headers.get("x-penstock-attempts", "1"))
