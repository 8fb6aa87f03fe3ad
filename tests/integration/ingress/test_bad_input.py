"""Whatever is wrong with a request: the right status, OpenAI's error shape, an id, one event, and nothing left behind."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from bus.server import EmbeddedServer
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    CLIENT_KEY,
    MODEL,
    Gateway,
    Headers,
    Lines,
    OpenGateway,
    Wire,
    bearer,
    body,
    headers_of,
    ingress_up,
    route_settings,
    sdk,
    soon,
    timeouts,
)
from tests.mock_provider import MockProvider

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def _json(**members: Any) -> bytes:
    return msgspec.json.encode(members)


async def _check(gateway: Gateway, headers: Headers, told: Any, *, status: int, code: str) -> dict[str, Any]:
    """The shape, the id and the one event of a refusal; returns the error."""
    error: dict[str, Any] = told["error"]
    assert set(told) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] == code
    event = await gateway.ending(headers["x-request-id"])
    assert (event["kind"], event["code"], event["http_status"]) == ("request.rejected", code, status)
    assert gateway.of(headers["x-request-id"]) == [event]
    return error


BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"   ", None),
    (b"{", None),
    (b"not json", None),
    (b"[]", None),
    (b"null", None),
    (b'"text"', None),
    (b"\xff\xfe{}", None),
    (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', None),
    (b'{"model":"m","messages":' + b"[" * 100_000, None),
    (b'{"model":"m","messages":[{"role":"user","content":"hi"}]} trailing', None),
    (_json(messages=MESSAGES), "model"),
    (_json(model="", messages=MESSAGES), "model"),
    (_json(model=7, messages=MESSAGES), "model"),
    (_json(model=MODEL), "messages"),
    (_json(model=MODEL, messages=[]), "messages"),
    (_json(model=MODEL, messages="hi"), "messages"),
    (_json(model=MODEL, messages=[{"role": "user", "content": 7}]), "messages[0].content"),
    (_json(model=MODEL, messages=[{"role": "nobody", "content": "hi"}]), "messages[0].role"),
    (_json(model=MODEL, messages=MESSAGES, temperature="hot"), "temperature"),
    (_json(model=MODEL, messages=MESSAGES, stream="yes"), "stream"),
    (_json(model=MODEL, messages=MESSAGES, n=0), "n"),
    (_json(model=MODEL, messages=MESSAGES, max_tokens=-1), "max_tokens"),
    (_json(model=MODEL, messages=MESSAGES, stream_options={"include_usage": "yes"}), "stream_options.include_usage"),
]


async def test_a_body_that_is_not_a_request_is_a_400_that_names_what_is_wrong(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    for raw, param in BAD_BODIES:
        async with session.post(gateway.chat_url, data=raw, headers=bearer()) as response:
            assert response.status == 400, raw[:80]
            error = await _check(
                gateway, headers_of(response), await response.json(), status=400, code="invalid_request"
            )
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param, (raw[:80], error)
    assert not mock.seen
    assert not [e for e in gateway.events if e["kind"] != "request.rejected"]


async def test_the_sdk_raises_the_class_of_each_refusal(gateway: Gateway) -> None:
    messages: Any = MESSAGES
    async with sdk(gateway.base_url) as client, sdk(gateway.base_url, "sk-wrong") as stranger:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=messages, temperature="hot")  # type: ignore[call-overload]
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="nobody/knows", messages=messages)
        with pytest.raises(openai.AuthenticationError) as wrong:
            await stranger.chat.completions.create(model=MODEL, messages=messages)
    assert (bad.value.param, bad.value.type, bad.value.code) == (
        "temperature",
        "invalid_request_error",
        "invalid_request",
    )
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert (wrong.value.param, wrong.value.code) == (None, "invalid_api_key")
    for caught in (bad.value, unknown.value, wrong.value):
        assert (await gateway.ending(caught.request_id))["code"] == caught.code


async def test_an_unknown_model_is_a_404(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    for model in ("nobody/knows", "m" * 5000, "a.b.*.>", "\u2603", MODEL + " "):
        async with session.post(gateway.chat_url, json=body() | {"model": model}, headers=bearer()) as response:
            assert response.status == 404
            error = await _check(
                gateway, headers_of(response), await response.json(), status=404, code="model_not_found"
            )
            assert error["param"] == "model"


async def test_a_known_model_without_a_worker_is_a_503_that_says_when_to_retry(
    nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    async with ingress_up(nats_server.url, settings=IngressSettings(), routes=(route_settings(mock),)) as up:
        async with session.post(f"{up.base_url}/chat/completions", json=body(), headers=bearer()) as response:
            told = await response.json()
            assert response.status == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-request-id"]
        assert told["error"]["code"] == "no_live_route"
        assert told["error"]["param"] == "model"
        assert len(up.switchboard) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer sk-wrong"},
        {"authorization": f"Basic {CLIENT_KEY}"},
        {"authorization": CLIENT_KEY},
        {"authorization": "Bearer " + "k" * 10_000},
        {"authorization": f"Bearer {CLIENT_KEY} {CLIENT_KEY}"},
    ],
    ids=["none", "no key", "blank", "wrong", "basic", "bare", "long", "two"],
)
async def test_without_a_key_that_we_know_it_is_a_401(
    gateway: Gateway, session: aiohttp.ClientSession, headers: Headers
) -> None:
    async with session.post(gateway.chat_url, json=body(), headers=headers) as response:
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"
        await _check(gateway, headers_of(response), await response.json(), status=401, code="invalid_api_key")
    async with session.get(f"{gateway.base_url}/models", headers=headers) as response:
        assert response.status == 401


async def test_a_scheme_is_known_by_any_case(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    async with session.post(
        gateway.chat_url, json=body(), headers={"authorization": f"bEARER {CLIENT_KEY}"}
    ) as response:
        assert response.status == 200


async def _status(session: aiohttp.ClientSession, gateway: Gateway, key: str) -> int:
    async with session.get(f"{gateway.base_url}/models", headers=bearer(key)) as response:
        return response.status


async def test_a_key_stops_working_when_it_is_revoked_rotated_or_expired(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    keys = gateway.base_url.removesuffix("/v1") + "/admin/v1/keys"

    async def admin(method: str, url: str, **given: Any) -> Any:
        async with session.request(method, url, headers=bearer(ADMIN_KEY), **given) as response:
            assert response.status in (200, 201)
            return await response.json()

    brief = await admin("POST", keys, json={"name": "brief", "expires_in_s": 1})
    lasting = await admin("POST", keys, json={"name": "lasting"})
    turned = await admin("POST", keys, json={"name": "turned"})
    for made in (brief, lasting, turned):
        assert await _status(session, gateway, made["key"]) == 200
    await admin("DELETE", f"{keys}/{lasting['id']}")
    fresh = await admin("POST", f"{keys}/{turned['id']}/rotate", json={"grace_s": 0})
    assert await _status(session, gateway, lasting["key"]) == 401
    assert await _status(session, gateway, turned["key"]) == 401
    assert await _status(session, gateway, fresh["key"]) == 200

    async def over() -> bool:
        return await _status(session, gateway, brief["key"]) == 401

    await soon(over, what="the key's expiry")
    async with session.post(gateway.chat_url, json=body(), headers=bearer(lasting["key"])) as response:
        assert response.status == 401
        await _check(gateway, headers_of(response), await response.json(), status=401, code="invalid_api_key")


async def test_a_body_over_the_limit_is_a_413_and_the_connection_is_closed(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_body_bytes=10_000))
    async with Wire(gateway.base_url) as stated:
        stated.head(length=10_001)
        status, headers, told = await stated.answer()
        assert (status, headers["connection"]) == (413, "close")
        await _check(gateway, headers, told, status=413, code="body_too_large")
    async with Wire(gateway.base_url) as chunked:
        chunked.head(chunked=True)
        for _ in range(11):
            chunked.send(b"400\r\n" + b"x" * 1024 + b"\r\n")
        status, headers, told = await chunked.answer()
        assert (status, headers["connection"]) == (413, "close")
        await _check(gateway, headers, told, status=413, code="body_too_large")
        assert await chunked.closed()


async def test_the_sdk_sees_the_413_though_it_is_still_sending(gateway: Gateway) -> None:
    async with sdk(gateway.base_url) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 12_000_000}])
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


async def test_the_largest_body_that_is_taken_arrives(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    limit = IngressSettings().max_body_bytes
    given = body("")
    given["messages"][0]["content"] = "x" * (limit - len(msgspec.json.encode(given)))
    raw = msgspec.json.encode(given)
    assert len(raw) == limit
    mock.script(tokens=1)
    async with session.post(gateway.chat_url, data=io.BytesIO(raw), headers=bearer()) as response:
        assert response.status == 200
    assert len(mock.seen[-1].body["messages"][0]["content"]) > limit - 1000


async def test_half_a_body_and_then_silence_is_a_408(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(body_timeout_s=0.1))
    async with Wire(gateway.base_url) as wire:
        wire.head(length=100)
        wire.send(b'{"model":')
        status, headers, told = await wire.answer()
        assert (status, headers["connection"]) == (408, "close")
        await _check(gateway, headers, told, status=408, code="request_timeout")
        assert await wire.closed()


async def test_headers_over_the_limit_are_a_431(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_header_bytes=4096))
    async with Wire(gateway.base_url) as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 5000)
        status, headers, told = await wire.answer()
        assert (status, told["error"]["code"]) == (431, "headers_too_large")
        assert headers["x-request-id"]
        assert await wire.closed()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow:"])
async def test_headers_that_never_end_are_a_408(open_gateway: OpenGateway, sent: bytes) -> None:
    gateway = await open_gateway(ingress=IngressSettings(header_timeout_s=0.1))
    async with Wire(gateway.base_url) as wire:
        wire.send(sent)
        status, headers, told = await wire.answer()
        assert (status, told["error"]["code"]) == (408, "request_timeout")
        assert headers["x-request-id"]
        assert await wire.closed()


async def test_headers_that_drip_are_a_408_however_often_something_comes(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(header_timeout_s=0.6))
    async with Wire(gateway.base_url) as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
        answer = asyncio.create_task(wire.answer())
        number = 0
        while not answer.done():
            wire.send(b"x-%d: y\r\n" % number)
            number += 1
            await asyncio.wait([answer], timeout=0.02)
        status, _, told = await answer
        assert (status, told["error"]["code"]) == (408, "request_timeout")
        assert number > 3


async def test_the_next_request_of_a_connection_has_a_header_time_of_its_own(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(header_timeout_s=0.6))
    async with Wire(gateway.base_url) as wire:
        wire.ask(body())
        assert (await wire.answer())[0] == 200
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
        assert (await wire.answer())[0] == 408


async def test_half_a_header_behind_a_running_stream_does_not_spoil_the_stream(
    open_gateway: OpenGateway, mock: MockProvider
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(header_timeout_s=0.1))
    mock.script(tokens=40, pace_s=0.01)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=True))
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
        came = await wire.reader.read(-1)
    assert b"HTTP/1.1 408" not in came


async def test_a_request_sent_before_the_answer_to_the_last_one_ends_the_connection_after_that_answer(
    gateway: Gateway, mock: MockProvider
) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.ask(body("first"))
        wire.ask(body("second"))
        status, headers, told = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert told["choices"][0]["message"]["content"] == "first"
        assert await wire.closed()
    assert len(mock.seen) == 1


async def test_a_client_that_asks_first_whether_to_send_is_told_so(gateway: Gateway) -> None:
    raw = msgspec.json.encode(body())
    async with Wire(gateway.base_url) as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n")
        wire.send(f"Authorization: Bearer {CLIENT_KEY}\r\nContent-Length: {len(raw)}\r\n\r\n".encode())
        assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(raw)
        assert (await wire.answer())[0] == 200


async def test_what_is_not_http_is_a_400_in_the_same_shape(gateway: Gateway) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"nonsense\r\n\r\n"):
        async with Wire(gateway.base_url) as wire:
            wire.send(junk)
            status, headers, told = await wire.answer()
            assert (status, told["error"]["code"]) == (400, "invalid_http")
            assert headers["connection"] == "close"
            assert headers["x-request-id"]
            assert await wire.closed()


@pytest.mark.parametrize("length", ["abc", "-1", "1, 2"])
async def test_a_content_length_that_is_no_number_is_a_400(gateway: Gateway, length: str) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.send(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
        status, _, told = await wire.answer()
        assert (status, told["error"]["code"]) == (400, "invalid_http")


async def test_a_client_that_offers_another_protocol_is_answered_in_this_one(gateway: Gateway) -> None:
    """Java's client offers h2c with every first request."""
    raw = msgspec.json.encode(body())
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT_KEY}\r\n{offer}"
    async with Wire(gateway.base_url) as wire:
        wire.send(f"{head}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        status, _, told = await wire.answer()
        assert (status, told["object"]) == (200, "chat.completion")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_another_method_on_the_chat_path_is_a_405(
    gateway: Gateway, session: aiohttp.ClientSession, method: str
) -> None:
    async with session.request(method, gateway.chat_url, headers=bearer()) as response:
        assert response.status == 405
        assert response.headers["allow"] == "POST"
        await _check(gateway, headers_of(response), await response.json(), status=405, code="method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions", "/v2/chat/completions", "/v1/chat/completions/x/y"])
async def test_an_unknown_path_is_a_404_in_the_same_shape(
    gateway: Gateway, session: aiohttp.ClientSession, path: str
) -> None:
    async with session.post(gateway.base_url.removesuffix("/v1") + path, json=body(), headers=bearer()) as response:
        assert response.status == 404
        assert response.headers["x-request-id"]
        assert (await response.json())["error"]["code"] == "not_found"


async def test_a_wrong_method_elsewhere_is_a_405_in_the_same_shape(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    async with session.post(f"{gateway.base_url}/models", headers=bearer()) as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_more_requests_than_the_bound_are_a_503_and_room_comes_back(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_concurrent_requests=2))
    mock.script(tokens=1000, pace_s=0.01)
    async with (
        Lines(session, gateway.chat_url, body(stream=True)) as first,
        Lines(session, gateway.chat_url, body(stream=True)) as second,
    ):
        await first.next()
        await second.next()
        async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
            assert response.status == 503
            assert int(response.headers["retry-after"]) >= 1
            await _check(gateway, headers_of(response), await response.json(), status=503, code="overloaded")
    await gateway.quiet()
    mock.script()
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        assert response.status == 200


async def test_more_connections_than_the_bound_are_refused(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_connections=1))
    async with Wire(gateway.base_url) as first:
        first.ask(body())
        assert (await first.answer())[0] == 200
        async with Wire(gateway.base_url) as second:
            status, _, told = await second.answer()
            assert (status, told["error"]["code"]) == (503, "overloaded")
            assert await second.closed()


async def test_a_backlog_that_is_full_is_a_429(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(slots=1)
    await gateway.ingress.connection.api(
        "STREAM.UPDATE.JOBS",
        (await gateway.ingress.connection.api("STREAM.INFO.JOBS"))["config"] | {"max_msgs_per_subject": 1},
    )
    mock.script(tokens=1000, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body(stream=True)) as running, Wire(gateway.base_url) as waiting:
        await running.next()
        waiting.ask(body())
        await gateway.jobs_waiting(1)
        async with sdk(gateway.base_url) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "backlog_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    event = await gateway.ending(caught.value.request_id)
    assert (event["status"], event["http_status"], event["cost_pico"]) == ("rejected", 429, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_job_that_nobody_takes_in_time_is_a_504(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    gateway = await open_gateway(slots=1, ingress=IngressSettings(timeouts=timeouts(queue_s=1.0)))
    mock.script(tokens=1000, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body(stream=True)) as running:
        await running.next()
        async with session.post(gateway.chat_url, json=body(stream=stream), headers=bearer()) as response:
            assert response.status == 504
            request_id = response.headers["x-request-id"]
            assert (await response.json())["error"]["code"] == "queue_timeout"
    event = await gateway.ending(request_id)
    assert (event["status"], event["code"], event["cost_pico"]) == ("failed", "queue_timeout", 0)
    assert len(mock.seen) == 1


async def test_a_key_without_the_role_is_refused_at_the_admin_api(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    root = gateway.base_url.removesuffix("/v1") + "/admin/v1"
    for method, path in [
        ("GET", "/keys"),
        ("POST", "/keys"),
        ("POST", "/keys/x/rotate"),
        ("DELETE", "/keys/x"),
        ("GET", "/routes"),
    ]:
        async with session.request(method, root + path, headers=bearer()) as response:
            assert response.status == 403
            assert response.headers["x-request-id"]
            assert (await response.json())["error"]["code"] == "insufficient_permissions"
        async with session.request(method, root + path) as response:
            assert response.status == 401


async def test_a_refused_request_does_not_end_the_connection_for_the_next(gateway: Gateway) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.head(length=2, key="sk-wrong")
        wire.send(b"{}")
        assert (await wire.answer())[0] == 401
        wire.ask(body())
        assert (await wire.answer())[0] == 200
