"""NATS's client protocol, as far as it is hot: a publication as bytes, and messages out of bytes that were read; pure.

nats-py speaks all the rest of it.
Source: https://docs.nats.io/reference/reference-protocols/nats-protocol, docs/adr/0016-hot-path-to-nats.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

HEAD_BYTES_MAX = 4096  # the line that a message begins with: its subjects and sizes
_LINE_END = b"\r\n"
_PLAIN, _WITH_HEADERS = b"MSG ", b"HMSG "


class Read(NamedTuple):
    """A message of the subscription *sid*, which ends before *end* in what was read. *headers* is empty where it has none."""

    sid: int
    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes
    end: int


def publication(subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bytes:
    """What publishes *payload*. Raises: ValueError if a subject or a header would say more than that."""
    if " " in subject or " " in reply or not (subject.isprintable() and reply.isprintable()):
        raise ValueError("a subject has a space or a line's end in it")
    if headers is None:
        return b"".join((f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, _LINE_END))
    lines = [f"{name}: {value}" for name, value in headers.items()]
    block = "\r\n".join(("NATS/1.0", *lines, "", "")).encode()
    if block.count(b"\n") != len(lines) + 2:
        raise ValueError("a header of a message has a line's end in it")
    head = f"HPUB {subject} {reply} {len(block)} {len(block) + len(payload)}\r\n".encode()
    return b"".join((head, block, payload, _LINE_END))


def read(data: bytes, at: int) -> Read | None:
    """The message that begins at *at*; None if something else does, or if not all of it is there."""
    if data.startswith(_PLAIN, at):
        headed = False
    elif data.startswith(_WITH_HEADERS, at):
        headed = True
    else:
        return None
    head_end = data.find(_LINE_END, at, at + HEAD_BYTES_MAX)
    if head_end < 0:
        return None
    try:
        _, subject, number, *reply, total = data[at:head_end].split(b" ")
        headers_size = int(reply.pop()) if headed else 0
        sid, size = int(number), int(total)
    except (ValueError, IndexError):  # whoever reads it next says what is wrong with it
        return None
    begin = head_end + 2
    end = begin + size
    if len(data) < end + 2:
        return None
    return Read(
        sid,
        subject,
        reply[0] if reply else b"",
        data[begin : begin + headers_size],
        data[begin + headers_size : end],
        end + 2,
    )
