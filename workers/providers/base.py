"""What every provider is: one method in, one stream of chunks out, one way to close.

A provider turns a job into chunks and knows nothing of queues, frames or numbers. Cancelling the task that iterates (or
closing the iterator) must stop the work down to the provider's connection.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from schemas.jobs import Continues, EngineStats, Job, ModelFingerprint
from schemas.money import Usage
from schemas.standing import UNTOLD, Standing


class Chunk(Struct, frozen=True, gc=False):
    """A piece of an answer.

    *members* is a raw JSON object as schemas/frames.py describes it (``choices`` and the provider's further members,
    without ``id``, ``object``, ``created``, ``model`` and ``usage``), or None when the piece only brings usage.
    *tokens* are the completion tokens in it: exact where the provider tells, else estimated.
    *more* are the members of further pieces that came together with it, in their order.
    *usage* is the provider's latest figure, with *usage_raw* the same as it wrote it.
    """

    members: bytes | None
    tokens: int = 0
    finish_reason: str | None = None  # of the choice with index 0
    usage: Usage | None = None
    usage_raw: bytes | None = None
    upstream_id: str | None = None
    token_ids: tuple[int, ...] = ()  # of the only choice, where the engine gives them
    prompt_token_ids: tuple[int, ...] = ()  # once, on the first chunk
    tries: int = 1  # how often the provider was asked until this came
    more: tuple[bytes, ...] = ()

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The members of all of it."""
        return () if self.members is None else (self.members, *self.more)


def joined(chunks: Sequence[Chunk]) -> Chunk | None:
    """*chunks* that came together, as one: whoever they pass is asked once for all of them. None if there are none."""
    if len(chunks) < 2:
        return chunks[0] if chunks else None
    pieces: list[bytes] = []
    token_ids: list[int] = []
    tokens = 0
    finish_reason = usage = usage_raw = upstream_id = None
    prompt_token_ids: tuple[int, ...] = ()
    for chunk in chunks:
        if chunk.members is not None:
            pieces += chunk.pieces
        tokens += chunk.tokens
        token_ids += chunk.token_ids
        finish_reason = chunk.finish_reason or finish_reason
        upstream_id = chunk.upstream_id or upstream_id
        prompt_token_ids = prompt_token_ids or chunk.prompt_token_ids
        if chunk.usage is not None:
            usage, usage_raw = chunk.usage, chunk.usage_raw
    return Chunk(
        members=pieces[0] if pieces else None,
        tokens=tokens,
        finish_reason=finish_reason,
        usage=usage,
        usage_raw=usage_raw,
        upstream_id=upstream_id,
        token_ids=tuple(token_ids),
        prompt_token_ids=prompt_token_ids,
        tries=chunks[-1].tries,
        more=tuple(pieces[1:]),
    )


Tell = Callable[[str | None], None]  # why the provider can't serve at the moment; None: it can
Hold = Callable[[str | None], None]  # why jobs are to wait in the queue for a short while; None: they needn't
Heard = Callable[[Mapping[str, str]], None]  # the headers of an answer, in the task that asked for it


class Provider(Protocol):
    """A place that can generate.

    For ``job.stream`` the chunks' choices have a ``delta``; without, there is one chunk with members, whose choices have
    a ``message``. A class that names this as its base has only to generate.
    """

    name: str  # as the configuration says it: "openai", "echo", ...

    def upstream_model(self, model: str) -> str:
        """What the provider calls the public name *model*."""
        return model

    def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """The answer to ``job.body``; with ``job.continuation``, what comes behind that, without a word of it again.

        What a continuation brings is counted in its chunks; its usage is what the provider bills for it.

        Raises: a subclass of schemas.errors.Fault when the provider can't, NotContinued when that is all it can't; nothing
        else of the provider's.
        """
        ...

    def continues(self, model: str) -> Continues:  # noqa: ARG002
        """How it goes on with an answer of *model* that broke off elsewhere."""
        return Continues.NO

    async def models(self) -> tuple[str, ...]:
        """The names that it serves, asked for when the configuration names none. Raises: Fault."""
        return ()

    def fingerprint(self, model: str) -> ModelFingerprint | None:  # noqa: ARG002
        """What exactly answers under the public name *model*, where that is known."""
        return None

    def slots(self) -> int | None:
        """How many attempts it has room for, where it knows and nobody configured it. Asked whenever it says that it can serve."""
        return None

    def stats(self) -> EngineStats | None:
        """What its model server last said of itself, where it does."""
        return None

    def parameters(self) -> tuple[str, ...] | None:
        """Of a request, those that it honours; None where that is not known."""
        return None

    def attach(self, tell: Tell) -> None:  # noqa: ARG002
        """Called once, before the first job: the provider may begin to prepare itself.

        It calls *tell* at each change of whether it can serve. Until it says otherwise, it can.
        """
        return

    def throttle(self, hold: Hold) -> None:  # noqa: ARG002
        """Called once, before the first job: the provider calls *hold* at each change of whether it has room for jobs."""
        return

    def admit(self, job: Job) -> bool:  # noqa: ARG002
        """Whether *job* may begin now. One that may not goes back to the queue."""
        return True

    def listen(self, heard: Heard) -> None:  # noqa: ARG002
        """From now on *heard* gets the headers of each answer that a server sends."""
        return

    def standing(self) -> Standing:
        """Its keys, limits and health, as presence tells them."""
        return UNTOLD

    async def aclose(self) -> None:
        return
