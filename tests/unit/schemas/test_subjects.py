from __future__ import annotations

import pytest

from schemas import subjects
from schemas.ids import IngressId, Nonce, WorkerId
from schemas.jobs import Lane


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("echo", "echo"),
        ("gpt-4o_mini", "gpt-4o_mini"),
        ("meta-llama/Llama-3.1-8B", "meta-llama=2fLlama-3=2e1-8B"),
        ("a.b*c>d e", "a=2eb=2ac=3ed=20e"),
        ("a=b", "a=3db"),
        ("é", "=c3=a9"),
        ("ft:gpt:acme::7", "ft=3agpt=3aacme=3a=3a7"),
    ],
)
def test_a_name_becomes_one_token_and_comes_back(text: str, encoded: str) -> None:
    assert subjects.token(text) == encoded
    assert subjects.text_of(encoded) == text


@pytest.mark.parametrize("text", ["", "x" * 201, "." * 67])
def test_a_name_that_is_empty_or_too_long_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 200 characters"):
        subjects.token(text)


@pytest.mark.parametrize("text", ["x" * 200, "." * 66])
def test_a_name_as_long_as_a_token_may_be_is_taken(text: str) -> None:
    assert subjects.text_of(subjects.token(text)) == text


@pytest.mark.parametrize("encoded", ["", "a.b", "a b", "*", "=2", "=2E", "=zz", "a=", "=61", "=c3", "=ff", "a\n"])
def test_what_token_does_not_make_is_refused(encoded: str) -> None:
    """Also ``=61``, which would be a second spelling of ``a``."""
    with pytest.raises(ValueError, match=r".+"):
        subjects.text_of(encoded)


def test_a_job_subject_names_model_route_lane_and_org() -> None:
    subject = subjects.job(model="m/1", route="open.ai", lane=Lane.BATCH, org="acme")
    assert subject == "jobs.m=2f1.open=2eai.batch.acme"


def test_streams_have_the_names_that_operators_see() -> None:
    assert (subjects.JOBS, subjects.EVENTS, subjects.CONTROL) == ("JOBS", "EVENTS", "CONTROL")
    assert subjects.job_consumer(route="r", lane=Lane.BATCH, model="m.1") == "route==r==batch==m=2e1"
    assert subjects.job_consumer(route="r", lane=Lane.INTERACTIVE) == "route==r==interactive"


def test_a_job_filter_takes_every_org_and_every_model_unless_one_is_named() -> None:
    assert subjects.job_filter(route="r", lane=Lane.INTERACTIVE) == "jobs.*.r.interactive.*"
    assert subjects.job_filter(route="r", lane=Lane.BATCH, model="m.1") == "jobs.m=2e1.r.batch.*"


def test_consumers_of_different_work_have_different_names() -> None:
    """Even when a route is called like another consumer's lane and model."""
    one = subjects.job_consumer(route="a", lane=Lane.INTERACTIVE, model="b-batch")
    another = subjects.job_consumer(route="a-interactive-b", lane=Lane.BATCH)
    assert one != another


def test_events_and_control_subjects_come_back_as_names() -> None:
    assert subjects.events("ingress-1") == "events.ingress-1"
    assert subjects.producer_of(subjects.events("a.b")) == "a.b"
    assert subjects.control("key", "k.1") == "control.key.k=2e1"


def test_frames_are_addressed_by_worker_ingress_and_nonce() -> None:
    subject = subjects.frames(WorkerId("worker-1"), IngressId("ingress-1"), Nonce("0f"))
    assert subject == "w.worker-1.ingress-1.0f"
    assert subjects.frame_address(subject) == ("worker-1", "0f")
    assert subjects.frames_filter(IngressId("ingress-1")) == "w.*.ingress-1.*"


@pytest.mark.parametrize("subject", ["w.a.b", "w.a.b.c.d", ""])
def test_a_subject_that_is_not_a_frames_is_refused(subject: str) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        subjects.frame_address(subject)


def test_a_worker_has_its_own_subjects_for_commands_and_presence() -> None:
    assert subjects.ctl(WorkerId("worker-1")) == "ctl.worker-1"
    assert subjects.presence(WorkerId("worker-1")) == "presence.worker-1"
    assert subjects.EVERY_WORKER.split(".")[0] == "ctl"
