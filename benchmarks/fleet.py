"""A simulated fleet: one run of the real flow on nodes that join, die and are replaced.

python -m benchmarks.fleet --json benchmarks/results/scale.json            (15 minutes)

Each node is a Ray node on this machine with eight pretended GPUs and one sleeping actor per GPU. Nodes join
one by one, because the machine's cores bound how fast their processes start. Fails unless every image is
done exactly once and none is blamed for the loss of its node. Draws docs/fleet.png.
"""

import os
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import matplotlib
import numpy as np
import psutil
import typer

from benchmarks.fleet_worker import SLEEP_SECONDS, FleetWorker
from benchmarks.pipeline import make_archive
from support.record import record
from tasks.manifest import query
from tasks.storage import Store
from tasks.verify import verify

matplotlib.use("agg")
import matplotlib.pyplot as plt

GPUS_PER_NODE = 8
HOLD_SECONDS = 25.0
"""How long to measure after a node has joined before the next one joins."""


@dataclass
class Fleet:
    """The nodes, and when their number changed: (time, number of nodes)."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)

    def join(self) -> None:
        """Add a node and return when all its actors are at work."""
        self.nodes.append(self.cluster.add_node(num_cpus=GPUS_PER_NODE, num_gpus=GPUS_PER_NODE))
        while at_work() < GPUS_PER_NODE * len(self.nodes):
            time.sleep(0.5)
        self.events.append((time.time(), len(self.nodes)))

    def lose(self) -> None:
        """Kill the oldest node and return when its actors are gone."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.events.append((time.time(), len(self.nodes)))
        while at_work() > GPUS_PER_NODE * len(self.nodes):
            time.sleep(0.5)


def at_work() -> int:
    """How many actors have an image in flight: Ray names a process after the method it runs."""
    titles = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return sum(bool(title) and title[0].startswith("ray::FleetWorker.colorize") for title in titles)


def measure(num_nodes: int, num_images: int, num_losses: int) -> dict[str, Any]:
    """One run: nodes join up to `num_nodes`, then `num_losses` times one dies and a new one joins."""
    os.environ |= {"PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # Ray reads them on import
    from ray.cluster_utils import Cluster

    from flows.colorize_archive import colorize_archive
    from tasks import actors

    fleet = Fleet(Cluster(initialize_head=True, head_node_args={"num_cpus": 1}))
    with (
        patch.object(actors, "ImageWorker", FleetWorker),
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as thread,  # Ray adds nodes from the main thread only
    ):
        make_archive(Path(folder, "archive"), num_images)
        flow = thread.submit(
            colorize_archive,
            archive=f"{folder}/archive",
            output=f"{folder}/out",
            options={
                "device": "cuda",
                "ray_address": fleet.cluster.address,
                "num_actors": GPUS_PER_NODE * num_nodes,
                "gpus_per_actor": 1,
                "shard_size": 8,
                "max_attempts": 1,  # an image blamed for the loss of its node is quarantined
            },
        )
        for _ in range(num_nodes):
            fleet.join()
            time.sleep(HOLD_SECONDS)
        fleet.events.append((time.time(), num_nodes))
        for _ in range(num_losses):
            fleet.lose()
            fleet.join()
        assert not flow.done(), "too few images: the run was over before the last node had joined"
        summary = flow.result()
        store = Store(f"{folder}/out")
        rows = query(store, "select epoch(started_at), epoch(finished_at) from attempts").fetchall()
        findings = list(verify(store))
    fleet.cluster.shutdown()
    assert summary == {"ok": num_images, "quarantined": 0, "failed": 0, "done_before": 0}, summary
    assert len(rows) == num_images, "a row for each image, no more"
    assert findings == []
    started, finished = np.sort(np.array(rows).T)
    begin = float(started[0])
    holds = [(at + SLEEP_SECONDS, at + HOLD_SECONDS, num) for at, num in fleet.events[:num_nodes]]
    rates = [float(((finished > a) & (finished <= b)).sum() / (b - a)) for a, b, _ in holds]
    return {
        "images": num_images,
        "sleep_seconds": SLEEP_SECONDS,
        "nodes_lost_and_replaced": num_losses,
        "actors": [GPUS_PER_NODE * num for _, _, num in holds],
        "images_per_second": rates,
        "ideal_images_per_second": [GPUS_PER_NODE * num / SLEEP_SECONDS for _, _, num in holds],
        "events": [(at - begin, num) for at, num in fleet.events],
        "finished": (finished - begin).tolist(),
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Plot throughput against actors, and throughput over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    left.plot(figures["actors"], figures["ideal_images_per_second"], "--", color="gray", label="without any overhead")
    left.plot(figures["actors"], figures["images_per_second"], "o-", label="measured")
    left.set(xlabel="actors", ylabel="images a second", title=f"a sleep of {SLEEP_SECONDS:g} s an image")
    left.legend()
    finished = np.array(figures["finished"])
    moments = np.arange(0, finished.max(), 1.0)
    rate = [((finished > t - 5) & (finished <= t + 5)).sum() / 10 for t in moments]
    at, num = np.array(figures["events"]).T
    right.plot(moments, rate, label="images a second")
    right.step(at, num * GPUS_PER_NODE / SLEEP_SECONDS, "--", where="post", color="gray", label="what its actors allow")
    right.set(xlabel="seconds", title="nodes of eight join, die and are replaced")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(
    nodes: Annotated[int, typer.Option(help="Number of nodes, each with eight actors.")] = 8,
    images: Annotated[int, typer.Option(help="Images: enough to last until the last node has joined.")] = 6000,
    losses: Annotated[int, typer.Option(help="Nodes that die and are replaced.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
    picture: Annotated[Path, typer.Option(help="Write the plot to this file.")] = Path("docs/fleet.png"),
) -> None:
    """Run the fleet, plot it and record its figures."""
    figures = measure(nodes, images, losses)
    draw(figures, picture)
    del figures["finished"]
    record(json_file, "fleet", figures, "prefect", "ray")


if __name__ == "__main__":
    typer.run(main)
