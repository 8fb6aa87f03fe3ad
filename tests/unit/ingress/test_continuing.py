"""Who goes on with an answer that broke off: what may be, by whom, and what is billed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec import Raw

from ingress.continuing import (
    ASKED_MAX,
    BACK_WITHIN_S,
    DECLINED_MAX,
    DECLINED_S,
    MIGRATIONS_MAX,
    TOLD_WITHIN_S,
    Continuing,
)
from ingress.delivered import IDS_MAX, TEXT_MAX_BYTES, Delivered
from ingress.fleet import Load, Serving
from ingress.pace import LOOK_AGAIN_S, STALL_MIN_S, Pace
from ingress.policy.routing import Leg
from ingress.trip import Seen, Trip
from schemas.chat import decode_request
from schemas.errors import NotContinued, PenstockError, ProviderFailed, ProviderRejected, WorkerLost
from schemas.frames import Delta, Finished
from schemas.ids import RequestId, RouteId, WorkerId
from schemas.jobs import Continues, ModelFingerprint, ModelOffer
from schemas.money import Price, Usage
from schemas.settings import RoutingSettings

LEG = Leg(RouteId("r"), "m", Price(input=1, output=2))
HERE = ModelFingerprint(name="m", tokenizer="t", quantisation="fp16")
OTHER = ModelFingerprint(name="m", tokenizer="t", quantisation="int4")
W1, W2, W3, W4, W5 = (WorkerId(f"w{n}") for n in (1, 2, 3, 4, 5))


def delivered(*deltas: dict[str, Any], ids: bool = True, finish: str | None = None, **members: Any) -> Delivered:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True, **members}
    ).encode()
    made = Delivered(decode_request(body), body)
    for number, delta in enumerate(deltas):
        made.add(frame(delta, token_ids=(number,) if ids else (), prompt=(7, 8, 9)))
    if finish is not None:
        made.add(frame({}, finish=finish, tokens=0))
    return made


def frame(
    delta: dict[str, Any], *, token_ids: tuple[int, ...] = (), prompt: tuple[int, ...] = (), **changes: Any
) -> Delta:
    choice = {"index": 0, "delta": delta, "finish_reason": changes.get("finish")}
    return Delta(
        request_id=RequestId("r"),
        epoch=1,
        seq=0,
        chunks=(Raw(json.dumps({"choices": [choice]}).encode()),),
        tokens=changes.get("tokens", 1),
        token_ids=token_ids,
        prompt_token_ids=prompt,
    )


@dataclass
class Now:
    """As much of a fleet, and of a clock, as is asked."""

    workers: dict[WorkerId, tuple[RouteId, int, ModelOffer]]
    s: float = 0.0
    waits: bool = False
    born: dict[WorkerId, int] = field(default_factory=dict)

    def serving(self, model: str) -> list[Serving]:
        mine = [(w, found) for w, found in self.workers.items() if found[2].name == model]
        return [Serving(w, *found, self.waits, self.born.get(w, 1)) for w, found in mine]

    def born_ns(self, worker: WorkerId) -> int | None:
        return self.born.get(worker, 1) if worker in self.workers else None

    def offer(self, model: str, *, worker: WorkerId, route: RouteId) -> ModelOffer | None:
        found = self.workers.get(worker)
        return found[2] if found is not None and (found[0], found[2].name) == (route, model) else None

    def __call__(self) -> float:
        return self.s


def offer(
    continues: Continues = Continues.EXACT,
    fingerprint: ModelFingerprint | None = HERE,
    *,
    route: str = "r",
    free: int = 4,
) -> tuple[RouteId, int, ModelOffer]:
    return RouteId(route), free, ModelOffer(name="m", price=Price(), fingerprint=fingerprint, continues=continues)


def broken_off(now: Now, what: Delivered | None = None, *, legs: tuple[Leg, ...] = (LEG,)) -> Continuing:
    """W1 has begun, and is gone."""
    made = Continuing(what or delivered({"content": "a"}, {"content": "b"}), legs, fleet=now, clock=now)  # type: ignore[arg-type]
    made.begun(LEG, W1)
    made.failed(W1)
    return made


def test_the_same_model_goes_on_exactly_with_what_was_delivered() -> None:
    onward = broken_off(Now({W1: offer(), W2: offer()})).next(LEG, WorkerLost())
    assert onward is not None
    assert (onward.workers[0], onward.exact) == (W2, True)
    assert (onward.continuation.text, onward.continuation.tokens) == ("ab", 2)
    assert (onward.continuation.token_ids, onward.continuation.prompt_token_ids) == ((0, 1), (7, 8, 9))


def test_what_a_worker_is_may_become_known_while_its_answer_runs() -> None:
    """Right after NATS was away it begins before its presence has told."""
    now = Now({})
    continuing = Continuing(delivered({"content": "a"}), (LEG,), fleet=now, clock=now)  # type: ignore[arg-type]
    continuing.begun(LEG, W1)
    now.workers = {W1: offer(), W2: offer()}
    continuing.failed(W1)
    onward = continuing.next(LEG, WorkerLost())
    assert onward is not None
    assert (onward.workers[0], onward.exact) == (W2, True)


@pytest.mark.parametrize(
    ("there", "exact"),
    [
        (offer(), True),
        (offer(Continues.PREFIX), False),
        (offer(fingerprint=None), False),
        (offer(Continues.NO), None),
        (offer(fingerprint=OTHER), None),
        (offer(route="elsewhere"), None),
    ],
    ids=["same", "by its text", "unknown", "can't", "quantised", "not in the plan"],
)
def test_only_the_same_model_goes_on(there: tuple[RouteId, int, ModelOffer], exact: bool | None) -> None:
    onward = broken_off(Now({W1: offer(), W2: there})).next(LEG, WorkerLost())
    assert (None if onward is None else onward.exact) is exact
    if exact is False:
        assert onward is not None
        assert onward.continuation.token_ids == ()
        assert onward.continuation.text == "ab"


def test_exact_comes_before_prefix_and_a_free_slot_before_a_full_worker() -> None:
    now = Now({W1: offer(), W2: offer(Continues.PREFIX, free=9), W3: offer(free=0)})
    onward = broken_off(now).next(LEG, WorkerLost())
    assert onward is not None
    assert onward.workers[0] == W3
    now.workers = {W1: offer(), W2: offer(free=1), W3: offer(free=2)}
    onward = broken_off(now).next(LEG, WorkerLost())
    assert onward is not None
    assert onward.workers[0] == W3


def test_another_route_of_the_plan_goes_on_at_the_price_of_the_first() -> None:
    other = Leg(RouteId("dear"), "m", Price(input=100, output=200))
    onward = broken_off(Now({W1: offer(), W2: offer(route="dear")}), legs=(LEG, other)).next(LEG, WorkerLost())
    assert onward is not None
    assert (onward.leg.route, onward.leg.price) == (RouteId("dear"), LEG.price)


@pytest.mark.parametrize(
    "members",
    [
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -1},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "a"}},
        {"stream": False},
    ],
    ids=lambda members: next(iter(members)),
)
def test_what_must_not_be_continued(members: dict[str, Any]) -> None:
    what = delivered({"content": "a"}, **members)
    assert what.why_not() is not None
    continuing = broken_off(Now({W1: offer(), W2: offer()}), what)
    assert continuing.next(LEG, WorkerLost()) is None
    assert not continuing.may_wait(WorkerLost())
    assert not continuing.may_move(LEG, away_from=W1)


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f"}},
        {"refusal": "no"},
        {"audio": {"id": "x"}},
    ],
    ids=lambda delta: next(iter(delta)),
)
def test_what_is_more_than_text_is_not_continued(delta: dict[str, Any]) -> None:
    assert delivered({"content": "a"}, delta).why_not() is not None


def test_plain_text_with_its_usual_company_may_be_continued() -> None:
    deltas = ({"role": "assistant", "content": "", "refusal": None, "tool_calls": []}, {"content": "a"})
    form = {"type": "text"}
    assert delivered(*deltas, response_format=form, n=1, frequency_penalty=0, guided_json=None).why_not() is None


def test_what_is_kept_is_bounded() -> None:
    long = "x" * 1000
    what = delivered(*[{"content": long}] * (TEXT_MAX_BYTES // 1000 + 1))
    assert what.why_not() == "it is too long"
    assert what.continuation(exact=True).text == ""
    many = delivered({"content": "a"})
    many.add(frame({"content": "b"}, token_ids=tuple(range(IDS_MAX + 1)), tokens=IDS_MAX + 1))
    many.add(frame({"content": "c"}, token_ids=(1,)))
    assert many.why_not() is None
    assert not many.has_ids


def test_a_token_without_an_id_makes_all_of_them_useless() -> None:
    what = delivered({"content": "a"})
    what.add(frame({"content": "b"}))
    assert what.continuation(exact=True).token_ids == ()
    assert what.continuation(exact=True).tokens == 2


def test_a_delivered_finish_reason_is_the_end() -> None:
    assert delivered({"content": "a"}, finish="length").finish_reason == "length"


def test_it_moves_twice_at_most() -> None:
    continuing = broken_off(Now({W1: offer(), W2: offer()}))
    continuing.migrations = MIGRATIONS_MAX
    assert continuing.next(LEG, WorkerLost()) is None


def test_a_worker_that_declined_is_asked_again_a_little_later_but_not_for_ever() -> None:
    now = Now({W1: offer(), W2: offer()})
    continuing = broken_off(now)
    asked = 0
    while continuing.next(LEG, WorkerLost()) is not None:
        asked += 1
        continuing.declined(W2)
        assert continuing.next(LEG, WorkerLost()) is None
        now.s += DECLINED_S + 0.01
    assert asked == ASKED_MAX


def test_when_all_are_full_it_waits_at_all_of_them() -> None:
    elsewhere = offer(route="elsewhere", free=0)
    now = Now({W1: offer(), W2: offer(free=0), W3: offer(free=0), W4: elsewhere}, waits=True)
    continuing = broken_off(now, legs=(LEG, Leg(RouteId("elsewhere"), "m", LEG.price)))
    for _ in range(DECLINED_MAX):
        onward = continuing.next(LEG, WorkerLost())
        assert onward is not None
        assert not onward.waits
        continuing.declined(onward.workers[0])
    onward = continuing.next(LEG, WorkerLost())
    assert onward is not None
    assert (onward.waits, onward.workers, onward.leg.route) == (True, (W2, W3), LEG.route)
    now.workers[W5] = offer(free=0)
    assert continuing.standby(onward) == (W2, W3, W5)
    now.workers.clear()
    assert continuing.standby(onward) == ()


def test_a_worker_that_stands_still_is_not_left_for_one_that_is_full() -> None:
    now = Now({W1: offer(), W2: offer(free=0)}, waits=True)
    made = Continuing(delivered({"content": "a"}), (LEG,), fleet=now, clock=now)  # type: ignore[arg-type]
    made.begun(LEG, W1)
    assert not made.may_move(LEG, away_from=W1)
    now.workers[W2] = offer(free=1)
    assert made.may_move(LEG, away_from=W1)


def test_a_process_that_was_started_again_under_the_same_name_is_another_one() -> None:
    now = Now({W1: offer()})
    continuing = broken_off(now)
    assert continuing.next(LEG, WorkerLost()) is None
    now.born[W1] = 2
    onward = continuing.next(LEG, WorkerLost())
    assert onward is not None
    assert onward.workers == (W1,)


@pytest.mark.parametrize(("lives", "hope_s"), [(True, TOLD_WITHIN_S), (False, BACK_WITHIN_S)])
async def test_nobody_is_waited_for_longer_than_somebody_may_come(lives: bool, hope_s: float) -> None:
    """A worker that lives and has failed will not do better; one that is gone may be started again."""
    now = Now({W1: offer()})
    continuing = broken_off(now)
    if not lives:
        del now.workers[W1]
    waiting = asyncio.create_task(continuing.await_next(LEG, WorkerLost(), since=0.0, gone=lambda: False))
    now.s = hope_s - 0.01
    await asyncio.sleep(0.15)
    assert not waiting.done()
    now.s = hope_s + 0.01
    assert await waiting is None


def test_a_rejection_is_the_answer_and_a_failure_of_the_place_is_not() -> None:
    continuing = broken_off(Now({W1: offer(), W2: offer()}))
    assert continuing.next(LEG, ProviderRejected()) is None
    assert continuing.next(LEG, ProviderFailed()) is not None


@pytest.mark.parametrize(("error", "cools"), [(ProviderFailed(), True), (NotContinued(), False)])
def test_a_place_that_cannot_go_on_with_anothers_answer_is_not_a_bad_place(error: PenstockError, cools: bool) -> None:
    now = Now({})
    seen = Seen(RoutingSettings(), lambda _: Load(), clock=now)
    for _ in range(10):
        trip = Trip(seen, LEG, stream=True)
        trip.failed(error)
        trip.ended(0)
    assert seen.cooldowns.is_open(LEG.route, LEG.model, now=now()) is not cools


async def test_somebody_who_comes_is_waited_for() -> None:
    now = Now({W1: offer()})
    continuing = broken_off(now)
    del now.workers[W1]
    waiting = asyncio.create_task(continuing.await_next(LEG, WorkerLost(), since=0.0, gone=lambda: False))
    await asyncio.sleep(0)
    now.workers[W2] = offer()
    onward = await waiting
    assert onward is not None
    assert onward.workers[0] == W2


async def test_nobody_is_waited_for_who_could_not_go_on_anyway() -> None:
    now = Now({W1: offer(Continues.NO)})
    assert await broken_off(now).await_next(LEG, WorkerLost(), since=0.0, gone=lambda: False) is None


def test_the_bill_is_the_first_prompt_and_all_that_was_delivered() -> None:
    continuing = broken_off(Now({W1: offer(), W2: offer(), W3: offer(Continues.PREFIX)}))
    last = Finished(request_id=RequestId("r"), epoch=2, seq=9, usage=Usage(prompt_tokens=5, completion_tokens=4))
    exact = continuing.next(LEG, WorkerLost())
    assert exact is not None
    whole = continuing.whole(last, exact, tokens=3)  # the engine generated one of its four anew
    assert whole.usage == Usage(prompt_tokens=3, completion_tokens=5)
    assert json.loads(bytes(whole.usage_raw))["total_tokens"] == 8


def test_a_stream_stalls_by_its_own_rhythm() -> None:
    slow, quick, new = Pace(), Pace(), Pace()
    for n in range(11):
        slow.heard(n * 0.5)
        quick.heard(n * 0.01)
    assert not new.is_stalled(99.0)
    assert not quick.is_stalled(0.1 + STALL_MIN_S - 0.01)
    assert quick.is_stalled(0.1 + STALL_MIN_S)
    assert not slow.is_stalled(5.0 + STALL_MIN_S)
    assert slow.look_at == pytest.approx(5.0 + 20 * 0.5)
    assert not slow.is_stalled(14.9)
    assert slow.is_stalled(15.0)
    assert slow.look_at >= 15.0 + LOOK_AGAIN_S
