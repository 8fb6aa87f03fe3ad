"""What comes to many streams is taken in turns; few wait for nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from workers.providers.turns import BUSY_STREAMS, TURN_S, Turns

LONG_S = 60 * TURN_S


@contextlib.contextmanager
def streams(turns: Turns, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(turns.stream())
        yield


def reader() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


async def test_with_few_streams_nothing_is_waited_for() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS - 1):
        assert not turns.gather(reader())


async def test_many_streams_have_the_same_turn() -> None:
    turns, first, second, third = Turns(), reader(), reader(), reader()
    with streams(turns, BUSY_STREAMS):
        assert turns.gather(first)
        await asyncio.sleep(TURN_S / 2)
        assert turns.gather(second)
        assert not first.done()
        await asyncio.wait_for(first, LONG_S)
        assert second.done()
        assert turns.gather(third)
        assert not third.done()


async def test_a_turn_comes_in_time() -> None:
    turns, clock = Turns(), asyncio.get_running_loop().time
    with streams(turns, BUSY_STREAMS):
        for _ in range(2):
            began, waiting = clock(), reader()
            turns.gather(waiting)
            await waiting
            assert TURN_S / 2 < clock() - began < LONG_S


async def test_one_that_is_cancelled_while_it_waits_holds_nobody_up() -> None:
    turns, gone, other = Turns(), reader(), reader()
    with streams(turns, BUSY_STREAMS):
        turns.gather(gone)
        turns.gather(other)
        gone.cancel()
        await asyncio.wait_for(other, LONG_S)


async def test_streams_that_have_ended_do_not_count() -> None:
    turns = Turns()
    with streams(turns, BUSY_STREAMS):
        pass
    with streams(turns, BUSY_STREAMS - 1):
        assert not turns.gather(reader())
