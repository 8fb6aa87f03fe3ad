"""A chat completion as bytes, streamed or whole: pure. Chunks are spliced, never parsed."""

from __future__ import annotations

import random
import string

import msgspec

from schemas.ids import RequestId, completion_id
from schemas.money import Usage

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

OBFUSCATION_BLOCK = 32  # events of a stream differ in length by multiples of this, whatever the token
_POOL = "".join(random.choices(string.ascii_letters + string.digits, k=8192)).encode()  # noqa: S311 - padding, no secret


class EventWriter:
    """The server-sent events of one stream. Every event has the same ``id``, ``created`` and ``model``."""

    def __init__(
        self, request_id: RequestId, *, created: int, model: str, include_usage: bool, obfuscate: bool
    ) -> None:
        head = _head(request_id, kind="chat.completion.chunk", created=created, model=model)
        self._prefix = b"data: {" + head
        self._suffix = b',"usage":null' if include_usage else b""
        self._obfuscate = obfuscate
        self._at = hash(request_id) % (len(_POOL) - OBFUSCATION_BLOCK)

    def event(self, members: bytes) -> bytes:
        """The event for a chunk; *members* is its raw JSON object."""
        if not self._obfuscate:
            return b"%b%b%b}\n\n" % (self._prefix, members[1:-1], self._suffix)
        pad = -len(members) % OBFUSCATION_BLOCK
        self._at = (self._at + 7) % (len(_POOL) - OBFUSCATION_BLOCK)
        padding = _POOL[self._at : self._at + pad]
        return b'%b%b%b,"obfuscation":"%b"}\n\n' % (self._prefix, members[1:-1], self._suffix, padding)

    def usage_event(self, usage: bytes) -> bytes:
        """The last event when usage was asked for: no choices."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._prefix, usage)

    @staticmethod
    def error_event(body: bytes) -> bytes:
        """An error after the status has been sent; *body* is OpenAI's error shape."""
        return b"data: " + body + b"\n\n"


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
