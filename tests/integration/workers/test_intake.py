"""The intake: who is asked for jobs while routes go up and down."""

from __future__ import annotations

import asyncio

from bus.connection import Connection, Message
from bus.publisher import Publisher
from bus.puller import Puller
from schemas import subjects
from schemas.ids import OrgId, RouteId
from schemas.jobs import Lane
from schemas.settings import NatsSettings
from tests.waiting import eventually
from workers.intake import Intake

ROUTE = RouteId("r")
SUBJECT = subjects.job(model="m", route=ROUTE, lane=Lane.INTERACTIVE, org=OrgId("o"))


async def test_a_route_that_comes_up_while_its_intake_starts_gets_jobs(
    connection: Connection, publisher: Publisher
) -> None:
    """An engine that runs already answers its test request before the queue has made the consumer."""
    taken: list[bytes] = []
    intake = _intake(connection, taken)
    intake.pause()
    starting = asyncio.create_task(intake.start(("m",)))
    await asyncio.sleep(0)  # from here on it waits for the queue
    intake.resume()
    await starting
    await publisher.publish(SUBJECT, b"job", timeout_s=5.0)
    await eventually(lambda: taken == [b"job"])
    await intake.stop()


async def test_a_route_that_goes_down_while_its_intake_starts_gets_none(
    connection: Connection, publisher: Publisher
) -> None:
    taken: list[bytes] = []
    intake = _intake(connection, taken)
    starting = asyncio.create_task(intake.start(("m",)))
    await asyncio.sleep(0)
    intake.pause()
    await starting
    await publisher.publish(SUBJECT, b"job", timeout_s=5.0)
    await asyncio.sleep(0.3)
    assert taken == []
    intake.resume()
    await eventually(lambda: taken == [b"job"])
    await intake.stop()


def _intake(connection: Connection, taken: list[bytes]) -> Intake:
    def take(message: Message, _: Puller) -> None:
        taken.append(message.data)
        assert connection.say_at_once([(message.reply, b"+ACK")])

    return Intake(connection, ROUTE, slots=1, nats_settings=NatsSettings(), take=take, pool=False)
