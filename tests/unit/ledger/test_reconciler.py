"""Who is taken for dead, and when what it left open is closed: with a log in memory and a clock that the test turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from ledger.reconciler import UNANNOUNCED_PATIENCE_S, Leftover, Reconciler
from schemas.errors import LogUnavailable
from schemas.events import Event, RequestAccepted, RequestFinished
from schemas.ids import IngressId
from tests.unit.ledger import samples

SILENCE_S = 15.0
RECEIPT_WAIT_S = 10.0
INGRESS = IngressId("ingress-1")


@dataclass
class World:
    """A log with fences, what the tables know of it, and who has been heard."""

    now: float = 1000.0
    log: list[Event | IngressId] = field(default_factory=list)  # an ingress's name stands for its fence
    stored: int = 0
    heard: dict[str, float] = field(default_factory=dict)
    listening_since: float = 1000.0
    producer: str = "ledger"
    broken: bool = False

    # What ingresses and workers do.

    def write(self, event: Event) -> bool:
        """False behind a fence."""
        if event.producer in [each for each in self.log if isinstance(each, str)]:
            return False
        self.log.append(event)
        return True

    # Opens

    def stored_to(self) -> int:
        return self.stored

    async def leftovers(self) -> list[Leftover]:
        found: dict[tuple[str, bool], int] = {}
        for event in self.open():
            key = (event.producer, event.announced)
            found[key] = min(found.get(key, event.ts_ns), event.ts_ns)
        return [Leftover(IngressId(ingress), announced, ns) for (ingress, announced), ns in found.items()]

    async def lives(self, ingress: IngressId, *, before_ns: int | None, max_requests: int) -> list[list[Event]]:
        mine = [e for e in self.open() if e.producer == ingress and (before_ns is None or e.ts_ns < before_ns)]
        return [[e for e in self.known() if e.request_id == each.request_id] for each in mine[:max_requests]]

    # Pen

    async def fence(self, ingress: IngressId) -> int:
        self._check()
        self.log.append(ingress)
        return len(self.log)

    async def record(self, events: Sequence[Event]) -> None:
        self._check()
        self.log.extend(events)

    # What the test looks at.

    def reconciler(self) -> Reconciler:
        """A new process: it has heard nobody yet."""
        self.heard.clear()
        self.listening_since = self.now
        return Reconciler(
            self,
            self,
            self.silent_for,
            silence_s=SILENCE_S,
            receipt_wait_s=RECEIPT_WAIT_S,
            now=lambda: self.now,
            now_ns=self.now_ns,
        )

    def silent_for(self, ingress: IngressId) -> float:
        return self.now - max(self.heard.get(ingress, 0.0), self.listening_since)

    def now_ns(self) -> int:
        return samples.NOON_NS + int(self.now * 1e9)

    def known(self) -> list[Event]:
        return [event for event in self.log[: self.stored] if isinstance(event, Event)]

    def open(self) -> list[RequestAccepted]:
        over = {event.request_id for event in self.known() if isinstance(event, RequestFinished)}
        return [e for e in self.known() if isinstance(e, RequestAccepted) and e.request_id not in over]

    def ends(self) -> list[RequestFinished]:
        return [event for event in self.log if isinstance(event, RequestFinished)]

    def store(self) -> None:
        self.stored = len(self.log)

    def _check(self) -> None:
        if self.broken:
            raise LogUnavailable


@pytest.fixture
def world() -> World:
    return World()


async def pass_time(world: World, reconciler: Reconciler, seconds: float, *, alive: Sequence[str] = ()) -> None:
    """A review a second; the tables follow."""
    for _ in range(int(seconds)):
        world.now += 1.0
        world.heard.update(dict.fromkeys(alive, world.now))
        await reconciler.review()
        world.store()


def accepted(number: int, **changes: object) -> RequestAccepted:
    return samples.accepted(number, announced=True, **changes)


async def test_what_a_dead_ingress_left_open_is_closed_once_within_a_minute(world: World) -> None:
    reconciler = world.reconciler()
    world.log += [accepted(1), accepted(2), samples.finished(2), accepted(3)]
    await pass_time(world, reconciler, 20, alive=[INGRESS])
    assert world.ends() == [world.log[2]]
    await pass_time(world, reconciler, SILENCE_S + RECEIPT_WAIT_S + 2)
    assert sorted(end.request_id for end in world.ends()[1:]) == [samples.uuid(1), samples.uuid(3)]
    assert world.log.count(INGRESS) == 1
    await pass_time(world, reconciler, 100)
    assert len(world.ends()) == 3


async def test_a_living_ingress_keeps_its_requests_however_long_they_take(world: World) -> None:
    reconciler = world.reconciler()
    world.log += [accepted(1), accepted(2, producer="ingress-2")]
    await pass_time(world, reconciler, 4000, alive=[INGRESS])
    assert [end.request_id for end in world.ends()] == [samples.uuid(2)]


async def test_receipts_are_waited_for_and_decide(world: World) -> None:
    reconciler = world.reconciler()
    world.log.append(accepted(1))
    await pass_time(world, reconciler, SILENCE_S + RECEIPT_WAIT_S - 2)
    assert world.ends() == []
    world.write(samples.receipt(1))
    await pass_time(world, reconciler, 4)
    [end] = world.ends()
    assert end.usage == samples.USAGE


async def test_nothing_is_closed_before_all_that_stands_before_the_fence_is_stored(world: World) -> None:
    """The log lags behind: the ingress ended its request itself, which the tables don't know yet."""
    reconciler = world.reconciler()
    world.log += [accepted(1), samples.finished(1)]
    world.stored = 1
    for _ in range(100):
        world.now += 1.0
        await reconciler.review()
    assert len(world.ends()) == 1
    world.store()
    await pass_time(world, reconciler, 100)
    assert len(world.ends()) == 1


async def test_one_that_was_only_frozen_finds_its_log_closed(world: World) -> None:
    reconciler = world.reconciler()
    world.log.append(accepted(1))
    await pass_time(world, reconciler, SILENCE_S + 1)
    assert not world.write(samples.finished(1))
    await pass_time(world, reconciler, RECEIPT_WAIT_S + 1)
    [end] = world.ends()
    assert end.producer == "ledger"


async def test_one_whose_last_words_the_tables_do_not_know_yet_is_left_in_peace(world: World) -> None:
    """It said goodbye as its last event was on its way into the tables: that takes a moment."""
    reconciler = world.reconciler()
    world.log += [accepted(1), samples.finished(1)]
    world.stored = 1
    world.listening_since = float("-inf")
    await reconciler.review()
    world.store()
    await pass_time(world, reconciler, 30)
    assert INGRESS not in world.log


async def test_one_that_took_its_leave_is_closed_without_patience(world: World) -> None:
    reconciler = world.reconciler()
    world.log.append(accepted(1))
    world.store()
    world.heard[INGRESS] = float("-inf")
    world.listening_since = float("-inf")
    await pass_time(world, reconciler, RECEIPT_WAIT_S + 2)
    assert len(world.ends()) == 1


async def test_an_ingress_of_an_earlier_release_says_nothing_and_is_given_a_day(world: World) -> None:
    reconciler = world.reconciler()
    old = samples.accepted(1, ts_ns=world.now_ns())
    new = samples.accepted(2, ts_ns=world.now_ns() + 3600 * 10**9)
    world.log += [old, new]
    await pass_time(world, reconciler, 100)
    assert world.ends() == []
    world.now += UNANNOUNCED_PATIENCE_S - 90
    await pass_time(world, reconciler, 5)
    assert [end.request_id for end in world.ends()] == [samples.uuid(1)]
    assert INGRESS not in world.log
    world.now += 3600
    await pass_time(world, reconciler, 5)
    assert [end.request_id for end in world.ends()] == [samples.uuid(1), samples.uuid(2)]


async def test_what_cannot_be_written_now_is_written_later(world: World) -> None:
    reconciler = world.reconciler()
    world.log.append(accepted(1))
    world.store()
    world.broken = True
    world.now += SILENCE_S
    await reconciler.review()
    with pytest.raises(LogUnavailable):
        await reconciler.review()
    world.broken = False
    await pass_time(world, reconciler, RECEIPT_WAIT_S + 3)
    assert len(world.ends()) == 1


class History:
    """What ingresses and workers do of themselves, by the dice."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self.world, self.dice = world, dice
        self.alive = {f"ingress-{number}" for number in range(3)}
        self.frozen_until: dict[str, float] = {}
        self.running: dict[int, str] = {}
        self.accepted: set[str] = set()
        self.told_success: set[str] = set()
        self.requests = 0

    def step(self) -> None:
        self.world.now += self.dice.random() * 2
        for ingress in self.awake():
            self.world.heard[ingress] = self.world.now
            self._accept(ingress)
        for request, ingress in list(self.running.items()):
            if self.dice.random() < 0.1:
                self.world.write(samples.receipt(request))
            if ingress in self.awake() and self.dice.random() < 0.2:
                self._finish(request, ingress)
        if self.dice.random() < 0.02:
            self.frozen_until[self.dice.choice(sorted(self.alive))] = self.world.now + self.dice.random() * 60
        if self.dice.random() < 0.01 and len(self.alive) > 1:
            self.alive.discard(self.dice.choice(sorted(self.alive)))
        if self.dice.random() < 0.05:  # so the tables are often further behind than the patience goes
            self.world.stored = self.dice.randint(self.world.stored, len(self.world.log))

    def awake(self) -> list[str]:
        return [ingress for ingress in sorted(self.alive) if self.frozen_until.get(ingress, 0.0) <= self.world.now]

    def _accept(self, ingress: str) -> None:
        self.requests += 1
        if self.dice.random() < 0.5 and self.world.write(accepted(self.requests, producer=ingress)):
            self.running[self.requests] = ingress
            self.accepted.add(samples.uuid(self.requests))

    def _finish(self, request: int, ingress: str) -> None:
        """A client is told of a success only when its event is in the log."""
        if self.world.write(samples.finished(request, producer=ingress)):
            self.told_success.add(samples.uuid(request))
        del self.running[request]


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_happens_each_request_ends_once_and_as_its_client_was_told(world: World, seed: int) -> None:
    """Ingresses work, die, freeze and come back; receipts come or don't; the tables lag; the ledger is killed at any moment."""
    dice = random.Random(seed)
    history, reconciler = History(world, dice), world.reconciler()
    for _ in range(400):
        history.step()
        if dice.random() < 0.05:
            reconciler = world.reconciler()  # killed, and started again
        if dice.random() < 0.7:
            await reconciler.review()
    world.store()
    await pass_time(world, world.reconciler(), 60)
    ends = [end.request_id for end in world.ends()]
    assert len(ends) == len(set(ends))
    assert set(ends) == history.accepted
    assert {end.request_id for end in world.ends() if end.status == "completed"} == history.told_success
