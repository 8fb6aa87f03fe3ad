"""Steady load from real SDK clients, and a record of what each of them was told, word by word."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random

import openai

import tests.sdk
from tests.faults.asking import ask, read_on
from tests.faults.deployment import API_KEY
from tests.faults.prompts import Prompt
from tests.faults.records import End, Record

CLIENT_TIMEOUT_S = 60.0  # longer than any answer may take: who waits longer was forgotten
WORDS_MAX = 40
PACES_MS = (2, 5, 10, 20)
STREAMS = 0.6  # of the requests; the others want the answer whole
LEAVERS = 0.2
KEYED = 0.2  # send an Idempotency-Key, and ask again when they got no answer, also when it was they who hung up
RESUMERS = 0.3  # of the streams: take up a broken one behind the last event that they heard
TRIES_MAX = 4
REFUSED_WAIT_S = 0.2  # before the next request, as a client does that was told to retry


class Load:
    """*clients* of them, each with one request at a time, until `stop`."""

    def __init__(self, base_urls: Sequence[str], models: Sequence[str], *, clients: int, seed: str) -> None:
        self.records: list[Record] = []
        self._models = models
        self._sdks = [tests.sdk.sdk(url, API_KEY, timeout_s=CLIENT_TIMEOUT_S) for url in base_urls]
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
            sdk, kind = dice.choice(self._sdks), dice.random()
            if kind < KEYED:
                await self._insist(sdk, replace(record, key=prompt.name), leaves_after_s)
            elif record.stream and kind < KEYED + RESUMERS:
                self.records.append(record)
                await read_on(partial(dice.choice, self._sdks), record, tries=TRIES_MAX)
            else:
                self.records.append(record)
                await ask(sdk, record, leaves_after_s=leaves_after_s)
            if self.records[-1].end in (End.FAILED, End.BROKEN):
                await self._pause()

    async def _insist(self, sdk: openai.AsyncOpenAI, record: Record, leaves_after_s: float | None) -> None:
        """Asks with a key, and again with the same one until there is an answer."""
        for _ in range(TRIES_MAX):
            self.records.append(record)
            await ask(sdk, record, leaves_after_s=leaves_after_s)
            if record.end not in (End.LEFT, End.BROKEN):
                return
            await self._pause()
            record, leaves_after_s = (
                Record(record.prompt, record.model, record.stream, time.monotonic(), key=record.key),
                None,
            )

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), REFUSED_WAIT_S)
