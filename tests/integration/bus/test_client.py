"""The hot path: what is heard at once and written at once, beside what goes nats-py's way."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from bus.connection import Connection, Message
from bus.server import EmbeddedServer
from tests.restarts import frozen
from tests.waiting import eventually

MESSAGES = 2000


async def test_messages_of_all_sizes_are_heard_in_order(connection: Connection) -> None:
    """Most reads end in the middle of a message, which nats-py takes over; what comes behind it must not overtake it."""
    heard: list[int] = []
    listened: list[int] = []

    def hear(message: Message) -> None:
        heard.append(int(message.data.split(b" ")[0]))

    async def listen(message: Message) -> None:
        listened.append(int(message.data.split(b" ")[0]))
        if len(listened) % 100 == 0:
            await asyncio.sleep(0)

    await connection.hear("test.order.heard", hear)
    await connection.listen("test.order.*", listen)
    sizes = random.Random(1)
    for number in range(MESSAGES):
        padding = b"x" * sizes.choice((0, 1, 100, 3_000, 70_000))
        await connection.say("test.order.heard", b"%d %b" % (number, padding))
        if number % 50 == 0:
            await connection.nc.flush()
    await eventually(lambda: len(heard) == len(listened) == MESSAGES, timeout_s=20.0)
    assert heard == list(range(MESSAGES))
    assert listened == list(range(MESSAGES))


async def test_a_handler_that_breaks_costs_nobody_a_message(connection: Connection) -> None:
    heard: list[bytes] = []

    def hear(message: Message) -> None:
        heard.append(message.data)
        raise RuntimeError

    await connection.hear("test.breaks", hear)
    for word in (b"1", b"2", b"3"):
        await connection.say("test.breaks", word)
    await eventually(lambda: heard == [b"1", b"2", b"3"])
    assert connection.is_up


async def test_who_has_unsubscribed_hears_no_more_and_is_forgotten(connection: Connection) -> None:
    heard: list[bytes] = []
    subscription = await connection.hear("test.ends", lambda message: heard.append(message.data))
    await connection.say("test.ends", b"before")
    await connection.settle(subscription)
    await connection.say("test.ends", b"behind")
    await connection.nc.flush()
    assert heard == [b"before"]
    assert subscription._id not in connection.nc.at_once


async def test_what_is_said_after_a_lull_is_on_its_way_at_once(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    """Before the event loop has another turn: here it has none."""
    got = threading.Event()
    with _plain_subscriber(nats_server.url, "test.lull", got):
        await asyncio.sleep(0.05)
        assert connection.is_quiet
        assert connection.say_at_once([("test.lull", b"now")])
        assert got.wait(5.0)
        assert not connection.nc._pending


async def test_what_is_said_in_one_turn_is_written_together_and_after_a_lull_at_once(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.client.LULL_S", 3600.0)
    for word in (b"1", b"2", b"3"):
        await connection.say("test.together", word)
    assert len(connection.nc._pending) == 3
    await asyncio.sleep(0)
    assert not connection.nc._pending
    monkeypatch.setattr("bus.client.LULL_S", 0.01)
    await asyncio.sleep(0.05)
    await connection.say("test.together", b"4")
    assert not connection.nc._pending


async def test_nothing_is_lost_while_the_server_does_not_read(
    nats_server: EmbeddedServer, connection: Connection
) -> None:
    """The socket fills up; then what is said waits, in its order, for as long as there is room for it."""
    heard: list[int] = []
    await connection.hear("test.full", lambda message: heard.append(int(message.data[:6])))
    await connection.nc.flush()
    with frozen(nats_server.pid):
        for number in range(400):
            await connection.say("test.full", b"%06d" % number + bytes(40_000))
            await asyncio.sleep(0)
        assert connection.nc._pending_data_size > 0
    await eventually(lambda: len(heard) == 400, timeout_s=20.0)
    assert heard == list(range(400))


def _plain_subscriber(url: str, subject: str, got: threading.Event) -> socket.socket:
    """A subscriber with nothing but a socket and a thread, so that it hears while the loop stands still."""
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5.0)
    sock.recv(4096)
    login = f'{{"verbose":false,"user":"{parts.username}","pass":"{parts.password}"}}'
    sock.sendall(f"CONNECT {login}\r\nSUB {subject} 1\r\nPING\r\n".encode())
    said = b""
    while b"PONG" not in said:
        said += sock.recv(4096)

    def listen() -> None:
        said = b""
        while b"now" not in said:
            said += sock.recv(4096)
        got.set()

    threading.Thread(target=listen, daemon=True).start()
    time.sleep(0.01)
    return sock


async def test_who_is_cancelled_as_the_server_answers_is_cancelled(
    connection: Connection, nats_server: EmbeddedServer
) -> None:
    """Else a task that flushes in a loop outlives its end: a worker that NATS came back to just then never ended."""
    with frozen(nats_server.pid):
        flushing = asyncio.create_task(connection.nc.flush())
        await eventually(lambda: connection.nc._pongs, every_s=0, what="it waits for the server")
        connection.nc._pongs[0].set_result(True)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
    await connection.nc.flush()  # the answer to the first one was expected


async def test_who_is_cancelled_as_there_is_room_is_cancelled(
    connection: Connection, nats_server: EmbeddedServer
) -> None:
    """nats-py's own waiting for room takes a cancellation for none."""
    with frozen(nats_server.pid):
        waiting = asyncio.create_task(connection.nc._flush_pending(force_flush=True))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
