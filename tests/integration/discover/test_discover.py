"""Servers appear, change and disappear while a worker runs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import MutableMapping
from typing import Any

import pytest

from schemas.frames import Delta, Faulted, Finished
from schemas.ids import RouteId
from schemas.jobs import Continues, EngineStats
from schemas.settings import RouteSettings
from tests.integration.discover.conftest import FAST, Boot
from tests.local_servers import Chat, LlamaCpp, LmStudio, Ollama, OtherModels, Reply, Server, Vllm, Website
from tests.ports import free_port
from tests.waiting import eventually
from workers.local.found import Pace

Logged = list[MutableMapping[str, Any]]

SLOW = Pace(poll_every_s=60.0)
BROKEN = Reply({"error": {"message": "out of memory", "type": "api_error"}}, 500)


def named(logged: Logged, event: str) -> Logged:
    return [line for line in logged if line["event"] == event]


def ollama(*models: str, **more: Any) -> Ollama:
    made = Ollama(**more)
    for size, model in enumerate(models, start=1):
        made.pull(model, size=size * 10**9)
    return made


def lm_studio(*models: str, **more: Any) -> LmStudio:
    made = LmStudio(**more)
    for model in models:
        made.pull(model)
    return made


@pytest.mark.parametrize(
    ("server", "route", "models", "slots"),
    [
        (ollama("qwen3:0.6b", "llama3.2:3b"), "ollama", ["llama3.2:3b", "qwen3:0.6b"], 2),
        (lm_studio("qwen/qwen3-4b"), "lmstudio", ["qwen/qwen3-4b"], 4),
        (LlamaCpp(slots=3), "llamacpp", ["Qwen3-0.6B-Q8_0"], 3),
        (Vllm(), "vllm", ["Qwen/Qwen3-0.6B"], 32),  # a cache of 65536 tokens
    ],
    ids=["ollama", "lmstudio", "llamacpp", "vllm"],
)
async def test_a_server_is_told_by_its_own_api_checked_and_served(
    boot: Boot, logged: Logged, *, server: Chat, route: str, models: list[str], slots: int
) -> None:
    async with server:
        machine = await boot(server)
        await machine.serves(route, *models)
        offer = machine.offer(route)
        assert offer is not None
        assert (offer.slots, offer.provider) == (slots, "vllm" if route == "vllm" else "openai")
        assert {model.price.output for model in offer.models} == {0}
        questions = [each.body["max_tokens"] for each in server.asked("/v1/chat/completions")]
        assert questions == [1] * (3 if route == "vllm" else 1)  # of a vLLM also whether it goes on with an answer
        assert server.unexpected == []
        job = await machine.send(route, models[0], {"stream": True})
        assert isinstance(await machine.ended(job), Finished)
        assert machine.text(job) == "one two three four five "
    (found,), (served,) = named(logged, "local_server_found"), named(logged, "local_server_served")
    assert (found["route"], found["address"]) == (route, server.address)
    assert sorted(served["models"]) == models


async def test_a_vllm_that_is_found_is_used_as_one(boot: Boot) -> None:
    """Asked for token ids, which go into the frames and not to the client; and its own numbers are passed on."""
    async with Vllm() as server:
        machine = await boot(server)
        await machine.serves("vllm", "Qwen/Qwen3-0.6B")
        job = await machine.send("vllm", "Qwen/Qwen3-0.6B", {"stream": True, "service_tier": "flex"})
        assert isinstance(await machine.ended(job), Finished)
        asked = server.asked("/v1/chat/completions")[-1].body
        assert (asked["return_token_ids"], asked["priority"]) == (True, 1)
        frames = [frame for frame in machine.frames[job.nonce] if isinstance(frame, Delta | Finished)]
        assert [number for frame in frames for number in frame.token_ids] == [0, 1, 2, 3, 4]
        assert not any(b"token_ids" in bytes(chunk) for frame in frames for chunk in frame.chunks)
        offer = machine.offer("vllm")
        assert offer is not None
        assert offer.engine == EngineStats(running=1, waiting=0, cache_used=0.125)
        assert offer.models[0].fingerprint is not None
        assert offer.models[0].continues is Continues.EXACT


async def test_a_vllm_whose_engine_died_takes_no_jobs_until_it_lives_again(boot: Boot) -> None:
    """Its front end still answers to everything but chats for seconds; only its health tells."""
    async with Vllm() as server:
        machine = await boot(server)
        await machine.serves("vllm", "Qwen/Qwen3-0.6B")
        server.dead = True
        job = await machine.send("vllm", "Qwen/Qwen3-0.6B")
        assert isinstance(await machine.ended(job), Faulted)
        await eventually(lambda: machine.down("vllm") == "the engine died")
        polls = len(server.asked("/v1/models"))
        await eventually(lambda: len(server.asked("/v1/models")) > polls + 2, what="two more polls")
        assert machine.down("vllm") == "the engine died"
        server.dead = False
        await machine.serves("vllm", "Qwen/Qwen3-0.6B")


async def test_a_model_that_is_pulled_appears_and_one_that_is_removed_disappears(boot: Boot) -> None:
    async with ollama("small") as server:
        machine = await boot(server)
        await machine.serves("ollama", "small")
        server.pull("big", size=40 * 10**9)
        await machine.serves("ollama", "small", "big")
        assert server.generated == ["small"], "nothing is loaded to see whether it would load"
        job = await machine.send("ollama", "big")
        assert isinstance(await machine.ended(job), Finished)
        server.remove("small")
        await machine.serves("ollama", "big")


async def test_a_server_that_stops_disappears_and_is_checked_anew_when_it_is_back(boot: Boot, logged: Logged) -> None:
    async with ollama("m", port=free_port()) as server:
        machine = await boot(server)
        await machine.serves("ollama", "m")
        await server.stop()
        await eventually(lambda: machine.offer("ollama") is None)
        await server.start()
        await machine.serves("ollama", "m")
        assert server.generated == ["m", "m"]
    assert [line["route"] for line in named(logged, "local_server_gone")][:1] == ["ollama"]


async def test_servers_that_come_later_are_found_beside_each_other(boot: Boot) -> None:
    one, other, third = ollama("a", port=free_port()), lm_studio("b", port=free_port()), LlamaCpp()
    async with one, other, third:
        await one.stop()
        await other.stop()
        machine = await boot(one, other, third)
        await machine.serves("llamacpp", "Qwen3-0.6B-Q8_0")
        await one.start()
        await other.start()
        await machine.serves("ollama", "a")
        await machine.serves("lmstudio", "b")


async def test_two_servers_of_a_kind_have_routes_of_their_own(boot: Boot) -> None:
    async with LlamaCpp(model="one.gguf") as one, LlamaCpp(model="two.gguf") as two:
        machine = await boot(one, two)
        await eventually(lambda: len(machine.heard[machine.worker.id].routes) == 2)
        routes = {offer.route for offer in machine.heard[machine.worker.id].routes}
        assert routes in ({"llamacpp", f"llamacpp-{one.port}"}, {"llamacpp", f"llamacpp-{two.port}"})


async def test_a_refused_job_ends_the_route_at_once(boot: Boot) -> None:
    async with ollama("m") as server:
        machine = await boot(server, pace=SLOW)
        await machine.serves("ollama", "m")
        await server.stop()
        job = await machine.send("ollama", "m")
        faulted = await machine.ended(job)
        assert isinstance(faulted, Faulted)
        assert faulted.code == "upstream_unreachable"
        await eventually(lambda: machine.offer("ollama") is None, timeout_s=2.0)


async def test_what_runs_may_finish_when_its_model_is_removed(boot: Boot) -> None:
    async with ollama("m", "n") as server:
        machine = await boot(server)
        await machine.serves("ollama", "m", "n")
        server.pace_s = 0.1
        job = await machine.send("ollama", "n", {"stream": True})
        await eventually(lambda: server.streaming == 1)
        server.remove("n")
        await machine.serves("ollama", "m")
        assert isinstance(await machine.ended(job), Finished)


async def test_a_server_that_only_falls_silent_is_gone_soon(boot: Boot) -> None:
    async with ollama("m") as server:
        machine = await boot(server)
        await machine.serves("ollama", "m")
        server.silent.set()
        began = time.monotonic()
        await eventually(lambda: machine.offer("ollama") is None)
        assert time.monotonic() - began > FAST.answer_wait_s, "it had its time"


async def test_a_server_that_is_too_busy_to_answer_stays_while_it_generates(boot: Boot) -> None:
    async with ollama("m") as server:
        machine = await boot(server)
        await machine.serves("ollama", "m")
        server.pace_s = 0.4
        job = await machine.send("ollama", "m", {"stream": True})
        await eventually(lambda: server.streaming == 1)
        server.silent.set()
        assert isinstance(await machine.ended(job), Finished)
        assert machine.served("ollama") == ["m"], "through more time-outs than it would have had in silence"
        await eventually(lambda: machine.offer("ollama") is None)


async def test_only_what_is_loaded_is_asked_for_a_token_where_something_is(boot: Boot) -> None:
    server = ollama("small", "big", "bigger")
    server.loaded = ["big"]
    async with server:
        machine = await boot(server)
        await machine.serves("ollama", "small", "big", "bigger")
        assert server.generated == ["big"]
        assert server.loads == []


async def test_with_nothing_loaded_the_smallest_model_is_the_proof(boot: Boot) -> None:
    async with ollama("small", "big", "bigger") as server:
        machine = await boot(server)
        await machine.serves("ollama", "small", "big", "bigger")
        assert server.loads == ["small"]


async def test_a_model_that_fails_is_withheld_and_the_next_is_tried(boot: Boot, logged: Logged) -> None:
    server = ollama("small", "big", "bigger")
    server.broken["small"] = BROKEN
    async with server:
        machine = await boot(server)
        await machine.serves("ollama", "big", "bigger")
        assert server.generated[:2] == ["small", "big"]
    (warning,) = named(logged, "local_server_not_served")
    assert "small" in warning["reason"]


async def test_a_server_that_can_not_generate_is_shown_with_the_reason_and_tried_again(
    boot: Boot, logged: Logged
) -> None:
    server = ollama("m")
    server.broken["m"] = BROKEN
    async with server:
        machine = await boot(server)
        await eventually(lambda: len(server.generated) >= 3)
        assert machine.down("ollama") == "its test request failed: m: The provider failed (HTTP 500)."
        assert machine.served("ollama") == []
        del server.broken["m"]
        await machine.serves("ollama", "m")
    assert len(named(logged, "local_server_not_served")) == 1, "not every few seconds"


async def test_a_failed_check_is_repeated_less_and_less_often(boot: Boot) -> None:
    server = ollama("m")
    server.broken["m"] = BROKEN
    async with server:
        began = time.monotonic()
        await boot(server, pace=Pace(poll_every_s=0.02, retry_min_s=0.2, retry_max_s=60.0))
        await eventually(lambda: len(server.asked("/api/tags")) > 60)
        due = 1 + math.log2((time.monotonic() - began) / 0.2 + 1)  # at about 0, 0.2, 0.6 and 1.4 s
        assert 2 <= len(server.generated) <= due + 0.5


async def test_embedding_models_and_models_in_the_cloud_are_not_served_for_chat(boot: Boot) -> None:
    server = ollama("m")
    server.pull("nomic-embed-text", size=1, capabilities=("embedding",))
    server.pull("gpt-oss:120b-cloud", size=2, remote_host="https://ollama.com:443", remote_model="gpt-oss:120b")
    async with server, lm_studio("chat") as other:
        other.pull("text-embedding-nomic-embed-text-v1.5", type_="embeddings")
        machine = await boot(server, other)
        await machine.serves("ollama", "m")
        await machine.serves("lmstudio", "chat")


async def test_an_older_ollama_is_asked_once_for_what_each_model_can(boot: Boot) -> None:
    server = ollama("m", "n", old=True)
    server.pull("embed", size=1, capabilities=("embedding",))
    async with server:
        machine = await boot(server)
        await machine.serves("ollama", "m", "n")
        await eventually(lambda: len(server.asked("/api/tags")) > 5)
        assert sorted(each.body["model"] for each in server.asked("/api/show")) == ["embed", "m", "n"]


async def test_lm_studio_that_may_not_load_is_served_with_what_is_loaded(boot: Boot) -> None:
    server = lm_studio("a", "b", jit=False)
    server.models["b"]["state"] = "loaded"
    async with server:
        machine = await boot(server)
        await machine.serves("lmstudio", "b")
        assert server.unexpected == [], "it would log an error for each"


async def test_polling_asks_one_small_question_and_generates_nothing(boot: Boot) -> None:
    servers: list[Chat] = [ollama("m"), lm_studio("n"), LlamaCpp(), Vllm()]
    async with servers[0], servers[1], servers[2], servers[3]:
        machine = await boot(*servers)
        await eventually(lambda: sum(bool(machine.served(r)) for r in ("ollama", "lmstudio", "llamacpp", "vllm")) == 4)
        for server in servers:
            server.seen.clear()
        await eventually(lambda: all(len(server.seen) >= 5 for server in servers))
        for server in servers:
            assert len({each.path for each in server.seen}) == 1
            assert {each.method for each in server.seen} == {"GET"}


async def test_llama_cpp_is_served_once_it_has_loaded_its_model(boot: Boot) -> None:
    server = LlamaCpp()
    server.loading = True
    async with server:
        machine = await boot(server)
        await eventually(lambda: machine.offer("llamacpp") is not None)
        assert machine.served("llamacpp") == []
        server.loading = False
        await machine.serves("llamacpp", "Qwen3-0.6B-Q8_0")


async def test_a_server_that_asks_for_a_key_is_not_served_and_says_so(boot: Boot) -> None:
    server = LlamaCpp()
    server.key = "secret"
    async with server:
        machine = await boot(server)
        await eventually(lambda: "test request failed" in machine.down("llamacpp"))
        assert machine.served("llamacpp") == []


@pytest.mark.parametrize("server", [Website(), OtherModels()], ids=["website", "other-models"])
async def test_a_stranger_is_not_taken_for_a_model_server(boot: Boot, server: Server) -> None:
    async with server:
        machine = await boot(server)
        await eventually(lambda: len(server.asked("/v1/models")) > 3)
        assert machine.worker.routes() == []
        assert server.asked("/v1/chat/completions") == []


async def test_a_configured_route_keeps_its_address_and_its_name(boot: Boot) -> None:
    async with ollama("a") as mine, ollama("b") as other:
        route = RouteSettings(id=RouteId("ollama"), provider="openai", base_url=f"http://localhost:{mine.port}/v1")
        machine = await boot(mine, other, routes=(route,))
        await machine.serves(f"ollama-{other.port}", "b")
        assert mine.seen == []
        assert machine.worker.routes() == [f"ollama-{other.port}"]


async def test_machines_with_different_models_take_only_jobs_that_they_can_do(boot: Boot) -> None:
    async with ollama("a", "both") as one, ollama("b", "both") as two:
        first, second = await boot(one), await boot(two)
        await first.serves("ollama", "a", "both")
        await second.serves("ollama", "b", "both")
        jobs = [await first.send("ollama", model) for model in ("a", "b") * 5]
        for job in jobs:
            assert isinstance(await first.ended(job), Finished)
        assert set(one.generated) <= {"a", "both"}
        assert set(two.generated) <= {"b", "both"}


async def test_a_pools_models_share_its_slots(boot: Boot) -> None:
    """Each model has a consumer of its own; were each given all slots, there would be as many answers as models times slots."""
    models = ("a", "b", "c", "d")
    async with ollama(*models) as server:
        machine = await boot(server)
        await machine.serves("ollama", *models)
        server.pace_s = 0.01
        server.streaming_most = 0
        jobs = await asyncio.gather(*(machine.send("ollama", model, {"stream": True}) for model in models * 5))
        for job in jobs:
            assert isinstance(await machine.ended(job), Finished)
        assert server.streaming_most == 2
        await eventually(lambda: [r.free for r in machine.heard[machine.worker.id].routes] == [2])


async def test_an_ollama_without_models_is_found_and_served_when_it_has_one(boot: Boot) -> None:
    async with ollama() as server:
        machine = await boot(server, pace=FAST)
        await eventually(lambda: machine.offer("ollama") is not None)
        assert machine.served("ollama") == []
        server.pull("m")
        await machine.serves("ollama", "m")
