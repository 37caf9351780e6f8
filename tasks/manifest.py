"""The manifest: typed rows in immutable Parquet parts, and the reader that knows which row counts."""

import io
import json
import re
import secrets
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.storage import Store

SCHEMA_VERSION = 4
PREFIX = "manifest"
MISSING_OUTPUT = "MissingOutputError"
"""Error class of the rows that `verify --repair` has queued again."""


class _Column(NamedTuple):
    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    nullable: bool = True
    since: int = 1


_TIME = pa.timestamp("us", tz="UTC")
_COLUMNS = (
    _Column("run_id", pa.string(), "The run that wrote the row.", nullable=False),
    _Column("image_key", pa.string(), "Path of the image below the archive.", nullable=False),
    _Column("variant", pa.string(), "What was asked: kind and hash of the two prompts.", nullable=False),
    _Column(
        "status", pa.string(), "ok, quarantined (the input is at fault) or failed (the machine is).", nullable=False
    ),
    _Column("error_class", pa.string(), "Kind of the error; null if ok."),
    _Column("error_message", pa.string(), "The error in words; null if ok."),
    _Column("attempt", pa.int32(), "1 for the first try at this variant under this configuration.", nullable=False),
    _Column("input_uri", pa.string(), "Where the image was read."),
    _Column("input_version", pa.string(), "The store's token for the image's content: ETag, or size and time."),
    _Column("input_sha256", pa.string(), "Hash of the image file's bytes; null if it was not read."),
    _Column("width_px", pa.int32(), "Upright width.", "px"),
    _Column("height_px", pa.int32(), "Upright height.", "px"),
    _Column("bit_depth", pa.int32(), "Of the output, which is that of the input: 8 or 16.", "bit"),
    _Column("input_mode", pa.string(), "Pixel layout as the decoder names it."),
    _Column("pages_left_out", pa.int32(), "Pages of the file after the first, which is the one colorized."),
    _Column("output_uri", pa.string(), "Where the colorized image is."),
    _Column("output_sha256", pa.string(), "Hash of the colorized image file's bytes."),
    _Column("access_uri", pa.string(), "Where the lossy access copy is; null if none was asked for."),
    _Column("primary_uri", pa.string(), "Where the primary (stage 1's result, aligned) is."),
    _Column("context_prompt", pa.string(), "c: what is in the picture."),
    _Column("rewritten_prompt", pa.string(), "c': the context prompt with an identifier per noun phrase."),
    _Column("target_prompt", pa.string(), "The colours asked for; null for the primary."),
    _Column("model_id", pa.string(), "Checkpoint.", nullable=False),
    _Column("model_revision", pa.string(), "Its pinned commit, or the hash of a local folder.", nullable=False),
    _Column("config_sha256", pa.string(), "Hash of all that shapes the result besides the image.", nullable=False),
    _Column("seed", pa.int64(), "Seed of every random draw.", nullable=False),
    _Column("alpha", pa.float64(), "Of equation (7); null for the primary."),
    _Column(
        "alpha_scores",
        pa.list_(pa.struct([("alpha", pa.float64()), ("score", pa.float64())])),
        "How well each alpha that was tried obeyed the prompt, at most 0.9; empty if there was no choice.",
    ),
    _Column(
        "nouns",
        pa.list_(
            pa.struct(
                [
                    ("noun", pa.string()),
                    ("color", pa.string()),
                    ("agreement", pa.float64()),
                    ("achievable_chroma", pa.float64()),
                    ("feasible", pa.bool_()),
                ]
            )
        ),
        "What became of each noun's colour word: agreement of hue (-1 to 1), and whether sRGB has it at that L*.",
    ),
    _Column("colorfulness", pa.float64(), "Hasler and Suesstrunk 2003, 0..255 scale."),
    _Column("clip_similarity", pa.float64(), "Cosine of the guidance CLIP between the image and the prompt asked for."),
    _Column("mean_abs_delta_l", pa.float64(), "Mean |L* output - L* input| of the saved pixels.", "L*"),
    _Column("p99_abs_delta_l", pa.float64(), "99th percentile of the same.", "L*"),
    _Column("stage1_seconds", pa.float64(), "Stage 1 of the fit, shared by the image's variants.", "s"),
    _Column("stage2_seconds", pa.float64(), "Stage 2 of the fit, shared by the image's variants.", "s"),
    _Column("sampling_seconds", pa.float64(), "Sampling, alignment and assembly of this variant.", "s"),
    _Column("total_seconds", pa.float64(), "Reading, this fit and this variant, writing.", "s"),
    _Column("device_name", pa.string(), "GPU or processor."),
    _Column(
        "peak_memory_bytes", pa.int64(), "Peak GPU memory; on a CPU, the actor's peak resident memory so far.", "B"
    ),
    _Column("node", pa.string(), "Host name."),
    _Column("started_at", _TIME, "When work on the image began.", nullable=False),
    _Column("finished_at", _TIME, "When the variant was done.", nullable=False),
    _Column("software_version", pa.string(), "Of DiffColor Archive.", nullable=False),
    _Column("generation", pa.int64(), "Number of the run on this output: later runs' rows count.", since=2),
    _Column("output_bytes", pa.int64(), "Size of the colorized image file.", "B", since=2),
    _Column("fit_uri", pa.string(), "Where the fit is kept; null if it is not.", since=2),
    _Column("fit_bytes", pa.int64(), "Size of the kept fit.", "B", since=2),
    _Column("fit_reused", pa.bool_(), "Whether the fit of an earlier run was used.", since=2),
    _Column("adopted_from", pa.string(), "image_key under which the same work had been done before.", since=2),
    _Column("fallback", pa.string(), "What was reduced because memory ran out; null if nothing.", since=2),
    _Column("access_sha256", pa.string(), "Hash of the access copy's bytes; null if there is none.", since=3),
    _Column(
        "primary_sha256", pa.string(), "Hash of the primary file's bytes; null if an earlier run wrote it.", since=3
    ),
    _Column("catalog_columns", pa.string(), "The other columns of its catalog row, as a JSON object.", since=4),
)

SCHEMA = pa.schema(
    [
        pa.field(
            c.name,
            c.type,
            c.nullable,
            {"description": c.description, "since": str(c.since)} | ({"unit": c.unit} if c.unit else {}),
        )
        for c in _COLUMNS
    ],
    metadata={"diffcolor.schema_version": str(SCHEMA_VERSION)},
)

POINTER = re.compile(rf"{PREFIX}/compacted-(\d{{6}})\.json")
_COMPACTED = re.compile(rf"{PREFIX}/compacted-(\d{{6}})-.*")
_ROW_NUMBER = """row_number() over (
    partition by image_key, variant
    order by generation desc nulls last, finished_at desc, attempt desc, run_id desc)"""
_LATEST = f"qualify {_ROW_NUMBER} = 1"
_EARLIER = f"qualify {_ROW_NUMBER} > 1"


class ManifestError(ValueError):
    """A manifest that cannot be read, or a query that it does not answer."""


class NoManifestError(ManifestError):
    """There is no manifest yet."""


def encode_part(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as one Parquet file of `SCHEMA`; a column that a row lacks is null.

    Raises ValueError for a column the schema lacks or a null where none may be.
    """
    for row in rows:
        unknown = row.keys() - set(SCHEMA.names)
        missing = [c.name for c in _COLUMNS if not c.nullable and row.get(c.name) is None]
        if unknown or missing:
            raise ValueError(f"manifest row with unknown columns {sorted(unknown)} or without {missing}")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def commit_part(output: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a part under a new name; its appearance is the commit. Raises FileExistsError if the name is taken."""
    key = f"{PREFIX}/{name}.parquet"
    if not output.create(key, encode_part(rows)):
        raise FileExistsError(f"manifest part {output.uri(key)} is there already: another run has written it")


@dataclass(frozen=True)
class Parts:
    """The keys of a manifest's parts.

    loose: as runs committed them. latest, earlier: of the last compaction, the latest row of each
    image and variant, and the others. replaced: parts that compaction has taken in, not deleted yet.
    abandoned: of compactions that were killed, or overtaken by another, or are at work now. generation:
    the number of the last compaction. damaged_pointers: files that should name a compaction's parts, and
    do not; what the one before names counts, and nothing is missing, as the replaced parts are kept so long.
    """

    loose: tuple[str, ...]
    latest: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    abandoned: tuple[str, ...] = ()
    generation: int = 0
    damaged_pointers: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every part that counts."""
        return (*self.loose, *self.latest, *self.earlier)

    def without(self, keys: Container[str]) -> "Parts":
        """These parts but for some."""
        loose, latest, earlier = (
            tuple(k for k in kind if k not in keys) for kind in (self.loose, self.latest, self.earlier)
        )
        return replace(self, loose=loose, latest=latest, earlier=earlier)


def list_parts(output: Store) -> Parts:
    """The parts of a manifest now.

    Parts that the pointer does not know yet, and those that it has just replaced, are in the same
    listing as it: nothing of one listing is missed or counted twice.
    """
    keys = sorted(key for key, _ in output.walk(PREFIX))
    generations = sorted((int(match.group(1)) for match in map(POINTER.fullmatch, keys) if match), reverse=True)
    pointer: dict[str, list[str]] = {}
    damaged_pointers = []
    for generation in generations:
        try:
            pointer = _read_pointer(output, generation)
            break
        except ValueError:
            damaged_pointers.append(_pointer(generation))
    latest, earlier, replaced = (tuple(pointer.get(kind, ())) for kind in ("latest", "earlier", "replaced"))
    found = [key for key in keys if key.endswith(".parquet")]
    taken_in = set(replaced)
    compacted = [key for key in found if _COMPACTED.fullmatch(key)]
    return Parts(
        loose=tuple(key for key in found if key.count("/") == 1 and key not in taken_in),
        latest=latest,
        earlier=earlier,
        replaced=tuple(key for key in found if key in taken_in),
        abandoned=tuple(key for key in compacted if key not in {*latest, *earlier, *taken_in}),
        generation=max(generations, default=0),
        damaged_pointers=tuple(damaged_pointers),
    )


def connect(output: Store, parts: Parts | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views `results` and `attempts` over the output's manifest, as it is now.

    `attempts` has every row; `results` the latest of each image and variant. Raises NoManifestError if
    there is no part yet, ManifestError if one cannot be read.
    """
    parts = list_parts(output) if parts is None else parts
    if not parts.all:
        raise NoManifestError(f"no manifest in {output.url!r}: nothing has been committed there yet")
    connection = duckdb.connect()
    try:
        _create_views(connection, output, parts)
    except duckdb.Error as error:
        raise ManifestError(
            f"the manifest of {output.url!r} cannot be read: {str(error).partition(chr(10))[0]} "
            "(`diffcolor verify` names the damaged part, with --repair it is set aside)"
        ) from error
    return connection


def _create_views(connection: duckdb.DuckDBPyConnection, output: Store, parts: Parts) -> None:
    connection.execute("set timezone = 'UTC'")
    if not output.is_local:
        connection.register_filesystem(output.fs)
    connection.register("_schema", SCHEMA.empty_table())
    connection.execute("create table no_rows as from _schema")  # columns that no part has yet
    for name in ("loose", "latest", "earlier"):
        keys = getattr(parts, name)
        connection.execute(f"set variable {name} = ?", [[output.uri(key) for key in keys]])
        files = f"union all by name from read_parquet(getvariable('{name}'), union_by_name = true)" if keys else ""
        connection.execute(f"create view {name}_rows as from no_rows {files}")
    connection.execute(
        """create view attempts as
        from loose_rows union all by name from latest_rows union all by name from earlier_rows"""
    )
    connection.execute(f"create view results as {_results_sql(parts)}")
    # A query reads the manifest and nothing else, of this machine neither.
    quoted = output.uri(PREFIX).replace("'", "''")
    connection.execute(f"set allowed_directories = ['{quoted}']")
    connection.execute("set enable_external_access = false")


def _results_sql(parts: Parts) -> str:
    """The latest rows. Of a compacted manifest only the keys that came since must be compared."""
    if not parts.latest:
        return f"select * from loose_rows {_LATEST}"
    if not parts.loose:
        return "select * from latest_rows"
    return f"""select * from latest_rows anti join loose_rows using (image_key, variant)
        union all by name select * from (
            from loose_rows union all by name select * from latest_rows semi join loose_rows using (image_key, variant)
        ) {_LATEST}"""


def query(output: Store, sql: str) -> duckdb.DuckDBPyRelation:
    """The answer to one SELECT over `results` and `attempts`.

    Raises ManifestError for anything but a single query, and for one that DuckDB refuses.
    """
    connection = connect(output)
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ManifestError("give one SELECT: the manifest is read-only")
        return connection.sql(sql).execute()
    except duckdb.Error as error:
        raise ManifestError(str(error)) from error


@dataclass(frozen=True)
class Compaction:
    """What `compact` did: parts before, parts after, rows, and how many replaced parts of earlier ones it deleted."""

    parts_before: int
    parts_after: int
    rows: int
    deleted: int


def compact(output: Store, rows_per_part: int = 250_000) -> Compaction:
    """Write all rows anew into few parts sorted by image, then move the pointer: the same rows before and after.

    The pointer moves by one conditional PUT of its next number: of several compactions at once one
    does it, and those before it are never changed. The parts that are now replaced stay for readers that
    still read them; the next compaction deletes them. Raises ManifestError if there is no manifest, or
    if another compaction was faster.
    """
    parts = list_parts(output)
    connection = connect(output, parts)
    generation = parts.generation + 1
    folder = f"{PREFIX}/compacted-{generation:06d}-{secrets.token_hex(4)}"
    written: dict[str, list[str]] = {"latest": [], "earlier": []}
    rows = 0
    try:
        for name, sql in (("latest", "from results"), ("earlier", f"select * from attempts {_EARLIER}")):
            reader = connection.execute(f"{sql} order by image_key, variant").to_arrow_reader(rows_per_part)
            for number, batch in enumerate(reader):
                sink = io.BytesIO()
                table = pa.Table.from_batches([batch]).select(SCHEMA.names).cast(SCHEMA)
                pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=25_000)
                written[name].append(f"{folder}/{name}-{number:05d}.parquet")
                output.write(written[name][-1], sink.getvalue())
                rows += batch.num_rows
    except (duckdb.Error, OSError):
        if list_parts(output).generation < generation:
            raise
        overtaken = True  # the parts that were read here are deleted by now
    else:
        # What this compaction has not read counts on: only the parts listed above are replaced.
        overtaken = not _move_pointer(output, generation, replaced=[*parts.all, *parts.replaced], **written)
    if overtaken:
        for key in (*written["latest"], *written["earlier"]):
            output.delete(key)
        raise ManifestError(f"another compaction of {output.url!r} was faster: this one has changed nothing")
    for key in (*parts.replaced, *(key for key in parts.abandoned if _generation_of(key) < generation)):
        output.delete(key)
    return Compaction(len(parts.all), sum(map(len, written.values())), rows, len(parts.replaced))


def forget_part(output: Store, key: str) -> None:
    """Move the pointer, if it names `key`: back to what its compaction has replaced, where all of that is still there.

    Else to the same parts but `key`.
    """
    parts = list_parts(output)
    if key not in (*parts.latest, *parts.earlier):
        return
    left = _before_compaction(output, parts) or parts.without({key})
    if not _move_pointer(output, parts.generation + 1, left.latest, left.earlier, left.replaced):
        raise ManifestError(f"a compaction of {output.url!r} has ended while {key!r} was set aside: verify it again")


def _before_compaction(output: Store, parts: Parts) -> Parts | None:
    """The compacted parts as they were before the last compaction, if all that it has replaced is still there."""
    try:
        before, record = (_read_pointer(output, parts.generation - back) for back in (1, 0))
    except (ValueError, FileNotFoundError):  # a pointer that cannot be read
        return None
    latest, earlier = (tuple(before.get(kind, ())) for kind in ("latest", "earlier"))
    taken_in = set(record["replaced"]) - set(before.get("replaced", ()))
    if not {*latest, *earlier} <= taken_in <= set(parts.replaced):
        return None
    return Parts((), latest, earlier, replaced=(*parts.latest, *parts.earlier))


def _move_pointer(
    output: Store, generation: int, latest: Sequence[str], earlier: Sequence[str], replaced: Sequence[str]
) -> bool:
    """Whether it was this call that has made the pointer of this number."""
    record = {"latest": latest, "earlier": earlier, "replaced": replaced}
    return output.create(_pointer(generation), json.dumps(record).encode())


def _read_pointer(output: Store, generation: int) -> dict[str, list[str]]:
    """What it names; nothing before the first. Raises ValueError if it is damaged."""
    record = json.loads(output.read(_pointer(generation))) if generation else {}
    if not isinstance(record, dict):
        raise ValueError(f"{_pointer(generation)!r} is no record")
    return record


def _pointer(generation: int) -> str:
    return f"{PREFIX}/compacted-{generation:06d}.json"


def _generation_of(key: str) -> int:
    match = _COMPACTED.fullmatch(key)
    assert match is not None, key
    return int(match.group(1))
