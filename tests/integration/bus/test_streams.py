"""The streams and consumers as they must be, asked of the server itself."""

from __future__ import annotations

import asyncio

import pytest

from bus.connection import ApiError, BusUnavailable, Connection
from bus.publisher import Publisher
from bus.queue import JobQueue
from bus.server import EmbeddedServer
from bus.streams import PAGE_MAX_BYTES, ensure_consumer, ensure_streams, job_consumer, stream_state
from schemas import subjects
from schemas.errors import BacklogFull
from schemas.ids import OrgId
from schemas.jobs import Lane, Timeouts
from schemas.settings import NatsSettings
from tests.factories import make_event, new_job
from tests.restarts import restart
from tests.waiting import eventually

FORBIDDEN_DELETE, FORBIDDEN_PURGE = 10057, 10110
MESSAGE_TOO_LARGE = 10054


async def test_jobs_live_in_memory_and_facts_on_disk(connection: Connection) -> None:
    jobs, events, control = [await _config(connection, name) for name in ("JOBS", "EVENTS", "CONTROL")]
    assert (jobs["storage"], jobs["retention"], jobs["discard"]) == ("memory", "workqueue", "new")
    assert (events["storage"], events["retention"]) == ("file", "limits")
    assert (control["storage"], control["retention"], control["max_age"]) == ("file", "limits", 0)
    assert all(stream["max_bytes"] > 0 or stream["storage"] == "file" for stream in (jobs, events, control))


@pytest.mark.parametrize("stream", ["EVENTS", "CONTROL"])
async def test_no_fact_can_be_deleted_or_purged(stream: str, connection: Connection, publisher: Publisher) -> None:
    subject = {"EVENTS": "events.test", "CONTROL": "control.org.test"}[stream]
    seq = await publisher.publish(subject, b"{}", timeout_s=5.0)
    assert await _refusal(connection, f"STREAM.MSG.DELETE.{stream}", {"seq": seq}) == FORBIDDEN_DELETE
    assert await _refusal(connection, f"STREAM.PURGE.{stream}", {}) == FORBIDDEN_PURGE
    for permission in ("deny_delete", "deny_purge"):
        lax = {**await _config(connection, stream), permission: False}
        await _refusal(connection, f"STREAM.UPDATE.{stream}", lax)
    assert (await stream_state(connection, stream))["messages"] == 1


async def test_a_page_has_a_bound(publisher: Publisher) -> None:
    with pytest.raises(ApiError) as told:
        await publisher.publish("events.test", b"x" * (PAGE_MAX_BYTES + 1), timeout_s=5.0)
    assert told.value.error_code == MESSAGE_TOO_LARGE


async def test_making_them_again_changes_nothing(connection: Connection, publisher: Publisher) -> None:
    seq = await publisher.publish("jobs.m.r.interactive.o", b"{}", timeout_s=5.0)
    before = [await _config(connection, name) for name in ("JOBS", "EVENTS", "CONTROL")]
    await asyncio.gather(*(ensure_streams(connection, NatsSettings()) for _ in range(10)))
    assert [await _config(connection, name) for name in ("JOBS", "EVENTS", "CONTROL")] == before
    assert (await stream_state(connection, "JOBS"))["last_seq"] == seq


async def test_many_may_make_them_at_once(nats_server: EmbeddedServer, bare: Connection) -> None:
    await asyncio.gather(*(ensure_streams(bare, NatsSettings()) for _ in range(20)))
    assert sorted((await bare.api("STREAM.NAMES"))["streams"]) == ["CLAIMS", "CONTROL", "EVENTS", "JOBS"]


async def test_changed_settings_are_brought_to_streams_that_are_there(connection: Connection) -> None:
    await ensure_streams(connection, NatsSettings(backlog_per_org=3, events_max_age_s=3600))
    assert (await _config(connection, "JOBS"))["max_msgs_per_subject"] == 3
    assert (await _config(connection, "EVENTS"))["max_age"] == 3600 * 10**9
    await ensure_streams(connection, NatsSettings())
    assert (await _config(connection, "JOBS"))["max_msgs_per_subject"] == NatsSettings().backlog_per_org


async def test_each_org_has_a_backlog_of_its_own(connection: Connection, publisher: Publisher) -> None:
    await ensure_streams(connection, NatsSettings(backlog_per_org=2))
    queue = JobQueue(connection, publisher)
    for _ in range(2):
        await queue.publish(new_job(org=OrgId("busy")))
    with pytest.raises(BacklogFull):
        await queue.publish(new_job(org=OrgId("busy")))
    await queue.publish(new_job(org=OrgId("other")))


async def test_a_job_that_nobody_takes_leaves_after_its_time(connection: Connection, publisher: Publisher) -> None:
    queue = JobQueue(connection, publisher)
    await queue.publish(new_job(timeouts=Timeouts(queue_s=0.5)))  # a second is the least that the server knows
    await queue.publish(new_job())
    await eventually(lambda: _holds(connection, 1), timeout_s=3.0, what="the job's end")


async def test_a_restarted_server_begins_a_new_queue_and_keeps_the_facts(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher
) -> None:
    queue = JobQueue(connection, publisher)
    old = await queue.publish(new_job())
    page = await publisher.publish("events.test", b"{}", timeout_s=5.0)
    await restart(nats_server, connection)
    assert await _refusal(connection, "STREAM.INFO.JOBS", None) == 10059
    await ensure_streams(connection, NatsSettings())
    assert await _holds(connection, 0)
    assert (await stream_state(connection, "EVENTS"))["last_seq"] == page
    new = await queue.publish(new_job())
    assert new > old  # so that whoever still holds an old number can't mean a new job


async def test_a_stream_takes_more_consumers_than_the_servers_usual_thousand(connection: Connection) -> None:
    async def make(number: int) -> None:
        config = job_consumer(route="pool", lane=Lane.INTERACTIVE, model=f"model/{number}")
        await ensure_consumer(connection, "JOBS", config)

    for begin in range(0, 1100, 100):
        await asyncio.gather(*(make(number) for number in range(begin, begin + 100)))
    assert (await connection.api("STREAM.INFO.JOBS"))["state"]["consumer_count"] == 1100


async def test_consumers_of_different_routes_and_models_are_different_ones(connection: Connection) -> None:
    """On a work queue, two that overlap are refused; so this shows that none do."""
    named = [("a", None), ("b", "m"), ("b", "M"), ("b", "m.n"), ("b", "m/n"), ("b", "*"), ("b", ">"), ("a.b", "m")]
    for route, model in named:
        for lane in Lane:
            await ensure_consumer(connection, "JOBS", job_consumer(route=route, lane=lane, model=model))
    count = (await connection.api("STREAM.INFO.JOBS"))["state"]["consumer_count"]
    assert count == len(named) * len(Lane)


async def test_a_consumer_is_made_once_with_the_bounds_that_are_wanted(connection: Connection) -> None:
    for _ in range(2):
        answer = await ensure_consumer(connection, "JOBS", job_consumer(route="r", lane=Lane.INTERACTIVE))
    config = answer["config"]
    assert config["ack_wait"] == 5 * 10**9
    assert config["mem_storage"] is True
    assert (config["max_ack_pending"], config["max_waiting"]) == (20_000, 10_000)
    assert config["filter_subject"] == subjects.job_filter(route="r", lane=Lane.INTERACTIVE)
    assert (await connection.api("STREAM.INFO.JOBS"))["state"]["consumer_count"] == 1


async def test_publishing_where_no_stream_is_says_so_at_once(bare: Connection) -> None:
    publisher = Publisher(bare)
    await publisher.start()
    with pytest.raises(BusUnavailable, match="no stream answers"):
        await publisher.publish("events.test", make_event().id.encode(), timeout_s=30.0)
    await publisher.stop()


async def _config(connection: Connection, stream: str) -> dict[str, object]:
    config: dict[str, object] = (await connection.api(f"STREAM.INFO.{stream}"))["config"]
    return config


async def _holds(connection: Connection, jobs: int) -> bool:
    return bool((await stream_state(connection, "JOBS"))["messages"] == jobs)


async def _refusal(connection: Connection, verb: str, body: object) -> int | None:
    try:
        await connection.api(verb, body)
    except ApiError as error:
        return error.error_code
    return None
