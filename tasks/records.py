"""The records that planning, the actors and the manifest's rows share. They need neither DuckDB nor torch."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from diffcolor_core._version import METHOD_VERSION
from diffcolor_core.config import Settings
from tasks.options import RunOptions


@dataclass(frozen=True)
class Variant:
    """One picture that is wanted of an image: in the colours of `target_prompt`, or the primary if that is None.

    catalog_columns: the other columns of its catalog row, as a JSON object.
    """

    name: str
    target_prompt: str | None
    catalog_columns: str | None = None


@dataclass(frozen=True)
class ImageWork:
    """One fit and the variants that are wanted of it. `problem` says why the image cannot be fitted."""

    image_key: str
    version: str
    context_prompt: str | None
    variants: tuple[Variant, ...]
    problem: ValueError | None = None


@dataclass(frozen=True)
class PlannedImage:
    """An image's work, with the number of this attempt for each variant.

    earlier: for each variant, the manifest's ok rows of the same configuration whose file may be the same. The
    worker compares the hashes of the contents.
    """

    work: ImageWork
    attempts: tuple[int, ...]
    earlier: tuple[tuple[dict[str, Any], ...], ...] = ()


@dataclass(frozen=True)
class Shard:
    """The images of one Prefect task."""

    number: int
    images: tuple[PlannedImage, ...]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run does to every image: its options, and what has been found out from them."""

    options: RunOptions
    """As asked for, but with archive, output and the folder of a local model as absolute addresses."""
    run_id: str
    model_id: str
    model_revision: str
    settings: Settings
    """Those of the preset, with the overrides."""
    whole_archive: bool = True
    """False leaves out the images that the catalog does not name."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the actors compute."""
    generation: int = 0
    """Number of the run on its output."""
    fit_bytes: int = 0
    """What a kept fit takes, about."""

    @cached_property
    def _fit_inputs(self) -> str:
        model = [self.model_id, self.model_revision]
        inputs = [METHOD_VERSION, model, self.settings.sha256(), self.options.seed]
        if self.options.dtype != "auto":  # `auto` is like the GPU's own way to round: no part of the hash
            inputs.append(self.options.dtype)
        if self.options.batch > 1:  # sums in another order: the last digits differ
            inputs.append(self.options.batch)
        if self.options.compile:
            inputs.append("compiled")
        return json.dumps(inputs)

    def fit_sha256(self, context_prompt: str | None) -> str:
        """Hash of everything that shapes a fit besides the image itself."""
        return hashlib.sha256(f"{self._fit_inputs}{json.dumps(context_prompt)}".encode()).hexdigest()

    def config_sha256(self, context_prompt: str | None, target_prompt: str | None) -> str:
        """Hash of everything that shapes a result besides the image itself."""
        options = self.options
        files = json.dumps([context_prompt, target_prompt, options.image_format, options.access_copy])
        return hashlib.sha256(f"{self._fit_inputs}{files}".encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What is kept of the run beside the manifest, as JSON: its options and what was found out from them."""
        return self.options.model_dump(mode="json") | {
            "run_id": self.run_id,
            "model_id": self.model_id,
            "model_revision": self.model_revision,
            "settings": self.settings.model_dump(mode="json"),
            "whole_archive": self.whole_archive,
            "generation": self.generation,
        }
