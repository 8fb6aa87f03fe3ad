"""Wherever a stream is cut, what was read and what is read after it are the whole, byte for byte."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ingress.reader import Client, Reader, follow
from ingress.sse import KEEP_ALIVE, EventWriter
from ingress.transcript import EVENT, Owner, Transcript
from schemas.errors import AnswerNotKept
from schemas.ids import KeyId, OrgId, RequestId, new_id
from tests.property.strategies import json_values, names

OWNER = Owner(OrgId("o"), KeyId("k"))
chunks = st.fixed_dictionaries({"choices": st.lists(json_values, max_size=2)}).map(msgspec.json.encode)
writes = st.lists(st.lists(chunks, min_size=0, max_size=3), min_size=1, max_size=8)  # an empty one is a comment


class Space:
    """Room without end."""

    def charge(self, _: int, /) -> bool:
        return True


def transcript(*, max_bytes: int = 1 << 30) -> Transcript:
    return Transcript(RequestId(new_id()), OWNER, grace_s=0, room=Space(), max_bytes=max_bytes)


def messages_of(given_: list[list[bytes]], model: str) -> list[dict[str, Any]]:
    """As an answer sends them."""
    writer = EventWriter(RequestId(new_id()), created=1, model=model, include_usage=False, obfuscate=True)
    told: list[dict[str, Any]] = [{"type": "http.response.start", "status": 200, "headers": []}]
    for part in given_:
        body = b"".join(writer.event(chunk) for chunk in part) or KEEP_ALIVE
        told.append({"type": "http.response.body", "body": body, "more_body": True, EVENT: writer.number})
    end = writer.done_event()
    told.append({"type": "http.response.body", "body": end, "more_body": False, EVENT: writer.number})
    return told


def whole_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages).replace(KEEP_ALIVE, b"")


def rest_of(kept: Transcript, after: int) -> bytes:
    found = b""
    while True:
        body, after = kept.read(after)
        if not body:
            return found
        found += body


@given(writes, names)
def test_what_was_read_and_the_rest_are_the_whole_at_every_cut(given_: list[list[bytes]], model: str) -> None:
    messages = messages_of(given_, model)

    async def told() -> Transcript:
        kept = transcript()
        for message in messages:
            kept.take(message)
        return kept

    kept = asyncio.run(told())
    whole = whole_of(messages)
    events = [event + b"\n\n" for event in whole.split(b"\n\n")[:-1]]
    assert kept.last == len(events)
    for after in range(len(events) + 1):
        assert b"".join(events[:after]) + rest_of(kept, after) == whole


@given(writes, names, st.integers(0, 4000))
def test_what_had_to_be_forgotten_is_refused_and_never_left_out(
    given_: list[list[bytes]], model: str, max_bytes: int
) -> None:
    messages = messages_of(given_, model)

    async def told() -> Transcript:
        kept = transcript(max_bytes=max_bytes)
        for message in messages:
            kept.take(message)
        return kept

    kept = asyncio.run(told())
    events = [event + b"\n\n" for event in whole_of(messages).split(b"\n\n")[:-1]]
    for after in range(len(events) + 1):
        try:
            rest = rest_of(kept, after)
        except AnswerNotKept:
            assert after + 1 < kept.first
        else:
            assert rest == b"".join(events[after:])


@given(writes, names, st.lists(st.integers(0, 30), max_size=4), st.data())
def test_readers_that_come_at_any_time_get_the_same(
    given_: list[list[bytes]], model: str, turns: list[int], data: st.DataObject
) -> None:
    """Some come before the beginning, some in the middle, and each waits for what has not come yet."""
    messages = messages_of(given_, model)
    joins = sorted(data.draw(st.lists(st.integers(0, len(messages)), min_size=1, max_size=4)))

    async def play() -> list[bytes]:
        kept = transcript()
        came: list[bytes] = []

        async def read() -> None:
            number = len(came)
            came.append(b"")

            async def send(message: Any) -> None:
                await asyncio.sleep(0)
                came[number] += message.get("body", b"")

            async def receive() -> Any:
                await asyncio.Event().wait()

            client = Client({"state": {}}, receive, send)  # type: ignore[typeddict-item]
            await follow(Reader(kept, after=0), client)

        async with asyncio.TaskGroup() as group:
            for place, message in enumerate([*messages, None]):
                for _ in range(joins.count(place)):
                    group.create_task(read())
                for _ in range(turns[place % len(turns)] if turns else 0):
                    await asyncio.sleep(0)
                if message is not None:
                    kept.take(message)
        return came

    came = asyncio.run(play())
    assert len(came) == len(joins)
    for one, other in pairwise([*came, whole_of(messages)]):
        assert one.replace(KEEP_ALIVE, b"") == other.replace(KEEP_ALIVE, b"")
