"""The provider `vllm` before servers that know all, or less, of what vLLM knows; and with an engine of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.server import EmbeddedServer
from schemas.errors import Fault, ProviderFailed, SetupError
from schemas.frames import Finished, Started
from schemas.ids import WorkerId
from schemas.jobs import EngineStats
from schemas.settings import ModelSettings, NatsSettings, RouteSettings, VllmSettings, WorkerSettings
from tests.factories import make_job
from tests.fake_engine import FakeEngine, fake_engine
from tests.integration.engine.conftest import FAKE, processes_of
from tests.integration.providers.heard import hear
from tests.integration.workers.rig import ROUTE, Desk
from tests.waiting import eventually
from workers.engine.phases import Phase
from workers.providers.vllm import Vllm
from workers.route import Route
from workers.worker import Worker

MODELS = (ModelSettings(name="m"),)
Serve = Callable[..., Awaitable[tuple[FakeEngine, str]]]
Start = Callable[..., Vllm]


def asking(text: str = "a b c", **members: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **members}


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A fake in this process: it, and its base URL."""
    async with AsyncExitStack() as running:

        async def serve_one(**wanted: Any) -> tuple[FakeEngine, str]:
            return await running.enter_async_context(fake_engine(**wanted))

        yield serve_one


@pytest.fixture
async def start(serve: Serve) -> AsyncIterator[Start]:
    """A provider that is closed when the test ends, before what *serve* serves; *told* hears what it says of itself."""
    made: list[Vllm] = []

    def start_one(told: list[str | None], *flags: str, **changes: Any) -> Vllm:
        provider = Vllm.from_route(route_of(*flags, **changes), WorkerSettings())
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
    return RouteSettings(id=ROUTE, provider="vllm", models=MODELS, vllm=own, **{"max_concurrency": 4, **changes})


async def up(told: list[str | None]) -> None:
    await eventually(lambda: bool(told) and told[-1] is None, timeout_s=10, what="it can serve")


async def test_a_server_that_knows_token_ids_is_asked_for_them(serve: Serve, start: Start) -> None:
    told: list[str | None] = []
    engine, base_url = await serve()
    provider = start(told, base_url=base_url)
    await up(told)
    assert provider.powers.token_ids
    heard = await hear(provider, make_job(asking(stream=True)))
    whole = await hear(provider, make_job(asking()))
    assert [number for chunk in heard.chunks for number in chunk.token_ids] == [100, 101, 102]
    assert [chunk.prompt_token_ids for chunk in heard.chunks if chunk.prompt_token_ids] == [(0, 1, 2)]
    assert whole.chunks[0].token_ids == (100, 101, 102)
    assert not any(b"token_ids" in piece for piece in [*heard.pieces, *whole.pieces])
    assert [body["return_token_ids"] for body in engine.bodies[-2:]] == [True, True]


@pytest.mark.parametrize("strict", [True, False])
async def test_a_server_that_knows_no_token_ids_is_not_asked_for_them(serve: Serve, start: Start, strict: bool) -> None:
    told: list[str | None] = []
    engine, base_url = await serve(token_ids=False, priority=False, strict=strict, metrics=())
    provider = start(told, base_url=base_url)
    await up(told)
    assert not provider.powers.token_ids
    heard = await hear(provider, make_job(asking(stream=True)))
    assert heard.text == "a b c"
    assert heard.tokens == 3
    assert "return_token_ids" not in engine.bodies[-1]
    assert (provider.slots(), provider.stats()) == (None, None)


FLEX = {"service_tier": "flex"}
ASKED_PRIORITIES: list[tuple[dict[str, Any], object]] = [
    ({}, None),
    (FLEX, 1),
    ({"service_tier": "auto"}, None),
    ({"priority": 7}, 7),
    ({"priority": -7}, 0),  # nobody goes before the others
    ({"priority": -7, **FLEX}, 1),
    ({"priority": 7, **FLEX}, 7),
    ({"priority": "high"}, "high"),  # the engine's to refuse
]


@pytest.mark.parametrize(("members", "priority"), ASKED_PRIORITIES, ids=str)
async def test_a_request_may_let_others_go_first_and_never_go_before_them(
    serve: Serve, start: Start, members: dict[str, Any], priority: object
) -> None:
    told: list[str | None] = []
    engine, base_url = await serve()
    provider = start(told, base_url=base_url)
    await up(told)
    assert provider.powers.priority
    await hear(provider, make_job(asking(**members)))
    assert engine.bodies[-1].get("priority") == priority


@pytest.mark.parametrize("wanted", [{"priority": False}, {"token_ids": False, "priority": False}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
async def test_priority_is_for_a_server_that_is_known_to_know_it(
    serve: Serve, start: Start, wanted: dict[str, bool], *, strict: bool
) -> None:
    """One that is silent about what it doesn't know shows by the token ids whether it is vLLM; then the member harms nothing."""
    told: list[str | None] = []
    engine, base_url = await serve(strict=strict, **wanted)
    provider = start(told, base_url=base_url)
    await up(told)
    known = not strict and "token_ids" not in wanted
    assert provider.powers.priority is known
    await hear(provider, make_job(asking(**FLEX)))
    assert ("priority" in engine.bodies[-1]) is known


@pytest.mark.parametrize("metrics", [("/metrics", "/metrics/"), ("/metrics",)], ids=["by name", "only all of them"])
async def test_an_engine_says_itself_how_much_room_it_has_and_how_it_does(
    serve: Serve, start: Start, metrics: tuple[str, ...]
) -> None:
    """A cache of 4096 tokens, and requests of 512 at most. What costs it milliseconds is asked for only where it must be."""
    told: list[str | None] = []
    engine, base_url = await serve(metrics=metrics)
    provider = start(told, base_url=base_url, max_concurrency=None)
    await up(told)
    assert provider.slots() == 8
    assert provider.stats() == EngineStats(running=0, waiting=0, cache_used=0.25, prefix_asked=200, prefix_found=50)
    assert ("/metrics" in engine.paths) is ("/metrics/" not in metrics)
    configured = start(told_of_second := [], base_url=base_url, max_concurrency=3)
    await up(told_of_second)
    assert configured.slots() is None, "what is configured counts"


@pytest.mark.parametrize(
    ("flags", "slots", "said"),
    [((), None, "256"), ((), 5, "5"), (("--max-num-seqs=6",), None, "6"), (("--max_num_seqs", "7"), 5, "7")],
)
async def test_an_engine_of_its_own_is_told_how_many_at_once(
    start: Start, flags: tuple[str, ...], slots: int | None, said: str
) -> None:
    told: list[str | None] = []
    provider = start(told, *flags, max_concurrency=slots)
    await up(told)
    assert provider.engine is not None
    line = provider.engine._command.log_file.read_text().splitlines()[0].replace("=", " ").replace("_", "-").split()
    assert [line[at + 1] for at, word in enumerate(line) if word == "--max-num-seqs"][-1] == said
    assert provider.slots() == (None if slots else min(8, int(said)))


async def test_an_engine_that_dies_behind_its_front_end_is_down_at_once_and_comes_back(start: Start) -> None:
    """The front end lives on here for as long as it likes; vLLM's takes some four seconds to end itself."""
    told: list[str | None] = []
    provider = start(told)
    await up(told)
    other = asyncio.create_task(hear(provider, make_job(asking("endless", stream=True))))
    await eventually(lambda: provider._running == 1, what="another stream")
    told.clear()
    with pytest.raises(ProviderFailed):
        await hear(provider, make_job(asking("die", stream=True)))
    assert told[0] == "the engine died", "before the job's slot is free again"
    with pytest.raises(Fault):
        await other
    with pytest.raises(Fault):
        await hear(provider, make_job(asking(stream=True)))
    await up(told)
    assert (await hear(provider, make_job(asking(stream=True)))).text == "a b c"


async def test_a_server_whose_engine_died_is_down_at_once_and_up_when_it_lives_again(
    serve: Serve, start: Start
) -> None:
    told: list[str | None] = []
    engine, base_url = await serve()
    provider = start(told, base_url=base_url)
    await up(told)
    with pytest.raises(ProviderFailed):
        await hear(provider, make_job(asking("die", stream=True)))
    assert told[-1] == "the engine died"
    await eventually(lambda: any("test request" in (word or "") for word in told), what="it is tried again")
    engine.dead = False
    await eventually(lambda: told[-1] is None, timeout_s=15, what="it is up")


async def test_a_fault_that_is_not_the_engines_end_leaves_the_route_up(serve: Serve, start: Start) -> None:
    told: list[str | None] = []
    _, base_url = await serve(strict=True)
    provider = start(told, base_url=base_url)
    await up(told)
    heard = len(told)
    with pytest.raises(Fault):
        await hear(provider, make_job(asking("hang up", stream=True)))
    assert len(told) == heard


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
    assert not provider.engine._command.socket.parent.exists(), "nor a folder of it"


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
    settings = route_of("--fake-start-s", "0.3", idle_unload_s=1.0)
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


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "~/none"])
def test_a_folder_that_is_not_there_is_told_at_once(model: str) -> None:
    own = VllmSettings(command=(sys.executable,), model=model)
    route = RouteSettings(id=ROUTE, provider="vllm", models=MODELS, vllm=own)
    with pytest.raises(SetupError, match="there is no folder"):
        Vllm.from_route(route, WorkerSettings())


def test_a_second_key_for_a_server_of_ones_own_is_refused_and_not_ignored() -> None:
    keys = tuple("env:PATH" for _ in range(2))
    route = RouteSettings(id=ROUTE, provider="vllm", base_url="http://127.0.0.1:1/v1", models=MODELS, api_keys=keys)
    with pytest.raises(SetupError, match="one key"):
        Vllm.from_route(route, WorkerSettings())


def test_a_machine_without_vllm_is_told_what_to_install() -> None:
    own = VllmSettings(command=("no-such-vllm",), model="org/m")
    route = RouteSettings(id=ROUTE, provider="vllm", models=MODELS, vllm=own)
    with pytest.raises(SetupError, match=r"penstock\[vllm\]"):
        Vllm.from_route(route, WorkerSettings())


def test_a_run_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = VllmSettings(command=(sys.executable,), model="org/m")
    route = RouteSettings(id=ROUTE, provider="vllm", models=MODELS, vllm=own)
    with pytest.raises(SetupError, match="the run folder"):
        Vllm.from_route(route, WorkerSettings(run_folder=str(tmp_path / "file" / "run")))
