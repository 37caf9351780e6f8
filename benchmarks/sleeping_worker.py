"""A worker that does everything but colorize: it reads, decodes, sleeps, writes and makes rows."""

import hashlib
import io
import os
import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from PIL import Image

from diffcolor_core import DiffColor, Scan
from tasks.colorize import ImageWorker
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, base_row

SECONDS = "DIFFCOLOR_SLEEP_SECONDS"


class SleepingWorker(ImageWorker):
    """Replaces `ImageWorker` when the cost of the pipeline around it is measured."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        super().__init__(replace(config, device="cpu"), num_threads)  # a GPU here would be a simulated one
        sink = io.BytesIO()
        Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(sink, "PNG")
        self.picture = sink.getvalue()

    def _colorize(self, planned: PlannedImage, scan: Scan, pipe: DiffColor, shared: Row) -> list[Row]:
        start = time.perf_counter()
        time.sleep(float(os.environ[SECONDS]))
        slept = time.perf_counter() - start
        rows = []
        for index, variant in enumerate(planned.work.variants):
            key = f"images/{planned.work.image_key}/{variant.name}.png"
            self.output.write(key, self.picture)
            columns = {
                "status": "ok",
                "output_uri": self.output.uri(key),
                "output_sha256": hashlib.sha256(self.picture).hexdigest(),
                "total_seconds": slept,
                "finished_at": datetime.now(UTC),
            }
            rows.append(base_row(self.config, planned, index) | shared | columns)
        return rows
