"""What one commit writes."""

from __future__ import annotations

from bus.reader import StoredMessage
from ledger.batch import Batch, Cursor, make_batch, placed
from ledger.rows import EndRow, EventRow, OpenRow
from schemas import subjects
from schemas.codec import encode
from tests.unit.ledger import samples

START = Cursor(subjects.EVENTS, last_seq=4, last_position=10)


def batch_of(*pages: bytes, **known: set[str]) -> Batch:
    messages = [StoredMessage("events.p", 5 + place, page) for place, page in enumerate(pages)]
    return make_batch(placed(messages, subjects.EVENTS), START, last_seq=messages[-1].seq, **known)


def test_positions_follow_page_order_without_gaps() -> None:
    batch = batch_of(samples.page(*samples.whole(1)), samples.page(b"broken"), samples.page(*samples.whole(2)))
    rows = batch.rows[EventRow]
    assert [row.position for row in rows] == list(range(11, 20))
    assert [row.stream_seq for row in rows] == [5] * 4 + [6] + [7] * 4
    assert batch.cursor[:3] == (subjects.EVENTS, 7, 19)


def test_an_event_that_comes_twice_is_stored_once_and_takes_one_position() -> None:
    page = samples.page(*samples.whole())
    batch = batch_of(page, page)
    assert len(batch.rows[EventRow]) == 4
    assert batch.repeated == 4
    assert batch.cursor[:3] == (subjects.EVENTS, 6, 14)


def test_an_event_that_is_stored_already_is_left_out() -> None:
    events = samples.whole()
    batch = batch_of(samples.page(*events), stored={events[0].id})
    assert [row.kind for row in batch.rows[EventRow]] == ["attempt.started", "attempt.finished", "request.finished"]


def test_what_was_told_again_is_stored_and_changes_nothing_of_its_request() -> None:
    batch = batch_of(samples.page(samples.replayed(running=True), *samples.whole(), samples.replayed()))
    assert [row.kind for row in batch.rows[EventRow]].count("request.replayed") == 2
    assert len(batch.rows[EndRow]) == 1
    assert batch_of(samples.page(samples.replayed())).rows.keys() == {EventRow}


def test_a_request_that_begins_and_ends_in_one_batch_was_never_open() -> None:
    batch = batch_of(samples.page(*samples.whole()))
    assert OpenRow not in batch.rows
    assert batch.ended == []
    assert len(batch.rows[EndRow]) == 1


def test_a_request_that_ends_later_is_taken_from_the_open_ones() -> None:
    assert batch_of(samples.page(samples.accepted())).rows[OpenRow]
    assert batch_of(samples.page(samples.finished())).ended == [samples.uuid(1)]


def test_a_request_ends_once_and_the_first_end_counts() -> None:
    batch = batch_of(samples.page(samples.finished(status="failed"), samples.finished()))
    assert [row.status for row in batch.rows[EndRow]] == ["failed"]
    assert len(batch.rows[EventRow]) == 2
    assert EndRow not in batch_of(samples.page(samples.finished()), over={samples.uuid(1)}).rows


def test_a_request_that_is_over_does_not_open_again() -> None:
    assert OpenRow not in batch_of(samples.page(samples.accepted()), over={samples.uuid(1)}).rows
    assert OpenRow not in batch_of(samples.page(samples.finished(), samples.accepted())).rows


def test_the_cursor_knows_the_newest_ids() -> None:
    events = samples.whole(3)
    cursor = batch_of(samples.page(*events)).cursor
    assert cursor.newest_event == max(event.id for event in events)
    assert cursor.newest_end == samples.uuid(3)


def test_a_control_message_is_one_event_whatever_its_spacing() -> None:
    import msgspec

    data = msgspec.json.format(encode(samples.key_stated()), indent=2)
    [only] = placed([StoredMessage("control.key.k", 1, data)], subjects.CONTROL)
    assert only.entry.kind == "control.key.stated"
