"""A pool whose one worker is in this process: for tests of what is around the actors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tasks.colorize import ImageWorker
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row


class InProcessPool:
    """Stands for an `ActorPool` and for its one actor. It has no process that could die, and no timeout."""

    num_actors = 1

    def __init__(self, config: RunConfig) -> None:
        self._worker = ImageWorker(replace(config, device="cpu"))
        self._at_work = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator["InProcessPool"]:
        """The worker, for one image at a time."""
        with self._at_work:
            yield self

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing is killed at the end, so nobody has to wait."""
        yield

    def colorize(self, planned: PlannedImage, timeout_seconds: float, smaller_because: str | None) -> list[Row]:
        """The image's rows. Raises what the worker raises."""
        return self._worker.colorize(planned, smaller_because)
