"""Workers that die or hang, as a decoder may."""

import os
import threading
from pathlib import Path

from diffcolor_core import DiffColor, Fit, Scan
from tasks import colorize
from tasks.colorize import ImageWorker
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row


class DeadlyWorker(ImageWorker):
    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        if planned.work.image_key == "scan 1.png":
            os._exit(7)
        if planned.work.image_key == "scan 2.png":
            raise RuntimeError("the store is away")
        return super().colorize(planned, smaller_because)


class BrokenWorker(ImageWorker):
    def __init__(self, *arguments: object) -> None:
        raise RuntimeError("no model on this machine")


class HalfBrokenWorker(ImageWorker):
    """The first of its processes cannot be started."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        try:
            Path(f"{config.options.output}.broken").touch(exist_ok=False)
        except FileExistsError:
            super().__init__(config, num_threads)
        else:
            raise RuntimeError("no model on this machine")


class HangingWorker(ImageWorker):
    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        if planned.work.image_key == "broken.jpg":
            threading.Event().wait()
        return super().colorize(planned, smaller_because)


class FaultyAcceleratorWorker(ImageWorker):
    """A GPU that fails once on "scan 1.png" and always on "scan 2.png"; after that nothing works in its process."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.poisoned = False

    def _colorize(self, planned: PlannedImage, scan: Scan, pipe: DiffColor, shared: Row) -> list[Row]:
        if planned.work.image_key == "scan 1.png":
            first_time = Path(f"{self.config.options.output}.fault")
            self.poisoned |= not first_time.exists()
            first_time.touch()
        if self.poisoned or planned.work.image_key == "scan 2.png":
            self.poisoned = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return super()._colorize(planned, scan, pipe, shared)


class SmallEyedWorker(ImageWorker):
    """Reads files of 10 bytes at most."""

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        colorize.MAX_FILE_BYTES = 10
        return super().colorize(planned, smaller_because)


class HungryWorker(ImageWorker):
    """Runs out of memory at the model's own working size."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]

        def run_out(*_: object, **__: object) -> Fit:
            raise RuntimeError("can't allocate memory: 7 GB")

        self.pipe.fit = run_out  # type: ignore[method-assign]
