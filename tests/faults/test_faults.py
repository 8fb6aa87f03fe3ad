"""The fault suite in its short form: some faults of every kind, and nothing may be lost, duplicated, wrong or leaked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.deployment import Deployment, Plan, deployed
from tests.faults.faults import chosen
from tests.faults.report import told
from tests.faults.runner import Orders, Result, Run
from tests.measured import measured

SEED = 4
SEEN, UNSEEN = 40, 15  # faults
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path, Plan()) as made:
        yield made


async def _strike(up: Deployment, *, faults: int, unseen: bool = False) -> Result:
    kinds = [fault for fault in chosen((), servers=1, engines=True) if fault.unseen or not unseen]
    result = await Run(up, Orders(faults=faults, kinds=kinds, seed=SEED, round_size=faults)).to_the_end()
    measured("faults", faults)
    measured("requests", result.requests)
    return result


def _is_clean(result: Result) -> None:
    assert result.problems == [], "\n".join(line for each in result.rounds for line in told(each))
    assert result.rounds[-1].ends["completed"] > 0


async def test_faults_lose_duplicate_and_falsify_nothing(up: Deployment) -> None:
    _is_clean(await _strike(up, faults=SEEN))


async def test_faults_that_two_of_each_role_absorb_are_noticed_by_no_client(up: Deployment) -> None:
    _is_clean(await _strike(up, faults=UNSEEN, unseen=True))
