from __future__ import annotations

import itertools

import pytest

from workers.engine.phases import Phase, phase_after

LINES = {
    "(EngineCore pid=7) INFO [weight_utils.py:1] Time spent downloading weights for Qwen/Qwen3-0.6B: 2.1 s": Phase.DOWNLOADING,
    "Fetching 7 files:  14%|#4        | 1/7": Phase.DOWNLOADING,
    "INFO [gpu_model_runner.py:1] Starting to load model Qwen/Qwen3-0.6B...": Phase.LOADING,
    "Loading safetensors checkpoint shards:   0% Completed | 0/1": Phase.LOADING,
    "INFO [backends.py:1] Compiling a graph for dynamic shape takes 10 s": Phase.COMPILING,
    "Capturing CUDA graphs (decode, FULL):  50%": Phase.COMPILING,
}


@pytest.mark.parametrize(("line", "phase"), LINES.items(), ids=lambda value: str(value)[:30])
def test_a_line_of_the_log_shows_how_far_the_start_has_come(line: str, phase: Phase) -> None:
    assert phase_after(line, Phase.STARTING) is phase


@pytest.mark.parametrize(("line", "phase"), list(itertools.product(LINES, Phase)))
def test_a_phase_never_goes_back(line: str, phase: Phase) -> None:
    order = list(Phase)
    assert order.index(phase_after(line, phase)) >= order.index(phase)


@pytest.mark.parametrize("line", ["", "INFO hello", "\ufffd"])
def test_a_line_without_a_sign_changes_nothing(line: str) -> None:
    assert phase_after(line, Phase.LOADING) is Phase.LOADING


def test_the_log_alone_never_makes_an_engine_ready() -> None:
    assert all(
        phase_after(line, Phase.STARTING) is not Phase.READY for line in [*LINES, "Application startup complete."]
    )
