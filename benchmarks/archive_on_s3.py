"""The historic scans and the hostile files as one archive on a real S3 server, through `diffcolor run`.

python -m benchmarks.archive_on_s3 [--data ../shared/data]

Then every saved picture is measured against its scan, every status against the hostile files' index, and
the output verified. Exit 1 if anything is not as it must be.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import fsspec
import typer

from support.s3_server import free_port, start, stop

ARCHIVE, OUTPUT = "s3://mixed/archive", "s3://mixed/out"


def main(
    data: Annotated[Path, typer.Option(help="Folder with archive/ and hostile/.")] = Path("../shared/data"),
    quick: Annotated[bool, typer.Option(help="A few steps each: what is tested is the pipeline.")] = False,
) -> None:
    """Half an hour on 2 CPU cores, a few minutes with --quick."""
    index = data / "hostile/index.csv"
    diffcolor = str(Path(sys.executable).with_name("diffcolor"))
    run = [sys.executable, "-m", "support.driver"] if quick else [diffcolor]
    with tempfile.TemporaryDirectory() as temporary:
        server = Path(temporary, "server")
        os.environ.update(start(server, free_port()))
        try:
            s3 = fsspec.filesystem("s3")
            s3.mkdir("mixed")
            with index.open(newline="") as file:
                hostile = [row["file"] for row in csv.DictReader(file)]
            for path in sorted((data / "archive").iterdir()):
                s3.put_file(str(path), f"{ARCHIVE}/{path.name}")
            for name in hostile:
                s3.put_file(str(data / "hostile" / name), f"{ARCHIVE}/hostile/{name}")
            commands = {
                "run": [*run, "run", ARCHIVE, OUTPUT, "--prompt", "a photograph", "--no-keep-fits"],
                "status": [diffcolor, "status", OUTPUT],
                "verify": [diffcolor, "verify", OUTPUT],
                "remeasure": [sys.executable, "-m", "benchmarks.remeasure", OUTPUT, "--index", index],
            }
            codes = {name: subprocess.run(command, check=False).returncode for name, command in commands.items()}
        finally:
            stop(server)
    print(f"exit codes: {codes}")
    raise typer.Exit(codes != {"run": 3, "status": 0, "verify": 0, "remeasure": 0})


if __name__ == "__main__":
    typer.run(main)
