"""`make chaos`: injects every fault again and again, on a local disk and on an S3 server, and prints a table.

python -m tests.faults.chaos --rounds 10 [--only "Ctrl-C"] [--batch 4]

With --json each fault's record is added to the file as soon as it is there, so a long series can be done in pieces.
"""

import json
import os
import random
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import fsspec
import typer
from rich.console import Console
from rich.table import Table

from support.checkpoints import save_tiny_checkpoint
from support.record import record
from support.runs import NUM_IMAGES, Bench
from support.s3_server import NoServerError, free_port, start, stop
from tests.faults.faults import FAULTS, LOCAL, S3, Fault, NotHereError


def main(
    rounds: Annotated[int, typer.Option(help="Injections of each kind.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this fault; repeat it.")] = None,
    store: Annotated[list[str] | None, typer.Option(help="Only on this store, local or s3.")] = None,
    images: Annotated[int, typer.Option(help="Good images in the archive.")] = NUM_IMAGES,
    batch: Annotated[int, typer.Option(help="Photographs that runs fit at once, each with adapters of its own.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Add the records to this file.")] = None,
) -> None:
    """Inject faults and count. Exit code 1 if anything was lost, done twice, changed or left behind."""
    records: list[dict[str, Any]] = []
    how = {"images": images, "rounds": rounds, "seed": seed, "batch": batch}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_tiny_checkpoint(folder / "model")
        for kind in store or (LOCAL, S3):
            faults = {name: inject for name, (inject, stores) in FAULTS.items() if kind in stores}
            chosen = {name: inject for name, inject in faults.items() if not only or name in only}
            try:
                bench = Bench.prepare(folder / kind, model, num_images=images, batch=batch, **outputs_on(kind, folder))
                for number, (name, inject) in enumerate(chosen.items()):
                    output = f"{bench.outputs}/out-{number}"
                    outcome = attempt(inject, bench, output, rounds, seed)
                    records.append({"fault": name, "store": kind, **how, **outcome})
                    which = f"{name}, {kind}" + (f", batches of {batch}" if batch > 1 else "")
                    record(json_file, which, records[-1], "ray", "prefect")
            except NoServerError as error:
                print(f"not on {kind}: {error}")
            finally:
                stop(folder / "server")
    if json_file is not None:
        records = [entry["figures"] for entry in json.loads(json_file.read_text()).values()]
    Console(width=140).print(table_of(records))
    raise typer.Exit(any("error" in record for record in records))


def outputs_on(kind: str, folder: Path) -> dict[str, Any]:
    """Where a bench writes, and the environment variables that it needs for that. Raises NoServerError."""
    if kind == LOCAL:
        return {}
    environment = start(folder / "server", free_port())
    os.environ.update(environment)
    fsspec.filesystem("s3").mkdir("chaos")
    return {"outputs": "s3://chaos", "environment": environment}


def attempt(inject: Fault, bench: Bench, output: str, rounds: int, seed: int) -> dict[str, Any]:
    """The reckoning of one fault as a record, with an "error" if anything is wrong."""
    try:
        reckoning = inject(bench, output, rounds, random.Random(seed))
    except NotHereError as reason:
        return {"not_here": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"error": str(error)[:500]}
    try:
        reckoning.check()
    except AssertionError as error:
        return vars(reckoning) | {"error": str(error)[:500]}
    return vars(reckoning)


def table_of(records: list[dict[str, Any]]) -> Table:
    """The records as a table."""
    table = Table("fault", "store", "injected", "lost", "doubled", "same bytes", "left behind", "resumed in", "")
    for r in records:
        remark = str(r.get("error", r.get("not_here", "")))[:60]
        name = r["fault"] + (f", batches of {r['batch']}" if r.get("batch", 1) > 1 else "")
        if "injected" not in r:
            table.add_row(name, r["store"], *[""] * 6, remark)
            continue
        figures = (r["injected"], r["lost"], r["doubled"], "yes" if r["identical"] else "NO", len(r["litter"]))
        table.add_row(name, r["store"], *map(str, figures), f"{r['seconds']:.0f} s", remark)
    counted = [r for r in records if "injected" in r]
    total = [str(sum(r[column] for r in counted)) for column in ("injected", "lost", "doubled")]
    table.add_row(f"all {len({r['fault'] for r in counted})} kinds", "", *total, "", "", "", "", style="bold")
    return table


if __name__ == "__main__":
    typer.run(main)
