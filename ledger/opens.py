"""The open requests as the tables have them, asked on a connection and in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import duckdb

from ledger.clock import ns_of, utc
from ledger.reconciler import Leftover
from ledger.store import StoreFailed
from schemas.events import Event
from schemas.ids import IngressId
from schemas.upcasters import read_event

LEFTOVERS = """\
SELECT ingress, announced, min(accepted_at) FROM facts.request_opens WHERE ingress IS NOT NULL GROUP BY ALL"""
OPEN_OF = """\
SELECT request_id::VARCHAR FROM facts.request_opens WHERE ingress = $1 AND accepted_at < $2 ORDER BY position LIMIT $3"""
LIVES = """\
SELECT request_id::VARCHAR, payload FROM events
WHERE log = 'EVENTS' AND request_id BETWEEN $1::UUID AND $2::UUID AND request_id IN (SELECT unnest($3::UUID[]))
ORDER BY position"""
FOR_EVER = datetime.max  # noqa: DTZ901 - the database's TIMESTAMP has no zone


class StoredOpens:
    """*cursor* gives a connection to the ledger's file, *stored_to* the last message of EVENTS that is stored."""

    def __init__(self, cursor: Callable[[], duckdb.DuckDBPyConnection], stored_to: Callable[[], int]) -> None:
        self.stored_to = stored_to
        self._connection = cursor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="opens")

    async def leftovers(self) -> list[Leftover]:
        """Raises: StoreFailed."""
        rows = await self._ask(LEFTOVERS, [])
        return [Leftover(IngressId(ingress), bool(announced), ns_of(oldest)) for ingress, announced, oldest in rows]

    async def lives(self, ingress: IngressId, *, before_ns: int | None, max_requests: int) -> list[list[Event]]:
        """Raises: StoreFailed."""
        before = FOR_EVER if before_ns is None else utc(before_ns)
        ids = [id_ for (id_,) in await self._ask(OPEN_OF, [ingress, before, max_requests])]
        if not ids:
            return []
        lives: dict[str, list[Event]] = {id_: [] for id_ in ids}
        for id_, payload in await self._ask(LIVES, [min(ids), max(ids), ids]):
            event = read_event(payload.encode())
            if isinstance(event, Event):
                lives[id_].append(event)
        return list(lives.values())

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._connection.close()

    async def _ask(self, sql: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._rows, sql, parameters)

    def _rows(self, sql: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except (duckdb.Error, MemoryError) as error:
            raise StoreFailed(f"the open requests can't be read: {error}") from error
