"""A rolling upgrade mixes two releases: each must read what the other writes.

`make faults ARGS=--previous` runs the real code of both; this holds today's code against what the last release recorded.
"""

from __future__ import annotations

import jsonschema
import msgspec
import pytest

from schemas.codec import encode
from tests.faults.wire import READ_AS, present, recorded, release

PREVIOUS = recorded(release()[0])
PRESENT = present()
MESSAGES = [(read_as, kind) for read_as, kinds in PREVIOUS.messages.items() for kind in kinds]
# Messages that the previous release can't read, and why it gets none.
NEW = {
    (
        "command",
        "take",
    ): "for workers whose presence says that they go on with answers; one of that release says nothing",
}


@pytest.mark.parametrize(("read_as", "kind"), MESSAGES)
def test_what_the_previous_release_wrote_is_read_with_all_it_says(read_as: str, kind: str) -> None:
    for raw in PREVIOUS.messages[read_as][kind]:
        message = msgspec.json.decode(raw, type=READ_AS[read_as])
        written, now = msgspec.json.decode(raw), msgspec.json.decode(encode(message))
        assert _within(written, now), (written, now)


@pytest.mark.parametrize(("read_as", "kind"), MESSAGES)
def test_the_previous_release_reads_what_is_written_now(read_as: str, kind: str) -> None:
    """Its decoder ignores members that it doesn't know, and its schema allows them."""
    for raw in PRESENT.messages[read_as][kind]:
        jsonschema.validate(msgspec.json.decode(raw), PREVIOUS.schemas[read_as])


def test_every_new_message_says_why_the_previous_release_gets_none() -> None:
    now = {(read_as, kind) for read_as, kinds in PRESENT.messages.items() for kind in kinds}
    assert now - set(MESSAGES) <= NEW.keys()


def _within(written: object, now: object) -> bool:
    """Whether every member of *written* is in *now* with the same value; *now* may leave out what is a default."""
    if isinstance(written, dict) and isinstance(now, dict):
        return all(_within(value, now.get(name, value)) for name, value in written.items())
    if isinstance(written, list) and isinstance(now, list):
        return len(written) == len(now) and all(map(_within, written, now))
    return written == now
