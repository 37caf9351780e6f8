"""A Ray for one run on this machine, in a session of its own.

So a signal to the run's process group, such as Ctrl-C in a terminal or a cancel by Prefect's worker, reaches the run
alone, and what is finished can still be committed. Ray ends with the run, also if the run is killed: a closed pipe
tells it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

END_SECONDS = 30.0
"""Time for Ray's processes to end before they are killed."""


@contextmanager
def local_ray(metrics_port: int | None = None) -> Iterator[str]:
    """Start Ray for as long as the context lasts; yield its address. Raises RuntimeError if it does not start.

    It uses RAY_AUTH_MODE and the token of the environment. metrics_port: where Prometheus can fetch its metrics, by
    default a free port.
    """
    keeper = subprocess.Popen(
        [sys.executable, "-P", __file__, str(metrics_port or 0)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        address = keeper.stdout.readline().decode().strip()
        if not address:
            raise RuntimeError(f"Ray could not be started on this machine (exit code {keeper.wait()}): see above")
        yield address
    finally:
        keeper.stdin.close()
        try:
            keeper.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()  # Ray's own processes die with it
            keeper.wait()
        keeper.stdout.close()


def main(metrics_port: int) -> None:
    """Start Ray, print its address, and end Ray once nobody holds the other end of standard input."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
    ray.init("local", **options, _metrics_export_port=metrics_port or None)
    with suppress(BrokenPipeError):  # the run has died meanwhile
        os.write(sys.stdout.fileno(), f"{ray.get_runtime_context().gcs_address}\n".encode())
        sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
