"""Keys rotate on Anthropic's and Google's own wires too, and what Anthropic tells of its limits is heard."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import ProviderAuth
from schemas.standing import KeyState
from tests.factories import make_job
from tests.integration.providers.heard import hear
from tests.integration.wires.conftest import Wire
from workers.providers.base import Provider

QUESTION = "Which key is this?"
HEADERS = {"anthropic": "x-api-key", "google": "x-goog-api-key"}


def asking(**members: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": QUESTION}], **members}


@pytest.fixture
def two_keys(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Provider:
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    return wire.provider(api_keys=("env:WIRE_KEY", "env:OTHER_KEY"))


def keys_shown(wire: Wire) -> list[str]:
    """Those of our requests: a dead key is probed a second later, which a slow machine may need for the library's first request."""
    ours = [seen for seen in wire.server.seen if QUESTION in json.dumps(seen.body)]
    named = [{name.lower(): value for name, value in seen.headers.items()} for seen in ours]
    return [headers[HEADERS[wire.name]] for headers in named]


async def test_a_refused_key_is_followed_by_the_other_one(wire: Wire, two_keys: Provider) -> None:
    wire.server.script(status=401)
    with pytest.raises(ProviderAuth):
        await hear(two_keys, make_job(asking()))
    assert keys_shown(wire) == ["sk-wire", "sk-other"]
    states = {key.label: (key.state, key.reason) for key in two_keys.standing().keys}
    assert states == dict.fromkeys(("env:WIRE_KEY", "env:OTHER_KEY"), (KeyState.DEAD, "refused (HTTP 401)"))


@pytest.mark.parametrize("stream", [True, False])
async def test_the_keys_take_turns(wire: Wire, two_keys: Provider, stream: bool) -> None:
    for _ in range(4):
        await hear(two_keys, make_job(asking(stream=stream)))
    assert keys_shown(wire) == ["sk-wire", "sk-other"] * 2


@pytest.mark.parametrize("stream", [True, False])
async def test_what_anthropic_tells_of_its_limits_is_heard(wire: Wire, stream: bool) -> None:
    if wire.name != "anthropic":
        return  # Google tells nothing
    at = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    told = {"requests-limit": "50", "requests-remaining": "49", "requests-reset": at}
    told |= {"tokens-limit": "9000", "tokens-remaining": "8000", "tokens-reset": at}
    wire.server.script(headers={f"anthropic-ratelimit-{name}": value for name, value in told.items()})
    provider = wire.provider()
    await hear(provider, make_job(asking(stream=stream)))
    (key,) = provider.standing().keys
    assert (key.requests_left, key.tokens_left) == (49, 8000)
