"""The manifest: typed rows in immutable Parquet parts, and the reader that knows which row counts."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.storage import Store

SCHEMA_VERSION = 1
PREFIX = "manifest"


class _Column(NamedTuple):
    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    nullable: bool = True


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
)

SCHEMA = pa.schema(
    [
        pa.field(
            c.name,
            c.type,
            c.nullable,
            {"description": c.description, "since": "1"} | ({"unit": c.unit} if c.unit else {}),
        )
        for c in _COLUMNS
    ],
    metadata={"diffcolor.schema_version": str(SCHEMA_VERSION)},
)

_VIEWS = """
create view attempts as
    select * from read_parquet(getvariable('parts'), union_by_name = true);
create view results as
    select * from attempts
    qualify row_number() over (
        partition by image_key, variant order by finished_at desc, attempt desc, run_id desc
    ) = 1;
"""


class ManifestError(ValueError):
    """A manifest that is not there, or a query that it does not answer."""


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
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def commit_part(output: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a part under a new name; its appearance is the commit. Raises FileExistsError if the name is taken."""
    key = f"{PREFIX}/{name}.parquet"
    if not output.create(key, encode_part(rows)):
        raise FileExistsError(f"manifest part {output.uri(key)} is there already: another run has written it")


def connect(output: Store) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views `results` and `attempts` over the output's manifest.

    `attempts` has every row; `results` the latest of each image and variant. Raises ManifestError if
    there is no part yet.
    """
    keys = [key for key, _ in output.list(PREFIX) if key.endswith(".parquet")]
    if not keys:
        raise ManifestError(f"no manifest in {output.url!r}: nothing has been committed there yet")
    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    if not output.is_local:
        connection.register_filesystem(output.fs)
    connection.execute("set variable parts = ?", [[output.uri(key) for key in keys]])
    connection.execute(_VIEWS)
    if output.is_local:  # a query reads the manifest and nothing else
        quoted = output.root.replace("'", "''")
        connection.execute(f"set allowed_directories = ['{quoted}']")
        connection.execute("set enable_external_access = false")
    return connection


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


def latest_rows(output: Store) -> list[dict[str, Any]]:
    """What planning needs of the `results`: one dict per image and variant; empty where nothing is committed."""
    try:
        connection = connect(output)
    except ManifestError:
        return []
    columns = ("image_key", "variant", "status", "attempt", "config_sha256", "input_version")
    rows = connection.sql(f"select {', '.join(columns)} from results").fetchall()
    return [dict(zip(columns, row, strict=True)) for row in rows]
