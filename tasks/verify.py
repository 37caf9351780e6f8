"""Does an output hold what its manifest says? And the repair: what is missing is queued again."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.lib
import pyarrow.parquet as pq

from tasks.lease import hold_output
from tasks.manifest import SCHEMA, ManifestError, commit_part, connect, list_parts, set_aside
from tasks.storage import Store

DAMAGED = "damaged"
"""Folder for manifest parts that cannot be read any more."""
_LEFT_ALONE = ("runs/", "manifest/", f"{DAMAGED}/")


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says. kind: damaged part, missing, changed, extra or double row."""

    kind: str
    key: str
    detail: str
    row: Mapping[str, Any] | None = None


def verify(output: Store, *, read_files: bool = True) -> Iterator[Finding]:
    """Everything that is wrong with an output, part by part, row by row, file by file.

    read_files: compare the hash of every colorized image, else its existence alone. Raises
    ManifestError if there is no manifest at all.
    """
    parts = list_parts(output)
    damaged = {key: reason for key in parts.all if (reason := _damage(output, key)) is not None}
    for key, reason in damaged.items():
        yield Finding("damaged part", key, reason)
    parts = parts.without(damaged)
    connection = connect(output, parts) if parts.all else None
    there = {key for key, _ in output.walk() if not key.startswith(_LEFT_ALONE)}
    known: set[str] = set()
    if connection is None:
        if not damaged:
            raise ManifestError(f"no manifest in {output.url!r}: nothing has been committed there yet")
    else:
        yield from _double_rows(connection)
        known = _known_files(connection)
        yield from _wrong_files(output, connection, there, read_files)
    for key in sorted(there - known):
        if key.startswith("fits/") and key.rpartition("/")[0] in known:
            continue
        yield Finding("extra", key, "no row of the manifest names it: left by a run that was killed, or put there")


def _damage(output: Store, key: str) -> str | None:
    try:
        with output.open(key) as file:
            part = pq.ParquetFile(file, page_checksum_verification=True)
            for number in range(part.num_row_groups):
                part.read_row_group(number)
    except (pyarrow.lib.ArrowException, OSError) as error:
        return str(error).partition("\n")[0]
    return None


def _double_rows(connection: Any) -> Iterator[Finding]:
    for image, variant, generation, number in connection.execute(
        """select image_key, variant, generation, count(*) from attempts where generation is not null
        group by image_key, variant, generation having count(*) > 1"""
    ).fetchall():
        yield Finding("double row", image, f"{number} rows of run number {generation} for {variant}")


def _known_files(connection: Any) -> set[str]:
    uris = connection.execute(
        """select distinct unnest([output_uri, access_uri, primary_uri, fit_uri]) as uri from attempts
        where status = 'ok'"""
    )
    return {key_of(uri) for (uri,) in iter(uris.fetchone, None) if uri is not None}


def _wrong_files(output: Store, connection: Any, there: set[str], read_files: bool) -> Iterator[Finding]:
    cursor = connection.execute(
        "select * from results where status = 'ok' and output_uri is not null order by image_key, variant"
    )
    names = [column[0] for column in cursor.description]
    for values in iter(cursor.fetchone, None):
        row = dict(zip(names, values, strict=True))
        for column in ("output_uri", "access_uri", "primary_uri"):
            if row[column] is not None and key_of(row[column]) not in there:
                yield Finding("missing", key_of(row[column]), f"{column} of {row['image_key']!r}", row)
                break
        else:
            key = key_of(row["output_uri"])
            if read_files and hashlib.sha256(output.read(key)).hexdigest() != row["output_sha256"]:
                yield Finding("changed", key, f"its bytes are not those made of {row['image_key']!r}", row)


def key_of(uri: str) -> str:
    """The key of a file that a row names, wherever the output lay when the row was written."""
    for folder in ("images", "fits"):
        head, found, tail = uri.rpartition(f"/{folder}/")
        if found and head:
            return f"{folder}/{tail}"
    return uri


def repair(output: Store, findings: list[Finding]) -> int:
    """Queue again what is missing or changed, set unreadable parts aside; the number of variants to do again.

    The next run does them, and those whose rows were in the damaged parts. Extra files are left.
    Raises OutputBusyError while a run is at work.
    """
    with hold_output(output, {"run_id": "repair"}) as lease:
        for finding in findings:
            if finding.kind == "damaged part":
                set_aside(output, finding.key, DAMAGED)
        rows = [
            {name: finding.row[name] for name in SCHEMA.names}
            | {
                "status": "failed",
                "error_class": "MissingOutputError",
                "error_message": f"verify found {finding.key} {finding.kind}",
                "generation": lease.generation,
                "finished_at": datetime.now(UTC),
            }
            for finding in findings
            if finding.row is not None
        ]
        if rows:
            commit_part(output, f"{lease.generation:06d}-repair", rows)
        lease.end({"status": "finished", "queued": len(rows)})
    return len(rows)


@dataclass(frozen=True)
class Expiry:
    """Fits that were deleted, and their bytes."""

    num_fits: int
    num_bytes: int


def expire_fits(output: Store, older_than_days: float) -> Expiry:
    """Delete the kept fits that no variant has been made from for so long. New prompts for their images fit again."""
    stale = (
        connect(output)
        .execute(
            """select fit_uri, max(fit_bytes) from attempts where fit_uri is not null group by fit_uri
            having max(finished_at) < now() - to_days(1) * ?""",
            [older_than_days],
        )
        .fetchall()
    )
    deleted = [(uri, size) for uri, size in stale if any(_delete_all(output, key_of(uri)))]
    return Expiry(len(deleted), sum(size or 0 for _, size in deleted))


def _delete_all(output: Store, folder: str) -> list[str]:
    keys = [key for key, _ in output.list(folder)]
    for key in keys:
        output.delete(key)
    return keys
