"""The control feed: what one states the others know, and nobody overwrites what he has not seen."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus.connection import Connection, connect
from bus.control import ControlFeed
from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.server import EmbeddedServer
from bus.streams import stream_state
from schemas import subjects
from schemas.control import AnyControlEvent, KeyStated, OrgStated, PublicModel, Role, RouteStated
from schemas.errors import Conflict, LogUnavailable
from schemas.ids import EventId, KeyId, OrgId, RouteId, new_id
from tests.restarts import kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually


async def test_what_is_stated_is_folded_when_saying_returns(connection: Connection, publisher: Publisher) -> None:
    async with _feed(connection, publisher) as feed:
        await feed.say(_org("Ants"))
        await feed.say(_key(revoked=False))
        await feed.say(_route("m"))
        assert feed.state.orgs[OrgId("org")].name == "Ants"
        assert feed.state.key_of("hash", now_ns=1) is not None
        assert feed.state.routes[RouteId("route")].models == (PublicModel(name="m"),)


async def test_the_others_know_it_within_a_tenth_of_a_second(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    async with _elsewhere(nats_server) as one, _elsewhere(nats_server) as other:
        took_s = []
        for name in ("Ants", "Bees", "Crabs", "Dogs", "Eels"):
            seen: list[float] = []
            other.on_change(lambda _, seen=seen: seen.append(time.monotonic()))
            watch, began = Stopwatch(), time.monotonic()
            await one.say(_org(name))
            await eventually(lambda seen=seen: seen, every_s=0.001)
            took_s.append(seen[0] - began - watch.waited_s)
            assert other.state.orgs[OrgId("org")].name == name
        assert statistics.median(took_s) < 0.1  # there is an fsync in it, which can take its time elsewhere


async def test_only_the_first_of_two_at_once_is_stated(nats_server: EmbeddedServer, connection: Connection) -> None:
    async with _elsewhere(nats_server) as one, _elsewhere(nats_server) as other:
        for round_ in range(5):
            outcomes = await asyncio.gather(
                one.say(_org(f"one {round_}")), other.say(_org(f"other {round_}")), return_exceptions=True
            )
            assert sorted(type(outcome) for outcome in outcomes if outcome) == [Conflict]
            winner = f"one {round_}" if outcomes[0] is None else f"other {round_}"
            await eventually(
                lambda winner=winner: {feed.state.orgs[OrgId("org")].name for feed in (one, other)} == {winner}
            )
    assert (await stream_state(connection, "CONTROL"))["messages"] == 5


async def test_statements_about_different_things_do_not_meet(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    async with _elsewhere(nats_server) as one, _elsewhere(nats_server) as other:
        await asyncio.gather(
            *(feed.say(_org("x", org=f"{n}.{i}")) for n in range(30) for i, feed in enumerate((one, other)))
        )
        await eventually(lambda: len(one.state.orgs) == len(other.state.orgs) == 60)


async def test_a_new_feed_knows_the_last_of_everything(connection: Connection, publisher: Publisher) -> None:
    async with _feed(connection, publisher) as feed:
        for name in ("Ants", "Bees"):
            await feed.say(_org(name))
        await feed.say(_key(revoked=False))
        await feed.say(_key(revoked=True))
    async with _feed(connection, publisher) as feed:
        assert feed.state.orgs[OrgId("org")].name == "Bees"
        assert feed.state.key_of("hash", now_ns=1) is None
        await feed.say(_org("Crabs"))  # based on what it has read, so it is no conflict


async def test_an_empty_control_is_read_at_once(connection: Connection, publisher: Publisher) -> None:
    watch = Stopwatch()
    async with _feed(connection, publisher) as feed:
        assert watch.s < 0.5
        assert not feed.state.orgs


async def test_it_goes_on_over_a_restart_of_the_server(nats_server: EmbeddedServer, connection: Connection) -> None:
    async with _elsewhere(nats_server) as one, _elsewhere(nats_server) as other:
        await one.say(_org("Ants"))
        await restart(nats_server, one._connection, other._connection)
        await one.say(_org("Bees"))
        await eventually(lambda: other.state.orgs[OrgId("org")].name == "Bees")
        await other.say(_org("Crabs"))
        assert other.state.orgs[OrgId("org")].name == "Crabs"


async def test_what_is_stated_while_a_feed_is_away_reaches_it_later(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    async with _elsewhere(nats_server) as one, _elsewhere(nats_server) as other:
        await one.say(_org("Ants"))
        await eventually(lambda: other.state.orgs)
        other._connection.nc._transport._io_writer.transport.abort()
        for name in ("Bees", "Crabs"):
            await one.say(_org(name))
        await eventually(lambda: other.state.orgs[OrgId("org")].name == "Crabs")
        await other.say(_org("Dogs"))


async def test_nothing_can_be_stated_while_the_server_is_away(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    async with _elsewhere(nats_server) as feed:
        await kill(nats_server)
        with pytest.raises(LogUnavailable, match="could not be recorded"):
            await feed.say(_org("Ants"))
        await nats_server.start()
        await eventually(lambda: feed._connection.is_up)
        await feed.say(_org("Ants"))


async def test_what_only_a_newer_release_understands_is_passed_over(
    connection: Connection, publisher: Publisher
) -> None:
    newer = b'{"kind":"control.budget.stated","id":"x","ts_ns":1,"by":"x","producer":"x","budget":1}'
    async with _feed(connection, publisher) as feed:
        for subject, body in [("budget", newer), ("org", b"{}"), ("key", b"not json"), ("key", b"")]:
            await publisher.publish(subjects.control(subject, "odd"), body, timeout_s=5.0)
        await feed.say(_org("Ants"))
    async with _feed(connection, publisher) as feed:
        assert list(feed.state.orgs) == ["org"]


async def test_a_listener_that_breaks_does_not_deafen_the_others(connection: Connection, publisher: Publisher) -> None:
    heard: list[AnyControlEvent] = []

    def breaks(_: AnyControlEvent) -> None:
        raise RuntimeError

    async with _feed(connection, publisher) as feed:
        feed.on_change(breaks)
        feed.on_change(heard.append)
        await feed.say(_org("Ants"))
        await feed.say(_org("Bees"))
    assert [event.name for event in heard if isinstance(event, OrgStated)] == ["Ants", "Bees"]


async def test_a_stopped_feed_leaves_nothing_behind(connection: Connection, publisher: Publisher) -> None:
    async with _feed(connection, publisher):
        pass
    assert not connection._reconnected
    consumers = await connection.api("CONSUMER.LIST.CONTROL")
    assert all(consumer["num_waiting"] == 0 for consumer in consumers["consumers"])


async def test_the_whole_history_stays_in_the_stream(connection: Connection, publisher: Publisher) -> None:
    """It is its own audit log: the fold needs the last of each, the ledger all of it."""
    async with _feed(connection, publisher) as feed:
        for name in ("Ants", "Bees", "Crabs"):
            await feed.say(_org(name))
    reader = OrderedReader(connection, stream="CONTROL")
    await reader.start()
    await eventually(lambda: len(reader._waiting) == 3)
    await reader.close()


@asynccontextmanager
async def _feed(connection: Connection, publisher: Publisher) -> AsyncIterator[ControlFeed]:
    feed = ControlFeed(connection, publisher)
    await feed.start()
    yield feed
    await feed.stop()


@asynccontextmanager
async def _elsewhere(server: EmbeddedServer) -> AsyncIterator[ControlFeed]:
    """A feed with a connection of its own, as another process has it."""
    connection = await connect(server.url, name="elsewhere")
    publisher = Publisher(connection)
    await publisher.start()
    async with _feed(connection, publisher) as feed:
        yield feed
    await publisher.stop()
    await connection.close()


def _org(name: str, *, org: str = "org") -> OrgStated:
    return OrgStated(id=EventId(new_id()), ts_ns=1, by="test", producer="test", org=OrgId(org), name=name)


def _key(*, revoked: bool) -> KeyStated:
    return KeyStated(
        id=EventId(new_id()),
        ts_ns=1,
        by="test",
        producer="test",
        key_id=KeyId("key"),
        org=OrgId("org"),
        role=Role.CLIENT,
        hash="hash",
        created_ns=0,
        revoked=revoked,
    )


def _route(model: str) -> RouteStated:
    return RouteStated(
        id=EventId(new_id()),
        ts_ns=1,
        by="test",
        producer="test",
        route=RouteId("route"),
        provider="echo",
        models=(PublicModel(name=model),),
    )
