"""What a worker has put on record of an attempt, for an ingress that missed its last word."""

from __future__ import annotations

import asyncio

import msgspec

from bus.connection import ApiError, BusUnavailable, Connection
from bus.log import last_page
from schemas.events import AttemptFinished
from schemas.ids import WorkerId
from schemas.jobs import Job
from schemas.money import Usage
from schemas.upcasters import read_event

LOOK_WITHIN_S = 1.0


class Receipts:
    """The log is written to be read by the ledger. Here only the last page of one worker is looked at, which is one call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def usage(self, job: Job, worker: WorkerId) -> Usage | None:
        """What the provider reported for *job* at *worker*; None if that is not in the last page, or can't be read in time."""
        try:
            async with asyncio.timeout(LOOK_WITHIN_S):
                lines = await last_page(self._connection, producer=worker)
        except (ApiError, BusUnavailable, TimeoutError):
            return None
        for line in lines:
            try:
                event = read_event(line)
            except msgspec.MsgspecError:
                continue
            if isinstance(event, AttemptFinished) and (event.request_id, event.epoch) == (job.request_id, job.epoch):
                return event.usage
        return None
