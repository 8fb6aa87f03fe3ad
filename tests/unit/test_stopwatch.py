"""The stopwatch of tests: what a machine does for others is none of their time, and what they do themselves is."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.stopwatch import Stopwatch

BUSY = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(flush=True)
until = time.monotonic() + 30.0
while time.monotonic() < until:
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")
def test_what_two_wait_for_one_processor_is_not_counted() -> None:
    """Each second of it that passes is a second that one of them waits."""
    both = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for each in both:
            assert each.stdout is not None
            each.stdout.readline()
        watch = Stopwatch()
        time.sleep(0.6)
        assert watch.waited_s > 0.3
        assert watch.s < watch.wall_s - 0.3
    finally:
        for each in both:
            each.kill()
            each.communicate()


def test_what_is_slept_is_counted() -> None:
    watch = Stopwatch()
    time.sleep(0.3)
    assert watch.wall_s >= 0.3
    assert watch.s + watch.waited_s >= 0.3
