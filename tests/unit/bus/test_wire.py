"""NATS's protocol as bytes: held against nats-py's own encoder, and cut at every place."""

from __future__ import annotations

import pytest
from nats.protocol.command import hpub_cmd, pub_cmd

from bus.wire import HEAD_BYTES_MAX, publication, read

PLAIN = b"MSG w.a.b 7 5\r\nhello\r\n"
ANSWERED = b"MSG w.a.b 7 _INBOX.x.1 5\r\nhello\r\n"
HEADED = b"HMSG w.a.b 7 _INBOX.x.1 12 17\r\nNATS/1.0\r\n\r\nhello\r\n"
EMPTY = b"MSG w.a.b 7 0\r\n\r\n"


@pytest.mark.parametrize("payload", [b"", b"x", b"a\r\nb", bytes(300)])
@pytest.mark.parametrize("reply", ["", "_INBOX.a.1"])
def test_a_publication_is_what_nats_py_makes_of_it(payload: bytes, reply: str) -> None:
    assert publication("a.b", payload, reply=reply) == pub_cmd("a.b", reply, payload)
    block = b"NATS/1.0\r\nNats-Msg-Id: 1.2\r\nNats-TTL: 60\r\n\r\n"
    headers = {"Nats-Msg-Id": "1.2", "Nats-TTL": "60"}
    assert publication("a.b", payload, reply=reply, headers=headers) == hpub_cmd("a.b", reply, block, payload)


@pytest.mark.parametrize("subject", ["a b", "a\r\nPUB b 0", "a\tb", "a\nb"])
def test_a_subject_says_no_more_than_a_subject(subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        publication(subject, b"")
    with pytest.raises(ValueError, match="subject"):
        publication("a", b"", reply=subject)


@pytest.mark.parametrize("headers", [{"a": "b\r\nc: d"}, {"a\nb": "c"}])
def test_a_header_says_no_more_than_a_header(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        publication("a", b"", headers=headers)


def test_messages_are_read_one_behind_the_other() -> None:
    data, at, found = PLAIN + HEADED + EMPTY + ANSWERED, 0, []
    while (message := read(data, at)) is not None:
        found.append((message.sid, message.subject, message.reply, message.headers, message.payload))
        at = message.end
    assert at == len(data)
    assert found == [
        (7, b"w.a.b", b"", b"", b"hello"),
        (7, b"w.a.b", b"_INBOX.x.1", b"NATS/1.0\r\n\r\n", b"hello"),
        (7, b"w.a.b", b"", b"", b""),
        (7, b"w.a.b", b"_INBOX.x.1", b"", b"hello"),
    ]


@pytest.mark.parametrize("whole", [PLAIN, ANSWERED, HEADED, EMPTY])
def test_what_is_not_whole_is_no_message_yet(whole: bytes) -> None:
    for cut in range(len(whole)):
        assert read(whole[:cut], 0) is None
    assert read(PLAIN + whole, len(PLAIN)) is not None


SOMETHING_ELSE = (
    *(b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR 'x'\r\n", b"INFO {}\r\n"),
    *(b"MSG a 1\r\n\r\n", b"MSG a b c d e 1\r\nx\r\n", b"MSG a x 1\r\nx\r\n", b"HMSG a 1 1\r\nx\r\n"),
    b"MSG " + b"a" * HEAD_BYTES_MAX + b" 1 0\r\n\r\n",
)


@pytest.mark.parametrize("data", SOMETHING_ELSE)
def test_what_is_something_else_is_left_to_nats_py(data: bytes) -> None:
    assert read(data, 0) is None
