"""The keys of a route, with a clock that is told the time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.standing import KeyState
from workers.providers.keys import Grant, Key, KeyRing, KeyRules, Wait, label_of
from workers.providers.rate_headers import Told

UNTOLD = Told()


def ring(*labels: str, requests_per_minute: int = 0, tokens_per_minute: int = 0) -> KeyRing:
    return KeyRing(
        labels or ("a", "b", "c"),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        rules=KeyRules(),
        dice=lambda: 0.5,
    )


def granted(keys: KeyRing, now: float = 0.0, tokens: int = 1) -> Grant:
    found = keys.grant(now, tokens)
    assert isinstance(found, Grant)
    return found


def waits(keys: KeyRing, now: float = 0.0, tokens: int = 1) -> float:
    """Until when."""
    found = keys.grant(now, tokens)
    assert isinstance(found, Wait)
    return found.until


def key(keys: KeyRing, label: str) -> Key:
    return next(key for key in keys.keys if key.label == label)


def states(keys: KeyRing, now: float = 0.0) -> dict[str, KeyState]:
    return {told.label: told.state for told in (key.told(now) for key in keys.keys)}


def test_the_key_with_the_fewest_running_is_next_and_all_take_turns() -> None:
    keys = ring()
    held = [granted(keys) for _ in range(6)]
    assert Counter(grant.key.label for grant in held) == {"a": 2, "b": 2, "c": 2}
    for grant in held:
        if grant.key.label == "b":
            keys.ended(grant, None)
    assert [granted(keys).key.label for _ in range(2)] == ["b", "b"]


def test_a_key_with_nothing_running_waits_its_turn() -> None:
    keys = ring()
    order = []
    for _ in range(6):
        grant = granted(keys)
        keys.ended(grant, None)
        order.append(grant.key.label)
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_a_limited_key_cools_as_long_as_the_provider_asks_for() -> None:
    keys = ring("a", "b")
    keys.limit(0.0, key(keys, "a"), 12.0)
    assert states(keys) == {"a": KeyState.COOLING, "b": KeyState.READY}
    assert {granted(keys, now).key.label for now in (0.0, 5.0, 11.9)} == {"b"}
    assert states(keys, 12.1)["a"] is KeyState.READY


def test_a_limited_key_cools_longer_each_time_where_the_provider_names_no_time() -> None:
    keys = ring("a")
    ends = []
    now = 0.0
    for _ in range(12):
        keys.limit(now, key(keys, "a"), None)
        ends.append(key(keys, "a").cools_until - now)
        now = key(keys, "a").cools_until
    assert ends[:4] == [1.0, 2.0, 4.0, 8.0]
    assert ends[-1] == KeyRules().cooling_max_s


def test_many_at_once_that_are_limited_are_one_limit() -> None:
    """They were all under way when the key began to cool: only a try that was sent after that makes it cool longer."""
    keys = ring("a")
    for number in range(10):
        keys.limit(number / 100, key(keys, "a"), None)
    assert waits(keys) == 1.0
    keys.limit(0.5, key(keys, "a"), 9.0)
    assert waits(keys) == 9.5, "the provider's own word counts all the same"


def test_a_served_key_begins_its_back_off_anew_but_not_by_an_answer_to_an_earlier_try() -> None:
    keys = ring("a")
    keys.limit(0.0, key(keys, "a"), None)
    keys.served(0.5, key(keys, "a"))
    assert waits(keys, 0.5) == 1.0
    keys.served(1.5, key(keys, "a"))
    keys.limit(2.0, key(keys, "a"), None)
    assert waits(keys, 2.0) == 3.0


def test_when_all_keys_cool_the_soonest_is_waited_for() -> None:
    keys = ring("a", "b")
    keys.limit(0.0, key(keys, "a"), 30.0)
    keys.limit(0.0, key(keys, "b"), 4.0)
    assert waits(keys) == 4.0
    assert granted(keys, 4.0).key.label == "b"


def test_a_dead_key_is_left_out_until_it_is_revived() -> None:
    keys = ring("a", "b")
    keys.kill(0.0, key(keys, "a"), "refused (HTTP 401)")
    assert {granted(keys, now).key.label for now in (0.0, 1e6)} == {"b"}
    keys.kill(0.0, key(keys, "b"), "refused (HTTP 402)")
    assert keys.grant(0.0, 1) is None
    keys.revive(key(keys, "b"))
    assert granted(keys).key.label == "b"


def test_a_dead_key_is_probed_less_and_less_often() -> None:
    keys = ring("a")
    waits_s = []
    now = 0.0
    for _ in range(14):
        keys.kill(now, key(keys, "a"), "refused (HTTP 401)")
        backoff = key(keys, "a").backoff
        assert backoff is not None
        waits_s.append(backoff.at - now)
        now = backoff.at
    assert waits_s[:3] == [1.0, 2.0, 4.0]
    assert waits_s[-1] == KeyRules().probe_max_s


def test_what_a_key_may_still_send_is_learned_from_its_answers() -> None:
    keys = ring("a", "b")
    grant = granted(keys)
    assert grant.key.label == "a"
    keys.told(0.0, grant, requests=Told(limit=3, left=0, reset_s=20.0), tokens=UNTOLD)
    keys.ended(grant, None)
    assert [granted(keys).key.label for _ in range(4)] == ["b"] * 4
    assert key(keys, "a").told(0.0).requests_left == 0
    assert granted(keys, 20.0).key.label == "a"


def test_what_is_under_way_is_taken_off_what_the_provider_says_is_left() -> None:
    keys = ring("a")
    first, second, third = (granted(keys) for _ in range(3))
    keys.told(0.0, first, requests=Told(limit=10, left=3, reset_s=20.0), tokens=UNTOLD)
    granted(keys)
    assert waits(keys) == 20.0
    for grant in (second, third):
        keys.ended(grant, None)


def test_learned_tokens_bound_what_is_sent() -> None:
    keys = ring("a")
    grant = granted(keys, tokens=100)
    keys.told(0.0, grant, requests=UNTOLD, tokens=Told(limit=1000, left=250, reset_s=30.0))
    granted(keys, tokens=200)
    assert waits(keys, tokens=100) == 30.0
    granted(keys, tokens=50)


def test_a_routes_own_limit_counts_over_all_keys() -> None:
    keys = ring(requests_per_minute=2)
    assert {granted(keys, now).key.label for now in (0.0, 1.0)} == {"a", "b"}
    until = waits(keys, 2.0)
    assert 60.0 < until < 61.0
    assert keys.rates(2.0).requests == 2
    granted(keys, until)


def test_the_tokens_that_a_try_really_took_count_in_the_end() -> None:
    keys = ring(tokens_per_minute=1000)
    grant = granted(keys, tokens=900)
    assert waits(keys, tokens=200) > 60.0
    keys.ended(grant, 100)
    assert keys.rates(0.0).tokens == 100
    granted(keys, tokens=900)


def test_the_reason_of_a_wait_says_which_limit_it_is() -> None:
    keys = ring(requests_per_minute=1)
    granted(keys)
    found = keys.grant(0.0, 1)
    assert isinstance(found, Wait)
    assert found.why == "its 1 requests a minute are used up"


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["grant", "end", "limit", "kill", "revive", "told"]), st.integers(0, 5), st.floats(0, 3)
        ),
        max_size=80,
    )
)
def test_whatever_happens_a_grant_is_only_given_where_there_is_room(steps: list[tuple[str, int, float]]) -> None:
    keys = ring(requests_per_minute=20)
    now, held = 0.0, list[Grant]()
    for what, number, wait_s in steps:
        now += wait_s
        chosen = keys.keys[number % 3]
        if what == "grant":
            found = keys.grant(now, 1)
            if isinstance(found, Grant):
                assert found.key.dead is None
                assert found.key.cools_until <= now
                assert keys.rates(now).requests <= 20
                held.append(found)
            elif isinstance(found, Wait):
                assert found.until > now
            else:
                assert all(each.dead for each in keys.keys)
        elif what == "end" and held:
            keys.ended(held.pop(number % len(held)), number)
        elif what == "limit":
            keys.limit(now, chosen, float(number) if number % 2 else None)
        elif what == "kill":
            keys.kill(now, chosen, "refused")
        elif what == "revive":
            keys.revive(chosen)
        elif what == "told" and held:
            keys.told(now, held[-1], requests=Told(limit=5, left=number, reset_s=wait_s), tokens=UNTOLD)
    for grant in held:
        keys.ended(grant, None)
    assert [(each.running, each.requests.pending, each.tokens.pending) for each in keys.keys] == [(0, 0, 0)] * 3


@pytest.mark.parametrize(
    ("reference", "label"), [("env:A", "env:A"), ("file:/run/k", "file:/run/k"), ("sk-itself", "#2"), ("", "#2")]
)
def test_a_key_that_was_written_as_itself_is_only_numbered(reference: str, label: str) -> None:
    assert label_of(reference, 2) == label
