"""One run at a time on an output: the run's record is its lease, its number the generation of its rows.

`runs/000007.json` is created by one conditional PUT, so of two runs that start together one gets the
number. While it works, the run writes `runs/000007.beat` again and again; when it ends it writes
`runs/000007.end`. A run without an end whose beat stands still is dead, and the next one takes over.
Nobody's clock is compared with another's: the beat is watched for a while.
"""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psutil

from tasks.storage import Store, this_machine

PREFIX = "runs"
BEAT_EVERY_SECONDS = 10.0
PATIENCE_SECONDS = 45.0
"""How long a beat must stand still before its run counts as dead, if it ran on another machine."""
_RECORD = re.compile(rf"{PREFIX}/(\d{{6}})\.json")
logger = logging.getLogger(__name__)


class OutputBusyError(RuntimeError):
    """Another run is working on this output."""


class LeaseLostError(RuntimeError):
    """Another run has taken this run for dead and goes on with its work."""


class Lease:
    """The right to write to an output, held until `LeaseLostError` says otherwise."""

    def __init__(self, output: Store, generation: int, took_over: Mapping[str, Any] | None) -> None:
        self.output, self.generation = output, generation
        self.took_over = took_over
        """The record of the run before, if that one died without an end."""
        self._ended = threading.Event()
        self._number = 0
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise LeaseLostError if a later run has taken over."""
        if self.output.has(_key(self.generation + 1, "json")):
            raise LeaseLostError(
                f"run number {self.generation} on {self.output.url!r} has been taken over by another: it looked dead. "
                "What it had committed is kept, the rest is the other run's work"
            )

    def _beat(self) -> None:
        while True:
            self._number += 1
            try:
                self.output.write(_key(self.generation, "beat"), str(self._number).encode())
            except Exception as error:  # the store is away: `check` tells whether that cost the lease
                logger.warning("the run's sign of life could not be written: %s", error)
            if self._ended.wait(BEAT_EVERY_SECONDS):
                return

    def start(self) -> None:
        """Begin to give signs of life."""
        self._thread.start()

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Stop them and leave an end marker; without a summary nothing was done, and no trace is left."""
        self._ended.set()
        self._thread.join()
        if summary is not None:
            self.output.write(_key(self.generation, "end"), json.dumps(dict(summary), indent=1).encode())
        self.output.delete(_key(self.generation, "beat"))
        if summary is None:
            self.output.delete(_key(self.generation, "json"))


@contextmanager
def hold_output(output: Store, record: Mapping[str, Any]) -> Iterator[Lease]:
    """The lease of `output` for the time of the context. The caller ends it; an error ends it here as "stopped".

    Raises OutputBusyError while another run is alive on this output.
    """
    last = last_generation(output)
    dead = _dead_run(output, last) if last and not output.has(_key(last, "end")) else None
    generation = last + 1
    mine = {**record, "generation": generation, "opened_at": datetime.now(UTC).isoformat(), **_identity()}
    if not output.create(_key(generation, "json"), json.dumps(mine, indent=2).encode()):
        raise OutputBusyError(f"another run has started on {output.url!r} at this moment: wait for it, or stop it")
    lease = Lease(output, generation, dead)
    lease.start()
    try:
        yield lease
    except LeaseLostError:
        lease.end({"status": "taken over"})
        raise
    except BaseException as error:
        lease.end({"status": "stopped", "reason": f"{type(error).__name__}: {error}"[:500]})
        raise


def last_generation(output: Store) -> int:
    """The number of the last run that was opened on an output; 0 if none was."""
    matches = (_RECORD.fullmatch(key) for key, _ in output.walk(PREFIX))
    return max((int(match.group(1)) for match in matches if match), default=0)


def last_record(output: Store) -> dict[str, Any] | None:
    """What the last run over an archive was asked to do; None if there was none."""
    for generation in range(last_generation(output), 0, -1):
        record = json.loads(output.read(_key(generation, "json")))
        if "archive" in record:
            return dict(record)
    return None


def _key(generation: int, suffix: str) -> str:
    return f"{PREFIX}/{generation:06d}.{suffix}"


def _identity() -> dict[str, Any]:
    """This process, so that another on this machine can tell whether it lives."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "machine": this_machine(),
        "pid": process.pid,
        "process_started": process.create_time(),
    }


def _dead_run(output: Store, generation: int) -> dict[str, Any] | None:
    """The record of a run that is known to be dead; None if it ends meanwhile.

    Raises OutputBusyError if it lives.
    """
    record: dict[str, Any] = json.loads(output.read(_key(generation, "json")))
    who = f"run {record.get('run_id')!r} (process {record.get('pid')} on {record.get('host')})"
    busy = OutputBusyError(f"{who} is working on {output.url!r}: wait for it, or stop it")
    if record.get("machine") == this_machine():
        if _lives(record):
            raise busy
        return record
    logger.warning("%s has left no end: watching for %.0f s whether it lives", who, PATIENCE_SECONDS)
    before, deadline = _beat_of(output, generation), time.monotonic() + PATIENCE_SECONDS
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(PATIENCE_SECONDS / 15)
        if output.has(_key(generation, "end")):
            return None
        if _beat_of(output, generation) != before:
            raise busy
    return record


def _lives(record: Mapping[str, Any]) -> bool:
    """Whether a process of this machine lives, and is not another that has got its number."""
    try:
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["process_started"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beat_of(output: Store, generation: int) -> bytes:
    try:
        return output.read(_key(generation, "beat"))
    except FileNotFoundError:
        return b""
