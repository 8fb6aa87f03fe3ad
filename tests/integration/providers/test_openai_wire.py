"""What goes over the wire to a provider, and the odd but right ways in which answers come."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.settings import WorkerSettings
from tests.factories import make_job
from tests.integration.providers.conftest import make_openai
from tests.integration.providers.heard import hear
from tests.mock_provider import MockProvider
from tests.stopwatch import Stopwatch
from tests.waiting import eventually
from workers.providers.base import Provider
from workers.providers.turns import BUSY_STREAMS

ROUNDS_MAX = 3  # a busy machine may hold one stream up until the others are over: then it is alone
TEXT = "Grüße, 世界! 🦊 " * 20


@pytest.fixture
async def provider(mock: MockProvider) -> AsyncIterator[Provider]:
    made = make_openai(mock.base_url)
    yield made
    await made.aclose()


def saying(text: str = TEXT, **script: Any) -> dict[str, Any]:
    return {"stream": True, "mock": {"text": text, **script}}


@pytest.mark.parametrize(
    "script",
    [
        {"crlf": True},
        {"comments": True},
        {"bom": True},
        {"no_space": True},
        {"multi_line": True},
        {"no_blank_at_end": True},
        {"done": False},
        {"together": True},
        {"split_bytes": 1},
        {"split_bytes": 7, "crlf": True, "bom": True, "comments": True, "multi_line": True},
        {"content_type": "text/event-stream; charset=utf-8"},
        {"content_type": "Text/Event-Stream"},
        {"extra": {"x_new": {"a": 1}}},
        {"usage": "with_finish"},
        {"usage": "every"},
    ],
    ids=str,
)
async def test_a_stream_is_understood_however_it_is_written(provider: Provider, script: dict[str, Any]) -> None:
    heard = await hear(provider, make_job(saying(**script)))
    assert heard.text == TEXT
    assert heard.voices[0].finish == ["stop"]
    assert heard.usages[-1].usage is not None
    if "extra" in script:
        assert json.loads(heard.pieces[0])["x_new"] == {"a": 1}


async def test_a_stream_without_usage_has_none_and_is_counted(provider: Provider) -> None:
    heard = await hear(provider, make_job({"stream": True, "mock": {"tokens": 9, "usage": "never"}}))
    assert heard.usages == []
    assert heard.tokens == 9


async def test_many_fast_streams_come_whole_and_in_fewer_pieces(provider: Provider) -> None:
    """Each token comes by itself; with many streams at once several are read in one turn."""
    script = {"stream": True, "mock": {"tokens": 40, "pace_s": 0.001}}

    async def pieces() -> tuple[int, int]:
        loop, turns, tokens = asyncio.get_running_loop(), 0, 0
        turn_over = True

        def over() -> None:
            nonlocal turn_over
            turn_over = True

        async for chunk in provider.generate(make_job(script)):
            tokens += chunk.tokens
            turns += turn_over
            if turn_over:
                turn_over = False
                loop.call_soon(over)
        return turns, tokens

    alone = await pieces()
    assert alone[0] > 20
    for _ in range(ROUNDS_MAX):
        among_many = await asyncio.gather(*[pieces() for _ in range(2 * BUSY_STREAMS)])
        assert {tokens for _, tokens in [alone, *among_many]} == {40}
        most = max(turns for turns, _ in among_many)
        if most < alone[0] / 2:
            break
    assert most < alone[0] / 2


async def test_reasoning_is_passed_on_and_counted(provider: Provider) -> None:
    heard = await hear(provider, make_job({"stream": True, "mock": {"tokens": 3, "reasoning": "hm well"}}))
    said = b"".join(heard.pieces)
    assert said.count(b"reasoning_content") == 2
    assert heard.tokens == 5
    assert heard.usages[0].usage is not None
    assert heard.usages[0].usage.reasoning_tokens == 2


async def test_the_body_arrives_as_the_client_wrote_it_but_for_model_and_usage(
    mock: MockProvider, provider: Provider
) -> None:
    rest = '"messages":[ {"role":"user","content":"\\u00e9"}],"temperature":1.0,"new":{"a" :[1.50]}'
    await hear(provider, make_job(f'{{"model":"m",{rest},"stream":true}}'.encode(), stream=True))
    assert mock.seen[-1].raw == f'{{"model":"theirs",{rest},"stream":true,"stream_options":{{"include_usage":true}}}}'
    assert mock.seen[-1].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("added", "path"),
    [
        ("/", "/v1/chat/completions"),
        ("?api-version=7", "/v1/chat/completions?api-version=7"),
        ("/a%20b/?x=1", "/v1/a%20b/chat/completions?x=1"),
    ],
)
async def test_a_base_address_keeps_its_path_and_query(mock: MockProvider, added: str, path: str) -> None:
    provider = make_openai(mock.base_url + added)
    await hear(provider, make_job())
    await provider.aclose()
    assert mock.seen[-1].path == path


async def test_the_key_goes_in_the_header_and_no_key_means_no_header(mock: MockProvider, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret\n")
    for keys, expected in (((f"file:{tmp_path / 'key'}",), "Bearer sk-secret"), ((), None)):
        provider = make_openai(mock.base_url, api_keys=keys)
        await hear(provider, make_job())
        assert mock.seen[-1].headers.get("authorization") == expected
        await provider.aclose()


async def test_the_provider_is_told_our_name_for_the_attempt(mock: MockProvider, provider: Provider) -> None:
    job = make_job()
    await hear(provider, job)
    assert mock.seen[-1].headers["x-client-request-id"] == f"{job.request_id}.{job.epoch}"


async def test_cookies_are_not_kept(mock: MockProvider, provider: Provider) -> None:
    mock.script(headers={"set-cookie": "a=b"})
    for _ in range(2):
        await hear(provider, make_job())
    assert "cookie" not in mock.seen[-1].headers


async def test_a_proxy_in_the_environment_is_not_used(mock: MockProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    provider = make_openai(mock.base_url)
    await hear(provider, make_job())
    await provider.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_connection_is_used_again(mock: MockProvider, provider: Provider, stream: bool) -> None:
    for _ in range(5):
        await hear(provider, make_job({"stream": stream}))
        await eventually(lambda: mock.answering == 0)
    assert mock.connections_made == 1


async def test_never_more_connections_than_the_route_allows(mock: MockProvider) -> None:
    provider = make_openai(mock.base_url, max_concurrency=3)
    await asyncio.gather(*(hear(provider, make_job({"stream": True, "mock": {"pace_s": 0.005}})) for _ in range(12)))
    assert mock.connections_made <= 3
    await provider.aclose()


async def test_a_body_that_does_not_end_after_done_holds_nobody_up(mock: MockProvider, provider: Provider) -> None:
    watch = Stopwatch()
    heard = await hear(provider, make_job(saying("a b", linger=True)))
    assert watch.s < 0.5
    assert heard.text == "a b"
    assert mock.connections_open == 1
    await eventually(lambda: mock.connections_open == 0, what="the connection is given up a second later")


async def test_closing_gives_up_a_body_that_does_not_end(mock: MockProvider) -> None:
    provider = make_openai(mock.base_url)
    await hear(provider, make_job(saying("a b", linger=True)))
    await provider.aclose()
    await eventually(lambda: mock.connections_open == 0, timeout_s=0.5)


async def test_a_large_body_goes_through(mock: MockProvider, provider: Provider) -> None:
    picture = "x" * 5_000_000
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
    await hear(provider, make_job({"messages": [{"role": "user", "content": parts}], "mock": {"text": "seen"}}))
    assert picture in mock.seen[-1].raw


async def test_a_compressed_answer_is_understood(mock: MockProvider, provider: Provider) -> None:
    mock.script(headers={"content-encoding": "gzip"}, raw="this is not gzip")
    with pytest.raises(Exception, match="decompressed"):
        await hear(provider, make_job({"stream": True}))


async def test_models_are_asked_for_at_the_provider(mock: MockProvider, provider: Provider) -> None:
    mock.models = ["b", "a", "b"]
    assert await provider.models() == ("b", "a")
    assert mock.seen[-1].path == "/v1/models"


async def test_the_upstream_id_is_known(provider: Provider) -> None:
    for stream in (True, False):
        heard = await hear(provider, make_job({"stream": stream}))
        assert {chunk.upstream_id for chunk in heard.chunks} == {"chatcmpl-mock"}


async def test_the_mock_provider_runs_as_a_program_too() -> None:
    program = str(Path(__file__).parents[2] / "mock_provider.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    provider = make_openai((await process.stdout.readline()).decode().strip(), WorkerSettings())
    try:
        assert (await hear(provider, make_job({"stream": True}))).text == "Hello there"
    finally:
        await provider.aclose()
        process.terminate()
        await process.wait()
