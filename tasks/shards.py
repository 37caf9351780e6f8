"""The Prefect task `colorize-shard`: one task run for each shard, one row in the manifest for each variant."""

import time
from collections import Counter
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from tasks.actors import ActorPool, RunStoppedError, colorize_all_on
from tasks.lease import Lease
from tasks.logs import about
from tasks.manifest import commit_part
from tasks.progress import RunProgress
from tasks.records import RunConfig, Shard
from tasks.rows import Row
from tasks.storage import Store

COMMIT_SECONDS = 300.0
"""A part is committed after this long even if it holds fewer images than `commit_every`."""


@task(name="colorize-shard", task_run_name="shard-{shard.number}", cache_policy=NO_CACHE)
def colorize_shard(
    shard: Shard, config: RunConfig, lease: Lease, pool: ActorPool, progress: RunProgress
) -> Counter[str] | State[Any]:
    """Colorize a shard's images and commit their rows in parts, as they are done; count the variants by status."""
    output = Store(config.options.output)
    counts: Counter[str] = Counter()
    pending: list[Row] = []
    number, committed_at = 0, time.monotonic()

    def commit() -> None:
        nonlocal committed_at
        lease.check()
        commit_part(output, f"{config.generation:06d}-{shard.number:06d}-{number:05d}", pending)
        pending.clear()
        committed_at = time.monotonic()

    try:
        with pool.in_use(), about(shard=shard.number):
            try:
                for number, (planned, rows) in enumerate(colorize_all_on(pool, config, shard.images), 1):
                    with about(image=planned.work.image_key, attempt=max(planned.attempts)):
                        pending += rows
                        counts.update(row["status"] for row in rows)
                        progress.image_done(rows)
                    due = time.monotonic() - committed_at > COMMIT_SECONDS
                    if number % config.options.commit_every == 0 or due:
                        commit()
            finally:  # a run that is stopped keeps what is finished
                if pending:
                    commit()
    except RunStoppedError as error:
        return Cancelled(message=str(error))
    return counts
