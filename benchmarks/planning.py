"""How long a plan takes, and how much memory: catalog and listing of N images, nothing done before.

python -m benchmarks.planning --rows 1000000 --json benchmarks/results/scale.json

Each size runs in a process of its own. The listing is made up on the fly: the store's own time is not in it.
"""

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from diffcolor_core import preset
from support.record import record
from tasks.archive import read_catalog
from tasks.planning import RunConfig, open_plan
from tasks.storage import Store


class MadeUpStore(Store):
    """A store that lists `num_files` images and holds none."""

    num_files = 0

    def walk(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Every key with a version token."""
        for number in range(self.num_files):
            yield f"box-{number % 1000:03d}/scan-{number:08d}.tif", f"token-{number}"


def plan(rows: int) -> dict[str, float]:
    """Seconds and bytes of one plan of `rows` images."""
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
            **{"run_id": "r", "archive": folder, "output": folder, "model": "demo", "model_id": "demo"},
            **{"model_revision": "1", "preset": "demo", "settings": preset("demo"), "seed": 0, "device": "cpu"},
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with open_plan(archive, Store(f"{folder}/out"), config, read_catalog(archive, str(catalog))) as made:
            planned = time.perf_counter() - start
            images = sum(len(shard.images) for shard in made.shards(256))
        assert images == rows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": rows,
        "plan_seconds": planned,
        "plan_and_read_seconds": time.perf_counter() - start,
        "peak_bytes": peak * 1024,
        "peak_bytes_before": before * 1024,
    }


def main(
    rows: Annotated[int, typer.Option(help="Images of the larger plan; a tenth is planned first.")] = 1_000_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    alone: Annotated[bool, typer.Option(help="This size only, in this process.")] = False,
) -> None:
    """Plan a tenth of the rows, then all of them."""
    if alone:
        print(json.dumps(plan(rows)))
        return
    figures = []
    for size in (rows // 10, rows):
        command = [sys.executable, "-m", "benchmarks.planning", "--rows", str(size), "--alone"]
        figures.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(figures[-1], flush=True)
    record(json_file, "planning", figures, "duckdb", "pyarrow")


if __name__ == "__main__":
    typer.run(main)
