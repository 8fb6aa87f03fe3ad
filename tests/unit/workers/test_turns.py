"""Many streams are read in turns; few wait for nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from workers.providers.turns import BUSY_STREAMS, TURN_S, Turns

LONG_S = 60 * TURN_S


@contextlib.contextmanager
def streams(turns: Turns, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(turns.stream())
        yield


def waits_for_nothing(turns: Turns) -> bool:
    try:
        turns.next().send(None)
    except StopIteration:
        return True
    return False


async def took_s(turns: Turns) -> float:
    clock = asyncio.get_running_loop().time
    began = clock()
    await turns.next()
    return clock() - began


async def test_with_few_streams_nothing_is_waited_for() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS - 1):
        assert waits_for_nothing(turns)


async def test_many_streams_have_the_same_turn() -> None:
    turns, woken = Turns(), []

    async def wait(number: int) -> None:
        await turns.next()
        woken.append(number)

    with streams(turns, BUSY_STREAMS):
        waiting = [asyncio.create_task(wait(0))]
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(wait(1)))
        await waiting[0]
        await asyncio.sleep(0)
        assert woken == [0, 1]
        await asyncio.gather(*waiting)


async def test_a_turn_comes_in_time() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS):
        first, second = await took_s(turns), await took_s(turns)
    assert 0 < first < LONG_S
    assert 0 < second < LONG_S


async def test_one_that_is_cancelled_while_it_waits_holds_nobody_up() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS):
        gone, other = asyncio.create_task(turns.next()), asyncio.create_task(turns.next())
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.wait_for(other, LONG_S)


async def test_streams_that_have_ended_do_not_count() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS):
        pass
    with streams(turns, BUSY_STREAMS - 1):
        assert waits_for_nothing(turns)
