"""The manifest: typed rows in immutable Parquet parts, the views over them, and the published results.

Writers commit parts, and `tasks.approvals` what people have chosen. Readers use the views through `query`, or the
file `results.parquet`, a copy of the view `results` that is written anew when a run, a compaction or an approval ends.
"""

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.columns import APPROVALS_SCHEMA, CHOSEN, COLUMNS, RESULTS_SCHEMA, SCHEMA, SCHEMA_VERSION, column_table
from tasks.errors import ManifestError, NoManifestError
from tasks.layout import (
    APPROVAL,
    APPROVALS,
    COMPACTED_PART,
    LOOSE_PART,
    MANIFEST,
    POINTER,
    RESULTS,
    part,
    pointer,
)
from tasks.lease import is_run_open
from tasks.storage import Store

MISSING_OUTPUT = "MissingOutputError"
"""Error class of the rows that `verify --repair` has queued again."""
MEMORY_LIMIT = "1GB"
"""DuckDB's memory while it sorts a whole manifest; the rest goes to a temporary folder."""
ROWS_PER_GROUP = 25_000
"""The size of a row group in sorted files: who looks for one image reads one group."""


_OUTDATED = """qualify row_number() over (
    partition by image_key, variant
    order by generation desc nulls last, finished_at desc, attempt desc, run_id desc) > 1"""


def encode_part(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as one Parquet file of `SCHEMA`; a column that a row lacks is null.

    Raises ValueError for an unknown column, or a null in a column that must have a value.
    """
    for row in rows:
        unknown = row.keys() - set(SCHEMA.names)
        missing = [c.name for c in COLUMNS if not c.nullable and row.get(c.name) is None]
        if unknown or missing:
            raise ValueError(f"manifest row with unknown columns {sorted(unknown)} or without {missing}")
    return encode_rows(rows, SCHEMA)


def encode_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Rows as one Parquet file with checksums."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def commit_part(output: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a part under a new name; its appearance is the commit. Raises FileExistsError if the name is taken."""
    key = part(name)
    if not output.create(key, encode_part(rows)):
        raise FileExistsError(f"manifest part {output.uri(key)} exists already: another run has written it")


@dataclass(frozen=True)
class Parts:
    """The keys of a manifest's parts."""

    loose: tuple[str, ...]
    """As runs have committed them."""
    latest: tuple[str, ...] = ()
    """The latest row of each image and variant when the last compaction ran."""
    earlier: tuple[str, ...] = ()
    """The other rows of the last compaction."""
    replaced: tuple[str, ...] = ()
    """Parts whose rows the last compaction has copied; the next one deletes them."""
    abandoned: tuple[str, ...] = ()
    """Parts that no pointer names: of a compaction that was killed or overtaken, or is still at work."""
    generation: int = 0
    """The number of the last compaction."""
    damaged_pointers: tuple[str, ...] = ()
    """Pointers that cannot be read. The one before counts then: what it names has not been deleted yet."""
    approvals: tuple[str, ...] = ()
    """What people have chosen, in the order in which it was committed."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every part that counts."""
        return (*self.loose, *self.latest, *self.earlier)

    @property
    def digest(self) -> str:
        """Names the state that the view `results` shows."""
        return hashlib.sha256("\n".join((str(SCHEMA_VERSION), *self.all, *self.approvals)).encode()).hexdigest()

    def without(self, keys: Container[str]) -> "Parts":
        """The same parts without those of `keys`."""
        kinds = (self.loose, self.latest, self.earlier, self.approvals)
        loose, latest, earlier, approvals = (tuple(key for key in kind if key not in keys) for kind in kinds)
        return replace(self, loose=loose, latest=latest, earlier=earlier, approvals=approvals)


def list_parts(output: Store) -> Parts:
    """The parts of a manifest now.

    One listing shows a pointer, the parts that it names and those that it replaces, so no row is missed or
    counted twice.
    """
    keys = sorted(key for key, _ in output.walk(MANIFEST))
    generations = sorted((int(match.group(1)) for match in map(POINTER.fullmatch, keys) if match), reverse=True)
    named: dict[str, list[str]] = {}
    damaged_pointers = []
    for generation in generations:
        try:
            named = read_pointer(output, generation)
            break
        except ValueError:
            damaged_pointers.append(pointer(generation))
    latest, earlier, replaced = (tuple(named.get(kind, ())) for kind in ("latest", "earlier", "replaced"))
    taken_in, counted = set(replaced), {*latest, *earlier}
    return Parts(
        loose=tuple(key for key in keys if LOOSE_PART.fullmatch(key) and key not in taken_in),
        latest=latest,
        earlier=earlier,
        replaced=tuple(key for key in keys if key in taken_in),
        abandoned=tuple(key for key in keys if COMPACTED_PART.fullmatch(key) and key not in counted | taken_in),
        generation=max(generations, default=0),
        damaged_pointers=tuple(damaged_pointers),
        approvals=list_approvals(output),
    )


def list_approvals(output: Store) -> tuple[str, ...]:
    """The keys of what people have chosen, in the order in which it was committed."""
    return tuple(sorted(key for key, _ in output.walk(APPROVALS) if APPROVAL.fullmatch(key)))


def read_pointer(output: Store, generation: int) -> dict[str, list[str]]:
    """The parts that a pointer names; nothing before the first. Raises ValueError if it is damaged."""
    record = json.loads(output.read(pointer(generation))) if generation else {}
    if not isinstance(record, dict):
        raise ValueError(f"{pointer(generation)!r} is not a JSON object")
    return record


VIEWS = ("results", "attempts", "approvals")


def connect(
    output: Store, parts: Parts | None = None, *, views: Sequence[str] = VIEWS, spill: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with views over the output, as it is now.

    `attempts` has every row, `results` the latest of each image and variant with the last choice about its very
    bytes, `approvals` every choice. `latest` is `results` without choices, `outdated` has the other rows. views:
    those that are made, as DuckDB reads the footers of all their parts for each. spill: a folder for what does not
    fit into `MEMORY_LIMIT`; without one, memory is not limited. Raises NoManifestError if there is no part yet,
    ManifestError if one cannot be read.
    """
    parts = list_parts(output) if parts is None else parts
    if not parts.all:
        raise NoManifestError(f"no manifest in {output.url!r}: nothing has been committed there yet")
    connection = duckdb.connect()
    connection.execute("set enable_progress_bar = false")  # it would print among the answers
    if spill is not None:
        connection.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
        connection.execute("set temp_directory = ?", [spill])
    try:
        _create_views(connection, output, parts, views)
    except duckdb.Error as error:
        raise ManifestError(
            f"the manifest of {output.url!r} cannot be read: {str(error).partition(chr(10))[0]} "
            "(`diffcolor verify` names the damaged part, with --repair it is set aside)"
        ) from error
    return connection


def _create_views(connection: duckdb.DuckDBPyConnection, output: Store, parts: Parts, views: Sequence[str]) -> None:
    """Each view reads all its files in one scan, because DuckDB hangs when it streams a union of joins.

    That is duckdb/duckdb#22215: planning over a compacted manifest of a million rows stood still for ever.
    """
    connection.execute("set timezone = 'UTC'")
    if not output.is_local:
        connection.register_filesystem(output.fs)
    connection.register("_schema", SCHEMA.empty_table())
    connection.execute("create table no_rows as select *, 0::bigint as _file, 0::bigint as _row from _schema")
    num_loose, num_counting = len(parts.loose), len(parts.loose) + len(parts.latest)
    scans = {
        "every": (parts.all, 0),
        "counting": ((*parts.loose, *parts.latest), 0),
        "loose": (parts.loose, 0),
        "latest": (parts.latest, num_loose),
        "earlier": (parts.earlier, num_counting),
    }
    rows = {}
    for name, (keys, first) in scans.items():
        connection.execute(f"set variable {name} = ?", [[output.uri(key) for key in keys]])
        files = f"read_parquet(getvariable('{name}'), union_by_name = true)"
        place = f"(file_index + {first})::bigint as _file, file_row_number as _row"  # _file: number in `parts.all`
        there = f"union all by name select *, {place} from {files}" if keys else ""
        rows[name] = f"(from no_rows {there})"  # no_rows: columns that no part has
    compared = "select _file, _row, image_key, variant, generation, finished_at, attempt, run_id from"
    candidates = f"{compared} {rows['loose']}"
    if parts.latest:  # after a compaction only the images that came since must be compared
        candidates += f" union all {compared} {rows['latest']} semi join {rows['loose']} using (image_key, variant)"
    newly_outdated = f"(select _file, _row from ({candidates}) {_OUTDATED})"
    latest = f"""select * exclude (_file, _row)
        from {rows["counting"]} anti join {newly_outdated} using (_file, _row)"""
    approvals, last_choices = _choices(connection, output, parts.approvals)
    made = {
        "latest": latest,
        "results": f"from ({latest}) left join ({last_choices}) using ({', '.join(CHOSEN)})",
        "outdated": f"""select * exclude (_file, _row) from {rows["every"]} semi join
            (from {newly_outdated} union all select _file, _row from {rows["earlier"]}) using (_file, _row)""",
        "attempts": f"select * exclude (_file, _row) from {rows['every']}",
        "approvals": approvals,
    }
    for name in views:
        connection.execute(f"create view {name} as {made[name]}")
    connection.register("_columns", column_table())
    connection.execute("create table columns as from _columns")
    # From here on a query can read the manifest and the choices, no other file, and can change no setting.
    quoted = [output.uri(folder).replace("'", "''") for folder in (MANIFEST, APPROVALS)]
    readable = "', '".join(quoted)
    connection.execute(f"set allowed_directories = ['{readable}']")
    connection.execute("set enable_external_access = false")
    connection.execute("set python_enable_replacements = false")
    connection.execute("set lock_configuration = true")


def _choices(connection: duckdb.DuckDBPyConnection, output: Store, keys: Sequence[str]) -> tuple[str, str]:
    """SQL of all choices, and of the last about the same bytes: of several, the one saved last counts."""
    connection.register("_approvals_schema", APPROVALS_SCHEMA.empty_table())
    connection.execute(
        "create table no_approvals as select *, 0::bigint as _file, 0::bigint as _row from _approvals_schema"
    )
    connection.execute("set variable approvals = ?", [[output.uri(key) for key in keys]])
    place = "file_index::bigint as _file, file_row_number as _row"
    there = f"union all by name select *, {place} from read_parquet(getvariable('approvals'))" if keys else ""
    every = f"select * exclude (_file, _row) from (from no_approvals {there})"
    last = f"""{every} qualify row_number() over (
        partition by {", ".join(CHOSEN)} order by choice_at desc, _file desc, _row desc) = 1"""
    return every, last


_DESCRIBE = re.compile(r"\s*(?:describe|desc|show)\s+(results|attempts|approvals)\s*;?\s*", re.IGNORECASE)


def query(output: Store, sql: str) -> duckdb.DuckDBPyRelation:
    """The answer to one SELECT over the views `results`, `attempts` and `approvals`, or to `describe results`.

    The description has a row per column: its type, unit, meaning, and the schema version that it came with; it
    is also the table `columns`. Raises ManifestError for anything but a single query, and for one that DuckDB
    refuses.
    """
    # A query cannot read a view that it does not name. One that names none is wrong: all are made, for DuckDB's hint.
    connection = connect(output, views=[view for view in VIEWS if view in sql.lower()] or VIEWS)
    if described := _DESCRIBE.fullmatch(sql):
        sql = f"""select column_name as "column", column_type as type, unit, description, since
            from (describe {described.group(1)}) join columns using (column_name) order by position"""
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ManifestError("give one SELECT: the manifest is read-only")
        return connection.sql(sql).execute()
    except duckdb.Error as error:
        raise ManifestError(str(error)) from error


# ------------------------------------------------------------------ published results


def publish_results(output: Store) -> None:
    """Write the view `results` to `results.parquet`, unless that file has the rows of these very parts already.

    Sorted by image_key and variant, with the schema's field metadata, and of the file: schema version, number
    of rows, generation (of the last run whose rows it has), written_at (UTC), and `Parts.digest`.
    It appears by one PUT; rows are streamed, and what does not fit into `MEMORY_LIMIT` is sorted on disk.

    Runs, repairs, compactions and approvals call this after they have ended. Two at once may overtake each other, so
    each lists the parts again after its PUT. If there are new ones it writes again, unless a run is open: that run
    will call this at its own end.
    """
    while True:
        parts = list_parts(output)
        if not parts.all:
            output.delete(RESULTS)
            return
        if _published_digest(output) == parts.digest:
            return
        try:
            _write_results(output, parts, parts.digest)
        except (duckdb.Error, OSError):
            if list_parts(output).digest == parts.digest:
                raise
            continue  # two compactions have ended meanwhile, and the second has deleted what was being read
        if list_parts(output).digest == parts.digest or is_run_open(output):
            return


def _write_results(output: Store, parts: Parts, digest: str) -> None:
    with tempfile.TemporaryDirectory(prefix="diffcolor-results-") as spill, output.replacing(RESULTS) as file:
        connection = connect(output, parts, views=["results"], spill=spill)
        batches = connection.execute("from results order by image_key, variant").to_arrow_reader(ROWS_PER_GROUP)
        num_rows = generation = 0
        with pq.ParquetWriter(file, RESULTS_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for batch in batches:
                writer.write_table(typed(batch, RESULTS_SCHEMA))
                num_rows += batch.num_rows
                generation = max(generation, pc.max(batch["generation"]).as_py() or 0)
            facts = {"rows": num_rows, "generation": generation, "written_at": datetime.now(UTC).isoformat()}
            facts |= {"schema_version": SCHEMA_VERSION, "parts_sha256": digest}
            writer.add_key_value_metadata({f"diffcolor.{name}": str(value) for name, value in facts.items()})
        connection.close()


def typed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """DuckDB's rows as `schema` has them."""
    return pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def _published_digest(output: Store) -> str | None:
    """Which parts `results.parquet` was written from; None if it is not there, or cannot be read."""
    try:
        with output.open(RESULTS) as file:
            metadata = pq.read_metadata(file).metadata or {}
    except (FileNotFoundError, pa.lib.ArrowException):
        return None
    return metadata.get(b"diffcolor.parts_sha256", b"").decode() or None
