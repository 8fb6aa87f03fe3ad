from __future__ import annotations

from schemas.jobs import Timeouts
from schemas.settings import WorkerSettings
from workers.providers.patience import BEHIND_S, Patience


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def patience(clock: Clock, *, total_s: float = 60.0) -> Patience:
    return Patience(first_s=10.0, idle_s=3.0, total_s=total_s, clock=clock)


def test_patience_is_first_for_the_first_chunk_and_then_for_each_next() -> None:
    clock = Clock()
    waiting = patience(clock)
    assert waiting.until_s == 110.0
    clock.now = 109.0
    waiting.renew()
    assert waiting.until_s == 112.0
    clock.now = 111.0
    waiting.renew()
    assert waiting.until_s == 114.0


def test_patience_never_goes_beyond_the_total() -> None:
    clock = Clock()
    waiting = patience(clock, total_s=11.0)
    clock.now = 109.5
    waiting.renew()
    assert waiting.until_s == 111.0
    assert patience(clock, total_s=5.0).until_s == 114.5


def test_fault_says_which_time_ran_out_and_how_long_it_was() -> None:
    clock = Clock()
    waiting = patience(clock, total_s=11.0)
    assert "did not begin to answer within 10 s" in waiting.fault().message
    waiting.renew()
    assert "sent nothing for 3 s" in waiting.fault().message
    clock.now = 110.0
    waiting.renew()
    assert "did not finish within 11 s" in waiting.fault().message


def test_the_smaller_of_the_workers_and_the_requests_limits_counts() -> None:
    settings = WorkerSettings(first_byte_timeout_s=5.0, idle_timeout_s=9.0)
    waiting = Patience.with_job(Timeouts(first_token_s=8.0, idle_s=2.0), settings, clock=Clock())
    assert waiting.until_s == 105.0
    waiting.renew()
    assert waiting.until_s == 102.0 + BEHIND_S
