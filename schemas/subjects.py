"""Every subject, stream and consumer name: built and parsed here and nowhere else.

jobs.<model>.<route>.<lane>.<org>     JOBS, one job a message
events.<producer>                     EVENTS, one page a message
events.fence.<ingress>                EVENTS, empty: from here on nothing that this ingress writes is stored
control.<entity>.<id>                 CONTROL, one fact a message
claims.<name>                         CLAIMS, one message: which ingress serves an Idempotency-Key
w.<worker>.<ingress>.<nonce>          frames of one attempt (core)
ctl.<worker>  ctl.all                 commands to a worker, or to all (core)
presence.<worker>                     presence (core)
here.<worker>  here.<ingress>         says nothing: whether somebody listens there tells whether that one is connected (core)
presence.ingress.<ingress>            presence of an ingress (core)
again.<ingress>  again.all            asks an ingress, or all, for an answer that it has (core)

A name from outside (a model, a route, an org) is not a subject token: dots split tokens, `*` and `>` are wildcards. `token`
encodes any non-empty text reversibly with letters, digits, `-` and `_`; every other byte of its UTF-8 becomes `=` and two hex digits.
The result is safe in subjects and in consumer names alike.
"""

from __future__ import annotations

import re

from schemas.ids import IngressId, Nonce, WorkerId
from schemas.jobs import Lane

JOBS = "JOBS"
EVENTS = "EVENTS"
CONTROL = "CONTROL"
CLAIMS = "CLAIMS"

ALL_JOBS = "jobs.>"
ALL_EVENTS = "events.>"
ALL_CONTROL = "control.>"
ALL_CLAIMS = "claims.*"
ALL_PRESENCE = "presence.*"
ALL_INGRESS_PRESENCE = "presence.ingress.*"
EVERY_WORKER = "ctl.all"
EVERY_INGRESS = "again.all"

TOKEN_MAX_CHARS = 200

_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_PLAIN = re.compile(rf"[A-Za-z0-9_-]{{1,{TOKEN_MAX_CHARS}}}")
_TOKEN = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9a-f]{2})+")
_ESCAPE = re.compile(rb"=([0-9a-f]{2})")


def token(text: str) -> str:
    """*text* as one subject token; `text_of` turns it back.

    Raises: ValueError if *text* is empty or its token would be longer than `TOKEN_MAX_CHARS`.
    """
    if _PLAIN.fullmatch(text):  # as most names are; a request needs three
        return text
    raw = text.encode()
    encoded = "".join(chr(b) if b in _SAFE else f"={b:02x}" for b in raw)
    if not 0 < len(encoded) <= TOKEN_MAX_CHARS:
        raise ValueError(f"a name must have 1 to {TOKEN_MAX_CHARS} characters as a subject token, not {len(encoded)}")
    return encoded


def text_of(encoded: str) -> str:
    """The text behind a token.

    Raises: ValueError if *encoded* is not what `token` makes.
    """
    if not _TOKEN.fullmatch(encoded):
        raise ValueError(f"{encoded!r} is not an encoded name")
    text = _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), encoded.encode()).decode()
    if token(text) != encoded:
        raise ValueError(f"{encoded!r} is not the encoding of a name")
    return text


def job(*, model: str, route: str, lane: Lane, org: str) -> str:
    return f"jobs.{token(model)}.{token(route)}.{lane.value}.{token(org)}"


def job_filter(*, route: str, lane: Lane, model: str | None = None) -> str:
    """What a consumer takes: everything of a provider account, or one *model* of a pool of machines."""
    return f"jobs.{'*' if model is None else token(model)}.{token(route)}.{lane.value}.*"


def job_consumer(*, route: str, lane: Lane, model: str | None = None) -> str:
    """The consumer's name. No token holds ``==``, so no two consumers share a name; dots and wildcards are not allowed."""
    return "==".join(["route", token(route), lane.value] + ([] if model is None else [token(model)]))


def events(producer: str) -> str:
    return f"events.{token(producer)}"


def producer_of(subject: str) -> str:
    return text_of(subject.removeprefix("events."))


def fence(ingress: IngressId) -> str:
    return f"events.fence.{token(ingress)}"


def control(entity: str, id_: str) -> str:
    return f"control.{token(entity)}.{token(id_)}"


def frames(worker: WorkerId, ingress: IngressId, nonce: Nonce) -> str:
    return f"w.{worker}.{ingress}.{nonce}"


def frames_filter(ingress: IngressId) -> str:
    return f"w.*.{ingress}.*"


def frame_address(subject: str) -> tuple[WorkerId, Nonce]:
    """Who speaks, and of which attempt."""
    _, worker, _, nonce = subject.split(".")
    return WorkerId(worker), Nonce(nonce)


def ctl(worker: WorkerId) -> str:
    return f"ctl.{worker}"


def here(who: WorkerId | IngressId) -> str:
    return f"here.{who}"


def claim(name: str) -> str:
    return f"claims.{token(name)}"


def again(ingress: IngressId) -> str:
    return f"again.{ingress}"


def presence(worker: WorkerId) -> str:
    return f"presence.{worker}"


def ingress_presence(ingress: IngressId) -> str:
    return f"presence.ingress.{ingress}"
