"""When a place is left alone, and how it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from ingress.policy.cooldown import (
    FAULTS_IN_A_ROW,
    FORGET_S,
    PLACES_MAX,
    PROBE_MAX_S,
    TRUSTED_S,
    WAIT_MAX_S,
    Cooldowns,
    Pass,
    Standing,
)
from schemas.ids import RouteId

A = RouteId("a")


class Place:
    """One of them, and a clock that the test turns."""

    def __init__(self) -> None:
        self.cooldowns = Cooldowns(first_s=1, longest_s=8)
        self.now = 100.0

    @property
    def standing(self) -> Standing:
        return self.cooldowns.standing(A, "m", now=self.now)

    @property
    def why(self) -> str:
        return self.cooldowns.why(A, "m", now=self.now)

    def begin(self) -> Pass:
        return self.cooldowns.begin(A, "m", now=self.now)

    def answered(self, given: Pass | None = None) -> None:
        self.cooldowns.answered(A, "m", given or self.begin(), now=self.now)

    def failed(self, given: Pass | None = None, **changes: Any) -> None:
        told = {"why": "upstream_error", "sure": False, **changes}
        self.cooldowns.failed(A, "m", given or self.begin(), now=self.now, **told)

    def cools_for(self) -> float:
        """How long from now, to an eighth of a second; the clock then stands at its end."""
        began = self.now
        while self.standing is Standing.COOLING:
            self.now += 0.125
        return self.now - began


@pytest.fixture
def place() -> Place:
    return Place()


def test_a_place_is_up_until_it_fails(place: Place) -> None:
    assert place.standing is Standing.UP
    place.answered()
    assert place.standing is Standing.UP
    assert place.why == ""


def test_one_fault_of_a_place_that_has_not_answered_lately_is_enough(place: Place) -> None:
    place.failed()
    assert place.standing is Standing.COOLING
    assert place.why == "cooling for 1.0 s more after upstream_error"


def test_a_place_that_has_just_answered_is_judged_by_three_in_a_row(place: Place) -> None:
    for _ in range(5):
        place.answered()
        place.cooldowns.went_well(A, "m")
        for _ in range(FAULTS_IN_A_ROW - 1):
            place.failed()
        assert place.standing is Standing.UP
    place.failed()
    assert place.standing is Standing.COOLING


def test_a_place_that_always_breaks_in_the_middle_is_found_out(place: Place) -> None:
    for _ in range(FAULTS_IN_A_ROW):
        assert place.standing is Standing.UP
        given = place.begin()
        place.answered(given)
        place.failed(given)
    assert place.standing is Standing.COOLING


def test_trust_ends(place: Place) -> None:
    place.answered()
    place.now += TRUSTED_S
    place.failed()
    assert place.standing is Standing.COOLING


def test_a_fault_that_will_repeat_is_enough(place: Place) -> None:
    place.answered()
    place.failed(sure=True)
    assert place.standing is Standing.COOLING


def test_one_probe_goes_when_its_time_is_over_and_brings_it_back(place: Place) -> None:
    place.failed()
    place.now += 1
    assert place.standing is Standing.DUE
    assert place.why == "due for a probe after upstream_error"
    probe = place.begin()
    assert probe.probe
    assert place.standing is Standing.PROBING
    assert place.why == "being probed after upstream_error"
    assert not place.begin().probe
    place.answered(probe)
    assert place.standing is Standing.UP


def test_each_probe_that_fails_doubles_the_time_up_to_the_longest(place: Place) -> None:
    place.failed()
    found = []
    for _ in range(6):
        found.append(place.cools_for())
        place.failed()
    assert found == [1, 2, 4, 8, 8, 8]


def test_a_place_that_comes_back_and_fails_again_is_not_at_the_beginning(place: Place) -> None:
    place.failed()
    assert place.cools_for() == 1
    place.answered()
    place.now += 1
    place.failed()
    assert place.cools_for() == 2


def test_after_a_time_of_peace_it_is(place: Place) -> None:
    for _ in range(3):
        place.failed()
        place.cools_for()
    place.answered()
    place.now += FORGET_S + 1
    place.failed()
    assert place.cools_for() == 1


def test_the_provider_says_how_long(place: Place) -> None:
    place.failed(wait_s=30)
    assert place.cools_for() == 30
    place.failed(wait_s=0.5)
    assert place.cools_for() == 2
    place.failed(wait_s=1e9)
    assert place.cools_for() == WAIT_MAX_S


def test_attempts_from_before_say_nothing(place: Place) -> None:
    before = [place.begin() for _ in range(3)]
    place.now += 0.125
    place.failed(before[0])
    place.now += 0.125
    place.failed(before[1], wait_s=30)
    place.answered(before[2])
    assert place.standing is Standing.COOLING
    assert place.cools_for() == 0.875
    place.answered()
    assert place.standing is Standing.UP
    for given in before:
        place.failed(given, sure=True)
    assert place.standing is Standing.UP


def test_who_goes_there_as_a_last_resort_and_is_answered_brings_it_back(place: Place) -> None:
    place.failed()
    place.now += 0.125
    given = place.begin()
    assert not given.probe
    place.answered(given)
    assert place.standing is Standing.UP


def test_who_goes_there_as_a_last_resort_and_fails_does_not_prolong_it(place: Place) -> None:
    place.failed()
    place.now += 0.5
    place.failed()
    assert place.cools_for() == 0.5


def test_a_probe_that_says_nothing_leaves_its_turn_to_the_next(place: Place) -> None:
    place.failed()
    place.now += 1
    place.cooldowns.dropped(A, "m", place.begin())
    assert place.standing is Standing.DUE
    assert place.begin().probe


def test_a_probe_that_never_ends_is_given_up(place: Place) -> None:
    place.failed()
    place.now += 1
    lost = place.begin()
    place.now += PROBE_MAX_S
    assert place.standing is Standing.DUE
    second = place.begin()
    assert second.probe
    place.failed(lost)
    place.cooldowns.dropped(A, "m", lost)
    assert place.standing is Standing.PROBING
    place.answered(second)
    assert place.standing is Standing.UP


def test_a_model_of_a_route_cools_alone(place: Place) -> None:
    place.failed()
    assert place.cooldowns.standing(A, "other", now=place.now) is Standing.UP
    assert place.cooldowns.is_open(A, "other", now=place.now)
    assert not place.cooldowns.is_open(A, "m", now=place.now)


def test_the_places_that_are_remembered_are_bounded(place: Place) -> None:
    place.failed()
    for i in range(PLACES_MAX):
        place.cooldowns.answered(RouteId(str(i)), "m", Pass(0, probe=False), now=place.now)
    assert len(place.cooldowns._places) == PLACES_MAX
    assert place.standing is Standing.UP
