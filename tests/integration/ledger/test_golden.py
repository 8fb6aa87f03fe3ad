"""The whole corpus of stored events still projects."""

from __future__ import annotations

from decimal import Decimal

from ledger.store import Store
from schemas import subjects
from tests.golden_corpus import FILES
from tests.integration.ledger.conftest import Log, records, rows


def test_the_corpus_projects_into_the_views(store: Store, log: Log) -> None:
    control = Log(store, name=subjects.CONTROL)
    written = 0
    for golden in FILES:
        for line in golden.lines:
            (control if golden.kind.startswith("control.") else log).write([line])
            written += 1
    assert rows(store, "select count(*), count(*) filter (kind = 'unreadable') from events") == [(written, 0)]
    found = {row["request_id"].int & 0xFFFF: row for row in records(store, "from requests")}
    assert {number: row["status"] for number, row in found.items()} == {
        1: "completed",
        2: "failed",
        3: "rejected",
        4: "rejected",
        0x62: "open",
        0x63: "rejected",
    }
    first = found[1]
    assert first["cost_usd"] == Decimal("1.234567890123")
    tokens = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    assert [first[name] for name in tokens] == [2000, 800, 512, 300]
    assert (first["audio_prompt_tokens"], first["audio_completion_tokens"], first["estimated"]) == (40, 20, True)
    assert rows(store, "select outcome, count(*) from attempts group by all order by all") == [
        ("completed", 1),
        ("failed", 1),
        ("lost", 3),
    ]
    assert rows(store, "select entity, count(*) from audit_log group by all order by all") == [
        ("key", 3),
        ("org", 1),
        ("route", 3),
    ]
