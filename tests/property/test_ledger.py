"""The ledger against a model: any history, in any order, cut into pages and commits anywhere, repeated anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.reader import StoredMessage
from ledger.entries import UNREADABLE, read_line
from ledger.migrations import migrate
from ledger.store import Store
from schemas import subjects
from schemas.codec import encode
from schemas.events import (
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    Event,
    RequestAccepted,
    RequestFinished,
    RequestRejected,
)
from tests.unit.ledger import samples

Pages = list[list[Event | bytes]]

LIVES: list[list[Any]] = [
    [samples.accepted, samples.started, samples.receipt, samples.finished],
    [samples.accepted, samples.started, samples.lost, samples.finished],
    [samples.accepted, samples.started, samples.lost, samples.receipt],
    [samples.accepted, samples.finished, samples.finished],
    [samples.accepted, samples.rejected],
    [samples.rejected],
    [samples.receipt, samples.started],
    [samples.accepted],
]


@st.composite
def histories(draw: st.DrawFn) -> list[Event | bytes]:
    """The events of some requests, shuffled, some of them repeated, with some lines that are none."""
    events: list[Event | bytes] = []
    for number, life in enumerate(draw(st.lists(st.sampled_from(LIVES), max_size=6)), 1):
        events += [make(number) for make in life]
    events += draw(st.lists(st.sampled_from([b"no event", b'{"kind":"node.online","v":3}', b"\xff"]), max_size=2))
    if events:
        events += draw(st.lists(st.sampled_from(events), max_size=4))
    return draw(st.permutations(events))


@st.composite
def cuts(draw: st.DrawFn, events: list[Any]) -> list[list[Any]]:
    """*events* in the same order, in runs of any length."""
    places = sorted(draw(st.lists(st.integers(0, len(events)), max_size=5)))
    bounds = [0, *places, len(events)]
    return [events[a:b] for a, b in pairwise(bounds)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pages, list[Pages], list[Pages]]:
    """One history as pages, and two ways to group these into commits."""
    pages = draw(cuts(draw(histories())))
    return pages, draw(cuts(pages)), draw(cuts(pages))


@pytest.fixture(scope="module")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the tables and nothing in them: to make them is most of a replay's work."""
    path = tmp_path_factory.mktemp("ledger") / "empty.duckdb"
    with duckdb.connect(path) as connection:
        migrate(connection)
    return path


@given(case=cases())
@settings(max_examples=25)
def test_the_views_agree_with_the_model_and_with_every_replay(
    empty_file: Path, case: tuple[Pages, list[Pages], list[Pages]]
) -> None:
    pages, one_way, another_way = case
    lines = list(first_of_each(pages))
    stored = replay(one_way, empty_file)
    assert [payload for _, payload in stored["events"]] == [read_line(line).payload for line in lines]
    assert [position for position, _ in stored["events"]] == list(range(1, len(lines) + 1))
    assert dict(stored["requests"]) == requests_of(lines)
    assert {(request, epoch): outcome for request, epoch, outcome in stored["attempts"]} == attempts_of(lines)
    assert len(stored["requests"]) == len(requests_of(lines))
    assert len(stored["attempts"]) == len(attempts_of(lines))
    assert replay(another_way, empty_file) == stored


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_line_is_ever_lost_or_stops_anything(line: bytes) -> None:
    entry = read_line(line)
    assert entry.kind == UNREADABLE or entry.payload.encode() == line


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s, max_size=3)
    ),
    st.data(),
)
def test_no_member_of_an_event_can_break_the_reading(value: object, data: st.DataObject) -> None:
    import msgspec

    members = msgspec.json.decode(
        encode(data.draw(st.sampled_from([samples.accepted(), samples.finished(), samples.receipt()])))
    )
    members[data.draw(st.sampled_from(sorted(members)))] = value
    line = msgspec.json.encode(members)
    entry = read_line(line)
    assert entry.kind == UNREADABLE or entry.payload.encode() == line


def replay(commits: list[Pages], empty_file: Path) -> dict[str, list[Any]]:
    """What the views show after *commits*."""
    with TemporaryDirectory() as folder, duckdb.connect(shutil.copy(empty_file, folder)) as connection:
        store = Store(connection)
        seq = 0
        for pages in commits:
            messages = []
            for page in pages:
                seq += 1
                messages.append(StoredMessage("events.p", seq, samples.page(*page)))
            if messages:
                store.append(messages, store.read_cursor(subjects.EVENTS))
        assert store.read_cursor(subjects.EVENTS).last_seq == seq
        return {
            "events": connection.execute("select position, payload from events order by position").fetchall(),
            "requests": connection.execute("select request_id::varchar, status from requests order by 1").fetchall(),
            "attempts": connection.execute(
                "select request_id::varchar, epoch, outcome from attempts order by all"
            ).fetchall(),
        }


def first_of_each(pages: Pages) -> Iterator[bytes]:
    """The lines of the log; of an event that comes again, the first."""
    seen: set[str] = set()
    for page in pages:
        for item in page:
            line = item if isinstance(item, bytes) else encode(item)
            id_ = None if isinstance(item, bytes) else item.id
            if id_ is None or id_ not in seen:
                yield line
            if id_ is not None:
                seen.add(id_)


def requests_of(lines: list[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in map(_event, lines):
        match event:
            case RequestAccepted():
                found.setdefault(event.request_id, "open")
            case RequestFinished() | RequestRejected():
                if found.get(event.request_id, "open") == "open":
                    found[event.request_id] = event.status if isinstance(event, RequestFinished) else "rejected"
    return found


def attempts_of(lines: list[bytes]) -> dict[tuple[str, int], str]:
    rank = {"open": 0, "completed": 1, "lost": 2}
    found: dict[tuple[str, int], str] = {}
    for event in map(_event, lines):
        match event:
            case AttemptStarted():
                outcome = "open"
            case AttemptFinished():
                outcome = event.outcome
            case AttemptLost():
                outcome = "lost"
            case _:
                continue
        key = (str(event.request_id), event.epoch)
        found[key] = max(found.get(key, "open"), outcome, key=rank.__getitem__)
    return found


def _event(line: bytes) -> object:
    return read_line(line).event
