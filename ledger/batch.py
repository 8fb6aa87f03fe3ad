"""What one commit writes: a run of one stream's messages, as rows. Pure: what is stored already is passed in."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from bus.reader import StoredMessage
from ledger.entries import Entry, read_line
from ledger.projections import fact
from ledger.rows import AnyRow, EndRow, EventRow, OpenRow
from schemas import subjects
from schemas.events import Event


class Cursor(NamedTuple):
    """How far a stream has been read. ``stream_created`` names its incarnation; None before the first look at it."""

    log: str
    last_seq: int
    last_position: int
    stream_created: str | None = None
    newest_event: str = ""  # the greatest id of an event that is stored
    newest_end: str = ""  # the greatest id of a request that is over


class Placed(NamedTuple):
    """An entry and the message that brought it."""

    seq: int
    entry: Entry


class Batch(NamedTuple):
    """*ended* are requests whose row in ``request_opens`` has to go."""

    rows: dict[type[AnyRow], list[AnyRow]]
    ended: list[str]
    cursor: Cursor
    repeated: int = 0  # events that were stored already


def placed(messages: Iterable[StoredMessage], log: str) -> list[Placed]:
    """The entries of *messages* in log order: a message of EVENTS is a page of lines, one of CONTROL an event."""
    if log == subjects.CONTROL:
        return [Placed(m.seq, read_line(m.data)) for m in messages]
    return [Placed(m.seq, read_line(line)) for m in messages for line in m.data.split(b"\n") if line]


def make_batch(
    entries: Iterable[Placed],
    cursor: Cursor,
    *,
    last_seq: int,
    stored: Collection[str] = (),
    over: Collection[str] = (),
) -> Batch:
    """The rows for *entries*, which follow *cursor* and end at message *last_seq*.

    *stored* are ids of events, *over* of requests that ended, among those already in the ledger. An event is stored
    once and a request ends once: the first one counts.
    """
    rows: dict[type[AnyRow], list[AnyRow]] = {}
    opens: dict[str, OpenRow] = {}
    ends: dict[str, EndRow] = {}
    seen = set(stored)
    position, repeated = cursor.last_position, 0
    for seq, entry in entries:
        if entry.id is not None:
            if entry.id in seen:
                repeated += 1
                continue
            seen.add(entry.id)
        position += 1
        rows.setdefault(EventRow, []).append(_event_row(cursor.log, position, seq, entry))
        if not isinstance(entry.event, Event):
            continue
        match row := fact(entry.event, position):
            case OpenRow():
                opens.setdefault(row.request_id, row)
            case EndRow():
                ends.setdefault(row.request_id, row)
            case None:
                pass
            case _:
                rows.setdefault(type(row), []).append(row)
    rows[OpenRow] = [row for id_, row in opens.items() if id_ not in ends and id_ not in over]
    rows[EndRow] = [row for id_, row in ends.items() if id_ not in over]
    return Batch(
        rows={cls: found for cls, found in rows.items() if found},
        ended=[id_ for id_ in ends if id_ not in opens],
        cursor=cursor._replace(
            last_seq=last_seq,
            last_position=position,
            newest_event=max(cursor.newest_event, *seen) if seen else cursor.newest_event,
            newest_end=max(cursor.newest_end, *ends) if ends else cursor.newest_end,
        ),
        repeated=repeated,
    )


def _event_row(log: str, position: int, seq: int, entry: Entry) -> EventRow:
    return EventRow(
        log,
        position,
        seq,
        entry.id,
        entry.kind,
        entry.v,
        entry.ts,
        entry.org,
        entry.request_id,
        entry.epoch,
        entry.producer,
        entry.payload,
    )
