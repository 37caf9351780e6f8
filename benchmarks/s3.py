"""Runs over a real S3 server on loopback (Ceph's radosgw, installed on first use; see support/s3_server.py).

python -m benchmarks.s3 archive --json benchmarks/results/archive.json     (17 minutes; needs the shared data)
python -m benchmarks.s3 requests --json benchmarks/results/scale.json      (3 minutes)
python -m benchmarks.s3 remeasure OUTPUT [--index index.csv]               (any finished output)
"""

import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import fsspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from diffcolor_scans.images import read_scan
from support.checkpoints import save_tiny_checkpoint
from support.pictures import make_archive
from support.proxy import faulty_proxy
from support.record import record
from support.runs import Bench
from support.s3_server import serving
from tasks.manifest import query
from tasks.storage import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
JsonOption = Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")]

ARCHIVE, OUTPUT = "s3://mixed/archive", "s3://mixed/out"
SQL = "select image_key, status, input_uri, output_uri, peak_memory_bytes from results order by image_key"


@app.command()
def archive(
    data: Annotated[Path, typer.Option(help="Folder with archive/ and hostile/.")] = Path("../shared/data"),
    quick: Annotated[bool, typer.Option(help="Fit in a few steps: tests the pipeline, not the colours.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Colorize the historic scans and the hostile files as one archive, then remeasure it.

    Exit 1 if a status, a size, a bit depth or a luminance is not as it must be.
    """
    index = data / "hostile/index.csv"
    diffcolor = str(Path(sys.executable).with_name("diffcolor"))
    run = [sys.executable, "-m", "support.driver"] if quick else [diffcolor]
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary, "server"), "mixed"):
        s3 = fsspec.filesystem("s3")
        with index.open(newline="") as file:
            hostile = [row["file"] for row in csv.DictReader(file)]
        for path in sorted((data / "archive").iterdir()):
            s3.put_file(str(path), f"{ARCHIVE}/{path.name}")
        for name in hostile:
            s3.put_file(str(data / "hostile" / name), f"{ARCHIVE}/hostile/{name}")
        begin = time.perf_counter()
        commands = {
            "run": [*run, "run", ARCHIVE, OUTPUT, "--prompt", "a photograph", "--no-keep-fits"],
            "status": [diffcolor, "status", OUTPUT],
            "verify": [diffcolor, "verify", OUTPUT],
        }
        codes = {name: subprocess.run(command, check=False).returncode for name, command in commands.items()}
        figures, wrong = remeasured(OUTPUT, index)
    figures |= {"seconds": time.perf_counter() - begin, "quick": quick}
    print(f"exit codes: {codes}", *wrong, sep="\n")
    if wrong or codes != {"run": 3, "status": 0, "verify": 0}:
        raise typer.Exit(1)
    record(json_file, "archive on S3", figures, "prefect", "ray", "torch")


@app.command()
def remeasure(
    output: Annotated[str, typer.Argument(help="Folder that `diffcolor run` wrote to.")],
    index: Annotated[Path | None, typer.Option(help="CSV with the columns file and expected.")] = None,
) -> None:
    """Check a finished output from its files. Exit 1 if anything is not as it must be."""
    figures, wrong = remeasured(output, index)
    print(figures, f"{len(wrong)} wrong", *wrong, sep="\n")
    raise typer.Exit(bool(wrong))


def remeasured(output: str, index: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Figures of an output, and what is wrong with it.

    Reads every ok row's input and output again: size and bit depth must be equal, p99 |dL*| at most 0.5 in
    8-bit files and 0.02 in 16-bit ones. index: a CSV that says of each file whether it "decodes".
    Prints a table with the share of white (L* > 99.5) before and after.
    """
    rows = query(Store(output), SQL).fetchall()
    table, wrong = Table("image", "size", "bits", "p99 |dL*|", "white in, out", "peak GB"), []
    worst = {8: 0.0, 16: 0.0}
    for key, status, input_uri, output_uri, peak in rows:
        if status != "ok":
            continue
        scan, result = (read_scan(fsspec.open(uri).open().read()) for uri in (input_uri, output_uri))
        if scan.lightness.shape != result.lightness.shape or scan.bit_depth != result.bit_depth:
            wrong.append(f"{key}: another size or bit depth than its scan")
            continue
        p99 = float(np.percentile((scan.lightness - result.lightness).abs().numpy(), 99))
        worst[scan.bit_depth] = max(worst[scan.bit_depth], p99)
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
    figures = {
        "rows": len(rows),
        "ok": sum(status == "ok" for _, status, *_ in rows),
        "quarantined": sum(status == "quarantined" for _, status, *_ in rows),
        "p99_abs_delta_l_8_bit": worst[8],
        "p99_abs_delta_l_16_bit": worst[16],
        "peak_bytes_of_an_actor": max(peak or 0 for *_, peak in rows),
    }
    return figures, wrong


@app.command()
def requests(
    images: Annotated[list[int] | None, typer.Option(help="Images of a run; repeatable. Default: 8, then 40.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Count the requests of a run through a proxy; two sizes tell what each further image costs."""
    figures, sizes = [], images or [8, 40]
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary, "server"), "requests") as variables:
        folder = Path(temporary)
        scans = make_archive(folder / "archive", max(sizes))
        bench = Bench(scans, save_tiny_checkpoint(folder / "model"), folder, "s3://requests", variables)
        for size in sizes:
            options = ("--limit", str(size))
            with faulty_proxy(variables["AWS_ENDPOINT_URL"], ("500",), 0.0, random.Random(0)) as proxy:
                through_proxy = {"AWS_ENDPOINT_URL": proxy.url}
                with bench.run(f"s3://requests/{size}", *options, environment=through_proxy) as run:
                    assert run.wait(1800) == 0
            figures.append({"images": size, "requests": proxy.calls.total(), "by_method": dict(proxy.calls)})
            print(figures[-1], flush=True)
    record(json_file, "requests", figures, "s3fs", "prefect", "ray")


if __name__ == "__main__":
    app()
