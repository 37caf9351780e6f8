"""The flow `colorize-archive`: from a folder of scans to colorized pictures and a manifest."""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed
from rich.console import Console

from flows.monitoring import Watched, name_of_run, notify_of_failure, watched
from flows.stopping import stopping_after
from tasks.actors import ray_actors
from tasks.captions import caption_run
from tasks.lease import hold_output
from tasks.logs import log_as_json
from tasks.manifest import publish_results
from tasks.metrics import RunMetrics
from tasks.options import RunOptions, flow_parameters
from tasks.planning import shard_sizes
from tasks.progress import Logger, RunProgress, captions_shown
from tasks.report import write_report
from tasks.runs import Run, open_run
from tasks.shards import colorize_shard
from tasks.storage import Store

MAX_TASK_RUNS = 1000
"""Of one flow run: Prefect's server and its pages become slow with thousands."""
SPARE_SHARDS = 2
"""Extra shards in flight, so that actors stay busy during commits."""

ShardFuture = PrefectFuture[Any]  # of a Counter: variants by status


@flow(
    name="colorize-archive",
    flow_run_name=name_of_run,
    on_failure=[notify_of_failure],
    on_crashed=[notify_of_failure],
)
@flow_parameters(RunOptions)
def colorize_archive(options: RunOptions) -> dict[str, int]:
    """Colorize what the manifest does not have yet; return how many variants there are now by status.

    The keys are ok, quarantined and failed, and done_before: how many of them earlier runs had done.
    """
    with open_run(options) as run, watched(run.config) as watch:
        return colorize(run, watch)


def colorize(run: Run, watch: Watched) -> dict[str, int]:
    """Do what a run has been opened for, in the flow that calls this; return its summary."""
    if run.config.options.log_format == "json":
        log_as_json(run.config.run_id)
    logger = get_run_logger()
    config, plan, target = run.config, run.plan, Store(run.config.options.output)
    if deployment.id and target.is_local and not os.path.isabs(run.asked.output):
        raise ValueError(
            f"output {run.asked.output!r} is relative to the worker's folder, which is deleted after the run: "
            "give an absolute path or a URL"
        )
    # 1. hold the output, alone
    record = config.record() | {"flow_run_id": flow_run.id}
    holding = hold_output(target, record, after=publish_results)
    with holding as lease, stopping_after(config.options.max_hours):
        config = replace(config, generation=lease.generation)
        if lease.took_over and lease.took_over.get("flow_run_id"):
            _mark_crashed(lease.took_over["flow_run_id"], f"taken over by run {config.run_id}: its process is dead")
        target.sweep()
        # 2. caption what nobody has, if asked to; list the archive, join the catalog, leave out what is done
        if config.options.caption is not None:
            with captions_shown(Console(stderr=True, quiet=not logger.isEnabledFor(logging.WARNING)), logger) as show:
                plan.replace_catalog(caption_run(config.options, show))
        plan.fill(config)
        counts: Counter[str] = Counter(plan.done_before)
        done_before = counts.total()
        logger.info("run %s: %d images to do, %d variants done before", config.run_id, plan.num_images, done_before)
        # 3. one task per shard, a few more at a time than there are actors
        if plan.num_images:
            with ExitStack() as stack:
                pool = stack.enter_context(ray_actors(config))
                metrics = RunMetrics(config.run_id, plan.num_images)
                progress = stack.enter_context(watch.showing(RunProgress(plan.num_images, logger, metrics)))
                cut = (config.options.shard_size, pool.num_actors, config.options.batch)
                waiting = plan.shards(*cut)

                def submit_next() -> ShardFuture | None:
                    shard = next(waiting, None)
                    return None if shard is None else colorize_shard.submit(shard, config, lease, pool, progress)

                # More than MAX_TASK_RUNS shards are divided among child flows.
                num_shards = sum(1 for _ in shard_sizes(plan.num_images, *cut))
                num_ranges = math.ceil(num_shards / MAX_TASK_RUNS)
                work_through = colorize_range if num_ranges > 1 else colorize_range.fn
                for _ in range(num_ranges):
                    counts += work_through(submit_next, pool.num_actors)
        # 4. summary
        summary = {status: counts[status] for status in ("ok", "quarantined", "failed")} | {"done_before": done_before}
        lease.end({"status": "finished", **summary} if plan.num_images else None)
        watch.summary = summary
    # 5. the report, once the output is free again
    if config.options.report and plan.num_images:
        _report(target, logger)
    logger.info("run %s: %s", config.run_id, summary)
    return summary


def _report(output: Store, logger: Logger) -> None:
    """Write the report. If that fails the run has succeeded all the same, and the log says how to write it."""
    try:
        done = write_report(output)
    except Exception as error:
        logger.error("no report (%s: %s): write it with `diffcolor report %s`", type(error).__name__, error, output.url)
        return
    logger.info(
        "report: %s (%d files pictured, %d cannot be shown)", done.address, done.made.num_pictures, done.made.num_unseen
    )


@flow(name="colorize-range", validate_parameters=False)
def colorize_range(submit_next: Callable[[], ShardFuture | None], num_actors: int) -> Counter[str]:
    """Work through up to `MAX_TASK_RUNS` shards, a few more at a time than actors; count the variants by status.

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
    """The result of the shard that ends first, which is then no longer active."""
    finished = next(iter(as_completed(list(active))))
    active.remove(finished)
    return finished.result()


def _mark_crashed(flow_run_id: str, reason: str) -> None:
    """Tell Prefect that a flow run is dead. A killed process cannot, so its run would stay "Running" forever."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except ObjectNotFound:  # a run of another Prefect server
            return
        if state is None or not state.is_final():
            client.set_flow_run_state(UUID(flow_run_id), Crashed(message=reason), force=True)
