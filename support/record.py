"""What every result carries: machine, date, versions."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """The machine (no GPU was used), the date and the versions of the packages that matter."""
    return {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, no GPU",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def record(path: Path | None, key: str, figures: Any, *packages: str) -> None:
    """Print the figures and put them, with `about`, under `key` of a JSON file that holds others too."""
    entry = {"about": about(*packages), "figures": figures}
    print(json.dumps({key: entry}, indent=1))
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {key: entry}, indent=1) + "\n")
