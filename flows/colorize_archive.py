"""The flow `colorize-archive`: a folder of scans to colorized images and a manifest."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.states import Cancelled
from pydantic import Field

from diffcolor_core.config import preset as settings_preset
from diffcolor_core.models import identify
from flows.stopping import mark_crashed
from tasks.actors import ActorPool, RunStoppedError, colorize_on, ray_actors
from tasks.archive import COLUMNS, RECOLOR_COLUMNS, read_catalog
from tasks.layout import part_name
from tasks.lease import Lease, hold_output
from tasks.manifest import commit_part, publish_results
from tasks.planning import RunConfig, Shard, open_plan, output_below, shard_sizes
from tasks.progress import RunProgress
from tasks.storage import Store

COMMIT_SECONDS = 300.0
"""A part is committed after so long even if it holds few images."""
MAX_TASK_RUNS = 1000
"""Of one flow run: Prefect's server and pages become slow with thousands."""

SPARE_SHARDS = 2
"""In work beyond one for each actor: they have an image ready while another commits, or ends."""

ShardFuture = PrefectFuture[Any]  # of a Counter: variants by status
AtLeastOne = Annotated[int, Field(ge=1)]


@task(name="colorize-shard", task_run_name="shard-{shard.number}", cache_policy=NO_CACHE)
def colorize_shard(
    shard: Shard,
    config: RunConfig,
    lease: Lease,
    pool: ActorPool,
    progress: RunProgress,
    commit_every: int,
    image_timeout_seconds: float,
    max_attempts: int,
) -> Counter[str] | State[Any]:
    """Colour a shard's images, one after the other, and commit their rows in parts; the variants by status."""
    output = Store(config.output)
    counts: Counter[str] = Counter()
    pending: list[dict[str, Any]] = []
    number, committed_at = 0, time.monotonic()

    def commit() -> None:
        nonlocal committed_at
        lease.check()
        commit_part(output, part_name(config.generation, shard.number, number), pending)
        pending.clear()
        committed_at = time.monotonic()

    try:
        with pool.in_use():
            try:
                for number, planned in enumerate(shard.images, 1):
                    rows = colorize_on(pool, config, planned, image_timeout_seconds, max_attempts)
                    pending += rows
                    counts.update(row["status"] for row in rows)
                    progress.image_done(rows)
                    if number % commit_every == 0 or time.monotonic() - committed_at > COMMIT_SECONDS:
                        commit()
            finally:  # also when the run is stopped: what is finished is kept
                if pending:
                    commit()
    except RunStoppedError as error:
        return Cancelled(message=str(error))
    return counts


@flow(name="colorize-range", validate_parameters=False)
def colorize_range(submit_next: Callable[[], ShardFuture | None], num_actors: int) -> Counter[str]:
    """Work through up to `MAX_TASK_RUNS` shards, at a time a few more than actors; the variants by status.

    submit_next submits the next shard, and returns None when there is none left.
    """
    counts: Counter[str] = Counter()
    active: set[ShardFuture] = set()
    for _ in range(MAX_TASK_RUNS):
        if len(active) == num_actors + SPARE_SHARDS:
            counts += _first_result(active)
        future = submit_next()
        if future is None:
            break
        active.add(future)
    while active:
        counts += _first_result(active)
    return counts


def _first_result(active: set[ShardFuture]) -> Counter[str]:
    """The result of the shard that ends first; it is active no more."""
    finished = next(iter(as_completed(list(active))))
    active.remove(finished)
    return finished.result()


@flow(name="colorize-archive")
def colorize_archive(
    archive: str,
    output: str,
    catalog: str | None = None,
    prompt: str | None = None,
    model: str = "demo",
    preset: str = "demo",
    num_actors: AtLeastOne = 1,
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0,
    ray_address: str | None = None,
    shard_size: AtLeastOne = 32,
    limit: AtLeastOne | None = None,
    seed: int = 0,
    image_format: Literal["png", "tiff"] = "png",
    access_copy: Literal["jpeg", "webp"] | None = None,
    run_id: str | None = None,
    keep_fits: bool = True,
    retry: Literal["failed", "quarantined"] = "failed",
    commit_every: AtLeastOne = 8,
    image_timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0,
    max_attempts: AtLeastOne = 3,
    overrides: dict[str, Any] | None = None,
    whole_archive: bool = True,
) -> dict[str, int]:
    """Colorize what the manifest does not have yet; return how many variants there are now by status.

    The keys are ok, quarantined and failed, and done_before: how many of them earlier runs had done.

    Args:
        archive: fsspec URL of the folder of scans.
        output: fsspec URL of the folder for images and manifest.
        catalog: URL of the catalog (CSV, JSONL or Parquet); by default catalog.csv in the archive.
        prompt: Context prompt of images that the catalog has none for.
        model: "demo", a diffusers folder, or "owner/name@commit".
        preset: Settings of the method, "demo" or "paper".
        num_actors: Ray actors, one image in flight on each.
        gpus_per_actor: GPUs of each actor; 0 runs on the CPU.
        ray_address: Address of a Ray cluster; by default a local Ray for this run.
        shard_size: Images per Prefect task.
        limit: Only the first so many images.
        seed: Seed of every image's random draws.
        image_format: Of the colorized pictures, "png" or "tiff": lossless, at the scan's bit depth.
        access_copy: "jpeg" or "webp" for a small lossy copy beside each picture.
        run_id: Name of the run in the manifest; by default its start time.
        keep_fits: Keep each fit beside the images, so that later prompts need no fitting.
        retry: What is tried again besides what is not done: "failed", or "quarantined" as well.
        commit_every: Images per manifest part: what a crash may lose of a shard's work.
        image_timeout_seconds: Kill an image's actor after so long: a decoder or a driver may hang.
        max_attempts: How often an image may kill its actor before it is quarantined.
        overrides: Settings that differ from the preset's, by path: {"stage2.adapter_rank": 4}.
        whole_archive: Off, only the images that the catalog names.
    """
    logger = get_run_logger()
    # 1. open the run
    source, target = Store(archive), Store(output)
    if model != "demo" and os.path.isdir(model):
        model = os.path.abspath(model)  # like the stores' addresses: for actors, and for `recolor` from elsewhere
    model_id, model_revision = identify(model)
    config = RunConfig(
        run_id=run_id or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
        archive=source.address,
        output=target.address,
        model=model,
        model_id=model_id,
        model_revision=model_revision,
        preset=preset,
        settings=settings_preset(preset, overrides),
        overrides=overrides,
        seed=seed,
        device="cuda" if gpus_per_actor > 0 else "cpu",
        image_format=image_format,
        access_copy=access_copy,
        keep_fits=keep_fits,
    )
    if not source.exists():
        raise FileNotFoundError(f"there is no archive at {archive!r}")
    output_below(source, target)  # before anything is written
    rows = read_catalog(source, catalog, required=COLUMNS[:2] if whole_archive else RECOLOR_COLUMNS)
    record = config.record() | {"flow_run_id": flow_run.id}
    with hold_output(target, record, after=publish_results) as lease:
        config = replace(config, generation=lease.generation)
        if lease.took_over and lease.took_over.get("flow_run_id"):
            mark_crashed(lease.took_over["flow_run_id"], f"taken over by run {config.run_id}: its process is dead")
        target.sweep()
        # 2. list the archive, join the catalog, leave out what is done
        with open_plan(
            *(source, target, config, rows),
            prompt=prompt,
            limit=limit,
            retry_quarantined=retry == "quarantined",
            whole_archive=whole_archive,
        ) as plan:
            counts: Counter[str] = Counter(plan.done_before)
            done_before = counts.total()
            logger.info("run %s: %d images to do, %d variants done before", config.run_id, plan.num_images, done_before)
            # 3. one task per shard, as many at a time as there are actors
            if plan.num_images:
                with (
                    ray_actors(
                        config, num_actors=num_actors, gpus_per_actor=gpus_per_actor, ray_address=ray_address
                    ) as pool,
                    RunProgress(plan.num_images, logger) as progress,
                ):
                    how = (config, lease, pool, progress, commit_every, image_timeout_seconds, max_attempts)
                    waiting = plan.shards(shard_size, num_actors)

                    def submit_next() -> ShardFuture | None:
                        shard = next(waiting, None)
                        return None if shard is None else colorize_shard.submit(shard, *how)

                    # Beyond MAX_TASK_RUNS shards each range of them is a child flow.
                    num_shards = sum(1 for _ in shard_sizes(plan.num_images, shard_size, num_actors))
                    num_ranges = math.ceil(num_shards / MAX_TASK_RUNS)
                    work_through = colorize_range if num_ranges > 1 else colorize_range.fn
                    for _ in range(num_ranges):
                        counts += work_through(submit_next, num_actors)
        # 4. summary
        summary = {status: counts[status] for status in ("ok", "quarantined", "failed")} | {"done_before": done_before}
        lease.end({"status": "finished", **summary} if plan.num_images else None)
    logger.info("run %s: %s", config.run_id, summary)
    return summary
