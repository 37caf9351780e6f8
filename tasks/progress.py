"""What a run shows while it works: a bar on a terminal, log lines anywhere else."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_SECONDS = 30.0
each_image = logging.getLogger(__name__)


def visible(text: str) -> str:
    """`text` with control characters written out: a file name may hold line breaks and terminal commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RunProgress:
    """Counts images that are done, failed and quarantined. The threads of the shard tasks may share it.

    Without warnings in the log, there is no bar either: such a run is meant to be quiet.
    """

    def __init__(self, num_images: int, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self.num_images, self.logger = num_images, logger
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._start = self._last_log = time.monotonic()
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
            now = time.monotonic()
            rate = done / max(now - self._start, 1e-9) * 60
            detail = f"{self.counts['failed']} failed, {self.counts['quarantined']} quarantined, {rate:.1f} images/min"
            row = next(row for row in rows if row["status"] == status)
            message = f"{row['image_key']}: {status}"
            if status == "ok":  # not to Prefect, whose server would keep a line for each image
                each_image.info("%s", visible(message))
            else:
                self.logger.warning("%s", visible(f"{message} ({row['error_class']}: {row['error_message']})"))
            if self._bar is not None:
                self._bar.update(self._task, completed=done, detail=detail)
            elif now - self._last_log >= LOG_EVERY_SECONDS or done == self.num_images:
                self._last_log = now
                left = (self.num_images - done) / max(rate / 60, 1e-9)
                self.logger.info("%d of %d images, %s, %.0f s left", done, self.num_images, detail, left)
