"""An ingress dies, or stands still and comes back: each of its requests ends once in the books, billed by its receipt."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from decimal import Decimal
from typing import Any

import openai
import pytest

from bus.log import FENCED
from schemas.money import PROMPT_BYTES_PER_TOKEN
from tests.e2e.asking import Heard, ask, read, row, works
from tests.e2e.deployment import CACHED_PICO, INPUT_PICO, OUTPUT_PICO, Deployment, Provider
from tests.measured import measured
from tests.restarts import frozen
from tests.waiting import eventually

CLOSED_WITHIN_S = 60.0
STANDSTILL_S = 17.0  # longer than this deployment's ledger is patient, its looks included

pytestmark = pytest.mark.timeout(150)


async def _reading(up: Deployment, requests: int) -> list[asyncio.Task[Heard | None]]:
    """So many clients, half of them with streams; None for one whose connection broke before an answer began."""

    async def one(number: int) -> Heard | None:
        async with up.sdk() as client:
            try:
                return await (read(client, f"request {number}") if number % 2 else ask(client, f"request {number}"))
            except openai.APIConnectionError:
                return None

    return [asyncio.create_task(one(number)) for number in range(requests)]


async def _under_way(
    up: Deployment, provider: Provider, *, requests: int, tokens: int, pace_s: float
) -> tuple[set[str], list[asyncio.Task[Heard | None]]]:
    """The requests that were there before, and the clients of as many more, each of which has had some tokens of its answer."""
    await works(up)
    before = _ids(up)
    provider.forget()
    provider.script(tokens=tokens, pace_s=pace_s)
    reading = await _reading(up, requests)
    await eventually(lambda: provider.answering() == requests and all(s["tokens_sent"] > 5 for s in provider.seen()))
    return before, reading


async def _closed(up: Deployment, before: set[str], requests: int) -> list[dict[str, Any]]:
    """The rows of the *requests* that were not there *before*, once all of them have ended."""

    def all_of_them() -> list[dict[str, Any]]:
        rows = [told for told in up.sql("SELECT * FROM requests") if told["request_id"] not in before]
        return rows if len(rows) == requests and all(told["status"] != "open" for told in rows) else []

    return await eventually(all_of_them, timeout_s=CLOSED_WITHIN_S, every_s=0.3, what="the end of every request")


def _ids(up: Deployment) -> set[str]:
    return {told["request_id"] for told in up.sql("SELECT request_id FROM requests")}


def _assert_billed_by_receipt(up: Deployment, told: dict[str, Any]) -> None:
    (receipt,) = up.sql("SELECT * FROM attempts WHERE request_id = ?", told["request_id"])
    assert receipt["outcome"] in ("cancelled", "completed")
    if receipt["completion_tokens"] is not None:
        assert not told["estimated"]
        billed = (receipt["prompt_tokens"], receipt["completion_tokens"])
    elif receipt["tokens_sent"]:
        assert told["estimated"]
        assert receipt["code"] == "ingress_lost"
        billed = (told["prompt_tokens"], receipt["tokens_sent"])
        assert 0 < told["prompt_tokens"] < 200 // PROMPT_BYTES_PER_TOKEN
    else:  # its provider had given nothing yet
        assert not told["stream"]
        billed = (0, 0)
    assert (told["prompt_tokens"], told["completion_tokens"]) == billed
    fresh = told["prompt_tokens"] - told["cached_tokens"]
    pico = fresh * INPUT_PICO + told["cached_tokens"] * CACHED_PICO + told["completion_tokens"] * OUTPUT_PICO
    assert Decimal(told["cost_usd"]) == Decimal(pico).scaleb(-12)
    assert told["price_known"]


def _assert_ended_once(up: Deployment) -> None:
    twice = up.sql(
        "SELECT request_id FROM events WHERE kind = 'request.finished' GROUP BY request_id HAVING count(*) > 1"
    )
    assert twice == []


async def test_what_a_killed_ingress_left_open_is_closed_and_billed_by_its_receipts(
    broken_up: Deployment, provider: Provider
) -> None:
    broken_up.expected |= {"process_died", "ingress_gone", "ingress_lost", "requests_closed"}
    before, reading = await _under_way(broken_up, provider, requests=8, tokens=3000, pace_s=0.02)
    broken_up.kill("ingress")
    killed_at = time.monotonic()
    heard = await asyncio.gather(*reading)
    await eventually(lambda: provider.answering() == 0, timeout_s=15, every_s=0.05, what="that nothing is generated")
    measured("ingress_killed_to_work_stopped_s", round(time.monotonic() - killed_at, 2))
    rows = await _closed(broken_up, before, 8)
    measured("ingress_killed_to_requests_closed_s", round(time.monotonic() - killed_at, 2))
    assert [each.tokens if each else None for each in heard] == [None] * 8  # nobody was told that it is complete
    assert {told["completion_tokens"] > 0 for told in rows if told["stream"]} == {True}
    for told in rows:
        assert (told["status"], told["code"], told["http_status"]) == ("failed", "ingress_lost", 502)
        _assert_billed_by_receipt(broken_up, told)
    _assert_ended_once(broken_up)
    provider.script()
    assert await works(broken_up) < 5.0


async def test_a_frozen_ingress_that_wakes_up_tells_no_client_of_a_success_that_is_not_in_the_books(
    broken_up: Deployment, provider: Provider
) -> None:
    """Some answers are complete and wait in its socket when it wakes: their requests have been closed meanwhile."""
    broken_up.expected |= {"process_died", "ingress_gone", "ingress_lost", "requests_closed"}
    broken_up.expected |= {"log_fenced", "events_lost", "request_not_recorded_in_time", f"penstock: {FENCED}"}
    before, reading = await _under_way(broken_up, provider, requests=8, tokens=50, pace_s=0.06)
    pid = broken_up.pid("ingress")
    with frozen(pid):
        await asyncio.sleep(STANDSTILL_S)
    heard = await asyncio.gather(*reading)
    await eventually(lambda: broken_up.pid("ingress") != pid, timeout_s=20, what="another ingress")
    rows = await _closed(broken_up, before, 8)
    assert {each.code if each else "broken" for each in heard} <= {"log_unavailable", "stopping"}
    for told in rows:
        assert (told["status"], told["code"]) == ("failed", "ingress_lost")
        assert told["completion_tokens"] == 50
        _assert_billed_by_receipt(broken_up, told)
    _assert_ended_once(broken_up)
    provider.script()
    assert await works(broken_up) < 5.0


async def test_a_short_standstill_costs_nothing(broken_up: Deployment, provider: Provider) -> None:
    provider.script(tokens=50, pace_s=0.06)
    reading = await _reading(broken_up, 4)
    await eventually(lambda: provider.answering() == 4)
    with frozen(broken_up.pid("ingress")):
        await asyncio.sleep(3.0)
    heard = await asyncio.gather(*reading)
    assert [each and each.code for each in heard] == [None] * 4
    for each in heard:
        assert each is not None
        assert (await row(broken_up, each.request_id))["status"] == "completed"


async def test_a_ledger_that_is_killed_while_it_closes_closes_each_once(
    broken_up: Deployment, provider: Provider
) -> None:
    broken_up.expected |= {"process_died", "ingress_gone", "ingress_lost", "requests_closed"}
    before, reading = await _under_way(broken_up, provider, requests=4, tokens=3000, pace_s=0.02)
    broken_up.kill("ingress")
    killed_at = time.monotonic()
    await asyncio.gather(*reading)
    for moment_s in (3.0, 10.5):  # before the fence, and as the closings are due
        await asyncio.sleep(max(0.0, killed_at + moment_s - time.monotonic()))
        os.kill(broken_up.pid("ledger"), signal.SIGKILL)
        await eventually(lambda: broken_up.sql("SELECT 1 AS one"), timeout_s=20, what="the ledger")
    rows = await _closed(broken_up, before, 4)
    measured("ledger_killed_twice_to_requests_closed_s", round(time.monotonic() - killed_at, 2))
    assert {told["code"] for told in rows} == {"ingress_lost"}
    _assert_ended_once(broken_up)
