"""What is left to do, cut into shards."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffcolor_core.colorizer import METHOD_VERSION
from diffcolor_core.config import Settings
from tasks.archive import ImageWork


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that a run does to every image."""

    run_id: str
    archive: str
    """fsspec URL of the scans."""
    output: str
    """fsspec URL of images and manifest."""
    model: str
    """As for `DiffColor.from_pretrained`."""
    model_id: str
    model_revision: str
    settings: Settings
    seed: int
    device: str
    image_format: Literal["png", "tiff"] = "png"
    """Of the colorized pictures: lossless, at the scan's bit depth."""
    access_copy: Literal["jpeg", "webp"] | None = None
    """A small lossy copy beside each picture."""

    def config_sha256(self, context_prompt: str | None, target_prompt: str | None) -> str:
        """Hash of all that shapes a result besides the image itself."""
        shaping = {
            "method": METHOD_VERSION,
            "model": [self.model_id, self.model_revision],
            "settings": self.settings.sha256(),
            "seed": self.seed,
            "prompts": [context_prompt, target_prompt],
            "files": [self.image_format, self.access_copy],
        }
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """As JSON: the run's record beside the manifest."""
        return {**vars(self), "settings": self.settings.model_dump()}


@dataclass(frozen=True)
class PlannedImage:
    """An image's work with the attempt number that each of its variants has now."""

    work: ImageWork
    attempts: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The images of one Prefect task."""

    number: int
    images: tuple[PlannedImage, ...]


@dataclass(frozen=True)
class Plan:
    """Shards of what is to do, and how many variants were done before: by status."""

    shards: tuple[Shard, ...]
    done_before: dict[str, int]

    @property
    def num_images(self) -> int:
        """Images in all shards."""
        return sum(len(shard.images) for shard in self.shards)


def plan_shards(
    work: Iterable[ImageWork], latest: Iterable[Mapping[str, Any]], config: RunConfig, shard_size: int
) -> Plan:
    """Leave out what the manifest has as ok or quarantined for the same image content and configuration.

    A failed variant is tried again, its attempt counted on. Of an image with several variants only
    the missing ones are planned.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, but a shard holds at least 1 image")
    known = {(row["image_key"], row["variant"]): row for row in latest}
    planned: list[PlannedImage] = []
    done_before: dict[str, int] = {}
    for item in work:
        variants, attempts = [], []
        for variant in item.variants:
            row = known.get((item.image_key, variant.name))
            same = (
                row is not None
                and row["config_sha256"] == config.config_sha256(item.context_prompt, variant.target_prompt)
                and (row["input_version"] or "") == item.version
            )
            if row is not None and same and row["status"] in ("ok", "quarantined"):
                done_before[row["status"]] = done_before.get(row["status"], 0) + 1
                continue
            variants.append(variant)
            attempts.append(row["attempt"] + 1 if row is not None and same else 1)
        if variants:
            planned.append(PlannedImage(replace(item, variants=tuple(variants)), tuple(attempts)))
    shards = tuple(
        Shard(number, tuple(planned[start : start + shard_size]))
        for number, start in enumerate(range(0, len(planned), shard_size))
    )
    return Plan(shards, done_before)
