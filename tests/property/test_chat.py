"""Every body that the official SDK's types allow is a request; one wrong value in it is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from schemas.chat import decode_request
from schemas.errors import BadRequest
from tests.property.strategies import json_values, names, of_sdk_type, text

# Where the API's own ranges are narrower than its types.
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "model": names,
    "n": st.none() | st.integers(1, 128),
    "max_tokens": st.none() | st.integers(0, 2**31),
    "max_completion_tokens": st.none() | st.integers(0, 2**31),
    "top_logprobs": st.none() | st.integers(0, 20),
}
sdk_bodies = st.one_of(
    [
        of_sdk_type(kind, RANGES).filter(lambda body: body["messages"])
        for kind in (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)
    ]
)


@given(sdk_bodies)
def test_every_body_that_the_sdks_types_allow_is_a_request(body: dict[str, Any]) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode()
    request = decode_request(raw)
    assert request.model == body["model"]
    assert request.stream is (body.get("stream") is True)
    assert json.loads(request.messages_raw) == body["messages"]


@given(sdk_bodies, st.dictionaries(text.map("x-{}".format), json_values, max_size=3))
def test_fields_that_nobody_knows_make_no_difference(body: dict[str, Any], more: dict[str, Any]) -> None:
    request = decode_request(json.dumps({**more, **body}).encode())
    assert request.model == body["model"]


@given(sdk_bodies, st.data())
def test_one_wrong_value_is_refused_by_its_name(body: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(body)))
    wrong = {**body, name: [[[]]]}
    with pytest.raises(BadRequest) as caught:
        decode_request(json.dumps(wrong).encode())
    assert (caught.value.param or "").startswith(name)
    assert name in caught.value.message


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_else_is_sent_is_a_bad_request_with_a_sentence(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        decode_request(raw)
    assert caught.value.message.endswith(".")


@given(sdk_bodies.map(lambda body: json.dumps(body).encode()), st.data())
def test_half_a_body_is_a_bad_request(raw: bytes, data: st.DataObject) -> None:
    with pytest.raises(BadRequest):
        decode_request(raw[: data.draw(st.integers(0, len(raw) - 1))])
