"""Planning and querying a million images.

python -m benchmarks.scale plan --json benchmarks/results/scale.json       (1 minute)
python -m benchmarks.scale queries --json benchmarks/results/scale.json    (4 minutes)
"""

import csv
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from diffcolor_core import preset
from support.record import record
from tasks.archive import read_catalog
from tasks.compaction import compact
from tasks.manifest import commit_part, query
from tasks.options import RunOptions
from tasks.planning import open_plan
from tasks.records import RunConfig
from tasks.storage import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
RowsOption = Annotated[int, typer.Option(help="Number of images.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")]

QUESTIONS = {
    "count by status": "select status, count(*) from results group by status",
    "one image": "select * from results where image_key = 'box-123/scan-00123123.tif'",
    "errors": "select error_class, count(*) from results where status <> 'ok' group by all",
    "slowest ten": "select image_key, total_seconds from results order by total_seconds desc limit 10",
}


class MadeUpStore(Store):
    """A store that lists `num_files` images and holds none, so that its own time is not measured."""

    num_files = 0

    def walk(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Every key with its version token."""
        for number in range(self.num_files):
            yield f"box-{number % 1000:03d}/scan-{number:08d}.tif", f"token-{number}"


def planned(rows: int) -> dict[str, float]:
    """Seconds and peak memory of one plan over `rows` images, none of them done before."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder, "catalog.csv")
        with catalog.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "context_prompt", "target_prompt"])
            for number in range(rows):
                image = f"box-{number % 1000:03d}/scan-{number:08d}.tif"
                writer.writerow([image, f"a house number {number} under a sky", "a red house under a blue sky"])
        archive = MadeUpStore(folder)
        archive.__dict__["num_files"] = rows
        config = RunConfig(
            options=RunOptions(archive=folder, output=f"{folder}/out"),
            **{"run_id": "r", "model_id": "demo", "model_revision": "1", "settings": preset("demo")},
        )
        before = peak_bytes()
        start = time.perf_counter()
        with (
            patch("tasks.planning.Store", lambda url: archive if url == folder else Store(url)),
            open_plan(read_catalog(archive, str(catalog))) as made,
        ):
            made.fill(config)
            plan_seconds = time.perf_counter() - start
            images = sum(len(shard.images) for shard in made.shards(256))
        assert images == rows
    return {
        "rows": rows,
        "plan_seconds": plan_seconds,
        "plan_and_read_seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
    }


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@app.command()
def plan(rows: RowsOption = 1_000_000, json_file: JsonOption = None) -> None:
    """Time and memory of a plan over a tenth of the rows, then over all of them, each in its own process."""
    figures = []
    fresh = multiprocessing.get_context("spawn")
    for size in (rows // 10, rows):
        with fresh.Pool(1) as pool:
            figures.append(pool.apply(planned, (size,)))
        print(figures[-1], flush=True)
    record(json_file, "planning", figures, "duckdb", "pyarrow")


def made_up_rows(first: int, count: int) -> Iterator[dict[str, Any]]:
    """Manifest rows of `count` images, as a run writes them."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(first, first + count):
        ok = number % 100 != 7
        yield {
            "run_id": "20260101T000000Z",
            "image_key": f"box-{number % 1000:03d}/scan-{number:08d}.tif",
            "variant": f"target-{number % 16:010x}",
            "status": "ok" if ok else "quarantined",
            "error_class": None if ok else "UnreadableImageError",
            "error_message": None if ok else "the file is empty",
            "attempt": 1,
            "input_uri": f"s3://museum/scans/box-{number % 1000:03d}/scan-{number:08d}.tif",
            "input_sha256": f"{number * 2654435761 % 2**64:064x}",
            "output_uri": f"s3://museum/out/images/{number:08d}/target.png" if ok else None,
            "output_sha256": f"{number * 40503 % 2**61:064x}" if ok else None,
            "context_prompt": "a house under a sky",
            "target_prompt": "a red house under a blue sky",
            "model_id": "demo",
            "model_revision": "sha256:0",
            "config_sha256": "0" * 64,
            "seed": 0,
            "nouns": [{"noun": "house", "color": "red", "agreement": 0.9, "achievable_chroma": 60.0, "feasible": True}],
            "colorfulness": 40.0 + number % 30,
            "total_seconds": 10.0 + number % 977 / 100,
            "started_at": start + timedelta(seconds=number),
            "finished_at": start + timedelta(seconds=number + 10),
            "software_version": "1",
            "generation": 1,
        }


def asked(output: Store) -> dict[str, float]:
    """Median seconds of each question over three times, connection and listing included."""
    seconds = {}
    for name, sql in QUESTIONS.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            query(output, sql).fetchall()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    return seconds


@app.command()
def queries(
    rows: RowsOption = 1_000_000,
    rows_per_part: Annotated[int, typer.Option(help="Rows of each part before compaction.")] = 500,
    json_file: JsonOption = None,
) -> None:
    """How long questions to a manifest take before and after compaction."""
    with tempfile.TemporaryDirectory() as folder:
        output = Store(folder)
        for number, first in enumerate(range(0, rows, rows_per_part)):
            part = list(made_up_rows(first, min(rows_per_part, rows - first)))
            commit_part(output, f"000001-{number:06d}-00001", part)
        loose = asked(output)
        start = time.perf_counter()
        done = compact(output)
        figures = {
            "rows": rows,
            "loose_parts": done.parts_before,
            "loose_seconds": loose,
            "compact_seconds": time.perf_counter() - start,
            "compacted_parts": done.parts_after,
            "compacted_seconds": asked(output),
            "peak_bytes": peak_bytes(),
        }
    record(json_file, "queries", figures, "duckdb", "pyarrow")


if __name__ == "__main__":
    app()
