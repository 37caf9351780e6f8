"""What every recorded result says about itself: machine, date, versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def about(*packages: str, gpu: str | None = None) -> dict[str, Any]:
    """The machine, the date and the installed versions of `packages`. gpu: the name of the GPU that was used."""
    return {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {gpu or 'no GPU'}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }
