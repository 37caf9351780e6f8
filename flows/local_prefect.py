"""Prefect's embedded server in a session of its own, as `tasks.local_ray` has Ray.

Ctrl-C at a terminal goes to every process of its group: a server in it would be gone when the flow tells how it
ended, and the flow would try again for a minute. And it ends with its run, also one that is killed: the pipe that
the run holds is closed then.
"""

import os
import subprocess
import sys
import threading
from typing import Any

END_SECONDS = 10.0
"""For the server to end in order, once its run is gone."""


def embed_prefect() -> None:
    """Have Prefect start its embedded server, if it needs one, in this way. Before its first use in this process.

    Prefect has no setting for it: a private method of the pinned version is overridden. Without effect, Ctrl-C would
    take over a minute again, and `tests/faults` fails.
    """
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if PREFECT_API_URL.value():
        return
    from prefect.server.api.server import SubprocessASGIServer  # slow: the whole server

    class Server(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
            embedded = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            return subprocess.Popen(
                [sys.executable, "-P", __file__, str(self.port)],
                env=os.environ | embedded | settings,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    Server()  # Prefect keeps one instance, and takes the one that is there


def main(port: int) -> None:
    """Serve Prefect's API on loopback until nobody holds the other end of standard input."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            host="127.0.0.1",
            port=port,
            log_level="error",
            lifespan="on",
        )
    )

    def end_with_the_run() -> None:
        sys.stdin.read()
        server.should_exit = True
        threading.Event().wait(END_SECONDS)
        os._exit(0)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    server.run()
    sys.exit(0 if server.started else 3)  # Prefect takes 3 for a port that is taken, and tries another


if __name__ == "__main__":
    main(int(sys.argv[1]))
