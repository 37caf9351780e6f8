"""The archive as work: its images joined with the catalog's prompts."""

import csv
import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import pyarrow.parquet as pq
from pyarrow.lib import ArrowException

from tasks.storage import Store, printable

DEFAULT_CATALOG = "catalog.csv"
COLUMNS = ("image", "context_prompt", "target_prompt")
RECOLOR_COLUMNS = ("image", "target_prompt")
"""What a catalog of new colours needs: the context prompt is the one that the image has had."""
SIDECAR_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".md", ".xml", ".yaml", ".yml")
"""Tables and texts that lie beside images; every other file of an archive is taken for an image."""
MAX_PROMPT_CHARACTERS = 4000
"""Of a catalog's cell; a text tower reads about 300 characters at a time."""

_MISSPELT = 0.8
"""How much a column must look like a known, optional one (difflib's ratio) to be taken for it."""


class CatalogError(ValueError):
    """A catalog that cannot be read as a table of prompts."""


class MissingImageError(ValueError):
    """A catalog row names an image that the archive does not have."""


class MissingPromptError(ValueError):
    """There is no context prompt for an image."""


@dataclass(frozen=True)
class CatalogRow:
    """A row of a catalog; `number` counts from 1, the header not counted."""

    number: int
    image: str
    context_prompt: str | None
    target_prompt: str | None
    extra: str | None = None


def variant_name(context_prompt: str | None, target_prompt: str | None) -> str:
    """A stable name for what is asked of an image: "primary-..." or "target-..." and a hash of both prompts."""
    digest = hashlib.sha256(json.dumps([context_prompt, target_prompt]).encode()).hexdigest()[:10]
    return f"{'primary' if target_prompt is None else 'target'}-{digest}"


# ------------------------------------------------------------------ the catalog


def read_catalog(
    archive: Store, catalog: str | None, required: tuple[str, ...] = COLUMNS[:2]
) -> Iterator[CatalogRow] | None:
    """The rows of a catalog (CSV, JSONL or Parquet), by any fsspec URL; by default the archive's catalog.csv.

    None if no catalog is given and the archive has none. required: columns that it must have; other
    columns may be there, unless they look like a known one misspelt. Raises
    CatalogError with what is wrong; the rows are read one by one, so an error in a row comes when its
    turn is.
    """
    if catalog is None:
        if not archive.has(DEFAULT_CATALOG):
            return None
        return _rows(archive, DEFAULT_CATALOG, archive.uri(DEFAULT_CATALOG), required)
    if not catalog.endswith((".csv", ".jsonl", ".parquet")):
        raise CatalogError(f"catalog {catalog!r}: a catalog is .csv, .jsonl or .parquet")
    where = catalog if "://" in catalog else os.path.realpath(catalog)  # whoever names a link means the file
    folder, _, name = where.rpartition("/")
    store = Store(folder or "/")
    if not store.has(name):
        raise CatalogError(f"there is no catalog at {catalog!r}")
    return _rows(store, name, catalog, required)


def _rows(store: Store, key: str, name: str, required: tuple[str, ...]) -> Iterator[CatalogRow]:
    try:
        with store.open(key) as file:
            for number, record in enumerate(_records(file, name, required), 1):
                try:
                    row = _row(number, record)
                except ValueError as error:
                    raise ValueError(f"row {number}: {error}") from error
                yield row
    except (ValueError, RecursionError, csv.Error, ArrowException) as error:
        raise CatalogError(f"catalog {name!r}: {error}") from error


def _records(file: IO[bytes], name: str, required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    if name.endswith(".parquet"):
        yield from _parquet_records(file, required)
    elif name.endswith(".jsonl"):
        yield from _json_records(file, required)
    else:
        yield from _csv_records(file, required)


def _parquet_records(file: IO[bytes], required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    try:
        table = pq.ParquetFile(file)
        names = tuple(table.schema_arrow.names)
        check_columns(names, required)
        for batch in table.iter_batches(10_000, columns=[column for column in COLUMNS if column in names]):
            yield from batch.to_pylist()
    except OSError as error:  # how pyarrow calls a damaged file
        raise ValueError(f"not to be read as Parquet: {error}") from error


def _json_records(file: IO[bytes], required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not an object")
            check_columns(tuple(record), required)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield record


def _csv_records(file: IO[bytes], required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        check_columns(tuple(reader.fieldnames or ()), required)
        for number, record in enumerate(reader, 1):
            if None in record:  # fewer are no harm: what is left out at the end is empty
                raise ValueError(
                    f"row {number} (line {reader.line_num}) has more fields than the header, which has "
                    f"{len(reader.fieldnames or ())}: put a text with commas in double quotes"
                )
            yield record
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Its lines as text; the first that is not UTF-8 is an error with its number."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    for number, line in enumerate(text, 1):
        if printable(line) != line:
            raise ValueError(f"line {number} is not UTF-8 ({printable(line)[:100]!r}): save the catalog as UTF-8")
        yield line


@lru_cache(1000)
def check_columns(names: tuple[str, ...], required: tuple[str, ...]) -> None:
    """Raise ValueError for a column that is there twice, is required and missing, or looks like a missing one."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} is there twice: remove or rename one")
    others = {name.strip().lower(): name for name in names if name not in COLUMNS}
    for column in COLUMNS:
        if column in names:
            continue
        near = difflib.get_close_matches(column, others, 1, 0.6 if column in required else _MISSPELT)
        if near or column in required:
            hint = f" (did you mean your {others[near[0]]!r}?)" if near else ""
            raise ValueError(f"there is no column {column!r}{hint}; it has {', '.join(map(repr, names)) or 'none'}")


def _row(number: int, record: dict[str, object]) -> CatalogRow:
    values = []
    for column in COLUMNS:
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{column} is {str(value)[:100]!r}, not text")
        if value is not None and len(value) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"{column} has {len(value)} characters, the limit is {MAX_PROMPT_CHARACTERS}")
        if value is not None and printable(value) != value:
            raise ValueError(f"{column} is {printable(value)[:100]!r}, which holds half a character: write it whole")
        values.append((value or "").strip() or None)
    image, context_prompt, target_prompt = values
    if image is None:
        raise ValueError("no image is named")
    return CatalogRow(number, image, context_prompt, target_prompt)


def is_image_key(key: str) -> bool:
    """Whether a file of an archive counts as an image: all do that are not hidden, nor a table or text beside them."""
    return not key.rpartition("/")[2].startswith(".") and not key.lower().endswith(SIDECAR_SUFFIXES)
