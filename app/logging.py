"""Structured logs: one JSON object a line on stderr, or coloured text on a terminal."""

import logging
import socket
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger

HOST = socket.gethostname()


def _add_host(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the host, because the lines of all hosts usually end in one place."""
    event["host"] = HOST
    return event


def configure_logging(level: str = "info") -> None:
    """Set up the logs. Call it once, when a process starts."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    human = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            _add_host,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
