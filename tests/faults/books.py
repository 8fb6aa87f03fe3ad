"""What the ledger tells of the requests of one round, asked through POST /v1/sql as an analyst would."""

from __future__ import annotations

from typing import Any

from tests.faults.deployment import Deployment
from tests.faults.verdict import Entry, pico

POSITION = "SELECT coalesce(max(position), 0) AS position FROM events WHERE log = 'EVENTS'"
ENTRIES = """
WITH touched AS (
    SELECT DISTINCT request_id FROM events
    WHERE log = 'EVENTS' AND position > ? AND kind IN ('request.accepted', 'request.finished', 'request.rejected')
),
said AS (
    SELECT
        request_id,
        min(producer) FILTER (kind = 'request.accepted') AS ingress,
        count(*) FILTER (kind = 'attempt.finished' AND payload->>'$.worker' = coalesce(named, payload->>'$.worker')) AS receipts,
        coalesce(list_contains(
            list(epoch) FILTER (kind = 'attempt.finished' AND position < ended_at),
            max(epoch) FILTER (kind = 'request.finished')
        ), false) AS counted,
        count(*) FILTER (kind = 'stream.migrated' AND payload->>'$.how' = 'prefix') AS behind_text,
        coalesce(bool_and((payload->>'$.announced')::BOOLEAN) FILTER (kind = 'request.accepted'), false) AS announced,
        count(*) FILTER (kind = 'request.accepted') AS accepted_events,
        count(*) FILTER (kind IN ('request.finished', 'request.rejected')) AS ended_events,
        coalesce(sum((payload->>'$.cost_pico')::BIGINT) FILTER (kind = 'request.finished'), 0)::BIGINT AS event_cost_pico
    FROM (
        SELECT
            *,
            min(position) FILTER (kind = 'request.finished') OVER (PARTITION BY request_id) AS ended_at,
            max(payload->>'$.worker') FILTER (kind = 'request.finished') OVER (PARTITION BY request_id) AS named
        FROM events WHERE log = 'EVENTS' AND request_id IN (SELECT request_id FROM touched)
    )
    GROUP BY request_id
)
SELECT
    s.request_id::VARCHAR AS request_id, r.status, r.code, r.http_status, r.prompt_hash, r.estimated, r.attempts, r.migrations,
    r.prompt_tokens, r.completion_tokens, r.cached_tokens, r.cost_usd::VARCHAR AS cost_usd,
    s.ingress, s.receipts, s.counted, s.behind_text, s.announced, s.accepted_events, s.ended_events, s.event_cost_pico
FROM said AS s LEFT JOIN requests AS r ON r.request_id = s.request_id
"""
RECEIPTS = """
SELECT payload->>'$.upstream_id' AS name, request_id::VARCHAR || '.' || (payload->>'$.epoch') AS asked_as FROM events
WHERE log = 'EVENTS' AND position > ? AND kind = 'attempt.finished'
"""
LIFE = """
SELECT position, ts::VARCHAR AS ts, payload::VARCHAR AS payload FROM events
WHERE log = 'EVENTS' AND request_id = ?::UUID ORDER BY position
"""


async def position(up: Deployment) -> int:
    """How far the log has come. Raises: SetupError if there is no answer."""
    (row,) = await up.sql(POSITION)
    return int(row["position"])


async def entries(up: Deployment, *, after: int) -> list[Entry]:
    """The requests that began or ended behind position *after*. Raises: SetupError."""
    return [_entry(row) for row in await up.sql(ENTRIES, after)]


async def receipts(up: Deployment, *, after: int) -> frozenset[str]:
    """The generations of which workers wrote receipts, as their provider calls them, and as their workers do. Raises: SetupError."""
    return frozenset(name for row in await up.sql(RECEIPTS, after) for name in row.values() if name is not None)


async def life(up: Deployment, request_id: str) -> list[str]:
    """The events of one request, for people. Raises: SetupError."""
    return [f"{row['position']} {row['ts']} {row['payload']}" for row in await up.sql(LIFE, request_id)]


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(
        request_id=row["request_id"],
        status=row["status"] or "nowhere",
        code=row["code"],
        http_status=row["http_status"],
        prompt_hash=row["prompt_hash"],
        prompt_tokens=row["prompt_tokens"] or 0,
        completion_tokens=row["completion_tokens"] or 0,
        cached_tokens=row["cached_tokens"] or 0,
        cost_pico=pico(row["cost_usd"]),
        estimated=bool(row["estimated"]),
        attempts=row["attempts"] or 0,
        migrations=row["migrations"] or 0,
        ingress=row["ingress"],
        receipts=row["receipts"],
        counted=row["counted"],
        behind_text=row["behind_text"],
        announced=row["announced"],
        accepted_events=row["accepted_events"],
        ended_events=row["ended_events"],
        event_cost_pico=row["event_cost_pico"],
    )
