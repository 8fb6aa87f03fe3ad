"""The connection: how it begins, what ends it, how it comes back, and what its callers hear meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.errors
import pytest
from structlog.testing import capture_logs

from bus.connection import ApiError, BusUnavailable, Connection, Message, connect
from bus.server import EmbeddedServer
from bus.streams import ensure_streams
from schemas.errors import SetupError
from schemas.settings import NatsSettings
from tests.ports import free_port
from tests.restarts import cut, frozen, kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    "url",
    [
        "nats://penstock:{secret}@{address}",
        "penstock:{secret}@{address}",
        "nats://penstock:{secret}@{address},nats://penstock:{secret}@{address}",
        "nats://penstock:{secret}@with@{address}",
    ],
)
async def test_nobody_there_is_a_clear_error_in_time_that_keeps_the_secret(url: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    watch = Stopwatch()
    with pytest.raises(SetupError, match=address) as told:
        await connect(url.format(secret=SECRET, address=address), name="test", wait_s=0.3)
    assert watch.s < 3.0
    assert "no NATS server could be reached" in told.value.message
    assert SECRET not in _all_that_it_says(told.value)


async def test_who_waits_for_a_server_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.connection.SILENT_S", 0.5)  # by then it was refused
    address = f"127.0.0.1:{free_port()}"
    with capture_logs() as told, pytest.raises(SetupError):
        await connect(f"nats://penstock:{SECRET}@{address}", name="test", wait_s=0.8)
    (line,) = [each for each in told if each["event"] == "nats_not_reached_yet"]
    assert line["servers"] == f"nats://{address}"
    assert line["reason"].startswith("Connect")


async def test_a_wrong_credential_is_named_and_not_shown(nats_server: EmbeddedServer) -> None:
    address = nats_server.url.rpartition("@")[2]
    with pytest.raises(SetupError, match="Authorization Violation") as told:
        await connect(f"nats://penstock:{SECRET}@{address}", name="test", wait_s=1.0)
    assert SECRET not in _all_that_it_says(told.value)


@pytest.mark.parametrize("url", ["nats://127.0.0.1:99999999", "http://127.0.0.1:1,nats://127.0.0.1:1", "nats://"])
async def test_a_broken_address_is_a_clear_error(url: str) -> None:
    with pytest.raises(SetupError, match="no NATS server could be reached"):
        await connect(url, name="test", wait_s=0.3)


async def test_a_server_that_says_nothing_is_given_up_and_its_socket_closed() -> None:
    open_sockets = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_sockets
        open_sockets += 1
        await reader.read()
        writer.close()
        open_sockets -= 1

    async with _listening(silent) as address:
        with pytest.raises(SetupError):
            await connect(f"nats://{address}", name="test", wait_s=0.3)
        await eventually(lambda: open_sockets == 0, what="the end of the connection")
    gc.collect()  # a socket left open would be a ResourceWarning, and so an error


@pytest.mark.parametrize("version", ["2.14.9", "1.99.0"])
async def test_an_old_server_is_refused(version: str) -> None:
    async with _listening(_speaks_nats(version)) as address:
        with pytest.raises(SetupError, match=rf"is {version}; 2\.15 or newer is needed"):
            await connect(f"nats://penstock:{SECRET}@{address}", name="test", wait_s=2.0)


@pytest.mark.parametrize("version", ["2.15.0", "2.16.0-RC.1", "3.0.0"])
async def test_a_newer_server_is_taken(version: str) -> None:
    async with _listening(_speaks_nats(version)) as address:
        await (await connect(f"nats://{address}", name="test", wait_s=2.0)).close()


async def test_it_comes_back_by_itself_with_all_that_it_listened_to(nats_server: EmbeddedServer) -> None:
    one, other = await connect(nats_server.url, name="one"), await connect(nats_server.url, name="other")
    heard: list[bytes] = []
    await one.listen("word", _into(heard))
    await restart(nats_server, one, other)
    await other.say("word", b"hello")
    await eventually(lambda: heard == [b"hello"])
    await one.close()
    await other.close()


async def test_what_is_heard_comes_in_order_also_after_a_reconnect_and_a_listener_that_breaks_misses_but_its_own(
    nats_server: EmbeddedServer,
) -> None:
    one, other = await connect(nats_server.url, name="one"), await connect(nats_server.url, name="other")
    heard: list[bytes] = []

    def hear(message: Message) -> None:
        if message.data == b"3":
            raise RuntimeError
        heard.append(message.data)

    await one.hear("word.*", hear)
    await one.nc.flush()
    for number in range(100):
        await other.say("word.a", b"%d" % number)
    await eventually(lambda: len(heard) == 99)
    await restart(nats_server, one, other)
    await other.say("word.b", b"last")
    await eventually(lambda: heard[-1] == b"last")
    assert heard == [b"%d" % number for number in range(100) if number != 3] + [b"last"]
    await one.close()
    await other.close()


async def test_what_is_said_while_the_server_is_away_arrives_later(nats_server: EmbeddedServer) -> None:
    connection = await connect(nats_server.url, name="test")
    heard: list[bytes] = []
    await connection.listen("word", _into(heard))
    await kill(nats_server)
    await eventually(lambda: not connection.is_up)
    await connection.say("word", b"patience")
    await nats_server.start()
    await eventually(lambda: heard == [b"patience"])
    await connection.close()


async def test_those_who_asked_are_told_of_each_reconnect_until_they_forget_it(nats_server: EmbeddedServer) -> None:
    connection = await connect(nats_server.url, name="test")
    told: list[str] = []

    async def breaks() -> None:
        told.append("breaks")
        raise RuntimeError

    async def refused() -> None:
        told.append("refused")
        raise BusUnavailable

    async def counts() -> None:
        told.append("counts")

    connection.on_reconnect(breaks)
    connection.on_reconnect(refused)
    forget = connection.on_reconnect(counts)
    forget_lost = connection.on_disconnect(lambda: told.append("lost"))
    await restart(nats_server)
    await eventually(lambda: told == ["lost", "breaks", "refused", "counts"], what="all four, in order")
    forget()
    forget_lost()
    await restart(nats_server)
    await eventually(lambda: told[4:] == ["breaks", "refused"], what="those that are left")
    await connection.close()


async def test_it_reconnects_after_an_error_that_nats_py_takes_for_the_end(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    """Headers take this message over the server's bound: it says -ERR, whereupon nats-py would close for good."""
    heard: list[bytes] = []
    await connection.listen("word", _into(heard))
    await connection.nc.publish("word", b"x" * connection.max_payload, headers={"a": "b"})
    await eventually(lambda: not connection.is_up, what="the server's refusal")
    await eventually(lambda: connection.is_up, what="the reconnect")
    await connection.say("word", b"hello")
    await eventually(lambda: heard == [b"hello"])


async def test_a_server_that_falls_silent_is_noticed(nats_server: EmbeddedServer) -> None:
    """A cut cable closes no socket. nats-py alone takes four minutes to see it."""
    connection = await connect(nats_server.url, name="test", ping_every_s=0.1)
    with frozen(nats_server.pid):
        await eventually(lambda: not connection.is_up, timeout_s=2.0, what="the loss")
    await eventually(lambda: connection.is_up, what="the reconnect")
    await connection.close()


async def test_an_answer_that_comes_too_late_costs_nothing(nats_server: EmbeddedServer) -> None:
    """nats-py's reader breaks over the answer to a flush that was given up, and the connection is deaf from then on."""
    connection = await connect(nats_server.url, name="test", ping_every_s=30.0)
    heard: list[bytes] = []
    await connection.listen("word", _into(heard))
    with frozen(nats_server.pid), pytest.raises(nats.errors.FlushTimeoutError):
        await connection.nc.flush(timeout=0.1)
    await connection.say("word", b"hello")
    await eventually(lambda: heard == [b"hello"])
    assert connection.nc.stats["reconnects"] == 0
    await connection.close()


async def test_a_request_ends_at_once_with_the_connection(nats_server: EmbeddedServer, connection: Connection) -> None:
    async def never(_: Message) -> None:
        pass

    await connection.listen("deaf", never)
    asked = asyncio.create_task(connection.request("deaf", b"?", timeout_s=30.0))
    await connection.nc.flush()
    watch = Stopwatch()
    await kill(nats_server)
    with pytest.raises(BusUnavailable):
        await asked
    with pytest.raises(BusUnavailable):
        await connection.request("deaf", b"?", timeout_s=30.0)
    assert watch.s < 1.0


async def test_a_request_ends_in_time_without_an_answer(connection: Connection) -> None:
    async def never(_: Message) -> None:
        pass

    await connection.listen("deaf", never)
    with pytest.raises(BusUnavailable, match="no answer on deaf"):
        await connection.request("deaf", b"?", timeout_s=0.1)
    with pytest.raises(BusUnavailable, match="NoResponders"):
        await connection.request("nobody", b"?", timeout_s=5.0)


async def test_a_cancelled_request_is_cancelled(connection: Connection) -> None:
    async def never(_: Message) -> None:
        pass

    await connection.listen("deaf", never)
    asked = asyncio.create_task(connection.request("deaf", b"?", timeout_s=30.0))
    await connection.nc.flush()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not connection._requests


async def test_what_jetstream_refuses_says_why(connection: Connection) -> None:
    with pytest.raises(ApiError) as told:
        await connection.api("STREAM.INFO.NOTHING")
    assert (told.value.status, told.value.error_code) == (404, 10059)


async def test_settling_hands_on_what_was_sent_and_nothing_more(connection: Connection) -> None:
    heard: list[bytes] = []

    async def slowly(message: Message) -> None:
        await asyncio.sleep(0)
        heard.append(message.data)

    subscription = await connection.nc.subscribe("word", cb=slowly)
    said = [b"%d" % number + b"." * 4096 for number in range(500)]  # more than comes in one piece
    for word in said:
        await connection.say("word", word)
    await connection.settle(subscription)
    assert heard == said
    await connection.say("word", b"late")
    await connection.nc.flush()
    assert heard == said
    assert subscription._id not in connection.nc._subs


async def test_settling_does_not_hang_on_a_server_that_is_away(nats_server: EmbeddedServer) -> None:
    connection = await connect(nats_server.url, name="test")
    frozen_too, away = [await connection.nc.subscribe(word, cb=_into([])) for word in ("one", "two")]
    with frozen(nats_server.pid):
        await connection.settle(frozen_too)
    await kill(nats_server)
    await eventually(lambda: not connection.is_up)
    await connection.settle(away)
    assert not connection.nc._subs
    await connection.close()


async def test_settling_that_the_connection_breaks_under_leaves_nothing_at_the_server(
    nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reconnect, quicker than its wait, renews what was being ended: a pull's inbox that would swallow jobs."""
    monkeypatch.setattr("bus.connection.SETTLE_TIMEOUT_S", 3.0)  # a busy machine takes a second to reconnect
    one, other = [await connect(nats_server.url, name=name) for name in ("one", "other")]
    subscription = await one.nc.subscribe("word", cb=_into([]))
    await one.nc.flush()
    with frozen(nats_server.pid):
        settling = asyncio.create_task(one.settle(subscription))
        await eventually(lambda: one.nc._pongs and not one.nc._pending, every_s=0, what="it waits for the server")
        breaking = asyncio.create_task(cut(one))
        await eventually(lambda: not one.is_up, every_s=0, what="the connection is lost")
    await breaking
    assert not await one.has_listener("nobody", within_s=2.0)  # answered behind what the reconnect renewed
    assert await other.has_listener("word", within_s=0.2)  # renewed
    await settling
    await one.nc.flush()
    assert not await other.has_listener("word", within_s=0.2)
    assert subscription._id not in one.nc._subs
    await one.close()
    await other.close()


async def test_a_closed_connection_takes_nothing_and_closing_twice_is_peace(nats_server: EmbeddedServer) -> None:
    connection = await connect(nats_server.url, name="test")
    await connection.close()
    await connection.close()
    assert not connection.is_up
    with pytest.raises(BusUnavailable):
        await connection.say("word", b"hello")
    with pytest.raises(BusUnavailable):
        await connection.api("INFO")


async def test_closing_while_the_server_is_away_takes_no_time(nats_server: EmbeddedServer) -> None:
    connection = await connect(nats_server.url, name="test")
    await ensure_streams(connection, NatsSettings())
    await kill(nats_server)
    await eventually(lambda: not connection.is_up)
    watch = Stopwatch()
    await connection.close()
    assert watch.s < 3.0


def _into(heard: list[bytes]):  # noqa: ANN202
    async def note(message: Message) -> None:
        heard.append(message.data)

    return note


def _speaks_nats(version: str):  # noqa: ANN202
    info = {"server_id": "x", "version": version, "max_payload": 1024, "proto": 1, "headers": True}

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    return speak


@asynccontextmanager
async def _listening(serve) -> AsyncIterator[str]:  # noqa: ANN001
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    yield f"{host}:{port}"
    server.close()
    await server.wait_closed()


def _all_that_it_says(error: BaseException | None) -> str:
    said = ""
    while error is not None:
        said += f"{error} {error!r} {error.__dict__}"
        error = error.__cause__ or error.__context__
    return said


async def test_reconnecting_goes_on_after_an_error_that_nobody_expects(connection: Connection) -> None:
    """uvloop's transport raises a RuntimeError when it was closed between the server's greeting and ours, a race of microseconds.

    The client then stopped trying: a process that was up and deaf for ever.
    """
    greet, tries = connection.nc._process_connect_init, 0

    async def closed_meanwhile() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("the handler is closed")
        await greet()

    connection.nc._process_connect_init = closed_meanwhile  # type: ignore[method-assign]
    await cut(connection)
    assert tries == 2
    await connection.api("INFO")


async def test_a_transport_that_was_closed_under_us_is_a_lost_connection_and_no_error_of_who_publishes(
    connection: Connection,
) -> None:
    """uvloop's raises a RuntimeError then, and once the flusher has died of it nats-py lets it out of `publish`."""

    def closed(_: object) -> None:
        del connection.nc._transport.writelines
        raise RuntimeError("the handler is closed")

    reconnects = connection.nc.stats["reconnects"]
    connection.nc._flusher_task.cancel()
    await asyncio.gather(connection.nc._flusher_task, return_exceptions=True)
    connection.nc._transport.writelines = closed
    await connection.say("anything", b"")
    await eventually(lambda: connection.is_up and connection.nc.stats["reconnects"] > reconnects, what="the reconnect")
    await connection.api("INFO")
