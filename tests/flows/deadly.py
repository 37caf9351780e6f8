"""Workers that die or hang, as a decoder may."""

import os
import threading

from tasks.colorize import ImageWorker, Row
from tasks.planning import PlannedImage


class DeadlyWorker(ImageWorker):
    def colorize(self, planned: PlannedImage) -> list[Row]:
        if planned.work.image_key == "scan 1.png":
            os._exit(7)
        if planned.work.image_key == "scan 2.png":
            raise RuntimeError("the store is away")
        return super().colorize(planned)


class HangingWorker(ImageWorker):
    def colorize(self, planned: PlannedImage) -> list[Row]:
        if planned.work.image_key == "broken.jpg":
            threading.Event().wait()
        return super().colorize(planned)
