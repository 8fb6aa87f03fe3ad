"""The fold of CONTROL: what the last statement about each entity means."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from schemas.codec import encode
from schemas.control import ControlState, KeyStated, OrgStated, PublicModel, Role, RouteStated, decode_control
from schemas.ids import EventId, KeyId, OrgId, RouteId
from schemas.money import Price

SECOND_NS = 1_000_000_000
NOW_NS = 1_700_000_000 * SECOND_NS


def key(**changes: Any) -> KeyStated:
    stated = KeyStated(
        id=EventId("e"),
        ts_ns=NOW_NS,
        by="setup",
        producer="ingress-1",
        key_id=KeyId("k1"),
        org=OrgId("acme"),
        role=Role.CLIENT,
        hash="hash-a",
        created_ns=NOW_NS,
    )
    return msgspec.structs.replace(stated, **changes)


def state(*events: KeyStated | OrgStated | RouteStated) -> ControlState:
    folded = ControlState()
    for event in events:
        folded.apply(event)
    return folded


def test_a_key_is_found_by_its_hash_alone() -> None:
    stated = key()
    assert state(stated).key_of("hash-a", now_ns=NOW_NS) == stated
    assert state(stated).key_of("hash-b", now_ns=NOW_NS) is None
    assert state(stated).key_of("k1", now_ns=NOW_NS) is None


def test_a_revoked_key_is_refused() -> None:
    assert state(key(), key(revoked=True)).key_of("hash-a", now_ns=NOW_NS) is None


def test_a_key_ends_when_it_expires() -> None:
    folded = state(key(expires_ns=NOW_NS))
    assert folded.key_of("hash-a", now_ns=NOW_NS - 1) is not None
    assert folded.key_of("hash-a", now_ns=NOW_NS) is None


def test_a_rotated_keys_old_secret_works_until_its_grace_is_over() -> None:
    rotated = key(hash="hash-b", previous_hash="hash-a", previous_until_ns=NOW_NS + SECOND_NS)
    folded = state(key(), rotated)
    assert folded.key_of("hash-b", now_ns=NOW_NS + 10 * SECOND_NS) == rotated
    assert folded.key_of("hash-a", now_ns=NOW_NS + SECOND_NS - 1) == rotated
    assert folded.key_of("hash-a", now_ns=NOW_NS + SECOND_NS) is None


def test_a_key_rotated_without_grace_loses_its_old_secret_at_once() -> None:
    folded = state(key(), key(hash="hash-b", previous_hash="hash-a"))
    assert folded.key_of("hash-a", now_ns=NOW_NS) is None
    assert state(key(), key(hash="hash-b")).key_of("hash-a", now_ns=0) is None


def test_a_key_rotated_twice_forgets_its_first_secret() -> None:
    until = NOW_NS + 100 * SECOND_NS
    folded = state(
        key(),
        key(hash="hash-b", previous_hash="hash-a", previous_until_ns=until),
        key(hash="hash-c", previous_hash="hash-b", previous_until_ns=until),
    )
    assert folded.key_of("hash-a", now_ns=NOW_NS) is None
    assert folded.key_of("hash-b", now_ns=NOW_NS) is not None
    assert folded.key_of("hash-c", now_ns=NOW_NS) is not None


def test_a_rotated_key_that_expires_or_is_revoked_takes_both_secrets_with_it() -> None:
    rotated: dict[str, Any] = {"hash": "hash-b", "previous_hash": "hash-a", "previous_until_ns": NOW_NS + SECOND_NS}
    for end in ({"revoked": True}, {"expires_ns": NOW_NS}):
        folded = state(key(), key(**rotated, **end))
        assert folded.key_of("hash-a", now_ns=NOW_NS) is None
        assert folded.key_of("hash-b", now_ns=NOW_NS) is None


def test_statements_about_one_key_leave_the_others_alone() -> None:
    other = key(key_id=KeyId("k2"), hash="hash-z")
    folded = state(key(), other, key(revoked=True))
    assert folded.key_of("hash-z", now_ns=NOW_NS) == other
    assert set(folded.keys) == {"k1", "k2"}


def test_folding_a_statement_twice_changes_nothing() -> None:
    """After a reconnect the feed may say again what it has said."""
    rotated = key(hash="hash-b", previous_hash="hash-a", previous_until_ns=NOW_NS + SECOND_NS)
    folded = state(key(), rotated, rotated)
    assert folded.key_of("hash-a", now_ns=NOW_NS) == rotated
    assert folded.key_of("hash-b", now_ns=NOW_NS) == rotated


def test_the_last_statement_about_an_org_or_a_route_is_its_state() -> None:
    head: dict[str, Any] = {"id": EventId("e"), "ts_ns": NOW_NS, "by": "setup", "producer": "p"}
    org = OrgStated(**head, org=OrgId("acme"), name="Acme")
    renamed = msgspec.structs.replace(org, name="Acme Ltd")
    route = RouteStated(
        **head, route=RouteId("r"), provider="echo", models=(PublicModel(name="m", price=Price(input=1)),)
    )
    removed = msgspec.structs.replace(route, removed=True)
    folded = state(org, route, renamed, removed)
    assert folded.orgs == {"acme": renamed}
    assert folded.routes == {"r": removed}


@pytest.mark.parametrize("role", list(Role))
def test_a_statement_survives_the_stream(role: Role) -> None:
    stated = key(role=role, previous_hash="h", previous_until_ns=1, expires_ns=2, hint="abcd", name="n", revoked=True)
    assert decode_control(encode(stated)) == stated
