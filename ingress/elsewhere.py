"""Whether another ingress serves a request with an Idempotency-Key already, and its answer, as if it were made here."""

from __future__ import annotations

import asyncio

from bus.claims import Claims, Held
from ingress.archive import Claim, fingerprint
from ingress.neighbours import FarReader, Neighbours
from ingress.stopping import uncancel
from ingress.transcript import EVENT, Transcript
from schemas.again import Ask, Holder
from schemas.errors import AnswerNotFound, AnswerNotKept, IdempotencyKeyReused, QueueUnavailable
from schemas.ids import IngressId, RequestId

HOLDERS_MAX = 5  # of one claim that are gone, one after the other
GIVE_BACK_WAIT_S = 1.0  # for a claim to be free


class Elsewhere:
    """*ttl_s*: for how long a claim points to its ingress, counted from the request's beginning."""

    def __init__(self, claims: Claims, neighbours: Neighbours, *, ingress: IngressId, ttl_s: float) -> None:
        self._claims = claims
        self._neighbours = neighbours
        self._ingress = ingress
        self._ttl_s = ttl_s
        self._giving_back: set[asyncio.Future[None]] = set()

    async def look(self, claim: Claim, request_id: RequestId, body: bytes) -> FarReader | None:
        """The answer that another ingress has, or is making; None if the request is ours now: nobody has it.

        Raises: IdempotencyKeyReused, AnswerNotKept, QueueUnavailable.
        """
        mine = self._holder(request_id, body)
        gone_seq = 0
        for _ in range(HOLDERS_MAX):
            held = await self._claims.take(claim.name, mine, ttl_s=self._ttl_s, from_seq=gone_seq)
            if held is None:
                return None
            far = await self._far(held, claim)
            if far is not None:
                if held.holder.fingerprint != mine.fingerprint:
                    raise IdempotencyKeyReused
                return far
            gone_seq = held.seq
        raise QueueUnavailable

    async def give_back(self, claim: Claim, request_id: RequestId, body: bytes) -> None:
        """What was neither served nor billed may be tried again, by anybody.

        Returns when the claim is free, or can't be freed: by then its client may be told. It waits for `GIVE_BACK_WAIT_S` at most, and
        what takes longer goes on behind.
        """
        work = asyncio.ensure_future(self._claims.give_back(claim.name, self._holder(request_id, body)))
        self._giving_back.add(work)
        work.add_done_callback(self._giving_back.discard)
        try:
            await asyncio.wait([work], timeout=GIVE_BACK_WAIT_S)
        except asyncio.CancelledError:  # the process stops
            uncancel()

    async def _far(self, held: Held, claim: Claim) -> FarReader | None:
        """None if who holds it is gone or has forgotten: a claim of ours that isn't in the archive is over, too."""
        holder = held.holder
        if holder.ingress == self._ingress:
            return None
        ask = Ask(request_id=holder.request_id, org=claim.owner.org, key_id=claim.owner.key_id, claimed=True)
        try:
            return await self._neighbours.read(ask, holder.ingress)
        except AnswerNotFound:
            return None

    def _holder(self, request_id: RequestId, body: bytes) -> Holder:
        return Holder(ingress=self._ingress, request_id=request_id, fingerprint=fingerprint(body))


async def mirror(far: FarReader, transcript: Transcript, *, header: tuple[bytes, bytes]) -> bool:
    """Tells *transcript* what *far* reads, with a further *header*, as long as anybody reads it.

    False if nothing could be told, because who has it is gone.
    """
    try:
        while not far.status and not transcript.is_deserted:
            await far.wait()
        if transcript.is_deserted:
            return True
        headers = [*far.headers, header]
        transcript.take({"type": "http.response.start", "status": far.status, "headers": headers})
        stream = any(value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type")
        while not transcript.is_deserted and (body := await far.next()):
            event = {EVENT: far.last} if stream else {}
            transcript.take({"type": "http.response.body", "body": body, "more_body": True, **event})
    except AnswerNotKept:
        if not transcript.status:
            return False
        transcript.lose()  # how it ended is known there, or to nobody
        return True
    if not transcript.is_deserted:
        transcript.take({"type": "http.response.body", "body": b"", "more_body": False})
    return True
