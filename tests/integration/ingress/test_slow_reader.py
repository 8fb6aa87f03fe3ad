"""A client that does not read costs a bounded amount of memory and of time, and no other client anything."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from ingress.problems import CLIENT_LEFT_STATUS
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import CLIENT_KEY, Gateway, OpenGateway, bearer, body
from tests.mock_provider import MockProvider
from tests.waiting import eventually

WORD_BYTES = 16_000
WORDS = 1500  # 24 MB: more than the sockets' own buffers can take
BUFFER_BYTES = 256 * 1024
TEXT = " ".join(["x" * WORD_BYTES] * WORDS)


@contextlib.asynccontextmanager
async def _client_that_reads_nothing(gateway: Gateway, given: dict[str, Any]) -> AsyncIterator[socket.socket]:
    raw = msgspec.json.encode(given)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT_KEY}\r\n"
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(made, ("127.0.0.1", int(gateway.base_url.split(":")[2].split("/")[0])))
        await loop.sock_sendall(made, f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        yield made


async def test_a_stream_that_nobody_reads_is_cut_off_cancelled_and_recorded(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_buffered_bytes=BUFFER_BYTES))
    mock.script(text=TEXT, pace_s=0.0001)
    async with _client_that_reads_nothing(gateway, body(stream=True)) as client:
        event = await gateway.ending()
        assert (event["status"], event["code"], event["http_status"]) == (
            "cancelled",
            "client_too_slow",
            CLIENT_LEFT_STATUS,
        )
        assert event["estimated"] is True
        receipt = await gateway.receipt(event["request_id"])
        assert (receipt["outcome"], receipt["code"]) == ("cancelled", "client_too_slow")
        await eventually(lambda: mock.seen[-1].gone_s is not None, what="the provider's connection closed")
        assert mock.seen[-1].tokens_sent < WORDS
        await gateway.quiet()
        with pytest.raises(ConnectionError):
            await _read_to_the_end(client)
    mock.script()
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        assert response.status == 200


async def _read_to_the_end(client: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(client, 1 << 20):
        pass


async def test_what_waits_for_a_client_that_reads_nothing_is_bounded(
    open_gateway: OpenGateway, mock: MockProvider
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_buffered_bytes=BUFFER_BYTES))
    mock.script(text=TEXT, pace_s=0.0001)
    most = 0
    async with _client_that_reads_nothing(gateway, body(stream=True)):
        while not [e for e in gateway.events if e["kind"] == "request.finished"]:
            waiting = sum(relay._bytes for relay in gateway.ingress.switchboard._relays.values())
            most = max(most, waiting)
            await asyncio.sleep(0)
    (finished,) = [e for e in gateway.events if e["kind"] == "request.finished"]
    assert finished["code"] == "client_too_slow"  # the bound was reached, which a look between two turns may miss
    assert 0 < most <= 2 * BUFFER_BYTES  # the bound and one frame


async def test_a_client_that_reads_late_but_in_time_gets_everything(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway()
    words = 400  # 6.4 MB, less than the bound
    mock.script(text=" ".join(["x" * WORD_BYTES] * words))
    async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as response:
        await eventually(lambda: mock.seen[-1].finished_s is not None)
        came = await response.read()
    assert came.count(b"x" * WORD_BYTES) == words
    assert came.endswith(b"data: [DONE]\n\n")


async def test_the_end_of_an_answer_that_nobody_reads_does_not_wait_for_ever(
    open_gateway: OpenGateway, mock: MockProvider
) -> None:
    """All of it fits into the relay's bound, so nothing overflows: only the last write never gets room."""
    gateway = await open_gateway(ingress=IngressSettings(max_buffered_bytes=64 * 1024 * 1024), write_timeout_s=0.3)
    mock.script(text=TEXT)
    async with _client_that_reads_nothing(gateway, body(stream=True)):
        event = await gateway.ending()
        assert event["status"] in ("completed", "cancelled")
        await gateway.quiet()
    async with _client_that_reads_nothing(gateway, body()):
        await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.finished"]) == 2)
        await gateway.quiet()


async def test_a_big_frame_for_a_client_that_reads_is_no_overflow(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_buffered_bytes=1000))
    mock.script(text="x" * 500_000)
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        assert response.status == 200
        assert b"x" * 500_000 in await response.read()
