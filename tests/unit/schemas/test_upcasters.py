"""Old events as today's, with toy steps: no real one is needed yet."""

from __future__ import annotations

import msgspec
import pytest

from schemas.codec import encode
from schemas.events import AttemptStarted
from schemas.upcasters import Mapped, Step, UnknownEvent, newest_version, read_event
from tests.unit.ledger import samples

KIND = "attempt.started"


def in_seconds_to_ms(members: Mapped) -> Mapped:
    """Version 1 had queue_s."""
    return {**members, "queue_ms": members.pop("queue_s") * 1000}


def in_ms_to_us(members: Mapped) -> Mapped:
    """Version 2 had queue_ms."""
    return {**members, "queue_us": members.pop("queue_ms") * 1000}


STEPS: dict[tuple[str, int], Step] = {(KIND, 1): in_seconds_to_ms, (KIND, 2): in_ms_to_us}


def line(version: int, **changes: object) -> bytes:
    members = msgspec.json.decode(encode(samples.started()))
    members.pop("queue_us")
    return msgspec.json.encode({**members, "v": version, **changes})


def test_a_kind_is_as_new_as_its_steps_reach() -> None:
    assert newest_version(KIND, STEPS) == 3
    assert newest_version("request.finished", STEPS) == 1


@pytest.mark.parametrize(
    ("version", "member"), [(1, {"queue_s": 2}), (2, {"queue_ms": 2000}), (3, {"queue_us": 2_000_000})]
)
def test_each_version_is_lifted_to_the_newest(version: int, member: dict[str, int]) -> None:
    event = read_event(line(version, **member), steps=STEPS)
    assert isinstance(event, AttemptStarted)
    assert (event.v, event.queue_us) == (3, 2_000_000)


def test_an_old_version_that_looks_like_the_newest_is_still_lifted() -> None:
    """A member that kept its name may have changed its meaning."""

    def doubled(members: Mapped) -> Mapped:
        return {**members, "queue_us": members["queue_us"] * 2}

    event = read_event(line(1, queue_us=5), steps={(KIND, 1): doubled})
    assert isinstance(event, AttemptStarted)
    assert (event.v, event.queue_us) == (2, 10)


def test_a_version_from_tomorrow_is_kept_as_it_is() -> None:
    event = read_event(line(4, queue_ns=7, other=[1]), steps=STEPS)
    assert isinstance(event, UnknownEvent)
    assert (event.kind, event.v, event.members["queue_ns"]) == (KIND, 4, 7)


def test_a_version_from_tomorrow_that_looks_like_todays_is_kept_as_it_is() -> None:
    assert isinstance(read_event(line(2, queue_us=5)), UnknownEvent)


def test_a_kind_from_tomorrow_is_kept_as_it_is() -> None:
    event = read_event(b'{"kind":"node.online","v":1,"reason":"idle"}')
    assert event == UnknownEvent(kind="node.online", v=1, members={"kind": "node.online", "v": 1, "reason": "idle"})


def test_an_event_without_a_version_is_of_the_first() -> None:
    members = msgspec.json.decode(encode(samples.started()))
    del members["v"]
    event = read_event(msgspec.json.encode(members))
    assert isinstance(event, AttemptStarted)
    assert event.v == 1


def test_steps_leave_what_they_were_given_alone() -> None:
    """Reading twice gives the same twice."""
    old = line(1, queue_s=2)
    assert read_event(old, steps=STEPS) == read_event(old, steps=STEPS)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"v":1}', b'{"kind":1}', b'{"kind":"attempt.started","v":1}'])
def test_what_is_no_event_is_an_error(broken: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        read_event(broken)


def test_a_step_that_leaves_a_hole_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        read_event(line(1, queue_s=1), steps={(KIND, 1): lambda members: members})
