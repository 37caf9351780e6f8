"""A fit: what stages 1 and 2 leave of one photograph, in memory and in storage."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffcolor_core._version import __version__
from diffcolor_core.config import Settings
from diffcolor_core.errors import FitError
from diffcolor_scans.formats import Provenance
from diffcolor_scans.images import Picture, Scan, assemble

SCHEMA_VERSION = 2
"""Raised whenever the saved form changes. Fits of another version are refused."""
_TENSORS, _RECORD = "fit.safetensors", "fit.json"
_TENSOR_FIELDS = ("lightness", "primary", "prompt_embeds")
_PLAIN = (
    *("scan_sha256", "content_px", "context_prompt", "rewritten_prompt", "seed", "model_id", "model_revision"),
    *("losses", "stage1_seconds", "stage2_seconds"),
)
"""Fields that are kept as they are, beside the tensors, in the record."""


@dataclass(frozen=True)
class Fit:
    """What stages 1 and 2 (steps 1 to 3) leave of a photograph. Every target prompt starts from here.

    scan: the photograph, or None in a fit loaded without it. lightness: the scan's at working size, [1, h, w], of
    which `content_px` (height, width) is picture and the rest padding. primary: chroma of x^_pri, [2, h, w].
    rewritten_prompt, prompt_embeds, unet_state: c', e_opt [1, tokens, width] and theta (the fitted UNet's weights
    or its adapter's); None in a fit that was made for the primary only. losses: by name, one a step. generated:
    x_pri before alignment, L*a*b* [3, h, w]; it is not saved, and None if stage 1 did not make the primary.
    """

    scan: Scan | None
    scan_sha256: str
    lightness: Tensor
    content_px: tuple[int, int]
    primary: Tensor
    rewritten_prompt: str | None
    prompt_embeds: Tensor | None
    unet_state: dict[str, Tensor] | None
    context_prompt: str
    settings: Settings
    seed: int
    model_id: str
    model_revision: str
    losses: dict[str, list[float]]
    stage1_seconds: float
    stage2_seconds: float
    generated: Tensor | None = None

    def assemble(self, chroma: Tensor) -> Picture:
        """Chroma of working size [2, h, w] and the scan's lightness as a picture of the scan's size.

        Raises FitError for a fit that was loaded without its scan.
        """
        if self.scan is None:
            raise FitError("this fit was saved without its scan: load it as load_fit(url, image=the scan)")
        height, width = self.content_px
        return assemble(self.scan, chroma[:, :height, :width], propagated=self.settings.alignment.propagate)

    def provenance(self, prompt: str, run_id: str | None = None) -> Provenance:
        """What to write into a picture that this fit gave for `prompt`."""
        model = f"{self.model_id} ({self.model_revision})"
        return Provenance(f"DiffColor Archive {__version__}", model, prompt, run_id, self.seed)

    @cached_property
    def primary_picture(self) -> Picture:
        """The primary at the scan's size, assembled when it is first read. Raises as `assemble` does."""
        return self.assemble(self.primary)

    def save(self, url: str, *, with_scan: bool = True) -> None:
        """Write the `files` into the folder `url` (any fsspec URL), in their order."""
        fs, folder = fsspec.core.url_to_fs(url)
        fs.makedirs(folder, exist_ok=True)
        for name, data in self.files(with_scan=with_scan).items():
            fs.pipe_file(f"{folder}/{name}", data)

    def files(self, *, with_scan: bool = True) -> dict[str, bytes]:
        """The fit as files, in the order to write them: fit.safetensors, then fit.json, which completes it.

        At Stable Diffusion's size they take a few megabytes with adapters, and as much as the UNet without.
        with_scan: keep the scan's lightness (4 bytes a pixel) too. Otherwise `load_fit` needs the scan again. The
        scan's EXIF and XMP are not kept: give the scan itself if they matter. Raises FitError for a fit that was
        made for the primary only.
        """
        if self.prompt_embeds is None or self.unet_state is None:
            raise FitError("this fit was made for the primary only: there is nothing in it that is worth keeping")
        tensors = {f"unet.{name}": tensor for name, tensor in self.unet_state.items()}
        tensors |= {name: getattr(self, name) for name in _TENSOR_FIELDS}
        if with_scan and self.scan is not None:
            tensors["scan.lightness"] = self.scan.lightness
            if self.scan.alpha is not None:
                tensors["scan.alpha"] = torch.from_numpy(self.scan.alpha)
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        record = {
            "schema_version": SCHEMA_VERSION,
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
            "scan": None if self.scan is None else {"bit_depth": self.scan.bit_depth, "mode": self.scan.mode},
            "settings": self.settings.model_dump(mode="json"),
            **{name: getattr(self, name) for name in _PLAIN},
        }
        return {_TENSORS: data, _RECORD: (json.dumps(record, indent=1) + "\n").encode()}


def scan_sha256(scan: Scan) -> str:
    """Identity of a scan: a hash over its size and its lightness."""
    digest = hashlib.sha256(repr(tuple(scan.lightness.shape)).encode())
    digest.update(scan.lightness.contiguous().numpy().data)
    return digest.hexdigest()


def load_fit(url: str, scan: Scan | None = None) -> Fit:
    """Read what `Fit.save` wrote. Raises FitError if it is missing, damaged, of another format or of another scan."""
    fs, folder = fsspec.core.url_to_fs(url)
    try:
        record: dict[str, Any] = json.loads(fs.cat_file(f"{folder}/{_RECORD}"))
        data: bytes = fs.cat_file(f"{folder}/{_TENSORS}")
    except FileNotFoundError as error:
        raise FitError(f"there is no fit at {url!r}: {error} is missing") from error
    except ValueError as error:
        raise FitError(f"{url!r} is damaged: {_RECORD}: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise FitError(f"{url!r} is a fit of format {version}; this software reads format {SCHEMA_VERSION}")
    if hashlib.sha256(data).hexdigest() != record.get("tensors_sha256"):
        raise FitError(f"{url!r} is damaged: {_TENSORS} is not the file that {_RECORD} describes")
    if scan is not None and scan_sha256(scan) != record.get("scan_sha256"):
        raise FitError(f"the fit at {url!r} is of another picture than the one that was given")
    try:
        tensors = load(data)
        if scan is None and "scan.lightness" in tensors:
            alpha = tensors.get("scan.alpha")
            scan = Scan(tensors["scan.lightness"], None if alpha is None else alpha.numpy(), **record["scan"])
        fields: dict[str, Any] = {name: record[name] for name in _PLAIN}
        fields |= {name: tensors[name] for name in _TENSOR_FIELDS} | {"content_px": tuple(record["content_px"])}
        fields["unet_state"] = {k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}
        return Fit(scan=scan, settings=Settings.model_validate(record["settings"]), **fields)
    except (KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise FitError(f"{url!r}: {_RECORD} and {_TENSORS} do not hold a whole fit: {error!r}") from error
