"""What the first chunks of a continuation must not say again: that the assistant speaks. Its client knows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from workers.providers.base import Chunk

_ROLE = b'"role"'
_NOTHING = (b"null", b'""', b"[]", b"{}")

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_choices = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_encode = msgspec.json.encode


async def seamless(chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """*chunks* without the role that opens an answer; a piece that says nothing else is left out."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if not any(_ROLE in piece for piece in chunk.pieces):
                yield chunk
                continue
            left = [said for piece in chunk.pieces if (said := _seamless(piece)) is not None]
            if left or chunk.usage is not None:
                yield replace(chunk, members=left[0] if left else None, more=tuple(left[1:]))


def _seamless(members: bytes) -> bytes | None:
    return members if _ROLE not in members else _without_role(members)


def _without_role(members: bytes) -> bytes | None:
    """None if nothing is left."""
    told = _members(members)
    choices = _choices(told["choices"])
    says = False
    for choice in choices:
        if "delta" not in choice:
            says = True
            continue
        delta = _members(choice["delta"])
        delta.pop("role", None)
        choice["delta"] = Raw(_encode(delta))
        says = says or any(bytes(raw) not in _NOTHING for name, raw in delta.items())
        says = says or any(bytes(raw) not in _NOTHING for name, raw in choice.items() if name not in ("index", "delta"))
    if not says:
        return None
    told["choices"] = Raw(_encode(choices))
    return _encode(told)
