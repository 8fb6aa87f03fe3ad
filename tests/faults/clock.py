"""The wall clocks of the processes under test: each can jump, alone, while it runs."""

from __future__ import annotations

from pathlib import Path

SKEWED = Path(__file__).with_name("skewed")
OFFSET_BYTES = 8


class Clock:
    """One file for each process; skewed/sitecustomize.py reads it there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def environ(self, name: str) -> dict[str, str]:
        """What the process *name* must be started with."""
        self.jump(name, 0.0)
        return {"FAULTS_CLOCK": str(self._file(name))}

    def jump(self, name: str, seconds: float) -> None:
        """The clock of *name* is off by so many seconds from now on, also after a restart."""
        offset = int(seconds * 1e9).to_bytes(OFFSET_BYTES, "little", signed=True)
        file = self._file(name)
        if file.exists():  # in place: it is mapped
            with file.open("r+b") as opened:
                opened.write(offset)
        else:
            file.write_bytes(offset)

    def _file(self, name: str) -> Path:
        return self._folder / name
