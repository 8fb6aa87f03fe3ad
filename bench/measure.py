"""One window: a load generator against one entrant, with the processes and the provider watched meanwhile."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from bench.load import KEY_VARIABLE, Shape, Window
from bench.peers import ROOT, Peer, provider_stats
from bench.provider import Stats
from bench.sample import Meter, difference, machine_busy_s

SAMPLE_S = 0.25
WARMUP_S = 1.0
WINDOW_LIMIT_S = 900.0  # beyond this a load generator is stuck and its window is lost


class WindowError(Exception):
    """A window gave no numbers. The message says why."""


class Cell(msgspec.Struct, frozen=True):
    """One kind of load."""

    shape: Shape
    connections: int

    @property
    def title(self) -> str:
        kind = {"whole": "non-streaming", "stream": "streams of 16 chunks", "mixed": "mixed"}[self.shape]
        return f"{kind}, {self.connections} connection{'s' if self.connections > 1 else ''}"


class Measured(msgspec.Struct, kw_only=True):
    peer: str
    cell: Cell
    window: Window
    cpu_s: dict[str, float]  # by role, over the warm-up, the window and its tail
    load_cpu_s: float
    foreign_share: float  # of the machine's cores, used by programs that are no part of the benchmark
    served: Stats  # what the provider generated for this window


def measure(peer: Peer, provider: Peer, cell: Cell, *, meter: Meter, seconds: float) -> Measured:
    """Drive *peer* and say what came of it.

    Raises: WindowError if the load generator broke or a process of the entrant was replaced meanwhile.
    """
    upstream = Meter(provider.pids)
    served_before = provider_stats(provider)
    cpu_before, upstream_before, busy_before_s = meter.cpu_s(), upstream.cpu_s(), machine_busy_s()
    replaced_before, children_before_s = meter.replaced, children_cpu_s()
    begun_s = time.monotonic()
    window = drive(peer, cell, seconds=seconds, requests=0, on_sample=meter.rss_mib)
    wall_s = time.monotonic() - begun_s
    cpu_s = difference(meter.cpu_s(), cpu_before)
    busy_s = machine_busy_s() - busy_before_s
    load_cpu_s = children_cpu_s() - children_before_s
    upstream_s = 0.0 if peer is provider else sum(difference(upstream.cpu_s(), upstream_before).values())
    if meter.replaced != replaced_before:
        raise WindowError(f"a process of {peer.name} died in {cell.title}")
    foreign_s = busy_s - sum(cpu_s.values()) - load_cpu_s - upstream_s
    return Measured(
        peer=peer.name,
        cell=cell,
        window=window,
        cpu_s=cpu_s,
        load_cpu_s=load_cpu_s,
        foreign_share=max(0.0, foreign_s / wall_s / (os.cpu_count() or 1)),
        served=stats_difference(provider_stats(provider), served_before),
    )


def drive(
    peer: Peer,
    cell: Cell,
    *,
    seconds: float,
    requests: int,
    on_sample: Callable[[], object],
    sample_s: float = SAMPLE_S,
) -> Window:
    """Run the load generator in a process of its own, calling *on_sample* every *sample_s* meanwhile.

    Raises: WindowError if it says nothing within WINDOW_LIMIT_S or breaks.
    """
    command = [sys.executable, "-m", "bench.load", "--url", peer.base_url, "--shape", cell.shape]
    command += ["--connections", str(cell.connections), "--seconds", str(seconds), "--warmup", str(WARMUP_S)]
    command += ["--requests", str(requests)]
    environment = dict(os.environ) | {KEY_VARIABLE: peer.api_key}
    deadline_s = time.monotonic() + WINDOW_LIMIT_S
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        while True:
            on_sample()
            try:
                said, _ = process.communicate(timeout=sample_s)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline_s:
                    process.kill()
    try:
        return msgspec.json.decode(said, type=Window)
    except msgspec.DecodeError as error:
        raise WindowError(f"the load generator ended with {process.returncode} in {cell.title}") from error


def children_cpu_s() -> float:
    """CPU seconds of the children that have ended, which are the load generators."""
    times = os.times()
    return times.children_user + times.children_system


def stats_difference(after: Stats, before: Stats) -> Stats:
    earlier = msgspec.structs.asdict(before)
    return Stats(**{name: value - earlier[name] for name, value in msgspec.structs.asdict(after).items()})
