"""The archive's images, and the catalog that names their prompts."""

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time
from functools import lru_cache
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.lib import ArrowException

from tasks.errors import CatalogError
from tasks.layout import RUN_RECORD
from tasks.storage import Store, locate, printable

DEFAULT_CATALOG = "catalog.csv"
COLUMNS = ("image", "context_prompt", "target_prompt")
RECOLOR_COLUMNS = ("image", "target_prompt")
"""The columns that a catalog of new colours needs: the context prompt is the one that the image had before."""
SIDECAR_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".md", ".xml", ".yaml", ".yml")
"""Tables and texts that lie beside images. Every other file of an archive counts as an image."""
MAX_PROMPT_CHARACTERS = 4000
"""The longest prompt; a text encoder reads about 300 characters at a time."""
MAX_EXTRA_CHARACTERS = 20_000
"""The longest `CatalogRow.extra`, which is copied into every manifest row of the image."""

_RECORD_BELOW = re.compile(rf"(.+/){RUN_RECORD.pattern}")
_MISSPELT = 0.8
"""An unknown column at least this similar (difflib's ratio) to a missing optional one counts as a misspelling."""


@dataclass(frozen=True)
class CatalogRow:
    """A row of a catalog. The first row after the header has number 1."""

    number: int
    image: str
    context_prompt: str | None
    target_prompt: str | None
    extra: str | None = None
    """The other columns that are not empty, as a JSON object with sorted keys; None if there are none."""


def variant_name(context_prompt: str | None, target_prompt: str | None) -> str:
    """A stable name for what is asked of an image: "primary-..." or "target-..." and a hash of both prompts."""
    digest = hashlib.sha256(json.dumps([context_prompt, target_prompt]).encode()).hexdigest()[:10]
    return f"{'primary' if target_prompt is None else 'target'}-{digest}"


# ------------------------------------------------------------------ the catalog


def read_catalog(
    archive: Store, catalog: str | None, required: tuple[str, ...] = COLUMNS[:2]
) -> Iterator[CatalogRow] | None:
    """The rows of a catalog (CSV, JSONL or Parquet), by any fsspec URL; by default the archive's catalog.csv.

    None if no catalog is given and the archive has none. required: the columns that it must have. Other columns
    are kept in `CatalogRow.extra`, but one that looks like a misspelt prompt column is an error. Raises
    CatalogError with what is wrong and where. Rows are read one by one, so an error in a row is raised when the
    row is reached.
    """
    if catalog is None:
        if not archive.has(DEFAULT_CATALOG):
            return None
        return _rows(archive, DEFAULT_CATALOG, archive.uri(DEFAULT_CATALOG), required)
    if not catalog.endswith((".csv", ".jsonl", ".parquet")):
        raise CatalogError(f"catalog {catalog!r}: a catalog is .csv, .jsonl or .parquet")
    store, name = locate(catalog)
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
        check_columns(tuple(table.schema_arrow.names), required)
        for batch in table.iter_batches(10_000):
            yield from _with_dates_as_text(batch).to_pylist()
    except OSError as error:  # pyarrow's error for a damaged file
        raise ValueError(f"it cannot be read as Parquet: {error}") from error


def _with_dates_as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows. Parquet's dates go beyond Python's, so Arrow writes them out."""
    columns = [column.cast(pa.string()) if _is_date_or_time(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _is_date_or_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind) and not pa.types.is_duration(kind))


def _json_records(file: IO[bytes], required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            check_columns(tuple(record), required)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield record


def _csv_records(file: IO[bytes], required: tuple[str, ...]) -> Iterator[dict[str, object]]:
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        check_columns(tuple(reader.fieldnames or ()), required)
        for number, record in enumerate(reader, 1):
            if None in record:  # fewer fields are allowed: those left out at the end are empty
                raise ValueError(
                    f"row {number} (line {reader.line_num}) has more fields than the header, which has "
                    f"{len(reader.fieldnames or ())}: put a text with commas in double quotes"
                )
            yield record
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The file's lines as text. Raises ValueError, with the line's number, for one that is not UTF-8."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    for number, line in enumerate(text, 1):
        if printable(line) != line:
            raise ValueError(f"line {number} is not UTF-8 ({printable(line)[:100]!r}): save the catalog as UTF-8")
        yield line


@lru_cache(1000)
def check_columns(names: tuple[str, ...], required: tuple[str, ...]) -> None:
    """Raise ValueError for a repeated column, a missing required one, or one that looks like a misspelt prompt."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} appears twice: remove or rename one")
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
    return CatalogRow(number, image, context_prompt, target_prompt, _extra(record))


def _extra(record: dict[str, object]) -> str | None:
    """The columns beside `COLUMNS` that are not empty, as JSON. Raises ValueError if they are too long."""
    others = {name: value for name, value in record.items() if name not in COLUMNS and not _is_empty(value)}
    if not others:
        return None
    try:
        text = json.dumps(others, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_json_value)
    except ValueError as error:
        raise ValueError(f"a column beside {', '.join(COLUMNS)} is not JSON: {error}") from error
    if len(text) > MAX_EXTRA_CHARACTERS:
        sizes = {name: len(json.dumps(value, default=_json_value)) for name, value in others.items()}
        longest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"the columns beside {', '.join(COLUMNS)} have {len(text)} characters as JSON, the limit is "
            f"{MAX_EXTRA_CHARACTERS}: leave some out, such as {longest!r} with {sizes[longest]}"
        )
    if printable(text) != text:
        raise ValueError(f"it holds half a character: {printable(text)[:100]!r}: write it whole")
    return text


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (value != value)  # NaN


def as_text(value: object) -> str:
    """A catalog column's value as a table shows it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json_value(value: object) -> str:
    """Values of Parquet that JSON does not have, as text: bytes in hexadecimal, dates in ISO 8601, decimals exactly."""
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, date | time) else str(value)


def is_image_key(key: str) -> bool:
    """Whether a file of an archive counts as an image: every file does that is not hidden, a table or a text."""
    return not key.rpartition("/")[2].startswith(".") and not key.lower().endswith(SIDECAR_SUFFIXES)


def image_keys(archive: Store) -> list[str]:
    """The keys that count as images, sorted, without those in outputs of runs that lie below the archive."""
    keys = [key for key, _ in archive.walk()]
    outputs = tuple({found[1] for key in keys if (found := _RECORD_BELOW.fullmatch(key))})
    return sorted(key for key in keys if is_image_key(key) and not key.startswith(outputs))
