"""Captions: an image-to-text model of transformers proposes, in words, what a scan shows.

A caption is a proposal for the context prompt. Whether it is right is for a person to say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import BUNDLES, identify, resolve
from diffcolor_core.prompts import CAPTION_MODEL
from diffcolor_scans.color import lightness_to_gray
from diffcolor_scans.images import Scan, resize

MAX_SIDE_PX = 1024
"""The longest side of what a model gets to see. BLIP itself sees 384 x 384 pixels."""
MAX_NEW_TOKENS = 40
NUM_BEAMS = 3
"""As in BLIP's own captioning."""

_MEDIUM = re.compile(
    r"^(?:there is |this is )?(?:an? |the )?(?:(?:black and white|gray-?scale|monochrome|sepia|old|vintage)[ ,]+)*"
    r"(?:photo(?:graph)?|picture|image) of +",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Captioner:
    """A loaded image-to-text model. model_id, model_revision: as `model_files.identify` gives them."""

    model: Any
    processor: Any
    model_id: str
    model_revision: str
    device: torch.device

    @torch.no_grad()
    def captions(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """What each of the pictures shows, in one phrase; "" if the model has no words for it.

        pictures: [h, w, 3] uint8 each, as `caption_input` makes them. Beam search without random draws. Raises
        ModelError for a model that wants to be asked in words.
        """
        try:
            inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, num_beams=NUM_BEAMS, do_sample=False)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{self.model_id!r} does not describe a picture by itself ({error}): give a captioning model, such as "
                f"{CAPTION_MODEL}"
            ) from error
        return [without_medium(text) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def load_captioner(model: str, *, device: str | torch.device = "cpu", revision: str | None = None) -> Captioner:
    """Load an image-to-text model from a local folder or the hub, in float32; safetensors only, no code of its own.

    model: a folder, a hub id of `model_files.PINNED`, or "owner/name@commit". revision: what `identify(model)` gave
    earlier. Raises ModelError if there is no such model, or it is of another kind.
    """
    if model in BUNDLES:
        raise ModelError(f"{model!r} gives colours, not captions: give a captioning model as {CAPTION_MODEL}")
    source, commit = resolve(model)
    transformers_logging.disable_progress_bar()  # for copying weights; downloads keep theirs
    common: dict[str, Any] = {"revision": commit, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, backend="pil", **common)
        network = AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, **common
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {model!r} as an image-to-text model: {error}") from error
    model_id, model_revision = identify(model, revision)
    device = torch.device(device)
    network.to(device).eval().requires_grad_(False)
    return Captioner(network, processor, model_id, model_revision, device)


def caption_input(scan: Scan) -> np.ndarray:
    """The scan in gray as a model gets to see it: [h, w, 3] uint8, its longest side at most `MAX_SIDE_PX`."""
    scale = min(1.0, MAX_SIDE_PX / max(scan.height_px, scan.width_px))
    size = (max(1, round(scan.height_px * scale)), max(1, round(scan.width_px * scale)))
    lightness = scan.lightness if scale == 1 else resize(scan.lightness, size)
    gray = lightness_to_gray(lightness).clamp(0, 1).mul(255).round().to(torch.uint8)  # [1, h, w]
    return gray.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def without_medium(caption: str) -> str:
    """The caption without "a black and white photo of": a context prompt says what is in the picture."""
    return _MEDIUM.sub("", " ".join(caption.split())).strip(" .")
