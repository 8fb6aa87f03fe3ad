"""Closes what an ingress left open when it died.

An ingress that is silent for too long is fenced off: from that message of the log on, nothing that it writes is stored. Once
everything before the fence is in the tables, what is open there of this ingress stays open for ever, unless it is closed here. Its
workers notice its silence, too, and write their receipts; these are waited for, and then each request gets its closing event.

Nothing of that needs a memory: whatever moment this process is killed at, the next one begins with the fence again. That an
ingress was only frozen, or that the log lags behind, can't do harm either: the fence orders both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import structlog

from ledger.closing import closing
from schemas.errors import PenstockError
from schemas.events import Event, RequestFinished
from schemas.ids import EventId, IngressId, RequestId, new_id

log = structlog.get_logger()

REVIEW_EVERY_S = 1.0
CLOSED_AT_ONCE_MAX = 1000
UNANNOUNCED_PATIENCE_S = (
    24 * 3600.0
)  # with a request of an earlier release's ingress, which doesn't say that it is there


class Leftover(NamedTuple):
    """Open requests of one ingress. *announced*: it says regularly that it is there."""

    ingress: IngressId
    announced: bool
    oldest_ns: int  # UTC, when the first of them was accepted


class Opens(Protocol):
    """The open requests, as far as the log is stored."""

    def stored_to(self) -> int:
        """The last message of EVENTS that is stored."""

    async def leftovers(self) -> list[Leftover]:
        """Raises: PenstockError."""

    async def lives(self, ingress: IngressId, *, before_ns: int | None, max_requests: int) -> list[list[Event]]:
        """All events of each open request of *ingress* (accepted before *before_ns*), in the log's order.

        Raises: PenstockError.
        """


class Pen(Protocol):
    """Writes to the log."""

    producer: str

    async def fence(self, ingress: IngressId) -> int:
        """The number of the message that is *ingress*'s fence. Raises: PenstockError."""

    async def record(self, events: Sequence[Event]) -> None:
        """Returns when *events* are durable. Raises: PenstockError; they may become so all the same."""


SilentFor = Callable[[IngressId], float]


@dataclass
class Case:
    """An ingress that is taken for dead."""

    fence: int  # the message's number
    due: float  # by the loop's time, when its requests are closed
    announced: bool
    closed: set[RequestId] = field(default_factory=set)  # which the tables may not know yet


class Reconciler:
    """*silent_for* tells for how many seconds an ingress has said nothing while it could have been heard."""

    def __init__(
        self,
        opens: Opens,
        pen: Pen,
        silent_for: SilentFor,
        *,
        silence_s: float,
        receipt_wait_s: float,
        now: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._opens = opens
        self._pen = pen
        self._silent_for = silent_for
        self._silence_s = silence_s
        self._receipt_wait_s = receipt_wait_s
        self._now = now
        self._now_ns = now_ns
        self._cases: dict[IngressId, Case] = {}
        self._suspected: set[IngressId] = set()  # in the review before

    async def run(self) -> None:
        """Reviews for ever; what can't be done now is done by a later review."""
        while True:
            await asyncio.sleep(REVIEW_EVERY_S)
            try:
                await self.review()
            except PenstockError as error:
                log.info("review_broken_off", reason=error.message)
            except Exception:  # the ledger stores and answers all the same
                log.exception("review_broke")

    async def review(self) -> None:
        """Fences off whoever is dead, and closes what is due. Raises: PenstockError."""
        leftovers = await self._opens.leftovers()
        dead = [left for left in leftovers if left.ingress not in self._cases and self._is_dead(left)]
        suspected, self._suspected = self._suspected, {left.ingress for left in dead}
        for left in dead:
            if left.ingress in suspected:  # and not only until the tables know what it said as it left
                self._cases[left.ingress] = await self._begin(left)
        for ingress in self._cases.keys() - {left.ingress for left in leftovers}:
            del self._cases[ingress]
        for ingress, case in self._cases.items():
            if self._now() >= case.due and self._opens.stored_to() >= case.fence:
                await self._close(ingress, case)

    def _is_dead(self, left: Leftover) -> bool:
        if left.announced:
            return self._silent_for(left.ingress) >= self._silence_s
        return left.oldest_ns < self._patient_since_ns()

    def _patient_since_ns(self) -> int:
        """What was accepted before by an ingress that doesn't announce itself is given up."""
        return self._now_ns() - int(UNANNOUNCED_PATIENCE_S * 1e9)

    async def _begin(self, left: Leftover) -> Case:
        if not left.announced:
            return Case(fence=0, due=self._now(), announced=False)
        fence = await self._pen.fence(left.ingress)
        log.warning("ingress_lost", ingress=left.ingress)
        return Case(fence=fence, due=self._now() + self._receipt_wait_s, announced=True)

    async def _close(self, ingress: IngressId, case: Case) -> None:
        before_ns = None if case.announced else self._patient_since_ns()
        most = CLOSED_AT_ONCE_MAX + len(case.closed)
        ends = [
            end
            for life in await self._opens.lives(ingress, before_ns=before_ns, max_requests=most)
            if (end := self._end_of(life)) is not None and end.request_id not in case.closed
        ]
        if not ends:
            return
        case.closed.update(end.request_id for end in ends)
        await self._pen.record(ends)
        log.warning(
            "requests_closed",
            ingress=ingress,
            requests=len(ends),
            billed=sum(end.usage.total_tokens > 0 for end in ends),
            cost_pico=sum(end.cost_pico for end in ends),
        )

    def _end_of(self, life: Sequence[Event]) -> RequestFinished | None:
        return closing(life, id_=EventId(new_id()), now_ns=self._now_ns(), producer=self._pen.producer)
