"""Waiting for a condition instead of for a time."""

import threading
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition became true within `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < deadline:
        if condition():
            return True
        pause.wait(0.1)
    return False


def wait_for(condition: Callable[[], object], *, seconds: float) -> None:
    """Return once the condition is true; fail if it is not within `seconds`."""
    assert wait_until(condition, seconds), f"not within {seconds} s"
