"""A full backlog: who is told to come again, when, and what the waiting costs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from bus.connection import Connection
from bus.server import EmbeddedServer
from bus.streams import stream_state
from schemas import subjects
from tests.integration.ingress.gateway import (
    CLIENT_KEY,
    MODEL,
    Gateway,
    Headers,
    OpenGateway,
    Wire,
    bearer,
    body,
    headers_of,
    route_settings,
    soon,
    worker_up,
)
from tests.measured import measured
from tests.mock_provider import MockProvider
from tests.waiting import eventually

CLIENTS = int(os.environ.get("WAITING_CLIENTS", "600"))
EACH_MAX_KIB = 64  # of the ingress's memory, for one client that waits; measured: 25 to 30
READER_MAX_MIB = 6  # the same for one that reads too slowly, with 256 KiB of frames; measured: 3
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.timeout(60 + CLIENTS // 10)


async def _ask(session: aiohttp.ClientSession, gateway: Gateway, **more: Any) -> tuple[int, Headers, float]:
    async with session.post(gateway.chat_url, json=body(**more), headers=bearer()) as response:
        await response.read()
        return response.status, headers_of(response), time.monotonic()


async def _bound_backlog(connection: Connection, count: int) -> None:
    answer = await connection.api("STREAM.INFO.JOBS")
    await connection.api("STREAM.UPDATE.JOBS", {**answer["config"], "max_msgs_per_subject": count})


@pytest.mark.parametrize("each_s", [0.3, 0.7])
async def test_retry_after_is_about_the_time_in_which_the_backlog_is_begun(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession, each_s: float
) -> None:
    gateway = await open_gateway(slots=1)
    backlog = 6
    await _bound_backlog(gateway.ingress.connection, backlog)
    mock.script(delay_s=each_s)
    asking = [asyncio.create_task(_ask(session, gateway)) for _ in range(3)]
    await asyncio.gather(*asking)  # so it is known how fast they begin
    seen = len(mock.seen)
    waiting = [asyncio.create_task(_ask(session, gateway, mock={"delay_s": 2.0}))]
    await eventually(lambda: len(mock.seen) > seen)
    waiting += [asyncio.create_task(_ask(session, gateway)) for _ in range(backlog)]
    await gateway.jobs_waiting(backlog)
    refused_at = time.monotonic()
    status, headers, _ = await _ask(session, gateway)
    assert status == 429
    told_s = int(headers["retry-after"])
    served = await asyncio.gather(*waiting)
    assert {status for status, _, _ in served} == {200}
    real_s = max(at for _, _, at in served) - refused_at - each_s  # the last one of them had begun
    measured("retry_after_s", {"told": told_s, "real": round(real_s, 2)})
    assert real_s / 3 <= told_s <= math.ceil(real_s * 2) + 1


async def test_without_another_route_a_full_backlog_is_a_429_of_the_clients_own_and_no_work(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(slots=1)
    await _bound_backlog(gateway.ingress.connection, 1)
    mock.script(delay_s=2.0)
    first = asyncio.create_task(_ask(session, gateway))
    await eventually(lambda: mock.answering == 1)
    mock.script()
    second = asyncio.create_task(_ask(session, gateway))
    await gateway.jobs_waiting(1)
    status, headers, _ = await _ask(session, gateway)
    assert (status, headers["x-penstock-tried"]) == (429, "mock;code=backlog_full")
    assert 1 <= int(headers["retry-after"]) <= 60
    event = await gateway.ending(headers["x-request-id"])
    assert (event["status"], event["code"], event["cost_pico"]) == ("rejected", "backlog_full", 0)
    assert [status for status, _, _ in await asyncio.gather(first, second)] == [200, 200]


@contextlib.asynccontextmanager
async def _ingress_process(nats_url: str, folder: Path, **settings: Any) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Its base URL, and the process."""
    ready, config = folder / "ready.json", folder / "penstock.toml"
    config.write_text("[ingress.timeouts]\nqueue_s = 3000.0\n", encoding="utf-8")
    environ = {
        **os.environ,
        "PENSTOCK_NATS": nats_url,
        "PENSTOCK_API_KEY": CLIENT_KEY,
        **{f"PENSTOCK_INGRESS_{name.upper()}": str(value) for name, value in settings.items()},
    }
    command = [sys.executable, "-P", "-m", "penstock", "ingress", "--port", "0", "--ready-file", str(ready)]
    command += ["--config", str(config)]
    process = await asyncio.create_subprocess_exec(*command, env=environ, cwd=ROOT)
    try:
        await eventually(ready.exists, timeout_s=20, what="an ingress")
        port = msgspec.json.decode(ready.read_bytes())["port"]
        yield f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()


async def _served(base_url: str, session: aiohttp.ClientSession) -> None:
    async def listed() -> bool:
        async with session.get(f"{base_url}/models", headers=bearer()) as response:
            return MODEL in [model["id"] for model in (await response.json())["data"]]

    await eventually(listed, timeout_s=10, what="the model")  # type: ignore[arg-type]  # T is the coroutine's


async def test_clients_that_wait_cost_little_memory_each_and_nothing_when_they_are_gone(
    nats_server: EmbeddedServer,
    connection: Connection,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    tmp_path: Path,
) -> None:
    """Half of them stream. The long form is ``make waiting``: 10,000 clients."""
    route = route_settings(mock, slots=1)
    mock.script(stall_at=-1)
    bounds = {"max_concurrent_requests": 2 * CLIENTS, "max_connections": 2 * CLIENTS}
    async with (
        _ingress_process(nats_server.url, tmp_path, **bounds) as (base_url, process),
        worker_up(nats_server.url, route),
    ):
        await _served(base_url, session)
        await _bound_backlog(connection, 2 * CLIENTS)
        floor = CLIENTS // 10
        grown = []
        for _ in range(2):
            async with contextlib.AsyncExitStack() as stack:
                await _wait_in_line(stack, base_url, connection, floor)
                before = process.memory_info().rss
                await _wait_in_line(stack, base_url, connection, CLIENTS - floor)
                grown.append((process.memory_info().rss - before) / (CLIENTS - floor) / 1024)
            await soon(lambda: _nobody(connection), what="an empty queue", timeout_s=60 + CLIENTS / 50)
        measured("kib_per_waiting_client", [round(each, 1) for each in grown])
        assert grown[0] < EACH_MAX_KIB
        assert grown[1] < max(grown[0] / 2, 8)  # what the first of them took is used again
        mock.script()
        async with session.post(f"{base_url}/chat/completions", json=body(), headers=bearer()) as response:
            assert response.status == 200


async def _wait_in_line(stack: contextlib.AsyncExitStack, base_url: str, connection: Connection, count: int) -> None:
    """Returns when *count* more clients wait; the first of all is being served."""
    before = await _waiting(connection)
    for number in range(count):
        wire = await stack.enter_async_context(Wire(base_url))
        wire.ask(body(stream=number % 2 == 0))
    least = before + count - (before == 0)
    await soon(lambda: _at_least(connection, least), what=f"{least} jobs", timeout_s=60 + count / 50)


async def _waiting(connection: Connection) -> int:
    return int((await stream_state(connection, subjects.JOBS))["messages"])


async def _at_least(connection: Connection, count: int) -> bool:
    return await _waiting(connection) >= count


async def _nobody(connection: Connection) -> bool:
    return await _waiting(connection) == 0


async def test_clients_that_read_a_byte_a_second_cost_a_bounded_amount_of_memory(
    nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    buffered, slow = 256 * 1024, 8
    route = route_settings(mock, slots=slow + 1)
    mock.script(text=" ".join(["x" * 16_000] * 1500), pace_s=0.0005)  # 24 MB each: the sockets don't take it
    async with (
        _ingress_process(nats_server.url, tmp_path, max_buffered_bytes=buffered) as (base_url, process),
        worker_up(nats_server.url, route),
    ):
        await _served(base_url, session)
        before = process.memory_info().rss
        async with contextlib.AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(Wire(base_url)) for _ in range(slow)]
            for wire in wires:
                wire.reader._limit = 1  # type: ignore[attr-defined]  # the kernel's buffers are the only ones
                wire.ask(body(stream=True))
            readings = [before]
            sampling = asyncio.create_task(_sample(process, readings))
            until = time.monotonic() + 25
            while mock.answering or len(mock.seen) < slow:
                assert time.monotonic() < until, "they were not cut off"
                for wire in wires:
                    with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
                        await asyncio.wait_for(wire.reader.read(1), 0.02)
                await asyncio.sleep(1 - slow * 0.02)
            sampling.cancel()
        most = max(readings) - before
        measured("mib_of_slow_readers", round(most / slow / 2**20, 2))
        assert most < slow * READER_MAX_MIB * 2**20
        assert all(seen.gone_s is not None for seen in mock.seen)
        mock.script()
        async with session.post(f"{base_url}/chat/completions", json=body(), headers=bearer()) as response:
            assert response.status == 200


async def _sample(process: psutil.Process, readings: list[int]) -> None:
    while True:
        readings.append(process.memory_info().rss)
        await asyncio.sleep(0.02)
