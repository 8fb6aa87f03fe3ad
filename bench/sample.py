"""CPU seconds and memory of processes, by role."""

import contextlib
from collections.abc import Callable, Mapping

import psutil

MIB = 1024 * 1024


class Meter:
    """Reads the processes of one program. Roles with several processes are summed.

    The pids are asked for at each reading. A process that died takes its CPU seconds with it, so `replaced` says whether
    that happened since the last reading: numbers from over such a gap are worth nothing.
    """

    def __init__(self, pids: Callable[[], Mapping[str, list[int]]]) -> None:
        self.pids = pids
        self.known: dict[int, psutil.Process] = {}
        self.replaced = 0
        self.peak_mib: dict[str, float] = {}

    def cpu_s(self) -> dict[str, float]:
        """User and system seconds since each process began."""
        used: dict[str, float] = {}
        for process, role in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # counted by the next reading
                times = process.cpu_times()
                used[role] = used.get(role, 0.0) + times.user + times.system
        return used

    def rss_mib(self) -> dict[str, float]:
        """Resident memory now; also keeps the peak of all readings in `peak_mib`."""
        held: dict[str, float] = {}
        for process, role in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                held[role] = held.get(role, 0.0) + process.memory_info().rss / MIB
        for role, mib in held.items():
            self.peak_mib[role] = max(mib, self.peak_mib.get(role, 0.0))
        return held

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """The live processes with their roles; each once, under the last role that names it."""
        roles = {pid: role for role, pids in self.pids().items() for pid in pids}
        for pid in list(self.known):
            if pid not in roles or not self.known[pid].is_running():
                del self.known[pid]
                self.replaced += 1
        for pid in roles:
            if pid not in self.known and psutil.pid_exists(pid):
                self.known[pid] = psutil.Process(pid)
        return [(process, roles[pid]) for pid, process in self.known.items()]


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def machine_busy_s() -> float:
    """CPU seconds the whole machine has worked since it began."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
