"""A provider that misbehaves in every way we know of: each is a fault of the right kind, in time, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnreachable,
)
from schemas.jobs import Timeouts
from schemas.settings import WorkerSettings
from tests.factories import make_job
from tests.integration.providers.conftest import make_openai
from tests.integration.providers.heard import Heard, hear
from tests.mock_provider import MockProvider
from tests.stopwatch import Stopwatch
from tests.waiting import eventually
from workers.providers.base import Provider

# Longer than a busy machine stands still: most of these tests wait for something else.
SHORT = WorkerSettings(connect_timeout_s=1.0, first_byte_timeout_s=2.0, idle_timeout_s=1.0)
REFUSAL = {
    "message": "max_tokens is too large",
    "type": "invalid_request_error",
    "param": "max_tokens",
    "code": "too_large",
}
SECRET = {"message": "Incorrect API key sk-123 of org-456", "type": "invalid_request_error", "code": "invalid_api_key"}
Ask = Callable[..., Any]


@pytest.fixture
async def provider(mock: MockProvider) -> AsyncIterator[Provider]:
    made = make_openai(mock.base_url, SHORT)
    yield made
    await made.aclose()


@pytest.fixture
def ask(mock: MockProvider, provider: Provider) -> Ask:
    """Asks for five words as the mock is scripted to say them."""

    async def asking(*, stream: bool = True, timeouts: Timeouts | None = None, **script: Any) -> Heard:
        mock.script(**{"tokens": 5, **script})
        return await hear(provider, make_job({"stream": stream}, timeouts=timeouts or Timeouts()))

    return asking


async def fault_of(asked: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        await asked
    return caught.value


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ProviderRejected),
        (404, ProviderRejected),
        (413, ProviderRejected),
        (422, ProviderRejected),
        (401, ProviderAuth),
        (403, ProviderAuth),
        (408, ProviderTimeout),
        (504, ProviderTimeout),
        (429, ProviderRateLimited),
        (500, ProviderFailed),
        (503, ProviderFailed),
        (418, ProviderFailed),
        (202, ProviderNonsense),
    ],
)
async def test_a_status_is_a_fault_of_its_kind(ask: Ask, stream: bool, status: int, kind: type[Fault]) -> None:
    fault = await fault_of(ask(stream=stream, status=status, error=REFUSAL))
    assert type(fault) is kind
    assert fault.status == status


async def test_a_rejection_says_what_the_provider_said(ask: Ask) -> None:
    fault = await fault_of(ask(status=400, error=REFUSAL))
    assert (fault.message, fault.type, fault.param, fault.upstream_code) == tuple(REFUSAL.values())


@pytest.mark.parametrize("status", [401, 402, 403, 429, 500])
async def test_a_providers_words_about_our_account_are_not_passed_on(ask: Ask, status: int) -> None:
    fault = await fault_of(ask(status=status, error=SECRET))
    assert "sk-123" not in fault.message
    assert "org-456" not in fault.message


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [({"retry-after": "7"}, 6.8, 7.0), ({"retry-after-ms": "2500"}, 2.3, 2.5), ({}, 0.1, 3.0)],
)
async def test_a_rate_limit_says_when_to_come_again(
    ask: Ask, headers: dict[str, str], least: float, most: float
) -> None:
    """Without the provider's word it is when the key is used again."""
    watch = Stopwatch()
    fault = await fault_of(ask(status=429, headers=headers))
    assert fault.retry_after_s is not None
    assert least - watch.waited_s <= fault.retry_after_s <= most


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [200, 503])
async def test_html_is_not_an_answer(ask: Ask, stream: bool, status: int) -> None:
    fault = await fault_of(ask(stream=stream, status=status, body="<html>busy</html>", content_type="text/html"))
    assert type(fault) is (ProviderNonsense if status == 200 else ProviderFailed)
    assert "busy" not in fault.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(ask: Ask, mock: MockProvider, status: int) -> None:
    fault = await fault_of(ask(status=status, headers={"location": mock.base_url + "/chat/completions"}))
    assert (type(fault), fault.status) == (ProviderFailed, status)
    assert len(mock.seen) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "body", ["", "not json", "[]", "{}", '{"choices": 7}', '{"choices": [{"index": 0}]}', "[" * 9999, "\x00"]
)
async def test_nonsense_is_called_so(ask: Ask, stream: bool, body: str) -> None:
    script = {"raw": f"data: {body}\n\n"} if stream else {"body": body}
    assert type(await fault_of(ask(stream=stream, **script))) is ProviderNonsense


async def test_an_error_inside_a_success_without_streaming_is_an_error(ask: Ask) -> None:
    fault = await fault_of(ask(stream=False, body=json.dumps({"error": REFUSAL})))
    assert (type(fault), fault.message) == (ProviderRejected, REFUSAL["message"])


async def test_an_error_as_json_where_a_stream_should_be_is_an_error(ask: Ask) -> None:
    fault = await fault_of(ask(body=json.dumps({"error": {"message": "x", "code": 503}})))
    assert (type(fault), fault.status) == (ProviderFailed, 503)


async def test_an_answer_without_streaming_where_a_stream_should_be_is_nonsense(ask: Ask) -> None:
    assert type(await fault_of(ask(body='{"choices": []}'))) is ProviderNonsense


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("form", [{}, {"error_event": "error"}, {"error_bare": True, "error_event": "error"}])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "CUDA", "type": "internal_error", "code": 500}, ProviderFailed),
        ({"message": "who knows"}, ProviderFailed),
        ({"message": "bad", "type": "BadRequestError", "code": 400}, ProviderRejected),
        ({"message": "slow", "code": 429}, ProviderRateLimited),
    ],
)
async def test_an_error_inside_a_stream_ends_it_in_spite_of_done(
    ask: Ask, place: int, form: dict[str, Any], error: dict[str, Any], kind: type[Fault]
) -> None:
    assert type(await fault_of(ask(error_at=place, error=error, **form))) is kind


async def test_what_came_before_an_error_is_delivered(provider: Provider) -> None:
    came = 0

    async def listen() -> None:
        nonlocal came
        async for chunk in provider.generate(make_job({"stream": True, "mock": {"tokens": 5, "error_at": 3}})):
            came += chunk.tokens

    assert type(await fault_of(listen())) is ProviderFailed
    assert came == 3


@pytest.mark.parametrize("reason", ["abort", "error"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_generation_given_up_is_a_failure(ask: Ask, stream: bool, reason: str) -> None:
    assert type(await fault_of(ask(stream=stream, finish_reason=reason))) is ProviderFailed


async def test_nobody_at_the_address_is_unreachable() -> None:
    with socket.socket() as held:  # bound and never listening: nobody else gets the port meanwhile
        held.bind(("127.0.0.1", 0))
        provider = make_openai(f"http://127.0.0.1:{held.getsockname()[1]}/v1", SHORT)
        assert type(await fault_of(hear(provider, make_job()))) is ProviderUnreachable
        await provider.aclose()


async def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    provider = make_openai("http://does-not-exist.invalid/v1", WorkerSettings(connect_timeout_s=5.0))
    assert type(await fault_of(hear(provider, make_job()))) in (ProviderUnreachable, ProviderTimeout)
    await provider.aclose()


@asynccontextmanager
async def saying(said: bytes) -> AsyncIterator[str]:
    """A server that says *said* to whoever speaks, whatever they say; its address without the scheme."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(said)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 what\r\n\r\n", b"\x00\x01\x02\r\n\r\n"])
async def test_a_server_that_does_not_speak_http_is_nonsense(said: bytes) -> None:
    async with saying(said) as address:
        provider = make_openai(f"http://{address}", SHORT)
        assert type(await fault_of(hear(provider, make_job()))) is ProviderNonsense
        await provider.aclose()


async def test_a_server_that_does_not_speak_tls_is_unreachable() -> None:
    async with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        provider = make_openai(f"https://{address}", WorkerSettings())
        assert type(await fault_of(hear(provider, make_job()))) is ProviderUnreachable
        await provider.aclose()


async def test_a_connection_that_is_never_taken_times_out() -> None:
    """A listener whose queue is full answers no more SYN."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        provider = make_openai(f"http://127.0.0.1:{address[1]}/v1", SHORT)
        watch = Stopwatch()
        fault = await fault_of(hear(provider, make_job()))
        assert type(fault) is ProviderTimeout
        assert f"{SHORT.connect_timeout_s:g} s" in fault.message
        assert watch.s < SHORT.connect_timeout_s + 1.7
        await provider.aclose()
        for each in waiting:
            each.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reset_before_the_answer_is_unreachable(ask: Ask, stream: bool) -> None:
    assert type(await fault_of(ask(stream=stream, reset=True))) is ProviderUnreachable


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("how", ["cut_at", "end_at"])
async def test_a_stream_that_breaks_off_ended_early(ask: Ask, how: str, place: int) -> None:
    fault = await fault_of(ask(done=False, **{how: place}))
    assert type(fault) is ProviderFailed
    assert "ended early" in fault.message


async def test_a_body_shorter_than_it_said_ended_early(ask: Ask) -> None:
    fault = await fault_of(ask(stream=False, short_by=10))
    assert type(fault) is ProviderFailed
    assert "ended early" in fault.message


@pytest.mark.parametrize("stream", [True, False])
async def test_silence_before_the_answer_is_a_time_out(ask: Ask, mock: MockProvider, stream: bool) -> None:
    fault = await fault_of(ask(stream=stream, stall_at=-1))
    assert type(fault) is ProviderTimeout
    assert f"did not begin to answer within {SHORT.first_byte_timeout_s:g} s" in fault.message
    await eventually(lambda: mock.answering == 0)


async def test_silence_in_the_middle_is_a_time_out(ask: Ask, mock: MockProvider) -> None:
    fault = await fault_of(ask(stall_at=2))
    assert type(fault) is ProviderTimeout
    assert f"sent nothing for {SHORT.idle_timeout_s:g} s" in fault.message
    await eventually(lambda: mock.answering == 0)


@pytest.mark.parametrize(
    ("timeouts", "script", "message"),
    [
        (Timeouts(first_token_s=0.05), {"stall_at": -1}, "within 2.05 s"),
        (Timeouts(idle_s=0.05), {"stall_at": 2}, "for 2.05 s"),
        (Timeouts(total_s=0.1), {"tokens": 1000, "pace_s": 0.01}, "within 2.1 s"),
    ],
)
async def test_the_requests_own_time_outs_count_where_they_are_shorter(
    mock: MockProvider, timeouts: Timeouts, script: dict[str, Any], message: str
) -> None:
    """A little behind the ingress, which keeps them, too, and gives them their names."""
    patient = make_openai(mock.base_url, WorkerSettings())
    mock.script(**{"tokens": 5, **script})
    fault = await fault_of(hear(patient, make_job({"stream": True}, timeouts=timeouts)))
    await patient.aclose()
    assert type(fault) is ProviderTimeout
    assert message in fault.message


async def test_comments_do_not_keep_a_silent_stream_alive(mock: MockProvider, provider: Provider) -> None:
    comments = ": keep-alive\n\n" * 100
    mock.script(raw=comments, split_bytes=14, linger=True)
    fault = await fault_of(hear(provider, make_job({"stream": True})))
    assert "did not begin to answer" in fault.message


@pytest.mark.parametrize("split", [0, 1000])
async def test_an_event_over_the_bound_is_nonsense(mock: MockProvider, split: int) -> None:
    provider = make_openai(mock.base_url, WorkerSettings(max_event_bytes=10_000))
    fault = await fault_of(
        hear(provider, make_job({"stream": True, "mock": {"padding_bytes": 50_000, "split_bytes": split}}))
    )
    assert type(fault) is ProviderNonsense
    assert "10000 bytes" in fault.message
    await provider.aclose()


async def test_a_body_over_the_bound_is_nonsense(mock: MockProvider) -> None:
    provider = make_openai(mock.base_url, WorkerSettings(max_response_bytes=10_000))
    fault = await fault_of(hear(provider, make_job({"mock": {"tokens": 5000}})))
    assert type(fault) is ProviderNonsense
    await provider.aclose()


async def test_after_every_fault_the_next_request_is_served(ask: Ask) -> None:
    for script in (
        {"reset": True},
        {"cut_at": 2},
        {"status": 500},
        {"error_at": 1},
        {"stall_at": 1},
        {"raw": "data: x\n\n"},
    ):
        await fault_of(ask(**script))
        assert (await ask()).text == "w0 w1 w2 w3 w4"


@pytest.mark.parametrize("body", ["{}", "no", '{"data": [7]}'])
async def test_models_that_are_none_are_nonsense(body: str) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    async with saying((head + body).encode()) as address:
        provider = make_openai(f"http://{address}", SHORT)
        assert type(await fault_of(provider.models())) is ProviderNonsense
        await provider.aclose()
