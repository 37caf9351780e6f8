"""The faults. Each one is injected into runs over an archive, which is then resumed without faults and counted."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from support.poison import BALLOON, HANG, SEGFAULT
from support.proxy import faulty_proxy
from support.runs import Bench, Reckoning, Run, committed
from support.waiting import wait_until
from tasks.layout import run_end
from tasks.lease import last_generation
from tasks.manifest import query
from tasks.storage import Store

Fault = Callable[[Bench, str, int, random.Random], Reckoning]
LOCAL, S3 = "local", "s3"
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {}
"""By name: the function that injects it, and the stores on which it does."""


class NotHereError(RuntimeError):
    """A fault that cannot be injected on this machine, and why."""


def fault(name: str, *stores: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = (function, stores or (LOCAL, S3))
        return function

    return register


def _working(run: Run) -> list[psutil.Process]:
    return run.processes("ray::ImageWorker.colorize")


def _disturbed(bench: Bench, output: str, rounds: int, disturb: Callable[[Run], None]) -> Reckoning:
    """Disturb up to `rounds` runs, each while an image is being worked on; then the reckoning."""
    injected = 0
    for _ in range(rounds):
        with bench.run(output) as run:
            if not wait_until(partial(_working, run), 120):
                break  # there is nothing left to disturb
            injected += 1
            disturb(run)
    return bench.reckon(output, injected)


@fault("SIGKILL of the actor, mid-image")
def kill_actor(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """At most twice for any one image: at a third death the image would be quarantined."""
    injected = 0
    with bench.run(output) as run:
        while injected < rounds and run.process.poll() is None:
            before = committed(output)
            if not wait_until(lambda: _working(run) or run.process.poll() is not None, 120) or not _working(run):
                break
            injected += run.kill("ray::ImageWorker.colorize")
            wait_until(lambda b=before: committed(output) > b or run.process.poll() is not None, 120)
        run.wait()
    return bench.reckon(output, injected)


@fault("SIGKILL of the whole run at a random moment")
def kill_run(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """Kills its process group. Ray is not part of it, and must notice and end by itself."""
    injected = 0
    for _ in range(rounds):
        with bench.run(output) as run:
            try:
                run.wait(rng.uniform(3, 0.9 * bench.seconds))
                break  # the run has ended: there is nothing left to disturb
            except subprocess.TimeoutExpired:
                os.killpg(run.process.pid, signal.SIGKILL)
                injected += 1
                _assert_no_actors(run)
    return bench.reckon(output, injected)


def _assert_no_actors(run: Run) -> None:
    """No actor, Ray process or Prefect server is left."""
    gone = wait_until(lambda: not run.processes("ray::", "raylet", "local_prefect"), 60)
    assert gone, "actors or servers outlive their flow"


@fault("SIGKILL of the flow's process alone")
def kill_flow(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def disturb(run: Run) -> None:
        run.process.kill()
        _assert_no_actors(run)

    return _disturbed(bench, output, rounds, disturb)


@fault("SIGKILL of the Ray node")
def kill_node(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def disturb(run: Run) -> None:
        run.kill("raylet/raylet")
        run.wait()

    return _disturbed(bench, output, rounds, disturb)


@fault("SIGKILL of the Prefect server")
def kill_prefect(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def disturb(run: Run) -> None:
        run.kill("local_prefect")
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(240)

    return _disturbed(bench, output, rounds, disturb)


def _signalled(
    bench: Bench, output: str, rounds: int, number: signal.Signals, send: Callable[[int, int], None]
) -> Reckoning:
    def disturb(run: Run) -> None:
        send(run.process.pid, number)
        assert run.wait(30) == 128 + number
        _assert_no_actors(run)

    return _disturbed(bench, output, rounds, disturb)


@fault("Ctrl-C")
def interrupt(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """Sent to its process group, as a terminal does."""
    return _signalled(bench, output, rounds, signal.SIGINT, os.killpg)


@fault("SIGTERM")
def terminate(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    return _signalled(bench, output, rounds, signal.SIGTERM, os.kill)


@fault("two runs racing")
def race(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    injected = 0
    for _ in range(rounds):
        with bench.run(output) as one, bench.run(output) as two:
            codes = {one.wait(), two.wait()}
            assert codes <= {0, 1, 3}, codes
            injected += 1
    return bench.reckon(output, injected)


def _repaired(bench: Bench, output: str, rounds: int, damage: Callable[[Store, list[str]], None]) -> Reckoning:
    """Damage a finished output; `verify --repair` and a run must find and mend it."""
    from tasks.verify import repair, verify

    store = Store(output)
    for key, _ in bench.undisturbed.list():
        store.write(key, bench.undisturbed.read(key))
    for _ in range(rounds):
        damage(store, [key for key, _ in store.list() if key.startswith(("images/", "manifest/"))])
        findings = [f for f in verify(store) if f.kind != "extra"]
        assert findings
        repair(store, findings)
        with bench.run(output) as run:
            run.wait()
    reckoning = bench.reckon(output, rounds)
    reckoning.doubled = 0  # work that was lost is done twice on purpose
    return reckoning


@fault("an image deleted, then verify --repair")
def delete_image(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def damage(store: Store, keys: list[str]) -> None:
        store.delete(rng.choice([key for key in keys if "/target-" in key]))

    return _repaired(bench, output, rounds, damage)


@fault("a byte flipped, then verify --repair")
def flip_byte(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def damage(store: Store, keys: list[str]) -> None:
        key = rng.choice([key for key in keys if "/target-" in key])
        data = bytearray(store.read(key))
        data[rng.randrange(len(data))] ^= 255
        store.write(key, bytes(data))

    return _repaired(bench, output, rounds, damage)


@fault("a manifest part truncated, then verify --repair")
def truncate_part(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    def damage(store: Store, keys: list[str]) -> None:
        key = rng.choice([key for key in keys if key.endswith(".parquet")])
        store.write(key, store.read(key)[: -rng.randrange(1, 400)])

    return _repaired(bench, output, rounds, damage)


@fault("disk full", LOCAL)
def disk_full(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """A file system too small for the run, which fails; then it grows. Needs the right to mount."""
    if os.geteuid() != 0:
        raise NotHereError("only root may mount a small file system")
    Path(output).mkdir(parents=True)
    size = "size={}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size.format(150), "tmpfs", output], check=True, capture_output=True)
    injected = 0
    try:
        for _ in range(rounds):
            with bench.run(output) as run:
                assert run.wait() in (1, 3)
            injected += 1
        subprocess.run(["mount", "-o", "remount," + size.format(50_000), output], check=True)
        return bench.reckon(output, injected)
    finally:
        subprocess.run(["umount", "-l", output], check=False)


def _archive_with(bench: Bench, output: str, *names: str) -> Path:
    """A copy of the bench's archive, and in it more images of these names."""
    archive = bench.folder / f"more-{Path(output).name}"
    shutil.copytree(bench.archive, archive)
    with (archive / "catalog.csv").open("a") as catalog:
        for name in names:
            shutil.copy(archive / "0.png", archive / name)
            catalog.write(f"{name},a ball on a table,\n")
    return archive


@fault("the end of --max-hours")
def out_of_hours(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """An image that hangs keeps each run from ending before its hours do. Too few hours for any image are doubled."""
    archive = _archive_with(bench, output, HANG, "later.png")
    hours, injected = 0.01, 0
    while injected < rounds:
        options = ("--max-hours", f"{hours:g}")
        with bench.run(output, *options, archive=archive, environment={"DIFFCOLOR_POISON": "1"}) as run:
            assert run.wait() == 128 + signal.SIGTERM
            _assert_no_actors(run)
        store = Store(output)
        assert json.loads(store.read(run_end(last_generation(store))))["status"] == "stopped"
        injected += committed(output) > 0
        hours *= 2
    left = f"select count(*) from results where image_key in ('{HANG}', 'later.png')"
    assert query(store, left).fetchall() == [(0,)], "images at work and images that wait have no row yet"
    reckoning = bench.reckon(output, injected, archive)
    assert query(store, f"{left} and status = 'ok'").fetchall() == [(2,)]
    return reckoning


@fault("images that hang, crash or fill the memory")
def poison(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """Three bad images among good ones: two kill their actor at each attempt, the third runs out of memory twice."""
    archive = _archive_with(bench, output, HANG, SEGFAULT, BALLOON)
    options = ("--image-timeout", str(40 // bench.batch), "--max-attempts", "2")
    with bench.run(output, *options, archive=archive, environment={"DIFFCOLOR_POISON": "1"}) as run:
        assert run.wait(900) == 3
    rows = query(Store(output), "select image_key, status, error_class from results where status <> 'ok'").fetchall()
    assert sorted(rows) == [
        (BALLOON, "failed", "MemoryError"),
        ("broken.jpg", "quarantined", "UnreadableImageError"),
        (HANG, "quarantined", "DeadlyImageError"),
        (SEGFAULT, "quarantined", "DeadlyImageError"),
    ]
    return bench.reckon(output, 2 * 2 + 1, archive)


@fault("clock jumps")
def clock_jumps(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
    """Runs whose clock is a day fast, then an hour slow, are killed; the last has the right time. Needs faketime.

    On S3 it is ten minutes, because S3 refuses requests that are 15 minutes off. The clock does not jump during a
    run: Ray waits for moments of the real clock, and would wait for a day.
    """
    library = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
    if not library.exists():
        raise NotHereError("faketime is not installed")
    injected = 0
    for _ in range(rounds):
        for offset in ("+1d", "-1h") if Store(output).is_local else ("+10m", "-10m"):
            before = committed(output)
            with bench.run(output, environment={"LD_PRELOAD": str(library), "FAKETIME": offset}) as run:
                wait_until(lambda b=before: committed(output) > b or run.process.poll() is not None, 200)
            injected += committed(output) > before
    return bench.reckon(output, injected)


def _spoiling(kind: str) -> Fault:
    """Run through a proxy that spoils a tenth of the calls to the store."""

    def inject(bench: Bench, output: str, rounds: int, rng: random.Random) -> Reckoning:
        with faulty_proxy(bench.environment["AWS_ENDPOINT_URL"], (kind,), 0.1, rng) as proxy:
            for _ in range(rounds):
                with bench.run(output, environment={"AWS_ENDPOINT_URL": proxy.url}) as run:
                    if run.wait(900) in (0, 3):
                        break
        return bench.reckon(output, proxy.injected.total())

    return inject


for _kind, _name in {
    "500": "store answers 500",
    "503": "store answers 503",
    "slow": "store answers late",
    "cut before": "connection cut before the store has heard",
    "cut after": "connection cut before the store's answer",
}.items():
    fault(_name, S3)(_spoiling(_kind))
