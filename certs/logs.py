"""What a process says of its work: lines of text for people or, with ``VLAFLEET_LOG_FORMAT=json``, JSON for machines.

Children inherit the choice. A library's logger that has a handler of its own, Flower's first of all, keeps its level
and its stream, and is made to write JSON as well.
"""

import json
import logging
import os
import sys
import threading
import traceback as traceback_of
from types import TracebackType
from typing import Final

from pythonjsonlogger.core import RESERVED_ATTRS, LogData
from pythonjsonlogger.json import JsonFormatter

from certs.errors import ConfigError

FORMAT: Final = "VLAFLEET_LOG_FORMAT"

# Loggers that get a handler of their own when their library is imported.
_OWN_HANDLERS = ("flwr", "transformers", "huggingface_hub", "datasets")
# One line per request, and one per step of Flower's database set-up.
_CHATTY = ("httpx", "alembic")

_bound: dict[str, str | int] = {}


class _Json(JsonFormatter):
    """One JSON object a line, in ASCII: no control character of a peer's text reaches the terminal."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(process)d %(message)s",
            rename_fields={
                "levelname": "level",
                "name": "logger",
                "process": "pid",
                "exc_info": "exception",
                "stack_info": "stack",
            },
            # uvicorn's copy of its message, with the terminal's colours.
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
            timestamp="time",
        )

    def process_log_record(self, log_data: LogData) -> LogData:
        return {"time": log_data.pop("time"), **_bound, **log_data}


def configure() -> None:
    """Set up this process's logging, once, as ``VLAFLEET_LOG_FORMAT`` asks: ``text``, the default, or ``json``.

    Raises ``ConfigError`` for anything else.
    """
    wanted = os.environ.get(FORMAT) or "text"
    if wanted not in ("text", "json"):
        raise ConfigError(f"{FORMAT} is {wanted!r}: set it to 'text' or 'json'")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    formatter = _Json() if wanted == "json" else None
    handler.setFormatter(formatter or text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _OWN_HANDLERS:
        _adopt(logging.getLogger(name), formatter)
    if formatter is not None:
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread


def bind(**fields: str | int | None) -> None:
    """Add fields (``role``, ``site``, ``run``, ``round``) to every later line of JSON; None takes one away."""
    for name, value in fields.items():
        if value is None:
            _bound.pop(name, None)
        else:
            _bound[name] = value


def say(sentence: str) -> None:
    """Say why this process ends, in a sentence or a line of JSON."""
    if any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers):
        logging.getLogger("vlafleet").error("%s", sentence)
    else:
        print(f"vlafleet: {sentence}", file=sys.stderr)


def entry(line: str) -> tuple[str, str] | None:
    """Return the level and the message of a line of JSON; None for a line of text."""
    try:
        said = json.loads(line)
        return said["level"], said["message"]
    except (ValueError, TypeError, KeyError):
        return None


def _adopt(logger: logging.Logger, formatter: logging.Formatter | None) -> None:
    """Give the handlers that a logger has, and those that its library's import will add, a format of ours."""
    add = logger.addHandler

    def adopted(hdlr: logging.Handler) -> None:
        # The root logger, which spoke for it until now, would say everything again.
        logger.propagate = False
        if formatter is not None:
            # Flower's handler has a format of its own, and asks no formatter.
            hdlr.format = formatter.format  # type: ignore[method-assign]
            # Flower parts its lines with empty ones.
            hdlr.addFilter(lambda record: bool(record.getMessage()))
        add(hdlr)

    for handler in logger.handlers:
        adopted(handler)
    logger.addHandler = adopted  # type: ignore[method-assign]


def _uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    said = "".join(traceback_of.format_exception_only(error)).strip()
    logging.getLogger("vlafleet").critical("%s", said, exc_info=(kind, error, traceback))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
