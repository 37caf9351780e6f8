"""One image on one worker: planned work in, manifest rows and written pictures out."""

import hashlib
import logging
import os
import platform
import resource
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from diffcolor_core import DiffColor, Fit, FitError, Picture, Result, Scan, read_scan
from diffcolor_scans.formats import SUFFIX, ImageFormat, encode
from tasks.errors import AcceleratorFaultError, InvalidKeyError, OversizeError, UnsafeFileError
from tasks.layout import FILES, FIT_FILES, fit_folder, key_of, picture_stem
from tasks.logs import Kept, log_as_json
from tasks.progress import visible
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, base_row, error_rows
from tasks.storage import Store

logger = logging.getLogger(__name__)
MAX_FILE_BYTES = 4 * 2**30
"""Of an image file: four times what the largest picture that is read holds in 16 bits."""


class ImageWorker:
    """A loaded model that turns planned images into manifest rows. It does not know Prefect, of Ray only its node."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
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
        again. Where memory runs out, a smaller working size is tried once, and recorded; at once if
        `smaller_because` says why. Raises AcceleratorFaultError if the process is of no more use.
        """
        started_at = datetime.now(UTC)
        if self.pipe.checkpoint.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.pipe.checkpoint.device)
        try:
            data = self.archive.read(planned.work.image_key, max_bytes=MAX_FILE_BYTES)
        except (InvalidKeyError, UnsafeFileError, OversizeError) as error:
            return error_rows(self.config, planned, "quarantined", error)
        shared: Row = {"started_at": started_at, "input_sha256": hashlib.sha256(data).hexdigest()}
        adopted, planned = self._adopt(planned, shared)
        if not planned.attempts:
            return adopted
        try:
            scan = read_scan(data)
            del data
            shared |= {
                "width_px": scan.width_px,
                "height_px": scan.height_px,
                "bit_depth": scan.bit_depth,
                "input_mode": scan.mode,
                "pages_left_out": scan.num_pages - 1,
            }
            if smaller_because is None:
                try:
                    return adopted + self._colorize(planned, scan, self.pipe, shared)
                except (RuntimeError, MemoryError) as error:
                    if not _is_out_of_memory(error):
                        raise
                    smaller_because = str(error).partition("\n")[0]
            logger.warning("%s is tried at a smaller size: %s", visible(planned.work.image_key), smaller_because)
            smaller = smaller_pipe(self.pipe)
            shared["fallback"] = (
                f"working size {smaller.settings.working_size_px} px, batch size 1: {smaller_because[:200]}"
            )
            return adopted + self._colorize(planned, scan, smaller, shared)
        except ValueError as error:  # an unreadable image, a prompt that cannot be used
            return adopted + error_rows(self.config, planned, "quarantined", error, shared)
        except RuntimeError as error:
            if _is_accelerator_fault(error):
                self._gpu_failed = True
                raise AcceleratorFaultError(str(error).strip().partition("\n")[0]) from error
            raise

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

    def _colorize(self, planned: PlannedImage, scan: Scan, pipe: DiffColor, shared: Row) -> list[Row]:
        """Make or load the fit, then make the variants."""
        start = time.perf_counter()
        key, context, sha256 = planned.work.image_key, planned.work.context_prompt, shared["input_sha256"]
        has_targets = any(variant.target_prompt is not None for variant in planned.work.variants)
        fit, columns = self._fit(scan, context or "", pipe, shared, has_targets=has_targets)
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
            result = pipe.recolor(fit, variant.target_prompt)
            if variant.target_prompt is None:
                files = primary
            else:
                config_sha256 = self.config.config_sha256(context, variant.target_prompt)
                stem = picture_stem(key, sha256, config_sha256, primary=False)
                files = self._write(stem, result.image, fit, variant.target_prompt)
            row = self._row(planned, index, result, shared | files)
            rows.append(row | {"total_seconds": fit_seconds + time.perf_counter() - start})
        return rows

    def _fit(
        self, scan: Scan, context_prompt: str, pipe: DiffColor, shared: Row, *, has_targets: bool
    ) -> tuple[Fit, Row]:
        """The kept fit of these bytes and settings, or a new one, which is then kept; and its columns.

        Without targets and without a place to keep it, the fit stops after stage 1.
        """
        seed = self.config.options.seed
        if self.config.options.keep_fits is False or "fallback" in shared:
            fit = pipe.fit(scan, context_prompt, seed=seed, primary_only=not has_targets)
            return fit, {"fit_reused": False}
        folder = fit_folder(shared["input_sha256"], self.config.fit_sha256(context_prompt))
        url = self.output.uri(folder)
        try:
            fit, reused = self.output.patiently(lambda: pipe.load_fit(url, scan)), True
        except FitError:  # none yet, or one that a crash left half written
            fit, reused = pipe.fit(scan, context_prompt, seed=seed), False
            for name, data in fit.files(with_scan=False).items():
                self.output.write(f"{folder}/{name}", data)
        size = sum(self.output.size(f"{folder}/{name}") for name in FIT_FILES)
        return fit, {"fit_uri": url, "fit_bytes": size, "fit_reused": reused}

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
                "nouns": [vars(noun) | {"feasible": noun.feasible} for noun in result.nouns],
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


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch has an exception of its own for the GPU, and a RuntimeError with these words for the CPU."""
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _is_accelerator_fault(error: RuntimeError) -> bool:
    """An error of CUDA or of its libraries other than a lack of memory: the process's CUDA context is lost."""
    words = ("CUDA error", "cuDNN error", "CUDA driver error")
    known = isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in words)
    return known and not _is_out_of_memory(error)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated GPU memory, or this process's peak resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
