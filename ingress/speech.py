"""Whether a chunk of a stream says anything yet. Providers open with a role and no word, and may fail right behind it."""

from __future__ import annotations

import msgspec
from msgspec import Raw, Struct

NOTHING = frozenset({b"null", b'""', b"[]", b"{}"})


class _Choice(Struct):
    delta: dict[str, Raw] | None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Chunk).decode


def says_something(chunk: Raw) -> bool:
    """Whether *chunk* has content of any kind, or an end. What can't be read is taken for content: it is not to be held back."""
    try:
        choices = _decode(chunk).choices
    except msgspec.MsgspecError:
        return True
    return any(choice.finish_reason is not None or _has_content(choice.delta or {}) for choice in choices)


def _has_content(delta: dict[str, Raw]) -> bool:
    return any(name != "role" and bytes(value).strip() not in NOTHING for name, value in delta.items())
