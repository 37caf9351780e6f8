"""A worker that only sleeps and writes. It does not import torch, so dozens fit into a small machine."""

import hashlib
import time
from datetime import UTC, datetime

from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, base_row
from tasks.storage import Store

SLEEP_SECONDS = 5.0
PICTURE = b"what an image would be"


class FleetWorker:
    """Replaces `tasks.colorize.ImageWorker`."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        self.config, self.output = config, Store(config.options.output)

    def ready(self) -> str:
        """The Ray node's id."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        """Sleep, then write a file and a row for each variant."""
        started_at = datetime.now(UTC)
        time.sleep(SLEEP_SECONDS)
        rows = []
        for index, variant in enumerate(planned.work.variants):
            key = f"images/{planned.work.image_key}/{variant.name}.png"
            self.output.write(key, PICTURE)
            columns = {
                "status": "ok",
                "started_at": started_at,
                "finished_at": datetime.now(UTC),
                "output_uri": self.output.uri(key),
                "output_sha256": hashlib.sha256(PICTURE).hexdigest(),
            }
            rows.append(base_row(self.config, planned, index) | columns)
        return rows
