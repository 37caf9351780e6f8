"""Workers as Ray actors: how they are started, lent and replaced, and what happens to an image whose actor dies."""

import logging
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tasks.colorize import ImageWorker
from tasks.errors import AcceleratorFaultError
from tasks.local_ray import local_ray
from tasks.logs import about, relay
from tasks.options import MachineOptions
from tasks.progress import visible
from tasks.records import PlannedImage, RunConfig
from tasks.rows import Row, error_rows

logger = logging.getLogger(__name__)
MAX_NODE_LOSSES = 20
"""How many times an image is tried again because its actor's machine was lost."""
BATCHES_AT_A_TIME = 4
"""An actor takes so many batches together, so that photographs of one shape find each other."""
NODE_LOSS_SECONDS = 30.0
"""Ray needs up to this long to notice a lost machine: it asks five times, every three seconds."""


class DeadlyImageError(RuntimeError):
    """An image that kills the process that works on it."""


class RunStoppedError(RuntimeError):
    """The run is being stopped, so no more images are begun."""


class ActorGoneError(RuntimeError):
    """An actor died or was killed while it worked on an image or a batch.

    node_lost: its machine was lost, which is no image's fault. out_of_memory: Ray killed it to free memory.
    """

    def __init__(self, reason: str, node_lost: bool = False, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.node_lost, self.out_of_memory = node_lost, out_of_memory


class PooledActor:
    """An actor, with the node that it runs on now."""

    def __init__(self, handle: Any, *, keeps_logs: bool = False) -> None:
        self.handle = handle
        self.keeps_logs = keeps_logs
        self.node_id = ""
        self.given_up = False

    def colorize(self, planned: PlannedImage, timeout_seconds: float, smaller_because: str | None) -> list[Row]:
        """The image's rows. Raises ActorGoneError, or Ray's RayTaskError with the error that the actor raised."""
        import ray

        rows = self.handle.colorize.remote(planned, smaller_because)
        with self._at_work(timeout_seconds):
            return list(ray.get(rows, timeout=timeout_seconds))

    def colorize_batch(self, images: Sequence[PlannedImage], timeout_seconds: float) -> Iterator[tuple[int, list[Row]]]:
        """The position and the rows of each image as it is done, each within the timeout. Raises as `colorize` does."""
        import ray

        stream = self.handle.colorize_batch.options(num_returns="streaming").remote(images)
        with self._at_work(timeout_seconds):
            while ray.wait([stream], timeout=timeout_seconds)[0]:
                try:
                    done = next(stream)
                except StopIteration:
                    return
                yield ray.get(done)
            raise ray.exceptions.GetTimeoutError

    @contextmanager
    def _at_work(self, timeout_seconds: float) -> Iterator[None]:
        """Held while the actor works: raises ActorGoneError if it dies or is too slow, and relays what it has logged.

        An actor whose GPU has failed counts as gone: its process ends when it is next asked whether it is ready.
        """
        import ray

        logs = self.handle.take_logs.remote() if self.keeps_logs else None  # it waits behind the work
        try:
            yield
        except ray.exceptions.GetTimeoutError:
            ray.kill(self.handle, no_restart=False)
            raise ActorGoneError(f"no result within {timeout_seconds:.0f} s (--image-timeout)") from None
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, AcceleratorFaultError):
                raise
            raise ActorGoneError(f"its GPU failed: {error.cause}") from None
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            reason = str(error).strip().partition("\n")[0]
            out_of_memory = isinstance(error, ray.exceptions.OutOfMemoryError)
            raise ActorGoneError(reason, self._lost_its_node(), out_of_memory) from None
        finally:
            if logs is not None:
                with suppress(ray.exceptions.RayError):  # a killed actor has taken its logs with it
                    relay(ray.get(logs, timeout=10))

    def _lost_its_node(self) -> bool:
        """Whether its machine is gone. Ray knows once it has restarted the actor, or has missed the machine."""
        import ray

        started_again = [self.handle.ready.options(max_task_retries=-1).remote()]
        deadline = time.monotonic() + NODE_LOSS_SECONDS
        while not self.given_up and time.monotonic() < deadline:
            if ray.wait(started_again, timeout=1)[0]:
                break
        return not self.given_up and not any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes())


class ActorPool:
    """Lends each actor to one image or one batch at a time, so a crash implicates no others.

    An actor is lent once its model is loaded. When it dies, Ray restarts it, and it is lent again once its model is
    loaded again; the other actors work on meanwhile. Nodes may join and leave.
    """

    def __init__(self, handles: list[Any], *, keep_logs: bool = False) -> None:
        self.num_actors = len(handles)
        self._actors = [PooledActor(handle, keeps_logs=keep_logs) for handle in handles]
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
                if actor.keeps_logs:  # of loading the model, before it has an image
                    actor.handle.take_logs.remote().future().add_done_callback(_relay_result)
                actor.node_id = starting.result()
                self._free.append(actor)
            elif not self._closed:
                logger.warning("an actor cannot be started: %s", error)
                self._failures.append(error)
            self._changed.notify_all()

    @contextmanager
    def borrow(self) -> Iterator[PooledActor]:
        """An idle actor. Waits until there is one.

        Raises RunStoppedError once the pool is closed. If no actor could be started, raises what kept the last one.
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
        """Wait before the next try: a random time that grows with their number and ends when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=random.uniform(0, min(60, 2**tries)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by a shard until its last commit: `close` waits for it."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self, wait_seconds: float = 60.0) -> None:
        """Kill the actors, then wait until every shard has committed what is finished."""
        import ray

        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for actor in self._actors:
            actor.given_up = True
            ray.kill(actor.handle)
        with self._changed:
            self._changed.wait_for(lambda: not self._users, timeout=wait_seconds)


def _relay_result(logs: Future[list[dict[str, Any]]]) -> None:
    if logs.exception() is None:
        relay(logs.result())


def placement(options: MachineOptions, num_gpus: float) -> tuple[int, float]:
    """(number of actors, GPUs of each) on machines with so many GPUs; 0 GPUs each means the CPU.

    Raises ValueError for a device that is not there, and for options that contradict each other.
    """
    device, num_actors, share = options.device, options.num_actors, options.gpus_per_actor
    if device == "auto":
        device = "cuda" if share or (share is None and num_gpus > 0) else "cpu"
    if device == "cpu":
        if share:
            raise ValueError(f"--device cpu and --gpus-per-actor {share:g} contradict each other: leave one out")
        return num_actors or 1, 0.0
    if share == 0:
        raise ValueError("--device cuda and --gpus-per-actor 0 contradict each other: leave one out")
    if num_gpus == 0 and share is None:
        raise ValueError("--device cuda: Ray sees no GPU here; give --device cpu, or --ray-address of a cluster")
    if num_actors is None:
        num_actors = max(1, int(num_gpus / (share or 1)))
    return num_actors, min(1.0, num_gpus / num_actors) if share is None else share


@contextmanager
def ray_actors(config: RunConfig) -> Iterator[ActorPool]:
    """Actors that load the model. They are killed at the end, and so is the local Ray if it was started here.

    A Ray that is started here listens on loopback only, as it would otherwise listen on all interfaces, and demands
    a token made for it alone: other users of the machine cannot reach it, and no token file is left in the home
    directory. On a cluster at `ray_address` the caller's RAY_AUTH_MODE and token hold. Ray reads these variables
    when it is imported, hence the late imports in this file; a caller who has imported Ray has decided them.
    """
    options = config.options
    if options.ray_address is None and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its only switch for loopback
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Long spin-waits starve other processes; none at all slows each step.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            address = options.ray_address or stack.enter_context(local_ray(options.metrics_port))
            on_sigterm = signal.getsignal(signal.SIGTERM)
            stack.callback(ray.shutdown)
            ray.init(address=address, log_to_driver=False, logging_level="warning")
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray has installed its own, which ends the process
        resources = ray.cluster_resources()
        cores, num_gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        if options.ray_address is None:
            num_gpus = min(num_gpus, torch.cuda.device_count())  # none that torch cannot use
        num_actors, share = placement(options, num_gpus)
        if options.ray_address is None and num_actors * share > num_gpus:
            raise ValueError(
                f"{num_actors} actors with {share:g} GPUs each need more than the {num_gpus:g} GPUs of this "
                "machine: take fewer actors, or a share of a GPU for each, or a Ray cluster"
            )
        # Below one core each, actors share cores. Ray would wait forever to place an actor that asks for more.
        cores_each = cores / num_actors
        threads = max(1, int(cores_each)) if share == 0 else None
        remote = ray.remote(ImageWorker).options(
            num_cpus=min(cores_each, threads or 1), num_gpus=share, max_restarts=-1, max_task_retries=0
        )
        config = replace(config, device="cuda" if share else "cpu")
        handles = [remote.remote(config, threads) for _ in range(num_actors)]
        pool = ActorPool(handles, keep_logs=options.log_format == "json")
        stack.callback(pool.close)
        yield pool


def colorize_all_on(
    pool: ActorPool, config: RunConfig, images: Sequence[PlannedImage]
) -> Iterator[tuple[PlannedImage, list[Row]]]:
    """Colorize images on actors of the pool, one by one or in batches; gives each with its rows as it is done.

    What a batch has left undone is tried one by one: see `colorize_on`, which also says what is raised.
    """
    at_a_time = BATCHES_AT_A_TIME * config.options.batch
    for start in range(0, len(images), at_a_time):
        left = list(images[start : start + at_a_time])
        if config.options.batch > 1:
            for planned, rows in _colorize_together_on(pool, config, [p for p in left if p.work.problem is None]):
                left.remove(planned)
                yield planned, rows
        for planned in left:
            with about(image=planned.work.image_key, attempt=max(planned.attempts)):
                rows = colorize_on(pool, config, planned)
            yield planned, rows


def _colorize_together_on(
    pool: ActorPool, config: RunConfig, images: Sequence[PlannedImage]
) -> Iterator[tuple[PlannedImage, list[Row]]]:
    """Images with their rows, as an actor fits them in batches, until all are done or the actor dies.

    The death is held against no image, as it is unknown whose fault it was. After the loss of a node another actor
    goes on with what is left.
    """
    import ray

    left = dict(enumerate(images))
    losses = 0
    while len(left) > 1 and losses <= MAX_NODE_LOSSES:
        numbers = list(left)
        try:
            with pool.borrow() as actor:
                for position, rows in actor.colorize_batch(list(left.values()), _timeout_seconds(config)):
                    yield left.pop(numbers[position]), rows
            return
        except ray.exceptions.RayTaskError as error:
            reason, node_lost = str(error.cause), False
        except ActorGoneError as gone:
            reason, node_lost = str(gone), gone.node_lost
        logger.warning("the worker of a batch is gone, %d images are left: %s", len(left), reason)
        if not node_lost:
            return
        losses += 1
        pool.pause(losses)


def _timeout_seconds(config: RunConfig) -> float:
    """How long an actor may need for one batch; of an image alone as well, as it shares its batch with copies."""
    return config.options.image_timeout_seconds * config.options.batch


def colorize_on(pool: ActorPool, config: RunConfig, planned: PlannedImage) -> list[Row]:
    """Colorize one image on an actor of the pool. Every outcome is rows, except for what `borrow` raises.

    If the actor dies, the image is tried again, up to `max_attempts` times in all, at a smaller size if memory had
    run out. Then it is quarantined with what happened each time. An image that takes longer than
    `image_timeout_seconds` (times the batch) has its actor killed, which counts as a death. A lost node does not count.
    """
    import ray

    if planned.work.problem is not None:
        return error_rows(config, planned, "quarantined", planned.work.problem)
    deaths: list[str] = []
    losses = 0
    smaller_because: str | None = None
    while len(deaths) < config.options.max_attempts:
        if deaths or losses:
            pool.pause(len(deaths) + losses)
        try:
            with pool.borrow() as actor:
                return actor.colorize(planned, _timeout_seconds(config), smaller_because)
        except ray.exceptions.RayTaskError as error:
            return error_rows(config, planned, "failed", error.cause)
        except ActorGoneError as gone:
            logger.warning("the worker of %s is gone: %s", visible(planned.work.image_key), gone)
            losses += gone.node_lost
            if not gone.node_lost or losses > MAX_NODE_LOSSES:
                deaths.append(str(gone))
            if gone.out_of_memory:
                smaller_because = str(gone)
    history = "; ".join(f"{number}. {death}" for number, death in enumerate(deaths, 1))
    reason = f"its worker died {len(deaths)} times on this image: {history}"
    return error_rows(config, planned, "quarantined", DeadlyImageError(reason))
