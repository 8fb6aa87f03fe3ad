"""Ports for servers that come back, or that have to be told theirs: nobody else gets them meanwhile."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = (
    10_000,
    32_000,
)  # below those that the system gives to whoever asks for any, and to every client that connects
TRIES_MAX = 100

_dice = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens.

    Raises: AssertionError if none is found.
    """
    for _ in range(TRIES_MAX):
        port = _dice.randint(LOWEST, HIGHEST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
