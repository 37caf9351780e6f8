"""A worker that dies, as a decoder that crashes would make it."""

import os

from tasks.colorize import ImageWorker, Row
from tasks.planning import PlannedImage


class DeadlyWorker(ImageWorker):
    def colorize(self, planned: PlannedImage) -> list[Row]:
        if planned.work.image_key == "scan 1.png":
            os._exit(7)
        if planned.work.image_key == "scan 2.png":
            raise RuntimeError("the store is away")
        return super().colorize(planned)
