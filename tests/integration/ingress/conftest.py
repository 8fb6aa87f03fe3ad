"""A gateway for a test, with the settings that the test asks for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
import uvloop

from bus.server import EmbeddedServer
from tests.integration.ingress.gateway import Gateway, OpenGateway, gateway_up
from tests.mock_provider import MockProvider


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the processes run on: its sockets are not asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def mock() -> AsyncIterator[MockProvider]:
    async with MockProvider() as provider:
        yield provider


@pytest.fixture
async def open_gateway(nats_server: EmbeddedServer, mock: MockProvider) -> AsyncIterator[OpenGateway]:
    """Opens the test's gateway; when the test is over, nothing of any request may be left."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_(**settings: Any) -> Gateway:
            made = await stack.enter_async_context(gateway_up(nats_server.url, mock, **settings))
            stack.push_async_callback(made.quiet)
            return made

        yield open_


@pytest.fixture
async def gateway(open_gateway: OpenGateway) -> Gateway:
    return await open_gateway()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made
