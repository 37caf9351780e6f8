"""Installs Debian's packages where tests may: as root, with apt-get."""

import os
import shutil
import subprocess
from collections.abc import Sequence


def install(packages: Sequence[str], refusal: type[Exception]) -> None:
    """Install these packages. Raises `refusal` with the reason where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise refusal(f"needs {', '.join(packages)}: install them, or run as root on Debian")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ("apt-get update -qq", f"apt-get install -y -qq --no-install-recommends {' '.join(packages)}"):
        done = subprocess.run(command.split(), env=quiet, capture_output=True, check=False)
        if done.returncode:
            raise refusal(f"{command}: {done.stderr.decode(errors='replace')[-300:]}")
