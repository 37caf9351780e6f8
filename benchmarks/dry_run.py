"""Is `run --dry-run` right? What it tells of 24 images, against the run of the same 24.

python -m benchmarks.dry_run --json benchmarks/results/dry_run.json        (15 minutes)

Rendered scenes, the demo model, local Ray. A run of a few other images comes first, for the medians. The machine must
be equally busy all the time. A ratio is what was told, divided by what was measured.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from diffcolor_training.sample_archive import main as write_archive
from support.record import record
from tasks.layout import FITS, IMAGES
from tasks.manifest import query
from tasks.storage import Store

RUN_ID = "measured"
_MEASURED = f"""
    select count(*), sum(seconds), epoch(max(finished)) - epoch(min(started)), sum(variants) from (
        select min(started_at) as started, max(finished_at) as finished, count(*) as variants,
            epoch(max(finished_at)) - epoch(min(started_at)) as seconds
        from attempts where run_id = '{RUN_ID}' and status = 'ok' group by image_key
    )
"""


def diffcolor(*words: object) -> str:
    """stdout of a command."""
    command = [sys.executable, "-c", "from flows.cli import app; app()", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def num_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(
    before: Annotated[int, typer.Option(help="Images of the first run.")] = 12,
    images: Annotated[int, typer.Option(help="Images that are estimated, and then done.")] = 24,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of both runs, as for `run`.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
) -> None:
    """Estimate by medians and by a trial, run, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        archive, output = Path(folder, "archive"), Path(folder, "out")
        write_archive(archive, before + images, 7)
        settings = (word for setting in set_ or () for word in ("--set", setting))
        run = ("run", archive, output, "--model", "demo", "--no-report", *settings)
        diffcolor(*run, "--limit", before)
        told: dict[str, dict[str, Any]] = {
            by: json.loads(diffcolor(*run, "--dry-run", *flags))
            for by, flags in {"medians": (), "a trial": ("--probe",)}.items()
        }
        kept = {name: num_bytes(output / name) for name in (IMAGES, FITS)}
        diffcolor(*run, "--run-id", RUN_ID)
        ((done, seconds, span, variants),) = query(Store(str(output)), _MEASURED).fetchall()
        written = {name: num_bytes(output / name) - kept[name] for name in kept}
    figures: dict[str, Any] = {"images": done, "variants": variants, "seconds": seconds, "span_seconds": span}
    for by, estimate in told.items():
        assert (estimate["images_new"], estimate["variants_to_do"]) == (done, variants) == (images, variants), estimate
        figures[f"ratios of {by}"] = {
            "seconds": estimate["seconds"] / seconds,
            "span_seconds": estimate["seconds"] / estimate["num_actors"] / span,
            "picture_bytes": estimate["picture_bytes"] / written[IMAGES],
            "fit_bytes": estimate["fit_bytes"] / written[FITS],
        }
    record(json_file, "dry_run", figures, "prefect", "ray", "torch")


if __name__ == "__main__":
    typer.run(main)
