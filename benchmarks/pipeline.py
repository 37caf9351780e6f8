"""What the pipeline itself costs: the real flow, Ray and manifest around a worker that sleeps instead of colorizing.

python -m benchmarks.pipeline --json benchmarks/results/scale.json         (6 minutes)

Runs on local Ray with an embedded Prefect server. With fewer cores than actors, everything but the sleep
competes for the cores, so the figures are upper bounds.
"""

import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import typer
from PIL import Image

from benchmarks.sleeping_worker import SECONDS, SleepingWorker
from support.record import record
from tasks.manifest import query
from tasks.storage import Store

SQL = """select count(*), epoch(max(finished_at)) - epoch(min(started_at)), sum(total_seconds) from results"""


def make_archive(folder: Path, num_images: int) -> None:
    """`num_images` small gray pictures and a catalog."""
    folder.mkdir()
    lines = ["image,context_prompt,target_prompt"]
    for number in range(num_images):
        Image.fromarray(np.full((32, 32), number % 256, dtype=np.uint8)).save(folder / f"{number:06d}.png")
        lines.append(f"{number:06d}.png,a ball on a table,a red ball on a blue table")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n")


def measure(num_images: int, seconds: float, num_actors: int, shard_size: int) -> dict[str, float]:
    """The figures of one run through the flow."""
    os.environ |= {"PREFECT_LOGGING_LEVEL": "WARNING", SECONDS: str(seconds)}
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    from prefect.testing.utilities import prefect_test_harness

    from flows.colorize_archive import colorize_archive
    from tasks import actors

    with (
        prefect_test_harness(server_startup_timeout=120),  # a server with an empty database
        patch.object(actors, "ImageWorker", SleepingWorker),
        tempfile.TemporaryDirectory() as folder,
    ):
        make_archive(Path(folder, "archive"), num_images)
        start = time.perf_counter()
        summary = colorize_archive(
            archive=f"{folder}/archive",
            output=f"{folder}/out",
            options={"num_actors": num_actors, "shard_size": shard_size},
        )
        wall = time.perf_counter() - start
        assert summary["ok"] == num_images, summary
        ((count, span, slept),) = query(Store(f"{folder}/out"), SQL).fetchall()
    assert count == num_images
    ideal = num_images * seconds / num_actors
    return {
        "images": num_images,
        "sleep_seconds": seconds,
        "actors": num_actors,
        "shard_size": shard_size,
        "wall_seconds": wall,
        "span_seconds": span,  # from the start of the first image to the end of the last
        "overhead_ms_per_image": 1000 * (span - ideal) / num_images,
        "overhead_share": (span - ideal) / span,
        "actors_idle_share": 1 - slept / (span * num_actors),
        "peak_bytes_of_the_flow": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(
    images: Annotated[int, typer.Option(help="Images of each run.")] = 2000,
    actors: Annotated[int, typer.Option(help="Actors of the second run.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
) -> None:
    """Two runs, each in its own process: no sleep with two actors, then one second with several."""
    figures = []
    fresh = multiprocessing.get_context("spawn")
    for arguments in ((images, 0.0, 2, 32), (images, 1.0, actors, 32)):
        with fresh.Pool(1) as pool:
            figures.append(pool.apply(measure, arguments))
        print(figures[-1], flush=True)
    record(json_file, "pipeline", figures, "prefect", "ray")


if __name__ == "__main__":
    typer.run(main)
