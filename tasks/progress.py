"""What a run shows while it works: a bar on a terminal, log lines anywhere else."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffcolor_core.progress import Progress as Show
from tasks.metrics import RunMetrics

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]
each_image = logging.getLogger(__name__)
LOG_EVERY_SECONDS = 30.0
MAX_LISTED = 100
"""Quarantined images that are kept with their reasons. The manifest has all of them."""


def visible(text: str) -> str:
    """`text` with control characters written out: a file name may hold line breaks and terminal commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def counted(console: Console, text: str) -> Iterator[Show]:
    """Shows how far long work is, as a bar with `text` before it: yields what the work is to call."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        line = bar.add_task("", total=None)
        yield lambda _, done, total: bar.update(line, completed=done, total=total)


@contextmanager
def captions_shown(console: Console, logger: Logger) -> Iterator[Show]:
    """Shows how many images have been captioned: yields what `caption_archive` is to call."""
    last = time.monotonic()

    def log(_: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LOG_EVERY_SECONDS:
            last = time.monotonic()
            logger.info("%d of %d images captioned", done, total)

    if not console.is_terminal:
        yield log
        return
    with counted(console, "captioning") as show:
        yield show


class RunProgress:
    """Counts images that are done, failed and quarantined. The threads of the shard tasks may share it.

    Without warnings in the log, there is no bar either: such a run is meant to be quiet.
    """

    def __init__(self, num_images: int, logger: Logger, metrics: RunMetrics) -> None:
        self.num_images, self.logger, self.metrics = num_images, logger, metrics
        self.counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self.quarantined: list[tuple[str, str, str]] = []
        """The first `MAX_LISTED` quarantined images: key, class of the error, message."""
        self._lock = threading.Lock()
        self._start = self._last_log = time.monotonic()
        self._end: float | None = None
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal and logger.isEnabledFor(logging.WARNING):
            columns = (
                TextColumn("colorizing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=num_images, detail="")

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end = time.monotonic()
        if self._bar is not None:
            self._bar.stop()

    def image_done(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count one image by the worst status of its rows, and log it if that is not ok."""
        rows = list(rows)
        statuses = {row["status"] for row in rows}
        status = next(s for s in ("failed", "quarantined", "ok") if s in statuses)
        with self._lock:
            self.counts[status] += 1
            done = self.counts.total()
            row = next(row for row in rows if row["status"] == status)
            key = row["image_key"]
            if status == "ok":  # not to Prefect, whose server would keep a line for each image
                each_image.info("%s", visible(f"{key}: ok"))
            else:
                error, message = row["error_class"], row["error_message"]
                self._errors[error] += 1
                if status == "quarantined" and len(self.quarantined) < MAX_LISTED:
                    self.quarantined.append((key, error, message))
                self.logger.warning("%s", visible(f"{key}: {status} ({error}: {message})"))
            self.metrics.image_done(status, rows, num_left=self.num_images - done)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, detail=self._detail())
            elif time.monotonic() - self._last_log >= LOG_EVERY_SECONDS or done == self.num_images:
                self._last_log = time.monotonic()
                self.logger.info("%s", self.in_words())

    def most_frequent_errors(self, limit: int = 10) -> list[tuple[str, int]]:
        """The classes of errors with the number of images that are not ok because of each."""
        with self._lock:
            return self._errors.most_common(limit)

    def images_per_minute(self) -> float:
        """The mean rate from the start until now, or until the end."""
        now = time.monotonic() if self._end is None else self._end
        return self.counts.total() / max(now - self._start, 1e-9) * 60

    def in_words(self) -> str:
        """How far the run is, in a line."""
        done = self.counts.total()
        left = (self.num_images - done) / max(self.images_per_minute() / 60, 1e-9)
        remaining = f"{left:.0f} s left" if done else "no image done yet"
        return f"{done} of {self.num_images} images, {self._detail()}, {remaining}"

    def _detail(self) -> str:
        failed, quarantined = self.counts["failed"], self.counts["quarantined"]
        return f"{failed} failed, {quarantined} quarantined, {self.images_per_minute():.1f} images/min"
