"""Planning: images and prompts, less what the manifest has already, cut into shards."""

import fcntl
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from tasks.archive import CatalogRow, is_image_key, variant_name
from tasks.errors import CatalogError, MissingImageError, NoManifestError
from tasks.manifest import MISSING_OUTPUT, connect
from tasks.records import ImageWork, PlannedImage, RunConfig, Shard, Variant
from tasks.storage import Store


def output_below(archive: Store, output: Store) -> str | None:
    """The output's folder below the archive, as in "out/", whose files are no scans. None if it lies elsewhere.

    Raises ValueError if the archive lies in the output, or is the same folder.
    """
    if archive.below(output) is not None:
        raise ValueError(
            f"the archive {archive.url!r} lies in the output {output.url!r}: name an output beside or below the archive"
        )
    return output.below(archive)


def shard_sizes(num_images: int, size: int, num_actors: int, batch: int = 1) -> Iterator[int]:
    """The number of images of each shard: `size`, then fewer and fewer, so that all actors end together.

    This is guided self-scheduling (Polychronopoulos and Kuck 1987): one actor's share of what is left, rounded up. All
    but the last are whole batches, at least one, as a batch takes as long with fewer photographs.
    """
    if size < 1:
        raise ValueError(f"shard_size is {size}, but a shard holds at least 1 image")
    most = max(1, size // batch)
    while num_images > 0:
        share = math.ceil(num_images / (num_actors * batch))
        taken = min(num_images, batch * min(most, share))
        yield taken
        num_images -= taken


class Plan:
    """A catalog, and what is to be done of it, in a database on disk: memory does not grow with the archive."""

    def __init__(self, database: duckdb.DuckDBPyConnection) -> None:
        self._database = database
        self.done_before: dict[str, int] = {}
        """Variants that earlier runs have done, by status."""
        self.num_images = 0

    def replace_catalog(self, catalog: Iterable[CatalogRow]) -> None:
        """Hold these rows and no others. Raises CatalogError."""
        self._database.execute("delete from catalog")
        rows = ((r.number, r.image, r.context_prompt, r.target_prompt, r.extra) for r in catalog)
        _insert(self._database, "catalog", rows)
        _refuse_duplicates(self._database)

    def fill(self, config: RunConfig) -> None:
        """Find out what is to be done: images x prompts, less what the manifest has for this configuration.

        Every file of the archive that is neither hidden nor a sidecar counts as an image; if it turns out to be
        none, it is quarantined. Without `whole_archive` only the images count that the catalog names, and a row
        without a context prompt takes that of the image's last row in the manifest. What is ok is done, and so is
        what is quarantined, unless `retry` says otherwise. What failed is tried again under its next attempt number.
        Catalog columns that we do not know are no reason to do anything again: changed ones are kept with the next
        row that is written for their variant.
        """
        options = config.options
        archive, output = Store(options.archive), Store(options.output)
        database = self._database
        database.execute("create table files (key varchar, version varchar)")
        own = output_below(archive, output)
        files = (f for f in archive.walk() if is_image_key(f[0]) and not (own and f[0].startswith(own)))
        _insert(database, "files", files)
        _load_known(database, output)
        # One table after the other: their joins and sorts do not fit the memory limit together.
        database.execute(_ASKED, {"prompt": options.prompt, "whole": config.whole_archive})
        database.execute(_WORK)
        database.execute(_IN_ORDER)
        done_before: Counter[str] = Counter()
        database.execute(
            """create table todo (n bigint, fit bigint, image varchar, context varchar, target varchar, version varchar,
            number bigint, attempt integer, config varchar, columns varchar)"""
        )
        _insert(database, "todo", _what_is_left(database, config, done_before))
        _load_earlier(database, output)
        self.done_before = dict(done_before)
        (self.num_images,) = database.execute("select count(distinct fit) from todo").fetchone() or (0,)

    def shards(self, size: int, num_actors: int = 1, batch: int = 1) -> Iterator[Shard]:
        """The planned images in order, in shards of the sizes that `shard_sizes` gives."""
        images = self.images()
        for number, num_images in enumerate(shard_sizes(self.num_images, size, num_actors, batch)):
            yield Shard(number, tuple(islice(images, num_images)))

    def images(self) -> Iterator[PlannedImage]:
        """The planned images in order."""
        for _, group in groupby(self._todo(), key=itemgetter(0)):
            rows = list(group)
            _, _, image, context, _, version, number, *_ = rows[0]
            problem: ValueError | None = None
            if version is None:
                problem = MissingImageError(f"catalog row {number} names {image!r}, which is not in the archive")
            variants = tuple(Variant(variant_name(context, row[4]), row[4], row[8]) for row in rows)
            work = ImageWork(image, version or "", context, variants, problem)
            yield PlannedImage(work, tuple(row[7] for row in rows), tuple(row[9] for row in rows))

    def _todo(self) -> Iterator[tuple[Any, ...]]:
        """The rows of `todo` in order, each with its earlier rows. Those are wide, so only a few are held at a time."""
        todo, lookup = self._database.cursor(), self._database.cursor()
        todo.execute("select fit, n, image, context, target, version, number, attempt, columns from todo order by n")
        while rows := todo.fetchmany(1_000):
            earlier: dict[int, list[dict[str, Any]]] = {row[1]: [] for row in rows}
            lookup.execute("select n, row from earlier where n between ? and ?", [rows[0][1], rows[-1][1]])
            for n, row in lookup.fetchall():
                earlier[n].append(row)
            yield from ((*row, tuple(earlier[row[1]])) for row in rows)


@contextmanager
def open_plan(catalog: Iterable[CatalogRow] | None) -> Iterator[Plan]:
    """A plan that holds the catalog and nothing else yet, in a temporary folder. Raises CatalogError."""
    with _own_folder() as folder:
        database = duckdb.connect(f"{folder}/plan.duckdb", config={"memory_limit": "200MB", "threads": 2})
        database.execute(
            "create table catalog (number bigint, image varchar, context varchar, target varchar, columns varchar)"
        )
        plan = Plan(database)
        plan.replace_catalog(catalog or ())
        yield plan
        database.close()


_FOLDER = "diffcolor-plan-"


@contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder, locked while it is in use. Removes the folders that killed runs have left behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/lock"):
        with suppress(OSError), left.open("rb") as lock:  # in use, another user's, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as folder, tempfile.NamedTemporaryFile(dir=folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.link(lock.name, f"{folder}/lock")  # under this name only once it is locked
        yield folder


_ASKED = """
create table asked as
    with inherited as (
        select image_key, arg_max(context_prompt, generation) as last_context from known group by image_key
    ),
    named as (
        select image, coalesce(context, last_context, $prompt) as context, target, number, columns
        from catalog left join inherited on not $whole and inherited.image_key = image
        union all
        select key, $prompt, null, null, null from files where $whole and key not in (select image from catalog)
        union all
        select image_key, context_prompt, target_prompt, null, catalog_columns from known where queued
    )
    select image, context, target, coalesce(min(number), 0) as number,
        coalesce(arg_min(columns, number), any_value(columns)) as columns
    from named group by image, context, target
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
    database: duckdb.DuckDBPyConnection, config: RunConfig, done_before: Counter[str]
) -> Iterator[tuple[object, ...]]:
    """Rows of `todo`. They are numbered here, as window functions over a million rows take memory."""
    options = config.options
    done = ("ok",) if options.retry == "quarantined" else ("ok", "quarantined")
    cursor = database.cursor()
    cursor.execute("""select image, context, target, version, number, status, attempt, config_sha256, input_version,
        columns from ordered""")
    numbers = count()
    fits = groupby(_fetch(cursor), key=itemgetter(0, 1))
    for fit, (_, rows) in enumerate(islice(fits, options.limit)):
        for _, same in groupby(rows, key=itemgetter(2)):  # two files whose escaped names are the same
            image, context, target, version, number, status, attempt, known_config, known_version, columns = next(same)
            wanted = config.config_sha256(context, target)
            unchanged = known_config == wanted and (known_version or "") == (version or "")
            if unchanged and status in done:
                done_before[status] += 1
                continue
            attempt = attempt + 1 if unchanged else 1
            yield (next(numbers), fit, image, context, target, version, number, attempt, wanted, columns)


def _load_known(database: duckdb.DuckDBPyConnection, output: Store) -> None:
    """What planning needs of the manifest: the latest row of each variant, and everything that was ever done."""
    database.execute(
        """create table known (image_key varchar, context_prompt varchar, target_prompt varchar, status varchar,
        attempt integer, config_sha256 varchar, input_version varchar, generation bigint, queued boolean,
        catalog_columns varchar)"""
    )
    database.execute("create table done (image_key varchar, config_sha256 varchar, input_version varchar)")
    try:
        manifest = connect(output, views=["latest", "attempts"])
    except NoManifestError:
        return
    columns = f"""image_key, context_prompt, target_prompt, status, attempt, config_sha256, input_version,
        coalesce(generation, 0), coalesce(error_class = '{MISSING_OUTPUT}', false), catalog_columns"""
    _stream(database, "insert into known from batches", manifest.execute(f"select {columns} from latest"))
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
    """Whole manifest rows that may answer planned work: those of its image, or of one file with its version token."""
    database.execute("create table earlier (n bigint, row integer)")
    for statement in _CANDIDATES:
        database.execute(statement)
    wanted = database.execute("from candidates").to_arrow_table()
    if not wanted.num_rows:
        return
    manifest = connect(output, views=["attempts"])
    manifest.register("wanted", wanted)
    rows = manifest.execute(
        """select n, attempts as row from attempts join wanted on wanted.image_key = attempts.image_key
        and wanted.config_sha256 = attempts.config_sha256
        and wanted.input_version = coalesce(attempts.input_version, '') where status = 'ok'"""
    )
    _stream(database, "create or replace table earlier as from batches", rows)


def _stream(database: duckdb.DuckDBPyConnection, sql: str, rows: duckdb.DuckDBPyConnection) -> None:
    """Run `sql`, which reads the rows of another connection's query as the table `batches`."""
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
