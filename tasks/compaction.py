"""Compaction: all rows of a manifest in few parts, and the pointer that says which parts count."""

import io
import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow.parquet as pq

from tasks.columns import SCHEMA
from tasks.errors import ManifestError
from tasks.layout import COMPACTED_PART, compaction, pointer
from tasks.manifest import ROWS_PER_GROUP, Parts, connect, list_parts, publish_results, read_pointer, typed
from tasks.storage import Store


@dataclass(frozen=True)
class Compaction:
    """What `compact` did: parts before, parts after, rows, and how many replaced parts of earlier ones it deleted."""

    parts_before: int
    parts_after: int
    rows: int
    deleted: int


def compact(output: Store, rows_per_part: int = 250_000) -> Compaction:
    """Copy all rows into few parts sorted by image, move the pointer to them, and publish the results.

    The rows are the same before and after. The pointer moves by one conditional PUT of its next number, so one
    of several compactions at once succeeds. Replaced parts stay for readers that have opened them; the next
    compaction deletes them. Raises ManifestError if there is no manifest, or if another compaction was faster.
    """
    parts = list_parts(output)
    generation = parts.generation + 1
    folder = compaction(generation, secrets.token_hex(4))
    written: dict[str, list[str]] = {"latest": [], "earlier": []}
    rows = 0
    with tempfile.TemporaryDirectory(prefix="diffcolor-compact-") as spill:
        connection = connect(output, parts, views=["latest", "outdated"], spill=spill)
        try:
            for name, sql in (("latest", "from latest"), ("earlier", "from outdated")):
                reader = connection.execute(f"{sql} order by image_key, variant").to_arrow_reader(rows_per_part)
                for number, batch in enumerate(reader):
                    sink = io.BytesIO()
                    options = {"compression": "zstd", "write_page_checksum": True, "row_group_size": ROWS_PER_GROUP}
                    pq.write_table(typed(batch, SCHEMA), sink, **options)
                    written[name].append(f"{folder}/{name}-{number:05d}.parquet")
                    output.write(written[name][-1], sink.getvalue())
                    rows += batch.num_rows
        except (duckdb.Error, OSError):
            if list_parts(output).generation < generation:
                raise
            overtaken = True  # the parts that were being read have been deleted
        else:
            # Only the parts listed above are replaced: parts committed since keep counting.
            overtaken = not _move_pointer(output, generation, replaced=[*parts.all, *parts.replaced], **written)
        connection.close()
    if overtaken:
        for key in (*written["latest"], *written["earlier"]):
            output.delete(key)
        raise ManifestError(f"another compaction of {output.url!r} was faster: this one has changed nothing")
    for key in (*parts.replaced, *(key for key in parts.abandoned if _generation_of(key) < generation)):
        output.delete(key)
    publish_results(output)
    return Compaction(len(parts.all), sum(map(len, written.values())), rows, len(parts.replaced))


def forget_part(output: Store, key: str) -> None:
    """Make the manifest readable without the compacted part `key`.

    If everything that its compaction replaced is still there, that counts again and no row is lost. Otherwise
    the pointer moves on to the same parts without `key`. A loose part is left alone.
    """
    parts = list_parts(output)
    if key not in (*parts.latest, *parts.earlier):
        return
    left = _before_compaction(output, parts) or parts.without({key})
    if not _move_pointer(output, parts.generation + 1, left.latest, left.earlier, left.replaced):
        raise ManifestError(f"a compaction of {output.url!r} has ended while {key!r} was set aside: verify it again")


def _before_compaction(output: Store, parts: Parts) -> Parts | None:
    """The compacted parts before the last compaction; None unless all that it replaced is still there."""
    try:
        before, record = (read_pointer(output, parts.generation - back) for back in (1, 0))
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
    """Create the pointer of this number; False if another compaction has created it first."""
    record = {"latest": latest, "earlier": earlier, "replaced": replaced}
    return output.create(pointer(generation), json.dumps(record).encode())


def _generation_of(key: str) -> int:
    match = COMPACTED_PART.fullmatch(key)
    assert match is not None, key
    return int(match.group(1))
