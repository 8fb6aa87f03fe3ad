"""Logs: readable on a terminal, JSON otherwise. Names are past-tense events with keys; prompts, answers and keys never appear.

A line that can't be written, because its reader is gone or the disk is full, is lost. Whoever wrote it goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(role: str) -> None:
    """Sets logging up for a process, and binds its *role* to every line. PENSTOCK_LOG_LEVEL chooses the level (info)."""
    level = LEVELS.get(os.environ.get("PENSTOCK_LOG_LEVEL", "info").lower(), logging.INFO)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty() or os.environ.get("PENSTOCK_LOG_FORMAT") == "text":
        renderers: list[Any] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        factory: Any = structlog.PrintLoggerFactory(_Outlet(sys.stderr))  # type: ignore[arg-type]  # writes and flushes
    else:
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(msgspec_dumps)]
        factory = structlog.BytesLoggerFactory(_Outlet(sys.stderr.buffer))  # type: ignore[arg-type]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    logging.basicConfig(
        level=max(level, logging.WARNING), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s"
    )


@contextlib.contextmanager
def losing(stream: IO[Any]) -> Iterator[None]:
    """What can't be written to *stream* is lost, and no error."""
    try:
        yield
    except BrokenPipeError:  # for good, so what is still buffered mustn't fail once more at the process's end
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except OSError:  # for now: a disk that is full
        pass


class _Outlet:
    """The part of a file that structlog uses."""

    def __init__(self, stream: IO[Any]) -> None:
        self._stream = stream

    def write(self, line: str | bytes) -> None:
        with losing(self._stream):
            self._stream.write(line)

    def flush(self) -> None:
        with losing(self._stream):
            self._stream.flush()


def msgspec_dumps(value: object, **_: object) -> bytes:
    return msgspec.json.encode(value, enc_hook=repr)
