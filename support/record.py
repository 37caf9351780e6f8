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
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {key: entry}, indent=1) + "\n")
