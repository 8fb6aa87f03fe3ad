"""The verdict: what clients heard, what the witness said and what the ledger tells, held against each other. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

from tests.faults.deployment import CACHED_PICO, INPUT_PICO, OUTPUT_PICO
from tests.faults.prompts import Prompt, Word
from tests.faults.records import End, Record
from tests.faults.unrecorded import LOG_AWAY_MAX_S
from tests.faults.witness import Generation

PICO_PER_DOLLAR = 10**12
RETOLD = ("request_cancelled",)
WHILE_THE_LOG_IS_AWAY = ("queue_unavailable", "log_unavailable", "stopping")
ENDED = ("completed", "failed", "cancelled", "rejected")


class Kind(StrEnum):
    LOST = "lost"
    DUPLICATED = "duplicated"
    WRONG = "wrong"
    LEAKED = "leaked"


class Problem(NamedTuple):
    kind: Kind
    rule: str
    about: str  # the request's id or its prompt's name
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A request as the ledger has it: a row of `requests`, and what its events say."""

    request_id: str
    status: str
    code: str | None
    http_status: int | None
    prompt_hash: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost_pico: int = 0
    estimated: bool = False
    attempts: int = 1
    migrations: int = 0
    ingress: str | None = None
    receipts: int = 0  # of the worker that its end names: another one, which was not heard, tells nothing of the answer
    counted: bool = True  # the worker of the last attempt had left one when the request ended
    behind_text: int = 0  # how often another worker went on behind the text, where tokens can't be added up exactly
    announced: bool = True  # by an ingress that says that it is there; release 0.1.0's doesn't
    accepted_events: int = 0
    ended_events: int = 0
    event_cost_pico: int = 0


@dataclass
class Evidence:
    records: Sequence[Record]
    generations: Mapping[str, Sequence[Generation]]  # by the prompt's name
    entries: Sequence[Entry]
    receipts: frozenset[str] = frozenset()  # the generations, by either name, of which a worker has told the ledger
    unrecorded: Mapping[str, float] = field(default_factory=dict)  # refused requests: when who knew of it was killed
    by_id: dict[str, list[Entry]] = field(init=False)
    by_hash: dict[str, list[Entry]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id, self.by_hash = defaultdict(list), defaultdict(list)
        for entry in self.entries:
            self.by_id[entry.request_id].append(entry)
            if entry.prompt_hash is not None:
                self.by_hash[entry.prompt_hash].append(entry)

    def entry_of(self, record: Record) -> Entry | None:
        """What the ledger has of it, by the id that the client was told, else by its prompt."""
        found = self.by_id.get(record.request_id or "") or self.by_hash.get(record.prompt.hash)
        return found[0] if found else None


def judge(evidence: Evidence) -> list[Problem]:
    """Everything that isn't as promised."""
    found = list(_books(evidence))
    for record in evidence.records:
        entry = evidence.entry_of(record)
        said = evidence.generations.get(record.prompt.name, ())
        found += _text(record, said)
        if entry is None:
            found += _missing(record, said, evidence)
        elif entry.status in ENDED:
            found += _truth(record, entry)
            found += _bill(record, entry, said)
    return found


def summary(problems: Iterable[Problem]) -> Counter[Kind]:
    return Counter(problem.kind for problem in problems)


def _books(evidence: Evidence) -> Iterator[Problem]:
    """What the ledger must hold by itself, whoever asked."""
    for request_id, entries in evidence.by_id.items():
        if len(entries) > 1:
            yield Problem(Kind.DUPLICATED, "a request has one row", request_id, f"{len(entries)} rows")
    keyed = {record.prompt.hash for record in evidence.records if record.key is not None}
    for prompt_hash, entries in evidence.by_hash.items():
        ids = ", ".join(entry.request_id for entry in entries)
        if prompt_hash not in keyed and len({entry.request_id for entry in entries}) > 1:
            yield Problem(Kind.DUPLICATED, "a request is accepted once", prompt_hash, ids)
        # Release 0.1.0 knows no Idempotency-Key, and says nothing of itself.
        billed = [entry.ingress for entry in entries if entry.cost_pico > 0 and entry.announced]
        if len(billed) > len(set(billed)):
            yield Problem(Kind.DUPLICATED, "what has an Idempotency-Key is billed once by an ingress", prompt_hash, ids)
    for entry in evidence.entries:
        yield from _one_book(entry)


def _one_book(entry: Entry) -> Iterator[Problem]:
    if entry.status not in ENDED or entry.ended_events == 0:
        if not entry.announced:
            return  # it is closed, too, but a day later
        yield Problem(Kind.LOST, "every accepted request ends", entry.request_id, entry.status)
        return
    if entry.ended_events > 1 or entry.accepted_events > 1:
        told = f"{entry.accepted_events} beginnings, {entry.ended_events} ends"
        yield Problem(Kind.DUPLICATED, "every request begins and ends once", entry.request_id, told)
    if entry.status != "rejected" and entry.accepted_events == 0:
        yield Problem(Kind.LOST, "every request that ends was accepted", entry.request_id, entry.status)
    if entry.cost_pico != entry.event_cost_pico:
        told = f"{entry.cost_pico} in the row, {entry.event_cost_pico} in the events"
        yield Problem(Kind.WRONG, "the sum of costs is that of the events", entry.request_id, told)
    if entry.cost_pico != cost_pico(entry):
        told = f"{entry.cost_pico} for {entry.prompt_tokens}+{entry.completion_tokens} tokens"
        yield Problem(Kind.WRONG, "the cost is tokens times price", entry.request_id, told)


def cost_pico(entry: Entry) -> int:
    fresh = entry.prompt_tokens - entry.cached_tokens
    return fresh * INPUT_PICO + entry.cached_tokens * CACHED_PICO + entry.completion_tokens * OUTPUT_PICO


def pico(dollars: str | None) -> int:
    return int(Decimal(dollars or 0) * PICO_PER_DOLLAR)


def _text(record: Record, said: Sequence[Generation]) -> Iterator[Problem]:
    """The answer is one text: each word in its place, and of one generation, or of one that was given all before it."""
    words = [Word.read(text) for text in record.text.split()]
    speaker = None
    for place, word in enumerate(words):
        if word is None or (word.prompt, word.place) != (record.prompt.name, place):
            yield Problem(
                Kind.WRONG, "each word is in its place", record.prompt.name, f"{place}: {record.text[-200:]!r}"
            )
            return
        if word.generation != speaker and not _may_speak(word, place, said, record.text):
            told = f"generation {word.generation} at {place}, after {speaker}"
            yield Problem(Kind.WRONG, "no stream mixes two attempts", record.prompt.name, told)
            return
        speaker = word.generation
    if record.text != " ".join(record.text.split()):
        yield Problem(Kind.WRONG, "no byte is added or lost", record.prompt.name, repr(record.text[-200:]))


def _may_speak(word: Word, place: int, said: Sequence[Generation], text: str) -> bool:
    """Whether the word's generation was told to begin where it begins, behind what had been delivered."""
    begun = next((each for each in said if each.number == word.generation), None)
    if begun is None or begun.start != place:
        return False
    return text.split()[:place] == begun.given.split()


def _missing(record: Record, said: Sequence[Generation], evidence: Evidence) -> Iterator[Problem]:
    """The ledger has no such request: as it should be for one that never arrived, or whose ingress died before it was on record.

    Its job may have been queued by then: nothing of it is delivered, and its worker's receipt says what it cost. A refusal is
    told at once while the log is away, and is in its ingress's memory alone until then, which may be killed. What the provider
    calls its answer is in a receipt only if that had begun to arrive: the one that was stopped before is found by what its worker
    calls it.
    """
    refused = record.end is End.FAILED and not record.text
    excused = record.code in WHILE_THE_LOG_IS_AWAY or _died_with_its_ingress(record, said, evidence)
    if record.request_id is not None and not (refused and excused):
        told = f"{record.end}, status {record.status} {record.code}"
        yield Problem(Kind.LOST, "what a client was answered is in the ledger", record.request_id, told)
    elif not all(evidence.receipts & {each.name, each.asked_as} for each in said if each.whole):
        yield Problem(Kind.LOST, "what was generated is in the ledger", record.prompt.name, f"{len(said)} generations")
    if record.end is End.HUNG:
        yield Problem(Kind.LOST, "every client hears an end", record.prompt.name)


def _died_with_its_ingress(record: Record, said: Sequence[Generation], evidence: Evidence) -> bool:
    """Whether it was refused before any work, by an ingress that was killed within the time that the log can be away."""
    killed_s = evidence.unrecorded.get(record.request_id or "")
    return killed_s is not None and not said and 0 <= killed_s - record.ended_s <= LOG_AWAY_MAX_S


def _truth(record: Record, entry: Entry) -> Iterator[Problem]:
    """Client and ledger tell the same end."""
    told = (
        f"client: {record.end} {record.status} {record.code}; ledger: {entry.status} {entry.http_status} {entry.code}"
    )

    def wrong(rule: str) -> Problem:
        return Problem(Kind.WRONG, rule, entry.request_id, told)

    match record.end:
        case End.HUNG:
            yield Problem(Kind.LOST, "every client hears an end", entry.request_id, told)
        case End.SILENT:
            yield wrong("no answer ends without a reason")
        case End.COMPLETED:
            if entry.status != "completed":
                yield wrong("who was answered has completed")
            yield from _complete(record, entry)
        case End.FAILED:
            if record.code in RETOLD and entry.status == "cancelled":
                return  # a later reader of what was cancelled
            if entry.code == "ingress_lost":
                return  # it was cut off from the log, and closed by others: it can't say by which name
            if entry.status not in ("failed", "rejected") or entry.code != record.code:
                yield wrong("an error is told as it is recorded")
            elif record.status is not None and entry.http_status != record.status:
                yield wrong("an error's status is told as it is recorded")
        case End.LEFT | End.BROKEN:
            pass  # any end is true of them


def _complete(record: Record, entry: Entry) -> Iterator[Problem]:
    prompt = record.prompt
    if len(record.text.split()) != prompt.words or record.finish_reason != "stop":
        told = f"{len(record.text.split())} of {prompt.words} words, finish reason {record.finish_reason}"
        yield Problem(Kind.WRONG, "a completed answer is whole", entry.request_id, told)
    if record.usage not in {(tokens, prompt.words) for tokens in _prompt_tokens(entry, prompt)}:
        told = f"{record.usage}, not {(prompt.tokens, prompt.words)}"
        yield Problem(Kind.WRONG, "a completed answer's usage is the provider's", entry.request_id, told)


def _bill(record: Record, entry: Entry, said: Sequence[Generation]) -> Iterator[Problem]:
    """Billed is the provider's figure where the answer completed, else what was delivered."""
    prompt, billed = record.prompt, entry.completion_tokens
    received = len(record.text.split())
    reached = max((each.reached for each in said), default=0)
    least, most = {
        End.COMPLETED: (prompt.words, prompt.words),
        End.FAILED: (received, received),
    }.get(record.end, (received, reached))
    if entry.code == "ingress_lost":  # the receipt decides; if its worker died, too, nobody is left who knows
        least, most = (received, reached) if entry.receipts else (0, reached)
    if not least <= billed <= most:
        told = f"{record.end}: {billed} billed, {received} received, {reached} generated, {prompt.words} wanted"
        yield Problem(Kind.WRONG, "billed is what was delivered", entry.request_id, told)
    if entry.prompt_tokens not in _prompt_tokens(entry, prompt):
        told = f"{entry.status}: {entry.prompt_tokens} billed of {prompt.tokens}"
        yield Problem(Kind.WRONG, "the prompt is billed as counted", entry.request_id, told)
    known = entry.counted and not entry.behind_text
    if entry.status == "completed" and (billed != prompt.words or (entry.estimated and known)):
        told = f"{billed} of {prompt.words}, estimated: {entry.estimated}"
        yield Problem(Kind.WRONG, "what completed is billed as the provider counted", entry.request_id, told)


def _prompt_tokens(entry: Entry, prompt: Prompt) -> set[int]:
    """What may be billed for the prompt. A worker that dies behind the answer's last word takes the provider's figure along."""
    if entry.status == "completed":
        return {prompt.estimated_tokens if entry.estimated and not entry.counted else prompt.tokens}
    if entry.completion_tokens > 0:
        return {prompt.tokens, prompt.estimated_tokens}
    return {0, prompt.estimated_tokens} if entry.status == "cancelled" else {0}
