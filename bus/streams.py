"""What each stream and consumer must look like; makes it so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from bus.connection import ApiError, BusUnavailable, Connection
from schemas import subjects
from schemas.jobs import Lane
from schemas.settings import NatsSettings

log = structlog.get_logger()

SECOND_NS = 1_000_000_000
STREAM_EXISTS = 10058  # "stream name already in use with a different configuration"
STREAM_NOT_FOUND = 10059
CONSUMERS_MAX = 20_000  # 2.15's default of 1000 would end at model 1001
JOBS_MAX_AGE_S = 3600
JOBS_DUPLICATES_S = 10  # longer than a publish is tried; each id costs the server memory for so long
EVENTS_DUPLICATES_S = 600  # longer than the log tries a page again without looking
PAGE_MAX_BYTES = 512 * 1024  # with its headers
CLAIMS_MAX = 50_000
CLAIM_MAX_BYTES = 1024
ACK_WAIT_S = 5  # from the pull to Started
CONSUMER_IDLE_S = 600
UNAVAILABLE_STATUS = 503
LEADERS_WAIT_S = 60.0  # a new cluster elects a leader for itself and for each stream, in 4 to 9 s if a vote is split
LEADERS_RETRY_S = 0.25


async def ensure_streams(connection: Connection, settings: NatsSettings) -> None:
    """Makes the streams, or brings them to these settings. Safe to call at any time, by any number of processes.

    Raises: ApiError, BusUnavailable.
    """
    jobs = jobs_stream(settings)
    await _begin_jobs(connection, jobs)
    for config in (jobs, events_stream(settings), control_stream(settings), claims_stream(settings)):
        await _ensure_stream(connection, config)


async def await_streams(connection: Connection, settings: NatsSettings) -> None:
    """`ensure_streams` for a process that starts: returns only when each stream answers, too.

    Raises: as `until_it_answers`.
    """

    async def ensure() -> None:
        await ensure_streams(connection, settings)
        for stream in (subjects.JOBS, subjects.EVENTS, subjects.CONTROL, subjects.CLAIMS):
            await stream_state(connection, stream)  # only its leader answers

    await until_it_answers(ensure)


async def until_it_answers(ask: Callable[[], Awaitable[None]]) -> None:
    """Calls *ask* until JetStream can answer it. In a cluster that has just started that takes an election or two.

    Raises: ApiError, BusUnavailable when `LEADERS_WAIT_S` is over, or at once if JetStream refuses.
    """
    until = asyncio.get_running_loop().time() + LEADERS_WAIT_S
    while True:
        try:
            await ask()
        except (ApiError, BusUnavailable) as error:
            refused = isinstance(error, ApiError) and error.status != UNAVAILABLE_STATUS
            if refused or asyncio.get_running_loop().time() > until:
                raise
            log.info("streams_awaited", reason=error.message)
            await asyncio.sleep(LEADERS_RETRY_S)
        else:
            return


def jobs_stream(settings: NatsSettings) -> dict[str, Any]:
    """Memory: a job is worth nothing once its client's connection is gone. Each org has its own bound on what waits."""
    return {
        "name": subjects.JOBS,
        "subjects": [subjects.ALL_JOBS],
        "storage": "memory",
        "retention": "workqueue",
        "discard": "new",
        "discard_new_per_subject": True,
        "max_msgs_per_subject": settings.backlog_per_org,
        "max_bytes": settings.jobs_max_bytes,
        "max_age": JOBS_MAX_AGE_S * SECOND_NS,
        "max_consumers": CONSUMERS_MAX,
        "allow_msg_ttl": True,
        "duplicate_window": JOBS_DUPLICATES_S * SECOND_NS,
        "num_replicas": settings.replicas,
    }


def events_stream(settings: NatsSettings) -> dict[str, Any]:
    return {
        "name": subjects.EVENTS,
        "subjects": [subjects.ALL_EVENTS],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "deny_delete": True,
        "deny_purge": True,
        "max_age": settings.events_max_age_s * SECOND_NS,
        "max_msg_size": PAGE_MAX_BYTES,
        "duplicate_window": EVENTS_DUPLICATES_S * SECOND_NS,
        "compression": "s2",
        "allow_direct": True,
        "num_replicas": settings.replicas,
    }


def control_stream(settings: NatsSettings) -> dict[str, Any]:
    return {
        "name": subjects.CONTROL,
        "subjects": [subjects.ALL_CONTROL],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "deny_delete": True,
        "deny_purge": True,
        "allow_direct": True,
        "num_replicas": settings.replicas,
    }


def claims_stream(settings: NatsSettings) -> dict[str, Any]:
    """Memory: a claim points to what an ingress has in its memory. When it is full the oldest are forgotten."""
    return {
        "name": subjects.CLAIMS,
        "subjects": [subjects.ALL_CLAIMS],
        "storage": "memory",
        "retention": "limits",
        "discard": "old",
        "max_msgs_per_subject": 1,
        "max_msgs": CLAIMS_MAX,  # no max_bytes: the server would set these aside, and a smaller one has not so many
        "max_msg_size": CLAIM_MAX_BYTES,
        "allow_msg_ttl": True,
        "num_replicas": settings.replicas,
    }


def job_consumer(*, route: str, lane: Lane, model: str | None = None) -> dict[str, Any]:
    """A durable pull consumer with memory state, reaped when nobody has pulled for a while."""
    return {
        "durable_name": subjects.job_consumer(route=route, lane=lane, model=model),
        "filter_subject": subjects.job_filter(route=route, lane=lane, model=model),
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT_S * SECOND_NS,
        "max_ack_pending": 20_000,
        "max_waiting": 10_000,
        "mem_storage": True,
        "inactive_threshold": CONSUMER_IDLE_S * SECOND_NS,
    }


async def ensure_consumer(connection: Connection, stream: str, config: dict[str, Any]) -> dict[str, Any]:
    """Makes the consumer if there is none, and returns what the server says of it."""
    name = config.get("durable_name") or config["name"]
    return await connection.api(f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config})


async def stream_state(connection: Connection, stream: str) -> dict[str, Any]:
    """``first_seq``, ``last_seq``, ``messages``, … of a stream."""
    answer = await connection.api(f"STREAM.INFO.{stream}")
    state: dict[str, Any] = answer["state"]
    return state


async def _ensure_stream(connection: Connection, config: dict[str, Any]) -> None:
    try:
        await connection.api(f"STREAM.CREATE.{config['name']}", config)
    except ApiError as error:
        if error.error_code != STREAM_EXISTS:
            raise
        await connection.api(f"STREAM.UPDATE.{config['name']}", config)


async def _begin_jobs(connection: Connection, config: dict[str, Any]) -> None:
    """Makes JOBS if it isn't there, with numbers that no earlier JOBS has used: the clock's microseconds.

    It lives in memory, so a restarted server begins anew. Were it to begin with 1, whoever withdraws an old job by its number
    would take out a new one.
    """
    try:
        await connection.api(f"STREAM.INFO.{config['name']}")
    except ApiError as error:
        if error.error_code != STREAM_NOT_FOUND:
            raise
        with contextlib.suppress(ApiError):  # somebody else has just made it, or what is wrong is said by the next call
            first = {**config, "first_seq": time.time_ns() // 1000}
            await connection.api(f"STREAM.CREATE.{config['name']}", first)
