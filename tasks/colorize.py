"""Images on one worker, alone or in batches: planned work in, manifest rows and written pictures out."""

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from diffcolor_core import ColorReport, DiffColor, DivergedError, Fit, FitError, Picture, Result, Scan, ToFit, read_scan
from diffcolor_scans.formats import SUFFIX, ImageFormat, encode
from tasks.device import compiled, device_name, is_accelerator_fault, is_out_of_memory, peak_memory_bytes
from tasks.errors import AcceleratorFaultError, InvalidKeyError, OversizeError, UnsafeFileError
from tasks.layout import FILES, FIT_FILES, fit_folder, key_of, picture_stem
from tasks.logs import Kept, about, log_as_json
from tasks.progress import visible
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, base_row, error_rows
from tasks.storage import Store

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_FILE_BYTES = 4 * 2**30
"""Of an image file: four times what the largest picture that is read holds in 16 bits."""


class Opened(NamedTuple):
    """An image that has been read and decoded.

    planned: what is left of what was `asked`, as `adopted` has the rows of the other variants. shared: columns of all
    rows to come.
    """

    asked: PlannedImage
    planned: PlannedImage
    scan: Scan
    adopted: list[Row]
    shared: Row


class _Way(NamedTuple):
    """How an image is fitted: with less than was asked for, the model and its settings, in batches of this size."""

    less: str
    pipe: DiffColor
    batch: int


class ImageWorker:
    """A loaded model that turns planned images into manifest rows. It does not know Prefect, of Ray only its node."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        if num_threads is not None:  # several threads would cut a batch where it shows in the last digits
            torch.set_num_threads(num_threads if config.options.batch == 1 else 1)
        self.config, self._gpu_failed = config, False
        self._logs: Kept | None = None
        if config.options.log_format == "json":
            log_as_json(config.run_id)  # into Ray's own log files
            self._logs = Kept.install()
        self.archive, self.output = Store(config.options.archive), Store(config.options.output)
        self.pipe = DiffColor.from_pretrained(
            config.options.model,
            settings=config.settings,
            device=config.device,
            dtype=config.options.dtype,
            revision=config.model_revision,
        )
        if config.options.compile:
            self.pipe = compiled(self.pipe)

    def ready(self) -> str:
        """Answers once the model is loaded: the id of the Ray node, if there is one.

        A process whose GPU has failed ends here. Ray then starts the actor again and asks the new process.
        """
        import ray

        if self._gpu_failed:
            os._exit(1)
        return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""

    def take_logs(self) -> list[dict[str, Any]]:
        """What has been logged since the last call, as `relay` takes it."""
        return [] if self._logs is None else self._logs.take()

    def colorize(self, planned: PlannedImage, smaller_because: str | None = None) -> list[Row]:
        """One row per variant. What is wrong with the image or its prompts is a row; a broken machine raises.

        Work that was done before on the same bytes under another name or date is adopted, not done
        again. Where memory runs out, less is tried, and recorded; a smaller working size at once if
        `smaller_because` says why. Raises AcceleratorFaultError if the process is of no more use.
        """
        opened = self._open(planned)
        if isinstance(opened, list):
            return opened
        return self._make(opened, first=0 if smaller_because is None else -1, why=smaller_because)

    def colorize_batch(self, images: Sequence[PlannedImage]) -> Iterator[tuple[int, list[Row]]]:
        """The position and the rows of each image, as soon as they are there.

        Images of one working shape are fitted `batch` at a time. A short batch is filled up with copies, so that
        the bytes of an image do not depend on its neighbours. Where `colorize` raises, the image's rows say that it
        failed; only AcceleratorFaultError is raised.
        """
        groups: dict[tuple[int, ...], list[tuple[int, Opened]]] = {}
        for position, planned in enumerate(images):
            found = self._or_failed(planned, partial(self._begin, planned))
            if isinstance(found, list):
                yield position, found
                continue
            key, opened = found
            groups.setdefault(key, []).append((position, opened))
            if len(groups[key]) == self.config.options.batch:
                yield from self._make_together(groups.pop(key))
        for group in groups.values():
            yield from self._make_together(group)

    def _or_failed(self, planned: PlannedImage, work: Callable[[], _T]) -> _T | list[Row]:
        """What `work` on an image gives, or rows with the error that it raises."""
        with about(image=planned.work.image_key, attempt=max(planned.attempts)):
            try:
                return work()
            except AcceleratorFaultError:
                raise
            except Exception as error:
                return error_rows(self.config, planned, "failed", error)

    def _begin(self, planned: PlannedImage) -> list[Row] | tuple[tuple[int, ...], Opened]:
        """An image that needs a fit, with what it shares with others of its batch; any other's rows."""
        opened = self._open(planned)
        if isinstance(opened, list):
            return opened
        if self._keeps_fit and all(self.output.has(f"{self._fit_folder(opened)}/{name}") for name in FIT_FILES):
            return self._make(opened)
        try:
            return (*self.pipe.batch_key(self._to_fit(opened)), self._primary_only(opened)), opened
        except ValueError as error:
            return self._quarantined(opened, error)

    def _make_together(self, group: list[tuple[int, Opened]]) -> Iterator[tuple[int, list[Row]]]:
        """Fit images as one batch, and make the rows of each. If they cannot be a batch, each is tried alone."""
        photographs = [self._to_fit(opened) for _, opened in group]
        photographs += photographs[:1] * (self.config.options.batch - len(group))
        fits = self.pipe.fit_batch(photographs, primary_only=self._primary_only(group[0][1]))
        first, why, is_batch = 0, None, True
        for position, opened in group:
            fit = None
            if is_batch:
                try:
                    with self._noticing_faults():
                        fit = next(fits)
                except AcceleratorFaultError:
                    raise
                except Exception as error:
                    is_batch = False
                    logger.warning("%d images are tried one by one: %s", len(group), _first_line(error))
                    if is_out_of_memory(error):
                        first, why = 1, _first_line(error)
            yield position, self._or_failed(opened.asked, partial(self._make, opened, fit, first=first, why=why))

    def _open(self, planned: PlannedImage) -> list[Row] | Opened:
        """The image, read and decoded; or its rows, if there is nothing to make of it."""
        started_at = datetime.now(UTC)
        if self.pipe.checkpoint.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.pipe.checkpoint.device)
        try:
            data = self.archive.read(planned.work.image_key, max_bytes=MAX_FILE_BYTES)
        except (InvalidKeyError, UnsafeFileError, OversizeError) as error:
            return error_rows(self.config, planned, "quarantined", error)
        shared: Row = {"started_at": started_at, "input_sha256": hashlib.sha256(data).hexdigest()}
        adopted, left = self._adopt(planned, shared)
        if not left.attempts:
            return adopted
        try:
            scan = read_scan(data)
        except ValueError as error:
            return adopted + error_rows(self.config, left, "quarantined", error, shared)
        shared |= {
            "width_px": scan.width_px,
            "height_px": scan.height_px,
            "bit_depth": scan.bit_depth,
            "input_mode": scan.mode,
            "pages_left_out": scan.num_pages - 1,
        }
        return Opened(planned, left, scan, adopted, shared)

    def _make(
        self,
        opened: Opened,
        fit: Fit | DivergedError | None = None,
        *,
        first: int = 0,
        why: str | None = None,
    ) -> list[Row]:
        """The rows of an opened image, made in the first way for which memory suffices.

        fit: what the first way has given already. first: the way to begin with, if `why` says why not with the first.
        """
        batch = self.config.options.batch
        smaller = smaller_pipe(self.pipe)
        less = f"working size {smaller.settings.working_size_px} px, batch size 1"
        ways = [_Way("", self.pipe, batch), _Way("batch of 1", self.pipe, 1), _Way(less, smaller, 1)]
        if batch == 1:
            del ways[1]
        for way in ways[first:]:
            shared = dict(opened.shared)
            if why is not None:
                logger.warning("%s is tried with %s: %s", visible(opened.asked.work.image_key), way.less, why)
                shared["fallback"] = f"{way.less}: {why[:200]}"
            try:
                with self._noticing_faults():
                    return opened.adopted + self._colorize(opened, way, fit, shared)
            except ValueError as error:  # a prompt that cannot be used
                return self._quarantined(opened, error)
            except (RuntimeError, MemoryError) as error:
                if way is ways[-1] or not is_out_of_memory(error):
                    raise
                fit, why = None, _first_line(error)
        raise AssertionError("the last way returns or raises")

    def _quarantined(self, opened: Opened, error: ValueError) -> list[Row]:
        return opened.adopted + error_rows(self.config, opened.planned, "quarantined", error, opened.shared)

    @contextmanager
    def _noticing_faults(self) -> Iterator[None]:
        """Raises AcceleratorFaultError for an error after which this process is of no more use."""
        try:
            yield
        except RuntimeError as error:
            if not is_accelerator_fault(error):
                raise
            self._gpu_failed = True
            raise AcceleratorFaultError(_first_line(error)) from error

    def _adopt(self, planned: PlannedImage, shared: Row) -> tuple[list[Row], PlannedImage]:
        """Rows of the variants that an earlier row answers, and what is left of the plan."""
        rows, left = [], []
        for index, candidates in enumerate(planned.earlier or ((),) * len(planned.attempts)):
            same = (row for row in candidates if row["input_sha256"] == shared["input_sha256"])
            earlier = next(filter(self._has_files, same), None)
            if earlier is None:
                left.append(index)
                continue
            own = base_row(self.config, planned, index) | {"adopted_from": earlier["image_key"]}
            rows.append(earlier | own | shared)
        variants = tuple(planned.work.variants[i] for i in left)
        work = replace(planned.work, variants=variants)
        return rows, PlannedImage(work, tuple(planned.attempts[i] for i in left))

    def _has_files(self, row: Row) -> bool:
        """Whether the files that an earlier row names are there, and its picture is still the one that it made."""
        keys = {file: key_of(row[f"{file}_uri"]) for file in FILES if row[f"{file}_uri"] is not None}
        return all(map(self.output.has, keys.values())) and self.output.sha256(keys["output"]) == row["output_sha256"]

    def _colorize(self, opened: Opened, way: _Way, fit: Fit | DivergedError | None, shared: Row) -> list[Row]:
        """Make or load the fit if there is none yet, then make the variants. Adds to `shared` what they share."""
        if isinstance(fit, DivergedError):
            raise fit
        start = time.perf_counter()
        if fit is not None:
            start -= fit.stage1_seconds + fit.stage2_seconds  # its share of the batch
        planned = opened.planned
        key, context, sha256 = planned.work.image_key, planned.work.context_prompt, shared["input_sha256"]
        fit, columns = self._kept(opened, way, fit, shared)
        shared |= columns | {
            "rewritten_prompt": fit.rewritten_prompt,
            "stage1_seconds": fit.stage1_seconds,
            "stage2_seconds": fit.stage2_seconds,
        }
        primary_stem = picture_stem(key, sha256, self.config.config_sha256(context, None), primary=True)
        primary_key = f"{primary_stem}{SUFFIX[self.config.options.image_format]}"
        shared["primary_uri"] = self.output.uri(primary_key)
        asked = any(variant.target_prompt is None for variant in planned.work.variants)
        if asked or not self.output.has(primary_key):
            primary = self._write(primary_stem, fit.primary_picture, fit, context or "", with_access_copy=asked)
            shared["primary_sha256"] = primary["output_sha256"]
        fit_seconds = time.perf_counter() - start
        logger.info("%s: fit %s in %.1f s", visible(key), "loaded" if columns["fit_reused"] else "made", fit_seconds)

        rows = []
        for index, variant in enumerate(planned.work.variants):
            start = time.perf_counter()
            result = way.pipe.recolor(fit, variant.target_prompt)
            if variant.target_prompt is None:
                files = primary
            else:
                config_sha256 = self.config.config_sha256(context, variant.target_prompt)
                stem = picture_stem(key, sha256, config_sha256, primary=False)
                files = self._write(stem, result.image, fit, variant.target_prompt)
            row = self._row(planned, index, result, shared | files)
            rows.append(row | {"total_seconds": fit_seconds + time.perf_counter() - start})
        return rows

    @property
    def _keeps_fit(self) -> bool:
        return self.config.options.keep_fits is not False

    def _fit_folder(self, opened: Opened) -> str:
        return fit_folder(
            opened.shared["input_sha256"], self.config.fit_sha256(opened.planned.work.context_prompt or "")
        )

    def _to_fit(self, opened: Opened) -> ToFit:
        return ToFit(opened.scan, opened.planned.work.context_prompt or "", self.config.options.seed)

    def _primary_only(self, opened: Opened) -> bool:
        """Whether a fit may end after stage 1: without targets and without a place to keep it."""
        return not self._keeps_fit and all(v.target_prompt is None for v in opened.planned.work.variants)

    def _kept(self, opened: Opened, way: _Way, fit: Fit | None, shared: Row) -> tuple[Fit, Row]:
        """The kept fit of these bytes and settings, else `fit` or a new one, which is then kept; and its columns."""
        if not self._keeps_fit or "fallback" in shared:
            has_targets = any(variant.target_prompt is not None for variant in opened.planned.work.variants)
            return fit or self._new_fit(opened, way, primary_only=not has_targets), {"fit_reused": False}
        folder, reused = self._fit_folder(opened), False
        url = self.output.uri(folder)
        if fit is None:
            try:
                fit, reused = self.output.patiently(lambda: way.pipe.load_fit(url, opened.scan)), True
            except FitError:  # none yet, or one that a crash left half written
                fit = self._new_fit(opened, way, primary_only=False)
        if not reused:
            for name, data in fit.files(with_scan=False).items():
                self.output.write(f"{folder}/{name}", data)
        size = sum(self.output.size(f"{folder}/{name}") for name in FIT_FILES)
        return fit, {"fit_uri": url, "fit_bytes": size, "fit_reused": reused}

    def _new_fit(self, opened: Opened, way: _Way, *, primary_only: bool) -> Fit:
        """The image's fit, as it comes out of a batch whatever its neighbours are: here they are copies of itself."""
        one = self._to_fit(opened)
        if way.batch == 1:
            return way.pipe.fit(one.image, one.context_prompt, seed=one.seed, primary_only=primary_only)
        fit = next(way.pipe.fit_batch([one] * way.batch, primary_only=primary_only))
        if isinstance(fit, DivergedError):
            raise fit
        return fit

    def _write(self, stem: str, picture: Picture, fit: Fit, prompt: str, *, with_access_copy: bool = True) -> Row:
        """Write a picture and, if a row will name it, its access copy; where they are, as columns."""
        assert fit.scan is not None  # it was fitted here
        provenance = fit.provenance(prompt, self.config.run_id)
        columns: Row = {}
        formats: tuple[tuple[str, ImageFormat | None], ...] = (
            ("output", self.config.options.image_format),
            ("access", self.config.options.access_copy if with_access_copy else None),
        )
        for file, image_format in formats:
            if image_format is None:
                continue
            data = encode(picture, image_format, provenance, fit.scan.metadata)
            key = f"{stem}{SUFFIX[image_format]}"
            self.output.write(key, data)
            columns |= {f"{file}_uri": self.output.uri(key), f"{file}_sha256": hashlib.sha256(data).hexdigest()}
            if file == "output":
                columns["output_bytes"] = len(data)
        return columns

    def _row(self, planned: PlannedImage, index: int, result: Result, shared: Row) -> Row:
        return (
            base_row(self.config, planned, index)
            | shared
            | result.metrics
            | {
                "status": "ok",
                "alpha": result.alpha,
                "nouns": [_noun(noun) for noun in result.nouns],
                "noun_lightness": [noun.lightness for noun in result.nouns],
                "sampling_seconds": result.sampling_seconds,
                "device_name": device_name(self.pipe.checkpoint.device),
                "dtype": str(self.pipe.checkpoint.dtype).removeprefix("torch."),
                "peak_memory_bytes": peak_memory_bytes(self.pipe.checkpoint.device),
                "node": socket.gethostname(),
                "finished_at": datetime.now(UTC),
            }
        )


def smaller_pipe(pipe: DiffColor) -> DiffColor:
    """The same model at three quarters of the working size, one noise draw a step."""
    side = pipe.settings.working_size_px or pipe.checkpoint.native_size_px
    changes = {"working_size_px": max(1, side * 3 // 4), "batch_size": 1}
    return DiffColor(pipe.checkpoint, pipe.settings.model_copy(update=changes))


def _noun(told: ColorReport) -> Row:
    return {name: getattr(told, name) for name in ("noun", "color", "agreement", "achievable_chroma", "feasible")}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
