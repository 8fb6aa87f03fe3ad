"""From windows to ratios, verdicts and Markdown."""

import pytest

from bench.load import Window
from bench.measure import Cell, Measured
from bench.peers import Peer
from bench.plot import line_chart, nice_step, spread
from bench.provider import Stats
from bench.report import (
    CELLS,
    STREAM_32,
    TARGETS,
    WHOLE_1,
    WHOLE_32,
    Comparison,
    comparison_markdown,
    ratio_of,
    targets_met,
    with_section,
)
from bench.run import exit_code, is_complaint, schedule
from bench.soak import growth
from bench.witness import Sums, compare, expected_cost_pico, pico


def make_window(*, cell: Cell = WHOLE_32, rate: float = 100.0, p50_ms: float = 1.0, failed: int = 0) -> Window:
    return Window(
        shape=cell.shape,
        connections=cell.connections,
        seconds=1.0,
        completed=100,
        failed=failed,
        rate=rate,
        p50_ms=p50_ms,
        p90_ms=2.0,
        p99_ms=3.0,
        longest_ms=9.0,
        first_p50_ms=0.5,
        first_p99_ms=0.9,
        total=120,
        total_streams=120 if cell.shape == "stream" else 0,
        cpu_s=0.1,
        errors={"status 500": failed} if failed else {},
    )


def make_measured(peer: str, cell: Cell, *, rate: float = 100.0, p50_ms: float = 1.0, failed: int = 0) -> Measured:
    return Measured(
        peer=peer,
        cell=cell,
        window=make_window(cell=cell, rate=rate, p50_ms=p50_ms, failed=failed),
        cpu_s={"worker": 0.2},
        load_cpu_s=0.1,
        foreign_share=0.01,
        served=Stats(requests=120, streams=120 * (cell.shape == "stream"), prompt_tokens=2880, completion_tokens=1920),
    )


def make_comparison(*, faster: float = 30.0, latency: float = 0.2, failed: int = 0) -> Comparison:
    measured = []
    for _ in range(2):
        for cell in CELLS:
            measured.append(make_measured("litellm", cell))
            measured.append(make_measured("penstock", cell, rate=100 * faster, p50_ms=latency, failed=failed))
    return Comparison(
        measured=measured,
        peak_mib={"penstock": {"worker": 80.0}},
        idle_cores={"penstock": {"worker": 0.01}},
        complaints=[],
        machine=[("machine", "2 cores")],
        witness=None,
        seconds=1.0,
        rounds=2,
    )


def test_ratios_are_of_the_medians() -> None:
    ratios = [ratio_of(make_comparison(), target) for target in TARGETS]
    assert ratios == [(30.0, 30.0, 30.0), (30.0, 30.0, 30.0), (0.2, 0.2, 0.2)]


@pytest.mark.parametrize(
    ("faster", "latency", "met"), [(30.0, 0.2, True), (25.0, 0.4, True), (24.0, 0.2, False), (30.0, 0.41, False)]
)
def test_targets_are_met_or_missed(faster: float, latency: float, met: bool) -> None:
    comparison = make_comparison(faster=faster, latency=latency)
    assert targets_met(comparison) is met
    assert ("**missed**" in comparison_markdown(comparison)) is not met
    assert exit_code(comparison, check=True) == (0 if met else 1)
    assert exit_code(comparison, check=False) == 0


def test_a_failed_request_fails_the_run() -> None:
    comparison = make_comparison(failed=1)
    assert exit_code(comparison, check=False) == 1
    assert "status 500" in comparison_markdown(comparison)


def test_a_section_is_replaced_and_the_others_are_kept() -> None:
    text = with_section("# Title\n", "one", "first")
    text = with_section(text, "two", "second")
    text = with_section(text, "one", "first again")
    assert text.count("<!-- one: begin -->") == 1
    assert text.index("first again") < text.index("second")
    assert "first\n" not in text


def test_each_round_takes_every_load_to_every_entrant_and_turns_the_order() -> None:
    entered = [Peer(name=name, base_url="", api_key="", pids=dict) for name in ("a", "b")]
    order = [(peer.name, cell) for peer, cell in schedule(entered, 2)]
    assert order[:2] == [("a", CELLS[0]), ("b", CELLS[0])]
    assert order[6:8] == [("b", CELLS[0]), ("a", CELLS[0])]
    assert len(order) == 12


def test_the_witness_compares_three_accounts() -> None:
    measured = [make_measured("penstock", WHOLE_1), make_measured("penstock", STREAM_32)]
    cost = expected_cost_pico(Stats(prompt_tokens=5760, completion_tokens=3840))
    assert cost == 5760 * 150_000 + 3840 * 600_000
    said = Sums(requests=240, streams=120, prompt_tokens=5760, completion_tokens=3840, cost_usd="0.003168000000")
    assert compare(said, measured).agrees
    said.completion_tokens -= 1
    assert not compare(said, measured).agrees


def test_dollars_become_exact_pico() -> None:
    assert pico("0.003168") == 3_168_000_000
    assert pico("12") == 12 * 10**12


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"level":"info","event":"warning_read"}', False),
        ('{"level":"warning","event":"x"}', True),
        ("Traceback (most recent call last):", True),
        ("http://127.0.0.1:1/v1", False),
    ],
)
def test_warnings_in_a_log_are_found(line: str, complaint: bool) -> None:
    assert is_complaint(line) is complaint


def test_growth_is_the_slope_after_the_first_fifth() -> None:
    line = [(0.0, 50.0), (10_000.0, 80.0)] + [(x, 100 + x / 50_000) for x in range(20_000, 100_001, 1_000)]
    assert growth(line) == pytest.approx(2.0, rel=0.05)
    assert growth([(0.0, 1.0)]) == 0.0


def test_a_saw_on_a_level_floor_does_not_grow() -> None:
    """A database gathers 100 MiB and writes them out, again and again."""
    line = [(float(x), 100.0 + x % 9_000 / 90) for x in range(0, 100_001, 500)]
    assert abs(growth(line)) < 8


def test_a_chart_labels_each_line_apart() -> None:
    svg = line_chart({"a": [(0, 1), (10, 100)], "b": [(0, 2), (10, 101)]}, title="T<", x_title="x", y_title="y")
    assert svg.count("<polyline") == 2
    assert "T&lt;" in svg
    heights = spread({"a": 100.0, "b": 101.0})
    assert heights["b"] - heights["a"] >= 15


def test_axis_steps_are_round_numbers() -> None:
    assert nice_step(100_000) == 20_000
    assert nice_step(137) == 50
