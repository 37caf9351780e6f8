"""The command that proposes captions."""

import logging
from typing import Annotated

import typer

from diffcolor_core.prompts import CAPTION_MODEL
from flows.cli.common import DeviceOption, app, device_of, errors_told, notes
from tasks.progress import captions_shown


@app.command()
def caption(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="Folder or URL of the scans.")],
    out: Annotated[
        str, typer.Option(help="The CSV file to write, path or URL. What stands in it already is never overwritten.")
    ],
    catalog: Annotated[
        str | None,
        typer.Option(help="Catalog with the captions that there are. Default: `catalog.csv` in the archive, if any."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="An image-to-text model: a local folder, or a hub id at a commit: `owner/name@commit`.")
    ] = CAPTION_MODEL,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the model describes at a time.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first images, in the order of their names.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Let a model propose what is in each picture that nobody has described, as a catalog for `diffcolor run`.

    Read the captions and correct them: they are a machine's guess. The column `caption_source` says where each one is
    from; a text that you change is yours and stays. The same command again describes only what has no caption yet, so
    it may be stopped at any time.

    Exit codes: **0** done; **1** failed; **2** wrong usage; **3** done, but some images could not be described.

    Example: `diffcolor caption ~/scans --out catalog.csv && diffcolor run ~/scans ~/colorized --catalog catalog.csv`
    """
    from tasks.captions import caption_archive

    with errors_told(), captions_shown(notes, logging.getLogger(__name__)) as show:
        counts = caption_archive(
            archive,
            out,
            model=model,
            catalog=catalog,
            device=device_of(device),
            batch_size=batch_size,
            limit=limit,
            progress=show,
        )
    notes.print(
        f"{counts['captioned']} captioned, {counts['before']} had been before, {counts['failed']} without a caption"
    )
    notes.print(f"read and correct them: {out}", markup=False, soft_wrap=True)
    if counts["failed"]:
        notes.print("the column caption_error says why some have none")
        raise typer.Exit(3)
