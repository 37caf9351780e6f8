"""One run at a time on an output: the run's record is its lease, its number the generation of its rows.

A conditional PUT creates `runs/000007.json`, so of two runs that start together one gets the number. While it
works, the run rewrites `runs/000007.beat`; when it ends, it writes `runs/000007.end`. A run without an end whose
beat stands still is dead, and the next one takes over. No clocks are compared: the next run watches the beat.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import psutil

from tasks.errors import LeaseLostError, OutputBusyError
from tasks.layout import RUN_RECORD, RUNS, run_beat, run_end, run_record
from tasks.storage import Store, this_machine

BEAT_EVERY_SECONDS = 10.0
PATIENCE_SECONDS = 45.0
"""How long the beat of a run on another machine must stand still before that run counts as dead."""
logger = logging.getLogger(__name__)


class Lease:
    """The right to write to an output, until `check` raises LeaseLostError."""

    def __init__(self, output: Store, generation: int, took_over: Mapping[str, Any] | None) -> None:
        self.output, self.generation = output, generation
        self.took_over = took_over
        """The record of the run before, if it died without an end."""
        self._ended = threading.Event()
        self._number = 0
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise LeaseLostError if a later run has taken over."""
        if self.output.has(run_record(self.generation + 1)):
            raise LeaseLostError(
                f"another run has taken over from run number {self.generation} on {self.output.url!r}, which looked "
                "dead. Its committed rows are kept, and the other run does the rest"
            )

    def _beat(self) -> None:
        while True:
            self._number += 1
            try:
                self.output.write(run_beat(self.generation), str(self._number).encode())
            except Exception as error:  # the store does not answer: `check` tells whether that cost the lease
                logger.warning("the run's sign of life could not be written: %s", error)
            if self._ended.wait(BEAT_EVERY_SECONDS):
                return

    def start(self) -> None:
        """Start the beat."""
        self._thread.start()

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Stop the beat and write the end. Without a summary the run did nothing, and its record is deleted."""
        self._ended.set()
        self._thread.join()
        if summary is not None:
            self.output.write(run_end(self.generation), json.dumps(dict(summary), indent=1).encode())
        self.output.delete(run_beat(self.generation))
        if summary is None:
            self.output.delete(run_record(self.generation))


@contextmanager
def hold_output(
    output: Store, record: Mapping[str, Any], *, after: Callable[[Store], None] = lambda output: None
) -> Iterator[Lease]:
    """The lease of `output` for the time of the context.

    The caller ends it; an exception ends it as "stopped". `after` is called once it has ended either way; if it
    fails after an exception, that is only logged. Raises OutputBusyError while another run is alive on this
    output, NoConditionalPutError on a store where two runs could not be told apart.
    """
    last = last_generation(output)
    dead = _dead_run(output, last) if last and not output.has(run_end(last)) else None
    generation = last + 1
    mine = {**record, "generation": generation, "opened_at": datetime.now(UTC).isoformat(), **_identity()}
    if not output.create(run_record(generation), json.dumps(mine, indent=2).encode()):
        raise OutputBusyError(f"another run has just started on {output.url!r}: wait for it, or stop it")
    lease = Lease(output, generation, dead)
    lease.start()
    try:
        yield lease
    except BaseException as error:
        if isinstance(error, LeaseLostError):
            lease.end({"status": "taken over"})
        else:
            lease.end({"status": "stopped", "reason": f"{type(error).__name__}: {error}"[:500]})
        try:
            after(output)
        except Exception as failure:
            logger.warning("after the run had stopped: %s: %s", type(failure).__name__, failure)
        raise
    after(output)


def last_generation(output: Store) -> int:
    """The number of the last run that was opened on an output; 0 if none was."""
    matches = (RUN_RECORD.fullmatch(key) for key, _ in output.walk(RUNS))
    return max((int(match.group(1)) for match in matches if match), default=0)


def is_run_open(output: Store) -> bool:
    """Whether the last run on an output has not ended: it is at work, or it was killed."""
    last = last_generation(output)
    return last > 0 and not output.has(run_end(last))


def run_records(output: Store) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the record of each run that was opened on an output, the last one first."""
    for generation in range(last_generation(output), 0, -1):
        with suppress(FileNotFoundError):  # a run that found nothing to do
            yield generation, json.loads(output.read(run_record(generation)))


def last_record(output: Store) -> dict[str, Any] | None:
    """What the last run over an archive was asked to do; None if there was none."""
    return next((record for _, record in run_records(output) if "archive" in record), None)


def _identity() -> dict[str, Any]:
    """This process, so that another one on this machine can tell whether it is alive."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "machine": this_machine(),
        "pid": process.pid,
        "process_started": process.create_time(),
    }


def _dead_run(output: Store, generation: int) -> dict[str, Any] | None:
    """The record of a run that turns out to be dead; None if it ends while it is watched.

    Raises OutputBusyError if it is alive.
    """
    record: dict[str, Any] = json.loads(output.read(run_record(generation)))
    who = f"run {record.get('run_id')!r} (process {record.get('pid')} on {record.get('host')})"
    busy = OutputBusyError(f"{who} is working on {output.url!r}: wait for it, or stop it")
    if record.get("machine") == this_machine():
        if _is_alive(record):
            raise busy
        return record
    logger.warning("%s has not ended: watching it for %.0f s", who, PATIENCE_SECONDS)
    before, deadline = _beat_of(output, generation), time.monotonic() + PATIENCE_SECONDS
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(PATIENCE_SECONDS / 15)
        if output.has(run_end(generation)):
            return None
        if _beat_of(output, generation) != before:
            raise busy
    return record


def _is_alive(record: Mapping[str, Any]) -> bool:
    """Whether the recorded process still runs on this machine, and its number has not gone to another one."""
    try:
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["process_started"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beat_of(output: Store, generation: int) -> bytes:
    try:
        return output.read(run_beat(generation))
    except FileNotFoundError:
        return b""
