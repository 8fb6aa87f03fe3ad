"""The event that ends a request is on the disk before its client's last byte: a NATS that stands still just then shows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
import uvicorn

from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.server import EmbeddedServer
from bus.streams import stream_state
from ingress import books, process
from schemas import codec, subjects
from tests.factories import make_event
from tests.integration.ingress.gateway import Gateway, Lines, Wire, bearer, body
from tests.mock_provider import MockProvider
from tests.restarts import frozen, is_stopped
from tests.waiting import eventually

HELD_S = 0.5  # shorter than an error waits for its event

pytestmark = pytest.mark.timeout(40)


class Freezer:
    """Stops the NATS server as the closing event sets out for it, or another kind of event that a test names."""

    def __init__(self, gateway: Gateway, server: EmbeddedServer) -> None:
        self.frozen = asyncio.Event()
        self.kind = b"request.finished"
        self.waits_for: bytes | None = None  # another kind, which is to be behind it
        self._log = gateway.ingress.log
        self._server = server
        self._publisher = gateway.ingress.log._publisher
        gateway.ingress.log._publisher = self  # type: ignore[assignment]  # as much of it as is used

    async def publish(self, subject: str, payload: bytes, **more: Any) -> int:
        if b'"%b"' % self.kind in payload and not self.frozen.is_set():
            if self.waits_for is not None:
                await eventually(lambda: any(self.waits_for in line for line, _ in self._log._waiting), every_s=0)  # type: ignore[operator]
            os.kill(self._server.pid, signal.SIGSTOP)
            await eventually(lambda: is_stopped(self._server.pid), every_s=0)
            self.frozen.set()
        return await Publisher.publish(self._publisher, subject, payload, **more)

    def thaw(self) -> None:
        os.kill(self._server.pid, signal.SIGCONT)


@pytest.fixture
def freezer(gateway: Gateway, nats_server: EmbeddedServer) -> Iterator[Freezer]:
    made = Freezer(gateway, nats_server)
    yield made
    made.thaw()


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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a log that is away."""
    monkeypatch.setattr(books, "RECORD_WAIT_S", HELD_S)
    monkeypatch.setattr(books, "LAST_WORD_WAIT_S", HELD_S)


def _stop_waiting(gateway: Gateway) -> None:
    """What uvicorn does at the end of a drain."""
    for task in list(gateway.ingress.server.state.tasks):
        task.cancel()


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("hasty")
async def test_of_a_success_that_is_on_its_way_to_a_log_that_is_away_no_end_is_told(
    gateway: Gateway, freezer: Freezer, mock: MockProvider, session: aiohttp.ClientSession, *, stream: bool, stops: bool
) -> None:
    """It was told that the server is stopping, and then the log stored the success: books and client disagreed."""
    mock.script(tokens=4, pace_s=0.02)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=stream))
        await freezer.frozen.wait()
        if stops:
            _stop_waiting(gateway)
        told = await _all(wire)
        assert (b"[DONE]" in told, b"error" in told, b"HTTP/1.1" in told) == (False, False, stream)
        freezer.thaw()
    assert (await gateway.ending())["status"] == "completed"
    assert [await _asked_again(session, gateway)] == [410 if stream else 404]


async def _all(wire: Wire) -> bytes:
    """What comes until the connection ends, however it does."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while data := await wire.reader.read(65536):
            told += data
    return told


async def _asked_again(session: aiohttp.ClientSession, gateway: Gateway) -> int:
    url = f"{gateway.chat_url}/{(await gateway.ending())['request_id']}"
    async with session.get(url, headers=bearer()) as response:
        return response.status


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("hasty")
async def test_a_success_that_never_set_out_is_recorded_as_the_error_that_is_told(
    gateway: Gateway,
    freezer: Freezer,
    mock: MockProvider,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stream: bool,
    stops: bool,
) -> None:
    """Another page was on its way when the log went away, so this one could be taken back."""
    monkeypatch.setattr(books, "STARTED_WAIT_S", 0.0)  # it has that page to itself
    freezer.kind, freezer.waits_for = b"attempt.started", b"request.finished"
    mock.script(tokens=4, pace_s=0.02)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=stream), connection="close")
        await freezer.frozen.wait()
        if stops:
            _stop_waiting(gateway)
        told = await _all(wire)
        freezer.thaw()
    code = "stopping" if stops else "log_unavailable"
    assert code.encode() in told
    end = await gateway.ending()
    assert (end["status"], end["http_status"], end["code"]) == ("failed", 200 if b" 200 OK" in told else 503, code)
    assert end["usage"].get("completion_tokens", 0) == len(re.findall(rb"\bw\d\b", told))


async def test_a_process_that_stops_holds_on_to_its_events_for_what_its_drain_did_not_need(
    gateway: Gateway, nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "FLUSH_WAIT_S", 0.0)
    log, event = gateway.ingress.log, make_event()
    server = process._Server(uvicorn.Config(gateway, lifespan="off", log_config=None))
    with frozen(nats_server.pid):
        log.note(event)
        await process._flush((log,), server, drain_s=10.0)  # nobody told it to stop, so there is no time left
        server.told_at = asyncio.get_running_loop().time()
        flushing = asyncio.create_task(process._flush((log,), server, drain_s=10.0))
        await asyncio.sleep(0.2)
        assert not flushing.done()
    await flushing
    assert codec.encode(event) in b"".join(await _stored(gateway))


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
