"""What the end of a drain does to a request beside the hot path: `/v1/models`, `/admin`, readers of answers."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from ingress.app import _to_its_end
from tests.unit.ingress.doubles import Client, turns


@pytest.mark.parametrize("begun", [False, True])
async def test_it_is_told_that_the_process_stops_if_it_was_told_nothing_yet(*, begun: bool) -> None:
    start: Message = {"type": "http.response.start", "status": 200, "headers": []}

    async def slow(_: Scope, __: Receive, send: Send) -> None:
        if begun:
            await send(start)
        await asyncio.Event().wait()

    client = Client()
    task = asyncio.create_task(_to_its_end(slow, {"type": "http"}, client.receive, client.send))
    await turns()
    task.cancel()
    await task
    if begun:
        assert client.sent == [start]
    else:
        assert client.status == 503
        assert msgspec.json.decode(client.body)["error"]["code"] == "stopping"
