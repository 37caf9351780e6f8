"""How a run in this process is stopped from outside, and how Prefect hears of one that was killed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

GRACE_SECONDS = 90.0
"""For committing what is finished and telling Prefect, whose server may be gone already."""


@dataclass
class Stop:
    """Whether a signal has asked this process to stop. exit_code: 128 and its number, as shells have it."""

    exit_code: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the run in order, a second one at once; what is committed is kept either way.

    The first raises KeyboardInterrupt in the main thread: the actors are killed and the finished
    images committed on the way out. A process that still lives after `GRACE_SECONDS`, or gets a second signal,
    ends with 128 and the signal's number.
    """
    asked = Stop()

    def stop(number: int, _frame: FrameType | None) -> None:
        if asked.exit_code is not None:
            os._exit(128 + number)
        asked.exit_code = 128 + number
        print("diffcolor: stopping, what is finished is being committed; once more ends it at once", file=sys.stderr)
        timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mark_crashed(flow_run_id: str, reason: str) -> None:
    """Tell Prefect that a flow run is dead. A killed process cannot: its run would stay "Running" for ever."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except ObjectNotFound:  # a run of another Prefect server
            return
        if state is None or not state.is_final():
            client.set_flow_run_state(UUID(flow_run_id), Crashed(message=reason), force=True)
