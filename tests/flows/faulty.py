"""A worker whose GPU fails."""

from pathlib import Path
from typing import Any

from tasks.colorize import ImageWorker, Opened
from tasks.rows import Row


class FaultyAcceleratorWorker(ImageWorker):
    """A GPU that fails once, on "scan 1.png"; after that nothing works in its process."""

    poisoned = False

    def _colorize(self, opened: Opened, *more: Any) -> list[Row]:
        if opened.asked.work.image_key == "scan 1.png":
            first_time = Path(f"{self.config.options.output}.fault")
            self.poisoned |= not first_time.exists()
            first_time.touch()
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return super()._colorize(opened, *more)
