"""A worker that hangs, crashes or exhausts its memory on three images, as a broken decoder might."""

import faulthandler
import resource
import threading

import psutil

from tasks.colorize import ImageWorker, Opened
from tasks.records import PlannedImage
from tasks.rows import Row

HANG, SEGFAULT, BALLOON = "hang.png", "segfault.png", "balloon.png"


class PoisonedWorker(ImageWorker):
    """Misbehaves on the images called HANG, SEGFAULT and BALLOON."""

    def _open(self, planned: PlannedImage) -> list[Row] | Opened:
        """Open an image, unless its name asks for trouble."""
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
        return super()._open(planned)
