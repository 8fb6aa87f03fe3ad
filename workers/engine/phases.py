"""How far an engine's start has come, read from its log: pure.

The log is for people, and its words change; so a phase is only shown, never decided upon. Ready is what /health says.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    COMPILING = "compiling"
    READY = "ready"
    FAILED = "failed"


_SIGNS = (
    (Phase.DOWNLOADING, ("Downloading", "Fetching ", "Time spent downloading weights")),
    (Phase.LOADING, ("Starting to load model", "Loading safetensors", "Loading weights", "Loading pt checkpoint")),
    (
        Phase.COMPILING,
        ("torch.compile", "Compiling a graph", "Capturing CUDA graph", "Capturing cudagraph", "Dynamo bytecode"),
    ),
)
_ORDER = list(Phase)


def phase_after(line: str, phase: Phase) -> Phase:
    """The phase after *line* of the log; a start never goes back."""
    for found, signs in _SIGNS:
        if any(sign in line for sign in signs) and _ORDER.index(found) > _ORDER.index(phase):
            return found
    return phase
