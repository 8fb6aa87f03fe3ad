"""What was measured, as Markdown: pure, but for `write_section`, which keeps the other sections of RESULTS.md."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from bench.measure import Cell, Measured
from bench.provider import Stats

WHOLE_1, WHOLE_32, STREAM_32 = Cell("whole", 1), Cell("whole", 32), Cell("stream", 32)
CELLS = (WHOLE_32, STREAM_32, WHOLE_1)
QUIET_SHARE = 0.05  # foreign work above this share of the machine makes a run doubtful

HEADER = """# Benchmark results

Written by `make bench`, `make bench-vllm` and `make soak`; `bench/run.py` and `bench/vllm.py` say how it is measured. Load
generator, provider and all entrants share one machine, so read the ratios: they are what the targets are set on. The absolute
numbers are this machine's.
"""


class Target(msgspec.Struct, frozen=True):
    """A ratio of Penstock's median to LiteLLM's, and what it must be."""

    title: str
    cell: Cell
    value: Callable[[Measured], float]
    goal: float
    at_least: bool  # else at most

    def met(self, ratio: float) -> bool:
        return ratio >= self.goal if self.at_least else ratio <= self.goal


TARGETS = (
    Target("requests/s, non-streaming, 32 connections", WHOLE_32, lambda m: m.window.rate, 15, at_least=True),
    Target("streams/s of 16 chunks, 32 connections", STREAM_32, lambda m: m.window.rate, 25, at_least=True),
    Target("median latency, non-streaming, 1 connection", WHOLE_1, lambda m: m.window.p50_ms, 0.4, at_least=False),
)


class Witness(msgspec.Struct, kw_only=True):
    """Three accounts of the same work: the clients', the provider's and the ledger's."""

    verified: int
    verified_streams: int
    served: Stats
    ledger: Mapping[str, int]
    cost_pico: int
    expected_cost_pico: int

    @property
    def agrees(self) -> bool:
        return (
            self.verified == self.served.requests == self.ledger["requests"]
            and self.verified_streams == self.served.streams == self.ledger["streams"]
            and self.served.prompt_tokens == self.ledger["prompt_tokens"]
            and self.served.completion_tokens == self.ledger["completion_tokens"]
            and self.cost_pico == self.expected_cost_pico
        )


class Comparison(msgspec.Struct, kw_only=True):
    """One `make bench`."""

    measured: list[Measured]
    peak_mib: dict[str, dict[str, float]]  # by entrant, by role
    idle_cores: dict[str, dict[str, float]]
    complaints: list[str]  # lines of level warning or above in Penstock's log
    machine: list[tuple[str, str]]
    witness: Witness | None
    seconds: float
    rounds: int

    def of(self, peer: str, cell: Cell) -> list[Measured]:
        return [m for m in self.measured if m.peer == peer and m.cell == cell]

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(m.peer for m in self.measured))

    @property
    def failed(self) -> int:
        return sum(m.window.failed for m in self.measured)


def ratio_of(comparison: Comparison, target: Target) -> tuple[float, float, float] | None:
    """The ratio of the medians, and the lowest and highest of the rounds; None when an entrant is missing."""
    ours, theirs = comparison.of("penstock", target.cell), comparison.of("litellm", target.cell)
    if not ours or not theirs or not all(target.value(m) for m in ours + theirs):
        return None
    rounds = [target.value(a) / target.value(b) for a, b in zip(ours, theirs, strict=True)]
    return median(ours, target.value) / median(theirs, target.value), min(rounds), max(rounds)


def targets_met(comparison: Comparison) -> bool:
    ratios = [(target, ratio_of(comparison, target)) for target in TARGETS]
    return all(ratio is not None and target.met(ratio[0]) for target, ratio in ratios)


def comparison_markdown(comparison: Comparison) -> str:
    parts = ["## Penstock, LiteLLM proxy and the provider called directly\n"]
    if ratio_of(comparison, TARGETS[0]) is not None:
        parts += ["Penstock against LiteLLM, with everything on: keys, events durable, the ledger writing.\n"]
        parts += [ratios_table(comparison)]
    parts += ["### Rates and latencies\n", rates_table(comparison)]
    parts += ["### CPU\n", CPU_NOTE, cpu_table(comparison), "### Memory\n", memory_table(comparison)]
    if comparison.witness is not None:
        parts += ["### Three accounts of the same work\n", witness_table(comparison.witness)]
    parts += ["### Conditions\n", conditions(comparison)]
    return "\n".join(parts)


def ratios_table(comparison: Comparison) -> str:
    rows = []
    for target in TARGETS:
        ratio = ratio_of(comparison, target)
        if ratio is None:
            continue
        sign, form = ("≥", "{:.1f} times") if target.at_least else ("≤", "{:.0%}")
        middle, low, high = (form.format(value) for value in ratio)
        verdict = "met" if target.met(ratio[0]) else "**missed**"
        rows.append([target.title, f"**{middle}**", f"{low} to {high}", f"{sign} {form.format(target.goal)}", verdict])
    return table(["Penstock ÷ LiteLLM", "medians", "over the rounds", "target", ""], rows)


def rates_table(comparison: Comparison) -> str:
    rows = []
    for cell in CELLS:
        for peer in comparison.peers:
            group = comparison.of(peer, cell)
            if not group:
                continue
            first = f"{median(group, lambda m: m.window.first_p50_ms):.2f}" if cell.shape == "stream" else ""
            rows.append(
                [
                    cell.title,
                    peer,
                    number(median(group, lambda m: m.window.rate)),
                    f"{median(group, lambda m: m.window.p50_ms):.2f}",
                    f"{median(group, lambda m: m.window.p90_ms):.2f}",
                    f"{median(group, lambda m: m.window.p99_ms):.2f}",
                    f"{max(m.window.longest_ms for m in group):,.0f}",
                    first,
                    str(sum(m.window.completed for m in group)),
                    str(sum(m.window.failed for m in group)),
                ]
            )
    heads = [
        "load",
        "entrant",
        "per second",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "longest ms",
        "first chunk p50 ms",
        "completed",
        "failed",
    ]
    return table(heads, rows)


CPU_NOTE = """CPU seconds of each process for a thousand requests, and in brackets the share of one core that it kept busy.
The provider and the load generator work for every entrant. Medians over the rounds.
"""


def cpu_table(comparison: Comparison) -> str:
    rows = []
    for cell in CELLS:
        for peer in comparison.peers:
            group = comparison.of(peer, cell)
            if not group:
                continue
            roles = list(dict.fromkeys(role for m in group for role in m.cpu_s))
            each = [f"{role} {cpu_text(group, role)}" for role in roles]
            rows.append([cell.title, peer, " · ".join(each), f"{median(group, total_cpu_ms):.3f}"])
    for peer, cores in comparison.idle_cores.items():
        each = [f"{role} {share:.1%}" for role, share in cores.items()]
        rows.append(["idle (share of one core)", peer, " · ".join(each), ""])
    return table(["load", "entrant", "CPU s / 1000 requests, by process", "all its processes"], rows)


def cpu_text(group: Sequence[Measured], role: str) -> str:
    per_thousand = median(group, lambda m: m.cpu_s.get(role, 0.0) * 1000 / max(1, m.window.total))
    busy = median(group, lambda m: m.cpu_s.get(role, 0.0) / (m.window.total / m.window.rate if m.window.rate else 1.0))
    return f"{per_thousand:.3f} ({busy:.0%})"


def total_cpu_ms(measured: Measured) -> float:
    return sum(measured.cpu_s.values()) * 1000 / max(1, measured.window.total)


def memory_table(comparison: Comparison) -> str:
    rows = []
    for peer, peaks in comparison.peak_mib.items():
        each = [f"{role} {mib:.0f}" for role, mib in peaks.items()]
        rows.append([peer, " · ".join(each), f"{sum(peaks.values()):.0f}"])
    return table(["entrant", "peak resident memory of each process, MiB", "sum"], rows)


def witness_table(witness: Witness) -> str:
    ledger, served = witness.ledger, witness.served
    rows = [
        ["clients, verified answers", str(witness.verified), str(witness.verified_streams), "", "", ""],
        [
            "provider, what it generated",
            str(served.requests),
            str(served.streams),
            str(served.prompt_tokens),
            str(served.completion_tokens),
            f"{dollars(witness.expected_cost_pico)} (at the price)",
        ],
        [
            "ledger, asked in SQL",
            str(ledger["requests"]),
            str(ledger["streams"]),
            str(ledger["prompt_tokens"]),
            str(ledger["completion_tokens"]),
            dollars(witness.cost_pico),
        ],
    ]
    verdict = "They agree to the last token." if witness.agrees else "**They do not agree.**"
    heads = ["account", "requests", "streams", "prompt tokens", "completion tokens", "cost, US dollars"]
    return f"Of Penstock's windows, warm-ups included. {verdict}\n\n" + table(heads, rows)


def conditions(comparison: Comparison) -> str:
    lines = [f"- {name}: {value}" for name, value in comparison.machine]
    lines.append(
        f"- rounds: {comparison.rounds}, interleaved: in each, every load on every entrant in turn, {comparison.seconds:g} s "
        "a window after 1 s of warm-up; medians over the rounds; idle entrants stay up meanwhile"
    )
    if comparison.measured:
        foreign = max(m.foreign_share for m in comparison.measured)
        doubt = " — **too much: the machine was not quiet**" if foreign > QUIET_SHARE else ""
        lines.append(f"- other programs used at most {foreign:.0%} of the machine in any window{doubt}")
    lines.append(f"- failed requests: {comparison.failed}")
    reasons = {reason for m in comparison.measured for reason in m.window.errors}
    lines += [f"  - {reason}" for reason in sorted(reasons)]
    if "penstock" in comparison.peers:
        lines.append(f"- lines of level warning or above in Penstock's log: {len(comparison.complaints)}")
        lines += [f"  - `{line}`" for line in comparison.complaints[:5]]
    return "\n".join(lines) + "\n"


def median(group: Iterable[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(value(m) for m in group)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def dollars(pico: int) -> str:
    return f"{Decimal(pico).scaleb(-12):f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_section(path: Path, name: str, body: str) -> None:
    """Replace one section of the file, and keep the others."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEADER
    path.write_text(with_section(text, name, body), encoding="utf-8")


def with_section(text: str, name: str, body: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{body.strip()}\n{end}\n"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}\n", text, flags=re.DOTALL)
    if found is None:
        return f"{text.rstrip()}\n\n{section}"
    return text[: found.start()] + section + text[found.end() :]
