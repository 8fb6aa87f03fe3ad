"""Identifiers: names for kinds of strings, and new ones ordered by time."""

from __future__ import annotations

import os
import time
from typing import NewType

RequestId = NewType("RequestId", str)  # UUIDv7, canonical form
EventId = NewType("EventId", str)  # UUIDv7, canonical form
OrgId = NewType("OrgId", str)
KeyId = NewType("KeyId", str)
RouteId = NewType("RouteId", str)
WorkerId = NewType("WorkerId", str)
IngressId = NewType("IngressId", str)
Nonce = NewType("Nonce", str)  # 32 hex digits: 128 random bits

COMPLETION_PREFIX = "chatcmpl-"
ENTROPY_BLOCK_BYTES = 4096


class _Entropy:
    """The system's random bytes, fetched by the block: a request needs five ids, and each fetch is a system call."""

    def __init__(self) -> None:
        self._digits = ""
        self._at = 0

    def hex(self, digits: int) -> str:
        if self._at + digits > len(self._digits):
            self._digits, self._at = os.urandom(ENTROPY_BLOCK_BYTES).hex(), 0
        taken = self._digits[self._at : self._at + digits]
        self._at += digits
        return taken

    def forget(self) -> None:
        self._digits, self._at = "", 0


_entropy = _Entropy()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_entropy.forget)  # or parent and child would make the same nonces


def new_id(now_ns: int | None = None) -> str:
    """A UUIDv7 in canonical form: 48 bits of Unix milliseconds (of *now_ns*, or of now), then 74 random bits.

    Ids made later sort later (to the millisecond), so that a column of them has useful zone maps.
    Source: RFC 9562, section 5.7.
    """
    raw = _entropy.hex(20)
    stamp = f"{(time.time_ns() if now_ns is None else now_ns) // 1_000_000:012x}"
    variant = "89ab"[int(raw[3], 16) & 3]
    return f"{stamp[:8]}-{stamp[8:]}-7{raw[:3]}-{variant}{raw[4:7]}-{raw[7:19]}"


def new_nonce() -> Nonce:
    return Nonce(_entropy.hex(32))


def new_name(role: str) -> str:
    """A process's own name, such as ``worker-3f9a01c2``: one NATS subject token."""
    return f"{role}-{os.urandom(4).hex()}"


def completion_id(request_id: RequestId) -> str:
    """The ``id`` that clients see; `request_id_of` turns it back."""
    return COMPLETION_PREFIX + request_id.replace("-", "")


def request_id_of(text: str) -> RequestId:
    """The request id behind what a person pastes: the id itself or a completion's ``chatcmpl-…``.

    Raises: ValueError if *text* is neither.
    """
    digits = text.strip().removeprefix(COMPLETION_PREFIX).replace("-", "").lower()
    if len(digits) != 32 or not set(digits) <= set("0123456789abcdef"):
        raise ValueError(f"{text!r} is not a request id: expected a UUID or chatcmpl-… with 32 hex digits")
    return RequestId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")
