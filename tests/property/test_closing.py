"""The bill of a request whose ingress died, whatever of its story is on record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.closing import closing
from schemas.events import Event
from schemas.ids import EventId
from schemas.money import Usage
from tests.unit.ledger import samples

ANSWER_TOKENS = 12
ATTEMPTS_MAX = 4


@dataclass(frozen=True)
class Told:
    """*ingress* is what it would have written, in order; *receipts* are by attempt."""

    ingress: list[Event]
    receipts: list[Event]
    had: list[int]  # by the client, by the end of each attempt


@st.composite
def stories(draw: st.DrawFn) -> Told:
    """An answer that moves from attempt to attempt, each going on where its client was; the one before may run on unheard."""
    ingress: list[Event] = [samples.accepted(prompt_bytes=40)]
    receipts: list[Event] = []
    had: list[int] = []
    for epoch in range(1, 1 + draw(st.integers(1, ATTEMPTS_MAX))):
        carried = had[-1] if had else 0
        sent = draw(st.integers(0, ANSWER_TOKENS - carried))
        had.append(carried + draw(st.integers(0, sent)))
        whole = carried + sent == ANSWER_TOKENS
        outcome = "completed" if whole else draw(st.sampled_from(["failed", "cancelled", "handed_back"]))
        usage = Usage(prompt_tokens=10 + carried, completion_tokens=sent) if whole else None
        told: dict[str, Any] = {"epoch": epoch, "worker": f"worker-{epoch}"}
        receipts.append(samples.receipt(**told, outcome=outcome, usage=usage, tokens_sent=sent, tokens_carried=carried))
        ingress.append(samples.started(**told))
        if carried and had[-1] > carried:
            ingress.append(samples.migrated(**told, tokens_carried=carried))
        ingress.append(samples.lost(**told, tokens_carried=had[-1]))
    return Told(ingress, receipts, had)


@settings(max_examples=500)
@given(st.data(), stories())
def test_it_is_for_what_the_client_is_known_to_have_had_at_least_and_for_the_answer_at_most(
    data: st.DataObject, told: Told
) -> None:
    written = told.ingress[: data.draw(st.integers(1, len(told.ingress)))]
    stored = [receipt for receipt in told.receipts if data.draw(st.booleans())]
    events = data.draw(st.permutations([*written, *stored]))
    end = closing(events, id_=EventId(samples.event_id()), now_ns=samples.NOON_NS, producer="ledger")
    assert end is not None
    known = max((getattr(event, "tokens_carried", 0) for event in events), default=0)
    assert known <= end.usage.completion_tokens <= ANSWER_TOKENS


@given(stories())
def test_with_everything_on_record_it_is_for_what_the_client_had(told: Told) -> None:
    """All attempts were given up, and that was written down before the ingress died."""
    end = closing(
        [*told.ingress, *told.receipts], id_=EventId(samples.event_id()), now_ns=samples.NOON_NS, producer="ledger"
    )
    assert end is not None
    assert end.usage.completion_tokens == told.had[-1]
