"""Workers that die, hang or fail, as a decoder or a GPU may."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcolor_core import DivergedError, Fit, ToFit
from tasks.colorize import ImageWorker, Opened
from tasks.rows import Row


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


class FaultyAcceleratorWorker(ImageWorker):
    """A GPU that fails once, on "scan 1.png"; after that nothing works in its process."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.poisoned = False

    def _colorize(self, opened: Opened, *more: Any) -> list[Row]:
        if opened.asked.work.image_key == "scan 1.png":
            first_time = Path(f"{self.config.options.output}.fault")
            self.poisoned |= not first_time.exists()
            first_time.touch()
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return super()._colorize(opened, *more)
