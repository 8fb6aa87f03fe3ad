"""Server-sent events out of bytes that arrive in any pieces; pure.

Lines may end in LF, CRLF or CR; comments, ids and retry times are dropped, and so are events without data.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream, with two differences: an
event whose last blank line is missing at the end of the stream counts; and so does a field ``error``, which older llama.cpp
writes in place of ``data`` (``server_sent_event(sink, "error", …)`` in its tools/server), as an event of that name.
"""

from __future__ import annotations

from schemas.errors import ProviderNonsense

BOM = b"\xef\xbb\xbf"
_BLANK = b"\n\n"
_PREFIX = b"data: "

Event = tuple[bytes, bytes]  # its name, empty for most; its data


class EventSplitter:
    """Feed it what was read; it gives the events that are whole, and keeps the rest: *max_event_bytes* at most."""

    def __init__(self, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self._begun = False

    def feed(self, data: bytes) -> list[Event]:
        """Raises: ProviderNonsense if an event is over the bound."""
        if not self._begun:
            data = self._without_bom(data)
        self._size += len(data)
        if self._size > self._max and _longest(self._pieces, data) > self._max:
            raise ProviderNonsense(f"The provider sent an event of more than {self._max} bytes.")
        if self._pieces:
            self._pieces.append(data)
            if b"\n" not in data and b"\r" not in data:  # no event can end here: join the pieces once, when one does
                return []
            data = b"".join(self._pieces)
        return self._split(data)

    def end(self) -> list[Event]:
        """What was left when the stream ended."""
        rest, self._pieces = b"".join(self._pieces), []
        return [event for block in _with_lf(rest).split(_BLANK) if (event := _event(block)) is not None]

    def _split(self, data: bytes) -> list[Event]:
        held = b""
        if b"\r" in data:
            if data.endswith(b"\r"):  # perhaps the first half of a CRLF
                data, held = data[:-1], b"\r"
            data = _with_lf(data)
        blocks = data.split(_BLANK)
        rest = blocks.pop() + held
        self._pieces = [rest] if rest else []
        self._size = len(rest)
        events: list[Event] = []
        for block in blocks:
            if block.startswith(_PREFIX) and b"\n" not in block:
                events.append((b"", block[len(_PREFIX) :]))
            elif (event := _event(block)) is not None:
                events.append(event)
        return events

    def _without_bom(self, data: bytes) -> bytes:
        data = b"".join(self._pieces) + data
        self._pieces, self._size = [], 0
        if len(data) < len(BOM) and BOM.startswith(data):
            self._pieces, self._size = [data], len(data)
            return b""
        self._begun = True
        return data.removeprefix(BOM)


def _event(block: bytes) -> Event | None:
    """The event that *block*, lines that end in LF, stands for; None if it has no data."""
    name, lines = b"", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            lines.append(value)
        elif field == b"event":
            name = value
        elif field == b"error":
            name = field
            lines.append(value)
    return (name, b"\n".join(lines)) if lines else None


def _with_lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _longest(pieces: list[bytes], data: bytes) -> int:
    return max(map(len, _with_lf(b"".join([*pieces, data])).split(_BLANK)))
