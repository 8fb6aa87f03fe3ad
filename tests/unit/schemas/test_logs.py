"""A log that nobody reads, or that has no room, costs its lines and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from schemas.logs import _Outlet, losing


def test_lines_without_a_reader_are_lost_and_the_file_can_be_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        log = structlog.BytesLogger(_Outlet(stream))  # type: ignore[arg-type]
        log.msg(b"nobody reads this")
        log.msg(b"nor this")
        with losing(stream):
            stream.write(b"nor this\n")


def test_lines_are_lost_while_the_disk_is_full_and_no_longer(tmp_path: Path) -> None:
    room = tmp_path / "log"
    with Path("/dev/full").open("wb", buffering=0) as full, room.open("ab", buffering=0) as free:
        log = structlog.BytesLogger(_Outlet(full))  # type: ignore[arg-type]
        log.msg(b"lost")
        os.dup2(free.fileno(), full.fileno())
        log.msg(b"written")
    assert room.read_bytes() == b"written\n"
