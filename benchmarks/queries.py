"""How long questions to a manifest of N rows take, loose and compacted.

python -m benchmarks.queries --rows 1000000 --json benchmarks/results/scale.json
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from support.record import record
from tasks.manifest import commit_part, compact, query
from tasks.storage import Store

QUESTIONS = {
    "count by status": "select status, count(*) from results group by status",
    "one image": "select * from results where image_key = 'box-123/scan-00123123.tif'",
    "errors": "select error_class, count(*) from results where status <> 'ok' group by all",
    "slowest ten": "select image_key, total_seconds from results order by total_seconds desc limit 10",
}


def made_up_rows(first: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows of `count` images as a run writes them."""
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
    """Median seconds of each question, of three times, connection and listing included."""
    seconds = {}
    for name, sql in QUESTIONS.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            query(output, sql).fetchall()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    return seconds


def main(
    rows: Annotated[int, typer.Option(help="Rows of the manifest.")] = 1_000_000,
    rows_per_part: Annotated[int, typer.Option(help="In the loose parts.")] = 500,
    json_file: Annotated[Path | None, typer.Option("--json", help="Put the figures here.")] = None,
) -> None:
    """Write the manifest, ask, compact, ask again."""
    with tempfile.TemporaryDirectory() as folder:
        output = Store(folder)
        for number, first in enumerate(range(0, rows, rows_per_part)):
            commit_part(
                output, f"000001-{number:06d}-00001", list(made_up_rows(first, min(rows_per_part, rows - first)))
            )
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
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    record(json_file, "queries", figures, "duckdb", "pyarrow")


if __name__ == "__main__":
    typer.run(main)
