"""The provider `vllm` before servers that know all, or less, of what vLLM knows; and with an engine of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.server import EmbeddedServer
from schemas.errors import Fault, ProviderFailed
from schemas.frames import Finished, Started
from schemas.ids import WorkerId
from schemas.settings import ModelSettings, NatsSettings, RouteSettings, VllmSettings, WorkerSettings
from tests.factories import make_job
from tests.fake_engine import fake_engine
from tests.integration.engine.conftest import FAKE, processes_of
from tests.integration.providers.heard import hear
from tests.integration.workers.rig import ROUTE, Desk
from tests.waiting import eventually
from workers.engine.phases import Phase
from workers.providers.vllm import Vllm
from workers.worker import Route, Worker

MODELS = (ModelSettings(name="m"),)
Start = Callable[..., Vllm]


def asking(text: str = "a b c", **members: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **members}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """A provider that is closed when the test ends; *told* hears what it says of itself."""
    made: list[Vllm] = []

    def start_one(told: list[str | None], **changes: Any) -> Vllm:
        provider = Vllm.from_route(route_of(**changes), WorkerSettings())
        made.append(provider)
        provider.attach(told.append)
        return provider

    yield start_one
    for provider in made:
        await provider.aclose()
        if provider.engine is not None:
            assert processes_of(provider.engine._command.socket) == []


def route_of(*flags: str, idle_unload_s: float = 0.0, **changes: Any) -> RouteSettings:
    own = VllmSettings(command=(sys.executable, str(FAKE)), args=flags, idle_unload_s=idle_unload_s)
    return RouteSettings(id=ROUTE, provider="vllm", max_concurrency=4, models=MODELS, vllm=own, **changes)


async def up(told: list[str | None]) -> None:
    await eventually(lambda: bool(told) and told[-1] is None, timeout_s=10, what="it can serve")


async def test_a_server_that_knows_token_ids_is_asked_for_them(start: Start) -> None:
    told: list[str | None] = []
    async with fake_engine() as (engine, base_url):
        provider = start(told, base_url=base_url)
        await up(told)
        assert provider.powers.token_ids
        heard = await hear(provider, make_job(asking(stream=True)))
        whole = await hear(provider, make_job(asking()))
        assert [chunk.token_ids for chunk in heard.chunks] == [(100,), (101,), (102,), (), ()]
        assert [chunk.prompt_token_ids for chunk in heard.chunks if chunk.prompt_token_ids] == [(0, 1, 2)]
        assert whole.chunks[0].token_ids == (100, 101, 102)
        assert not any(b"token_ids" in (chunk.members or b"") for chunk in [*heard.chunks, *whole.chunks])
        assert all(body["return_token_ids"] is True for body in engine.bodies)


@pytest.mark.parametrize("strict", [True, False])
async def test_a_server_that_knows_no_token_ids_is_not_asked_for_them(start: Start, strict: bool) -> None:
    told: list[str | None] = []
    async with fake_engine(token_ids=False, strict=strict) as (engine, base_url):
        provider = start(told, base_url=base_url)
        await up(told)
        assert not provider.powers.token_ids
        heard = await hear(provider, make_job(asking(stream=True)))
        assert heard.text == "a b c"
        assert heard.tokens == 3
        assert "return_token_ids" not in engine.bodies[-1]


async def test_an_engine_of_its_own_serves_and_is_gone_when_it_is_closed(start: Start) -> None:
    told: list[str | None] = []
    provider = start(told)
    assert told[0] is not None
    await up(told)
    assert (await hear(provider, make_job(asking(stream=True)))).text == "a b c"
    await provider.aclose()
    assert provider.engine is not None
    assert provider.engine.pid is not None
    assert processes_of(provider.engine._command.socket) == []


async def test_a_crash_in_a_stream_is_a_fault_at_once_and_the_engine_comes_back(start: Start) -> None:
    told: list[str | None] = []
    provider = start(told)
    await up(told)
    with pytest.raises(ProviderFailed):
        await hear(provider, make_job(asking("crash", stream=True)))
    await eventually(lambda: told[-1] is not None, timeout_s=1.0, what="it is told")
    with pytest.raises(Fault):
        await hear(provider, make_job(asking(stream=True)))
    await up(told)
    assert (await hear(provider, make_job(asking(stream=True)))).text == "a b c"


async def test_an_idle_engine_is_unloaded_and_the_first_job_loads_it(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher
) -> None:
    """Through a worker and the queue: the route stays up all the while, and the job that loads the engine waits for it."""
    desk = Desk(connection, publisher)
    await desk.start()
    name = WorkerId("worker-idle")
    link = await connect(nats_server.url, name=name)
    settings = route_of("--fake-start-s", "0.3", idle_unload_s=0.1)
    provider = Vllm.from_route(settings, WorkerSettings())
    engine = provider.engine
    assert engine is not None
    route = Route(settings, provider, MODELS)
    log = EventLog(link, publisher, producer=name)
    worker = Worker(link, log, [route], worker=name, settings=WorkerSettings(drain_s=1.0), nats_settings=NatsSettings())
    await worker.start()
    await eventually(lambda: engine.is_ready and route.down is None, timeout_s=10, what="the route is up")
    await eventually(lambda: engine.phase is Phase.STOPPED, timeout_s=10, what="it is unloaded")
    assert processes_of(engine._command.socket) == []
    assert route.down is None
    desk.presence.clear()
    job = await desk.publish()
    await eventually(lambda: Started in desk.kinds(job), what="the job is taken")
    await eventually(lambda: desk.is_done(job), timeout_s=10, what="the job is done")
    assert desk.kinds(job)[-1] is Finished
    said = [json.loads(bytes(chunk))["choices"] for frame in desk.of(job) for chunk in getattr(frame, "chunks", ())]
    assert "".join(choice["delta"].get("content", "") for choices in said for choice in choices) == "Hello there"
    assert not any(offer.down for presence in desk.presence for offer in presence.routes)
    await worker.drain()
    await provider.aclose()
    await link.close()
    assert processes_of(engine._command.socket) == []
