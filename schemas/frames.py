"""What a worker says to the ingress while it serves an attempt: core NATS, at most once, numbered without gaps.

``Started`` has seq 0; each further frame of the attempt has the next number; one of ``Finished``, ``Faulted`` and
``Yielded`` is the last. The subject carries the attempt's nonce, which is both the capability and the fence.

A *chunk* is a raw JSON object: what the provider said, less the members that are the ingress's own (``id``, ``object``,
``created``, ``model``, ``usage``). It has ``choices`` and whatever else the provider sent, so that tool calls, logprobs,
reasoning and fields nobody has heard of yet pass untouched. For a request without streaming there is one chunk, whose
choices have a ``message`` instead of a ``delta``.
"""

from __future__ import annotations

from msgspec import Raw, Struct

from schemas.ids import RequestId, WorkerId
from schemas.money import Usage

NOT_TOLD = Raw(b"null")  # msgspec takes no union of Raw and None


class Frame(Struct, frozen=True, kw_only=True, tag_field="t", omit_defaults=True):
    request_id: RequestId
    epoch: int
    seq: int


class Started(Frame, frozen=True, kw_only=True, tag="started"):
    """A worker has the job and begins: from here on the ingress owns recovery."""

    worker: WorkerId


class Delta(Frame, frozen=True, kw_only=True, tag="delta"):
    """One or more chunks in order; more than one only when the worker was too busy to send each alone."""

    chunks: tuple[Raw, ...]
    tokens: int = 0  # completion tokens in these chunks, as the worker counts them
    wait_us: int = 0  # on the first: microseconds that the worker waited for its provider
    token_ids: tuple[int, ...] = ()  # of the only choice, where the engine gives them; never shown to the client
    prompt_token_ids: tuple[int, ...] = ()  # on the first


class Finished(Frame, frozen=True, kw_only=True, tag="finished"):
    """The attempt is complete. Chunks that had not been sent yet ride along."""

    chunks: tuple[Raw, ...] = ()
    tokens: int = 0
    wait_us: int = 0
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    usage: Usage | None = None  # the provider's own figure, None if it gave none
    usage_raw: Raw = NOT_TOLD  # the same as the provider wrote it, for the client
    finish_reason: str | None = None  # of the first choice


class Faulted(Frame, frozen=True, kw_only=True, tag="faulted"):
    """The attempt failed at its provider. *code* is of schemas/errors.py; the rest is the provider's, if it gave any."""

    code: str
    message: str
    status: int | None = None
    type: str | None = None
    param: str | None = None
    upstream_code: str | None = None
    retry_after_s: float | None = None


class Yielded(Frame, frozen=True, kw_only=True, tag="yielded"):
    """The worker hands the attempt back as planned: it drains, or its owner came back. Never its fault."""

    reason: str


AnyFrame = Started | Delta | Finished | Faulted | Yielded
LastFrame = Finished | Faulted | Yielded
