"""The job queue as the ingress sees it: publish a job, withdraw one that nobody has started."""

from __future__ import annotations

import math

from bus.connection import ApiError, BusUnavailable, Connection, MessageTooLarge
from bus.publisher import Publisher
from schemas import codec, subjects
from schemas.errors import BacklogFull, BadRequest, QueueUnavailable
from schemas.jobs import Job, Lane

STORE_REFUSED = 10077  # a bound of the stream: of the subject's messages or of its bytes
NO_MESSAGE = 10037
PUBLISH_TIMEOUT_S = 5.0


class JobQueue:
    def __init__(self, connection: Connection, publisher: Publisher) -> None:
        self._connection = connection
        self._publisher = publisher

    @property
    def is_up(self) -> bool:
        return self._connection.is_up

    async def publish(self, job: Job, *, lane: Lane = Lane.INTERACTIVE) -> int:
        """The job's sequence number, once JOBS holds it. It leaves by itself after its ``queue`` time-out.

        Raises: BacklogFull over the org's bound, BadRequest over the server's payload, QueueUnavailable.
        """
        headers = {
            "Nats-Msg-Id": f"{job.request_id}.{job.epoch}",
            "Nats-TTL": str(max(1, math.ceil(job.timeouts.queue_s))),
        }
        subject = subjects.job(model=job.model, route=job.route, lane=lane, org=job.org)
        try:
            return await self._publisher.publish(
                subject, codec.encode(job), timeout_s=PUBLISH_TIMEOUT_S, headers=headers
            )
        except MessageTooLarge as error:
            raise BadRequest(
                f"the request is larger than the queue takes ({self._connection.max_payload} bytes)"
            ) from error
        except ApiError as error:
            if error.error_code == STORE_REFUSED:
                raise BacklogFull from error
            raise QueueUnavailable from error
        except BusUnavailable as error:
            raise QueueUnavailable from error

    async def withdraw(self, seq: int) -> bool:
        """Takes a job back out of the queue; False if it was gone already (taken, expired or withdrawn).

        A worker may hold it at the same moment: whoever hears ``Started`` of a withdrawn job must cancel it.
        """
        try:
            answer = await self._connection.api(f"STREAM.MSG.DELETE.{subjects.JOBS}", {"seq": seq, "no_erase": True})
        except ApiError:
            return False
        except BusUnavailable:
            return False  # it expires by itself
        return bool(answer.get("success"))
