"""Workers without a model, which start at once: one that does its work, and some that die, hang or fail."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, base_row


class Worker:
    """What its pool needs of an `ImageWorker`. It makes no pictures."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        self.config = config

    def ready(self) -> str:
        """The id of its node."""
        import ray  # not above: it reads its variables when it is imported

        return str(ray.get_runtime_context().get_node_id())

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        """A row for each variant."""
        return [base_row(self.config, planned, index) | {"status": "ok"} for index in range(len(planned.attempts))]

    def colorize_batch(self, images: Sequence[PlannedImage]) -> Iterator[tuple[int, list[Row]]]:
        """The position and the rows of each image."""
        for position, planned in enumerate(images):
            yield position, self.colorize(planned)


class DeadlyWorker(Worker):
    """Dies of "deadly.png", and cannot do "failing.png"."""

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        if planned.work.image_key == "deadly.png":
            os._exit(7)
        if planned.work.image_key == "failing.png":
            raise RuntimeError("the store is away")
        return super().colorize(planned, smaller_because)


class HangingWorker(Worker):
    """Never ends with "endless.png"."""

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        if planned.work.image_key == "endless.png":
            threading.Event().wait()
        return super().colorize(planned, smaller_because)


class BrokenWorker(Worker):
    """Cannot be started."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        raise RuntimeError("no model on this machine")


class HalfBrokenWorker(Worker):
    """The first of its processes cannot be started."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        super().__init__(config)
        try:
            Path(f"{config.options.output}.broken").touch(exist_ok=False)
        except FileExistsError:
            return
        raise RuntimeError("no model on this machine")
