"""What Prometheus can see of a run, through Ray's own metrics: Ray's agent on each node serves them.

All are recorded in the process of the flow, which hears of every outcome, also of images that kill their actor. Ray
passes them to the agent every 10 s. Their names there begin with `ray_`. The label `run` is the run's name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

IMAGES = "diffcolor_images"
STAGE_SECONDS = "diffcolor_stage_seconds"
IMAGES_LEFT = "diffcolor_images_left"
EXPORTED = (
    f"ray_{IMAGES}_total",
    *(f"ray_{STAGE_SECONDS}_{kind}" for kind in ("bucket", "count", "sum")),
    f"ray_{IMAGES_LEFT}",
)
"""The names under which Prometheus finds them."""
BOUNDARIES_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
"""From a bundled model on a CPU to the paper's settings on a slow GPU."""


class RunMetrics:
    """The metrics of one run. This process must be connected to Ray."""

    def __init__(self, run_id: str, num_images: int) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        run = {"run": run_id}
        self._images = Counter(IMAGES, "Images that are done, by their worst status.", ("run", "status"))
        self._stage_seconds = Histogram(
            STAGE_SECONDS,
            "Seconds of stage1 and stage2 of each new fit, and of sampling of each variant.",
            list(BOUNDARIES_SECONDS),
            ("run", "stage"),
        )
        self._images_left = Gauge(IMAGES_LEFT, "The queue: images that are to do and not done yet.", ("run",))
        for metric in (self._images, self._stage_seconds, self._images_left):
            metric.set_default_tags(run)
        self.queue(num_images)

    def queue(self, num_left: int) -> None:
        """Tell how many images are left. Ray forgets a gauge that is not set again within 20 s."""
        self._images_left.set(num_left)

    def image_done(self, status: str, rows: Sequence[Mapping[str, Any]], *, num_left: int) -> None:
        """Count an image, and the seconds of what was done for it in this run."""
        self._images.inc(tags={"status": status})
        self.queue(num_left)
        made = [row for row in rows if row["status"] == "ok" and row.get("adopted_from") is None]
        for row in made:
            self._stage_seconds.observe(row["sampling_seconds"], {"stage": "sampling"})
        if made and not made[0]["fit_reused"]:
            for stage in ("stage1", "stage2"):
                self._stage_seconds.observe(made[0][f"{stage}_seconds"], {"stage": stage})
