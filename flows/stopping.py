"""How a run in this process is stopped from outside."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

GRACE_SECONDS = 90.0
"""Time to commit what is finished and to tell Prefect, whose server may not answer any more."""


@dataclass
class Stop:
    """Whether a signal has asked this process to stop. exit_code: 128 plus its number, as shells have it."""

    exit_code: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the run in order, a second one at once. What is committed is kept either way.

    The first signal raises KeyboardInterrupt in the main thread: the actors are killed, and the finished images
    are committed on the way out. After a second signal, or after `GRACE_SECONDS`, the process ends with 128 plus
    the signal's number.
    """
    asked = Stop()

    def stop(number: int, _frame: FrameType | None) -> None:
        if asked.exit_code is not None:
            os._exit(128 + number)
        asked.exit_code = 128 + number
        print(
            "diffcolor: stopping; finished images are being committed (once more: stop at once)",
            file=sys.stderr,
        )
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


@contextmanager
def stopping_after(hours: float | None) -> Iterator[None]:
    """Stop the run in this process after so many hours, as SIGTERM does, unless the context has ended before.

    Enter it in the main thread. A process that does not handle SIGTERM itself handles it within the context.
    """
    if hours is None:
        yield
        return

    def stop() -> None:
        print(f"diffcolor: {hours:g} hours have passed (--max-hours)", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(hours * 3600, stop)
    timer.daemon = True
    with ExitStack() as stack:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            stack.enter_context(stoppable())
        timer.start()
        stack.callback(timer.cancel)
        yield
