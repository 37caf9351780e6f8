"""Commands that read, check and tend what runs have left."""

import json
import sys
from typing import Annotated, Literal

import typer

from flows.cli.common import OutputArgument, app, console, errors_told, print_table


@app.command()
def query(
    output: OutputArgument,
    sql: Annotated[str, typer.Argument(help="One SELECT over the views `results` and `attempts`.")],
    format: Annotated[Literal["table", "json", "csv"], typer.Option(help="How to print the answer.")] = "table",
) -> None:
    """Ask the manifest a question in SQL (DuckDB, read-only).

    View `results` has the latest row of each image and variant, `attempts` every row ever written;
    `describe results` lists the columns.

    Example: `diffcolor query out/demo "select image_key, target_prompt, colorfulness from results"`
    """
    from tasks.manifest import query as ask
    from tasks.storage import Store

    with errors_told():
        relation = ask(Store(output), sql)
        rows = relation.fetchall()
    names = relation.columns
    if format == "json":
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
    elif format == "csv":
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        print_table(names, rows)


@app.command()
def status(output: OutputArgument) -> None:
    """What has been done in OUTPUT: counts by run and status, the errors, the time it took."""
    from tasks.manifest import query as ask
    from tasks.storage import Store

    questions = (
        """select run_id as run, status, count(*) as variants, count(distinct image_key) as images,
               min(started_at)::timestamp(0) as started, max(finished_at)::timestamp(0) as finished,
               avg(total_seconds) as seconds_each
           from results group by all order by started, status""",
        """select error_class as error, count(*) as variants, any_value(image_key) as for_example,
               any_value(error_message) as message
           from results where status <> 'ok' group by all order by variants desc limit 20""",
        """select count(*) as fits_written, sum(bytes) / 1e6 as megabytes
           from (select max(fit_bytes) as bytes from attempts where fit_uri is not null group by fit_uri)
           having count(*) > 0""",
    )
    with errors_told():
        for sql in questions:
            relation = ask(Store(output), sql)
            rows = relation.fetchall()
            if rows:
                print_table(relation.columns, rows)


@app.command()
def verify(
    output: OutputArgument,
    repair: Annotated[
        bool,
        typer.Option(
            help="Queue again what is missing or changed, for the next `run`; set changed files aside in damaged/."
        ),
    ] = False,
    read_files: Annotated[bool, typer.Option(help="Compare every image's hash, not only its existence.")] = True,
) -> None:
    """Does OUTPUT hold what its manifest says? Every row's file with its hash, every file with its row.

    Exit code 3 if anything is not as it must be. Extra files are named, never deleted.

    Example: `diffcolor verify out/demo --repair && diffcolor run examples/archive out/demo`
    """
    from tasks.storage import Store
    from tasks.verify import repair as mend, verify as check

    with errors_told():
        findings = list(check(Store(output), read_files=read_files))
        if findings:
            print_table(["finding", "file", "what"], [(f.kind, f.key, f.detail) for f in findings])
        queued = mend(Store(output), findings) if repair and findings else 0
    mended = f", {queued} variants queued again for the next `run`" if repair else ""
    console.print(f"{len(findings)} findings{mended}" if findings else "all is as it must be")
    if findings and not repair:
        raise typer.Exit(3)


@app.command()
def compact(output: OutputArgument) -> None:
    """Write OUTPUT's manifest anew into few parts, for faster queries; the rows stay the same.

    Runs and readers may go on meanwhile; of several compactions at once one wins, the others end with
    exit code 2. The replaced parts are deleted by the next compaction.

    Example: `diffcolor compact s3://museum/colorized`
    """
    from tasks.manifest import compact as shrink
    from tasks.storage import Store

    with errors_told():
        done = shrink(Store(output))
    console.print(
        f"{done.rows} rows: {done.parts_before} parts are now {done.parts_after}; {done.deleted} replaced ones deleted"
    )


@app.command()
def expire_fits(
    output: OutputArgument,
    older_than_days: Annotated[
        float, typer.Option(min=0, max=100_000, help="Since a variant was last made from the fit.")
    ],
) -> None:
    """Delete kept fits that have not been used for so long; `status` tells what runs have written of them.

    Images and rows stay. A new prompt for such an image fits again.

    Example: `diffcolor expire-fits out/demo --older-than-days 90`
    """
    from tasks.storage import Store
    from tasks.verify import expire_fits as expire

    with errors_told():
        done = expire(Store(output), older_than_days)
    console.print(f"{done.num_fits} fits deleted, {done.num_bytes / 1e6:.1f} MB")
