"""The comparison: Penstock, LiteLLM's proxy and the provider called directly, interleaved in one run.

All entrants are up at once and one of them is driven at a time; each round takes every load to every entrant, the order
turned by one from round to round. The result is the median over the rounds, written to bench/RESULTS.md.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import click
import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import machine, peers, report, witness
from bench.measure import Cell, Measured, WindowError, measure
from bench.peers import ROOT, Peer, StartError
from bench.report import CELLS, Comparison
from bench.sample import Meter, difference

RESULTS = ROOT / "bench" / "RESULTS.md"
ENTRANTS = ("direct", "litellm", "penstock")
IDLE_S = 3.0
WARM_S = 2.0
ROUNDS_LIMIT = 100
COMPLAINT_LEVELS = ("warning", "error", "critical")
COMPLAINTS_LIMIT = 100

console = Console(stderr=True)


def compare(names: Sequence[str], *, rounds: int, seconds: float) -> Comparison:
    """Run the whole comparison.

    Raises: StartError if an entrant does not come up, WindowError if a window gives no numbers.
    """
    with entrants(names) as (provider, entered, home):
        meters = {peer.name: Meter(peer.pids) for peer in entered}
        for peer in entered:
            console.print(f"warming up {peer.name}")
        warm = [
            measure(peer, provider, cell, meter=meters[peer.name], seconds=WARM_S) for peer in entered for cell in CELLS
        ]
        idle_cores = observe_idle(meters)
        measured = drive_all(entered, provider, meters=meters, rounds=rounds, seconds=seconds)
        ledgers = {peer.name: peer.ledger for peer in entered if peer.ledger is not None}
        theirs = [(name, ledger, [m for m in warm + measured if m.peer == name]) for name, ledger in ledgers.items()]
        seen = [witness.ask(ledger, all_of_it) for _, ledger, all_of_it in theirs]
        return Comparison(
            measured=measured,
            peak_mib={name: meter.peak_mib for name, meter in meters.items()},
            idle_cores=idle_cores,
            complaints=[line for peer in entered if peer.ledger and peer.log for line in complaints(peer.log)],
            machine=machine.describe(home),
            witness=seen[0] if seen else None,
            seconds=seconds,
            rounds=rounds,
        )


@contextmanager
def entrants(names: Sequence[str]) -> Iterator[tuple[Peer, list[Peer], Path]]:
    """The provider, the named entrants in front of it, and the folder they keep their files in: on a disk, not in memory."""
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with ExitStack() as stack:
        home = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache, ignore_cleanup_errors=True))
        )
        provider = stack.enter_context(peers.provider())
        entered = []
        for name in names:
            console.print(f"starting {name}")
            if name == "litellm":
                entered.append(stack.enter_context(peers.litellm(provider.base_url, home / name)))
            elif name == "penstock":
                entered.append(stack.enter_context(peers.penstock(provider.base_url, home / name)))
            else:
                entered.append(provider)
        yield provider, entered, home


def observe_idle(meters: dict[str, Meter]) -> dict[str, dict[str, float]]:
    """The share of one core that each process uses while nothing is asked of it."""
    before = {name: meter.cpu_s() for name, meter in meters.items()}
    time.sleep(IDLE_S)
    return {
        name: {role: used_s / IDLE_S for role, used_s in difference(meter.cpu_s(), before[name]).items()}
        for name, meter in meters.items()
    }


def drive_all(
    entered: Sequence[Peer], provider: Peer, *, meters: dict[str, Meter], rounds: int, seconds: float
) -> list[Measured]:
    measured = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # its thread would cost CPU
        task = progress.add_task("", total=rounds * len(CELLS) * len(entered))
        for peer, cell in schedule(entered, rounds):
            progress.update(task, description=f"{peer.name}: {cell.title}", refresh=True)
            one = measure(peer, provider, cell, meter=meters[peer.name], seconds=seconds)
            measured.append(one)
            progress.console.print(summary_line(one), soft_wrap=True)
            progress.advance(task)
    return measured


def schedule(entered: Sequence[Peer], rounds: int) -> Iterator[tuple[Peer, Cell]]:
    """Every load on every entrant in each round; who goes first moves on by one each time."""
    for number in range(rounds):
        for cell in CELLS:
            for place in range(len(entered)):
                yield entered[(number + place) % len(entered)], cell


def summary_line(one: Measured) -> str:
    window = one.window
    times = f"p50 {window.p50_ms:.2f} ms, p99 {window.p99_ms:.2f} ms, longest {window.longest_ms:.0f} ms"
    failed = f", [red]{window.failed} failed: {window.errors}[/red]" if window.failed else ""
    return f"{one.peer}: {one.cell.title}: {window.rate:,.1f}/s, {times}{failed}"


def complaints(log: Path) -> list[str]:
    """The lines of a structlog log in JSON whose level is warning or above, and those that are no JSON at all."""
    found: list[str] = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if len(found) < COMPLAINTS_LIMIT and is_complaint(line):
            found.append(line[:300])
    return found


def is_complaint(line: str) -> bool:
    if not line.startswith("{"):
        return any(word in line for word in ("Traceback", "Error", "WARN", "warning"))
    try:
        said = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.MsgspecError:
        return True
    return said.get("level") in COMPLAINT_LEVELS


def end_on_sigterm(signum: int, frame: FrameType | None) -> None:
    """Unwind, so that the entrants are stopped too."""
    del frame
    raise SystemExit(128 + signum)


@click.command(
    help=__doc__.split("\n\n", maxsplit=1)[0],
    epilog="Example, a quick look without LiteLLM: python -m bench.run --only direct,penstock --rounds 1 --seconds 2",
)
@click.option("--only", default=",".join(ENTRANTS), show_default=True, help="Entrants, with commas between.")
@click.option("--rounds", type=click.IntRange(1, ROUNDS_LIMIT), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.2, 120.0), default=6.0, show_default=True, help="Of each window.")
@click.option("--check", is_flag=True, help="Exit with 1 if a target is missed or the ledger disagrees.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to write; default: bench/RESULTS.md if all take part."
)
def main(*, only: str, rounds: int, seconds: float, check: bool, out: Path | None) -> None:
    names = [name.strip() for name in only.split(",")]
    if unknown := set(names) - set(ENTRANTS):
        raise click.BadParameter(f"no such entrant: {', '.join(sorted(unknown))}", param_hint="--only")
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        comparison = compare(names, rounds=rounds, seconds=seconds)
    except (StartError, WindowError) as error:
        raise click.ClickException(str(error)) from error
    text = report.comparison_markdown(comparison)
    Console(width=160 if not sys.stdout.isatty() else None).print(Markdown(text))
    if out is not None or set(names) == set(ENTRANTS):
        report.write_section(out or RESULTS, "comparison", text)
    raise SystemExit(exit_code(comparison, check=check))


def exit_code(comparison: Comparison, *, check: bool) -> int:
    agreed = comparison.witness is None or comparison.witness.agrees
    if comparison.failed:
        return 1
    return int(check and not (agreed and report.targets_met(comparison)))


if __name__ == "__main__":
    main()
