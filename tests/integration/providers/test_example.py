"""The worked example of docs/providers.md does what a provider must."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import web

from schemas.errors import Fault, ProviderFailed, ProviderRejected, ProviderUnreachable
from schemas.ids import RouteId
from schemas.money import Usage
from schemas.settings import RouteSettings, WorkerSettings
from tests.factories import make_job
from tests.integration.providers.example_provider import Lines
from tests.integration.providers.heard import hear
from tests.waiting import eventually


class LinesServer:
    def __init__(self) -> None:
        self.lines: list[Any] = [{"text": "w0"}, {"text": " w1"}, {"text": "", "end": "stop", "prompt": 7, "tokens": 2}]
        self.status = 200
        self.stall = False
        self.gone = False

    async def serve(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.json_response({"error": {"message": "no such thing"}}, status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            for line in self.lines:
                await response.write(json.dumps(line).encode() + b"\n")
            if self.stall:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.gone = True
            raise
        return response


@pytest.fixture
async def server() -> AsyncIterator[tuple[LinesServer, Lines]]:
    made = LinesServer()
    app = web.Application()
    app.router.add_post("/v1/generate", made.serve)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    provider = Lines(RouteSettings(id=RouteId("r"), provider="lines", base_url=address), WorkerSettings())
    yield made, provider
    await provider.aclose()
    await runner.cleanup()


@pytest.mark.parametrize("stream", [True, False])
async def test_it_answers(server: tuple[LinesServer, Lines], stream: bool) -> None:
    heard = await hear(server[1], make_job({"stream": stream}))
    assert heard.text == "w0 w1"
    assert heard.voices[0].finish == ["stop"]
    assert heard.usages[-1].usage == Usage(prompt_tokens=7, completion_tokens=2)
    assert len(heard.pieces) == (3 if stream else 1)


async def test_an_error_is_a_fault(server: tuple[LinesServer, Lines]) -> None:
    for status, fault in ((400, ProviderRejected), (500, ProviderFailed)):
        server[0].status = status
        with pytest.raises(Fault) as caught:
            await hear(server[1], make_job())
        assert type(caught.value) is fault


async def test_an_answer_that_ends_early_is_no_success(server: tuple[LinesServer, Lines]) -> None:
    server[0].lines.pop()
    with pytest.raises(ProviderFailed):
        await hear(server[1], make_job({"stream": True}))


async def test_closing_it_stops_the_server(server: tuple[LinesServer, Lines]) -> None:
    server[0].lines.pop()
    server[0].stall = True
    async with aclosing(server[1].generate(make_job({"stream": True}))) as chunks:
        await anext(chunks)
    await eventually(lambda: server[0].gone, what="the server sees that its client left")


async def test_after_aclose_it_serves_no_more(server: tuple[LinesServer, Lines]) -> None:
    await server[1].aclose()
    with pytest.raises(ProviderUnreachable):
        await hear(server[1], make_job())
