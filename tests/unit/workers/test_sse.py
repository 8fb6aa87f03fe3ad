from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ProviderNonsense
from workers.providers.sse import Event, EventSplitter

STREAM = (
    "\ufeff: a comment\n\n"
    'data: {"a":1}\n\n'
    "event: error\ndata: {}\n\n"
    "data:no space\n\n"
    "id: 7\nretry: 10\ndata: one\ndata: two\n\n"
    "event: nothing\n\n"
    "data\n\n"
    "\n\n\ndata: zwölf € 🦊\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS: list[Event] = [
    (b"", b'{"a":1}'),
    (b"error", b"{}"),
    (b"", b"no space"),
    (b"", b"one\ntwo"),
    (b"", b""),
    (b"", "zwölf € 🦊".encode()),
    (b"", b"[DONE]"),
]


def split(pieces: list[bytes], *, most: int = 10_000) -> list[Event]:
    splitter = EventSplitter(most)
    return [event for piece in pieces for event in splitter.feed(piece)] + splitter.end()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_events_are_the_same_in_any_pieces_with_any_line_ending(ending: bytes, size: int) -> None:
    stream = STREAM.replace(b"\n", ending)
    assert split([stream[at : at + size] for at in range(0, len(stream), size)]) == EVENTS


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_events_do_not_depend_on_where_reads_end(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert split([STREAM[a:b] for a, b in itertools.pairwise(places)]) == EVENTS


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_last_event_counts_without_its_blank_line(end: bytes) -> None:
    assert split([b"data: 1\n\ndata: 2" + end]) == [(b"", b"1"), (b"", b"2")]


def test_an_event_is_given_as_soon_as_it_is_whole() -> None:
    splitter = EventSplitter(100)
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [(b"", b"1")]
    assert splitter.feed(b"\n") == [(b"", b"2")]


@pytest.mark.parametrize("size", [1, 16, 10_000])
def test_an_event_over_the_bound_is_refused_however_it_comes(size: int) -> None:
    stream = b"data: short\n\ndata: " + b"x" * 200 + b"\n\n"
    with pytest.raises(ProviderNonsense, match="more than 100 bytes"):
        split([stream[at : at + size] for at in range(0, len(stream), size)], most=100)


def test_many_short_events_in_one_read_are_within_the_bound() -> None:
    assert len(split([b"data: 1\n\n" * 500], most=100)) == 500
