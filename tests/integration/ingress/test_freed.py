"""What a request took is free when it is over: it does not wait for Python's collector, which would come for hundreds at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import aiohttp
import pytest

from ingress.attempt import Attempt
from ingress.books import Books
from ingress.exchange import Exchange
from ingress.relay import Relay
from tests.integration.ingress.gateway import Gateway, Lines, bearer, body
from tests.mock_provider import MockProvider
from tests.waiting import eventually

OF_A_REQUEST = (Exchange, Books, Attempt, Relay)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _nothing_left(gateway: Gateway) -> None:
    await gateway.quiet()
    await eventually(lambda: not _left(), what=f"nothing left of the request, not {_left()}")


def _left() -> list[str]:
    return [type(found).__name__ for found in gc.get_objects() if isinstance(found, OF_A_REQUEST)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_served_leaves_nothing_to_the_collector(
    gateway: Gateway, session: aiohttp.ClientSession, *, stream: bool
) -> None:
    async with session.post(gateway.chat_url, json=body(stream=stream), headers=bearer()) as response:
        assert b"one" in await response.read()
    await _nothing_left(gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_fails_leaves_nothing_to_the_collector(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, *, stream: bool
) -> None:
    mock.script(status=400)
    async with session.post(gateway.chat_url, json=body(stream=stream), headers=bearer()) as response:
        assert response.status == 400
    await _nothing_left(gateway)


async def test_a_client_that_leaves_leaves_nothing_to_the_collector(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.next()
    await _nothing_left(gateway)
