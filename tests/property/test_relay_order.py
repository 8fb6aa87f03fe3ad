"""Whatever happens to frames on their way, the reader gets them in order and whole, or an error: never anything else."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from ingress.relay import OUT_OF_ORDER_MAX, Relay, Switchboard
from schemas import codec, subjects
from schemas.errors import FrameGap, PenstockError
from schemas.frames import AnyFrame, Delta, Finished, Started
from schemas.ids import IngressId, RequestId, WorkerId, new_nonce
from schemas.jobs import Cancel, Resend
from tests.unit.ingress.doubles import Message, Wall

WORKER, OTHER = WorkerId("worker-a"), WorkerId("worker-b")
INGRESS = IngressId("ingress-a")
REQUEST = RequestId("r")
FRAMES_MAX = 30
BIG = 1 << 30


def frames_of(count: int, *, mark: str = "", epoch: int = 1, worker: WorkerId = WORKER) -> list[AnyFrame]:
    """An attempt of *count* frames; each tells its number, and *mark*."""
    middle = [
        Delta(request_id=REQUEST, epoch=epoch, seq=seq, chunks=(Raw(b'"%b%d"' % (mark.encode(), seq)),))
        for seq in range(1, count - 1)
    ]
    return [
        Started(request_id=REQUEST, epoch=epoch, seq=0, worker=worker),
        *middle,
        Finished(request_id=REQUEST, epoch=epoch, seq=count - 1),
    ]


def board(wall: Wall, *, max_bytes: int = BIG) -> Switchboard:
    return Switchboard(wall, ingress=INGRESS, max_bytes_per_relay=max_bytes)  # type: ignore[arg-type]  # as much of one as is used


async def everything(relay: Relay) -> list[AnyFrame]:
    """What there is to be had now."""
    found: list[AnyFrame] = []
    while frames := await relay.take(0.0):
        found += frames
    return found


counts = st.integers(2, FRAMES_MAX)


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[int]]:
    """How many frames there are, and in which order, how often and whether at all they arrive."""
    count = draw(counts)
    order = draw(st.permutations(range(count)))
    doubled = draw(st.lists(st.integers(0, count - 1), max_size=count))
    lost = draw(st.sets(st.integers(0, count - 1), max_size=3))
    arrivals = [seq for seq in order if seq not in lost]
    for seq in doubled:
        if seq not in lost:
            arrivals.insert(draw(st.integers(0, len(arrivals))), seq)
    return count, arrivals


@given(deliveries())
def test_any_order_of_arrival_gives_a_beginning_of_the_original_order(given_: tuple[int, list[int]]) -> None:
    count, arrivals = given_

    async def run() -> None:
        sent = frames_of(count)
        relay = board(Wall()).open(new_nonce())
        got: list[AnyFrame] = []
        for seq in arrivals:
            assert relay.feed(sent[seq], 1, worker=WORKER)
            got += await everything(relay)
        missing = sorted(set(range(count)) - set(arrivals))
        assert got == sent[: missing[0] if missing else count]
        relay.close()

    asyncio.run(run())


@given(deliveries(), st.data())
def test_what_was_lost_is_asked_for_and_completes_the_stream(
    given_: tuple[int, list[int]], data: st.DataObject
) -> None:
    """The worker answers each request for a resend with everything from there on, in order, as Reporter.resend does."""
    count, arrivals = given_

    async def run() -> None:
        sent, wall = frames_of(count), Wall()
        switchboard = board(wall)
        relay = switchboard.open(new_nonce())
        got: list[AnyFrame] = []
        for seq in arrivals:
            relay.feed(sent[seq], 1, worker=WORKER)
            got += await everything(relay)
        answered = 0
        if relay.worker is not None:
            relay.ask_again()  # what a reconnect does: the last frames are missed by nobody
        while len(got) < count and relay.worker is not None:
            await asyncio.sleep(0)
            for subject, command in wall.commands[answered:]:
                assert isinstance(command, Resend)
                assert subject == subjects.ctl(WORKER)
                assert command.nonce == relay.nonce
                for frame in sent[command.seq :]:
                    if data.draw(st.booleans()) or frame.seq == len(got):
                        relay.feed(frame, 1, worker=WORKER)
                        got += await everything(relay)
            answered = len(wall.commands)
            relay.ask_again()
        assert got == (sent if arrivals else [])
        relay.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_a_second_worker_with_the_same_job_never_speaks_in_between(arrivals: list[tuple[bool, int]]) -> None:
    """The queue delivers a job again when the acknowledgement is lost: then two workers use one nonce."""

    async def run() -> None:
        streams = {
            WORKER: frames_of(10, mark="a"),
            OTHER: frames_of(10, mark="b", worker=OTHER),
        }
        relay = board(Wall()).open(new_nonce())
        got: list[AnyFrame] = []
        first = None
        for other, seq in arrivals:
            worker = OTHER if other else WORKER
            first = first or worker
            assert relay.feed(streams[worker][seq], 1, worker=worker) is (worker == first)
            got += await everything(relay)
        if first is not None:
            assert got == streams[first][: len(got)]
        relay.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=60))
def test_frames_of_another_epoch_never_reach_the_reader_of_this_one(arrivals: list[tuple[int, int]]) -> None:
    """Each attempt has a nonce of its own: an old one is unknown once it is closed, and whoever uses it is told to stop."""

    async def run() -> None:
        wall = Wall()
        switchboard = board(wall)
        await switchboard.start()
        old, new = switchboard.open(new_nonce()), switchboard.open(new_nonce())
        switchboard.close(old)
        nonces = [old.nonce, new.nonce, new_nonce()]
        streams = [frames_of(10, mark=f"{number}", epoch=number) for number in range(3)]
        got: list[AnyFrame] = []
        for number, seq in arrivals:
            subject = subjects.frames(WORKER, INGRESS, nonces[number])
            wall.listeners[subjects.frames_filter(INGRESS)](Message(subject, codec.encode(streams[number][seq])))
            got += await everything(new)
        assert [codec.encode(frame) for frame in got] == [codec.encode(frame) for frame in streams[1][: len(got)]]
        await asyncio.sleep(0)
        stopped = [command.nonce for _, command in wall.commands if isinstance(command, Cancel)]
        strange = [nonces[number] for number, seq in arrivals if number != 1 and seq < 9]
        assert stopped == strange
        switchboard.close(new)

    asyncio.run(run())


@given(st.integers(2, 200), st.integers(1, 100), st.integers(1, 2000))
def test_what_waits_is_bounded_by_bytes_in_order_and_out_of_it(count: int, size: int, max_bytes: int) -> None:
    async def run() -> None:
        overflows = []
        switchboard = board(Wall(), max_bytes=max_bytes)
        sent = frames_of(count)
        ordered = switchboard.open(new_nonce(), on_overflow=lambda: overflows.append(True))
        for frame in sent:
            ordered.feed(frame, size, worker=WORKER)
            assert ordered._bytes <= max_bytes + size
        assert bool(overflows) is (ordered.gone == "client_too_slow") is ((count - 1) * size > max_bytes)
        assert len(overflows) <= 1
        held = switchboard.open(new_nonce())
        for frame in reversed(sent[1:]):
            held.feed(frame, size, worker=WORKER)
            assert held._held_bytes <= max_bytes
        if (count - 1) * size > max_bytes:
            assert isinstance(await _error(held), FrameGap)
        for relay in (ordered, held):
            switchboard.close(relay)

    asyncio.run(run())


async def _error(relay: Relay) -> PenstockError | None:
    try:
        await relay.take(0.0)
    except PenstockError as error:
        return error
    return None


def test_frames_out_of_order_are_bounded_in_number() -> None:
    async def run() -> None:
        relay = board(Wall()).open(new_nonce())
        for frame in frames_of(OUT_OF_ORDER_MAX + 3)[1:]:
            relay.feed(frame, 1, worker=WORKER)
        assert isinstance(await _error(relay), FrameGap)
        relay.close()

    asyncio.run(run())
