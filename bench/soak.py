"""Memory over 100,000 requests: does any process of `penstock up` grow with the requests it has served?

Half of the requests are streams. The resident memory of each process is read every second. A database that gathers and
writes out, and a collector that waits, make a saw of it, so growth is that of the floor: the last 80% of the requests are cut
into parts, and a straight line is fitted to the lowest reading of each. Writes a section of bench/RESULTS.md and bench/soak.svg.
"""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import machine, report
from bench.load import Window
from bench.measure import Cell, WindowError, drive
from bench.peers import Peer, StartError, provider_stats
from bench.plot import Point, line_chart
from bench.run import RESULTS, complaints, console, end_on_sigterm, entrants
from bench.sample import Meter

SAMPLE_S = 1.0
SETTLED_FROM = 0.2  # of the requests: before it caches fill and pools grow
PARTS = 8  # of the rest: each longer than a tooth of the saw at the default number of requests
FLAT_MIB = 8.0  # per 100,000 requests: 84 bytes a request, less than one small object that is kept
PER = 100_000
CURVE = "soak.svg"


class Soak(msgspec.Struct, kw_only=True):
    window: Window
    curve: dict[str, list[Point]]  # by process: (requests served, MiB)
    growth_mib: dict[str, float]  # by process, for PER requests
    replaced: int  # processes that died meanwhile
    complaints: list[str]
    machine: list[tuple[str, str]]

    @property
    def flat(self) -> bool:
        return not self.replaced and all(growth <= FLAT_MIB for growth in self.growth_mib.values())


def soak(*, requests: int, connections: int) -> Soak:
    """Serve *requests* and fit the growth.

    Raises: StartError if Penstock does not come up, WindowError if the load generator breaks.
    """
    with entrants(["penstock"]) as (provider, entered, home):
        penstock = entered[0]
        meter = Meter(penstock.pids)
        curve: dict[str, list[Point]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("requests", total=requests)

            def sample() -> None:
                served = add_sample(curve, meter, provider)
                progress.update(task, completed=served, refresh=True)

            cell = Cell("mixed", connections)
            window = drive(penstock, cell, seconds=0, requests=requests, on_sample=sample, sample_s=SAMPLE_S)
            sample()
        return Soak(
            window=window,
            curve=curve,
            growth_mib={role: growth(line) for role, line in curve.items()},
            replaced=meter.replaced,
            complaints=complaints(penstock.log) if penstock.log else [],
            machine=machine.describe(home),
        )


def add_sample(curve: dict[str, list[Point]], meter: Meter, provider: Peer) -> int:
    """One point more for each process; the provider counts the requests, for it sees each of them once."""
    served = provider_stats(provider).requests
    for role, mib in meter.rss_mib().items():
        curve.setdefault(role, []).append((float(served), mib))
    return served


def growth(line: Sequence[Point]) -> float:
    """MiB for PER requests: the slope of the least-squares line through the floor; 0 where there are too few readings."""
    points = floor(line)
    mean_x, mean_y = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread * PER


def floor(line: Sequence[Point]) -> list[Point]:
    """The lowest reading in each of PARTS equal parts of the settled requests."""
    begin, end = line[-1][0] * SETTLED_FROM, line[-1][0]
    parts: dict[int, list[Point]] = {}
    for x, y in line:
        if x >= begin:
            parts.setdefault(min(PARTS - 1, int((x - begin) / max(1.0, end - begin) * PARTS)), []).append((x, y))
    return [min(part, key=lambda point: point[1]) for part in parts.values()]


def soak_markdown(result: Soak) -> str:
    window = result.window
    verdict = "Flat" if result.flat else "**Not flat**"
    rows = [
        [
            role,
            f"{line[0][1]:.0f}",
            f"{settled_mib(line):.0f}",
            f"{line[-1][1]:.0f}",
            f"{max(y for _, y in line):.0f}",
            f"{result.growth_mib[role]:+.1f}",
        ]
        for role, line in result.curve.items()
    ]
    heads = [
        "process",
        "at start, MiB",
        f"after {SETTLED_FROM:.0%}",
        "at the end",
        "peak",
        f"growth, MiB per {PER:,} requests",
    ]
    lines = [
        "## Memory over many requests\n",
        (
            f"{verdict}: {window.total:,} requests, half of them streams of 16 chunks, at {window.connections} "
            f"connections, {window.rate:,.0f} a second, {window.failed} failed, the longest took "
            f"{window.longest_ms:,.0f} ms. Growth is the slope of a straight line through the "
            f"floor of the last {1 - SETTLED_FROM:.0%} of the requests; up to {FLAT_MIB:g} MiB counts as flat.\n"
        ),
        report.table(heads, rows),
        f"![Resident memory of each process against the requests served]({CURVE})\n",
        *(f"- {name}: {value}" for name, value in result.machine[:5]),
        f"- processes that died meanwhile: {result.replaced}",
        f"- lines of level warning or above in the log: {len(result.complaints)}",
        *(f"  - `{line}`" for line in result.complaints[:5]),
    ]
    return "\n".join(lines) + "\n"


def settled_mib(line: Sequence[Point]) -> float:
    return next(y for x, y in line if x >= line[-1][0] * SETTLED_FROM)


def curve_svg(curve: Mapping[str, Sequence[Point]]) -> str:
    return line_chart(curve, title="Resident memory of each process", x_title="requests served", y_title="MiB")


@click.command(
    help=__doc__.split("\n\n", maxsplit=1)[0], epilog="Example: python -m bench.soak --requests 20000 --out soak.md"
)
@click.option("--requests", type=click.IntRange(100, 10_000_000), default=100_000, show_default=True)
@click.option("--connections", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--check", is_flag=True, help="Exit with 1 if memory grows.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Default: bench/RESULTS.md.")
def main(*, requests: int, connections: int, check: bool, out: Path) -> None:
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        result = soak(requests=requests, connections=connections)
    except (StartError, WindowError) as error:
        raise click.ClickException(str(error)) from error
    text = soak_markdown(result)
    console.print(Markdown(text))
    report.write_section(out, "soak", text)
    (out.parent / CURVE).write_text(curve_svg(result.curve), encoding="utf-8")
    raise SystemExit(int(bool(result.window.failed) or (check and not result.flat)))


if __name__ == "__main__":
    main()
