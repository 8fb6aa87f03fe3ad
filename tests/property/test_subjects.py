from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import subjects
from schemas.ids import IngressId, Nonce, WorkerId
from schemas.jobs import Lane
from tests.property.strategies import lanes, names, tokens

SAFE = re.compile(r"[A-Za-z0-9_=-]+")


@given(names)
def test_every_name_comes_back_from_its_token(name: str) -> None:
    assert subjects.text_of(subjects.token(name)) == name


@given(names)
def test_every_token_is_safe_in_subjects_and_consumer_names(name: str) -> None:
    token = subjects.token(name)
    assert SAFE.fullmatch(token)
    assert len(token) <= subjects.TOKEN_MAX_CHARS
    assert "==" not in token
    assert not token.endswith("=")


@given(tokens)
def test_a_name_that_is_safe_already_stays_readable(name: str) -> None:
    assert subjects.token(name) == name


@given(st.text("=0123456789abcdefgA-.é", max_size=8))
def test_whatever_text_of_accepts_is_exactly_what_token_makes(encoded: str) -> None:
    """So that a name has one spelling only, and two subjects never mean the same."""
    try:
        name = subjects.text_of(encoded)
    except ValueError:
        return
    assert subjects.token(name) == encoded


@given(model=names, route=names, lane=lanes, org=names)
def test_a_job_subject_has_five_tokens_that_come_back(model: str, route: str, lane: Lane, org: str) -> None:
    prefix, model_token, route_token, lane_token, org_token = subjects.job(
        model=model, route=route, lane=lane, org=org
    ).split(".")
    found = (prefix, subjects.text_of(model_token), subjects.text_of(route_token), Lane(lane_token))
    assert (*found, subjects.text_of(org_token)) == ("jobs", model, route, lane, org)


@given(model=names, route=names, lane=lanes, org=names, other=names)
def test_a_job_is_taken_by_its_own_filters_alone(model: str, route: str, lane: Lane, org: str, other: str) -> None:
    subject = subjects.job(model=model, route=route, lane=lane, org=org)
    assert matches(subjects.job_filter(route=route, lane=lane), subject)
    assert matches(subjects.job_filter(route=route, lane=lane, model=model), subject)
    assert matches(subjects.job_filter(route=route, lane=lane, model=other), subject) == (other == model)
    assert matches(subjects.job_filter(route=other, lane=lane), subject) == (other == route)


work = st.tuples(names, lanes, st.none() | names)


@given(work, work)
def test_different_work_has_different_consumers(
    one: tuple[str, Lane, str | None], other: tuple[str, Lane, str | None]
) -> None:
    consumers = [subjects.job_consumer(route=route, lane=lane, model=model) for route, lane, model in (one, other)]
    assert (consumers[0] == consumers[1]) == (one == other)
    assert all(SAFE.fullmatch(consumer) for consumer in consumers)


@given(names, names)
def test_producers_and_control_entities_come_back(name: str, id_: str) -> None:
    assert subjects.producer_of(subjects.events(name)) == name
    assert [subjects.text_of(token) for token in subjects.control(name, id_).split(".")[1:]] == [name, id_]


@given(worker=tokens, ingress=tokens, nonce=tokens)
def test_a_frames_address_comes_back_and_reaches_its_ingress_alone(worker: str, ingress: str, nonce: str) -> None:
    subject = subjects.frames(WorkerId(worker), IngressId(ingress), Nonce(nonce))
    assert subjects.frame_address(subject) == (worker, nonce)
    assert matches(subjects.frames_filter(IngressId(ingress)), subject)
    assert not matches(subjects.frames_filter(IngressId(ingress + "x")), subject)


@pytest.mark.parametrize(
    ("everything", "subject"),
    [
        (subjects.ALL_JOBS, subjects.job(model="m", route="r", lane=Lane.BATCH, org="o")),
        (subjects.ALL_EVENTS, subjects.events("p")),
        (subjects.ALL_CONTROL, subjects.control("key", "k")),
        (subjects.ALL_PRESENCE, subjects.presence(WorkerId("w"))),
    ],
)
def test_the_subjects_of_a_stream_take_what_is_published_to_it(everything: str, subject: str) -> None:
    assert matches(everything, subject)


def matches(filter_: str, subject: str) -> bool:
    """As NATS matches: ``*`` is one token, ``>`` is one or more at the end."""
    pattern = [{"*": r"[^.]+", ">": r".+"}.get(part, re.escape(part)) for part in filter_.split(".")]
    return re.fullmatch(r"\.".join(pattern), subject) is not None
