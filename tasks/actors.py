"""Workers as Ray actors: started, lent, given up, and what becomes of an image whose actor dies."""

import logging
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from tasks.colorize import ImageWorker
from tasks.local_ray import local_ray
from tasks.planning import PlannedImage, RunConfig
from tasks.rows import Row, error_rows

logger = logging.getLogger(__name__)
MAX_NODE_LOSSES = 20
"""How often an image is tried again because a whole machine was lost under it."""
NODE_LOSS_SECONDS = 30.0
"""Within which Ray notices that a machine is gone: it asks five times, every three seconds."""


class DeadlyImageError(RuntimeError):
    """An image that kills the process that works on it."""


class RunStoppedError(RuntimeError):
    """The run is being stopped: no more images are begun."""


class ActorGoneError(RuntimeError):
    """An actor died, or was killed, under an image.

    node_lost: with its machine, which is nobody's fault. out_of_memory: Ray killed it, as memory ran out.
    """

    def __init__(self, reason: str, node_lost: bool = False, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.node_lost, self.out_of_memory = node_lost, out_of_memory


class PooledActor:
    """An actor, and the node that it runs on now."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.node_id = ""
        self.given_up = False

    def colorize(self, planned: PlannedImage, timeout_seconds: float, smaller_because: str | None) -> list[Row]:
        """Its rows of the image. Raises ActorGoneError; Ray's RayTaskError with what the actor raised."""
        import ray

        try:
            return list(ray.get(self.handle.colorize.remote(planned, smaller_because), timeout=timeout_seconds))
        except ray.exceptions.GetTimeoutError:
            ray.kill(self.handle, no_restart=False)
            raise ActorGoneError(f"no result within {timeout_seconds:.0f} s (--image-timeout)") from None
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            reason = str(error).strip().partition("\n")[0]
            out_of_memory = isinstance(error, ray.exceptions.OutOfMemoryError)
            raise ActorGoneError(reason, self._lost_its_node(), out_of_memory) from None

    def _lost_its_node(self) -> bool:
        """Whether its machine is gone: known once Ray has started it again, or has missed the machine."""
        import ray

        started_again = [self.handle.ready.options(max_task_retries=-1).remote()]
        deadline = time.monotonic() + NODE_LOSS_SECONDS
        while not self.given_up and time.monotonic() < deadline:
            if ray.wait(started_again, timeout=1)[0]:
                break
        return not self.given_up and not any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes())


class ActorPool:
    """Actors to lend for one image each: so an actor has one image in flight, and a crash blames one image only.

    An actor is lent once its model is loaded, and again so after its death, when Ray has started it
    anew. The others work on meanwhile: nodes may join and leave.
    """

    def __init__(self, handles: list[Any]) -> None:
        self._actors = [PooledActor(handle) for handle in handles]
        self._free: deque[PooledActor] = deque()
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False
        for actor in self._actors:
            self._await_start(actor)

    def _await_start(self, actor: PooledActor) -> None:
        starting = actor.handle.ready.options(max_task_retries=-1).remote().future()
        starting.add_done_callback(partial(self._started, actor))

    def _started(self, actor: PooledActor, starting: Future[str]) -> None:
        error = starting.exception()
        with self._changed:
            if error is None:
                actor.node_id = starting.result()
                self._free.append(actor)
            elif not self._closed:
                logger.warning("an actor cannot be started: %s", error)
                self._failures.append(error)
            self._changed.notify_all()

    @contextmanager
    def borrow(self) -> Iterator[PooledActor]:
        """An idle actor, waiting for one if need be.

        Raises RunStoppedError once the pool is closed; what kept the last actor from starting if none is left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed or len(self._failures) == len(self._actors))
            if self._closed:
                raise RunStoppedError("the run is being stopped")
            if not self._free:
                raise self._failures[-1]
            actor = self._free.popleft()
        afterwards = self._give_back
        try:
            yield actor
        except ActorGoneError:
            afterwards = self._await_start
            raise
        finally:
            afterwards(actor)

    def _give_back(self, actor: PooledActor) -> None:
        with self._changed:
            self._free.append(actor)
            self._changed.notify_all()

    def pause(self, tries: int) -> None:
        """Before the next try: a random time that grows with their number, and ends when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=random.uniform(0, min(60, 2**tries)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For the time of a shard, its commits included: `close` waits for it."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self, wait_seconds: float = 60.0) -> None:
        """Kill the actors and wait until every user has committed what it had and gone."""
        import ray

        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for actor in self._actors:
            actor.given_up = True
            ray.kill(actor.handle)
        with self._changed:
            self._changed.wait_for(lambda: not self._users, timeout=wait_seconds)


@contextmanager
def ray_actors(
    config: RunConfig, *, num_actors: int, gpus_per_actor: float, ray_address: str | None
) -> Iterator[ActorPool]:
    """Actors that load the model; killed at the end, with the local Ray if it was started here.

    A Ray that is started here listens on loopback only (or else on all interfaces) and demands a token
    made for it alone: other users of the machine cannot reach it, and no token file is left in the home
    directory. For a cluster at `ray_address` the caller's RAY_AUTH_MODE and token hold. Ray reads these
    variables when it is imported: hence the late import, here and elsewhere in this file; a caller
    who has imported it has decided them.
    """
    if ray_address is None and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its only switch for loopback
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Threads that spin for long starve other processes of the machine; that never spin, the steps themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            address = ray_address or stack.enter_context(local_ray())
            on_sigterm = signal.getsignal(signal.SIGTERM)
            stack.callback(ray.shutdown)
            ray.init(address=address, log_to_driver=False, logging_level="warning")
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which ends the process
        resources = ray.cluster_resources()
        cores, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        if ray_address is None and num_actors * gpus_per_actor > gpus:
            raise ValueError(
                f"{num_actors} actors with {gpus_per_actor:g} GPUs each need more than the {gpus:g} GPUs of this "
                "machine: take fewer actors, or a share of a GPU for each, or a Ray cluster"
            )
        share = cores / num_actors  # below 1 they share cores: an actor that Ray cannot place is waited for without end
        threads = max(1, int(share)) if gpus_per_actor == 0 else None
        remote = ray.remote(ImageWorker).options(
            num_cpus=min(share, threads or 1), num_gpus=gpus_per_actor, max_restarts=-1, max_task_retries=0
        )
        pool = ActorPool([remote.remote(config, threads) for _ in range(num_actors)])
        stack.callback(pool.close)
        yield pool


def colorize_on(
    pool: ActorPool, config: RunConfig, planned: PlannedImage, image_timeout_seconds: float, max_attempts: int
) -> list[Row]:
    """Colour one image on an actor of the pool. Every outcome is rows, but for what `borrow` raises.

    An image whose actor dies is tried again, up to `max_attempts` times in all, at a smaller size if memory had run
    out; then it is quarantined with what happened each time. An image that takes longer than
    `image_timeout_seconds` has its actor killed, which counts as such a death; that of an actor whose node is
    lost does not.
    """
    import ray

    if planned.work.problem is not None:
        return error_rows(config, planned, "quarantined", planned.work.problem)
    deaths: list[str] = []
    losses = 0
    smaller_because: str | None = None
    while len(deaths) < max_attempts:
        if deaths or losses:
            pool.pause(len(deaths) + losses)
        try:
            with pool.borrow() as actor:
                return actor.colorize(planned, image_timeout_seconds, smaller_because)
        except ray.exceptions.RayTaskError as error:
            return error_rows(config, planned, "failed", error.cause)
        except ActorGoneError as gone:
            losses += gone.node_lost
            if not gone.node_lost or losses > MAX_NODE_LOSSES:
                deaths.append(str(gone))
            if gone.out_of_memory:
                smaller_because = str(gone)
    history = "; ".join(f"{number}. {death}" for number, death in enumerate(deaths, 1))
    reason = f"its worker died {len(deaths)} times on this image: {history}"
    return error_rows(config, planned, "quarantined", DeadlyImageError(reason))
