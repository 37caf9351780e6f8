"""What a run would do, take and cost, found out without writing anything to its output.

Headers tell which images can be read and how large they are. Seconds and bytes are medians of the manifest's own rows:
for the same model and settings, and for the nearest size of picture that has been measured. A picture's bytes are the
mean of those that are there, by pixel.
"""

import json
import os
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from duckdb import DuckDBPyConnection

from diffcolor_core import UnreadableImageError
from diffcolor_core.progress import Progress, silent
from diffcolor_scans.decoding import read_size
from diffcolor_scans.formats import SUFFIX
from tasks.actors import placement
from tasks.archive import read_catalog
from tasks.colorize import MAX_FILE_BYTES, ImageWorker
from tasks.errors import EstimateError, InvalidKeyError, NoManifestError, UnsafeFileError
from tasks.layout import CATALOG, FIT_FILES, fit_folder
from tasks.lease import run_records
from tasks.manifest import commit_part, connect
from tasks.options import MachineOptions
from tasks.records import PlannedImage, RunConfig
from tasks.runs import Run
from tasks.storage import Store

NUM_READERS = 16
"""Headers that are read at the same time."""
HEADER_BYTES = 2**16
"""What is fetched of a file at a time to find its header."""
MAX_EXAMPLES = 20
NUM_TRIALS = 3
UNCOMPRESSED_BYTES_PER_PIXEL = 6.0
"""Of three channels of 16 bits: no picture is larger."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would do. Numbers that nothing is known about are None, and the `_from` beside them says why."""

    images_new: int
    """Images, each with one context prompt, that have not been tried under this configuration."""
    images_retried: int
    """Those that have been tried, and would be again."""
    images_unusable: int
    """How many of both will be quarantined: unreadable by their header, or named by the catalog and not there."""
    unusable: list[dict[str, str]]
    """The first of those, with the reason."""
    variants_to_do: int
    variants_done: dict[str, int]
    """Variants that earlier runs have done, by status."""
    picture_bytes: int
    """Of pictures and primaries, without access copies."""
    picture_bytes_from: str
    fit_bytes: int
    fit_bytes_from: str
    seconds: float | None
    """Of all images one after the other on one actor."""
    seconds_from: str
    num_actors: int
    gpus_per_actor: float
    gpu_hours: float | None
    ends_at: str | None
    """If the run began now, in UTC."""
    cost: float | None


@dataclass
class _Work:
    """What is to be done. Sizes are powers of two: the logarithm of the number of pixels."""

    new: int = 0
    retried: int = 0
    unusable: int = 0
    variants: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    images: Counter[int] = field(default_factory=Counter)
    """Usable images by size."""
    fits: Counter[int] = field(default_factory=Counter)
    """How many of them have no kept fit."""
    samplings: Counter[int] = field(default_factory=Counter)
    """Their variants, by size."""
    picture_pixels: int = 0
    """Of all files to write."""
    trials: list[PlannedImage] = field(default_factory=list)
    """Images drawn at random, for a trial."""


class _Rates(NamedTuple):
    """Medians by size: seconds of a fit, of a variant's sampling, and of all else that is done for an image."""

    fit: dict[int, float]
    sampling: dict[int, float]
    other: dict[int, float]
    fit_bytes: float | None
    bytes_per_pixel: float | None
    num_images: int

    def seconds(self, work: _Work) -> float:
        """Of all work, one image after the other."""
        parts = ((work.fits, self.fit), (work.samplings, self.sampling), (work.images, self.other))
        return sum(number * _nearest(rates, size) for counts, rates in parts for size, number in counts.items())


def estimate(
    run: Run,
    *,
    seconds_per_image: float | None = None,
    probe: bool = False,
    price_per_gpu_hour: float | None = None,
    progress: Progress = silent,
) -> Estimate:
    """What the run would do if it began now. Nothing is written to its output.

    seconds_per_image: of an image with all its variants, instead of the manifest's medians. probe: instead of both,
    colorize three images of the archive into a temporary folder of this machine. Raises EstimateError where a trial
    fails, or a cluster's actors are not known.
    """
    config, output = run.config, Store(run.config.options.output)
    num_actors, share = _machines(config.options)
    if config.options.caption is not None and output.has(CATALOG):  # what the run has captioned before
        run.plan.replace_catalog(read_catalog(Store(config.options.archive), output.uri(CATALOG)) or ())
    run.plan.fill(config)
    manifest = _manifest(output)
    work = _look_through(run, manifest, progress)
    rates = _measured(manifest, _same_generations(output, config), config)
    measured_from = "this output's medians for the same model and settings"
    if probe and work.trials:
        trial, measured_from = _try_out(config, work.trials, num_actors, share), f"a trial of {len(work.trials)} images"
        rates = trial._replace(bytes_per_pixel=rates.bytes_per_pixel or trial.bytes_per_pixel)
    seconds: float | None
    if seconds_per_image is not None:
        seconds, measured_from = work.images.total() * seconds_per_image, "--seconds-per-image"
    elif work.images and not rates.num_images:
        seconds, measured_from = None, "nothing like it was measured: give --probe or --seconds-per-image"
    else:
        seconds = rates.seconds(work)
    gpu_hours = None if seconds is None else seconds * share / 3600
    keeps = config.options.keep_fits
    ends_at = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds / num_actors)
    return Estimate(
        images_new=work.new,
        images_retried=work.retried,
        images_unusable=work.unusable,
        unusable=work.examples,
        variants_to_do=work.variants,
        variants_done=run.plan.done_before,
        picture_bytes=round(work.picture_pixels * (rates.bytes_per_pixel or UNCOMPRESSED_BYTES_PER_PIXEL)),
        picture_bytes_from="pictures there" if rates.bytes_per_pixel else "an upper bound: uncompressed, 16 bits",
        fit_bytes=round(work.fits.total() * (rates.fit_bytes or config.fit_bytes)) if keeps else 0,
        fit_bytes_from=("medians" if rates.fit_bytes else "the weights that are trained") if keeps else "not kept",
        seconds=seconds,
        seconds_from=measured_from,
        num_actors=num_actors,
        gpus_per_actor=share,
        gpu_hours=gpu_hours,
        ends_at=None if ends_at is None else ends_at.isoformat(timespec="seconds"),
        cost=None if gpu_hours is None or price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour,
    )


def _machines(options: MachineOptions) -> tuple[int, float]:
    """(number of actors, GPUs of each), as the run will have them. A cluster is not asked."""
    if options.ray_address is None:
        return placement(options, torch.cuda.device_count())
    if options.num_actors is None:
        raise EstimateError("a dry run does not ask the cluster at --ray-address: say how large it is by --num-actors")
    return placement(options, 0 if options.device == "cpu" else options.num_actors)


def _nearest(rates: dict[int, float], size: int) -> float:
    return rates[min(rates, key=lambda known: (abs(known - size), known))] if rates else 0.0


# ------------------------------------------------------------------ what is to be done


def _manifest(output: Store) -> DuckDBPyConnection | None:
    try:
        return connect(output, views=["attempts"])
    except NoManifestError:
        return None


def _look_through(run: Run, manifest: DuckDBPyConnection | None, progress: Progress) -> _Work:
    """Read the header of every image that is to be done."""
    options, work, draw = run.config.options, _Work(), random.Random(0)
    archive, output = Store(options.archive), Store(options.output)
    images, done = run.plan.images(), 0
    num_readers = 1 if archive.is_archive_file else NUM_READERS  # tar files cannot be read by several threads
    with ThreadPoolExecutor(num_readers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata
        contents = _known_contents(manifest)
        while batch := list(islice(images, 16 * NUM_READERS)):
            looks = pool.map(partial(_look, archive, output, run.config), batch, contents(batch))
            for planned, (pixels, problem, has_fit) in zip(batch, looks, strict=True):
                _count(work, planned, pixels, problem, has_fit, draw)
            done += len(batch)
            progress("headers", done, run.plan.num_images)
    return work


def _look(
    archive: Store, output: Store, config: RunConfig, planned: PlannedImage, sha256: str | None
) -> tuple[int, Exception | None, bool]:
    """(pixels, why the image cannot be used, whether its fit is there)."""
    if planned.work.problem is not None:
        return 0, planned.work.problem, False
    try:
        with archive.open(planned.work.image_key, block_bytes=HEADER_BYTES) as file:
            if file.seek(0, os.SEEK_END) > MAX_FILE_BYTES:
                return 0, UnreadableImageError(f"it has more than {MAX_FILE_BYTES} bytes"), False
            file.seek(0)
            width_px, height_px = read_size(file)
    except (UnreadableImageError, InvalidKeyError, UnsafeFileError, FileNotFoundError) as error:
        return 0, error, False
    has_fit = False
    if sha256 is not None:
        folder = fit_folder(sha256, config.fit_sha256(planned.work.context_prompt))
        has_fit = all(output.has(f"{folder}/{name}") for name in FIT_FILES)
    return width_px * height_px, None, has_fit


def _count(
    work: _Work, planned: PlannedImage, pixels: int, problem: Exception | None, has_fit: bool, draw: random.Random
) -> None:
    variants = planned.work.variants
    work.variants += len(variants)
    if max(planned.attempts) > 1:
        work.retried += 1
    else:
        work.new += 1
    if problem is not None:
        work.unusable += 1
        if len(work.examples) < MAX_EXAMPLES:
            work.examples.append({"image": planned.work.image_key, "reason": f"{type(problem).__name__}: {problem}"})
        return
    size = pixels.bit_length()
    work.images[size] += 1
    work.fits[size] += not has_fit
    work.samplings[size] += len(variants)
    asks_for_primary = any(variant.target_prompt is None for variant in variants)
    work.picture_pixels += pixels * (len(variants) + (not asks_for_primary and not has_fit))
    place = draw.randrange(work.images.total())  # reservoir sampling
    if len(work.trials) < NUM_TRIALS:
        work.trials.append(planned)
    elif place < NUM_TRIALS:
        work.trials[place] = planned


def _known_contents(manifest: DuckDBPyConnection | None) -> Callable[[list[PlannedImage]], list[str | None]]:
    """What tells the SHA-256 of planned images that some run has read in their present version."""
    if manifest is None:
        return lambda batch: [None] * len(batch)
    manifest.execute(
        """create temp table known as
        select image_key, input_version, arg_max(input_sha256, generation) as sha256 from attempts
        where input_sha256 is not null group by all"""
    )

    def contents(batch: list[PlannedImage]) -> list[str | None]:
        columns = {
            "number": pa.array(range(len(batch)), pa.int64()),
            "image_key": pa.array([planned.work.image_key for planned in batch], pa.string()),
            "input_version": pa.array([planned.work.version for planned in batch], pa.string()),
        }
        manifest.register("wanted", pa.table(columns))
        found: dict[int, str] = dict(
            manifest.execute("select number, sha256 from wanted join known using (image_key, input_version)").fetchall()
        )
        manifest.unregister("wanted")
        return [found.get(number) for number in range(len(batch))]

    return contents


# ------------------------------------------------------------------ what it takes


def _same_generations(output: Store, config: RunConfig) -> list[int]:
    """The runs on this output that had the same model, settings and way to compute."""

    def shaped(record: dict[str, Any]) -> dict[str, Any]:
        return {name: record.get(name, before) for name, before in _SHAPES_TIME.items()}

    mine = shaped(json.loads(json.dumps(config.record())))
    return [number for number, record in run_records(output) if shaped(record) == mine]


_SHAPES_TIME = {
    "model_id": None,
    "model_revision": None,
    "settings": None,
    "dtype": "auto",
    "batch": 1,
    "compile": False,
}
"""What the time of an image depends on, with its value in runs from before there was a choice."""
_SECONDS = """
    with images as (
        select any_value(fit_reused) as reused, any_value(width_px::bigint * height_px) as pixels,
            -- an image of a batch waits for its neighbours, so its time is what it took itself
            case when $batch then max(total_seconds) - max(sampling_seconds) + sum(sampling_seconds)
                else epoch(max(finished_at)) - epoch(min(started_at)) end as wall, sum(sampling_seconds) as sampling,
            any_value(stage1_seconds + stage2_seconds) as fit, count(*) as variants
        from attempts
        where status = 'ok' and adopted_from is null and list_contains($same, generation) and width_px is not null
        group by generation, image_key, context_prompt
    )
    select 1 + floor(log2(pixels))::integer as size, median(fit) filter (not reused), median(sampling / variants),
        median(wall - sampling - case when reused then 0 else fit end), count(*)
    from images group by size
"""


def _measured(manifest: DuckDBPyConnection | None, same: list[int], config: RunConfig) -> _Rates:
    """The medians of the runs `same`."""
    if manifest is None:
        return _Rates({}, {}, {}, None, None, 0)
    rows = manifest.execute(_SECONDS, {"same": same, "batch": config.options.batch > 1}).fetchall()
    fit, sampling, other = (
        {row[0]: max(0.0, row[column]) for row in rows if row[column] is not None} for column in (1, 2, 3)
    )
    (fit_bytes,) = _one(
        manifest, "select median(fit_bytes) from attempts where list_contains($same, generation)", same=same
    )
    (per_pixel,) = _one(
        manifest,
        """select sum(output_bytes) / sum(width_px::bigint * height_px) from attempts
        where status = 'ok' and ends_with(output_uri, $suffix)""",
        suffix=SUFFIX[config.options.image_format],
    )
    return _Rates(fit, sampling, other, fit_bytes, per_pixel, sum(row[4] for row in rows))


def _one(manifest: DuckDBPyConnection, sql: str, **parameters: Any) -> tuple[Any, ...]:
    row = manifest.execute(sql, parameters).fetchone()
    assert row is not None  # an aggregate is one row
    return row


def _try_out(config: RunConfig, images: Iterable[PlannedImage], num_actors: int, share: float) -> _Rates:
    """Colorize these images into a temporary folder, with the threads that an actor will have, and measure it."""
    cores = os.cpu_count() or 1
    threads = None if share else max(1, cores // num_actors)
    if share and not torch.cuda.is_available():
        raise EstimateError("--probe: the run is meant for GPUs, and torch sees none here: give --seconds-per-image")
    with tempfile.TemporaryDirectory(prefix="diffcolor-probe-") as folder:
        options = config.options.model_copy(update={"output": folder})
        config = replace(config, options=options, device="cuda" if share else "cpu", generation=1)
        worker = ImageWorker(config, threads)
        trials = [replace(planned, earlier=()) for planned in images]
        rows = [row for _, made in worker.colorize_batch(trials) for row in made]
        if not any(row["status"] == "ok" for row in rows):
            raise EstimateError(f"no image of the trial could be colorized: {rows[0]['error_message']}")
        commit_part(Store(folder), "trial", rows)
        return _measured(_manifest(Store(folder)), [1], config)
