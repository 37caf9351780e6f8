"""One image on one worker, and the Ray actors that are such workers."""

import hashlib
import os
import platform
import queue
import resource
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch

from diffcolor_core import DiffColor, Fit, Picture, Result, __version__, read_scan
from diffcolor_core.formats import SUFFIX, ImageFormat, encode
from tasks.planning import PlannedImage, RunConfig
from tasks.storage import Store, slug

Row = dict[str, Any]
MAX_ATTEMPTS = 3
"""How often an image may kill its actor before it is quarantined."""


class DeadlyImageError(RuntimeError):
    """An image that kills the process that works on it."""


class ImageWorker:
    """A loaded model that turns planned images into manifest rows. It knows nothing of Ray or Prefect."""

    def __init__(self, config: RunConfig, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.config = config
        self.archive, self.output = Store(config.archive), Store(config.output)
        self.pipe = DiffColor.from_pretrained(config.model, settings=config.settings, device=config.device)
        loaded = self.pipe.checkpoint.model_revision
        if loaded != config.model_revision:
            raise RuntimeError(
                f"the run was planned with model {config.model_id} at {config.model_revision}, but this worker "
                f"loaded {loaded}: is {config.model!r} another folder here?"
            )

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    def colorize(self, planned: PlannedImage) -> list[Row]:
        """One row per variant. What is wrong with the image or its prompts is a row; a broken machine raises."""
        start, started_at = time.perf_counter(), datetime.now(UTC)
        shared: Row = {"started_at": started_at}
        data = self.archive.read(planned.work.image_key)
        shared["input_sha256"] = hashlib.sha256(data).hexdigest()
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
            fit = self.pipe.fit(scan, planned.work.context_prompt or "", seed=self.config.seed)
        except ValueError as error:  # an unreadable image, a prompt that cannot be used
            return error_rows(self.config, planned, "quarantined", error, shared)
        shared |= {
            "rewritten_prompt": fit.rewritten_prompt,
            "stage1_seconds": fit.stage1_seconds,
            "stage2_seconds": fit.stage2_seconds,
        }
        folder = f"images/{slug(planned.work.image_key)}-{shared['input_sha256'][:12]}"
        context = planned.work.context_prompt
        primary = self._write(
            f"{folder}/primary-{self._digest(context, None)}", fit.primary_picture, fit, context or ""
        )
        shared["primary_uri"] = primary["output_uri"]
        fit_seconds = time.perf_counter() - start

        rows = []
        for index, variant in enumerate(planned.work.variants):
            start = time.perf_counter()
            result = self.pipe.recolor(fit, variant.target_prompt)
            files = primary
            if variant.target_prompt is not None:
                stem = f"{folder}/target-{self._digest(context, variant.target_prompt)}"
                files = self._write(stem, result.image, fit, variant.target_prompt)
            seconds = fit_seconds + time.perf_counter() - start
            rows.append(self._row(planned, index, result, shared | files, seconds))
        return rows

    def _digest(self, context_prompt: str | None, target_prompt: str | None) -> str:
        return self.config.config_sha256(context_prompt, target_prompt)[:12]

    def _write(self, stem: str, picture: Picture, fit: Fit, prompt: str) -> Row:
        """Write a picture and its access copy; where they are, as columns."""
        assert fit.scan is not None  # it was fitted here
        provenance = fit.provenance(prompt, self.config.run_id)
        columns = {}
        formats: tuple[tuple[str, ImageFormat | None], ...] = (
            ("output_uri", self.config.image_format),
            ("access_uri", self.config.access_copy),
        )
        for column, image_format in formats:
            if image_format is None:
                continue
            data = encode(picture, image_format, provenance, fit.scan.metadata)
            key = f"{stem}{SUFFIX[image_format]}"
            self.output.write(key, data)
            columns[column] = self.output.uri(key)
            if column == "output_uri":
                columns["output_sha256"] = hashlib.sha256(data).hexdigest()
        return columns

    def _row(self, planned: PlannedImage, index: int, result: Result, shared: Row, seconds: float) -> Row:
        return (
            base_row(self.config, planned, index)
            | shared
            | result.metrics
            | {
                "status": "ok",
                "alpha": result.alpha,
                "alpha_scores": [{"alpha": a, "score": s} for a, s in result.alpha_scores.items()],
                "nouns": [vars(noun) | {"feasible": noun.feasible} for noun in result.nouns],
                "sampling_seconds": result.sampling_seconds,
                "total_seconds": seconds,
                "device_name": device_name(self.pipe.checkpoint.device),
                "peak_memory_bytes": peak_memory_bytes(self.pipe.checkpoint.device),
                "node": socket.gethostname(),
                "finished_at": datetime.now(UTC),
            }
        )


def base_row(config: RunConfig, planned: PlannedImage, index: int) -> Row:
    """What a row of this variant holds whatever becomes of it."""
    work, variant = planned.work, planned.work.variants[index]
    now = datetime.now(UTC)
    return {
        "run_id": config.run_id,
        "image_key": work.image_key,
        "variant": variant.name,
        "attempt": planned.attempts[index],
        "input_uri": f"{config.archive.rstrip('/')}/{work.image_key}",
        "input_version": work.version,
        "context_prompt": work.context_prompt,
        "target_prompt": variant.target_prompt,
        "model_id": config.model_id,
        "model_revision": config.model_revision,
        "config_sha256": config.config_sha256(work.context_prompt, variant.target_prompt),
        "seed": config.seed,
        "started_at": now,
        "finished_at": now,
        "software_version": __version__,
    }


def error_rows(
    config: RunConfig, planned: PlannedImage, status: str, error: BaseException, shared: Row | None = None
) -> list[Row]:
    """A row per variant of an image that could not be coloured."""
    what = {
        "status": status,
        "error_class": type(error).__name__,
        "error_message": str(error)[:2000],
        "finished_at": datetime.now(UTC),
    }
    return [base_row(config, planned, i) | (shared or {}) | what for i in range(len(planned.attempts))]


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


# ------------------------------------------------------------------ Ray


class ActorPool:
    """Actors to lend, one borrower each: so an actor has one image in flight, and a crash blames one image only."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for actor in actors:
            self._idle.put(actor)

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """An idle actor, waiting for one if need be."""
        actor = self._idle.get()
        try:
            yield actor
        finally:
            self._idle.put(actor)


@contextmanager
def ray_actors(
    config: RunConfig, *, num_actors: int, gpus_per_actor: float, ray_address: str | None
) -> Iterator[ActorPool]:
    """Actors with the model loaded; killed at the end, with the local Ray if it was started here.

    A Ray that is started here demands a token made for it alone: other users of the machine cannot
    reach it, and no token file is left in the home directory. For a cluster at `ray_address` the
    caller's RAY_AUTH_MODE and token hold. Ray reads these variables when it is imported: hence the
    late import, here and below.
    """
    if ray_address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if ray_address is None else {}
        ray.init(address=ray_address or "local", log_to_driver=False, logging_level="warning", **local)
    cores = int(ray.cluster_resources().get("CPU", 1))
    threads = max(1, cores // num_actors) if gpus_per_actor == 0 else None
    remote = ray.remote(ImageWorker).options(
        num_cpus=threads or 1, num_gpus=gpus_per_actor, max_restarts=-1, max_task_retries=0
    )
    actors = [remote.remote(config, threads) for _ in range(num_actors)]
    try:
        ray.get([actor.ready.remote() for actor in actors])
        yield ActorPool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
        if started_here:
            ray.shutdown()


def colorize_on(actor: Any, config: RunConfig, planned: PlannedImage) -> list[Row]:
    """Colour one image on an actor. Every outcome is rows: this raises only if no actor can be started.

    A dead actor is started again by Ray and the image tried again, up to `MAX_ATTEMPTS`; then the
    image is quarantined.
    """
    import ray

    if planned.work.problem is not None:
        return error_rows(config, planned, "quarantined", planned.work.problem)
    deaths = []
    for _ in range(MAX_ATTEMPTS):
        try:
            return list(ray.get(actor.colorize.remote(planned)))
        except ray.exceptions.RayTaskError as error:
            return error_rows(config, planned, "failed", error.cause)
        except ray.exceptions.RayActorError as error:
            deaths.append(error)
            # Wait until Ray has started it again. If no actor can be started, that is the run's failure.
            ray.get(actor.ready.options(max_task_retries=-1).remote())
    reason = f"its worker died {len(deaths)} times on this image, the last time with: {deaths[-1]}"
    return error_rows(config, planned, "quarantined", DeadlyImageError(reason))
