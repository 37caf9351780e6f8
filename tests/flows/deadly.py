"""Workers that die or hang, as a decoder may."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcolor_core import DivergedError, Fit, ToFit
from tasks import colorize
from tasks.colorize import ImageWorker, Opened
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row


class DeadlyWorker(ImageWorker):
    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        if planned.work.image_key == "scan 1.png":
            os._exit(7)
        if planned.work.image_key == "scan 2.png":
            raise RuntimeError("the store is away")
        return super().colorize(planned, smaller_because)


class DeadlyInABatchWorker(ImageWorker):
    """Dies in the fit of a photograph under the prompt "a deadly box", whatever is in the batch with it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        fit_batch = self.pipe.fit_batch

        def die(photographs: list[ToFit], **more: Any) -> Iterator[Fit | DivergedError]:
            if any(one.context_prompt == "a deadly box" for one in photographs):
                os._exit(7)
            return fit_batch(photographs, **more)

        self.pipe.fit_batch = die  # type: ignore[method-assign,assignment]


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

    def _colorize(self, opened: Opened, *more: Any) -> list[Row]:
        if opened.asked.work.image_key == "scan 1.png":
            first_time = Path(f"{self.config.options.output}.fault")
            self.poisoned |= not first_time.exists()
            first_time.touch()
        if self.poisoned or opened.asked.work.image_key == "scan 2.png":
            self.poisoned = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return super()._colorize(opened, *more)


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
