"""A request as the queue carries it, how an attempt at it ends, and what is said to and by workers besides frames."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from msgspec import Raw, Struct

from schemas.errors import Fault
from schemas.ids import IngressId, KeyId, Nonce, OrgId, RequestId, RouteId, WorkerId
from schemas.money import Price, Usage
from schemas.standing import UNTOLD, Standing


class Lane(StrEnum):
    """How urgent a job is; a worker asks for the interactive lane first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Timeouts(Struct, frozen=True, kw_only=True):
    """The four time-outs of a request, in seconds."""

    queue_s: float = 60.0  # accepted -> started
    first_token_s: float = 300.0  # started -> first chunk
    idle_s: float = 120.0  # between chunks
    total_s: float = 3600.0  # accepted -> last byte


class TimeLimits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key, a route or a request says of the four time-outs, in seconds; None: nothing."""

    queue_s: float | None = None
    first_token_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


class Continuation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What earlier attempts at a request have delivered to its client, of its only choice: this one goes on right behind it.

    *token_ids* are all that were generated for what was delivered; they and the prompt's are empty where an engine didn't
    give them. Their text may be ahead of *text*: an engine holds back half characters, and what may become a stop sequence.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0  # completion tokens delivered, as the workers counted them
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


class Job(Struct, frozen=True, kw_only=True):
    """One attempt at a request, as published to JOBS; or one that goes on with an answer, as given to a worker by `Take`."""

    request_id: RequestId
    epoch: int  # 1 for the first attempt
    ingress: IngressId
    nonce: Nonce
    org: OrgId
    key_id: KeyId
    model: str  # the public name
    route: RouteId
    stream: bool
    accepted_ns: int  # UTC
    timeouts: Timeouts
    body: Raw  # the client's JSON, untouched
    continuation: Continuation | None = None  # what the answer goes on behind, when it isn't its beginning
    announced: bool = False  # the ingress says regularly that it is there; earlier releases' don't
    not_workers: tuple[WorkerId, ...] = ()  # who failed at this request already and leaves the job to another


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """The provider finished. *usage* is its own figure, None if it gave none."""

    usage: Usage | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The provider could not."""

    fault: Fault


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancelled:
    """The ingress said to stop, mostly because its client left."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HandedBack:
    """The worker stopped as planned, through no fault of its own."""

    reason: str


Outcome = Completed | Failed | Cancelled | HandedBack


class Cancel(Struct, frozen=True, kw_only=True, tag_field="t", tag="cancel"):
    """To a worker: stop this attempt, down to the provider's connection."""

    nonce: Nonce
    reason: str = "client_left"


class Resend(Struct, frozen=True, kw_only=True, tag_field="t", tag="resend"):
    """To a worker: send the attempt's frames again, from *seq* on."""

    nonce: Nonce
    seq: int


class Announce(Struct, frozen=True, kw_only=True, tag_field="t", tag="announce"):
    """To every worker: say now who you are (an ingress has just started)."""


class Take(Struct, frozen=True, kw_only=True, tag_field="t", tag="take"):
    """To a worker: begin this job, which doesn't come by the queue: mostly it goes on with an answer that another one began.

    Without a free slot the worker says so at once; or, with *wait_s*, nothing: others may have been asked as well, and the first
    to begin has it. An answer that goes on is then begun when there is a slot within that time, before all jobs of the queue.
    """

    job: Job
    wait_s: float = 0.0


Command = Cancel | Resend | Announce | Take


class ModelFingerprint(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What exactly a model is: an answer begun by one is only continued by one with the same fingerprint.

    The hashes are the first 16 hex digits of SHA-256.
    """

    name: str  # as the engine was told, a Hugging Face name or a folder's last part
    revision: str | None = None
    tokenizer: str | None = None  # hash of the tokenizer's file
    template: str | None = None  # hash of the chat template
    weights: str | None = None  # hash of the configuration, which names architecture and sizes
    quantisation: str | None = None


class Continues(StrEnum):
    """How a worker goes on with an answer that another one began."""

    NO = "no"
    PREFIX = "prefix"  # behind its text
    EXACT = "exact"  # behind its tokens, where they are known, else behind its text


class ModelOffer(Struct, frozen=True, kw_only=True):
    """A model that a worker serves on a route, and at what price."""

    name: str
    price: Price
    fingerprint: ModelFingerprint | None = None
    continues: Continues = Continues.NO


class EngineStats(Struct, frozen=True, kw_only=True):
    """What a model server said of itself when it was last asked. Tokens are counted from its start."""

    running: int
    waiting: int
    cache_used: float | None = None  # of its memory for keys and values, 0 to 1
    prefix_asked: int | None = None  # prompt tokens that were looked for in the prefix cache
    prefix_found: int | None = None


class RouteOffer(Struct, frozen=True, kw_only=True):
    route: RouteId
    provider: str
    models: tuple[ModelOffer, ...]
    slots: int
    free: int
    down: str | None = None  # why no job is taken at the moment
    engine: EngineStats | None = None  # where the model server tells
    own: bool | None = None  # it runs on the deployment's machines; None: an older worker, which doesn't tell
    parameters: tuple[str, ...] | None = None  # of a request that it is known to honour; None: not known
    held: str | None = None  # why jobs wait in the queue for a short while: its limits are used up
    standing: Standing = UNTOLD


class WorkerState(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


class Presence(Struct, frozen=True, kw_only=True):
    """What a worker says of itself every `PRESENCE_EVERY_S`, and at once when its state changes."""

    worker: WorkerId
    state: WorkerState
    routes: tuple[RouteOffer, ...]
    reason: str | None = None  # why it isn't serving
    started_ns: int = 0  # UTC, when the process began
    version: str = ""
    listens: bool = False  # to `here.<worker>`, so that nobody's listening there tells that its connection is gone
    waits: bool = False  # it knows `Take.wait_s`


class IngressState(StrEnum):
    SERVING = "serving"
    GONE = "gone"  # and everything it had to record is recorded


class IngressPresence(Struct, frozen=True, kw_only=True):
    """What an ingress says of itself every `PRESENCE_EVERY_S`: who works for it, or keeps its books, would otherwise go on in vain."""

    ingress: IngressId
    state: IngressState = IngressState.SERVING
    started_ns: int = 0  # UTC, when the process began
    version: str = ""


PRESENCE_EVERY_S = 2.0
PRESENCE_MISSED_MAX = 3
