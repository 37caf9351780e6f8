"""A worker that three images hang, crash, or make run out of memory."""

import faulthandler
import resource
import threading

import psutil

from tasks.colorize import ImageWorker
from tasks.planning import PlannedImage
from tasks.rows import Row

HANG, SEGFAULT, BALLOON = "hang.png", "segfault.png", "balloon.png"


class PoisonedWorker(ImageWorker):
    """Does what a broken decoder would do, for three images by name."""

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        name = planned.work.image_key
        if name == HANG:
            threading.Event().wait()
        if name == SEGFAULT:
            faulthandler._sigsegv()
        if name == BALLOON:
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, before[1]))
            try:
                bytearray(2**34)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        return super().colorize(planned, smaller_because)
