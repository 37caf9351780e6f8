"""The archive as work: its images joined with the catalog's prompts."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from tasks.storage import Store

DEFAULT_CATALOG = "catalog.csv"
COLUMNS = ("image", "context_prompt", "target_prompt")
SIDECAR_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".md", ".xml", ".yaml", ".yml")
"""Tables and texts that lie beside images; every other file of an archive is taken for an image."""


class CatalogError(ValueError):
    """A catalog that cannot be read as a table of prompts."""


class MissingImageError(ValueError):
    """A catalog row names an image that the archive does not have."""


class MissingPromptError(ValueError):
    """There is no context prompt for an image."""


@dataclass(frozen=True)
class Variant:
    """One picture wanted of an image: coloured by `target_prompt`, or, without one, the primary."""

    name: str
    target_prompt: str | None


@dataclass(frozen=True)
class ImageWork:
    """One fit and the variants wanted of it. `problem` says why there is nothing to fit."""

    image_key: str
    version: str
    context_prompt: str | None
    variants: tuple[Variant, ...]
    problem: ValueError | None = None


@dataclass(frozen=True)
class CatalogRow:
    """A row of a catalog; `number` counts from 1, the header not counted."""

    number: int
    image: str
    context_prompt: str | None
    target_prompt: str | None


def variant_name(context_prompt: str | None, target_prompt: str | None) -> str:
    """A stable name for what is asked of an image: "primary-..." or "target-..." and a hash of both prompts."""
    digest = hashlib.sha256(json.dumps([context_prompt, target_prompt]).encode()).hexdigest()[:10]
    return f"{'primary' if target_prompt is None else 'target'}-{digest}"


# ------------------------------------------------------------------ the catalog


def read_catalog(archive: Store, catalog: str | None) -> list[CatalogRow] | None:
    """The rows of a catalog (CSV, JSONL or Parquet), by any fsspec URL; by default the archive's catalog.csv.

    None if no catalog is given and the archive has none. Raises CatalogError with what is wrong.
    """
    if catalog is None:
        if not archive.fs.exists(f"{archive.root}/{DEFAULT_CATALOG}"):
            return None
        data, name = archive.read(DEFAULT_CATALOG), archive.uri(DEFAULT_CATALOG)
    else:
        folder, _, name = catalog.rpartition("/")
        try:
            data = Store(folder or ".").read(name)
        except FileNotFoundError as error:
            raise CatalogError(f"there is no catalog at {catalog!r}") from error
        name = catalog
    try:
        records = list(_records(data, name))
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise CatalogError(f"catalog {name!r}: {error}") from error
    rows = [_row(number, record, name) for number, record in enumerate(records, 1)]
    _refuse_duplicates(rows, name)
    return rows


def _records(data: bytes, name: str) -> Iterator[dict[str, object]]:
    if name.endswith(".parquet"):
        yield from pq.read_table(io.BytesIO(data)).to_pylist()
    elif name.endswith(".jsonl"):
        for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is not an object")
                yield record
    elif name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        for required in COLUMNS[:2]:
            if required not in (reader.fieldnames or ()):
                near = difflib.get_close_matches(required, reader.fieldnames or (), 1)
                hint = f" (did you mean your {near[0]!r}?)" if near else ""
                raise ValueError(f"there is no column {required!r}{hint}; it has {', '.join(reader.fieldnames or ())}")
        yield from reader
    else:
        raise ValueError("a catalog is .csv, .jsonl or .parquet")


def _row(number: int, record: dict[str, object], name: str) -> CatalogRow:
    values = []
    for column in COLUMNS:
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            raise CatalogError(f"catalog {name!r}, row {number}: {column} is {value!r}, not text")
        values.append(value.strip() if value else None)
    image, context_prompt, target_prompt = values
    if image is None:
        raise CatalogError(f"catalog {name!r}, row {number}: no image is named")
    return CatalogRow(number, image, context_prompt or None, target_prompt or None)


def _refuse_duplicates(rows: Iterable[CatalogRow], name: str) -> None:
    seen: dict[tuple[str, str | None, str | None], int] = {}
    for row in rows:
        key = (row.image, row.context_prompt, row.target_prompt)
        if key in seen:
            raise CatalogError(f"catalog {name!r}: row {row.number} repeats row {seen[key]} ({row.image!r})")
        seen[key] = row.number


# ------------------------------------------------------------------ images x prompts


def list_work(archive: Store, rows: list[CatalogRow] | None, prompt: str | None) -> list[ImageWork]:
    """What is to be done: for each image, one fit per context prompt with its variants, sorted by image.

    Every file of the archive that is not hidden or a sidecar counts as an image: what turns out to
    be none is quarantined, not passed over. `prompt` is the context prompt of images for which the
    catalog has none. A catalog row without a file, and a file without a prompt, become work with a
    `problem`.
    """
    versions = {
        key: version
        for key, version in archive.list()
        if not key.rpartition("/")[2].startswith(".") and not key.lower().endswith(SIDECAR_SUFFIXES)
    }
    wanted: dict[tuple[str, str | None], list[CatalogRow]] = {}
    for row in rows or ():
        wanted.setdefault((row.image, row.context_prompt or prompt), []).append(row)
    in_catalog = {image for image, _ in wanted}
    for key in versions.keys() - in_catalog:
        wanted[key, prompt] = [CatalogRow(0, key, prompt, None)]

    work = []
    for (image, context), asked in sorted(wanted.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        targets = dict.fromkeys(row.target_prompt for row in asked)
        problem: ValueError | None = None
        if image not in versions:
            problem = MissingImageError(f"catalog row {asked[0].number} names {image!r}, which is not in the archive")
        elif context is None:
            problem = MissingPromptError("the catalog has no context prompt for it, and no --prompt was given")
        variants = tuple(Variant(variant_name(context, target), target) for target in targets)
        work.append(ImageWork(image, versions.get(image, ""), context, variants, problem))
    return work
