"""What a run found, for people at a terminal, and for those who look into it later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
from rich.table import Table

from tests.faults.runner import Result, Round
from tests.faults.verdict import Kind, summary

PROBLEMS_SHOWN_MAX = 10


def totals(result: Result, *, seed: int) -> Table:
    """The table of the suite: what was injected, and what that did."""
    found = summary(result.problems)
    table = Table(title=f"seed {seed}")
    for column in ("faults", "requests", *Kind):
        table.add_column(column, justify="right")
    cells = [sum(result.injected.values()), result.requests, *(found[kind] for kind in Kind)]
    table.add_row(*(f"{cell:,}" for cell in cells))
    return table


def by_fault(result: Result) -> Table:
    table = Table("fault", title="injected")
    table.add_column("times", justify="right")
    for name, count in sorted(result.injected.items()):
        table.add_row(name, f"{count:,}")
    return table


def ends(result: Result) -> Table:
    """How it ended for the clients, and with which errors."""
    table = Table("for the client", title="requests")
    table.add_column("times", justify="right")
    told, codes = Counter[str](), Counter[str]()
    for each in result.rounds:
        told.update(each.ends)
        codes.update(each.codes)
    for name, count in told.most_common():
        table.add_row(name, f"{count:,}")
    table.add_row("completed by a later attempt", f"{sum(each.attempts_again for each in result.rounds):,}")
    table.add_row("completed, continued at another worker", f"{sum(each.continued for each in result.rounds):,}")
    table.add_row("completed over several connections", f"{sum(each.resumed for each in result.rounds):,}")
    for code, count in codes.most_common():
        table.add_row(f"error {code}", f"{count:,}")
    return table


def told(each: Round) -> list[str]:
    """A round in lines: how long it took, and each problem with the life of its request."""
    lines = [
        f"round {each.number}: {len(each.injected)} faults, {sum(each.ends.values())} requests, {each.seconds:.0f} s"
    ]
    for problem in each.problems[:PROBLEMS_SHOWN_MAX]:
        lines.append(f"  {problem.kind}: {problem.rule}: {problem.about}: {problem.told}")
        lines += [f"      {event}" for event in each.lives.get(problem.about, ())]
    more = len(each.problems) - PROBLEMS_SHOWN_MAX
    return [*lines, f"  and {more} more"] if more > 0 else lines


def write(path: Path, result: Result, *, seed: int, command: str) -> None:
    """Everything, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "command": command,
        "seed": seed,
        "injected": result.injected,
        "requests": result.requests,
        "found": {kind: summary(result.problems)[kind] for kind in Kind},
        "deaths": result.deaths,
        "rounds": result.rounds,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
