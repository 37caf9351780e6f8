"""Check a run from its saved files: size, bit depth, luminance; optionally statuses against an index.

python -m benchmarks.remeasure OUTPUT [--index index.csv]

Reads every ok row's input and output again and prints p99 |dL*| and the share of white (L* > 99.5) in both.
Index: columns file and expected ("decodes" or another word), as in ../shared/data/hostile.
"""

import csv
from pathlib import Path
from typing import Annotated

import fsspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from diffcolor_core.images import read_scan
from tasks.manifest import query
from tasks.storage import Store

SQL = "select image_key, status, input_uri, output_uri, peak_memory_bytes from results order by image_key"


def main(
    output: Annotated[str, typer.Argument(help="Folder that `diffcolor run` wrote to.")],
    index: Annotated[Path | None, typer.Option(help="CSV of what is expected of each file.")] = None,
) -> None:
    """Print the table; exit 1 if a picture or a status is not as it must be."""
    rows = query(Store(output), SQL).fetchall()
    table, wrong = Table("image", "size", "bits", "p99 |dL*|", "white in, out", "peak GB"), []
    for key, status, input_uri, output_uri, peak in rows:
        if status != "ok":
            continue
        scan, result = (read_scan(fsspec.open(uri).open().read()) for uri in (input_uri, output_uri))
        if scan.lightness.shape != result.lightness.shape or scan.bit_depth != result.bit_depth:
            wrong.append(f"{key}: another size or bit depth than its scan")
            continue
        p99 = float(np.percentile((scan.lightness - result.lightness).abs().numpy(), 99))
        white = ", ".join(f"{float((s.lightness > 99.5).float().mean()):.3f}" for s in (scan, result))
        size = f"{scan.width_px} x {scan.height_px}"
        table.add_row(key, size, str(scan.bit_depth), f"{p99:.4f}", white, f"{peak / 1e9:.2f}")
        if p99 > (0.5 if scan.bit_depth == 8 else 0.02):
            wrong.append(f"{key}: p99 |dL*| {p99:.3f}")
    if index is not None:
        with index.open(newline="") as file:
            expected = {row["file"]: row["expected"] == "decodes" for row in csv.DictReader(file)}
        found = {Path(key).name: status == "ok" for key, status, *_ in rows}
        wrong += [f"{key}: status disagrees with the index" for key in expected if found.get(key) != expected[key]]
    Console(width=140).print(table)
    print(f"{len(rows)} rows, {len(wrong)} wrong", *wrong, sep="\n")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
