"""What an engine of ours is told where it computes on the CPU and has few cores, which it shares with us.

Source: docs/adr/0055-few-cores.md
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

FEW_CORES = 8  # on more, those that it wastes are not missed
RESERVED_CORES = 1  # for its own front end and for us
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/accel")  # NVIDIA, under WSL, AMD, others
ONE_PROCESS, THREADS = "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"


def on_few_cores(cores: int, given: Mapping[str, str]) -> dict[str, str]:
    """Of the environment for an engine on the CPU, with *cores*: what *given* doesn't say.

    The process that schedules and the one that computes wait for each other by spinning, unless they are one; threads that
    compute spin for each other too, and so must leave a core to those that wait.
    """
    if cores > FEW_CORES:
        return {}
    told = {ONE_PROCESS: "0", THREADS: str(max(1, cores - RESERVED_CORES))}
    return {name: value for name, value in told.items() if name not in given}


def cores_without_gpu() -> int | None:
    """How many cores this process may use; None where there is a GPU, which computes instead, or that isn't known."""
    if sys.platform != "linux" or any(Path(device).exists() for device in GPU_DEVICES):
        return None
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
