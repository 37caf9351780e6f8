"""Compares an output's files with its manifest, and queues again what is missing or changed."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.lib
import pyarrow.parquet as pq

from tasks.columns import APPROVALS_SCHEMA, SCHEMA
from tasks.compaction import forget_part
from tasks.errors import UnsafeFileError
from tasks.layout import APPROVAL, EXPIRED, FILES, FIT_FILES, RESULTS, damaged, is_record, key_of, repair_name
from tasks.lease import hold_output
from tasks.manifest import MISSING_OUTPUT, Parts, commit_part, connect, list_parts, publish_results
from tasks.storage import Store


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says.

    kind: damaged part, damaged choices, damaged results, missing, changed, missing fit, damaged fit, extra or double
    row. row: the manifest row whose work is done again to mend it.
    """

    kind: str
    key: str
    detail: str
    row: Mapping[str, Any] | None = None


def verify(output: Store, *, read_files: bool = True) -> Iterator[Finding]:
    """Everything that is wrong with an output: its parts, then its rows and their files, then its other files.

    read_files: compare the hash of every file that a row names, not only its existence. Raises NoManifestError
    if there is no manifest at all.
    """
    parts, damage = _check_parts(output)
    for key, reason in damage.items():
        yield Finding("damaged choices" if APPROVAL.fullmatch(key) else "damaged part", key, reason)
    parts = parts.without(damage)
    connection = None if damage and not parts.all else connect(output, parts, views=["latest", "attempts"])
    there = {key for key, _ in output.walk()}
    if RESULTS in there and (broken := _damage(output.read(RESULTS))):
        yield Finding("damaged results", RESULTS, broken)
    known: set[str] = {*parts.all, *parts.replaced, *damage}
    if connection is not None:
        yield from _double_rows(connection)
        hashes = _known_files(connection)
        yield from _wrong_files(output, connection, there, hashes if read_files else {})
        yield from _wrong_fits(output, connection, there, read_files)
        known |= hashes.keys() | _known_fit_files(connection)
    for key in sorted(there - known):
        if not is_record(key):
            yield Finding("extra", key, "no row names it: a killed process left it, or somebody put it there")


def _check_parts(output: Store) -> tuple[Parts, dict[str, str]]:
    """The parts as they are now, and what is wrong with each that cannot be read. A store in trouble raises."""
    parts = list_parts(output)
    damage = dict.fromkeys(parts.damaged_pointers, "it does not name the parts of its compaction")
    for key in (*parts.all, *parts.approvals):
        try:
            reason = _damage(output.read(key), APPROVALS_SCHEMA if key in parts.approvals else SCHEMA)
        except FileNotFoundError:
            if key not in list_parts(output).all:  # a compaction has replaced it meanwhile
                return _check_parts(output)
            reason = "it is gone, but the manifest's pointer names it"
        if reason is not None:
            damage[key] = reason
    return parts, damage


def _damage(data: bytes, schema: pa.Schema = SCHEMA) -> str | None:
    """Why these bytes are not a table of manifest rows, or of another schema's; None if they are one."""
    try:
        part = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        for field in schema:
            index = part.schema_arrow.get_field_index(field.name)
            if not field.nullable if index < 0 else part.schema_arrow.field(index).type != field.type:
                return f"it is not part of a manifest: column {field.name!r} is missing or has another type"
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
    """Every file that a row names, with its hash according to the latest row that has one."""
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
        "select * from latest where status = 'ok' and output_uri is not null order by image_key, variant"
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
                whole[key] = expected is None or expected == output.sha256(key)
            if not whole[key]:
                yield Finding("changed", key, f"its bytes are not those made of {row['image_key']!r}", row)
                break


def _known_fit_files(connection: Any) -> set[str]:
    uris = connection.execute("select distinct fit_uri from attempts where fit_uri is not null")
    return {f"{key_of(uri)}/{name}" for (uri,) in iter(uris.fetchone, None) for name in (*FIT_FILES, EXPIRED)}


def _wrong_fits(output: Store, connection: Any, there: set[str], read_files: bool) -> Iterator[Finding]:
    """Kept fits that are missing or damaged, except those that were deleted on purpose."""
    cursor = connection.execute(
        """select fit_uri, min(image_key) from latest where status = 'ok' and fit_uri is not null
        group by fit_uri order by fit_uri"""
    )
    for uri, image in iter(cursor.fetchone, None):
        folder = key_of(uri)
        keys = [f"{folder}/{name}" for name in FIT_FILES]
        missing = [key for key in keys if key not in there]
        if len(missing) == len(keys) and f"{folder}/{EXPIRED}" in there:
            continue
        if missing:
            yield Finding("missing fit", missing[0], f"fit of {image!r}: its next new prompt needs a new fit")
        elif read_files and not _is_whole_fit(output, *keys):
            yield Finding("damaged fit", keys[0], f"fit of {image!r}: its next new prompt needs a new fit")


def _is_whole_fit(output: Store, tensors_key: str, record_key: str) -> bool:
    try:
        return bool(json.loads(output.read(record_key))["tensors_sha256"] == output.sha256(tensors_key))
    except (FileNotFoundError, UnsafeFileError, ValueError, KeyError, TypeError):
        return False


def repair(output: Store, findings: list[Finding]) -> int:
    """Queue the work again whose files are missing or changed; the number of variants to do again.

    The next run does them, and those whose rows were in damaged parts. Damaged parts and changed files are set
    aside, damaged fits are deleted, and the results are published anew. Extra files are left alone. Raises
    OutputBusyError while a run is at work.
    """
    with hold_output(output, {"run_id": "repair"}, after=publish_results) as lease:
        for finding in findings:
            if finding.kind == "damaged part":
                forget_part(output, finding.key)
            if finding.kind in ("damaged part", "damaged choices", "damaged results", "changed"):
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
            commit_part(output, repair_name(lease.generation), rows)
        lease.end({"status": "finished", "queued": len(rows)})
    return len(rows)


def _set_aside(output: Store, key: str) -> None:
    """Move a file to `damaged/`. A symbolic link out of the output stays: the next write names it."""
    with suppress(FileNotFoundError, UnsafeFileError):
        output.write(damaged(key), output.read(key))
        output.delete(key)


@dataclass(frozen=True)
class Expiry:
    """How many fits were deleted, and their bytes."""

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
    """Delete a fit and leave `expired` in its place; whether there was a fit."""
    there = {key for key, _ in output.walk(folder)}
    marker = f"{folder}/{EXPIRED}"
    if marker not in there:
        output.write(marker, b"")
    for key in sorted(there - {marker}):  # fit.json first: without it there is no fit
        output.delete(key)
    return bool(there - {marker})
