"""`make chaos`: every fault again and again, and a table of what it did.

python -m tests.faults.chaos --rounds 10 [--only "Ctrl-C"]
"""

import json
import random
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.conftest import save_tiny_checkpoint
from tests.faults.faults import FAULTS
from tests.faults.harness import Bench


def main(
    rounds: Annotated[int, typer.Option(help="Injections of each kind.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this fault; repeat it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here too.")] = None,
) -> None:
    """Exit 1 if anything was lost, done twice, changed or left behind."""
    table = Table("fault", "injected", "lost", "doubled", "same bytes", "left behind", "resumed in")
    records, bad = [], False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(Path(folder, "bench"), save_tiny_checkpoint(Path(folder, "model")))
        for number, (name, inject) in enumerate(FAULTS.items()):
            if only and name not in only:
                continue
            try:
                r = inject(bench, f"{folder}/out-{number}", rounds, random.Random(seed))
                r.check()
            except Exception as error:
                bad = True
                traceback.print_exc()
                table.add_row(name, "", "", "", "", str(error)[:300], "")
                continue
            print(f"{name}: {r}", flush=True)
            table.add_row(
                *(name, str(r.injected), str(r.lost), str(r.doubled), "yes" if r.identical else "NO"),
                *(str(len(r.litter)), f"{r.seconds:.0f} s"),
            )
            records.append({"fault": name} | {k: v for k, v in vars(r).items() if k != "notes"})
    Console(width=140).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(records, indent=1) + "\n")
    raise typer.Exit(bad)


if __name__ == "__main__":
    typer.run(main)
