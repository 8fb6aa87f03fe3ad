"""How an answer is written: its head goes out with the first of its body."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from ingress.protocol import BoundedProtocol, bounded_protocol
from schemas.settings import IngressSettings

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}


class Transport:
    """Writes down what is written, piece by piece."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, _: str) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def _answered(app: ASGIApp, request: bytes = REQUEST) -> Transport:
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    config.load()
    protocol: BoundedProtocol = bounded_protocol(IngressSettings())(
        config=config, server_state=ServerState(), app_state={}
    )
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(request)
    await asyncio.gather(*protocol.tasks)
    await asyncio.sleep(0)
    protocol.connection_lost(None)
    return transport


async def test_the_head_goes_out_with_the_first_of_the_body() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": False})

    first, second = (await _answered(app)).writes
    assert first.startswith(b"HTTP/1.1 200 OK\r\nx-a: b\r\n")
    assert first.endswith(b"\r\n\r\n3\r\none\r\n")
    assert second == b"3\r\ntwo\r\n0\r\n\r\n"


async def test_a_head_without_a_body_yet_waits_for_no_other_turn() -> None:
    begun = asyncio.Event()

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START)
        for _turn in range(3):
            await asyncio.sleep(0)
        begun.set()
        await send({"type": "http.response.body", "body": b"one", "more_body": False})

    head, body = (await _answered(app)).writes
    assert begun.is_set()
    assert head.endswith(b"\r\n\r\n")
    assert body == b"3\r\none\r\n0\r\n\r\n"


async def test_a_connection_that_ends_with_its_answer_says_all_of_it_before() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({**START, "headers": [(b"connection", b"close"), (b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    transport = await _answered(app)
    assert b"".join(transport.writes).endswith(b"connection: close\r\ncontent-length: 0\r\n\r\n")
    assert transport.closed


async def test_an_application_that_breaks_behind_the_head_has_said_it() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START)

    transport = await _answered(app)
    assert transport.closed
    assert transport.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")


async def test_who_asks_before_sending_a_body_is_told_to_go_on_first() -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(START)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    asks = b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx"
    assert (await _answered(app, asks)).writes[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
