"""Commands that read, check and maintain the output of runs."""

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, time
from itertools import chain
from typing import Annotated, Any, Literal

import typer

from flows.cli.common import OutputArgument, app, console, errors_told, notes, print_table

_FORMAT_HELP = "How to print: `jsonl` has one JSON object per line. Default: `table` on a terminal, else `jsonl`."


@app.command()
def query(
    output: OutputArgument,
    sql: Annotated[str, typer.Argument(help="One SELECT over the views `results`, `attempts` and `approvals`.")],
    format: Annotated[Literal["table", "jsonl", "json", "csv"] | None, typer.Option(help=_FORMAT_HELP)] = None,
) -> None:
    """Ask the manifest a question in SQL (DuckDB, read-only).

    View `results` has the latest row of each image and variant, `attempts` every row ever written, `approvals` every
    choice of a person. `describe results` lists the columns with their units and meaning.

    Example: `diffcolor query out/demo "select image_key, target_prompt, colorfulness from results"`
    """
    from tasks.manifest import query as ask
    from tasks.storage import Store

    with errors_told():
        relation = ask(Store(output), sql)
        rows = chain.from_iterable(iter(lambda: relation.fetchmany(1000), []))
        _print_rows(relation.columns, rows, format)


@app.command()
def status(
    output: OutputArgument,
    format: Annotated[Literal["table", "jsonl"] | None, typer.Option(help=_FORMAT_HELP)] = None,
) -> None:
    """What has been done in OUTPUT: variants by run and status, the errors, the space that kept fits take.

    Example: `diffcolor status out/demo`
    """
    from tasks.manifest import query as ask
    from tasks.storage import Store

    questions = {
        "run": """select run_id as run, status, count(*) as variants, count(distinct image_key) as images,
               min(started_at)::timestamp(0) as started, max(finished_at)::timestamp(0) as finished,
               avg(total_seconds) as seconds_each
           from results group by all order by started, status""",
        "error": """select error_class as error, count(*) as variants, any_value(image_key) as for_example,
               any_value(error_message) as message
           from results where status <> 'ok' group by all order by variants desc limit 20""",
        "fits": """select count(*) as fits_written, sum(bytes) / 1e6 as megabytes
           from (select max(fit_bytes) as bytes from attempts where fit_uri is not null group by fit_uri)
           having count(*) > 0""",
    }
    with errors_told():
        for about, sql in questions.items():
            relation = ask(Store(output), sql)
            rows = relation.fetchall()
            if rows:
                _print_rows(relation.columns, rows, format, {"about": about})


@app.command()
def verify(
    output: OutputArgument,
    repair: Annotated[
        bool,
        typer.Option(
            help="Queue the work whose files are missing or changed for the next `run`; move changed files to damaged/."
        ),
    ] = False,
    read_files: Annotated[bool, typer.Option(help="Compare every file's hash, not only its existence.")] = True,
    format: Annotated[Literal["table", "jsonl"] | None, typer.Option(help=_FORMAT_HELP)] = None,
) -> None:
    """Compare OUTPUT with its manifest: every row's files with their hashes, every file with its row.

    Exit code 3 if anything is wrong and `--repair` was not given. Extra files are named, never deleted.

    Example: `diffcolor verify out/demo --repair && diffcolor run examples/archive out/demo`
    """
    from tasks.storage import Store
    from tasks.verify import repair as mend, verify as check

    with errors_told():
        findings = list(check(Store(output), read_files=read_files))
        if findings:
            _print_rows(["finding", "file", "what"], [(f.kind, f.key, f.detail) for f in findings], format)
        queued = mend(Store(output), findings) if repair and findings else 0
    mended = f", {queued} variants queued again for the next `run`" if repair else ""
    typer.echo(f"{len(findings)} findings{mended}" if findings else "nothing is missing, changed or extra", err=True)
    if findings and not repair:
        raise typer.Exit(3)


@app.command()
def compact(output: OutputArgument) -> None:
    """Copy OUTPUT's manifest into few parts, for faster queries, and write results.parquet. The rows stay the same.

    Runs and readers may go on meanwhile. One of several compactions at once succeeds, the others end with exit
    code 2. The next compaction deletes the replaced parts.

    Example: `diffcolor compact s3://museum/colorized`
    """
    from tasks.compaction import compact as shrink
    from tasks.storage import Store

    with errors_told():
        done = shrink(Store(output))
    console.print(
        f"{done.rows} rows: {done.parts_before} parts are now {done.parts_after}; {done.deleted} older ones deleted"
    )


@app.command()
def expire_fits(
    output: OutputArgument,
    older_than_days: Annotated[
        float, typer.Option(min=0, max=100_000, help="Days since a variant was last made from the fit.")
    ],
) -> None:
    """Delete kept fits that have not been used for so long; `status` shows how much space fits take.

    Images and rows stay. A new prompt for such an image needs a new fit.

    Example: `diffcolor expire-fits out/demo --older-than-days 90`
    """
    from tasks.storage import Store
    from tasks.verify import expire_fits as expire

    with errors_told():
        done = expire(Store(output), older_than_days)
    console.print(f"{done.num_fits} fits deleted, {done.num_bytes / 1e6:.1f} MB")


@app.command()
def approve(
    output: OutputArgument,
    choices: Annotated[str, typer.Argument(help="The JSON file that the report's page has saved: a path or URL.")],
    format: Annotated[Literal["table", "jsonl"] | None, typer.Option(help=_FORMAT_HELP)] = None,
) -> None:
    """Keep what a person has chosen in the report: each picture approved or rejected, with a note.

    All choices of the file are applied, or none: those about a picture that is not there, or that was changed since
    the person looked at it, are printed with the reason, and the exit code is 2. All choices are kept in OUTPUT, and
    the one saved last counts: columns `choice`, `choice_note`, `choice_by` and `choice_at` of the view `results` and
    of results.parquet; view `approvals` has every one. Applying a file again changes nothing.

    Example: `diffcolor approve out/demo choices.json && diffcolor query out/demo "from approvals"`
    """
    from tasks.approvals import RefusedChoicesError, apply_choices, read_choices
    from tasks.storage import Store

    with errors_told():
        asked = read_choices(choices)
        try:
            applied = apply_choices(Store(output), asked)
        except RefusedChoicesError as error:
            _print_rows(["choice", "image", "variant", "refused_because"], error.refusals, format)
            raise
    notes.print(f"{applied} choices applied, {len(asked.choices) - applied} were there before")


@app.command()
def export(
    output: OutputArgument,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="Folder or URL to write to; with --bag a local folder.")
    ],
    approved: Annotated[bool, typer.Option("--approved", help="Only pictures that a person has approved.")] = False,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Only rows of the view `results` for which this SQL is true.")
    ] = None,
    format: Annotated[
        Literal["png", "tiff", "jpeg", "webp"] | None,
        typer.Option(help="Hand on files of this format, with the same metadata. By default, the files as they are."),
    ] = None,
    bag: Annotated[bool, typer.Option("--bag", help="Make DEST a BagIt bag with SHA-256 sums.")] = False,
) -> None:
    """Copy results to DEST, in the archive's folders and under its file names, to hand them on.

    diffcolor-export.csv says what each file is, with the catalog's other columns. A picture's own name gets its
    format's suffix, and the variant's name where an image has several. The same command goes on after a stop. No other
    file is overwritten: pictures whose name is taken are told, exit code 2.

    Example: `diffcolor export out/demo handover --where "colorfulness > 10" --bag`
    """
    from tasks.export import export as hand_on
    from tasks.progress import counted
    from tasks.storage import Store

    with errors_told(), counted(notes, "exporting") as show:
        stores = Store(output), Store(destination)
        done = hand_on(*stores, approved=approved, where=where, image_format=format, bag=bag, progress=show)
    if done.num_written + done.num_there:
        console.print(f"{done.num_written} pictures exported, {done.num_there} were there before")
    else:
        console.print("no picture matches, so nothing was written")


def _print_rows(
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
    format: Literal["table", "jsonl", "json", "csv"] | None,
    more: dict[str, str] | None = None,
) -> None:
    """Print rows as asked for. more: what each JSON object says besides the row."""
    if format is None:
        format = "table" if console.is_terminal else "jsonl"
    if format == "table":
        print_table(names, rows)
    elif format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        records = ((more or {}) | dict(zip(names, map(_json_value, row), strict=True)) for row in rows)
        lines: Iterator[str] = (json.dumps(record, default=_as_text) for record in records)
        if format == "json":
            typer.echo("[" + ",\n ".join(lines) + "]")
        else:
            for line in lines:
                typer.echo(line)


def _json_value(value: Any) -> Any:
    """The value without NaN and infinities, which JSON does not have: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _json_value(part) for name, part in value.items()}
    return [_json_value(part) for part in value] if isinstance(value, list | tuple) else value


def _as_text(value: Any) -> str:
    return value.isoformat() if isinstance(value, date | time) else str(value)
