"""Installs Debian's packages where tests may: as root, with apt-get."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

LOCK = Path(tempfile.gettempdir()) / "diffcolor-apt.lock"


def install(packages: Sequence[str], refusal: type[Exception]) -> None:
    """Install these packages. Raises `refusal` with the reason where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise refusal(f"needs {', '.join(packages)}: install them, or run as root on Debian")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    commands = ("apt-get update -qq", f"apt-get install -y -qq --no-install-recommends {' '.join(packages)}")
    with FileLock(LOCK):  # apt-get refuses to run twice at once, as it would in tests that run side by side
        for command in commands:
            done = subprocess.run(command.split(), env=quiet, capture_output=True, check=False)
            if done.returncode:
                raise refusal(f"{command}: {done.stderr.decode(errors='replace')[-300:]}")
