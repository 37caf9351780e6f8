"""Does an output hold what its manifest says? And the repair: what is missing is queued again."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.lib
import pyarrow.parquet as pq

from tasks.lease import hold_output
from tasks.manifest import (
    MISSING_OUTPUT,
    POINTER,
    SCHEMA,
    Parts,
    commit_part,
    connect,
    forget_part,
    list_parts,
)
from tasks.storage import Store, UnsafeFileError

DAMAGED = "damaged"
"""Folder for what is not what it must be any more: manifest parts and pictures."""
FIT_FILES = ("fit.safetensors", "fit.json")
"""Of a kept fit, in the order in which they are written."""
EXPIRED = "expired"
"""File that says that a fit was deleted on purpose."""
FILES = ("output", "access", "primary")
"""What a row names as <file>_uri, with its hash as <file>_sha256."""
_RECORDS = re.compile(r"runs/\d{6}\.(json|beat|end)|manifest/[^/]+\.parquet|damaged/.*")


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says.

    kind: damaged part, missing, changed, missing fit, damaged fit, extra or double row. row: what is
    done again to mend it.
    """

    kind: str
    key: str
    detail: str
    row: Mapping[str, Any] | None = None


def verify(output: Store, *, read_files: bool = True) -> Iterator[Finding]:
    """Everything that is wrong with an output, part by part, row by row, file by file.

    read_files: compare the hash of every file that a row names, else its existence alone. Raises
    NoManifestError if there is no manifest at all.
    """
    parts, damaged = _check_parts(output)
    for key, reason in damaged.items():
        yield Finding("damaged part", key, reason)
    parts = parts.without(damaged)
    connection = None if damaged and not parts.all else connect(output, parts)
    there = {key for key, _ in output.walk()}
    known: set[str] = {*parts.all, *parts.replaced, *damaged}
    if connection is not None:
        yield from _double_rows(connection)
        hashes = _known_files(connection)
        yield from _wrong_files(output, connection, there, hashes if read_files else {})
        yield from _wrong_fits(output, connection, there, read_files)
        known |= hashes.keys() | _known_fit_files(connection)
    for key in sorted(there - known):
        if not _RECORDS.fullmatch(key) and not POINTER.fullmatch(key):
            yield Finding(
                "extra", key, "nothing in the manifest names it: left by a process that was killed, or put there"
            )


def _check_parts(output: Store) -> tuple[Parts, dict[str, str]]:
    """The parts as they are now, and what is wrong with those that cannot be read. A store in trouble raises."""
    parts = list_parts(output)
    damaged = dict.fromkeys(parts.damaged_pointers, "it does not name the parts of its compaction")
    for key in parts.all:
        try:
            reason = _damage(output.read(key))
        except FileNotFoundError:
            if key not in list_parts(output).all:  # a compaction has replaced it meanwhile
                return _check_parts(output)
            reason = "it is gone, but the manifest's pointer names it"
        if reason is not None:
            damaged[key] = reason
    return parts, damaged


def _damage(data: bytes) -> str | None:
    try:
        part = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        for field in SCHEMA:
            index = part.schema_arrow.get_field_index(field.name)
            if not field.nullable if index < 0 else part.schema_arrow.field(index).type != field.type:
                return f"it is no part of a manifest: its column {field.name!r} is not there, or of another type"
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


def _known_files(connection: Any) -> dict[str, str | None]:
    """Every file that a row names, with its hash by the latest row that has one."""
    named = connection.execute(
        f"""select unnest([{", ".join(f"{file}_uri" for file in FILES)}]) as uri,
            unnest([{", ".join(f"{file}_sha256" for file in FILES)}]) as sha256
        from attempts where status = 'ok' order by generation nulls first, finished_at"""
    )
    hashes: dict[str, str | None] = {}
    for uri, sha256 in iter(named.fetchone, None):
        if uri is not None:
            key = key_of(uri)
            hashes[key] = sha256 or hashes.get(key)
    return hashes


def _wrong_files(
    output: Store, connection: Any, there: set[str], hashes: Mapping[str, str | None]
) -> Iterator[Finding]:
    """The first file of each row that is missing or, if its hash is given, changed."""
    cursor = connection.execute(
        "select * from results where status = 'ok' and output_uri is not null order by image_key, variant"
    )
    names = [column[0] for column in cursor.description]
    whole: dict[str, bool] = {}
    for values in iter(cursor.fetchone, None):
        row = dict(zip(names, values, strict=True))
        for file in FILES:
            if row[f"{file}_uri"] is None:
                continue
            key = key_of(row[f"{file}_uri"])
            if key not in there:
                yield Finding("missing", key, f"{file}_uri of {row['image_key']!r}", row)
                break
            if key not in whole:
                expected = hashes.get(key)
                whole[key] = expected is None or expected == sha256_of(output, key)
            if not whole[key]:
                yield Finding("changed", key, f"its bytes are not those made of {row['image_key']!r}", row)
                break


def sha256_of(output: Store, key: str) -> str | None:
    """Hash of the file at `key`; None if there is none that can be read."""
    try:
        return hashlib.sha256(output.read(key)).hexdigest()
    except (FileNotFoundError, UnsafeFileError):
        return None


def _known_fit_files(connection: Any) -> set[str]:
    uris = connection.execute("select distinct fit_uri from attempts where fit_uri is not null")
    return {f"{key_of(uri)}/{name}" for (uri,) in iter(uris.fetchone, None) for name in (*FIT_FILES, EXPIRED)}


def _wrong_fits(output: Store, connection: Any, there: set[str], read_files: bool) -> Iterator[Finding]:
    """Kept fits that are not there, or not whole, and that nobody has let expire."""
    cursor = connection.execute(
        """select fit_uri, min(image_key) from results where status = 'ok' and fit_uri is not null
        group by fit_uri order by fit_uri"""
    )
    for uri, image in iter(cursor.fetchone, None):
        folder = key_of(uri)
        keys = [f"{folder}/{name}" for name in FIT_FILES]
        missing = [key for key in keys if key not in there]
        if len(missing) == len(keys) and f"{folder}/{EXPIRED}" in there:
            continue
        if missing:
            yield Finding("missing fit", missing[0], f"of {image!r}: its next new prompt is fitted again")
        elif read_files and not _is_whole_fit(output, *keys):
            yield Finding("damaged fit", keys[0], f"of {image!r}: its next new prompt is fitted again")


def _is_whole_fit(output: Store, tensors_key: str, record_key: str) -> bool:
    try:
        return bool(json.loads(output.read(record_key))["tensors_sha256"] == sha256_of(output, tensors_key))
    except (FileNotFoundError, UnsafeFileError, ValueError, KeyError, TypeError):
        return False


def key_of(uri: str) -> str:
    """The key of a file that a row names, wherever the output lay when the row was written."""
    for folder in ("images", "fits"):
        head, found, tail = uri.rpartition(f"/{folder}/")
        if found and head:
            return f"{folder}/{tail}"
    return uri


def repair(output: Store, findings: list[Finding]) -> int:
    """Queue again what is missing or changed; the number of variants to do again.

    The next run does them, and those whose rows were in the damaged parts. Damaged parts and changed
    files are set aside, fits that are not whole are given up. Extra files are left. Raises
    OutputBusyError while a run is at work.
    """
    with hold_output(output, {"run_id": "repair"}) as lease:
        for finding in findings:
            if finding.kind == "damaged part":
                forget_part(output, finding.key)
            if finding.kind in ("damaged part", "changed"):
                _set_aside(output, finding.key)
            elif finding.kind in ("missing fit", "damaged fit"):
                _expire(output, finding.key.rpartition("/")[0])
        rows = [
            {name: finding.row[name] for name in SCHEMA.names}
            | {
                "status": "failed",
                "error_class": MISSING_OUTPUT,
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


def _set_aside(output: Store, key: str) -> None:
    """Move a file to `DAMAGED`. A symbolic link out of the output stays: the next write names it."""
    with suppress(FileNotFoundError, UnsafeFileError):
        output.write(f"{DAMAGED}/{key}", output.read(key))
        output.delete(key)


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
    deleted = [(uri, size) for uri, size in stale if _expire(output, key_of(uri))]
    return Expiry(len(deleted), sum(size or 0 for _, size in deleted))


def _expire(output: Store, folder: str) -> bool:
    """Delete a fit and leave word of it; whether there was anything."""
    there = {key for key, _ in output.walk(folder)}
    marker = f"{folder}/{EXPIRED}"
    if marker not in there:
        output.write(marker, b"")
    for key in sorted(there - {marker}):  # fit.json first: without it there is no fit
        output.delete(key)
    return bool(there - {marker})
