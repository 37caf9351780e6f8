"""Results as files to hand on: in the archive's own folders, under its own file names, with a table of what is what."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

import bagit
import duckdb

from diffcolor_core import Picture, __version__
from diffcolor_core.progress import Progress, silent
from diffcolor_scans.decoding import decode
from diffcolor_scans.formats import SUFFIX, ImageFormat, encode
from tasks.archive import as_text
from tasks.errors import ExportError
from tasks.layout import EXPORT_TABLE, TEMPORARY, key_of
from tasks.lease import last_record
from tasks.manifest import connect
from tasks.rows import Row
from tasks.storage import Store, check_key

NUM_TRANSFERS = 8
"""Pictures that are copied at the same time."""
TABLE_COLUMNS = (
    "file",
    "sha256",
    "image",
    "variant",
    "context_prompt",
    "target_prompt",
    "choice",
    "choice_note",
    "choice_by",
    "choice_at",
    "input_sha256",
    "model_id",
    "model_revision",
    "run_id",
)
"""Of `EXPORT_TABLE`; the catalog's other columns come after them."""
PAYLOAD = "data"
"""The folder of a bag that holds what is handed on."""
TAG_FILES = ("bagit.txt", "bag-info.txt", "manifest-sha256.txt", "tagmanifest-sha256.txt")


@dataclass(frozen=True)
class Exported:
    """How many pictures an export has written, and how many were there before."""

    num_written: int
    num_there: int


def export(
    output: Store,
    destination: Store,
    *,
    approved: bool = False,
    where: str | None = None,
    image_format: ImageFormat | None = None,
    bag: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Copy the pictures of `results` to `destination`, with `EXPORT_TABLE`; nothing if none matches.

    approved, where: only those that a person has approved, and those for which this SQL expression over `results` is
    true. image_format: files of this format, made from the stored ones if need be; by default the stored files. bag:
    make a BagIt bag of a local folder. A picture that is there already is left alone, so the same call goes on where
    the last one was stopped. Raises ExportError, after everything else is done, for names that another file has.
    """
    if bag and not destination.is_local:
        raise ExportError(f"a bag is made in a local folder, and {destination.url!r} is none: copy the bag afterwards")
    _refuse_overlap(output, destination)
    with tempfile.TemporaryDirectory(prefix="diffcolor-export-") as spill:
        connection = connect(output, spill=spill)
        total = _choose(connection, approved=approved, where=where, image_format=image_format)
        if not total:
            return Exported(0, 0)
        folder = f"{PAYLOAD}/" if bag else ""
        # 1. before anything is written: names that leave the folder, files that do not belong here
        names = [check_key(f"{folder}{name}") for (name,) in connection.execute("select file from chosen").fetchall()]
        destination.sweep()
        if bag:
            _refuse_foreign(destination, {*names, f"{folder}{EXPORT_TABLE}", *TAG_FILES})
        table = f"{folder}{EXPORT_TABLE}"
        _refuse_foreign_table(destination, table)
        # 2. the pictures, and then the table as a whole
        copy = partial(_copy, output, destination, folder, image_format)
        outcomes: Counter[str] = Counter()
        in_the_way: list[str] = []
        with destination.replacing(table) as file, ThreadPoolExecutor(NUM_TRANSFERS) as pool:
            with _table(file, _catalog_columns(connection)) as add:
                for batch in _batches(connection):
                    for row, copied in zip(batch, pool.map(copy, batch), strict=True):
                        add(row, copied.sha256)
                        outcomes[copied.outcome] += 1
                        if copied.outcome == "in the way":
                            in_the_way.append(row["file"])
                        progress("pictures", outcomes.total(), total)
            if in_the_way:
                raise ExportError(
                    f"{len(in_the_way)} of {total} pictures have the name of another file in {destination.url!r}, such "
                    f"as {in_the_way[0]!r}: nothing is overwritten. Move those files or name another folder, and give "
                    "the command again"
                )
    if bag:
        _make_bag(destination.root)
    if destination.is_local:
        with suppress(OSError):
            os.rmdir(os.path.join(destination.root, TEMPORARY))
    return Exported(outcomes["written"], outcomes["there"])


# ------------------------------------------------------------------ which pictures, under which names


def _choose(
    connection: duckdb.DuckDBPyConnection, *, approved: bool, where: str | None, image_format: ImageFormat | None
) -> int:
    """Make the table `chosen`: the rows to export, each with its file's name; how many there are.

    Of `where` only what DuckDB's parser has read as one expression goes into the statement, and DuckDB may read
    nothing but the manifest: see `connect`. (A relation's `filter` would hold the GIL while fsspec needs it.)
    """
    conditions = ["status = 'ok'", "output_uri is not null", *(["choice = 'approved'"] if approved else [])]
    try:
        if where is not None:
            conditions.append(f"({duckdb.SQLExpression(where)})")
        connection.execute(f"create view asked as from results where {' and '.join(conditions)}")
        connection.execute(_NAMED, {"suffix": SUFFIX[image_format] if image_format else None})
    except duckdb.Error as error:
        if where is None:
            raise
        raise ExportError(f"--where {where!r} is no condition on the columns of `results`: {error}") from error
    (total,) = connection.execute("select count(*) from chosen").fetchone() or (0,)
    return int(total)


_NAMED = r"""
    create table chosen as
    with parts as (
        select *, image_key as image, regexp_replace(image_key, '\.[^./]*$', '') as stem,
            coalesce($suffix, regexp_extract(output_uri, '\.[^./]*$')) as suffix,
            case when count(*) over (partition by image_key) > 1 then '-' || variant else '' end as detail
        from asked
    ),
    names as (
        select *, stem || detail || suffix as short, image_key || detail || suffix as long,
            count(*) over (partition by stem || detail || suffix) as namesakes
        from parts
    )
    select image, variant, context_prompt, target_prompt, choice, choice_note, choice_by,
        choice_at::varchar as choice_at, input_sha256, model_id, model_revision, run_id, catalog_columns, output_uri,
        output_sha256, access_uri, access_sha256,
        case when namesakes > 1 or short in (select long from names) then long else short end as file
    from names order by image, variant
"""
"""The archive's name with the picture's suffix. Two images that would share a name, such as a.jpg and a.tif, keep their
own suffix before it."""


def _batches(connection: duckdb.DuckDBPyConnection) -> Iterator[list[Row]]:
    cursor = connection.cursor()
    cursor.execute("from chosen")
    names = [column[0] for column in cursor.description or ()]
    while values := cursor.fetchmany(8 * NUM_TRANSFERS):
        yield [dict(zip(names, row, strict=True)) for row in values]


def _catalog_columns(connection: duckdb.DuckDBPyConnection) -> list[str]:
    found = connection.execute("select distinct unnest(json_keys(catalog_columns)) as name from chosen order by name")
    return [name for (name,) in found.fetchall()]


# ------------------------------------------------------------------ what must not be touched


def _refuse_overlap(output: Store, destination: Store) -> None:
    """Raise ExportError for a destination in the output, or among the scans, where a run would take it for scans."""
    record = last_record(output) or {}
    places = {"output": output} | ({"archive": Store(record["archive"])} if "archive" in record else {})
    for name, place in places.items():
        if destination.below(place) is not None:
            raise ExportError(f"{destination.url!r} lies in the {name} {place.url!r}: name a folder elsewhere")


def _refuse_foreign(destination: Store, known: set[str]) -> None:
    foreign = sorted({key for key, _ in destination.walk()} - known)
    if foreign:
        raise ExportError(
            f"{destination.url!r} has {len(foreign)} files that are not of this export, such as {foreign[0]!r}: a bag "
            "holds nothing else, so name a new folder"
        )


def _refuse_foreign_table(destination: Store, table: str) -> None:
    """Raise ExportError if the table's name is taken by something that no export has written."""
    try:
        with destination.open(table) as file:
            ours = file.readline().decode(errors="replace").startswith(",".join(TABLE_COLUMNS))
    except FileNotFoundError:
        return
    if not ours:
        raise ExportError(f"{destination.uri(table)!r} is not the table of an export: move it or name another folder")


# ------------------------------------------------------------------ files


class _Copied(NamedTuple):
    outcome: Literal["written", "there", "in the way"]
    sha256: str


def _copy(output: Store, destination: Store, folder: str, image_format: ImageFormat | None, row: Row) -> _Copied:
    """Put one picture in its place, unless something is there."""
    key, sha256, as_stored = _source(row, image_format)
    place = f"{folder}{row['file']}"
    if as_stored and destination.sha256(place) == sha256:
        return _Copied("there", sha256)
    try:
        data = output.read(key)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ExportError(
            f"{output.uri(key)!r} is missing or was changed since it was made of {row['image']!r}: "
            "`diffcolor verify OUTPUT --repair` queues it again"
        )
    if image_format is not None and not as_stored:
        decoded = decode(data)
        data = encode(Picture(decoded.samples), image_format, source=decoded.metadata)
    written = destination.create(place, data)
    same = written or destination.read(place) == data
    return _Copied("written" if written else "there" if same else "in the way", hashlib.sha256(data).hexdigest())


def _source(row: Row, image_format: ImageFormat | None) -> tuple[str, str, bool]:
    """The key and hash of the file to hand on, and whether it has the format that is asked for."""
    for file in ("output", "access"):
        uri, sha256 = row[f"{file}_uri"], row[f"{file}_sha256"]
        if uri and sha256 and (image_format is None or uri.endswith(SUFFIX[image_format])):
            return key_of(uri), sha256, True
    return key_of(row["output_uri"]), row["output_sha256"], False


@contextmanager
def _table(file: IO[bytes], catalog: list[str]) -> Iterator[Callable[[Row, str], None]]:
    """What adds a picture and its hash to the table, as CSV in `file`, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*TABLE_COLUMNS, *(f"catalog_{name}" if name in TABLE_COLUMNS else name for name in catalog)])

    def add(row: Row, sha256: str) -> None:
        extra = json.loads(row["catalog_columns"] or "{}")
        values = (extra.get(name, "") for name in catalog)
        writer.writerow([*(sha256 if name == "sha256" else row[name] for name in TABLE_COLUMNS), *map(as_text, values)])

    yield add
    text.detach()


def _make_bag(folder: str) -> None:
    """Make a BagIt bag of a folder whose payload is in place. Its tag files are written anew."""
    for name in TAG_FILES:
        Path(folder, name).unlink(missing_ok=True)
    Path(folder, TAG_FILES[0]).write_text("BagIt-Version: 0.97\nTag-File-Character-Encoding: UTF-8\n")
    bag = bagit.Bag(folder)
    bag.algorithms = ["sha256"]
    bag.info = {"Bagging-Date": date.today().isoformat(), "Bag-Software-Agent": f"DiffColor Archive {__version__}"}
    bag.save(manifests=True)
