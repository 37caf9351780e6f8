"""Installs Debian's packages where tests may: as root, with apt-get."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def install(packages: Sequence[str], refusal: type[Exception]) -> None:
    """Install these packages, one process at a time. Raises `refusal` with the reason where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise refusal(f"needs {', '.join(packages)}: install them, or run as root on Debian")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "diffcolor-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ("apt-get update -qq", f"apt-get install -y -qq --no-install-recommends {' '.join(packages)}"):
            done = subprocess.run(command.split(), env=quiet, capture_output=True, check=False)
            if done.returncode:
                raise refusal(f"{command}: {done.stderr.decode(errors='replace')[-300:]}")
