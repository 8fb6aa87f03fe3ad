"""Clients that come back to another ingress than the one that has their answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from bus.server import EmbeddedServer
from ingress.elsewhere import GIVE_BACK_WAIT_S
from ingress.neighbours import LEASE_S
from schemas.ids import new_id
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    CLIENT_KEY,
    MODEL,
    Gateway,
    Headers,
    IngressUnderTest,
    OpenGateway,
    Wire,
    bearer,
    body,
    ingress_up,
    route_settings,
    slow_to_give_back,
)
from tests.integration.ingress.test_resume import ASK, Stream, code_of, events_of, ids_of, text_of
from tests.mock_provider import MockProvider
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def other(gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider) -> AsyncIterator[IngressUnderTest]:
    """The ingress that clients come back to. They begin at the gateway's."""
    async with another(nats_server, mock) as up:
        yield up


@contextlib.asynccontextmanager
async def another(nats_server: EmbeddedServer, mock: MockProvider) -> AsyncIterator[IngressUnderTest]:
    """It serves what the gateway serves."""
    async with ingress_up(nats_server.url, settings=IngressSettings(), routes=(route_settings(mock),)) as up:
        await eventually(lambda: up.fleet.offers(MODEL), what="the worker's presence")
        yield up


def again(
    session: aiohttp.ClientSession, at: IngressUnderTest, request_id: str, *, after: int = 0, key: str = CLIENT_KEY
) -> aiohttp.client._RequestContextManager:
    headers: Headers = {**bearer(key), "Last-Event-ID": str(after)}
    return session.get(f"{at.base_url}/chat/completions/{request_id}", headers=headers)


async def test_what_has_ended_is_read_from_any_event_on_at_another_ingress(
    gateway: Gateway, other: IngressUnderTest, session: aiohttp.ClientSession
) -> None:
    async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as answer:
        whole, request_id = await answer.read(), answer.headers["x-request-id"]
    events = events_of(whole)
    for after in range(len(events) + 1):
        async with again(session, other, request_id, after=after) as rest:
            assert rest.status == 200
            assert rest.headers["content-type"] == answer.headers["content-type"]
            assert rest.headers["x-request-id"] == request_id
            assert b"".join(events[:after]) + await rest.read() == whole
    await eventually(lambda: len(gateway.of(request_id, "request.replayed")) == len(events) + 1)
    (end,) = gateway.of(request_id, "request.finished")
    assert {event["producer"] for event in gateway.of(request_id, "request.replayed")} != {end["producer"]}


async def test_an_answer_without_a_stream_is_there_too(
    gateway: Gateway, other: IngressUnderTest, session: aiohttp.ClientSession
) -> None:
    async with session.post(gateway.chat_url, json=body(), headers={**bearer(), **ASK}) as answer:
        whole, request_id = await answer.read(), answer.headers["x-request-id"]
    async with again(session, other, request_id) as rest:
        assert await rest.read() == whole
        assert rest.headers["content-length"] == str(len(whole))


@pytest.mark.parametrize("case", [(1, 30, 0.1), (6, 30, 0.1), (2, 4, 1.5)])
async def test_a_stream_that_runs_is_continued_at_another_ingress(
    gateway: Gateway,
    other: IngressUnderTest,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    case: tuple[int, int, float],
) -> None:
    """For longer than its client may be away: who reads there is attached here. A model that thinks has nothing to tell meanwhile."""
    cut, tokens, pace_s = case
    mock.script(tokens=tokens, pace_s=pace_s)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **{"x-penstock-resume": "2"})
        await stream.read_events(cut)
    async with again(session, other, stream.request_id, after=cut) as answer:
        rest = await answer.read()
    whole = b"".join(events_of(stream.raw)[:cut]) + b"".join(events_of(rest))
    assert ids_of(whole) == list(range(1, len(events_of(whole)) + 1))
    assert text_of(whole) == " ".join(f"w{number}" for number in range(tokens))
    assert len(mock.seen) == 1
    assert (await gateway.ending(stream.request_id))["status"] == "completed"


async def test_while_nobody_can_be_asked_it_is_not_said_to_be_nowhere(
    other: IngressUnderTest, nats_server: EmbeddedServer, session: aiohttp.ClientSession
) -> None:
    await nats_server.stop()
    await eventually(lambda: not other.connection.is_up)
    async with again(session, other, new_id()) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "queue_unavailable")
    await nats_server.start()

    async def is_nowhere() -> bool:
        async with again(session, other, new_id()) as answer:
            return answer.status == 404

    await eventually(is_nowhere)


async def test_a_request_whose_reader_left_another_ingress_is_cancelled(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """Its own connection looked alive, and was given up for that reader."""
    mock.script(tokens=2000, pace_s=0.02)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True))
        await stream.read_events(2)
        async with again(session, other, stream.request_id, after=2) as answer:
            await answer.content.readany()
            assert mock.seen[0].gone_s is None
            answer.close()
        await eventually(lambda: mock.seen[0].gone_s is not None, timeout_s=LEASE_S + 5)
    assert (await gateway.ending(stream.request_id))["status"] == "cancelled"


async def test_nobody_has_it_or_it_is_somebody_elses(
    gateway: Gateway, other: IngressUnderTest, session: aiohttp.ClientSession
) -> None:
    async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as answer:
        whole, request_id = await answer.read(), answer.headers["x-request-id"]
    nobodys = request_id[:-12] + "0" * 12
    for asked, key in ((request_id, ADMIN_KEY), (nobodys, CLIENT_KEY)):
        async with again(session, other, asked, key=key) as refused:
            assert (refused.status, code_of(await refused.read())) == (404, "answer_not_found")
    async with again(session, other, request_id, after=len(events_of(whole)) + 1) as refused:
        assert (refused.status, code_of(await refused.read())) == (400, "invalid_request")


async def test_a_part_that_is_forgotten_is_refused_there_too(
    open_gateway: OpenGateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_kept_answer_bytes=5000))
    async with another(nats_server, mock) as other:
        mock.script(tokens=100, pace_s=0.001)
        async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as answer:
            await answer.read()
        async with again(session, other, answer.headers["x-request-id"], after=1) as refused:
            assert (refused.status, code_of(await refused.read())) == (410, "answer_not_kept")


# Idempotency-Keys over all ingresses


def keyed(at: IngressUnderTest, session: aiohttp.ClientSession, **given: Any) -> aiohttp.client._RequestContextManager:
    headers: Headers = {**bearer(), "Idempotency-Key": "order-1"}
    return session.post(f"{at.base_url}/chat/completions", json=body(**given), headers=headers)


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@BOTH
async def test_a_retry_at_another_ingress_is_told_the_same(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    async with keyed(gateway.ingress, session, stream=stream) as answer:
        first, headers = await answer.read(), answer.headers
    for at in (other, gateway.ingress, other):
        async with keyed(at, session, stream=stream) as answer:
            assert (answer.status, await answer.read()) == (200, first)
            assert answer.headers.getall("x-penstock-replayed") == ["true"]
            for name in ("x-request-id", "content-type", "x-penstock-route", "x-penstock-overhead-ms"):
                assert answer.headers[name] == headers[name]
    assert len(mock.seen) == 1
    await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.replayed"]) == 3)
    assert not any(event["running"] for event in gateway.events if event["kind"] == "request.replayed")
    assert len([e for e in gateway.events if e["kind"] == "request.finished"]) == 1


@BOTH
async def test_tries_at_all_ingresses_at_the_same_moment_share_one_generation(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    mock.script(tokens=20, pace_s=0.02)

    async def ask(at: IngressUnderTest) -> bytes:
        async with keyed(at, session, stream=stream) as answer:
            assert answer.status == 200
            return await answer.read()

    answers = await asyncio.gather(*(ask(at) for at in (gateway.ingress, other) * 4))
    assert len(set(answers)) == 1
    assert len(mock.seen) == 1
    finished = [event for event in gateway.events if event["kind"] == "request.finished"]
    assert [event["status"] for event in finished] == ["completed"]


async def test_the_same_key_with_another_body_is_refused_at_every_ingress(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    async with keyed(gateway.ingress, session, content="one") as answer:
        await answer.read()
    async with keyed(other, session, content="two") as answer:
        assert (answer.status, code_of(await answer.read())) == (422, "idempotency_key_reused")
    rejected = await eventually(lambda: [e for e in gateway.events if e["kind"] == "request.rejected"])
    assert [event["code"] for event in rejected] == ["idempotency_key_reused"]
    async with keyed(other, session, content="one") as answer:
        assert answer.status == 200
    assert len(mock.seen) == 1


async def test_what_cost_nothing_at_one_ingress_is_tried_again_at_another(
    gateway: Gateway,
    other: IngressUnderTest,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once: a client that hears of it finds its key free everywhere, however long that takes NATS."""
    slow_to_give_back(monkeypatch, 0.3)
    mock.script(status=500)
    async with keyed(gateway.ingress, session) as answer:
        assert answer.status == 502
    mock.script(text="now")
    async with keyed(other, session) as answer:
        assert answer.status == 200
        assert b"now" in await answer.read()
        assert "x-penstock-replayed" not in answer.headers


async def test_a_client_is_told_that_it_failed_where_its_key_cant_be_given_back(
    gateway: Gateway,
    other: IngressUnderTest,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in time. Elsewhere the key is free all the same: who has it is asked, and knows better."""
    slow_to_give_back(monkeypatch, GIVE_BACK_WAIT_S + 2)
    mock.script(status=500)
    began = time.monotonic()
    async with keyed(gateway.ingress, session) as answer:
        assert answer.status == 502
    assert GIVE_BACK_WAIT_S <= time.monotonic() - began < GIVE_BACK_WAIT_S + 2
    mock.script(text="now")
    async with keyed(other, session) as answer:
        assert answer.status == 200
        assert "x-penstock-replayed" not in answer.headers


async def test_what_was_cancelled_in_the_queue_of_one_ingress_is_tried_again_at_another(
    open_gateway: OpenGateway,
    nats_server: EmbeddedServer,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while the first one is still about to give its key back: it cost nothing, and who has left isn't told its end."""
    gateway = await open_gateway(slots=1)

    async def in_its_way() -> int:
        async with session.post(gateway.chat_url, json=body("first"), headers=bearer()) as answer:
            return answer.status

    async with another(nats_server, mock) as other:
        slow_to_give_back(monkeypatch, 0.5)
        mock.script(tokens=3, pace_s=0.3)
        first = asyncio.create_task(in_its_way())
        await eventually(lambda: mock.answering == 1)
        async with Wire(gateway.base_url) as wire:
            wire.ask(body(), **{"Idempotency-Key": "order-1", "x-penstock-resume": "0"})
            await gateway.jobs_waiting(1)
        assert (await gateway.ending())["cost_pico"] == 0
        async with keyed(other, session) as answer:
            assert answer.status == 200
            assert "x-penstock-replayed" not in answer.headers
        assert await first == 200


async def test_a_claim_of_an_ingress_that_is_gone_is_taken_over(
    gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """Its answer is gone with it, and a retry is a new request."""
    async with another(nats_server, mock) as gone, keyed(gone, session) as answer:
        assert answer.status == 200
        await answer.read()
    for replayed in (False, True):
        async with keyed(gateway.ingress, session) as answer:
            assert answer.status == 200
            assert ("x-penstock-replayed" in answer.headers) is replayed
    assert len(mock.seen) == 2


async def test_a_retry_at_another_ingress_keeps_the_request_going(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=30, pace_s=0.1)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **{"Idempotency-Key": "order-1", "x-penstock-resume": "2"})
        await stream.read_events(2)
    async with keyed(other, session, stream=True) as answer:
        whole = await answer.read()
    assert text_of(whole) == " ".join(f"w{number}" for number in range(30))
    assert events_of(whole)[:2] == events_of(stream.raw)[:2]
    assert len(mock.seen) == 1
    assert (await gateway.ending(stream.request_id))["status"] == "completed"
