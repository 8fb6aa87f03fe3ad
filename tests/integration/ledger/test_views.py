"""The views that analysts ask: what each event makes of them."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from itertools import permutations
from uuid import UUID

import pytest

from ledger.guard import VIEWS
from ledger.store import Store
from schemas import subjects
from schemas.events import Event
from schemas.money import FREE, UNKNOWN, Price, Usage
from tests.integration.ledger.conftest import Log, records, rows
from tests.unit.ledger import samples


def at(time: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-20T{time}")


REQUEST = UUID(samples.uuid(1))


def test_a_finished_request_has_every_column(store: Store, log: Log) -> None:
    log.write(samples.whole())
    [row] = records(store, "from requests")
    assert row == {
        "request_id": REQUEST,
        "org": "acme",
        "key_id": "key_1",
        "model": "m",
        "route": "r1",
        "worker": "worker-1",
        "status": "completed",
        "http_status": 200,
        "code": None,
        "stream": True,
        "accepted_at": at("12:00:00.100"),
        "finished_at": at("12:00:00.145"),
        "queue_ms": 2.0,
        "first_token_ms": 7.5,
        "duration_ms": 45.0,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cached_tokens": 4,
        "reasoning_tokens": 0,
        "audio_prompt_tokens": 0,
        "audio_completion_tokens": 0,
        "cost_usd": Decimal("0.000008700000"),
        "attempts": 1,
        "migrations": 0,
        "cached": False,
        "finish_reason": "stop",
        "estimated": False,
        "prompt_hash": samples.PROMPT_HASH,
        "price_known": True,
    }


def test_a_cost_of_nothing_is_told_from_a_price_that_nobody_knew(store: Store, log: Log) -> None:
    log.write(
        [
            samples.finished(1, price=UNKNOWN, cost_pico=0),
            samples.finished(2, price=FREE, cost_pico=0),
            samples.accepted(3, price=UNKNOWN),
            samples.rejected(4),
        ]
    )
    assert rows(store, "select cost_usd, price_known from requests order by request_id") == [
        (Decimal(0), False),
        (Decimal(0), True),
        (None, None),
        (Decimal(0), None),
    ]


@pytest.mark.parametrize("pico", [0, 1, 999_999_999_999, 10**12, 123_456_789_012_345_678, 2**63 - 1])
def test_money_is_exact(store: Store, log: Log, pico: int) -> None:
    log.write([samples.finished(cost_pico=pico)])
    [(cost,)] = rows(store, "select cost_usd from requests")
    assert cost == Decimal(pico).scaleb(-12)


def test_an_accepted_request_is_open_until_it_ends(store: Store, log: Log) -> None:
    log.write([samples.accepted()])
    [row] = records(store, "from requests")
    assert (row["status"], row["model"], row["key_id"]) == ("open", "m", "key_1")
    assert row["accepted_at"] == at("12:00:00.100")
    assert row["cost_usd"] is None
    log.write([samples.finished(status="cancelled", code="client_left", http_status=499)])
    [row] = records(store, "from requests")
    assert (row["status"], row["code"]) == ("cancelled", "client_left")
    assert rows(store, "select count(*) from facts.request_opens") == [(0,)]


def test_a_rejected_request_is_a_row_of_its_own(store: Store, log: Log) -> None:
    log.write([samples.rejected(key_id=None, model=None, code="invalid_api_key", http_status=401)])
    [row] = records(store, "from requests")
    assert (row["status"], row["http_status"], row["code"]) == ("rejected", 401, "invalid_api_key")
    assert (row["cost_usd"], row["attempts"], row["key_id"]) == (0, 0, None)


@pytest.mark.parametrize("one_commit", [True, False])
def test_a_request_is_one_row_in_whatever_order_its_events_come(store: Store, log: Log, one_commit: bool) -> None:
    for number, order in enumerate(permutations(range(4)), 1):
        events = [samples.whole(number)[place] for place in order]
        pages: list[list[Event]] = [events] if one_commit else [[event] for event in events]
        for page in pages:
            log.write(page)
    assert rows(store, "select count(*), count(distinct request_id), min(status), max(status) from requests") == [
        (24, 24, "completed", "completed")
    ]
    assert rows(store, "select count(*), min(outcome), max(outcome), min(queue_ms) from attempts") == [
        (24, "completed", "completed", 2.0)
    ]


def test_an_attempt_has_what_both_witnesses_say(store: Store, log: Log) -> None:
    log.write(samples.whole())
    [row] = records(store, "from attempts")
    assert row == {
        "request_id": REQUEST,
        "epoch": 1,
        "org": "acme",
        "key_id": "key_1",
        "route": "r1",
        "worker": "worker-1",
        "provider": "openai",
        "model": "m",
        "upstream_model": "theirs",
        "outcome": "completed",
        "code": None,
        "started_at": at("12:00:00.102"),
        "finished_at": at("12:00:00.142"),
        "queue_ms": 2.0,
        "first_token_ms": 5.0,
        "duration_ms": 40.0,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cached_tokens": 4,
        "reasoning_tokens": 0,
        "tokens_sent": 10,
        "upstream_status": 200,
        "upstream_id": "chatcmpl-theirs",
        "finish_reason": "stop",
    }


def test_an_attempt_without_a_receipt_is_open_or_lost(store: Store, log: Log) -> None:
    log.write(
        [samples.started(1), samples.started(2), samples.lost(2), samples.lost(3, worker=None, code="queue_timeout")]
    )
    assert rows(store, "select request_id, outcome, code, worker, queue_ms from attempts order by 1") == [
        (UUID(samples.uuid(1)), "open", None, "worker-1", 2.0),
        (UUID(samples.uuid(2)), "lost", "worker_lost", "worker-1", 2.0),
        (UUID(samples.uuid(3)), "lost", "queue_timeout", None, None),
    ]


def test_a_receipt_that_comes_after_the_loss_is_still_a_loss(store: Store, log: Log) -> None:
    """The ingress gave it up, so the client saw none of it; what the provider reported is kept beside that."""
    log.write([samples.started(), samples.lost()])
    log.write([samples.receipt()])
    [row] = records(store, "from attempts")
    assert (row["outcome"], row["code"], row["completion_tokens"]) == ("lost", "worker_lost", 10)


def test_a_receipt_whose_start_never_came_has_a_start_by_its_own_account(store: Store, log: Log) -> None:
    log.write([samples.receipt(usage=None)])
    [row] = records(store, "from attempts")
    assert row["started_at"] == at("12:00:00.102")
    assert (row["queue_ms"], row["prompt_tokens"], row["tokens_sent"]) == (None, None, 10)


def test_attempts_of_one_request_are_told_apart(store: Store, log: Log) -> None:
    second = {"epoch": 2, "worker": "worker-2", "route": "r2"}
    log.write([samples.started(), samples.receipt(outcome="failed", code="upstream_error")])
    log.write([samples.started(**second), samples.receipt(**second), samples.finished(attempts=2, route="r2")])
    assert rows(store, "select epoch, worker, outcome, code from attempts order by epoch") == [
        (1, "worker-1", "failed", "upstream_error"),
        (2, "worker-2", "completed", None),
    ]


@pytest.fixture
def day(store: Store, log: Log) -> Store:
    """Six requests of two models, two keys, two days; one is still open."""
    log.write(
        [
            samples.finished(1),
            samples.finished(2, first_token_us=None, status="failed", http_status=502, usage=Usage(), cost_pico=0),
            samples.finished(3, model="other", route="r2", key_id="key_2", duration_us=55_000, first_token_us=9_500),
            samples.finished(4, status="cancelled", http_status=499, usage=Usage(prompt_tokens=5), cost_pico=750_000),
            samples.rejected(5, key_id=None, model=None),
            samples.accepted(864_000),
        ]
    )
    return store


def test_usage_by_model_adds_up(day: Store) -> None:
    found = {row["model"]: row for row in records(day, "from usage_by_model")}
    assert set(found) == {"m", "other", None}
    row = found["m"]
    counts = {name: row[name] for name in ("requests", "completed", "failed", "cancelled", "rejected", "open")}
    assert counts == {"requests": 4, "completed": 1, "failed": 1, "cancelled": 1, "rejected": 0, "open": 1}
    assert (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (25, 10, 4)
    assert row["cost_usd"] == Decimal("0.00000945")
    assert (row["first_token_ms_p50"], row["duration_ms_p50"]) == (7.5, 45.0)
    assert found["other"]["duration_ms_p95"] == 55.0
    assert found[None]["rejected"] == 1


def test_the_sums_agree_however_they_are_grouped(day: Store) -> None:
    sums = "sum(requests), sum(completed), sum(failed), sum(cancelled), sum(rejected), sum(open), sum(cost_usd)"
    views = ("usage_by_model", "usage_by_route", "usage_by_key", "usage_by_day")
    assert {rows(day, f"select {sums} from {view}")[0] for view in views} == {(6, 2, 1, 1, 1, 1, Decimal("0.00001815"))}


def test_usage_by_day_is_by_utc_day(day: Store) -> None:
    assert rows(day, "select day, requests from usage_by_day order by day") == [
        (date(2026, 11, 20), 5),
        (date(2026, 11, 21), 1),
    ]


def test_usage_by_key_knows_the_keys_last_name(day: Store) -> None:
    control = Log(day, name=subjects.CONTROL)
    control.write([samples.key_stated(name="old")], [samples.key_stated(name="laptop")])
    assert rows(day, "select org, key_id, key_name, requests from usage_by_key order by key_id nulls last") == [
        ("acme", "key_1", "laptop", 4),
        ("acme", "key_2", None, 1),
        ("acme", None, None, 1),
    ]


def test_the_audit_log_has_every_statement(store: Store) -> None:
    control = Log(store, name=subjects.CONTROL)
    control.write([samples.org_stated()], [samples.key_stated(by="key_admin")], [samples.route_stated()])
    assert rows(store, "select position, entity, entity_id, org, changed_by from audit_log order by position") == [
        (1, "org", "acme", "acme", "setup"),
        (2, "key", "key_1", "acme", "key_admin"),
        (3, "route", "r1", None, "setup"),
    ]


def test_each_log_has_its_own_positions(store: Store, log: Log) -> None:
    log.write(samples.whole())
    Log(store, name=subjects.CONTROL).write([samples.org_stated()])
    assert rows(store, "select log, min(position), max(position) from events group by log order by log") == [
        ("CONTROL", 1, 1),
        ("EVENTS", 1, 4),
    ]


def test_every_view_and_every_column_says_what_it_is(store: Store) -> None:
    silent = rows(
        store,
        "select table_name, column_name from duckdb_columns() "
        "where schema_name = 'main' and not internal and comment is null",
    )
    assert silent == []
    described = rows(
        store, "select distinct table_name from duckdb_columns() where schema_name = 'main' and not internal"
    )
    assert {name for (name,) in described} == VIEWS


def test_prices_of_classes_show_in_the_cost(store: Store, log: Log) -> None:
    usage = Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=1000)
    log.write([samples.finished(usage=usage), samples.finished(2, usage=usage, price=Price(), cost_pico=0)])
    assert rows(store, "select cost_usd from requests order by request_id") == [(Decimal("0.000135"),), (Decimal(0),)]
