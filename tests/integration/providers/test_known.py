"""Providers of the table, as their servers meet them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.money import Usage
from schemas.settings import RouteSettings, WorkerSettings
from tests.factories import make_job
from tests.integration.providers.heard import hear
from tests.mock_provider import MockProvider
from workers.providers import make_provider
from workers.providers.base import Provider

STREAM = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
REASONED = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 20,
    "completion_tokens_details": {"reasoning_tokens": 7},
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-mine")


def make(provider: str, base_url: str | None, **changes: Any) -> Provider:
    route = RouteSettings(
        **{"id": RouteId("r"), "provider": provider, "base_url": base_url, "api_keys": ("env:MY_KEY",), **changes}
    )
    return make_provider(route, WorkerSettings())


async def test_a_known_provider_goes_by_its_name_and_sends_its_key_as_a_bearer(mock: MockProvider) -> None:
    provider = make("groq", mock.base_url)
    assert provider.name == "groq"
    await hear(provider, make_job())
    assert mock.seen[-1].headers["authorization"] == "Bearer sk-mine"
    await provider.aclose()


async def test_azure_gets_its_key_under_its_own_name_and_its_version_in_the_address(mock: MockProvider) -> None:
    provider = make("azure", f"{mock.base_url}/openai/deployments/d?api-version=2024-10-21")
    await hear(provider, make_job())
    seen = mock.seen[-1]
    assert seen.path == "/v1/openai/deployments/d/chat/completions?api-version=2024-10-21"
    assert seen.headers["api-key"] == "sk-mine"
    assert "authorization" not in seen.headers
    await provider.aclose()


async def test_mistral_is_asked_for_nothing_that_it_refuses(mock: MockProvider) -> None:
    mistral, groq = make("mistral", mock.base_url), make("groq", mock.base_url)
    for provider in (mistral, groq):
        await hear(provider, make_job(STREAM))
    of_mistral, of_groq = (seen.body for seen in mock.seen)
    assert "stream_options" not in of_mistral
    assert of_mistral["stream"] is True
    assert of_groq["stream_options"] == STREAM["stream_options"]
    await mistral.aclose()
    await groq.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_that_xai_tells_apart_is_counted_in(mock: MockProvider, stream: bool) -> None:
    choice = {"index": 0, "finish_reason": "stop", "delta" if stream else "message": {"content": "x"}}
    told = json.dumps({"choices": [choice], "usage": REASONED})
    mock.script(**({"raw": f"data: {told}\n\ndata: [DONE]\n\n"} if stream else {"body": told}))
    for name, completion_tokens in (("xai", 10), ("groq", 3)):
        provider = make(name, mock.base_url)
        heard = await hear(provider, make_job({"stream": stream}))
        assert heard.usages[-1].usage == Usage(
            prompt_tokens=10, completion_tokens=completion_tokens, reasoning_tokens=7
        )
        await provider.aclose()


@pytest.mark.parametrize("name", ["openrouter", "openai"])
async def test_further_headers_of_a_route_are_sent(mock: MockProvider, name: str) -> None:
    provider = make(name, mock.base_url, headers={"HTTP-Referer": "https://example.org"})
    await hear(provider, make_job())
    assert mock.seen[-1].headers["http-referer"] == "https://example.org"
    await provider.aclose()


def test_a_key_that_is_not_set_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(SetupError, match="env:GROQ_API_KEY is empty or not set"):
        make("groq", None, api_keys=())


def test_a_provider_without_a_common_address_asks_for_one() -> None:
    with pytest.raises(SetupError, match="base_url must be given"):
        make("azure", None)
