"""Where a route's jobs come from: one puller for all of them or, in a pool of machines, one for each model.

A pool's machines serve different models under one route, so each asks for jobs of the models that it has and no others. Its
slots are shared between the models: each puller asks for one job at a time, and not while all slots are taken. A job that
comes when the last slot has just gone is given back, and its puller asks again when a slot is free: nothing goes in circles.
Source: docs/adr/0042-pools-of-machines.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bus.connection import Connection, Message
from bus.puller import Puller
from bus.streams import ensure_consumer, ensure_streams, job_consumer
from schemas import subjects
from schemas.ids import RouteId
from schemas.jobs import Lane
from schemas.settings import NatsSettings

Take = Callable[[Message, Puller], None]


class Intake:
    """*take* gets each job, and the puller that it came by.

    It must tell what became of the job: `returned`, `refused` or `taken`; and `freed` when the slot is free again. A slot may be
    `lent` to a job that didn't come from here.
    """

    def __init__(
        self, connection: Connection, route: RouteId, *, slots: int, nats_settings: NatsSettings, take: Take, pool: bool
    ) -> None:
        self._connection = connection
        self._route = route
        self._slots = slots
        self._nats_settings = nats_settings
        self._take = take
        self._pool = pool
        self._pullers: dict[str | None, Puller] = {}  # by model; None stands for all
        self._owed: set[Puller] = set()  # of a pool: they ask again when a slot is free
        self._paused = False

    async def start(self, models: tuple[str, ...]) -> None:
        """Begins to ask for jobs. It may be called again where it failed. Raises: ApiError, BusUnavailable."""
        for model in models if self._pool else (None,):
            if model not in self._pullers:
                await self._open(model)

    async def widen(self, models: tuple[str, ...]) -> None:
        """Asks for jobs of these *models* too, in a pool. Raises: ApiError, BusUnavailable."""
        for model in models if self._pool else ():
            if model not in self._pullers:
                await self._open(model)

    async def narrow(self, models: tuple[str, ...]) -> None:
        """Asks for jobs of no other than these *models*, in a pool."""
        gone: list[str | None] = [model for model in self._pullers if model is not None and model not in models]
        await self._close(gone)

    async def stop(self) -> None:
        """Returns when what the server had sent is handed on."""
        await self._close(list(self._pullers))

    def pause(self) -> None:
        self._paused = True
        for puller in self._pullers.values():
            puller.pause()

    def resume(self) -> None:
        self._paused = False
        for puller in self._pullers.values():
            puller.resume()

    def returned(self, puller: Puller) -> None:
        """The job was none to be done here; it took no slot."""
        puller.grant(1)

    def refused(self, puller: Puller) -> None:
        """There was no slot for the job."""
        self._owe(puller)

    def taken(self, puller: Puller, *, free: int) -> None:
        """The job took a slot; *free* are left."""
        if self._pool and free > 0:
            puller.grant(1)
        elif self._pool:
            self._owe(puller)

    def resized(self, more: int) -> None:
        """There are so many *more* slots than before; fewer, if it is negative."""
        self._slots += more
        if self._pool:
            self.freed()
            return
        for puller in self._pullers.values():
            puller.grant(more)

    def lent(self) -> None:
        """A slot went to a job that came from elsewhere. What was asked for it may still come, and is `refused` then."""
        if not self._pool:
            for puller in self._pullers.values():
                puller.grant(-1)

    def freed(self) -> None:
        """A slot is free again."""
        owed = self._owed if self._pool else set(self._pullers.values())
        self._owed = set()
        for puller in owed:
            puller.grant(1)

    def _owe(self, puller: Puller) -> None:
        if self._pool:
            self._owed.add(puller)
        else:  # it has credit for each free slot, so this was a job too many, and its credit too
            puller.grant(1)

    async def _open(self, model: str | None) -> None:
        async def ensure() -> str:
            # The streams first: JOBS lives in memory, and a server that was restarted has forgotten it.
            await ensure_streams(self._connection, self._nats_settings)
            config = job_consumer(route=self._route, lane=Lane.INTERACTIVE, model=model)
            answer = await ensure_consumer(self._connection, subjects.JOBS, config)
            return str(answer["name"])

        def on_message(msg: Message) -> None:
            self._take(msg, puller)

        puller = Puller(self._connection, stream=subjects.JOBS, ensure=ensure, on_message=on_message)
        if self._paused:
            puller.pause()
        await puller.start()
        (puller.pause if self._paused else puller.resume)()  # an engine may have become ready meanwhile, or ill
        self._pullers[model] = puller
        puller.grant(1 if self._pool else self._slots)

    async def _close(self, models: list[str | None]) -> None:
        pullers = [self._pullers.pop(model) for model in models]
        self._owed.difference_update(pullers)
        await asyncio.gather(*(puller.stop() for puller in pullers))
