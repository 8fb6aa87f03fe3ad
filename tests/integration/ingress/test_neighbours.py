"""Clients that come back to another ingress than the one that has their answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from bus.server import EmbeddedServer
from ingress.neighbours import LEASE_S
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    CLIENT_KEY,
    Gateway,
    Headers,
    IngressUnderTest,
    OpenGateway,
    bearer,
    body,
    ingress_up,
    route_settings,
)
from tests.integration.ingress.test_resume import ASK, Stream, code_of, events_of, ids_of, text_of
from tests.mock_provider import MockProvider
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def other(gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider) -> AsyncIterator[IngressUnderTest]:
    """The ingress that clients come back to. They begin at the gateway's."""
    async with ingress_up(nats_server.url, settings=IngressSettings(), routes=(route_settings(mock),)) as up:
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


@pytest.mark.parametrize("cut", [1, 6])
async def test_a_stream_that_runs_is_continued_at_another_ingress(
    gateway: Gateway, other: IngressUnderTest, mock: MockProvider, session: aiohttp.ClientSession, cut: int
) -> None:
    """For longer than its client may be away: who reads there is attached here."""
    mock.script(tokens=30, pace_s=0.1)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **{"x-penstock-resume": "1"})
        await stream.read_events(cut)
    async with again(session, other, stream.request_id, after=cut) as answer:
        rest = await answer.read()
    whole = b"".join(events_of(stream.raw)[:cut]) + b"".join(events_of(rest))
    assert ids_of(whole) == list(range(1, len(events_of(whole)) + 1))
    assert text_of(whole) == " ".join(f"w{number}" for number in range(30))
    assert len(mock.seen) == 1
    assert (await gateway.ending(stream.request_id))["status"] == "completed"


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
    async with ingress_up(nats_server.url, settings=IngressSettings(), routes=(route_settings(mock),)) as other:
        mock.script(tokens=100, pace_s=0.001)
        async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as answer:
            await answer.read()
        async with again(session, other, answer.headers["x-request-id"], after=1) as refused:
            assert (refused.status, code_of(await refused.read())) == (410, "answer_not_kept")
