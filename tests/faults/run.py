"""The fault suite from the command line: `make faults ARGS="--faults 10000 --seed 1"`."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.faults import report
from tests.faults.deployment import Plan, deployed
from tests.faults.faults import chosen
from tests.faults.previous import NoHistory, previous_release
from tests.faults.runner import Orders, Result, Round, Run
from tests.faults.verdict import summary

console = Console()
OLD = ("ingress-2", "worker-2")  # who is of the previous release, with --previous
OUT = Path("build") / "faults" / "report.json"


@click.command(help=__doc__.split(":", maxsplit=1)[0])
@click.option("--faults", type=click.IntRange(1), default=500, show_default=True, help="How many to inject.")
@click.option("--seed", type=int, help="The dice; a run with the same seed strikes the same. Default: by the clock.")
@click.option("--only", default="", help="Names with wildcards, separated by commas: kill-*,cut-worker-nats")
@click.option("--servers", type=click.Choice(["1", "3"]), default="1", show_default=True, help="NATS servers.")
@click.option("--previous", is_flag=True, help="One ingress and one worker are of the previous release.")
@click.option("--engines/--no-engines", default=True, show_default=True, help="Workers with engines of their own, too.")
@click.option("--lanes", type=click.IntRange(1, 32), default=3, show_default=True, help="Faults at once.")
@click.option("--steady", is_flag=True, help="One fault at a time, and the next when everybody serves again.")
@click.option("--clients", type=click.IntRange(1, 1000), default=16, show_default=True)
@click.option(
    "--round", "round_size", type=click.IntRange(1), default=200, show_default=True, help="Faults to a verdict."
)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="The report, as JSON.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep logs and the ledger here.")
def main(
    *,
    faults: int,
    seed: int | None,
    only: str,
    servers: str,
    previous: bool,
    engines: bool,
    lanes: int,
    steady: bool,
    clients: int,
    round_size: int,
    out: Path,
    keep: Path | None,
) -> None:
    seed = int(time.time()) if seed is None else seed
    try:
        kinds = chosen([name for name in only.split(",") if name], servers=int(servers), engines=engines)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    orders = Orders(
        faults=faults,
        kinds=kinds,
        seed=seed,
        round_size=round_size,
        lanes=1 if steady else lanes,
        clients=clients,
        steady=steady,
    )
    with tempfile.TemporaryDirectory(prefix="penstock-faults-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.UsageError(f"{folder} is not empty")
        try:
            roots = dict.fromkeys(OLD, previous_release(folder / "previous")) if previous else {}
        except NoHistory as error:
            raise click.ClickException(str(error)) from error
        plan = Plan(servers=int(servers), engines=engines, roots=roots)
        try:
            result = uvloop.run(_run(folder, plan, orders))
        except asyncio.CancelledError:
            raise SystemExit(128 + signal.SIGTERM) from None
    report.write(out, result, seed=seed, command=shlex.join(sys.argv))
    for table in (report.by_fault(result), report.ends(result), report.totals(result, seed=seed)):
        console.print(table)
    for death, count in result.deaths.items():
        console.print(f"died by itself: {death}, {count} times")
    raise SystemExit(int(sum(summary(result.problems).values()) > 0))


async def _run(folder: Path, plan: Plan, orders: Orders) -> Result:
    """SIGTERM cancels it, as SIGINT does, so that what was started is stopped too."""
    this = asyncio.current_task()
    if this is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"seed {orders.seed}", total=orders.faults)

        def on_round(each: Round) -> None:
            progress.console.print("\n".join(report.told(each)), markup=False, highlight=False)

        async with deployed(folder, plan) as up:
            return await Run(up, orders, on_fault=lambda: progress.advance(task)).to_the_end(on_round=on_round)


if __name__ == "__main__":
    main()
