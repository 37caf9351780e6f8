"""What is left to do, cut into shards."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count, groupby, islice
from typing import Any, Literal

import duckdb
import pyarrow as pa

from diffcolor_core._version import METHOD_VERSION
from diffcolor_core.config import Settings
from tasks.archive import (
    CatalogError,
    CatalogRow,
    ImageWork,
    MissingImageError,
    MissingPromptError,
    Variant,
    is_image_key,
    variant_name,
)
from tasks.manifest import ManifestError, connect
from tasks.storage import Store


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that a run does to every image."""

    run_id: str
    archive: str
    """fsspec URL of the scans."""
    output: str
    """fsspec URL of images and manifest."""
    model: str
    """As for `DiffColor.from_pretrained`."""
    model_id: str
    model_revision: str
    preset: str
    """Name of the settings."""
    settings: Settings
    """The preset's, with `overrides`."""
    seed: int
    device: str
    overrides: dict[str, Any] | None = None
    """As for `preset`: settings that differ from it, by path."""
    image_format: Literal["png", "tiff"] = "png"
    """Of the colorized pictures: lossless, at the scan's bit depth."""
    access_copy: Literal["jpeg", "webp"] | None = None
    """A small lossy copy beside each picture."""
    keep_fits: bool = True
    """Keep each fit beside the images, for later colours without fitting again."""
    generation: int = 0
    """The run's number on its output."""

    @cached_property
    def _fit_inputs(self) -> str:
        model = [self.model_id, self.model_revision]
        return json.dumps([METHOD_VERSION, model, self.settings.sha256(), self.seed])

    def fit_sha256(self, context_prompt: str | None) -> str:
        """Hash of all that shapes a fit besides the image itself."""
        return hashlib.sha256(f"{self._fit_inputs}{json.dumps(context_prompt)}".encode()).hexdigest()

    def config_sha256(self, context_prompt: str | None, target_prompt: str | None) -> str:
        """Hash of all that shapes a result besides the image itself."""
        files = json.dumps([context_prompt, target_prompt, self.image_format, self.access_copy])
        return hashlib.sha256(f"{self._fit_inputs}{files}".encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """As JSON: the run's record beside the manifest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"settings": self.settings.model_dump(mode="json")}


@dataclass(frozen=True)
class PlannedImage:
    """An image's work with the attempt number that each of its variants has now.

    earlier: for each variant the manifest row of the same prompts and settings from a file that may be
    the same, now renamed or only touched: its content's hash decides.
    """

    work: ImageWork
    attempts: tuple[int, ...]
    earlier: tuple[dict[str, Any] | None, ...] = ()


@dataclass(frozen=True)
class Shard:
    """The images of one Prefect task."""

    number: int
    images: tuple[PlannedImage, ...]


class Plan:
    """What is to do, kept in a database on disk: shards are read from it as they are needed."""

    def __init__(self, database: duckdb.DuckDBPyConnection, done_before: dict[str, int]) -> None:
        self._database = database
        self.done_before = done_before
        """Variants that earlier runs have done, by status."""
        (self.num_images,) = database.execute("select count(distinct fit) from todo").fetchone() or (0,)

    def shards(self, size: int) -> Iterator[Shard]:
        """The planned images in order, `size` at a time."""
        if size < 1:
            raise ValueError(f"shard_size is {size}, but a shard holds at least 1 image")
        images = self._images()
        for number in count():
            batch = tuple(islice(images, size))
            if not batch:
                return
            yield Shard(number, batch)

    def _images(self) -> Iterator[PlannedImage]:
        cursor = self._database.cursor()
        cursor.execute(
            """select fit, image, context, target, version, number, todo.attempt, earlier.row
            from todo left join earlier using (n) order by n"""
        )
        for _, group in groupby(_fetch(cursor), key=lambda row: row[0]):
            rows = list(group)
            _, image, context, _, version, number, *_ = rows[0]
            problem: ValueError | None = None
            if version is None:
                problem = MissingImageError(f"catalog row {number} names {image!r}, which is not in the archive")
            elif context is None:
                problem = MissingPromptError("the catalog has no context prompt for it, and no --prompt was given")
            variants = tuple(Variant(variant_name(context, row[3]), row[3]) for row in rows)
            work = ImageWork(image, version or "", context, variants, problem)
            yield PlannedImage(work, tuple(row[6] for row in rows), tuple(row[7] for row in rows))


@contextmanager
def open_plan(
    archive: Store,
    output: Store,
    config: RunConfig,
    catalog: Iterable[CatalogRow] | None,
    *,
    prompt: str | None = None,
    limit: int | None = None,
    retry_quarantined: bool = False,
    whole_archive: bool = True,
) -> Iterator[Plan]:
    """Images x prompts, less what the manifest has for the same content and configuration.

    Every file of the archive that is not hidden or a sidecar counts as an image: what turns out to
    be none is quarantined, not passed over; `whole_archive` off, only those that the catalog names, and
    a row without a context prompt has that of the image's last row in the manifest. `prompt` is the
    context prompt of images for which the catalog has none. What is ok is done, what is quarantined
    too unless `retry_quarantined`; what failed is tried again, its attempt counted on.

    Everything streams through a database in a temporary folder: memory does not grow with the archive.
    Raises CatalogError.
    """
    with tempfile.TemporaryDirectory(prefix="diffcolor-plan-") as folder:
        database = duckdb.connect(f"{folder}/plan.duckdb", config={"memory_limit": "200MB", "threads": 2})
        database.execute("create table files (key varchar, version varchar)")
        _insert(database, "files", (entry for entry in archive.walk() if is_image_key(entry[0])))
        database.execute("create table catalog (number bigint, image varchar, context varchar, target varchar)")
        rows = catalog or ()
        _insert(database, "catalog", ((r.number, r.image, r.context_prompt, r.target_prompt) for r in rows))
        _refuse_duplicates(database)
        _load_known(database, output)
        database.execute(_WORK, {"prompt": prompt, "whole": whole_archive, "limit": limit or 2**62})
        done_before: Counter[str] = Counter()
        database.execute(
            """create table todo (n bigint, fit bigint, image varchar, context varchar, target varchar, version varchar,
            number bigint, attempt integer, earlier_key varchar)"""
        )
        _insert(database, "todo", _what_is_left(database, config, retry_quarantined, done_before))
        _load_earlier(database, output)
        yield Plan(database, dict(done_before))
        database.close()


_WORK = """
create table work as
    with inherited as (
        select image_key, arg_max(context_prompt, generation) as last_context from known group by image_key
    ), asked as (
        select image, coalesce(context, last_context, $prompt) as context, target, min(number) as number
        from catalog left join inherited on not $whole and inherited.image_key = image group by all
        union all
        select key, $prompt, null, 0 from files where $whole and key not in (select image from catalog)
    ), same_version as (
        select input_version, context_prompt, target_prompt, config_sha256, min(image_key) as image_key
        from known where status = 'ok' and input_version <> '' group by all
    )
    select row_number() over (order by image, context nulls first, number, target nulls first) as n,
        dense_rank() over (order by image, context nulls first) as fit,
        asked.*, files.version,
        known.status, known.attempt, known.config_sha256, known.input_version,
        same_version.config_sha256 as other_config, same_version.image_key as other_key
    from asked
    left join files on files.key = image
    left join known on known.image_key = image
        and known.context_prompt is not distinct from context and known.target_prompt is not distinct from target
    left join same_version on same_version.input_version = files.version and same_version.image_key <> image
        and same_version.context_prompt is not distinct from context
        and same_version.target_prompt is not distinct from target
    qualify fit <= $limit and row_number() over (partition by image, context, target) = 1
"""


def _what_is_left(
    database: duckdb.DuckDBPyConnection, config: RunConfig, retry_quarantined: bool, done_before: Counter[str]
) -> Iterator[tuple[object, ...]]:
    done = ("ok",) if retry_quarantined else ("ok", "quarantined")
    cursor = database.cursor()
    cursor.execute(
        """select n, fit, image, context, target, version, number,
        status, attempt, config_sha256, input_version, other_config, other_key from work order by n"""
    )
    for *planned, status, attempt, known_config, known_version, other_config, other_key in _fetch(cursor):
        _, _, image, context, target, version, _ = planned
        wanted = config.config_sha256(context, target)
        unchanged = known_config == wanted and (known_version or "") == (version or "")
        if unchanged and status in done:
            done_before[status] += 1
            continue
        earlier = image if known_config == wanted and status == "ok" else other_key if other_config == wanted else None
        yield (*planned, attempt + 1 if unchanged else 1, earlier)


def _load_known(database: duckdb.DuckDBPyConnection, output: Store) -> None:
    """What planning needs of the manifest's `results`."""
    columns = """image_key, context_prompt, target_prompt, status, attempt, config_sha256, input_version,
        coalesce(generation, 0) as generation"""
    database.execute(
        """create table known (image_key varchar, context_prompt varchar, target_prompt varchar, status varchar,
        attempt integer, config_sha256 varchar, input_version varchar, generation bigint)"""
    )
    try:
        manifest = connect(output)
    except ManifestError:
        return
    reader = manifest.execute(f"select {columns} from results").to_arrow_reader(20_000)
    database.register("batches", reader)
    database.execute("insert into known from batches")
    database.unregister("batches")


def _load_earlier(database: duckdb.DuckDBPyConnection, output: Store) -> None:
    """The whole manifest rows that planned work may turn out to be."""
    wanted = database.execute(
        "select n, earlier_key as image_key, context, target from todo where earlier_key is not null"
    ).to_arrow_table()
    if not wanted.num_rows:
        database.execute("create table earlier (n bigint, row integer)")
        return
    manifest = connect(output)
    manifest.register("wanted", wanted)
    reader = manifest.execute(
        """select n, results as row from results join wanted on wanted.image_key = results.image_key
        and context_prompt is not distinct from context and target_prompt is not distinct from target"""
    ).to_arrow_reader(10_000)
    database.register("batches", reader)
    database.execute("create table earlier as from batches")
    database.unregister("batches")


def _refuse_duplicates(database: duckdb.DuckDBPyConnection) -> None:
    twice = database.execute(
        """select min(number), max(number), image from catalog group by image, context, target having count(*) > 1
        order by 2 limit 1"""
    ).fetchone()
    if twice is not None:
        raise CatalogError(f"catalog: row {twice[1]} repeats row {twice[0]} ({twice[2]!r})")


def _insert(database: duckdb.DuckDBPyConnection, table: str, rows: Iterator[tuple[object, ...]]) -> None:
    schema = database.execute(f"from {table} limit 0").to_arrow_table().schema
    while batch := list(islice(rows, 20_000)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*batch, strict=True), schema, strict=True)]
        database.register("batch", pa.Table.from_arrays(columns, schema=schema))
        database.execute(f"insert into {table} from batch")
        database.unregister("batch")


def _fetch(cursor: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := cursor.fetchmany(10_000):
        yield from rows
