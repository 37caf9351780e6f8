"""What is left to do, cut into shards."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from diffcolor_core._version import METHOD_VERSION
from diffcolor_core.config import Settings
from tasks.archive import CatalogRow, ImageWork, Variant, is_image_key, variant_name
from tasks.errors import CatalogError, MissingImageError, MissingPromptError, NoManifestError
from tasks.manifest import MISSING_OUTPUT, connect
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

    earlier: for each variant the manifest's ok rows, of any run, of the same configuration from files that
    may be the same, now renamed, touched or changed back: the content's hash decides.
    """

    work: ImageWork
    attempts: tuple[int, ...]
    earlier: tuple[tuple[dict[str, Any], ...], ...] = ()


@dataclass(frozen=True)
class Shard:
    """The images of one Prefect task."""

    number: int
    images: tuple[PlannedImage, ...]


def output_below(archive: Store, output: Store) -> str | None:
    """Where in the archive the output lies, as in "out/": what is below are no scans. None if it lies elsewhere.

    Raises ValueError if the archive lies in the output, or is the same folder.
    """
    if type(archive.fs) is not type(output.fs):
        return None
    inner, outer = (f"{os.path.realpath(s.root) if s.is_local else s.root}/" for s in (output, archive))
    if outer.startswith(inner):
        raise ValueError(
            f"the archive {archive.url!r} lies in the output {output.url!r}: name an output beside or below the archive"
        )
    return inner[len(outer) :] if inner.startswith(outer) else None


def shard_sizes(num_images: int, size: int, num_actors: int) -> Iterator[int]:
    """Images of each shard: `size`, and ever fewer towards the end, so that all actors end together.

    That is guided self-scheduling (Polychronopoulos and Kuck 1987): of what is left an actor's share, rounded up.
    """
    if size < 1:
        raise ValueError(f"shard_size is {size}, but a shard holds at least 1 image")
    while num_images > 0:
        batch = min(size, math.ceil(num_images / num_actors))
        yield batch
        num_images -= batch


class Plan:
    """What is to do, kept in a database on disk: shards are read from it as they are needed."""

    def __init__(self, database: duckdb.DuckDBPyConnection, done_before: dict[str, int]) -> None:
        self._database = database
        self.done_before = done_before
        """Variants that earlier runs have done, by status."""
        (self.num_images,) = database.execute("select count(distinct fit) from todo").fetchone() or (0,)

    def shards(self, size: int, num_actors: int = 1) -> Iterator[Shard]:
        """The planned images in order, as many at a time as `shard_sizes` says."""
        images = self._images()
        for number, num_images in enumerate(shard_sizes(self.num_images, size, num_actors)):
            yield Shard(number, tuple(islice(images, num_images)))

    def _images(self) -> Iterator[PlannedImage]:
        for _, group in groupby(self._todo(), key=itemgetter(0)):
            rows = list(group)
            _, _, image, context, _, version, number, *_ = rows[0]
            problem: ValueError | None = None
            if version is None:
                problem = MissingImageError(f"catalog row {number} names {image!r}, which is not in the archive")
            elif context is None:
                problem = MissingPromptError("the catalog has no context prompt for it, and no --prompt was given")
            variants = tuple(Variant(variant_name(context, row[4]), row[4]) for row in rows)
            work = ImageWork(image, version or "", context, variants, problem)
            yield PlannedImage(work, tuple(row[7] for row in rows), tuple(row[8] for row in rows))

    def _todo(self) -> Iterator[tuple[Any, ...]]:
        """The rows of `todo` in order, each with its earlier rows: looked up a few at a time, for they are wide."""
        todo, lookup = self._database.cursor(), self._database.cursor()
        todo.execute("select fit, n, image, context, target, version, number, attempt from todo order by n")
        while rows := todo.fetchmany(1_000):
            earlier: dict[int, list[dict[str, Any]]] = {row[1]: [] for row in rows}
            lookup.execute("select n, row from earlier where n between ? and ?", [rows[0][1], rows[-1][1]])
            for n, row in lookup.fetchall():
                earlier[n].append(row)
            yield from ((*row, tuple(earlier[row[1]])) for row in rows)


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
    with _own_folder() as folder:
        database = duckdb.connect(f"{folder}/plan.duckdb", config={"memory_limit": "200MB", "threads": 2})
        database.execute("create table files (key varchar, version varchar)")
        own = output_below(archive, output)
        files = (f for f in archive.walk() if is_image_key(f[0]) and not (own and f[0].startswith(own)))
        _insert(database, "files", files)
        database.execute("create table catalog (number bigint, image varchar, context varchar, target varchar)")
        rows = catalog or ()
        _insert(database, "catalog", ((r.number, r.image, r.context_prompt, r.target_prompt) for r in rows))
        _refuse_duplicates(database)
        _load_known(database, output)
        # One table after the other: their joins and sorts do not fit the memory limit together.
        database.execute(_ASKED, {"prompt": prompt, "whole": whole_archive})
        database.execute(_WORK)
        database.execute(_IN_ORDER)
        done_before: Counter[str] = Counter()
        database.execute(
            """create table todo (n bigint, fit bigint, image varchar, context varchar, target varchar, version varchar,
            number bigint, attempt integer, config varchar)"""
        )
        _insert(database, "todo", _what_is_left(database, config, limit, retry_quarantined, done_before))
        _load_earlier(database, output)
        yield Plan(database, dict(done_before))
        database.close()


_FOLDER = "diffcolor-plan-"


@contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder, locked while it is in use; those that killed runs have left behind are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/lock"):
        with suppress(OSError), left.open("rb") as lock:  # in use, another user's, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as folder, tempfile.NamedTemporaryFile(dir=folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.link(lock.name, f"{folder}/lock")  # it is there once it is locked
        yield folder


_ASKED = """
create table asked as
    with inherited as (
        select image_key, arg_max(context_prompt, generation) as last_context from known group by image_key
    ),
    named as (
        select image, coalesce(context, last_context, $prompt) as context, target, number
        from catalog left join inherited on not $whole and inherited.image_key = image
        union all
        select key, $prompt, null, null from files where $whole and key not in (select image from catalog)
        union all
        select image_key, context_prompt, target_prompt, null from known where queued
    )
    select image, context, target, coalesce(min(number), 0) as number from named group by all
"""
_WORK = """
create table work as
    select asked.*, files.version, known.status, known.attempt, known.config_sha256, known.input_version
    from asked
    left join files on files.key = image
    left join known on known.image_key = image
        and known.context_prompt is not distinct from context and known.target_prompt is not distinct from target
"""
_IN_ORDER = "create table ordered as from work order by image, context nulls first, number, target nulls first"


def _what_is_left(
    database: duckdb.DuckDBPyConnection,
    config: RunConfig,
    limit: int | None,
    retry_quarantined: bool,
    done_before: Counter[str],
) -> Iterator[tuple[object, ...]]:
    """Rows of `todo`, numbered here: windows over a million rows take memory. `ordered` keeps its order."""
    done = ("ok",) if retry_quarantined else ("ok", "quarantined")
    cursor = database.cursor()
    cursor.execute("""select image, context, target, version, number, status, attempt, config_sha256, input_version
        from ordered""")
    numbers = count()
    fits = groupby(_fetch(cursor), key=itemgetter(0, 1))
    for fit, (_, rows) in enumerate(islice(fits, limit)):
        for _, same in groupby(rows, key=itemgetter(2)):  # two files, if their escaped names are one
            image, context, target, version, number, status, attempt, known_config, known_version = next(same)
            wanted = config.config_sha256(context, target)
            unchanged = known_config == wanted and (known_version or "") == (version or "")
            if unchanged and status in done:
                done_before[status] += 1
                continue
            yield (next(numbers), fit, image, context, target, version, number, attempt + 1 if unchanged else 1, wanted)


def _load_known(database: duckdb.DuckDBPyConnection, output: Store) -> None:
    """What planning needs of the manifest: of each variant the latest row, and whatever has been done ever."""
    database.execute(
        """create table known (image_key varchar, context_prompt varchar, target_prompt varchar, status varchar,
        attempt integer, config_sha256 varchar, input_version varchar, generation bigint, queued boolean)"""
    )
    database.execute("create table done (image_key varchar, config_sha256 varchar, input_version varchar)")
    try:
        manifest = connect(output)
    except NoManifestError:
        return
    columns = f"""image_key, context_prompt, target_prompt, status, attempt, config_sha256, input_version,
        coalesce(generation, 0), coalesce(error_class = '{MISSING_OUTPUT}', false)"""
    _stream(database, "insert into known from batches", manifest.execute(f"select {columns} from results"))
    rows = manifest.execute(
        "select image_key, config_sha256, coalesce(input_version, '') from attempts where status = 'ok'"
    )
    _stream(database, "insert into done from batches", rows)


_CANDIDATES = (
    """create table candidates as select n, image_key, config_sha256, input_version
    from todo join done on image_key = image and config_sha256 = config""",
    """create table same_token as select min(image_key) as image_key, config_sha256, input_version
    from done where input_version <> '' group by all""",
    """insert into candidates select n, image_key, config_sha256, input_version
    from todo join same_token on input_version = version and config_sha256 = config where image_key <> image""",
)


def _load_earlier(database: duckdb.DuckDBPyConnection, output: Store) -> None:
    """The whole manifest rows that planned work may turn out to be: of its image, or of one file with its token."""
    database.execute("create table earlier (n bigint, row integer)")
    for statement in _CANDIDATES:
        database.execute(statement)
    wanted = database.execute("from candidates").to_arrow_table()
    if not wanted.num_rows:
        return
    manifest = connect(output)
    manifest.register("wanted", wanted)
    rows = manifest.execute(
        """select n, attempts as row from attempts join wanted on wanted.image_key = attempts.image_key
        and wanted.config_sha256 = attempts.config_sha256
        and wanted.input_version = coalesce(attempts.input_version, '') where status = 'ok'"""
    )
    _stream(database, "create or replace table earlier as from batches", rows)


def _stream(database: duckdb.DuckDBPyConnection, sql: str, rows: duckdb.DuckDBPyConnection) -> None:
    """Run `sql` over the rows of another connection's query, as `batches`."""
    database.register("batches", rows.to_arrow_reader(10_000))
    database.execute(sql)
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
