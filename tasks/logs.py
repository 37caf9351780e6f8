"""Logs as JSON lines on stderr: time, level, logger and message, with run, shard, image and attempt where known.

Ray puts a prefix before what it forwards of actors, so that is no JSON. Actors therefore keep their records (`Kept`);
the driver fetches them after each image and logs them as its own (`relay`).
"""

import atexit
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

OURS = ("tasks", "flows", "diffcolor_core")
_MIN_SECRET_CHARACTERS = 8
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|AUTH_STRING|CONNECTION_STRING", re.I)
_USER_IN_URL = re.compile(r"(://[^/\s@]*:)[^/\s@]+@")
_SIGNED_URL = re.compile(
    r"(?<![a-z])((?:X-Amz-(?:Signature|Security-Token|Credential)|sig|token|password|secret)=)[^&\s]+", re.I
)
_END = "\0end of stderr"

_ABOUT: ContextVar[dict[str, Any]] = ContextVar("about", default={})  # noqa: B039 (never changed in place)


@contextmanager
def about(**what: Any) -> Iterator[None]:
    """Say in each line logged in this context what it is about: shard, image, attempt."""
    token = _ABOUT.set(_ABOUT.get() | what)
    try:
        yield
    finally:
        _ABOUT.reset(token)


class _JsonLines(JsonFormatter):
    """One line for each record. What environment variables and URLs hold of secrets becomes "***"."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(process)d %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        ordered = {"time": log_data["time"]} | log_data
        secrets = _secrets(frozenset(os.environ.items()))
        return {name: _without(secrets, value) for name, value in ordered.items()}


@cache
def _secrets(environment: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """The values that must not be shown, the longest first."""
    named = {value for name, value in environment if _SECRET_NAME.search(name)}
    return tuple(sorted((value for value in named if len(value) >= _MIN_SECRET_CHARACTERS), key=len, reverse=True))


def _without(secrets: Iterable[str], value: Any) -> Any:
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, dict):
        return {str(name): _without(secrets, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without(secrets, part) for part in value]
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SIGNED_URL.sub(r"\1***", _USER_IN_URL.sub(r"\1***@", text))


class JsonLinesHandler(logging.StreamHandler[Any]):
    """Writes JSON lines. run: the run that this process is at.

    Prefect leaves the root logger alone if it has a handler with a formatter whose class name has no "_" in front.
    """

    run: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the run and what the context is about, unless an actor has told it."""
        for name, value in ({"run": self.run} | _ABOUT.get()).items():
            if value is not None and not hasattr(record, name):
                setattr(record, name, value)
        return bool(super().filter(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nobody reads stderr any more: then there is nobody to tell either."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_as_json(run: str | None = None, *, stray_lines: bool = False) -> None:
    """Log to stderr as JSON lines in this process, at Prefect's level; name `run` in each.

    stray_lines: make JSON lines, of the logger "stderr", also of what else this process and its children write to
    stderr. File descriptor 2 is a pipe from then on, so only the owner of the process may ask for it.
    """
    root = logging.getLogger()
    ours = next((handler for handler in root.handlers if isinstance(handler, JsonLinesHandler)), None)
    if ours is None:
        ours = JsonLinesHandler(_divert_stderr() if stray_lines else sys.stderr)
        ours.setFormatter(_JsonLines())
        for handler in list(root.handlers):
            if getattr(handler, "stream", None) is sys.stderr:  # Prefect's console
                root.removeHandler(handler)
        root.addHandler(ours)
        logging.captureWarnings(True)
        for name in OURS:
            logging.getLogger(name).setLevel(os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"))
    ours.run = run


def is_json() -> bool:
    """Whether `log_as_json` has been called."""
    return any(isinstance(handler, JsonLinesHandler) for handler in logging.getLogger().handlers)


def _divert_stderr() -> TextIO:
    """Let a thread log each line that is written to file descriptor 2; return a stream to where it led before."""
    logger = logging.getLogger("stderr")
    logger.setLevel(logging.INFO)
    sys.stderr.flush()
    real = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)

    def log_lines() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                if line.rstrip("\n") == _END:
                    return
                if line.strip():
                    logger.info("%s", line.rstrip())

    thread = threading.Thread(target=log_lines, daemon=True)
    thread.start()

    def end() -> None:  # children may hold the pipe open, so its end has to be said
        sys.stderr.flush()
        os.dup2(real, 2)
        os.write(write_end, f"\n{_END}\n".encode())
        thread.join(5)

    atexit.register(end)
    return os.fdopen(real, "w", encoding="utf-8", closefd=False)


# ------------------------------------------------------------------ actors


class Kept(logging.Handler):
    """Keeps an actor's records as plain data until the driver takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[dict[str, Any]] = []

    @classmethod
    def install(cls) -> "Kept":
        """Keep what this process logs from now on."""
        kept = cls()
        logging.getLogger().addHandler(kept)
        return kept

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record with what it is about; its traceback becomes text."""
        kept = {name: getattr(record, name) for name in ("name", "levelno", "levelname", "created", "process")}
        kept["exc_text"] = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._records.append(kept | {"msg": record.getMessage()} | _ABOUT.get())

    def take(self) -> list[dict[str, Any]]:
        """What has been kept since the last call."""
        records, self._records = self._records, []
        return records


def relay(records: Iterable[dict[str, Any]]) -> None:
    """Log what an actor has kept, in the context of the caller."""
    for record in records:
        logger = logging.getLogger(record["name"])
        if logger.isEnabledFor(record["levelno"]):
            logger.handle(logging.makeLogRecord(record))
