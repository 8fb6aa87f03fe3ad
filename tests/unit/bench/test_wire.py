"""What the load generator takes for a right answer, and what it says of a wrong one."""

import pytest

from bench.provider import Answers, http_chunk
from bench.wire import number_bytes, request_bytes, stream_problem, whole_problem

ANSWERS = Answers(chunks=3)


def body_at(answer: bytes) -> int:
    return answer.index(b"\r\n\r\n") + 4


def whole(answer: bytes) -> str | None:
    return whole_problem(bytearray(answer), body_at(answer), 3)


def stream(answer: bytes) -> str:
    return stream_problem(bytearray(answer), body_at(answer), 3)


def test_a_right_answer_has_no_problem() -> None:
    assert whole(ANSWERS.whole) == ""


def test_an_incomplete_answer_is_waited_for() -> None:
    assert whole(ANSWERS.whole[:-1]) is None


def test_an_answer_with_a_token_missing_is_wrong() -> None:
    assert whole(ANSWERS.whole.replace(b" tok001", b" xxx001")) == "2 tokens instead of 3"


def test_an_answer_without_usage_is_wrong() -> None:
    assert whole(ANSWERS.whole.replace(b'"usage"', b'"other"')) == "no usage"


def test_a_status_other_than_200_is_named() -> None:
    assert whole(ANSWERS.whole.replace(b"200 OK", b"503 No")) == "status 503"
    assert stream(ANSWERS.streams[False].replace(b"200 OK", b"429 No")) == "status 429"


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_right_stream_has_no_problem(with_usage: bool) -> None:
    assert stream(ANSWERS.streams[with_usage]) == ""


def test_a_stream_whose_events_lie_across_http_chunks_is_right() -> None:
    """A server may cut its bytes anywhere, also in the middle of a token."""
    answer = ANSWERS.streams[False]
    lines = answer[body_at(answer) :].split(b"\r\n")
    events = b"".join(line for line in lines if line.startswith(b"data"))
    cut = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (events[i : i + 7] for i in range(0, len(events), 7))
    )
    assert stream(answer[: body_at(answer)] + cut + b"0\r\n\r\n") == ""


def test_a_stream_without_done_is_wrong() -> None:
    answer = ANSWERS.streams[False].replace(b"data: [DONE]", b"data:  DONE ")
    assert stream(answer) == "a stream of 3 tokens in 4 events, without [DONE]"


def test_a_stream_of_merged_chunks_is_wrong() -> None:
    """All tokens arrived, but not one by one."""
    one = http_chunk(b'data: {"choices":[{"delta":{"content":" tok000 tok001 tok002"}}]}\n\n')
    assert "3 tokens in 2 events" in stream(ANSWERS.stream_head + one + ANSWERS.events[False][-1])


def test_a_stream_whose_chunks_are_not_as_long_as_they_say_is_wrong() -> None:
    assert "without [DONE]" in stream(ANSWERS.stream_head + b"5\r\ndata: {}\r\n0\r\n\r\n")


def test_a_request_is_as_long_as_its_head_says() -> None:
    request = request_bytes("h:1", "/v1/chat/completions", api_key="k", model="m", stream=True) + number_bytes(42)
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert b'"stream":true' in body
    assert body.endswith(b'000000000042"}]}')
