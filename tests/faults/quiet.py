"""When the load is over: what must be free, empty and closed again, and what of it isn't."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.errors import SetupError
from tests.faults.deployment import Deployment
from tests.faults.verdict import Kind, Problem

SETTLE_MAX_S = 90.0  # what an ingress left open when it died is closed within 60
LOOK_EVERY_S = 0.2
SPARE_SUBSCRIPTIONS = 2  # a process may be ready before it has subscribed to all: to its answers when it first asks
MOVES_MAX_S = 5.0  # a worker's pulls move to new inboxes now and then, all at once: it has both for a moment
OPEN = """
SELECT count(*) AS n FROM requests WHERE status = 'open' AND request_id IN (
    SELECT request_id FROM events WHERE kind = 'request.accepted' AND (payload->>'$.announced')::BOOLEAN
)
"""  # what an ingress of release 0.1.0 left open is closed a day later


@dataclass
class Look:
    """What is still taken, waiting or open. An empty one is quiet."""

    open_requests: int = 0
    answering: int = 0  # generations that the provider still works on
    jobs_waiting: int = 0
    slots_taken: dict[str, int] = field(default_factory=dict)  # by worker and route
    strangers: list[str] = field(default_factory=list)  # workers that are told of and don't run
    unseen: list[str] = field(default_factory=list)  # workers that run and aren't told of
    problem: str = ""  # what could not be asked

    def said(self) -> Iterator[tuple[str, str]]:
        """Each thing that isn't as it should be: its rule, and what was found."""
        if self.problem:
            yield "everything answers", self.problem
        if self.open_requests:
            yield "no request stays open", f"{self.open_requests} are"
        if self.answering:
            yield "nobody generates for nobody", f"{self.answering} generations"
        if self.jobs_waiting:
            yield "no job is left in the queue", f"{self.jobs_waiting} are"
        if self.slots_taken:
            yield "every slot is free", str(self.slots_taken)
        if self.strangers or self.unseen:
            yield "those who are told of are those who run", f"too many: {self.strangers}, missing: {self.unseen}"


class Connections:
    """How many connections and subscriptions each role has when nothing has happened yet, to compare with later."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, int] = {}
        self._counts: Counter[str] = Counter()

    async def note(self, up: Deployment) -> None:
        found = await _subscriptions(up)
        self._subscriptions = {role: max(counts) for role, counts in found.items()}
        self._counts = Counter({role: len(counts) for role, counts in found.items()})

    async def leaks(self, up: Deployment) -> list[Problem]:
        """What there is too much of, and still is after `MOVES_MAX_S`."""
        until = time.monotonic() + MOVES_MAX_S
        while True:
            found = await self._too_many(up)
            if not found or time.monotonic() > until:
                return found
            await asyncio.sleep(LOOK_EVERY_S)

    async def _too_many(self, up: Deployment) -> list[Problem]:
        problems = []
        for role, counts in (await _subscriptions(up)).items():
            most = self._subscriptions.get(role, 0) + SPARE_SUBSCRIPTIONS
            if max(counts) > most:
                told = f"{role}: {max(counts)}, at most {most} are meant"
                problems.append(Problem(Kind.LEAKED, "no subscription is left", role, told))
            if len(counts) > self._counts[role]:
                told = f"{role}: {len(counts)} instead of {self._counts[role]}"
                problems.append(Problem(Kind.LEAKED, "no connection is left", role, told))
        return problems


async def settle(up: Deployment) -> list[Problem]:
    """Waits until all is quiet; what isn't in time has leaked."""
    until = time.monotonic() + SETTLE_MAX_S
    while True:
        look = await look_at(up)
        found = list(look.said())
        if not found:
            return []
        if time.monotonic() > until:
            return [Problem(Kind.LEAKED, rule, "deployment", told) for rule, told in found]
        await asyncio.sleep(LOOK_EVERY_S)


async def look_at(up: Deployment) -> Look:
    look = Look(answering=up.witness.answering)
    try:
        look.open_requests = int((await up.sql(OPEN))[0]["n"])
        look.jobs_waiting = await _jobs_waiting(up)
        await _look_at_workers(up, look)
    except (SetupError, OSError, ValueError, LookupError, AssertionError) as error:
        look.problem = f"{type(error).__name__}: {error}"
    return look


async def _look_at_workers(up: Deployment, look: Look) -> None:
    running = {(member.told() or {})["worker"] for member in up.named("worker")}
    for ingress in up.named("ingress"):
        rows = [row for row in (await up.admin(ingress, "/admin/v1/routes"))["data"] if row["worker"] is not None]
        told = {row["worker"] for row in rows}
        look.strangers += sorted(told - running)
        look.unseen += sorted(running - told)
        for row in rows:
            if row["free"] != row["slots"]:
                look.slots_taken[f"{row['worker']} {row['route']}"] = row["slots"] - row["free"]


async def _jobs_waiting(up: Deployment) -> int:
    """As the stream's leader has it: followers may be behind."""
    waiting = 0
    for server in up.servers:
        told = await server.asked("/jsz?streams=1")
        for account in told.get("account_details", []):
            for stream in account.get("stream_detail", []):
                if stream["name"] == "JOBS":
                    waiting = max(waiting, int(stream["state"]["messages"]))
    return waiting


async def _subscriptions(up: Deployment) -> dict[str, list[int]]:
    """By role, the number of subscriptions of each of its connections."""
    found: dict[str, list[int]] = defaultdict(list)
    for server in up.servers:
        for connection in (await server.asked("/connz?limit=1024"))["connections"]:
            found[str(connection.get("name", "")).partition("-")[0]].append(int(connection["subscriptions"]))
    return found
