from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ProviderRejected, SetupError
from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from schemas.standing import KeyState
from tests.factories import make_job
from workers.providers import make_provider
from workers.providers.openai import rewritten


def route(**changes: Any) -> RouteSettings:
    models = (ModelSettings(name="public", upstream="theirs"),)
    return RouteSettings(
        **{"id": RouteId("r"), "provider": "openai", "base_url": "http://127.0.0.1:1/v1", "models": models, **changes}
    )


def test_body_goes_on_byte_for_byte_but_for_the_model() -> None:
    rest = b'"messages":[ {"role":"user","content":"\\u00e9 \\ud83e\\udd8a"}],"temperature":1.0,"new":{"a" :[1.50,1e2]}'
    assert rewritten(make_job(b'{"model":"public",' + rest + b"}"), "theirs") == b'{"model":"theirs",' + rest + b"}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"include_usage": True}),
        (',"stream_options":null', {"include_usage": True}),
        (',"stream_options":{}', {"include_usage": True}),
        (',"stream_options":{"include_usage":false,"include_obfuscation":false,"x":1}', None),
    ],
)
def test_a_stream_always_asks_for_usage_and_keeps_the_other_options(options: str, expected: Any) -> None:
    sent = json.loads(rewritten(make_job(f'{{"model":"m","stream":true{options}}}'.encode(), stream=True), "m"))
    assert sent["stream"] is True
    assert sent["stream_options"] == (expected or {"include_usage": True, "include_obfuscation": False, "x": 1})


def test_options_that_are_no_object_are_left_for_the_provider_to_refuse() -> None:
    sent = json.loads(rewritten(make_job(b'{"model":"m","stream_options":7}', stream=True), "m"))
    assert sent["stream_options"] == 7


def test_a_request_without_streaming_gets_no_stream_options() -> None:
    assert json.loads(rewritten(make_job(b'{"model":"m"}'), "m")) == {"model": "m"}


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"{", b'{"a"}'])
def test_a_body_that_is_no_object_is_rejected(body: bytes) -> None:
    with pytest.raises(ProviderRejected):
        rewritten(make_job(body), "m")


def test_registry_names_the_known_providers_when_it_is_asked_for_another() -> None:
    with pytest.raises(SetupError, match=r"known are: anthropic, .*echo, .*openai"):
        make_provider(route(provider="nobody"), WorkerSettings())


def test_registry_makes_a_provider_that_knows_the_upstream_names() -> None:
    provider = make_provider(route(), WorkerSettings())
    assert provider.name == "openai"
    assert [provider.upstream_model(name) for name in ("public", "other")] == ["theirs", "other"]


@pytest.mark.parametrize(
    "base_url",
    ["example.com", "ftp://example.com", "http://", "http://[", "file:///etc", "http://u:p@h/v1", "http://h:99999/"],
)
def test_an_address_that_is_none_is_a_setup_error(base_url: str) -> None:
    with pytest.raises(SetupError, match="base_url"):
        make_provider(route(base_url=base_url), WorkerSettings())


def test_a_key_that_cannot_be_read_is_left_for_later_as_long_as_another_one_can(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret\n")
    keys = ("env:PENSTOCK_TEST_NO_SUCH_KEY", f"file:{tmp_path / 'key'}")
    provider = make_provider(route(api_keys=keys), WorkerSettings())
    states = [(key.label, key.state, key.reason) for key in provider.standing().keys]
    assert states == [(keys[0], KeyState.DEAD, "can't be read"), (keys[1], KeyState.READY, None)]


@pytest.mark.parametrize("content", [None, "", "sk-\x00secret", "sk-sécret", "two\nlines"])
def test_a_key_that_cannot_be_used_is_a_setup_error_that_does_not_tell_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(SetupError) as caught:
        make_provider(route(api_keys=(f"file:{tmp_path / 'key'}",)), WorkerSettings())
    assert "sk-" not in caught.value.message
    assert "two" not in caught.value.message
