"""Logs: readable on a terminal, JSON otherwise. Names are past-tense events with keys; prompts, answers and keys never appear."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

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
        factory: Any = structlog.PrintLoggerFactory(sys.stderr)
    else:
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(msgspec_dumps)]
        factory = structlog.BytesLoggerFactory(sys.stderr.buffer)
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


def msgspec_dumps(value: object, **_: object) -> bytes:
    return msgspec.json.encode(value, enc_hook=repr)
