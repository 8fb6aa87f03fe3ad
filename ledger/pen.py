"""What the ledger itself writes to EVENTS: fences, and the ends of requests that nobody else can write any more."""

from __future__ import annotations

from collections.abc import Sequence

from bus.log import EventLog
from bus.publisher import Publisher
from schemas import subjects
from schemas.events import Event
from schemas.ids import IngressId

PRODUCER = "ledger"
FENCE_TIMEOUT_S = 5.0
RECORD_WAIT_S = 10.0


class LogPen:
    producer = PRODUCER

    def __init__(self, event_log: EventLog, publisher: Publisher) -> None:
        self._log = event_log
        self._publisher = publisher

    async def fence(self, ingress: IngressId) -> int:
        """Raises: ApiError, BusUnavailable."""
        return await self._publisher.publish(subjects.fence(ingress), b"", timeout_s=FENCE_TIMEOUT_S)

    async def record(self, events: Sequence[Event]) -> None:
        """Raises: LogUnavailable."""
        appended = [self._log.append(event) for event in events]
        for each in appended:
            await self._log.durable(each, within_s=RECORD_WAIT_S)
