"""Results of benchmarks and of chaos runs, kept as JSON."""

import json
from pathlib import Path
from typing import Any

from diffcolor_study.about import about


def record(path: Path | None, key: str, figures: Any, *packages: str, gpu: str | None = None) -> None:
    """Print the figures; store them with `about` under `key` of the JSON file, whose other keys stay."""
    entry = {"about": about(*packages, gpu=gpu), "figures": figures}
    print(json.dumps({key: entry}, indent=1))
    if path is not None:
        path.write_text(json.dumps(recorded(path) | {key: entry}, indent=1) + "\n")


def recorded(path: Path | None) -> dict[str, Any]:
    """The entries of such a file by key; none if there is no file yet."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}
