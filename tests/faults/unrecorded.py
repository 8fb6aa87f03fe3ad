"""Refusals that only their ingress knew of when it was killed: it said so itself, in its log, and didn't live to record them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

LOG_AWAY_MAX_S = 20.0  # no fault keeps the log from an ingress for longer
_KILLED = b"kill -9 at "
_UNRECORDED = b'"event":"rejection_not_recorded_in_time"'
_RECORDED = (b'"event":"stopped"', b'"event":"listening"')  # behind these nothing of the process before is in memory


def killed_line(at_s: float) -> bytes:
    """What is written into the log of a process that was killed at *at_s* (monotonic seconds)."""
    return b"\n%s%f\n" % (_KILLED, at_s)


def unrecorded(log: Iterable[bytes]) -> Iterator[tuple[str, float]]:
    """The requests whose refusal had not been recorded yet when it was told, and when their ingress was killed, from its *log*."""
    told: list[str] = []
    for line in log:
        if line.startswith(_KILLED):
            killed_s = float(line.removeprefix(_KILLED))
            yield from ((request_id, killed_s) for request_id in told)
            told.clear()
        elif any(each in line for each in _RECORDED):
            told.clear()
        elif _UNRECORDED in line and (request_id := json.loads(line).get("request_id")) is not None:
            told.append(request_id)  # the release before doesn't say whose it was
