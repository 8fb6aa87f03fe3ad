"""However attempts overlap and end, a place that cools has one probe at a time, and none before its time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingress.policy.cooldown import Cooldowns, Pass, Standing
from schemas.ids import RouteId

A = RouteId("a")
LONGEST_S = 8.0
ENDS = ("answered", "failed", "sure", "dropped")

steps = st.lists(
    st.one_of(
        st.just(("begin", 0)),
        st.tuples(st.sampled_from(ENDS), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.integers(1, 40)),
    ),
    max_size=120,
)


@given(steps)
def test_there_is_never_a_second_probe_nor_one_before_its_time(steps: list[tuple[str, int]]) -> None:
    cooldowns = Cooldowns(first_s=1, longest_s=LONGEST_S)
    now = 0.0
    running: list[Pass] = []
    probes: list[Pass] = []
    for what, number in steps:
        standing = cooldowns.standing(A, "m", now=now)
        if what == "wait":
            now += number / 10
        elif what == "begin":
            given = cooldowns.begin(A, "m", now=now)
            running.append(given)
            assert given.probe == (standing is Standing.DUE)
            if given.probe:
                assert not probes
                probes.append(given)
        elif running:
            given = running.pop(number % len(running))
            if what == "answered":
                cooldowns.answered(A, "m", given, now=now)
            elif what != "dropped":
                cooldowns.failed(A, "m", given, now=now, why="x", sure=what == "sure")
            cooldowns.dropped(A, "m", given)
            if given in probes:
                probes.remove(given)
                after = cooldowns.standing(A, "m", now=now)
                wanted = {"answered": {Standing.UP}, "dropped": {Standing.DUE, Standing.UP}}
                assert after in wanted.get(what, {Standing.COOLING, Standing.UP})
            elif what in ("answered", "dropped"):
                assert not (standing is Standing.UP and cooldowns.standing(A, "m", now=now) is not Standing.UP)
        if cooldowns.standing(A, "m", now=now) is Standing.UP:
            probes.clear()  # answered as a last resort: whoever probed is one of many again


@given(steps)
def test_it_is_open_again_by_itself(steps: list[tuple[str, int]]) -> None:
    """When nobody runs any more, the longest cool-down is all that can be waited for."""
    cooldowns = Cooldowns(first_s=1, longest_s=LONGEST_S)
    now = 0.0
    running: list[Pass] = []
    for what, number in steps:
        if what == "wait":
            now += number / 10
        elif what == "begin":
            running.append(cooldowns.begin(A, "m", now=now))
        elif running:
            given = running.pop(number % len(running))
            cooldowns.failed(A, "m", given, now=now, why="x", sure=True)
            cooldowns.dropped(A, "m", given)
    for given in running:
        cooldowns.dropped(A, "m", given)
    assert cooldowns.is_open(A, "m", now=now + LONGEST_S)
