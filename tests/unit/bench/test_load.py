"""The load generator against the mock provider, over real sockets."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench import provider
from bench.load import FAILED_LIMIT, Shape, make_plan, percentile, run_load


@pytest.fixture
async def server() -> AsyncIterator[asyncio.Server]:
    listening = await provider.start(chunks=4)
    yield listening
    listening.close()


def url(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize(("shape", "streams"), [("whole", 0), ("stream", 50), ("mixed", 25)])
async def test_every_request_is_verified(server: asyncio.Server, shape: Shape, streams: int) -> None:
    window = await run_load(make_plan(url(server), "k", shape=shape, requests=50, chunks=4), connections=5)
    assert (window.total, window.total_streams, window.failed) == (50, streams, 0)
    assert window.completed == 50
    assert 0 < window.p50_ms <= window.p99_ms


async def test_a_timed_run_counts_only_its_window(server: asyncio.Server) -> None:
    plan = make_plan(url(server), "k", shape="whole", seconds=0.1, warmup_s=0.1, chunks=4)
    window = await run_load(plan, connections=2)
    assert 0 < window.completed < window.total
    assert window.failed == 0


async def test_a_wrong_number_of_chunks_fails_each_request_up_to_a_limit(server: asyncio.Server) -> None:
    plan = make_plan(url(server), "k", shape="stream", requests=10_000, chunks=5)
    window = await run_load(plan, connections=FAILED_LIMIT)
    assert window.failed >= FAILED_LIMIT
    assert window.total == 0
    assert list(window.errors) == ["a stream of 4 tokens in 5 events, with [DONE]"]


async def test_a_server_that_is_not_there_fails_the_run_at_once(server: asyncio.Server) -> None:
    plan = make_plan(url(server), "k", shape="whole", requests=10)
    server.close()
    await server.wait_closed()
    window = await run_load(plan, connections=2)
    assert window.failed
    assert list(window.errors) == ["cannot connect (ConnectionRefusedError)"]


def test_percentile_takes_the_nearest_rank() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([], 0.5) == 0.0
