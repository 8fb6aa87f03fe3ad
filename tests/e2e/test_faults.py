"""Parts are killed with -9 under load: clients get an answer or a clear error, all comes back, every event is there once."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from typing import Any

import openai
import pytest

from schemas.jobs import PRESENCE_EVERY_S, PRESENCE_MISSED_MAX
from tests.e2e.asking import Heard, ask, messages, read, row, works
from tests.e2e.deployment import MODEL, Deployment, Provider
from tests.measured import measured
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

LOST_WITHIN_S = PRESENCE_EVERY_S * PRESENCE_MISSED_MAX + 2.0
BACK_WITHIN_S = 5.0


pytestmark = pytest.mark.timeout(60)


async def _restarted(up: Deployment, role: str, old: int) -> None:
    """Returns when the ready file names another process for *role*."""
    await eventually(lambda: up.pid(role) != old, timeout_s=10, what=f"another {role}")


async def _heard_of(up: Deployment) -> None:
    """Returns when the ingress serves the model."""
    async with up.sdk() as client:

        async def served() -> bool:
            return MODEL in [model.id async for model in client.models.list()]

        await eventually(served, timeout_s=15, what="the model")  # type: ignore[arg-type]  # T is the coroutine's


async def test_a_worker_killed_in_the_middle_is_an_honest_error_and_another_takes_over(
    broken_up: Deployment,
    provider: Provider,
) -> None:
    """A stream that has begun can't go on; a request of which nothing was delivered is done again, unseen."""
    broken_up.expected |= {"process_died"}
    provider.script(tokens=4000, pace_s=0.01)
    async with broken_up.sdk() as client:
        streaming = asyncio.create_task(read(client))
        await eventually(lambda: provider.answering() == 1 and provider.seen()[0]["tokens_sent"] > 5, every_s=0.05)
        asking = asyncio.create_task(
            ask(client, "again", extra_body={"mock": {"tokens": 3, "pace_s": 0, "delay_s": 2}})
        )
        await eventually(lambda: provider.answering() == 2)
        watch = Stopwatch()
        pid = broken_up.kill("worker")
        stream = await streaming
        measured("worker_killed_to_error_s", round(watch.wall_s, 2))
        assert watch.s < LOST_WITHIN_S
        assert (stream.status, stream.code) == (200, "worker_lost")
        whole = await asking
        assert (whole.code, whole.text) == (None, "w0 w1 w2")
    await _restarted(broken_up, "worker", pid)
    provider.script()
    assert await works(broken_up) < BACK_WITHIN_S
    told = await row(broken_up, stream.request_id)
    assert (told["status"], told["code"], told["estimated"], told["attempts"]) == ("failed", "worker_lost", True, 1)
    assert 0 < told["completion_tokens"] <= 4000
    again = await row(broken_up, whole.request_id)
    assert (again["status"], again["completion_tokens"], again["attempts"]) == ("completed", 3, 2)
    outcomes = "SELECT epoch, outcome FROM attempts WHERE request_id = ? ORDER BY epoch"
    tried = [(each["epoch"], each["outcome"]) for each in broken_up.sql(outcomes, whole.request_id)]
    assert tried == [(1, "lost"), (2, "completed")]


async def test_an_ingress_killed_comes_back_on_the_same_port_with_its_keys_and_models(
    broken_up: Deployment,
    provider: Provider,
) -> None:
    broken_up.expected |= {"process_died"}
    broken_up.expected |= {
        "ingress_gone",
        "ingress_lost",
        "requests_closed",
    }  # of the stream, if this module lasts so long
    base_url, key = broken_up.base_url, broken_up.api_key
    provider.script(tokens=200, pace_s=0.01)
    async with broken_up.sdk() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        await anext(aiter(stream))
        pid = broken_up.kill("ingress")
        with pytest.raises(openai.APIConnectionError):
            await _exhaust(stream)
    provider.script()
    took = await works(broken_up)
    measured("ingress_killed_to_first_answer_s", round(took, 2))
    assert took < BACK_WITHIN_S
    await _restarted(broken_up, "ingress", pid)
    assert (broken_up.base_url, broken_up.api_key) == (base_url, key)
    await _heard_of(broken_up)
    await eventually(lambda: provider.answering() == 0, timeout_s=10, what="the end of what nobody waits for")


async def _exhaust(stream: openai.AsyncStream[Any]) -> None:
    async for _ in stream:
        pass


async def test_nats_killed_while_requests_run_costs_none_of_them(
    broken_up: Deployment,
    provider: Provider,
) -> None:
    broken_up.expected |= {"process_died", "event_log_unavailable", "frame_not_sent", "connection_error"}
    provider.script(tokens=100, pace_s=0.01)
    async with broken_up.sdk() as client:
        running = [asyncio.create_task(read(client) if n % 2 else ask(client)) for n in range(10)]
        await eventually(lambda: provider.answering() == 10)
        began = time.monotonic()
        pid = broken_up.kill("nats")
        heard: list[Heard] = await asyncio.gather(*running)
        measured("nats_killed_to_last_answer_s", round(time.monotonic() - began, 2))
    await _restarted(broken_up, "nats", pid)
    assert [each.code for each in heard] == [None] * 10
    assert {each.text for each in heard} == {" ".join(f"w{number}" for number in range(100))}
    provider.script()
    assert await works(broken_up) < BACK_WITHIN_S
    for each in heard:
        told = await row(broken_up, each.request_id)
        assert (told["status"], told["completion_tokens"], told["attempts"]) == ("completed", 100, 1)


async def test_nats_killed_while_idle_is_not_noticed_by_the_next_client(
    broken_up: Deployment,
) -> None:
    broken_up.expected |= {"process_died", "event_log_unavailable", "connection_error"}
    assert await works(broken_up) < BACK_WITHIN_S
    pid = broken_up.kill("nats")
    await _restarted(broken_up, "nats", pid)
    took = await works(broken_up)
    measured("nats_restarted_to_first_answer_s", round(took, 2))
    assert took < BACK_WITHIN_S


async def test_a_client_that_reads_nothing_is_cut_off_and_told_of(broken_up: Deployment, provider: Provider) -> None:
    provider.script(text=" ".join(["x" * 16_000] * 1500), pace_s=0.002)
    base_url, key = broken_up.base_url, broken_up.api_key
    raw = json.dumps({"model": MODEL, "messages": messages("hi"), "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(base_url.split(":")[2].split("/")[0])))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        client.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)

        def told() -> list[dict[str, Any]]:
            return broken_up.sql("SELECT * FROM requests WHERE code = 'client_too_slow'")

        (only,) = await eventually(told, timeout_s=15, every_s=0.1, what="the request's end")
        await eventually(lambda: provider.answering() == 0)
        with pytest.raises(ConnectionResetError):
            _read_to_the_end(client)
    (seen,) = provider.seen()
    assert (only["status"], only["http_status"], only["estimated"]) == ("cancelled", 499, True)
    assert only["completion_tokens"] > 0
    assert seen["tokens_sent"] < 1500


def _read_to_the_end(client: socket.socket) -> None:
    while client.recv(1 << 20):
        pass


async def test_the_ledger_killed_again_and_again_under_load_has_every_event_once(
    broken_up: Deployment, provider: Provider
) -> None:
    broken_up.expected |= {"process_died"}
    provider.script(tokens=3)
    async with broken_up.sdk() as client:
        await row(broken_up, (await ask(client)).request_id)  # and so what was before it is in the ledger too
    provider.forget()
    before = {each["request_id"] for each in broken_up.sql("SELECT request_id FROM requests")}
    dice = random.Random(7)
    heard: list[Heard] = []
    over = asyncio.Event()

    async def load(client: openai.AsyncOpenAI, number: int) -> None:
        while not over.is_set():
            heard.append(await (ask(client) if number % 2 else read(client)))

    async with broken_up.sdk() as client:
        loading = [asyncio.create_task(load(client, number)) for number in range(6)]
        for _ in range(3):
            pid = broken_up.kill("ledger")
            await _restarted(broken_up, "ledger", pid)
            await asyncio.sleep(dice.random() * 0.7)
        over.set()
        await asyncio.gather(*loading)
    assert {each.code for each in heard} == {None}
    ids = {each.request_id for each in heard}
    assert len(ids) == len(heard) > 30

    def caught_up() -> bool:
        told = broken_up.sql("SELECT request_id FROM requests WHERE status <> 'open'")
        return ids <= {each["request_id"] for each in told}

    await eventually(caught_up, timeout_s=20, every_s=0.2, what="every request in the ledger")
    (sums,) = broken_up.sql("SELECT count(*) AS n, count(DISTINCT request_id) AS ids FROM requests")
    assert sums["n"] == sums["ids"] == len(before) + len(ids)
    (events,) = broken_up.sql("SELECT count(*) AS n, count(DISTINCT id) AS ids, max(position) AS last FROM events")
    assert events["n"] == events["ids"]
    counted = broken_up.sql("SELECT request_id, completion_tokens FROM requests WHERE status = 'completed'")
    mine = [each["completion_tokens"] for each in counted if each["request_id"] in ids]
    assert sum(mine) == sum(each["tokens_sent"] for each in provider.seen()) == 3 * len(ids)
