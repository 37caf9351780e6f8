"""Commands that show what runs have made: the report, a contact sheet, one image's pictures side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import OutputArgument, app, errors_told, notes

if TYPE_CHECKING:
    from PIL.Image import Image

FileArgument = Annotated[Path, typer.Argument(help="The picture to write: .png, .jpg or .webp.")]
SizeOption = Annotated[int, typer.Option(min=64, max=4096, help="Longest side of each picture on it, in pixels.")]


@app.command()
def report(
    output: OutputArgument,
    to: Annotated[
        str | None, typer.Option(help="Folder or URL for the report, in place of OUTPUT/report.", show_default=False)
    ] = None,
) -> None:
    """Write a page for the browser: overview, gallery, every picture compared with its scan.

    It needs no server and asks none: open index.html from the disk or from an object store. What an earlier report
    has made is used again, so new images cost their own thumbnails only. People approve results and ask for other
    colours in the page; `approve` and `recolor` take the files that it saves.

    Example: `diffcolor report out/demo`
    """
    from tasks.progress import counted
    from tasks.report import write_report
    from tasks.storage import Store

    with errors_told(), counted(notes, "report") as show:
        done = write_report(Store(output), to, show)
    made = done.made
    notes.print(
        f"{done.num_images} images, {done.num_results} results; pictured {made.num_pictures} files that no earlier "
        f"report had, {done.num_data_files} new data files"
    )
    for key, reason in made.examples.items():
        notes.print(f"diffcolor: not shown: {key}: {reason}", style="yellow", markup=False, soft_wrap=True)
    if made.num_unseen > len(made.examples):
        notes.print(f"diffcolor: and {made.num_unseen - len(made.examples)} more", style="yellow")
    typer.echo(done.address)


@app.command()
def sheet(
    output: OutputArgument,
    file: FileArgument,
    columns: Annotated[int, typer.Option(min=1, max=12, help="Results in each line.")] = 2,
    limit: Annotated[int, typer.Option(min=1, max=2000, help="Show at most this many results.")] = 24,
    size: SizeOption = 256,
    truth: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the originals in colour, under the scans' keys: shown beside each result."),
    ] = None,
) -> None:
    """Draw a contact sheet: scan, primary and colours of the first results, with their prompts.

    Example: `diffcolor sheet out/demo sheet.png`
    """
    from tasks.report.sheet import contact_sheet
    from tasks.storage import Store

    with errors_told():
        originals = None if truth is None else Store(truth)
        settings = {"columns": columns, "limit": limit, "picture_px": size}
        _write_picture(file, lambda: contact_sheet(Store(output), truth=originals, **settings))


@app.command()
def compare(
    output: OutputArgument,
    file: FileArgument,
    image: Annotated[str, typer.Option(help="The image's key: its path below the archive.")],
    size: SizeOption = 512,
) -> None:
    """Draw all that there is of one image: its scan, its primary and every variant, with their prompts.

    Example: `diffcolor compare out/demo --image 01-ball-and-bottle.png compare.png`
    """
    from tasks.report.sheet import comparison
    from tasks.storage import Store

    with errors_told():
        _write_picture(file, lambda: comparison(Store(output), image, picture_px=size))


def _write_picture(file: Path, draw: "Callable[[], Image]") -> None:
    from tasks.report.sheet import SUFFIXES

    if file.suffix.lower() not in SUFFIXES:  # before anything is drawn
        raise ValueError(f"{str(file)!r} ends in none of {', '.join(SUFFIXES)}: name a file of one of these formats")
    draw().save(file, SUFFIXES[file.suffix.lower()], quality=90)
    typer.echo(file)
