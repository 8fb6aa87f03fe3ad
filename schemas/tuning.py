"""How the long-running processes use Python."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000  # Python's own 700 would look for cycles some forty times in each thousand requests


def settle_collector() -> None:
    """To be called once a process serves: what is there now stays, and the collector needn't look at it again.

    Requests leave next to no cycles, so that looking for them less often costs little memory; it saves CPU on every request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
