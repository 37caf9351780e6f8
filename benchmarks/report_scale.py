"""The report of large archives: time to build it again from existing thumbnails, memory, time to open it.

python -m benchmarks.report_scale build --json benchmarks/results/scale.json    (8 minutes)
python -m benchmarks.report_scale open --json benchmarks/results/scale.json     (30 seconds; needs Chromium)
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from benchmarks.scale import JsonOption, peak_bytes
from support.browser import browser, chromium
from support.outputs import TARGETS, ok_row
from support.record import record
from support.waiting import wait_until
from tasks.layout import REPORT, report_thumbnail
from tasks.manifest import commit_part
from tasks.report import write_report
from tasks.storage import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
ImagesOption = Annotated[int, typer.Option(help="Number of images.")]
ROWS_PER_PART = 5_000
NEW_IMAGES = 100
FIRST_VIEW = """() => new Promise(done => {
    const shown = () => document.querySelectorAll('#cards img').length > 3;
    const look = () => shown() ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(look);
    look();
})"""
"""Milliseconds from the start of the navigation to the frame that shows the first cards of the gallery."""


def made_up_rows(first: int, count: int) -> Iterator[dict[str, Any]]:
    """A result each of `count` images, with files that are not there."""
    for number in range(first, first + count):
        key = f"box-{number % 1000:03d}/scan-{number:08d}.tif"
        sha256 = {
            file: f"{number * 4 + i:x}".rjust(8, "0") * 8 for i, file in enumerate(("input", "primary", "output"))
        }
        yield ok_row(key, number, TARGETS[number % 2]) | {
            "input_uri": f"s3://museum/scans/{key}",
            "width_px": 3000,
            "height_px": 2000,
            "output_uri": f"s3://museum/out/images/scan-{number:08d}/target-1.png",
            "primary_uri": f"s3://museum/out/images/scan-{number:08d}/primary-1.png",
            **{f"{file}_sha256": value for file, value in sha256.items()},
        }


def committed(output: Store, first: int, count: int) -> None:
    """Commit the rows of these images, and link one thumbnail for each of their pictures."""
    thumbnail = Path(output.url, REPORT, "thumbs", "noise.webp")
    if not thumbnail.exists():
        thumbnail.parent.mkdir(parents=True)
        Image.effect_noise((320, 213), 40).convert("RGB").save(thumbnail)
    for start in range(first, first + count, ROWS_PER_PART):
        rows = list(made_up_rows(start, min(ROWS_PER_PART, first + count - start)))
        commit_part(output, f"000001-{start:06d}-00001", rows)
        for row in rows:
            for file in ("input", "primary", "output"):
                path = Path(output.url, REPORT, report_thumbnail(row[f"{file}_sha256"]))
                path.parent.mkdir(exist_ok=True)
                path.symlink_to(thumbnail)  # a file may have 65,000 hard links at most


def built(folder: str) -> dict[str, Any]:
    """Seconds and peak memory of one report, in a process of its own."""
    start_bytes, start = peak_bytes(), time.perf_counter()
    done = write_report(Store(folder))
    return {
        "images": done.num_images,
        "seconds": time.perf_counter() - start,
        "new_data_files": done.num_data_files,
        "new_pictures": done.made.num_pictures,
        "not_shown": done.made.num_unseen,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": start_bytes,
    }


def opened(path: Path) -> dict[str, Any]:
    """How long a browser takes to show the gallery, to load every row, and to search them: medians of three."""
    figures: dict[str, list[float]] = {"first_view_seconds": [], "all_rows_seconds": [], "search_seconds": []}
    with browser(chromium()) as running:
        for _ in range(3):
            page = running.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{path.absolute().as_uri()}#view=gallery", wait_until="commit")
            figures["first_view_seconds"].append(page.evaluate(FIRST_VIEW) / 1000)
            assert wait_until(lambda page=page: page.evaluate("diffcolor.loaded"), 120)
            figures["all_rows_seconds"].append(page.evaluate("performance.now()") / 1000)
            search = "() => { const t = performance.now(); diffcolor.gallery.find(); return performance.now() - t; }"
            figures["search_seconds"].append(page.evaluate(search) / 1000)
            page.close()
    return {name: statistics.median(values) for name, values in figures.items()}


@app.command()
def build(images: ImagesOption = 10_000, json_file: JsonOption = None) -> None:
    """Build reports of this many images and of ten times as many, and again after 100 new images."""
    fresh = multiprocessing.get_context("spawn")
    figures: list[dict[str, Any]] = []
    for number in (images, images * 10):
        with tempfile.TemporaryDirectory() as folder:
            committed(Store(folder), 0, number)
            for new in (0, NEW_IMAGES):
                committed(Store(folder), number, new)
                with fresh.Pool(1) as pool:
                    figures.append(pool.apply(built, (folder,)) | {"new_images": new or number})
    record(json_file, "report_built", figures, "duckdb", "pyarrow")


@app.command("open")
def open_(images: ImagesOption = 10_000, json_file: JsonOption = None) -> None:
    """Open a report of this many images in Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        committed(Store(folder), 0, images)
        built(folder)
        figures = opened(Path(folder, REPORT, "index.html"))
        record(json_file, "report_opened", {"images": images} | figures)


if __name__ == "__main__":
    app()
