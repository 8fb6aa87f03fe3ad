"""A run: rounds of faults under load, each followed by quiet and a verdict, on one deployment that lives through all of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from tests.faults import books
from tests.faults.deployment import ENGINE_MODEL, MODEL, Deployment
from tests.faults.faults import Busy, Fault
from tests.faults.load import Load
from tests.faults.quiet import Connections, settle
from tests.faults.records import End, Record
from tests.faults.unrecorded import unrecorded
from tests.faults.verdict import Evidence, Kind, Problem, judge
from tests.waiting import eventually

BEFORE_S, AFTER_S = 0.5, 0.5  # load without faults, at each end of a round
BETWEEN_S = (0.0, 0.2)
BUSY_WAIT_S = 0.05
LEDGER_WAIT_S = 30.0
UUID_CHARS = 36
LIVES_MAX = 20  # problems of one round that are told in full
TOLERATED = frozenset({End.LEFT, End.COMPLETED})

OnFault = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What to do. The same *seed* strikes the same faults in the same order, with the same dice; the load's dice, too."""

    faults: int
    kinds: Sequence[Fault]
    seed: int
    round_size: int = 200
    lanes: int = 3  # faults at once
    clients: int = 16
    steady: bool = False  # the next fault waits until everybody serves again


@dataclass
class Round:
    """What happened in one, and what was wrong."""

    number: int
    injected: list[tuple[float, int, str, str]] = field(default_factory=list)  # second, number, name, what it struck
    problems: list[Problem] = field(default_factory=list)
    lives: dict[str, list[str]] = field(default_factory=dict)  # of requests with problems: their events
    ends: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    attempts_again: int = 0  # requests that were completed by a later attempt
    continued: int = 0  # streams that went on at another worker behind their first token
    resumed: int = 0  # streams that were completed over more than one connection


@dataclass
class Result:
    rounds: list[Round] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)  # of processes that nobody had struck, by role and exit code

    @property
    def problems(self) -> list[Problem]:
        return [problem for each in self.rounds for problem in each.problems]

    @property
    def injected(self) -> Counter[str]:
        return Counter(name for each in self.rounds for _, _, name, _ in each.injected)

    @property
    def requests(self) -> int:
        return sum(sum(each.ends.values()) for each in self.rounds)


class Run:
    """One run on a deployment that serves."""

    def __init__(self, up: Deployment, orders: Orders, *, on_fault: OnFault = lambda: None) -> None:
        self.result = Result()
        self._up = up
        self._orders = orders
        self._on_fault = on_fault
        self._connections = Connections()
        self._complaints = Complaints(up)
        self._next = 0  # the number of the next fault
        models = [MODEL, ENGINE_MODEL] if up.plan.engines else [MODEL]
        self._load = Load(up.base_urls(), models, clients=orders.clients, seed=str(orders.seed))

    async def to_the_end(self, *, on_round: Callable[[Round], None] = lambda _: None) -> Result:
        """All rounds. Raises: AssertionError if what was struck doesn't come back."""
        try:
            while self._next < self._orders.faults:
                on_round(await self._round())
        finally:
            await self._load.aclose()
        return self.result

    async def _round(self) -> Round:
        made = Round(len(self.result.rounds) + 1)
        began = time.monotonic()
        if made.number == 1:
            await self._connections.note(self._up)
        position = await self._position()
        self._load.start(series=letters(made.number))
        await asyncio.sleep(BEFORE_S)
        last = min(self._next + self._orders.round_size, self._orders.faults)
        async with asyncio.TaskGroup() as lanes:
            for _ in range(self._orders.lanes):
                lanes.create_task(self._strike(made, last, began))
        await asyncio.gather(*(member.ready() for member in self._up.members.values()))
        await asyncio.sleep(AFTER_S)
        records = await self._load.stop()
        made.problems += await settle(self._up)
        made.problems += await self._connections.leaks(self._up)
        await self._judge(made, records, position)
        made.seconds = time.monotonic() - began
        self._note_deaths()
        self.result.rounds.append(made)
        return made

    async def _strike(self, made: Round, last: int, began: float) -> None:
        """One lane: the next fault, and the next, until the round has had its faults."""
        while self._next < last:
            number, self._next = self._next, self._next + 1
            dice = Random(f"{self._orders.seed}/{number}")
            fault, struck_s, told = await self._inject(dice, began)
            made.injected.append((struck_s, number, fault.name, told))
            self._on_fault()
            await asyncio.sleep(dice.uniform(*BETWEEN_S))
            if self._orders.steady:
                await self._up.serving()

    async def _inject(self, dice: Random, began: float) -> tuple[Fault, float, str]:
        """The fault that the dice choose; another one if there is nothing that it could strike at the moment."""
        while True:
            fault, struck_s = dice.choice(self._orders.kinds), time.monotonic() - began
            try:
                return fault, struck_s, await fault.inject(self._up, dice)
            except Busy:
                await asyncio.sleep(BUSY_WAIT_S)

    async def _judge(self, made: Round, records: list[Record], position: int) -> None:
        evidence = Evidence(
            records,
            self._up.witness.generations,
            await books.entries(self._up, after=position),
            await books.receipts(self._up, after=position),
            self._unrecorded(),
        )
        made.problems += judge(evidence)
        made.problems += self._complaints.new()
        if all(fault.unseen for fault in self._orders.kinds):
            made.problems += list(noticed(evidence))
        made.continued = sum(entry.migrations > 0 and entry.status == "completed" for entry in evidence.entries)
        for record in records:
            made.ends[record.end] += 1
            if record.code is not None:
                made.codes[record.code] += 1
            made.attempts_again += record.end is End.COMPLETED and (record.attempts or 1) > 1
            made.resumed += record.end is End.COMPLETED and record.resumed > 0
        for problem in made.problems[:LIVES_MAX]:
            if len(problem.about) == UUID_CHARS:
                made.lives[problem.about] = await books.life(self._up, problem.about)
        self._up.witness.forget()

    def _unrecorded(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for member in self._up.named("ingress"):
            with member.command.log_file.open("rb") as log:
                found.update(unrecorded(log))
        return found

    async def _position(self) -> int:
        async def told() -> int:
            return 1 + await books.position(self._up)

        return await eventually(told, timeout_s=LEDGER_WAIT_S, what="the ledger's answer") - 1

    def _note_deaths(self) -> None:
        for member in self._up.members.values():
            self.result.deaths.update(f"{member.role} with exit code {code}" for code in member.deaths)
            member.deaths.clear()


class Complaints:
    """What the processes' logs say that no fault explains: errors that nobody foresaw, with their traceback."""

    def __init__(self, up: Deployment) -> None:
        self._files = {member.name: member.command.log_file for member in up.members.values()}
        self._read = dict.fromkeys(self._files, 0)

    def new(self) -> list[Problem]:
        """Those since the last call."""
        return [problem for name in self._files for problem in self._of(name)]

    def _of(self, name: str) -> Iterator[Problem]:
        with self._files[name].open("rb") as file:
            file.seek(self._read[name])
            lines = file.read().splitlines()
            self._read[name] = file.tell()
        for before, line in pairwise([b"", *lines]):
            ignored = before.startswith(b"Exception ignored")  # by Python, of a process that ends at once
            if b'"exception":' in line or (line.startswith(b"Traceback") and not ignored):
                yield Problem(Kind.WRONG, "no error is unforeseen", name, line.decode(errors="replace")[-1500:])


def noticed(evidence: Evidence) -> Iterator[Problem]:
    """Requests that did not end well although only such faults were injected as no client may notice.

    A connection that was closed before anybody took the request is none of them: every SDK dials again.
    """
    for record in evidence.records:
        taken = record.end is not End.BROKEN or evidence.entry_of(record) is not None
        if record.end not in TOLERATED and taken:
            told = f"{record.end} {record.status} {record.code}"
            yield Problem(Kind.WRONG, "nobody notices such a fault", record.request_id or record.prompt.name, told)


def letters(number: int) -> str:
    """A round's number in letters, so that a digit can follow: a, b, ..., z, ba, bb, ..."""
    digits = ""
    number -= 1
    while True:
        number, digit = divmod(number, 26)
        digits = chr(ord("a") + digit) + digits
        if number == 0:
            return digits
