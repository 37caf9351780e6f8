"""An output as a run leaves it, made in a moment: real scans, pictures and manifest rows, no model."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.pictures import gray_picture
from tasks.archive import variant_name
from tasks.layout import picture_stem
from tasks.manifest import commit_part
from tasks.storage import Store, joined

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
CONTEXT = "a ball on a table"
TARGETS = ("a red ball on a green table", "a blue ball on a yellow table")
SCRIPT = "<script>document.title = 'broken into'</script>"
"""A prompt or a name that must stay text."""


def make_output(
    archive: Path, output: Store, keys: list[str], part: str = "000001-000000-00001"
) -> list[dict[str, Any]]:
    """Scans of these keys in the archive, and for each a primary and two results, committed as one part; the rows.

    The first result obeys its words. Of the second one word is missed, and the other cannot be shown.
    """
    rows = [row for number, key in enumerate(keys) for row in _rows(archive, output, key, number)]
    commit_part(output, part, rows)
    return rows


def _rows(archive: Path, output: Store, key: str, number: int) -> Iterator[dict[str, Any]]:
    gray = gray_picture(seed=zlib.crc32(key.encode()))
    scan = _png(gray)
    (archive / key).parent.mkdir(parents=True, exist_ok=True)
    (archive / key).write_bytes(scan)
    sha256 = hashlib.sha256(scan).hexdigest()
    primary = _colored(output, picture_stem(key, sha256, "0" * 64, primary=True), gray, (1.0, 0.9, 0.8))
    for place, target in enumerate(TARGETS):
        tint = ((1.0, 0.5, 0.4), (0.4, 0.5, 1.0))[place]
        picture = _colored(output, picture_stem(key, sha256, str(place + 1) * 64, primary=False), gray, tint)
        yield ok_row(key, number, target) | {
            "input_uri": joined(str(archive), key),
            "input_sha256": sha256,
            "width_px": gray.shape[1],
            "height_px": gray.shape[0],
            "output_uri": picture[0],
            "output_sha256": picture[1],
            "primary_uri": primary[0],
            "primary_sha256": primary[1] if place == 0 else None,  # an earlier row has written it
        }


def ok_row(key: str, number: int, target: str, **more: Any) -> Mapping[str, Any]:
    """A row of a result, without the files that it names."""
    obeyed = target == TARGETS[0]
    words = zip(("ball", "table"), ("red", "green") if obeyed else ("blue", "yellow"), strict=True)
    return {
        "run_id": "first",
        "image_key": key,
        "variant": variant_name(CONTEXT, target),
        "status": "ok",
        "attempt": 1,
        "context_prompt": CONTEXT,
        "rewritten_prompt": "a were ball on a soil table",
        "target_prompt": target,
        "model_id": "demo",
        "model_revision": "sha256:0",
        "config_sha256": ("1" if obeyed else "2") * 64,
        "seed": 0,
        "alpha": 1.0,
        "nouns": [
            {
                "noun": noun,
                "color": color,
                "agreement": 0.9 if obeyed else -0.4,
                "achievable_chroma": 60.0 if color != "yellow" else 8.0,
                "feasible": color != "yellow",
            }
            for noun, color in words
        ],
        "noun_lightness": [50.0, 10.0],
        "bit_depth": 8,
        "input_mode": "L",
        "colorfulness": 40.0 + number % 30,
        "clip_similarity": 0.3,
        "mean_abs_delta_l": 0.1,
        "p99_abs_delta_l": 0.2 + number % 7 / 100,
        "stage1_seconds": 3.0,
        "stage2_seconds": 5.0,
        "sampling_seconds": 1.0,
        "total_seconds": 10.0,
        "started_at": START + timedelta(seconds=20 * number),
        "finished_at": START + timedelta(seconds=20 * number + 20),
        "software_version": "0",
        "generation": 1,
        "catalog_columns": json.dumps({"shelf": f"drawer-{number % 4}"}),
    } | more


def _colored(output: Store, stem: str, gray: np.ndarray, tint: tuple[float, float, float]) -> tuple[str, str]:
    """Write a tinted picture; its address and hash."""
    data = _png((gray[..., None] * np.array(tint)).astype(np.uint8))
    output.write(f"{stem}.png", data)
    return output.uri(f"{stem}.png"), hashlib.sha256(data).hexdigest()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
