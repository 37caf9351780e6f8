"""Workers as Ray actors: started, lent, given up, and what becomes of an image whose actor dies."""

import os
import secrets
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks.colorize import ImageWorker, Row, error_rows
from tasks.planning import PlannedImage, RunConfig

MAX_ATTEMPTS = 3
"""How often an image may kill its actor before it is quarantined."""
MAX_NODE_LOSSES = 20
"""How often an image is tried again because a whole machine was lost under it."""


class DeadlyImageError(RuntimeError):
    """An image that kills the process that works on it."""


class RunStoppedError(RuntimeError):
    """The run is being stopped: no more images are begun."""


class PooledActor:
    """An actor, and the node that it runs on now."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.node_id = ""
        self.given_up = False

    def wait_until_ready(self) -> None:
        """Return once the model is loaded, after a restart too.

        Raises RunStoppedError if the actor was given up, Ray's error if it cannot be started.
        """
        import ray

        try:
            self.node_id = ray.get(self.handle.ready.options(max_task_retries=-1).remote())
        except ray.exceptions.RayActorError:
            if self.given_up:
                raise RunStoppedError("the run is being stopped") from None
            raise

    def give_up(self) -> None:
        """Kill it for good."""
        import ray

        self.given_up = True
        ray.kill(self.handle)

    def lost_its_node(self) -> bool:
        """Whether the machine that it ran on is gone: then its death is nobody's fault."""
        import ray

        return not any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes())


class ActorPool:
    """Actors to lend, one borrower each: so an actor has one image in flight, and a crash blames one image only."""

    def __init__(self, handles: list[Any]) -> None:
        self.actors = [PooledActor(handle) for handle in handles]
        self._free = deque(self.actors)
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def borrow(self) -> Iterator[PooledActor]:
        """An idle actor, waiting for one if need be. Raises RunStoppedError once the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise RunStoppedError("the run is being stopped")
            actor = self._free.popleft()
        try:
            yield actor
        finally:
            with self._changed:
                self._free.append(actor)
                self._changed.notify_all()

    def close(self, wait_seconds: float = 60.0) -> None:
        """Give the actors up and wait until every borrower has committed what it had and gone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for actor in self.actors:
            actor.give_up()
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == len(self.actors), timeout=wait_seconds)


@contextmanager
def ray_actors(
    config: RunConfig, *, num_actors: int, gpus_per_actor: float, ray_address: str | None
) -> Iterator[ActorPool]:
    """Actors with the model loaded; killed at the end, with the local Ray if it was started here.

    A Ray that is started here demands a token made for it alone: other users of the machine cannot
    reach it, and no token file is left in the home directory. For a cluster at `ray_address` the
    caller's RAY_AUTH_MODE and token hold. Ray reads these variables when it is imported: hence the
    late import, here and elsewhere in this file.
    """
    if ray_address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Threads that spin for long starve other processes of the machine; that never spin, the steps themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if ray_address is None else {}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(address=ray_address or "local", log_to_driver=False, logging_level="warning", **local)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which ends the process
    resources = ray.cluster_resources()
    cores, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    if ray_address is None and num_actors * gpus_per_actor > gpus:
        if started_here:
            ray.shutdown()
        raise ValueError(
            f"{num_actors} actors with {gpus_per_actor:g} GPUs each need more than the {gpus:g} GPUs of this machine: "
            "take fewer actors, or a share of a GPU for each, or a Ray cluster"
        )
    share = cores / num_actors  # below 1, actors share cores: one that Ray cannot place would be waited for without end
    threads = max(1, int(share)) if gpus_per_actor == 0 else None
    num_cpus = min(share, threads or 1)
    remote = ray.remote(ImageWorker).options(
        num_cpus=num_cpus, num_gpus=gpus_per_actor, max_restarts=-1, max_task_retries=0
    )
    pool = ActorPool([remote.remote(config, threads) for _ in range(num_actors)])
    try:
        for actor in pool.actors:
            actor.wait_until_ready()
        yield pool
    finally:
        pool.close()
        if started_here:
            ray.shutdown()


def colorize_on(
    actor: PooledActor, config: RunConfig, planned: PlannedImage, image_timeout_seconds: float
) -> list[Row]:
    """Colour one image on an actor. Every outcome is rows, but for RunStoppedError and an actor that cannot be started.

    A dead actor is started again by Ray and the image tried again, up to `MAX_ATTEMPTS`; then the
    image is quarantined with what happened each time. An image that takes longer than
    `image_timeout_seconds` has its actor killed, which counts as such a death; that of an actor whose
    node is lost does not.
    """
    import ray

    if planned.work.problem is not None:
        return error_rows(config, planned, "quarantined", planned.work.problem)
    deaths: list[str] = []
    losses = 0
    while len(deaths) < MAX_ATTEMPTS:
        try:
            reference = actor.handle.colorize.remote(planned)
            done, _ = ray.wait([reference], timeout=image_timeout_seconds)
            if done:
                return list(ray.get(reference))
            ray.kill(actor.handle, no_restart=False)
            deaths.append(f"no result within {image_timeout_seconds:.0f} s (--image-timeout)")
        except ray.exceptions.RayTaskError as error:
            return error_rows(config, planned, "failed", error.cause)
        except ray.exceptions.RayActorError as error:
            if losses < MAX_NODE_LOSSES and actor.lost_its_node():
                losses += 1
            else:
                deaths.append(str(error).strip().partition("\n")[0])
        actor.wait_until_ready()  # Ray starts it again
    history = "; ".join(f"{number}. {death}" for number, death in enumerate(deaths, 1))
    reason = f"its worker died {len(deaths)} times on this image: {history}"
    return error_rows(config, planned, "quarantined", DeadlyImageError(reason))
