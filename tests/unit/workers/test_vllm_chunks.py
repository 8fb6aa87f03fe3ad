from __future__ import annotations

import json
from typing import Any

import pytest

from schemas.errors import Fault, ProviderFailed, ProviderNonsense
from workers.providers.base import Chunk
from workers.providers.vllm_chunks import VllmChunkReader

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def choice(delta: dict[str, Any], *, index: int = 0, finish: str | None = None, **members: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish, **members}


def event(*choices: Any, **members: Any) -> bytes:
    return json.dumps({**HEAD, "choices": choices, **members}).encode()


def read(*events: bytes, request: bytes = b"{}") -> list[Chunk]:
    reader = VllmChunkReader()
    reader.habits.request = request
    return [chunk for each in events if (chunk := reader.event(b"", each)) is not None]


def test_ids_are_taken_out_and_the_rest_stays_byte_for_byte() -> None:
    rest = b'"delta":{"content":"\\u00e9","x":1.50 },"logprobs":{"a": [ 1e3]},"finish_reason":null'
    raw = b'{"choices":[{"index":0,' + rest + b',"token_ids":[7,8]}],"new":{"a" :1},"prompt_token_ids":null}'
    (chunk,) = read(raw)
    assert chunk.members == b'{"choices":[{"index":0,' + rest + b'}],"new":{"a" :1}}'
    assert chunk.token_ids == (7, 8)
    assert chunk.tokens == 2
    assert chunk.prompt_token_ids == ()


def test_a_chunk_without_ids_is_read_as_any_other() -> None:
    choices = b'"choices":[ {"index":0,"delta":{"content":"a"}} ]'
    (chunk,) = read(b"{" + choices + b"}")
    assert chunk.members == b"{" + choices + b"}"
    assert chunk.token_ids == chunk.prompt_token_ids == ()
    assert chunk.tokens == 1


def test_prompt_ids_are_told_once() -> None:
    first = event(choice({"role": "assistant", "content": ""}), prompt_token_ids=[1, 2, 3])
    again = event(choice({"content": "a"}, token_ids=[4]), prompt_token_ids=[1, 2, 3])
    chunks = read(first, again)
    assert [chunk.prompt_token_ids for chunk in chunks] == [(1, 2, 3), ()]
    assert all(b"token_ids" not in (chunk.members or b"") for chunk in chunks)


@pytest.mark.parametrize("ids", [None, []])
def test_ids_that_are_null_or_none_leave_no_trace(ids: list[int] | None) -> None:
    (chunk,) = read(event(choice({"content": "a"}, token_ids=ids), prompt_token_ids=None))
    assert chunk.token_ids == ()
    assert b"token_ids" not in (chunk.members or b"")


def test_text_that_came_of_no_new_token_is_counted_as_none() -> None:
    """A detokenizer holds back half a character; what it lets go at the end was counted with its token."""
    (chunk,) = read(event(choice({"content": "a longer text"}, token_ids=[])))
    assert chunk.tokens == 0


def test_ids_with_an_empty_delta_are_kept_and_counted() -> None:
    (chunk,) = read(event(choice({}, token_ids=[5, 6])))
    assert chunk.token_ids == (5, 6)
    assert chunk.tokens == 2


def test_of_several_choices_ids_are_counted_and_not_kept() -> None:
    """Each choice has chunks of its own, so a chunk with one choice proves nothing."""
    events = [event(choice({"role": "assistant"}, index=index), prompt_token_ids=[1]) for index in range(2)] + [
        event(choice({"content": "a"}, index=index, token_ids=[4, 5])) for index in range(2)
    ]
    chunks = read(*events, request=b'{"n":2}')
    assert [chunk.tokens for chunk in chunks] == [0, 0, 2, 2]
    assert all(chunk.token_ids == chunk.prompt_token_ids == () for chunk in chunks)
    assert all(b"token_ids" not in (chunk.members or b"") for chunk in chunks)


@pytest.mark.parametrize("n", ["1", "null", '"two"'])
def test_a_request_for_one_choice_keeps_ids_however_it_says_so(n: str) -> None:
    (chunk,) = read(event(choice({"content": "a"}, token_ids=[4])), request=f'{{"n":{n}}}'.encode())
    assert chunk.token_ids == (4,)


def test_a_whole_answer_is_read_like_a_stream() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    message = {"role": "assistant", "content": "a b"}
    body = {
        **HEAD,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "token_ids": [8, 9]}],
        "usage": usage,
        "prompt_token_ids": [1, 2, 3],
    }
    chunk = VllmChunkReader().body(json.dumps(body).encode())
    assert chunk.token_ids == (8, 9)
    assert chunk.prompt_token_ids == (1, 2, 3)
    assert chunk.tokens == 2
    assert json.loads(chunk.members or b"") == {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


@pytest.mark.parametrize("ids", ["[1.5]", '["a"]', "[-1]", "[4294967296]", "7", '{"a":1}', "[[1]]", "[null]"])
@pytest.mark.parametrize("place", ["choice", "prompt"])
def test_ids_that_are_none_are_nonsense(ids: str, place: str) -> None:
    of_choice = f',"token_ids":{ids}' if place == "choice" else ""
    of_prompt = f',"prompt_token_ids":{ids}' if place == "prompt" else ""
    raw = f'{{"choices":[{{"index":0,"delta":{{}}{of_choice}}}]{of_prompt}}}'
    with pytest.raises(ProviderNonsense):
        read(raw.encode())


@pytest.mark.parametrize("choices", ["null", "7", "[7]", "{}"])
def test_choices_that_are_none_are_nonsense(choices: str) -> None:
    with pytest.raises(ProviderNonsense):
        read(f'{{"choices":{choices},"prompt_token_ids":[1]}}'.encode())


@pytest.mark.parametrize(
    "raw",
    [
        b'{"error":{"message":"m","param":"token_ids","code":400}}',
        b'{"object":"error","message":"m","param":"token_ids","code":400}',
    ],
)
def test_an_error_that_names_the_ids_is_the_error(raw: bytes) -> None:
    with pytest.raises(Fault) as caught:
        read(raw)
    assert type(caught.value) is not ProviderNonsense


def test_text_that_talks_of_token_ids_is_left_alone() -> None:
    text = 'say "token_ids": [1]'
    (chunk,) = read(event(choice({"content": text})))
    assert json.loads(chunk.members or b"")["choices"][0]["delta"]["content"] == text
    assert chunk.token_ids == ()


def test_of_several_choices_in_a_chunk_each_is_looked_at() -> None:
    """Compact, as vLLM writes: cutting off the last choice's ids would not be enough."""
    one, other = choice({"content": "a"}, token_ids=[1]), choice({"content": "bcd" * 20}, index=1, token_ids=[2, 3])
    for each, tokens in ((one, 3), (choice({"content": "a"}), None)):
        raw = json.dumps({"choices": [each, other]}, separators=(",", ":")).encode()
        (chunk,) = read(raw, request=b'{"n":2}')
        assert b"token_ids" not in (chunk.members or b"")
        assert tokens is None or chunk.tokens == tokens
        assert tokens is not None or chunk.tokens > 2


def test_a_text_that_speaks_of_ids_is_left_alone() -> None:
    said = {"content": 'x,"token_ids":[1]}]'}
    raw = json.dumps({"choices": [choice(said, token_ids=[5])]}, separators=(",", ":")).encode()
    (chunk,) = read(raw)
    assert json.loads(chunk.members or b"") == {"choices": [choice(said)]}
    assert chunk.token_ids == (5,)


def test_done_without_a_finish_reason_is_an_answer_that_was_cut_off() -> None:
    reader = VllmChunkReader()
    for data in (event(choice({"content": "a"})), b"[DONE]"):
        reader.event(b"", data)
    with pytest.raises(ProviderFailed):
        reader.check_complete()
    whole = VllmChunkReader()
    for data in (event(choice({"content": "a"})), event(choice({}, finish="stop")), b"[DONE]"):
        whole.event(b"", data)
    whole.check_complete()


@pytest.mark.parametrize("request_body", [b"{}", b'{"n":2}'])
def test_what_the_events_of_a_stream_repeat_is_read_once_and_changes_nothing(request_body: bytes) -> None:
    """Each event as the first of an answer, which is looked at in full, and behind the others, of which only the choices are."""

    def compact(choices: str, more: str = "") -> bytes:
        head = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
        return f"{head}{choices}{more}}}".encode()

    def said(text: str, ids: str, finish: str = "null", more: str = "") -> bytes:
        return compact(
            f'[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":{finish},"token_ids":{ids}}}]',
            more,
        )

    events = [
        compact('[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]'),
        said("a", "[1]"),
        said("b", "[2,3]"),
        said('\\"token_ids\\":[9]}]', "[4]"),
        said("", "[]"),
        said("c", "[5]", more=',"new":true'),
        compact(
            '[{"index":0,"delta":{"content":"x"},"finish_reason":null,"token_ids":[6]},'
            '{"index":1,"delta":{"content":"y"},"finish_reason":null,"token_ids":[7]}]'
        ),
        said("d", "[8]", '"stop"'),
    ]
    together = read(*events, request=request_body)
    apart = [chunk for each in events for chunk in read(each, request=request_body)]
    assert together == apart
    assert [chunk.tokens for chunk in together] == [0, 1, 2, 1, 0, 1, 2, 1]
    assert all(b'"token_ids":' not in (chunk.members or b"").replace(b'\\"', b"") for chunk in together)


def test_ids_that_are_none_are_nonsense_behind_good_ones_too() -> None:
    events = [
        b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null,"token_ids":[%d]}]}' % n for n in (1, 2)
    ]
    with pytest.raises(ProviderNonsense):
        read(*events, events[0].replace(b"[1]", b"[99999999999]"))
