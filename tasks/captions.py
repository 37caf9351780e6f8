"""Captions for the images of an archive that have none: a model proposes them, a catalog keeps them.

The catalog is a CSV file that `diffcolor run --catalog` takes unchanged. Three columns say where a caption is from:

    caption_source    "model NAME@REVISION", "archive" (it stands in the archive's catalog) or "person"
    caption_proposed  what the model wrote; a context prompt that differs is a person's edit, also an empty one
    caption_error     why an image has no caption

What stands in the catalog is never overwritten. After each batch its captions are put beside the catalog, in the
folder `<catalog>.captions`, and joined to it at the end: an interruption loses at most one batch.
"""

import csv
import io
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch

from diffcolor_core import read_scan
from diffcolor_core.progress import Progress, silent
from tasks.archive import COLUMNS, CatalogRow, as_text, image_keys, read_catalog
from tasks.captioner import Captioner, caption_input, load_captioner
from tasks.colorize import MAX_FILE_BYTES
from tasks.errors import CatalogError
from tasks.layout import CATALOG, RUNS, TEMPORARY
from tasks.options import RunOptions
from tasks.storage import Store, locate

logger = logging.getLogger(__name__)
SOURCE, PROPOSED, ERROR = CAPTION_COLUMNS = ("caption_source", "caption_proposed", "caption_error")


@dataclass(frozen=True)
class Proposal:
    """A model's caption of an image, or the error that left it without."""

    image: str
    text: str | None
    source: str | None
    error: str | None


def caption_archive(
    archive: str,
    out: str,
    *,
    model: str,
    catalog: str | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress = silent,
) -> Counter[str]:
    """Write a catalog of all images to `out`, with a caption by `model` for each that has none.

    archive: a folder or URL as for a run. out: path or URL of a CSV file; if it is there, its rows stay, and only
    what is missing is added. catalog: captions that there are already, by default the archive's own catalog. model: as
    for `load_captioner`; it is loaded only if there is anything to caption. limit: only the first images, in the order
    of their names. Returns how many images are "captioned" now, have been captioned "before", and have "failed":
    unreadable ones are rows with the reason. Raises ValueError or OSError for wrong arguments, a model or a catalog
    that cannot be used, a store that fails.
    """
    if not out.endswith(".csv"):
        raise CatalogError(f"catalog {out!r}: captions are written as CSV, so give a name ending in .csv")
    source = Store(archive)
    if not source.exists():
        raise ValueError(f"there is no archive at {archive!r}: give an existing folder or URL")
    target, name = locate(out)
    rows, archived = _rows(source, catalog, out)
    proposals = {p.image: p for p in _saved(target, name) if p.text is not None}
    images = sorted({row.image for row in rows})[:limit]
    lacking = {row.image for row in rows if _lacks_caption(row)}.intersection(images)
    waiting = sorted(lacking - proposals.keys())
    captioner = load_captioner(model, device=device) if waiting else None
    try:
        if captioner is not None:
            for batch in _proposed(source, waiting, captioner, batch_size):
                _save(target, name, batch)
                proposals |= {proposal.image: proposal for proposal in batch}
                progress("captions", len(waiting) - len(lacking - proposals.keys()), len(waiting))
    finally:
        rows, archived = _rows(source, catalog, out)  # again: a person may have edited the catalog meanwhile
        _write(target, name, rows, archived, proposals)
    done = Counter("failed" if proposals[image].text is None else "captioned" for image in lacking)
    return done + Counter({"before": len(images) - len(lacking)})


def caption_run(options: RunOptions, progress: Progress) -> Iterator[CatalogRow]:
    """The catalog of a run with `--caption`, kept in its output. Extended by what has no caption yet."""
    assert options.caption is not None
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    out = Store(options.output).uri(CATALOG)
    caption_archive(
        options.archive,
        out,
        model=options.caption,
        catalog=options.catalog,
        device=device,
        limit=options.limit,
        progress=progress,
    )
    torch.cuda.empty_cache()  # for the actors
    rows = read_catalog(Store(options.archive), out)
    assert rows is not None
    return rows


def _rows(source: Store, catalog: str | None, out: str) -> tuple[list[CatalogRow], set[tuple[str, str | None]]]:
    """The rows of the new catalog, without new captions, and the (image, caption) pairs of the archive's catalog.

    They are those that are there already, then those that the archive's catalog has besides, then all other images.
    """
    target, name = locate(out)
    rows = list(read_catalog(source, out, COLUMNS[:1]) or ()) if target.has(name) else []
    asked = {(row.image, row.target_prompt) for row in rows}
    theirs = list(read_catalog(source, catalog, COLUMNS[:1]) or ())
    rows += [row for row in theirs if (row.image, row.target_prompt) not in asked]
    named = {row.image for row in rows}
    for key in image_keys(source):
        if key != key.strip():
            logger.warning("%r begins or ends with a space, so no catalog can name it: rename it", key)
        elif key not in named:
            rows.append(CatalogRow(0, key, None, None))
    return rows, {(row.image, row.context_prompt) for row in theirs}


def _lacks_caption(row: CatalogRow) -> bool:
    return row.context_prompt is None and PROPOSED not in _others(row)


def _others(row: CatalogRow) -> dict[str, object]:
    return dict(json.loads(row.extra or "{}"))


def _proposed(source: Store, keys: Sequence[str], captioner: Captioner, batch_size: int) -> Iterator[list[Proposal]]:
    """Proposals for these images, in batches. The next batch is read while the model describes this one."""
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    author = f"model {captioner.model_id}@{captioner.model_revision}"
    with ThreadPoolExecutor(max_workers=1) as reader:  # one: tar files cannot be read by several threads

        def begin(batch: Sequence[str]) -> Future[list[np.ndarray | str]]:
            return reader.submit(lambda: [_look(source, key) for key in batch])

        ahead = begin(batches[0])
        for batch, following in zip(batches, [*batches[1:], ()], strict=True):
            seen, ahead = ahead.result(), begin(following)
            pictures = [what for what in seen if not isinstance(what, str)]
            texts = iter(captioner.captions(pictures) if pictures else ())
            proposals = []
            for key, what in zip(batch, seen, strict=True):
                text = None if isinstance(what, str) else next(texts) or None
                error = what if isinstance(what, str) else None if text else "the model has no words for it"
                proposals.append(Proposal(key, text, author if text else None, error))
            yield proposals


def _look(source: Store, key: str) -> np.ndarray | str:
    """What the model gets to see of an image, or in words why it cannot be seen."""
    try:
        return caption_input(read_scan(source.read(key, max_bytes=MAX_FILE_BYTES)))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"[:2000]


# ------------------------------------------------------------------ what is kept


def _save(target: Store, name: str, batch: Sequence[Proposal]) -> None:
    lines = "".join(json.dumps(asdict(proposal)) + "\n" for proposal in batch)
    target.write(f"{name}.captions/{uuid.uuid4().hex}.jsonl", lines.encode())


def _saved(target: Store, name: str) -> Iterator[Proposal]:
    """What an interrupted call has left."""
    for key, _ in target.list(f"{name}.captions"):
        for line in target.read(key).splitlines():
            yield Proposal(**json.loads(line))


def _write(
    target: Store,
    name: str,
    rows: Sequence[CatalogRow],
    archived: set[tuple[str, str | None]],
    proposals: dict[str, Proposal],
) -> None:
    """Write the catalog, then delete the saved batches that are now in it."""
    saved = [key for key, _ in target.list(f"{name}.captions")]
    others = sorted({column for row in rows for column in _others(row)} - set(CAPTION_COLUMNS))
    with target.replacing(name) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, [*COLUMNS, *CAPTION_COLUMNS, *others], lineterminator="\n")
        table.writeheader()
        table.writerows(_record(row, archived, proposals.get(row.image)) for row in rows)
        text.detach()
    for key in saved:
        target.delete(key)
    if target.is_local:
        folders = [os.path.join(target.root, folder) for folder in (f"{name}.captions", TEMPORARY)]
        if os.path.isdir(os.path.join(target.root, RUNS)):  # an output, whose run is at work
            folders.pop()
        for folder in folders:
            with suppress(OSError):  # there is none, or it is in use
                os.rmdir(folder)


def _record(row: CatalogRow, archived: set[tuple[str, str | None]], proposal: Proposal | None) -> dict[str, str | None]:
    """A row as it is written: with the proposal if it lacks a caption, else with where its caption is from."""
    others = {name: as_text(value) for name, value in _others(row).items()}
    text, proposed, source = row.context_prompt, others.get(PROPOSED), others.get(SOURCE)
    if _lacks_caption(row):
        if proposal is not None:
            text = proposed = proposal.text
            others |= {SOURCE: proposal.source or "", ERROR: proposal.error or ""}
    else:
        others |= {SOURCE: _source(text, proposed, source, (row.image, text) in archived), ERROR: ""}
    prompts = (row.image, text, row.target_prompt)
    return dict(zip(COLUMNS, prompts, strict=True)) | others | {PROPOSED: proposed}


def _source(text: str | None, proposed: str | None, source: str | None, is_archived: bool) -> str:
    """Where a caption is from, now that a person may have changed it."""
    if proposed is not None:
        return source or "" if text == proposed else "person"
    if is_archived:
        return "archive"
    return source if source not in (None, "archive") else "person"
