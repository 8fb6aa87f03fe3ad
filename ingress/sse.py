"""A chat completion as bytes, streamed or whole: pure. Chunks are spliced, never parsed."""

from __future__ import annotations

import random
import string

import msgspec

from schemas.ids import RequestId, completion_id
from schemas.money import Usage

# One line, and no empty one behind it: that would end an event, and to OpenAI's SDKs, once a stream has ids, an event without data.
KEEP_ALIVE = b": keep-alive\n"

OBFUSCATION_BLOCK = 32  # events of a stream differ in length by multiples of this, whatever the token
_POOL = "".join(random.choices(string.ascii_letters + string.digits, k=8192)).encode()  # noqa: S311 - padding, no secret


class EventWriter:
    """The server-sent events of one stream. Every chunk has the same ``id``, ``created`` and ``model``.

    Every event has a number of its own, 1, 2, 3, …, as the ``id`` that server-sent events have; *number* is the last one's.
    """

    def __init__(
        self, request_id: RequestId, *, created: int, model: str, include_usage: bool, obfuscate: bool
    ) -> None:
        head = _head(request_id, kind="chat.completion.chunk", created=created, model=model)
        self.number = 0
        self._prefix = b"data: {" + head
        self._suffix = b',"usage":null' if include_usage else b""
        self._obfuscate = obfuscate
        self._at = hash(request_id) % (len(_POOL) - OBFUSCATION_BLOCK)

    def event(self, members: bytes) -> bytes:
        """The event for a chunk; *members* is its raw JSON object."""
        self.number += 1
        if not self._obfuscate:
            return b"id: %d\n%b%b%b}\n\n" % (self.number, self._prefix, members[1:-1], self._suffix)
        pad = -len(members) % OBFUSCATION_BLOCK
        self._at = (self._at + 7) % (len(_POOL) - OBFUSCATION_BLOCK)
        padding = _POOL[self._at : self._at + pad]
        return b'id: %d\n%b%b%b,"obfuscation":"%b"}\n\n' % (
            self.number,
            self._prefix,
            members[1:-1],
            self._suffix,
            padding,
        )

    def usage_event(self, usage: bytes) -> bytes:
        """The last event when usage was asked for: no choices."""
        self.number += 1
        return b'id: %d\n%b"choices":[],"usage":%b}\n\n' % (self.number, self._prefix, usage)

    def done_event(self) -> bytes:
        """What the API ends a stream with."""
        self.number += 1
        return b"id: %d\ndata: [DONE]\n\n" % self.number

    def error_event(self, body: bytes) -> bytes:
        """An error after the status has been sent."""
        self.number += 1
        return error_event(body, self.number)


def error_event(body: bytes, number: int) -> bytes:
    """The *number*-th event of a stream, which says that it failed; *body* is OpenAI's error shape."""
    return b"id: %d\ndata: %b\n\n" % (number, body)


def whole_body(request_id: RequestId, *, created: int, model: str, members: bytes, usage: bytes) -> bytes:
    """The body of an answer without streaming."""
    head = _head(request_id, kind="chat.completion", created=created, model=model)
    return b'{%b%b,"usage":%b}' % (head, members[1:-1], usage)


def usage_json(usage: Usage) -> bytes:
    """*usage* in the API's shape, for when the provider gave none."""
    return msgspec.json.encode(
        {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        }
    )


def _head(request_id: RequestId, *, kind: str, created: int, model: str) -> bytes:
    name = msgspec.json.encode(model)
    return b'"id":"%b","object":"%b","created":%d,"model":%b,' % (
        completion_id(request_id).encode(),
        kind.encode(),
        created,
        name,
    )
