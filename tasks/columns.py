"""The columns of the manifest: what a row holds, in which types and units, and since which schema version."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 5


class _Column(NamedTuple):
    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    nullable: bool = True
    since: int = 1


_TIME = pa.timestamp("us", tz="UTC")
COLUMNS = (
    _Column("run_id", pa.string(), "The run that wrote the row.", nullable=False),
    _Column("image_key", pa.string(), "Path of the image below the archive.", nullable=False),
    _Column(
        "variant", pa.string(), "Name of the picture asked for: its kind and a hash of both prompts.", nullable=False
    ),
    _Column(
        "status", pa.string(), "ok, quarantined (the input is at fault) or failed (the machine is).", nullable=False
    ),
    _Column("error_class", pa.string(), "Class of the error; null if ok."),
    _Column("error_message", pa.string(), "The error in words; null if ok."),
    _Column("attempt", pa.int32(), "1 for the first try at this variant under this configuration.", nullable=False),
    _Column("input_uri", pa.string(), "Where the image was read."),
    _Column("input_version", pa.string(), "The store's token for the image's content: ETag, or size and time."),
    _Column("input_sha256", pa.string(), "Hash of the image file's bytes; null if it was not read."),
    _Column("width_px", pa.int32(), "Upright width.", "px"),
    _Column("height_px", pa.int32(), "Upright height.", "px"),
    _Column("bit_depth", pa.int32(), "Depth of the output, which equals the depth of the input: 8 or 16.", "bit"),
    _Column("input_mode", pa.string(), "Pixel layout as the decoder names it."),
    _Column("pages_left_out", pa.int32(), "Pages of the file that were not colorized: all after the first."),
    _Column("output_uri", pa.string(), "Where the colorized image is."),
    _Column("output_sha256", pa.string(), "Hash of the colorized image file's bytes."),
    _Column("access_uri", pa.string(), "Where the lossy access copy is; null if none was asked for."),
    _Column("primary_uri", pa.string(), "Where the primary (stage 1's result, aligned) is."),
    _Column("context_prompt", pa.string(), "c: what is in the picture."),
    _Column("rewritten_prompt", pa.string(), "c': the context prompt with an identifier per noun phrase."),
    _Column("target_prompt", pa.string(), "The colours asked for; null for the primary."),
    _Column("model_id", pa.string(), "Name of the checkpoint.", nullable=False),
    _Column("model_revision", pa.string(), "Its pinned commit, or the hash of a local folder.", nullable=False),
    _Column("config_sha256", pa.string(), "Hash of all that shapes the result besides the image.", nullable=False),
    _Column("seed", pa.int64(), "Seed of every random draw.", nullable=False),
    _Column("alpha", pa.float64(), "Interpolation weight of equation (7); null for the primary."),
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
        "Each noun's colour word: agreement of hue (-1 to 1), and whether sRGB has the colour at the scan's L*.",
    ),
    _Column(
        "noun_lightness",
        pa.list_(pa.float64()),
        "Median L* of each noun of `nouns`, in their order; null for a noun that was not found.",
        "L*",
        since=5,
    ),
    _Column("colorfulness", pa.float64(), "Hasler and Suesstrunk 2003, 0..255 scale."),
    _Column("clip_similarity", pa.float64(), "Cosine of the guidance CLIP between the image and the prompt asked for."),
    _Column("mean_abs_delta_l", pa.float64(), "Mean |L* output - L* input| of the saved pixels.", "L*"),
    _Column("p99_abs_delta_l", pa.float64(), "99th percentile of |L* output - L* input|.", "L*"),
    _Column(
        "stage1_seconds", pa.float64(), "Stage 1 of the fit, shared by the image's variants; its share of a batch.", "s"
    ),
    _Column(
        "stage2_seconds", pa.float64(), "Stage 2 of the fit, shared by the image's variants; its share of a batch.", "s"
    ),
    _Column("sampling_seconds", pa.float64(), "Sampling and alignment of this variant.", "s"),
    _Column("total_seconds", pa.float64(), "The fit and this variant, with assembly, metrics and writing.", "s"),
    _Column("device_name", pa.string(), "Name of the GPU, or the processor."),
    _Column(
        "peak_memory_bytes", pa.int64(), "Peak GPU memory; on a CPU, the actor's peak resident memory so far.", "B"
    ),
    _Column("node", pa.string(), "Host name of the machine."),
    _Column("started_at", _TIME, "When work on the image began.", nullable=False),
    _Column("finished_at", _TIME, "When the variant was done.", nullable=False),
    _Column("software_version", pa.string(), "Version of DiffColor Archive.", nullable=False),
    _Column("generation", pa.int64(), "Number of the run on this output; the latest run's row counts.", since=2),
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
    _Column(
        "catalog_columns",
        pa.string(),
        "The other columns of the image's catalog row (object id, rights, ...) as a JSON object; null if it has none.",
        since=4,
    ),
    _Column("context_is_generic", pa.bool_(), "Nobody said what is in the picture: c is the generic prompt.", since=5),
    _Column("dtype", pa.string(), "What the networks computed in: float32 or bfloat16.", since=5),
)

_CHOICE_COLUMNS = (
    _Column("choice", pa.string(), "What a person has decided: approved or rejected; null if nothing.", since=5),
    _Column("choice_note", pa.string(), "That person's note; may be empty.", since=5),
    _Column("choice_by", pa.string(), "Who that was, in their own words.", since=5),
    _Column("choice_at", _TIME, "When that person saved the choice.", since=5),
)
"""Columns that `results` and `approvals` have, and parts have not."""


def _schema(columns: Sequence[_Column]) -> pa.Schema:
    fields = [
        pa.field(
            c.name,
            c.type,
            c.nullable,
            {"description": c.description, "since": str(c.since)} | ({"unit": c.unit} if c.unit else {}),
        )
        for c in columns
    ]
    return pa.schema(fields, metadata={"diffcolor.schema_version": str(SCHEMA_VERSION)})


SCHEMA = _schema(COLUMNS)
"""Of the parts, and of the view `attempts`."""
RESULTS_SCHEMA = _schema((*COLUMNS, *_CHOICE_COLUMNS))
"""Of the view `results` and of `results.parquet`."""
CHOSEN = ("image_key", "variant", "output_sha256")
"""What a choice is about: a picture with these very bytes."""
APPROVALS_SCHEMA = _schema([*(c._replace(nullable=False) for c in COLUMNS if c.name in CHOSEN), *_CHOICE_COLUMNS])
"""Of the files in `approvals/`, and of the view `approvals`."""


def column_table() -> pa.Table:
    """The columns of the views: name, unit, description, and the schema version that each came with."""
    names = ("position", "column_name", "unit", "description", "since")
    rows = [
        (number, c.name, c.unit or None, c.description, c.since)
        for number, c in enumerate((*COLUMNS, *_CHOICE_COLUMNS), 1)
    ]
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
