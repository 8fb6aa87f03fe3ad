"""Workers that are asked to go on with an answer, and may not have heard it."""

from __future__ import annotations

import time

import pytest

from ingress.attempt import TAKE_AGAIN_S, TAKE_WAIT_S, TAKES_MAX, Attempt
from ingress.policy.drain import Drain
from ingress.policy.routing import Leg
from ingress.relay import Switchboard
from schemas.errors import QueueTimeout
from schemas.frames import Started
from schemas.ids import RouteId, WorkerId, new_nonce
from schemas.jobs import Job, Take
from schemas.money import Price
from tests.factories import new_job
from tests.unit.ingress.doubles import BIG, INGRESS, Queue, Wall, turns

LEG = Leg(RouteId("r"), "m", Price())
A, B = WorkerId("worker-a"), WorkerId("worker-b")


class Trip:
    leg = LEG


def asking(wall: Wall, *to: WorkerId, for_s: float | None = None) -> Attempt:
    job = new_job(nonce=new_nonce())
    return Attempt(
        job,
        Trip(),  # type: ignore[arg-type]
        queue=Queue(),  # type: ignore[arg-type]
        switchboard=Switchboard(wall, ingress=INGRESS, max_bytes_per_relay=BIG),  # type: ignore[arg-type]
        drain=Drain(),
        on_overflow=lambda: None,
        to=to,
        until=None if for_s is None else time.monotonic() + for_s,
    )


async def heard(wall: Wall) -> list[str]:
    """Who was told to begin, each time."""
    await turns()
    return [subject.removeprefix("ctl.") for subject, command in wall.commands if isinstance(command, Take)]


async def test_who_says_nothing_is_asked_again_later_and_later_and_not_for_ever() -> None:
    wall = Wall()
    attempt = asking(wall, A, B, for_s=600.0)
    await attempt.publish()
    asked_at = time.monotonic()
    assert attempt.poll(asked_at) == []
    assert await heard(wall) == [A, B]
    for later_s in range(500):
        attempt.poll(asked_at + later_s)
    assert sorted(await heard(wall)) == [A] * TAKES_MAX + [B] * TAKES_MAX
    assert attempt.look_at > asked_at + 500.0


async def test_who_has_begun_is_not_asked_again() -> None:
    wall = Wall()
    attempt = asking(wall, A, B, for_s=600.0)
    await attempt.publish()
    attempt.relay.feed(_started(attempt.job), 1, worker=A)
    attempt.poll(time.monotonic())
    attempt.note_started(at=time.monotonic())
    for _ in range(3):
        attempt.poll(time.monotonic() + TAKE_AGAIN_S)
    assert await heard(wall) == [A, B]


async def test_when_our_own_connection_is_back_all_are_asked_at_once() -> None:
    """Nothing that was said before is known to have arrived. While it is away, nobody is taken for silent."""
    wall = Wall()
    attempt = asking(wall, A)
    await attempt.publish()
    wall.is_up = False
    for _ in range(10):
        attempt.poll(attempt.deadline)
    wall.is_up = True
    told = len(await heard(wall))
    attempt.relay.ask_again()
    assert len(await heard(wall)) == told + 1
    assert attempt.deadline > time.monotonic() + TAKE_WAIT_S / 2
    with pytest.raises(QueueTimeout):
        attempt.poll(attempt.deadline)


def _started(job: Job) -> Started:
    return Started(request_id=job.request_id, epoch=job.epoch, seq=0, worker=A)
