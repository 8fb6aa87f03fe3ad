"""What the proxy does to a connection is what a network does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import Link
from tests.waiting import eventually


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """To a server that says back what it hears."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    made = Link("test", server.sockets[0].getsockname()[1])
    await made.start()
    yield made
    await made.stop()
    server.close()


async def test_it_hands_on_what_is_said_and_the_end_of_it(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"x" * 1_000_000)
    writer.write_eof()
    assert await reader.read(-1) == b"x" * 1_000_000
    writer.close()
    await eventually(lambda: len(link) == 0)


async def test_a_cut_resets_both_sides_and_the_next_connection_works(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    link.cut()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"two")
    assert await reader.readexactly(3) == b"two"
    writer.close()


async def test_a_frozen_one_says_nothing_until_it_is_healed(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    link.freeze()
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(answer := asyncio.ensure_future(reader.readexactly(3))), 0.1)
    link.heal()
    assert await answer == b"two"
    writer.close()


async def test_a_delayed_one_is_late_and_in_order(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    link.delay(0.1)
    began = time.monotonic()
    for word in (b"one", b"two"):
        writer.write(word)
        await asyncio.sleep(0.01)
    assert await reader.readexactly(6) == b"onetwo"
    assert time.monotonic() - began >= 0.2  # there and back
    writer.close()


async def test_a_half_closed_one_tells_the_end_to_who_dialled(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    link.half_close()
    assert await reader.read(-1) == b""
    writer.close()


async def test_nobody_behind_it_is_a_reset(link: Link) -> None:
    link.target = 1
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
