"""An ingress that missed a worker's last word looks what that worker has put on record."""

from __future__ import annotations

import time

from bus.connection import Connection
from bus.log import EventLog
from bus.publisher import Publisher
from ingress.receipts import Receipts
from schemas.events import AttemptFinished
from schemas.ids import EventId, KeyId, OrgId, RouteId, WorkerId, new_id
from schemas.money import Usage
from tests.factories import make_event, new_job

WORKER = WorkerId("worker-a")
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)


async def test_a_receipt_is_found_in_the_last_page_of_its_worker_and_nowhere_else(
    connection: Connection, publisher: Publisher
) -> None:
    receipts, log = Receipts(connection), EventLog(connection, publisher, producer=WORKER)
    job = new_job()
    assert await receipts.usage(job, WORKER) is None
    receipt = AttemptFinished(
        id=EventId(new_id()),
        ts_ns=time.time_ns(),
        org=OrgId("default"),
        request_id=job.request_id,
        epoch=job.epoch,
        producer=WORKER,
        key_id=KeyId("key"),
        route=RouteId("r1"),
        worker=WORKER,
        provider="openai",
        model="m",
        upstream_model="m",
        outcome="completed",
        usage=USAGE,
    )
    log.note(receipt)
    log.note(make_event())
    await log.flush()
    assert await receipts.usage(job, WORKER) == USAGE
    assert await receipts.usage(job, WorkerId("worker-b")) is None
    assert await receipts.usage(new_job(), WORKER) is None
    await log.append(make_event())
    assert await receipts.usage(job, WORKER) is None
