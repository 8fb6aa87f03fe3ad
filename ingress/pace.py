"""The rhythm of a stream, and when it has stopped: measured by the stream itself, since models differ a hundredfold in speed."""

from __future__ import annotations

from collections import deque
from statistics import median

STALL_MIN_S = 3.0
STALL_GAPS = 20  # times the median gap
GAPS_KEPT = 64
LOOK_AGAIN_S = 1.0


class Pace:
    """Of one attempt. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.look_at = float("inf")  # when it is worth asking whether it stands still
        self._heard_at: float | None = None
        self._gaps: deque[float] = deque(maxlen=GAPS_KEPT)

    def heard(self, now: float) -> None:
        """Something of the answer came."""
        if self._heard_at is not None:
            self._gaps.append(now - self._heard_at)
        self._heard_at = now
        self.look_at = now + STALL_MIN_S

    def is_stalled(self, now: float) -> bool:
        """Whether it stands still; if not yet, `look_at` says when to ask again."""
        if self._heard_at is None or now < self.look_at:
            return False
        until = self._heard_at + max(STALL_MIN_S, STALL_GAPS * median(self._gaps) if self._gaps else 0.0)
        self.look_at = max(until, now + LOOK_AGAIN_S)
        return now >= until
