"""Keys: who has one, what it reaches, and that it is nowhere kept as itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ingress.auth import KEY_CHARS_MAX, KEY_PREFIX, authenticate, hash_key, hint_of, new_key, require
from schemas.control import ControlState, KeyStated, Role
from schemas.errors import Forbidden, Unauthorized
from schemas.ids import EventId, KeyId, OrgId

KEY, OLD = "sk-penstock-the-key-itself", "sk-penstock-the-one-before"
STATED = KeyStated(
    id=EventId("e"),
    ts_ns=0,
    by="test",
    producer="test",
    key_id=KeyId("key_1"),
    org=OrgId("default"),
    role=Role.CLIENT,
    hash=hash_key(KEY),
    created_ns=0,
)


def _state(**changes: Any) -> ControlState:
    state = ControlState()
    state.apply(msgspec.structs.replace(STATED, **changes))
    return state


def _headers(value: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", value)]


@pytest.mark.parametrize("value", [b"Bearer " + KEY.encode(), b"bearer   " + KEY.encode() + b"  "])
def test_a_known_key_is_its_principal(value: bytes) -> None:
    assert authenticate(_headers(value), _state(), now_ns=1).key_id == "key_1"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic " + KEY.encode(),
        KEY.encode(),
        b"Bearer wrong",
        b"Bearer " + hash_key(KEY).encode(),
        b"Bearer " + KEY.encode() + b"x" * KEY_CHARS_MAX,
        "Bearer sk-é".encode(),
        b"Bearer \xff\xfe",
    ],
)
def test_anything_else_is_nobody(value: bytes) -> None:
    with pytest.raises(Unauthorized):
        authenticate(_headers(value), _state(), now_ns=1)


def test_no_header_is_nobody() -> None:
    with pytest.raises(Unauthorized, match="didn't provide"):
        authenticate([(b"host", b"x")], _state(), now_ns=1)


@pytest.mark.parametrize(("now_ns", "valid"), [(99, True), (100, False), (101, False)])
def test_a_key_ends_at_its_time(now_ns: int, valid: bool) -> None:
    state = _state(expires_ns=100)
    assert (state.key_of(hash_key(KEY), now_ns=now_ns) is not None) is valid


def test_a_revoked_key_is_nobody() -> None:
    with pytest.raises(Unauthorized):
        authenticate(_headers(b"Bearer " + KEY.encode()), _state(revoked=True), now_ns=1)


@pytest.mark.parametrize(("now_ns", "valid"), [(99, True), (100, False)])
def test_the_key_before_a_rotation_works_for_its_grace(now_ns: int, valid: bool) -> None:
    state = _state(previous_hash=hash_key(OLD), previous_until_ns=100)
    assert (state.key_of(hash_key(OLD), now_ns=now_ns) is not None) is valid
    assert state.key_of(hash_key(KEY), now_ns=now_ns) is not None


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("needed", list(Role))
def test_a_role_reaches_itself_and_those_below(role: Role, needed: Role) -> None:
    rank = [Role.CLIENT, Role.ANALYST, Role.ADMIN]
    principal = msgspec.structs.replace(STATED, role=role)
    if rank.index(role) >= rank.index(needed):
        require(principal, needed)
    else:
        with pytest.raises(Forbidden, match=needed.value):
            require(principal, needed)


def test_a_new_key_is_long_new_and_known_by_its_end() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert first.startswith(KEY_PREFIX)
    assert len(first) >= len(KEY_PREFIX) + 43  # 256 bits
    assert hint_of(first) == first[-4:]
    assert hint_of("short") == ""
    assert first not in hash_key(first)
