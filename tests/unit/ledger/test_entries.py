"""Lines of the log as entries."""

from __future__ import annotations

import base64

import msgspec
import pytest

from ledger.entries import INT64_MAX, UNREADABLE, read_line, too_large
from schemas.codec import encode
from schemas.upcasters import Mapped
from tests.unit.ledger import samples


def test_an_event_keeps_its_bytes_and_shows_its_envelope() -> None:
    event = samples.started(epoch=2)
    entry = read_line(encode(event))
    assert entry.payload.encode() == encode(event)
    assert (entry.id, entry.kind, entry.v) == (event.id, "attempt.started", 1)
    assert (entry.org, entry.request_id, entry.epoch) == ("acme", event.request_id, 2)
    assert entry.event == event
    assert entry.problem is None


def test_a_line_with_other_spacing_is_kept_as_it_was_written() -> None:
    """Hashes are over the stored bytes, so nobody may tidy them."""
    line = msgspec.json.format(encode(samples.finished()), indent=2).replace(b"\n", b" ")
    assert read_line(line).payload.encode() == line


@pytest.mark.parametrize("kind", ["node.online", "request.finished"], ids=["kind", "version"])
def test_an_event_of_a_newer_release_is_kept(kind: str) -> None:
    raw = {**msgspec.json.decode(encode(samples.finished())), "kind": kind, "v": 7, "new_member": {"a": [1]}}
    entry = read_line(msgspec.json.encode(raw))
    assert (entry.kind, entry.v, entry.id) == (kind, 7, raw["id"])
    assert (entry.org, entry.request_id) == (raw["org"], raw["request_id"])
    assert entry.event is None
    assert entry.problem is None


def test_an_envelope_that_cannot_be_read_leaves_its_columns_empty() -> None:
    line = b'{"kind":"from.tomorrow","v":1,"id":17,"ts_ns":"noon","org":{},"request_id":"x","epoch":-1}'
    entry = read_line(line)
    assert entry.kind == "from.tomorrow"
    assert (entry.id, entry.ts, entry.org, entry.request_id, entry.epoch) == (None,) * 5


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b'{"kind":"request.finished"}',
        b'{"kind":"request.finished","v":"one"}',
        b'{"kind":"' + b"x" * 5000 + b'","v":1}',
        b'{"kind":"x","v":-1}',
        b"[" * 100_000,
        encode(samples.started(id="me")),
        encode(samples.started(request_id="you")),
        encode(samples.started(ts_ns=-1)),
        encode(samples.started(ts_ns=2**63)),
        encode(samples.finished(accepted_ns=2**70)),
    ],
    ids=lambda line: line[:12].decode(errors="replace"),
)
def test_a_line_that_is_no_event_is_kept_with_its_bytes(line: bytes) -> None:
    entry = read_line(line)
    assert entry.kind == UNREADABLE
    assert entry.problem
    assert base64.b64decode(msgspec.json.decode(entry.payload)["bytes_base64"]) == line


def test_an_old_version_is_lifted_but_stored_as_it_was() -> None:
    def first_step(members: Mapped) -> Mapped:
        return {**members, "queue_us": members.pop("queue_ms") * 1000}

    new = samples.started()
    old = msgspec.json.decode(encode(new))
    old["queue_ms"] = old.pop("queue_us") // 1000
    line = msgspec.json.encode(old)
    entry = read_line(line, steps={("attempt.started", 1): first_step})
    assert entry.v == 1
    assert entry.payload.encode() == line
    assert entry.event == msgspec.structs.replace(new, v=2)


def test_a_number_beyond_the_database_is_noticed() -> None:
    assert not too_large(samples.finished(cost_pico=INT64_MAX))
    assert too_large(samples.finished(cost_pico=INT64_MAX + 1))
    assert too_large(samples.finished(usage=samples.Usage(prompt_tokens=2**64)))
