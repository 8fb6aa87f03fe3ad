"""A client of the load leaves as one that means to: nothing of it stays behind in its own process."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.faults.asking import ask
from tests.faults.prompts import Prompt
from tests.faults.proxy import Link
from tests.faults.records import End, Record
from tests.sdk import sdk
from tests.waiting import eventually

CLIENTS = 5
ANSWER_S = 0.1
ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
}


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """To a server that takes its time."""

    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(ANSWER_S)
        return web.json_response(ANSWER)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made = Link("client>server", runner.addresses[0][1])
    await made.start()
    yield made
    await made.stop()
    await runner.cleanup()


def _record() -> Record:
    return Record(Prompt("asked", 1, 2), "m", False, time.monotonic())


async def test_who_leaves_at_once_leaves_no_connection_open_that_had_broken(link: Link) -> None:
    client = sdk(f"http://127.0.0.1:{link.port}/v1", "key")
    records = [_record() for _ in range(CLIENTS)]
    await asyncio.gather(*(ask(client, record) for record in records))
    assert [record.end for record in records] == [End.COMPLETED] * CLIENTS
    link.cut()
    await eventually(lambda: len(link) == 0, what="the cut")
    record = _record()
    await ask(client, record, leaves_after_s=0.0)  # in the moment in which it lets go of the broken ones
    assert record.end is End.LEFT
    gc.collect()  # pytest makes an error of a connection that was lost sight of while open
    await client.close()
