"""A claim is one process's, however many ask at once."""

from __future__ import annotations

import asyncio

import pytest

from bus.claims import Claims
from bus.connection import Connection
from bus.publisher import Publisher
from bus.streams import ensure_streams, stream_state
from schemas.again import Holder
from schemas.ids import IngressId, RequestId
from schemas.settings import NatsSettings
from tests.waiting import eventually


@pytest.fixture
async def claims(connection: Connection, publisher: Publisher) -> Claims:
    await ensure_streams(connection, NatsSettings())
    return Claims(connection, publisher)


def holder(number: int) -> Holder:
    return Holder(ingress=IngressId(f"ingress-{number}"), request_id=RequestId(f"r{number}"), fingerprint=b"f")


async def test_of_many_at_once_one_has_it_and_the_others_are_told_who(claims: Claims) -> None:
    found = await asyncio.gather(*(claims.take("c", holder(number), ttl_s=60) for number in range(20)))
    winners = [number for number, held in enumerate(found) if held is None]
    assert len(winners) == 1
    assert {held.holder.ingress for held in found if held is not None} == {f"ingress-{winners[0]}"}
    assert await claims.take("another", holder(1), ttl_s=60) is None


async def test_one_whose_holder_is_gone_is_taken_over_once(claims: Claims) -> None:
    assert await claims.take("c", holder(0), ttl_s=60) is None
    held = await claims.take("c", holder(1), ttl_s=60)
    assert held is not None
    takers = [claims.take("c", holder(number), ttl_s=60, from_seq=held.seq) for number in range(1, 9)]
    found = await asyncio.gather(*takers)
    assert sum(taken is None for taken in found) == 1


async def test_only_its_holder_gives_it_back(claims: Claims) -> None:
    assert await claims.take("c", holder(0), ttl_s=60) is None
    await claims.give_back("c", holder(1))
    assert await claims.take("c", holder(2), ttl_s=60) is not None
    await claims.give_back("c", holder(0))
    await claims.give_back("c", holder(0))
    assert await claims.take("c", holder(2), ttl_s=60) is None


async def test_it_expires(claims: Claims, connection: Connection) -> None:
    assert await claims.take("c", holder(0), ttl_s=1) is None

    async def none() -> bool:
        return bool((await stream_state(connection, "CLAIMS"))["messages"] == 0)

    await eventually(none, timeout_s=10, every_s=0.1)
    assert await claims.take("c", holder(1), ttl_s=60) is None
