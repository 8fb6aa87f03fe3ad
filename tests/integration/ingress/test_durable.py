"""The event that ends a request is on the disk before its client's last byte: a NATS that stands still just then shows it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.server import EmbeddedServer
from bus.streams import stream_state
from schemas import subjects
from tests.integration.ingress.gateway import Gateway, Lines, bearer, body
from tests.mock_provider import MockProvider
from tests.restarts import is_stopped
from tests.waiting import eventually

HELD_S = 0.5  # shorter than an error waits for its event

pytestmark = pytest.mark.timeout(40)


class Freezer:
    """Stops the NATS server as the closing event sets out for it."""

    def __init__(self, gateway: Gateway, server: EmbeddedServer) -> None:
        self.frozen = asyncio.Event()
        self._server = server
        self._publisher = gateway.ingress.log._publisher
        gateway.ingress.log._publisher = self  # type: ignore[assignment]  # as much of it as is used

    async def publish(self, subject: str, payload: bytes, **more: Any) -> int:
        if b'"request.finished"' in payload and not self.frozen.is_set():
            os.kill(self._server.pid, signal.SIGSTOP)
            await eventually(lambda: is_stopped(self._server.pid), every_s=0)
            self.frozen.set()
        return await Publisher.publish(self._publisher, subject, payload, **more)

    def thaw(self) -> None:
        os.kill(self._server.pid, signal.SIGCONT)


@pytest.fixture
def freezer(gateway: Gateway, nats_server: EmbeddedServer) -> Freezer:
    return Freezer(gateway, nats_server)


Ends = Callable[[bytes], bool]


@pytest.mark.parametrize(
    ("script", "ends"),
    [
        ({"tokens": 4, "pace_s": 0.1}, lambda event: event == b"data: [DONE]"),
        ({"tokens": 6, "cut_at": 3, "pace_s": 0.1}, lambda event: b'"error"' in event),
    ],
    ids=["done", "error"],
)
async def test_the_end_of_a_stream(  # noqa: PLR0917
    gateway: Gateway,
    freezer: Freezer,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    script: dict[str, Any],
    ends: Ends,
) -> None:
    mock.script(**script)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        reading = asyncio.create_task(stream.rest())
        await freezer.frozen.wait()
        await asyncio.sleep(HELD_S)
        assert not reading.done()
        assert not any(event["kind"] == "request.finished" for event in gateway.events)
        freezer.thaw()
        told = await reading
        assert [ends(event) for event in told].count(True) == 1
        assert ends(told[-1])
        await gateway.ending(stream.request_id)


@pytest.mark.parametrize(("script", "status"), [({"tokens": 3}, 200), ({"status": 500}, 502)], ids=["done", "error"])
async def test_the_only_byte_of_a_body(  # noqa: PLR0917
    gateway: Gateway,
    freezer: Freezer,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    script: dict[str, Any],
    status: int,
) -> None:
    mock.script(**script)
    asking = asyncio.create_task(session.post(gateway.chat_url, json=body(), headers=bearer()))  # type: ignore[arg-type]
    await freezer.frozen.wait()
    await asyncio.sleep(HELD_S)
    assert not asking.done()
    freezer.thaw()
    async with await asking as response:
        assert response.status == status
        await response.read()
        assert (await gateway.ending(response.headers["x-request-id"]))["http_status"] == status


async def test_one_that_is_fenced_off_tells_no_client_of_a_success(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """It was frozen, and its requests have been closed meanwhile. What it streamed is not taken back, but has no good end."""
    mock.script(tokens=30, pace_s=0.02)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        asking = asyncio.create_task(session.post(gateway.chat_url, json=body(), headers=bearer()))  # type: ignore[arg-type]
        await eventually(lambda: len(mock.seen) == 2 and all(seen.tokens_sent > 3 for seen in mock.seen))
        await gateway.ingress.log._publisher.publish(
            subjects.fence(gateway.ingress.switchboard._ingress), b"", timeout_s=5.0
        )
        told = await stream.rest()
        assert b"log_unavailable" in told[-1]
        assert not any(b"[DONE]" in event for event in told)
        async with await asking as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "log_unavailable"
    stored = b"".join(await _stored(gateway))
    assert b"request.accepted" in stored
    assert b"request.finished" not in stored
    assert b"request.rejected" not in stored
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "log_unavailable"
    assert b"".join(await _stored(gateway)).count(b"request.rejected") == 1


async def _stored(gateway: Gateway) -> list[bytes]:
    """All pages that are in the stream, which refuses some that a listener hears."""
    last = (await stream_state(gateway.ingress.connection, subjects.EVENTS))["last_seq"]
    reader = OrderedReader(gateway.ingress.connection, stream=subjects.EVENTS)
    await reader.start()
    pages: list[bytes] = []
    while len(pages) < last:
        pages += [message.data for message in await reader.batch(max_messages=100, wait_s=5.0)]
    await reader.close()
    return pages
