"""What a client saw of its request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tests.faults.prompts import Prompt


class End(StrEnum):
    """How it ended for the client."""

    COMPLETED = "completed"
    FAILED = "failed"  # with an error that says so
    LEFT = "left"  # it hung up
    BROKEN = "broken"  # its connection did
    SILENT = "silent"  # the answer stopped without an error or a reason
    HUNG = "hung"  # nothing came, not even an end


@dataclass(slots=True)
class Record:
    """One request as its client saw it."""

    prompt: Prompt
    model: str
    stream: bool
    began_s: float
    ended_s: float = 0.0
    end: End = End.SILENT
    request_id: str | None = None
    status: int | None = None
    code: str | None = None
    text: str = ""
    events: int = 0  # of its stream
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None  # tokens of the prompt and of the answer
    attempts: int | None = None  # as the header says
    key: str | None = None  # the Idempotency-Key; each try is a record of its own
    resumed: int = 0  # connections that it took beyond the first
