"""What an engine on the CPU is told where it has few cores."""

from __future__ import annotations

import pytest

from workers.providers.vllm_cores import FEW_CORES, ONE_PROCESS, THREADS, on_few_cores


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (4, "3"), (FEW_CORES, str(FEW_CORES - 1))])
def test_few_cores_are_not_spun_away_and_one_is_left(cores: int, threads: str) -> None:
    assert on_few_cores(cores, {}) == {ONE_PROCESS: "0", THREADS: threads}


def test_on_more_cores_the_engine_decides() -> None:
    assert on_few_cores(FEW_CORES + 1, {}) == {}


@pytest.mark.parametrize("said", [{ONE_PROCESS: "1"}, {THREADS: "2"}])
def test_what_the_operator_says_stays(said: dict[str, str]) -> None:
    told = on_few_cores(4, {"PATH": "/bin", **said})
    assert told.keys() == {ONE_PROCESS, THREADS} - said.keys()
