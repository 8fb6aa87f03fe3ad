"""An ingress that stops: no client finds its connection closed under a request that is on its way."""

from __future__ import annotations

import asyncio

import pytest

from ingress.protocol import LINGER_S
from tests.integration.ingress.gateway import Gateway, Wire, body
from tests.mock_provider import MockProvider
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(30)


def _stop(gateway: Gateway) -> None:
    """What uvicorn says to each connection."""
    for connection in list(gateway.ingress.server.state.connections):
        connection.shutdown()  # type: ignore[union-attr]


async def test_a_kept_connection_takes_one_more_request_and_is_told_to_go(gateway: Gateway) -> None:
    async with Wire(gateway.base_url) as used, Wire(gateway.base_url) as fresh:
        used.ask(body())
        _, headers, _ = await used.answer()
        assert "connection" not in headers
        await eventually(lambda: len(gateway.ingress.server.state.connections) == 2)
        _stop(gateway)
        for wire in (used, fresh):
            wire.ask(body())
            status, headers, _ = await wire.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await wire.closed()


async def test_one_on_which_nothing_comes_is_closed_soon(gateway: Gateway) -> None:
    async with Wire(gateway.base_url) as idle, Wire(gateway.base_url) as slow:
        slow.send(b"POST /v1/chat")
        await eventually(lambda: len(gateway.ingress.server.state.connections) == 2)
        _stop(gateway)
        watch = Stopwatch()
        slow.send(b"/completions")
        assert await idle.closed()
        assert await slow.closed()
        assert watch.wall_s > LINGER_S * 0.9
        assert watch.s < LINGER_S + 2.0


async def test_an_answer_that_has_not_begun_says_it_itself(gateway: Gateway, mock: MockProvider) -> None:
    mock.script(tokens=3, pace_s=0.1)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body())
        await eventually(lambda: mock.seen)
        _stop(gateway)
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await wire.closed()


async def test_a_stream_that_has_begun_ends_whole_and_the_connection_takes_one_more(
    gateway: Gateway, mock: MockProvider
) -> None:
    """Its headers are out and promised that the connection stays: its client may use it at once."""
    mock.script(tokens=5, pace_s=0.1)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=True))
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        _stop(gateway)
        assert b"[DONE]" in await wire.reader.readuntil(b"0\r\n\r\n")
        wire.ask(body())
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await wire.closed()
        await asyncio.sleep(0)
