"""Which ingress a thing belongs to: claimed once, in one step, over all ingresses of a deployment."""

from __future__ import annotations

import base64
import math

import msgspec
import structlog

from bus.connection import WRONG_LAST_SEQUENCE, ApiError, BusUnavailable, Connection
from bus.publisher import Publisher
from schemas import codec, subjects
from schemas.again import Holder
from schemas.errors import QueueUnavailable

log = structlog.get_logger()

CLAIM_TIMEOUT_S = 5.0
TRIES_MAX = 5  # of somebody who always finds that another was quicker, and then that nobody is
NO_MESSAGE = 10037


class Claims:
    """The stream CLAIMS, one message a claim. It lives in memory, and forgets the oldest when it is full."""

    def __init__(self, connection: Connection, publisher: Publisher) -> None:
        self._connection = connection
        self._publisher = publisher

    async def take(self, name: str, holder: Holder, *, ttl_s: float, from_seq: int = 0) -> Held | None:
        """Claims *name* for *holder*, or takes it over from who has it by the message *from_seq*; None if it is theirs now.

        Otherwise: who has it. Raises: QueueUnavailable.
        """
        for _ in range(TRIES_MAX):
            try:
                await self._publish(name, holder, ttl_s=ttl_s, from_seq=from_seq)
            except ApiError as error:
                if error.error_code not in WRONG_LAST_SEQUENCE:
                    raise QueueUnavailable from error
            except BusUnavailable as error:
                raise QueueUnavailable from error
            else:
                return None
            held = await self._held(name)
            if held is not None:
                return held
            from_seq = 0  # it has just expired, or was given back
        raise QueueUnavailable

    async def give_back(self, name: str, holder: Holder) -> None:
        """Ends the claim, if it is still *holder*'s. If nobody can be told now, it expires."""
        try:
            held = await self._held(name)
            if held is not None and held.holder == holder:
                await self._connection.api(f"STREAM.MSG.DELETE.{subjects.CLAIMS}", {"seq": held.seq, "no_erase": True})
        except (ApiError, BusUnavailable, QueueUnavailable) as error:
            log.debug("claim_not_given_back", error=error.message)

    async def _publish(self, name: str, holder: Holder, *, ttl_s: float, from_seq: int) -> None:
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(from_seq),
            "Nats-TTL": str(max(1, math.ceil(ttl_s))),
        }
        await self._publisher.publish(
            subjects.claim(name), codec.encode(holder), timeout_s=CLAIM_TIMEOUT_S, headers=headers
        )

    async def _held(self, name: str) -> Held | None:
        """Raises: QueueUnavailable."""
        try:
            answer = await self._connection.api(
                f"STREAM.MSG.GET.{subjects.CLAIMS}", {"last_by_subj": subjects.claim(name)}
            )
        except ApiError as error:
            if error.error_code == NO_MESSAGE:
                return None
            raise QueueUnavailable from error
        except BusUnavailable as error:
            raise QueueUnavailable from error
        message = answer["message"]
        return Held(seq=message["seq"], holder=codec.decode_holder(base64.b64decode(message["data"])))


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A claim that stands, and the message that made it."""

    seq: int
    holder: Holder
