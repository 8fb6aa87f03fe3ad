from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
)
from schemas.money import Usage
from workers.providers.base import Chunk
from workers.providers.openai_chunks import ChunkReader

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": None},
}


def choice(delta: Any, *, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def event(*choices: Any, **members: Any) -> bytes:
    return json.dumps({**HEAD, "choices": choices, **members}).encode()


def read(*events: bytes, name: bytes = b"") -> list[Chunk]:
    reader = ChunkReader()
    return [chunk for each in events if (chunk := reader.event(name, each)) is not None]


def test_chunk_keeps_the_choices_and_unknown_members_byte_for_byte() -> None:
    choices = b'"choices":[ {"index":0,"delta":{"content":"\\u00e9","x":1.50}} ]'
    raw = b'{"id":"x","object":"o","created":1,"model":"m",' + choices + b',"new":{"a" :1},"usage":null}'
    (chunk,) = read(raw)
    assert chunk.members == b"{" + choices + b',"new":{"a" :1}}'
    assert chunk.upstream_id == "x"


def test_what_events_repeat_around_their_choices_is_theirs() -> None:
    """After the first event, one with the same bytes before and behind its choices is not read as a whole."""
    said = [{"content": "one"}, {"content": "two é", "tool_calls": []}, {"role": "assistant"}, {"content": "one"}]
    every = read(*(event(choice(delta), fingerprint={"a": 1}, usage=None) for delta in said))
    alone = [read(event(choice(delta), fingerprint={"a": 1}, usage=None))[0] for delta in said]
    assert every == alone


def test_an_event_with_something_else_around_its_choices_is_read_by_itself() -> None:
    same = event(choice({"content": "x"}), usage=None)
    other = event(choice({"content": "x"}), usage=None, new="n")
    reported = event(usage={"prompt_tokens": 3, "completion_tokens": 2})
    nested = event(choice({"content": "x"}), usage=None, inner={"choices": [choice({"content": "x"})]})
    for last in (other, nested, reported, same):
        assert read(same, same, last)[-1] == read(last)[0]


@pytest.mark.parametrize(
    "raw", [b'[{"delta":{}}', b'[{"delta":{}}],"x":[1]', b"null", b"7", b'[{"delta":"\xff"}]', b"", b" "]
)
def test_choices_that_are_none_are_refused_also_amid_what_repeats(raw: bytes) -> None:
    """Unless they are no list alone, as where a member more stands behind them: then the event is read as a whole."""
    head, _, tail = event(choice({"content": "x"})).partition(json.dumps([choice({"content": "x"})]).encode())
    reader = ChunkReader()
    reader.event(b"", event(choice({"content": "x"})))
    try:
        expected = read(head + raw + tail)
    except ProviderNonsense:
        with pytest.raises(ProviderNonsense):
            reader.event(b"", head + raw + tail)
    else:
        assert [reader.event(b"", head + raw + tail)] == expected


def test_events_that_came_together_are_one_chunk_up_to_a_fault() -> None:
    reader = ChunkReader()
    told = [event(choice({"content": word})) for word in ("a", "b")]
    chunk = reader.events([(b"", data) for data in (*told, b'{"error":{"message":"no"}}', *told)])
    assert chunk is not None
    assert chunk.pieces == tuple(piece for one in read(*told) for piece in one.pieces)
    assert chunk.tokens == 2
    with pytest.raises(Fault):
        reader.check_well()


def test_chunk_with_choices_alone_has_nothing_else() -> None:
    (chunk,) = read(b'{"choices":[{"index":0,"delta":{}}],"id":"x"}')
    assert chunk.members == b'{"choices":[{"index":0,"delta":{}}]}'


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda key: key not in ("error", "choices", "usage", "id")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=6,
    )
)
def test_chunk_members_are_all_that_is_not_ours(extra: dict[str, Any]) -> None:
    (chunk,) = read(event(choice({"content": "x"}), usage=None, **{k: v for k, v in extra.items() if k not in HEAD}))
    members = json.loads(chunk.members or b"")
    assert members.pop("choices")[0]["delta"] == {"content": "x"}
    assert members == {k: v for k, v in extra.items() if k not in HEAD}


def test_usage_comes_from_a_chunk_of_its_own() -> None:
    (chunk,) = read(event(usage=USAGE, system_fingerprint="fp", service_tier="default", obfuscation="xx"))
    assert chunk.members is None
    assert chunk.usage == Usage(
        prompt_tokens=9, completion_tokens=4, cached_tokens=8, reasoning_tokens=3, audio_prompt_tokens=1
    )
    assert json.loads(chunk.usage_raw or b"") == USAGE


def test_a_usage_report_is_no_chunk_for_the_client_whatever_else_is_in_it() -> None:
    """llama.cpp adds timings. A client that asked for no usage would stumble over a chunk without choices."""
    (chunk,) = read(event(usage=USAGE, timings={"predicted_ms": 7}))
    assert chunk.members is None


def test_usage_may_come_with_the_last_content_or_with_every_chunk() -> None:
    for chunk in read(event(choice({"content": "x"}), usage=USAGE), event(choice({}, finish="stop"), usage=USAGE)):
        assert chunk.members is not None
        assert chunk.usage is not None
        assert b"usage" not in chunk.members


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        "4",
        {"prompt_tokens": -1},
        {"prompt_tokens": "x"},
        {"completion_tokens": 10**15},
        {"total_tokens": 3},
    ],
)
def test_usage_that_cannot_be_true_counts_as_none(usage: Any) -> None:
    (chunk,) = read(event(choice({"content": "x"}), usage=usage))
    assert (chunk.usage, chunk.usage_raw) == (None, None)


def test_cached_tokens_are_found_under_deepseeks_name() -> None:
    (chunk,) = read(event(usage={"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 5}))
    assert chunk.usage == Usage(prompt_tokens=9, completion_tokens=1, cached_tokens=5)


def test_chunk_without_choices_but_with_something_to_say_is_passed_on() -> None:
    (chunk,) = read(event(prompt_filter_results=[{"index": 0}]))
    assert json.loads(chunk.members or b"") == {"choices": [], "prompt_filter_results": [{"index": 0}]}


def test_chunk_that_says_nothing_is_dropped() -> None:
    assert read(event(), event(usage=None)) == []


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"role": "assistant", "content": ""}, 0),
        ({"content": None}, 0),
        ({}, 0),
        ({"content": " word"}, 1),
        ({"content": "x" * 400}, 100),
        ({"reasoning_content": "hm"}, 1),
        ({"reasoning": "hm", "reasoning_content": "hm"}, 1),
        ({"refusal": "no"}, 1),
        ({"content": "a", "reasoning": "b"}, 2),
        ({"content": [{"type": "text", "text": "x"}]}, 8),
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}, 1),
        (
            {
                "tool_calls": [
                    {"index": 0, "function": {"arguments": "{"}},
                    {"index": 1, "function": {"arguments": "}"}},
                ]
            },
            2,
        ),
        ({"tool_calls": [{"index": 0, "custom": {"input": "x"}}]}, 1),
        ({"tool_calls": "odd"}, 1),
        ({"tool_calls": None, "function_call": {"arguments": "x"}}, 1),
    ],
)
def test_tokens_are_counted_over_everything_that_is_text(delta: dict[str, Any], tokens: int) -> None:
    (chunk,) = read(event(choice(delta)))
    assert chunk.tokens == tokens


def test_finish_reason_is_that_of_the_first_choice() -> None:
    chunks = read(event(choice({}, index=1, finish="length")), event(choice({}, index=0, finish="stop")))
    assert [chunk.finish_reason for chunk in chunks] == [None, "stop"]


def test_stream_is_complete_when_every_choice_has_finished() -> None:
    reader = ChunkReader()
    for data in (event(choice({}), choice({}, index=1)), event(choice({}, finish="stop"))):
        reader.event(b"", data)
        with pytest.raises(ProviderFailed, match="ended early"):
            reader.check_complete()
    reader.event(b"", event(choice({}, index=1, finish="stop")))
    reader.check_complete()


def test_stream_is_complete_with_done_even_without_a_finish_reason() -> None:
    reader = ChunkReader()
    reader.event(b"", event(choice({"content": "x"})))
    reader.event(b"", b"[DONE]")
    reader.check_complete()


def test_stream_without_any_choice_is_nonsense() -> None:
    reader = ChunkReader()
    reader.event(b"", b"[DONE]")
    with pytest.raises(ProviderNonsense):
        reader.check_complete()


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_generation_that_was_given_up_is_not_a_success(reason: str) -> None:
    with pytest.raises(ProviderFailed):
        read(event(choice({"content": "x"}, finish=reason)))


@pytest.mark.parametrize(
    ("error", "fault", "status"),
    [
        ({"message": "boom", "code": 500}, ProviderFailed, 500),
        ({"message": "boom", "code": "502"}, ProviderFailed, 502),
        ({"message": "boom"}, ProviderFailed, None),
        ({"message": "boom", "type": "overloaded_error"}, ProviderFailed, None),
        ("boom", ProviderFailed, None),
        ({"message": "bad", "code": 400}, ProviderRejected, 400),
        ({"message": "bad", "type": "BadRequestError", "code": None}, ProviderRejected, 400),
        ({"message": "bad", "type": "invalid_request_error", "code": "context_length_exceeded"}, ProviderRejected, 400),
        ({"message": "slow down", "code": 429}, ProviderRateLimited, 429),
        ({"message": "slow down", "code": "rate_limit_exceeded"}, ProviderRateLimited, 429),
        ({"message": "key sk-1", "type": "authentication_error"}, ProviderAuth, 401),
        ({"message": "late", "status": 504}, ProviderTimeout, 504),
        ({"message": "?", "code": 7}, ProviderFailed, None),
    ],
)
def test_an_error_inside_a_stream_is_told_by_its_status_or_type(
    error: Any, fault: type[Fault], status: int | None
) -> None:
    with pytest.raises(fault) as caught:
        read(json.dumps({"error": error}).encode())
    assert type(caught.value) is fault
    assert caught.value.status == status


def test_error_event_and_old_error_object_are_errors_too() -> None:
    with pytest.raises(ProviderFailed):
        read(b'{"message":"boom"}', name=b"error")
    with pytest.raises(ProviderRejected, match="too long"):
        read(b'{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}')


def test_error_of_null_is_no_error() -> None:
    assert len(read(event(choice({"content": "x"}), error=None))) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not json",
        b"[]",
        b"7",
        b'"text"',
        b"{",
        b'{"choices":',
        b'{"choices":7}',
        b'{"choices":null}',
        b'{"choices":{}}',
        b'{"choices":[7]}',
        b'{"choices":[{"index":"x","delta":{}}]}',
        b'{"choices":[{"index":0}]}',
        b'{"choices":[{"index":0,"delta":null}]}',
        b'{"choices":[{"index":0,"message":{"content":"x"}}]}',
        b'{"hello":"world"}',
        b'{"choices":[{"index":0,"delta":{"content":"\xff"}}]}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_a_chunk_is_nonsense(data: bytes) -> None:
    with pytest.raises(ProviderNonsense):
        read(data)


def test_whole_answer_is_one_chunk_with_everything() -> None:
    body = {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 1, "message": {"role": "assistant", "content": "b"}, "finish_reason": "length"},
            {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"},
        ],
        "usage": USAGE,
        "service_tier": "default",
    }
    chunk = ChunkReader().body(json.dumps(body).encode())
    assert json.loads(chunk.members or b"") == {"choices": body["choices"], "service_tier": "default"}
    assert (chunk.tokens, chunk.finish_reason, chunk.upstream_id) == (4, "stop", "chatcmpl-7")
    assert chunk.usage is not None


@pytest.mark.parametrize(("size", "tokens"), [(400, 100), (24, 6), (1, 1)])  # a delta of 24 is one
def test_whole_answer_without_usage_has_an_estimate(size: int, tokens: int) -> None:
    chunk = ChunkReader().body(
        b'{"choices":[{"index":0,"message":{"content":"' + b"x" * size + b'"},"finish_reason":"stop"}]}'
    )
    assert (chunk.tokens, chunk.usage) == (tokens, None)


@pytest.mark.parametrize(
    "data", [b'{"choices":[]}', b'{"choices":[{"index":0,"delta":{}}]}', b"<html>", b'{"usage":{}}']
)
def test_whole_answer_without_a_message_is_nonsense(data: bytes) -> None:
    with pytest.raises(ProviderNonsense):
        ChunkReader().body(data)
