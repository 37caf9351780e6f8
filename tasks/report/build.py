"""Writes the report: rows from the manifest and pictures of their files, as a static folder without a server.

    index.html            the page: the overview in HTML, and the names of the files with its rows
    report.css, *.js      how it looks and works
    data/<digest>.js      the rows of a few hundred images: for the gallery, and in full for the page of one image
    thumbs/, views/       pictures, see `tasks.report.pictures`
    report.json           which data files the page names, for the next report and for programs

The page is opened from a disk too, where a browser reads no file but by a tag: so the rows are scripts that hand
over JSON. Their names are hashes of their text, and where one ends and the next begins depends on the names of the
images alone. So new images change the files of their neighbours only, and a report after 100 new images makes the
pictures of those and writes a few data files. index.html is written last; until then the former page is whole.
Thumbnails of files that have been replaced stay.

Browser and `diffcolor approve` name a result by what the manifest names it: `image_key`, `variant`, `output_sha256`.
"""

import hashlib
import json
import math
import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from operator import itemgetter
from typing import Any
from urllib.parse import quote

import duckdb
import jinja2
import pyarrow as pa

from diffcolor_core import __version__
from diffcolor_core.progress import Progress, silent
from tasks.archive import as_text
from tasks.layout import REPORT, key_of, report_data, report_thumbnail, report_view
from tasks.manifest import connect
from tasks.report.colors import showable_colors
from tasks.report.overview import is_obeyed, overview
from tasks.report.pictures import Made, Source, make_pictures, shown_key, sources_of
from tasks.storage import Store

IMAGES_PER_FILE = 250
"""Images of a data file, on average. The largest has four times as many."""
PAGE, RECORD = "index.html", "report.json"
STATIC = ("report.css", "rows.js", "choices.js", "gallery.js", "picture.js", "page.js")
Row = dict[str, Any]

INDEX_COLUMNS = (
    *("variant", "status", "run_id", "target_prompt", "context_prompt", "output_sha256", "error_class"),
    *("colorfulness", "clip_similarity", "mean_abs_delta_l", "p99_abs_delta_l", "total_seconds", "finished_at"),
    *("choice", "choice_note"),
)
"""What the gallery knows of a result. Besides: whether its words are obeyed, and which thumbnails there are."""
DETAIL_COLUMNS = (
    *("input_uri", "input_sha256", "bit_depth", "input_mode", "pages_left_out", "output_uri", "output_bytes"),
    *("access_uri", "primary_uri", "fit_uri", "fit_bytes", "fit_reused", "adopted_from", "fallback"),
    *("context_is_generic", "rewritten_prompt", "model_id", "model_revision", "config_sha256", "seed", "alpha"),
    *("attempt", "stage1_seconds", "stage2_seconds", "sampling_seconds", "device_name", "peak_memory_bytes", "node"),
    *("started_at", "software_version", "generation", "error_message", "choice_by", "choice_at"),
)
"""What the page of one image shows besides."""


@dataclass(frozen=True)
class Report:
    """A report that was written. made: the pictures that it had to make. num_data_files: those that are new."""

    address: str
    num_images: int
    num_results: int
    num_data_files: int
    made: Made


@dataclass(frozen=True)
class _Folder:
    """Below `prefix` of a store. link: the way to the output, as in an address; None if there is none."""

    store: Store
    prefix: str
    link: str | None

    def write(self, name: str, data: bytes) -> None:
        self.store.write_for_browsers(f"{self.prefix}{name}", data)

    def names(self, folder: str) -> Iterator[str]:
        """The names of the files that are there."""
        return (key[len(self.prefix) :] for key, _ in self.store.walk(f"{self.prefix}{folder}"))


def write_report(output: Store, to: str | None = None, progress: Progress = silent) -> Report:
    """Write the report of an output to `OUTPUT/report`, or to the folder or URL `to`.

    progress: called with the images that are done and their number. Raises NoManifestError if nothing has been
    committed yet.
    """
    folder = _folder(output, to)
    made = Made()
    with tempfile.TemporaryDirectory(prefix="diffcolor-report-") as spill:
        connection = connect(output, spill=spill)
        # 1. what is there already
        known = connection.cursor()
        known.execute("create table there (name varchar)")
        names = (name for part in ("thumbs", "data") for name in folder.names(part))
        while batch := [name for _, name in zip(range(50_000), names, strict=False)]:
            known.register("batch", pa.table({"name": batch}))
            known.execute("insert into there from batch")
            known.unregister("batch")
        # 2. totals
        facts = overview(connection)
        total = facts["num_images"]
        # 3. rows and pictures, a few hundred images at a time
        files: list[list[Any]] = []
        written = done = 0
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for images in _in_files(_images(connection)):
                lacking = _picture(output, folder, known, images, pool, made)
                entry: list[Any] = []
                for rows in (_index, _details):
                    text = _json([rows(folder, key, results, lacking) for key, results in images])
                    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
                    if not _there(known, [report_data(digest)]):
                        folder.write(report_data(digest), f'diffcolor.receive("{digest}", {text});\n'.encode())
                        written += 1
                    entry.append(digest)
                files.append([*entry, len(images)])
                done += len(images)
                progress("images", done, total)
        there = [
            name for (name,) in known.execute("select name from there where starts_with(name, 'data/')").fetchall()
        ]
        connection.close()
    # 4. the page, then what only the page before last needed
    record = _publish(output, folder, facts, files, there)
    return Report(
        address=folder.store.uri(f"{folder.prefix}{PAGE}"),
        num_images=record["images"],
        num_results=record["results"],
        num_data_files=written,
        made=made,
    )


def _folder(output: Store, to: str | None) -> _Folder:
    if to is None:
        return _Folder(output, f"{REPORT}/", "../")
    store = Store(to)
    link = None
    if type(store.fs) is type(output.fs):
        ends = [os.path.realpath(s.root) if s.is_local else s.root.lstrip("/") for s in (output, store)]
        if output.is_local or ends[0].partition("/")[0] == ends[1].partition("/")[0]:  # the same bucket
            link = quote(posixpath.relpath(ends[0], ends[1])) + "/"
    return _Folder(store, "", link)


def _images(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, list[Row]]]:
    """Each image with its results, in the order of their names, a few thousand rows in memory."""
    connection.execute(
        """create temp table primaries as select primary_uri, max_by(primary_sha256, generation) as known_sha256
        from attempts where primary_sha256 is not null group by all"""
    )
    batches = connection.execute(
        """select results.* replace (
            coalesce(primary_sha256, known_sha256) as primary_sha256,
            strftime(started_at, '%Y-%m-%dT%H:%M:%SZ') as started_at,
            strftime(finished_at, '%Y-%m-%dT%H:%M:%SZ') as finished_at)
        from results left join primaries using (primary_uri) order by image_key, variant"""
    ).to_arrow_reader(2_000)
    rows = (row for batch in batches for row in batch.to_pylist())
    for key, results in groupby(rows, itemgetter("image_key")):
        yield key, list(results)


def _in_files(images: Iterable[tuple[str, list[Row]]]) -> Iterator[list[tuple[str, list[Row]]]]:
    """The images of each data file. The last image of one is known by the hash of its name, so most files stay."""
    some: list[tuple[str, list[Row]]] = []
    for image in images:
        some.append(image)
        digest = hashlib.sha256(image[0].encode()).digest()
        if int.from_bytes(digest[:4]) % IMAGES_PER_FILE == 0 or len(some) == 4 * IMAGES_PER_FILE:
            yield some
            some = []
    if some:
        yield some


def _picture(
    output: Store,
    folder: _Folder,
    known: duckdb.DuckDBPyConnection,
    images: list[tuple[str, list[Row]]],
    pool: ThreadPoolExecutor,
    made: Made,
) -> set[str]:
    """Make the pictures of these images that are not there yet; the hashes of the files that cannot be shown."""
    wanted: dict[str, Source] = {}
    for _, results in images:
        for row in results:
            wanted |= {
                report_thumbnail(source.sha256): source for source in sources_of(row, reachable=folder.link is not None)
            }
    there = _there(known, list(wanted))
    missing = [source for name, source in wanted.items() if name not in there]
    return make_pictures(output, missing, folder.write, pool, made)


def _there(known: duckdb.DuckDBPyConnection, names: list[str]) -> set[str]:
    """Those of `names` that the report's folder has."""
    found = known.execute("select name from there where name in (select unnest(?))", [names])
    return {name for (name,) in found.fetchall()}


# ------------------------------------------------------------------ rows for the page


def _index(folder: _Folder, key: str, results: list[Row], lacking: set[str]) -> list[Any]:
    """An image for the gallery: key, its size, its catalog columns as pairs, and a list for each result."""
    size = next(((row["width_px"], row["height_px"]) for row in results if row["width_px"]), (None, None))
    texts = {text: None for row in results if (text := row["catalog_columns"])}
    pairs = [[str(name), _text(value)] for text in texts for name, value in json.loads(text).items()]
    rows = []
    for row in results:
        there = {source.kind: source.sha256 for source in _shown(folder, row, lacking)}
        thumbnails = [there[kind][:32] if kind in there else None for kind in ("scan", "output")]
        rows.append([*(row.get(name) for name in INDEX_COLUMNS), is_obeyed(row["nouns"]), *thumbnails])
    return [key, *size, pairs, rows]


def _details(folder: _Folder, key: str, results: list[Row], lacking: set[str]) -> list[dict[str, Any]]:
    """An image for its page: a record for each result, with the names of the files that show it."""
    records = []
    for row in results:
        record = {name: row.get(name) for name in (*DETAIL_COLUMNS, "nouns", "noun_lightness")}
        record["pictures"] = {
            source.kind: {"thumb": report_thumbnail(source.sha256), "view": _view(folder, row, source)}
            for source in _shown(folder, row, lacking)
        }
        record["files"] = {
            name: f"{folder.link}{key_of(row[f'{name}_uri'])}"
            for name in ("output", "access", "primary")
            if folder.link is not None and row[f"{name}_uri"] is not None
        }
        records.append(record)
    return records


def _shown(folder: _Folder, row: Row, lacking: set[str]) -> list[Source]:
    """The files of a row that there are pictures of."""
    return [s for s in sources_of(row, reachable=folder.link is not None) if s.sha256 not in lacking]


def _view(folder: _Folder, row: Row, source: Source) -> str:
    """The way, from the page, to the file that shows a picture at its full size."""
    return report_view(source.sha256) if source.with_view else f"{folder.link}{shown_key(row, source.kind)}"


def _json(value: Any) -> str:
    """JSON for a script. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else as_text(value)


# ------------------------------------------------------------------ the page


def _publish(
    output: Store, folder: _Folder, facts: dict[str, Any], files: list[list[Any]], there: Iterable[str]
) -> dict[str, Any]:
    """Write the page and its record, then delete the data files of `there` that neither it nor the last page names."""
    static = {name: (resources.files("tasks.report") / "static" / name).read_bytes() for name in STATIC}
    for name, data in static.items():
        folder.write(name, data)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    setting = {
        "files": files,
        "columns": [*INDEX_COLUMNS, "obeyed", "scan_thumb", "output_thumb"],
        "output": hashlib.sha256(output.address.encode()).hexdigest()[:16],
        "images": facts["num_images"],
        "results": facts["num_results"],
        "colors": showable_colors(),
    }
    facts["examples"] = [example for example in facts["examples"] if _has_thumbnails(folder, example)]
    page = environment.get_template(PAGE).render(
        facts,
        name=posixpath.basename(output.address.rstrip("/")) or output.address,
        address=output.address,
        written_at=now,
        version=__version__,
        setting=_json(setting),
        static={name: f"{name}?{hashlib.sha256(data).hexdigest()[:12]}" for name, data in static.items()},
        thumbnail=report_thumbnail,
    )
    folder.write(PAGE, page.encode())
    names = [report_data(digest) for *digests, _ in files for digest in digests]
    before = _named_before(folder)
    record = {"schema": 1, "written_at": now, "images": facts["num_images"], "results": facts["num_results"]}
    folder.write(RECORD, json.dumps(record | {"data": names}, indent=1).encode())
    for name in {*there} - {*names, *before}:
        folder.store.delete(f"{folder.prefix}{name}")
    return record


def _has_thumbnails(folder: _Folder, row: Row) -> bool:
    names = (report_thumbnail(row[f"{file}_sha256"]) for file in ("input", "output"))
    return all(folder.store.has(f"{folder.prefix}{name}") for name in names)


def _named_before(folder: _Folder) -> list[str]:
    """The data files of the report before this one, which a browser may still show."""
    try:
        return list(json.loads(folder.store.read(f"{folder.prefix}{RECORD}"))["data"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or damaged
        return []
