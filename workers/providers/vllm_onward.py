"""Goes on with an answer at a vLLM, exactly: finds the seam, asks for completions behind it, tells them as the chat's chunks.

Source: docs/adr/0066-continuation.md, docs/adr/0068-seam.md
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from schemas.errors import ProviderFailed
from schemas.jobs import Continuation, Job
from workers.providers.base import Chunk
from workers.providers.openai import STREAM, must_be
from workers.providers.patience import Patience
from workers.providers.prefill import Request
from workers.providers.sse import EventSplitter
from workers.providers.upstream import Upstream
from workers.providers.vllm_continuation import (
    CONTEXT_IDS,
    DROPPED_MAX,
    Completions,
    Seam,
    completion_body,
    held_back,
)
from workers.providers.vllm_server import VllmServer

Ids = tuple[int, ...]


class Tokenizer(Protocol):
    async def text_of(self, model: str, ids: Ids) -> str | None:
        """What the tokenizer of *model* makes of *ids*; None if it doesn't say."""


async def find_seam(server: Tokenizer, model: str, before: Continuation) -> Seam | None:
    """Where *server*, which calls the model *model*, can begin; None if its words for the tokens are not what was delivered."""
    context = before.prompt_token_ids[-CONTEXT_IDS:]
    opening = await server.text_of(model, context)
    for dropped in range(min(DROPPED_MAX, len(before.token_ids)) + 1):
        ids = before.token_ids[: len(before.token_ids) - dropped]
        text = await server.text_of(model, context + ids)
        if opening is None or text is None or not text.startswith(opening):
            return None
        held = held_back(text[len(opening) :], before)
        if held is not None:
            return Seam(ids, dropped, held)
    return None


async def go_on(
    job: Job,
    request: Request,
    seam: Seam,
    *,
    server: VllmServer,
    upstream: Upstream,
    patience: Patience,
    upstream_model: str,
    context_tokens: int,
    max_event_bytes: int,
) -> AsyncGenerator[Chunk, None]:
    """What comes behind *seam*. Raises: Fault."""
    reader, events = Completions(job, request, seam), EventSplitter(max_event_bytes)
    for chunk in reader.opening():
        yield chunk
    body = completion_body(job, request, seam, upstream_model=upstream_model, context_tokens=context_tokens)
    if body is None:
        for chunk in reader.at_the_limit():
            yield chunk
        return
    answer = await upstream.ask("POST", "/completions", body=body, patience=patience, job=job)
    try:
        await must_be(STREAM, answer, patience)
        at_end = False
        while not (reader.done or at_end):
            data = await answer.read(patience)
            at_end = not data
            for _, payload in events.feed(data) if data else events.end():
                told = None if reader.done else reader.event(payload)
                if told is not None and reader.stop is not None:
                    surplus = await surplus_of(
                        server, upstream_model, reader.stop, before=seam.ids, generated=tuple(reader.generated)
                    )
                    told = reader.without_surplus(told, surplus)
                if told is not None:
                    yield told
            patience.renew()
        if not reader.done:
            raise ProviderFailed("The provider's answer ended early.")
    finally:
        answer.close()
    yield reader.usage()


async def surplus_of(tokenizer: Tokenizer, model: str, stop: str, *, before: Ids, generated: Ids) -> int:
    """How many of the tokens *generated* behind *before* lie behind *stop*: a busy engine tells several at once.

    0 if the engine's words don't tell.
    """
    before = before[-(CONTEXT_IDS + len(stop.encode())) :]  # where the stop may have begun: a token is a byte at least
    opening = await tokenizer.text_of(model, before)
    if opening is None:
        return 0
    # One that lies in the opening as a whole came when stops did not count yet.
    start = max(0, len(opening) - len(stop) + 1)
    surplus = 0
    while surplus + 1 < len(generated):
        text = await tokenizer.text_of(model, before + generated[: len(generated) - surplus - 1])
        if text is None or stop not in text[start:]:
            break
        surplus += 1
    return surplus
