"""A Prefect server for one run on this machine, in a session of its own, as `tasks.local_ray` has Ray.

Ctrl-C in a terminal goes to every process of its group. The server is in none of the run's groups, so it still answers
when the flow reports how it ended. It ends with the run, also if the run is killed: a closed pipe tells it. Its
database is that of PREFECT_HOME, as with `prefect server start`: a later run finds a killed one's flow run there and
marks it as crashed, and migrations take their 7 to 12 seconds only once.
"""

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack

START_SECONDS = 120.0
"""Time for the server to answer. The first start on a machine sets up the database."""
END_SECONDS = 10.0
"""Time for the server to end in order."""
_FOR_LIFE = ExitStack()
"""Contexts that this process never leaves."""


def start_prefect() -> Callable[[], None]:
    """Give this process a Prefect server for the rest of its life, unless PREFECT_API_URL or the profile names one.

    Returns a function that waits until the server answers, so that slow imports can go on meanwhile. It raises
    RuntimeError if the server does not start. The server outlives the flow because Prefect sends its last logs when
    the process exits.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        return lambda: None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(_end, server)  # before Prefect registers anything, so that it runs after all of that
    url = f"http://127.0.0.1:{port}/api"
    _FOR_LIFE.enter_context(temporary_settings({PREFECT_API_URL: url}))
    return lambda: _wait_until_healthy(server, url)


def _end(server: "subprocess.Popen[bytes]") -> None:
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _wait_until_healthy(server: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(
        f"Prefect's server did not start within {START_SECONDS:.0f} s (exit code {server.poll()}): see above, or set "
        "PREFECT_API_URL to a server that runs"
    )


def main(port: str) -> None:
    """Run `prefect server start` in this process until nobody holds the other end of standard input."""

    def end_with_the_run() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(END_SECONDS)
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    where = ["--host", "127.0.0.1", "--port", port]
    sys.argv = ["prefect", "server", "start", *where, "--no-services", "--no-ui", "--analytics-off"]
    sys.argv += ["--log-level", "ERROR"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
