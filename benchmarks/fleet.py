"""A simulated fleet: nodes with eight fake GPUs each, an actor that sleeps on every GPU, nodes that leave and join.

python -m benchmarks.fleet --json benchmarks/results/scale.json

The nodes are Ray nodes of this one machine, so its cores bound how fast 64 processes start, and the
figures show that nothing else does. Draws docs/fleet.png.
"""

import multiprocessing
import os
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import matplotlib
import numpy as np
import typer

from benchmarks.about import record
from benchmarks.pipeline import make_archive
from benchmarks.sleeper import SECONDS, SleepingWorker
from tasks.manifest import query
from tasks.storage import Store
from tasks.verify import verify

matplotlib.use("agg")
import matplotlib.pyplot as plt

GPUS_PER_NODE = 8
SLEEP_SECONDS = 5.0
NODE = {"num_cpus": GPUS_PER_NODE, "num_gpus": GPUS_PER_NODE}


def measure(num_actors: int, num_images: int, num_changes: int) -> dict[str, Any]:
    """One run on a fleet; `num_changes` times, once all actors work, a node dies and a new one joins."""
    os.environ |= {"PREFECT_LOGGING_LEVEL": "WARNING", SECONDS: str(SLEEP_SECONDS)}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read when Ray is imported
    from ray.cluster_utils import Cluster

    from flows.colorize_archive import colorize_archive
    from tasks import actors

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(num_actors // GPUS_PER_NODE)]
    changes: list[float] = []
    with (
        patch.object(actors, "ImageWorker", SleepingWorker),
        patch.object(actors, "MAX_ATTEMPTS", 1),  # an image blamed for the loss of its node would be quarantined
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as thread,  # Ray adds nodes from the main thread only
    ):
        make_archive(Path(folder, "archive"), num_images)
        flow = thread.submit(
            colorize_archive,
            archive=f"{folder}/archive",
            output=f"{folder}/out",
            ray_address=cluster.address,
            num_actors=num_actors,
            gpus_per_actor=1,
            shard_size=max(1, num_images // num_actors // 8),
        )
        pictures = Path(folder, "out/images")
        while not flow.done() and len(list(pictures.glob("*"))) < num_images // 2:
            time.sleep(1)
        for _ in range(num_changes):
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            changes.append(time.time())
            nodes.append(cluster.add_node(**NODE))
            wait([flow], timeout=6 * SLEEP_SECONDS)
        summary = flow.result()
        store = Store(f"{folder}/out")
        rows = query(store, "select epoch(started_at), epoch(finished_at) from attempts order by 1").fetchall()
        findings = list(verify(store))
    cluster.shutdown()
    assert summary == {"ok": num_images, "quarantined": 0, "failed": 0, "done_before": 0}, summary
    assert len(rows) == num_images, "a row for each image, no more"
    assert findings == []
    started, finished = np.array(rows).T
    return {
        "actors": num_actors,
        "images": num_images,
        "nodes_lost_and_replaced": len(changes),
        **throughput(started, finished, num_actors, min(changes, default=float("inf"))),
        "changes_at_seconds": [at - started.min() for at in changes],
        "started": (started - started.min()).tolist(),
        "finished": (finished - started.min()).tolist(),
    }


def throughput(started: np.ndarray, finished: np.ndarray, num_actors: int, until: float) -> dict[str, float]:
    """Images a second, while all actors work and before the first node is lost."""
    moments = np.sort(np.concatenate((started, finished)))
    at_work = np.searchsorted(np.sort(started), moments, "right") - np.searchsorted(np.sort(finished), moments, "right")
    full = moments[(at_work >= num_actors) & (moments < until)]
    begin, end = full.min(), full.max()
    num = int(((finished > begin) & (finished <= end)).sum())
    return {
        "full_seconds": float(end - begin),
        "images_per_second": num / (end - begin),
        "ideal_images_per_second": num_actors / SLEEP_SECONDS,
    }


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Throughput against actors; the largest run over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    num = [f["actors"] for f in figures]
    left.plot(num, [f["ideal_images_per_second"] for f in figures], "--", color="gray", label="no overhead at all")
    left.plot(num, [f["images_per_second"] for f in figures], "o-", label="measured")
    left.set(xlabel="actors", ylabel="images a second", title=f"{SLEEP_SECONDS:g} s an image")
    left.legend()
    last = figures[-1]
    started, finished = np.sort(last["started"]), np.sort(last["finished"])
    moments = np.arange(0, finished.max(), 1.0)
    at_work = np.searchsorted(started, moments, "right") - np.searchsorted(finished, moments, "right")
    right.plot(moments, at_work, label="images at work that are finished later")
    right.plot(
        moments, [((finished > t - 5) & (finished <= t + 5)).sum() / 10 for t in moments], label="images a second"
    )
    for number, at in enumerate(last["changes_at_seconds"]):
        label = f"{GPUS_PER_NODE} GPUs lost, {GPUS_PER_NODE} new" if number == 0 else None
        right.axvline(at, color="red", linewidth=0.8, label=label)
    right.set(xlabel="seconds", title=f"{last['actors']} actors; nodes leave and join")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(
    actors: Annotated[list[int] | None, typer.Option(help="Actors of a run, by eights; repeat it.")] = None,
    changes: Annotated[int, typer.Option(help="Nodes lost and replaced in the last run.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Put the figures here.")] = None,
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("docs/fleet.png"),
) -> None:
    """8, 16, 32 and 64 actors, unless told otherwise; each run in a process of its own."""
    figures = []
    sizes = actors or [8, 16, 32, 64]
    fresh = multiprocessing.get_context("spawn")
    for size in sizes:
        num_changes = changes if size == sizes[-1] else 0
        # While the processes start, one after the other, the first ones work already; then for a while all do.
        num_images = int(0.4 * size**2 + 20 * size + num_changes * 6 * size)
        with fresh.Pool(1) as pool:
            figures.append(pool.apply(measure, (size, num_images, num_changes)))
        print({name: value for name, value in figures[-1].items() if name not in ("started", "finished")}, flush=True)
    draw(figures, picture)
    for entry in figures:
        del entry["started"], entry["finished"]
    record(json_file, "fleet", figures, "prefect", "ray")


if __name__ == "__main__":
    typer.run(main)
