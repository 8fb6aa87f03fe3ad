"""The faults, each by name. Each picks what it strikes with the dice that it is given, does it, and mends it again."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

import psutil

from tests.faults.deployment import Deployment
from tests.faults.processes import Member
from tests.faults.proxy import Link
from tests.faults.servers import leader_of

DOWN_S = (0.0, 0.1, 0.3, 1.0)  # how long what was killed stays away
PAUSES_S = (0.05, 0.2, 0.5, 1.0, 7.5)  # the last is longer than three beats of presence
FREEZES_S = (0.1, 0.5, 1.5)
DELAYS_S = (0.01, 0.05, 0.2)
DELAYED_S = (0.5, 1.5)
FULL_S = (0.5, 2.0)
FULL_MORE_BYTES = 64 * 1024
JUMPS_S = (-86_400.0, -3600.0, -5.0, 5.0, 3600.0, 86_400.0)
JUMPED_S = (0.3, 1.0)
YOUNG = 0.2  # of what was started again may be struck before it serves
LEADER_DOWN_S = (0.5, 6.0, 12.0)  # an election takes 4 to 9 seconds
LEDGER_FILES = Path("home") / "ledger"
LINKS = ("client>ingress", "ingress>nats", "worker>nats", "ledger>nats", "worker>provider")

Inject = Callable[[Deployment, Random], Awaitable[str]]


class Busy(Exception):
    """All that this fault could strike is being struck."""


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """*inject* returns what it did, in words. *unseen*: with two of each role, no client may notice it."""

    name: str
    inject: Inject
    unseen: bool = False
    servers: tuple[int, ...] = (1, 3)


def all_faults() -> list[Fault]:
    found = [Fault(name=f"kill-{role}", inject=partial(_kill, role)) for role in ("worker", "ingress")]
    found += [
        Fault(name="kill-ledger", inject=partial(_kill, "ledger"), unseen=True),
        Fault(name="kill-engine", inject=_kill_engine),
        Fault(name="kill-nats", inject=_kill_nats, servers=(1,)),
        Fault(name="kill-leader", inject=_kill_leader, servers=(3,)),
        Fault(name="stop-nats", inject=_stop_nats),
        Fault(name="stop-engine", inject=_stop_engine),
        Fault(name="disk-full", inject=_disk_full, unseen=True),
    ]
    found += [Fault(name=f"stop-{role}", inject=partial(_stop, role)) for role in ("worker", "ingress")]
    found.append(Fault(name="stop-ledger", inject=partial(_stop, "ledger"), unseen=True))
    found += [
        Fault(name=f"restart-{role}", inject=partial(_restart, role), unseen=True)
        for role in ("worker", "ingress", "ledger")
    ]
    found += [
        Fault(name=f"clock-{role}", inject=partial(_jump, role), unseen=True)
        for role in ("worker", "ingress", "ledger")
    ]
    for link in LINKS:
        kind = link.replace(">", "-")
        found += [
            Fault(name=f"{verb}-{kind}", inject=partial(strike, link), unseen=link == "ledger>nats" or verb == "delay")
            for verb, strike in (("cut", _cut), ("freeze", _freeze), ("delay", _delay), ("halve", _half_close))
        ]
    return found


def chosen(only: Sequence[str], *, servers: int, engines: bool) -> list[Fault]:
    """Those whose names match one of *only* (all without it) and that this deployment can have."""
    found = [
        fault
        for fault in all_faults()
        if servers in fault.servers
        and (engines or not fault.name.endswith("-engine"))
        and (not only or any(fnmatch(fault.name, pattern) for pattern in only))
    ]
    if not found:
        raise ValueError(f"no fault is called {', '.join(only)}; there are {', '.join(f.name for f in all_faults())}")
    return found


@contextlib.contextmanager
def _struck(up: Deployment, dice: Random, among: Sequence[T]) -> Iterator[T]:
    """One of them that nobody else strikes meanwhile. Raises: Busy."""
    free = [each for each in among if each.name not in up.struck]
    if not free:
        raise Busy
    picked = dice.choice(free)
    up.struck.add(picked.name)
    try:
        yield picked
    finally:
        up.struck.discard(picked.name)


async def _kill(role: str, up: Deployment, dice: Random) -> str:
    with _struck(up, dice, up.named(role)) as member:
        await member.kill()
        return await _back(member, dice, f"{member.name} killed")


async def _restart(role: str, up: Deployment, dice: Random) -> str:
    """One after the other, as an operator does it: the next one when the last one serves."""
    members = up.named(role)
    if len(members) > 1 and up.struck.intersection(member.name for member in members):
        raise Busy
    with _struck(up, dice, members) as member:
        await member.terminate()
        told = await _back(member, dice, f"{member.name} restarted", young=0.0)
        if role == "worker":
            with contextlib.suppress(AssertionError):  # its engine may have been struck meanwhile
                await up.serving(member)
        return told


async def _back(member: Member, dice: Random, told: str, *, young: float = YOUNG) -> str:
    away_s = dice.choice(DOWN_S)
    await asyncio.sleep(away_s)
    member.start()
    if dice.random() >= young:
        await member.ready()
    return f"{told}, {away_s:g} s away"


async def _stop(role: str, up: Deployment, dice: Random) -> str:
    pause_s = dice.choice(PAUSES_S)
    with _struck(up, dice, up.named(role)) as member:
        member.pause()
        await asyncio.sleep(pause_s)
        member.resume()
        return f"{member.name} stopped for {pause_s:g} s"


async def _kill_engine(up: Deployment, dice: Random) -> str:
    engine = _engine(up, dice)
    with contextlib.suppress(psutil.Error):
        engine.kill()
    await asyncio.sleep(dice.choice(DOWN_S))
    return f"engine {engine.pid} killed"


async def _stop_engine(up: Deployment, dice: Random) -> str:
    engine, pause_s = _engine(up, dice), dice.choice(PAUSES_S)
    with contextlib.suppress(psutil.Error):
        engine.suspend()
        await asyncio.sleep(pause_s)
        engine.resume()
    return f"engine {engine.pid} stopped for {pause_s:g} s"


def _engine(up: Deployment, dice: Random) -> psutil.Process:
    found = sorted(up.engines(), key=lambda engine: engine.pid)
    if not found:
        raise Busy
    return dice.choice(found)


async def _kill_nats(up: Deployment, dice: Random) -> str:
    """What the queue held is gone; what the file streams hold is not."""
    away_s = dice.choice(DOWN_S)
    with _struck(up, dice, up.servers) as server:
        await server.kill()
        await asyncio.sleep(away_s)
        server.launch()
        await server.healthy()
        return f"{server.name} killed, {away_s:g} s away"


async def _kill_leader(up: Deployment, dice: Random) -> str:
    """One at a time: without two of three there is no cluster."""
    away_s, stream = dice.choice(LEADER_DOWN_S), dice.choice(("EVENTS", "JOBS", "CONTROL"))
    leader = None if up.struck.intersection(each.name for each in up.servers) else await leader_of(up.servers, stream)
    if leader is None:
        raise Busy
    with _struck(up, dice, [leader]):
        await leader.kill()
        await asyncio.sleep(away_s)
        leader.launch()
        await leader.healthy()
        return f"{leader.name}, the leader of {stream}, killed, {away_s:g} s away"


async def _stop_nats(up: Deployment, dice: Random) -> str:
    pause_s = dice.choice(PAUSES_S)
    with _struck(up, dice, up.servers) as server:
        server.pause()
        await asyncio.sleep(pause_s)
        server.resume()
        return f"{server.name} stopped for {pause_s:g} s"


async def _disk_full(up: Deployment, dice: Random) -> str:
    """No file of the ledger may grow, whichever process writes it: what a full disk is to it."""
    full_s, spare = dice.choice(FULL_S), dice.randint(0, FULL_MORE_BYTES)
    with _struck(up, dice, up.named("ledger")) as ledger:
        limit = max(file.stat().st_size for file in (up.folder / LEDGER_FILES).glob("ledger.*")) + spare
        until = asyncio.get_running_loop().time() + full_s
        while asyncio.get_running_loop().time() < until:
            _limit_files(ledger.pid, limit)
            await asyncio.sleep(0.02)
        _limit_files(ledger.pid, resource.RLIM_INFINITY)
        return f"no file of {ledger.name} over {limit} bytes for {full_s:g} s"


def _limit_files(pid: int, limit: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


async def _jump(role: str, up: Deployment, dice: Random) -> str:
    jump_s = dice.choice(JUMPS_S)
    member = dice.choice(up.named(role))
    up.clock.jump(member.name, jump_s)
    await asyncio.sleep(dice.choice(JUMPED_S))
    up.clock.jump(member.name, 0.0)
    return f"the clock of {member.name} {jump_s:+g} s and back"


@contextlib.asynccontextmanager
async def _mended(up: Deployment, dice: Random, link: str) -> AsyncIterator[Link]:
    dialler, _, listener = link.partition(">")
    ours = [
        each
        for name, each in up.links.items()
        if name.startswith(dialler) and name.partition(">")[2].startswith(listener)
    ]
    with _struck(up, dice, ours) as picked:
        try:
            yield picked
        finally:
            picked.heal()


async def _cut(kind: str, up: Deployment, dice: Random) -> str:
    async with _mended(up, dice, kind) as link:
        count = len(link)
        link.cut()
        return f"{link.name}: {count} connections cut"


async def _half_close(kind: str, up: Deployment, dice: Random) -> str:
    async with _mended(up, dice, kind) as link:
        count = len(link)
        link.half_close()
        return f"{link.name}: {count} connections half closed"


async def _freeze(kind: str, up: Deployment, dice: Random) -> str:
    freeze_s = dice.choice(FREEZES_S)
    async with _mended(up, dice, kind) as link:
        link.freeze()
        await asyncio.sleep(freeze_s)
        return f"{link.name}: frozen for {freeze_s:g} s"


async def _delay(kind: str, up: Deployment, dice: Random) -> str:
    delay_s, delayed_s = dice.choice(DELAYS_S), dice.choice(DELAYED_S)
    async with _mended(up, dice, kind) as link:
        link.delay(delay_s)
        await asyncio.sleep(delayed_s)
        return f"{link.name}: {delay_s:g} s late for {delayed_s:g} s"
