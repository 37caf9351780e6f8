"""Training data of the photo model: photographs in memory, random crops, random emulsions, captions.

The folder is laid out as `catalog.csv` (image, split, context_prompt, target_prompt, ...) beside the
pictures it names. Only rows of `split` train are ever read for training.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.prompts import GENERIC_PROMPT
from diffcolor_scans.color import lab_to_srgb, lightness_of, srgb_to_lab
from diffcolor_scans.color_names import hue_of

SHORT_SIDE_PX = 160  # of the pictures in memory
SIDE_PX = 96  # of the squares that the model is trained on
PLATE_SHARE = 0.85  # of a batch
BLOCK = 12  # neighbouring plates show the same place: whole blocks are held out


@dataclass(frozen=True)
class Photo:
    """A photograph: sRGB uint8 [3, H, W] and L*a*b* float16 [3, H, W], with its captions, empty where it has none.

    plate: one of the three-filter glass plates, the domain that the model is for.
    """

    name: str
    rgb: Tensor
    lab: Tensor
    context: str
    target: str
    plate: bool


def load_photos(folder: Path, split: str) -> list[Photo]:
    """The photographs of one split; `validation` is every tenth block of plates of `train`, which then lacks them."""
    photos = []
    with (folder / "catalog.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if _split_of(row) != split:
                continue
            with Image.open(folder / row["image"]) as file_image:
                image = file_image.convert("RGB")
                scale = SHORT_SIDE_PX / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                rgb = torch.from_numpy(np.array(image.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)
            plate = row["image"].startswith("plates/")
            rgb = rgb.contiguous()
            lab = srgb_to_lab(rgb.float() / 255).half()
            photos.append(Photo(row["image"], rgb, lab, row["context_prompt"], row["target_prompt"], plate))
    return photos


def _split_of(row: dict[str, str]) -> str:
    number = re.search(r"plate-(\d+)", row["image"])
    if row["split"] == "train" and number and int(number[1]) // BLOCK % 10 == 0:
        return "validation"
    return row["split"]


def draw_photos(photos: list[Photo], rng: np.random.Generator, size: int) -> list[Photo]:
    """A batch, `PLATE_SHARE` of it plates."""
    plates = [p for p in photos if p.plate]
    others = [p for p in photos if not p.plate]
    return [
        group[int(rng.integers(len(group)))]
        for group in (plates if rng.random() < PLATE_SHARE else others for _ in range(size))
    ]


def random_crop(photo: Photo, side_px: int, rng: np.random.Generator) -> Tensor:
    """A square of 60 to 100% of the shorter side, half of them mirrored.

    float [6, side, side]: sRGB in [0, 1], then L*a*b*.
    """
    _, height, width = photo.rgb.shape
    side = round(min(height, width) * rng.uniform(0.6, 1.0))
    top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
    here = (slice(None), slice(top, top + side), slice(left, left + side))
    crop = torch.cat((photo.rgb[here].float() / 255, photo.lab[here].float()))
    crop = F.interpolate(crop[None], size=(side_px, side_px), mode="bilinear", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if rng.random() < 0.5 else crop


_LIGHTNESS = lightness_of(torch.linspace(0, 1, 1025).view(1, 1, -1).expand(3, -1, -1)).flatten()  # of a gray value


def random_lightness(crops: Tensor, rng: np.random.Generator) -> Tensor:
    """L* [B, 1, h, w] as a random emulsion would have recorded the pictures `crops` [B, 6, h, w].

    Seven in ten are today's luminance. The others mix the channels at random, mostly blue and green: old
    plates hardly saw red. Exposure, gamma and contrast vary too.
    """
    values = []
    for crop in crops:
        gray = crop[3:4]
        if rng.random() < 0.3:
            weights = torch.from_numpy(rng.dirichlet((0.6, 1.5, 1.5))).to(crop)
            gray = _LIGHTNESS[((weights[:, None, None] * crop[:3]).sum(dim=0, keepdim=True) * 1024).long()]
        if rng.random() < 0.7:
            gamma, gain, lift = np.exp(rng.normal(0, 0.15)), np.exp(rng.normal(0, 0.08)), rng.normal(0, 3)
            gray = 100 * (gray / 100).clamp(min=0) ** gamma * gain + lift
        values.append(gray.clamp(0, 100))
    return torch.stack(values)


def joined(lightness: Tensor, chroma: Tensor) -> Tensor:
    """sRGB [B, 3, h, w] in [0, 1] of L* and a*b*, clipped: near enough for training."""
    return lab_to_srgb(torch.cat((lightness, chroma), dim=1)).clamp(0, 1)


def rotated(ab: Tensor, degrees: float) -> Tensor:
    """a*b* [2, h, w] with every hue turned by so much."""
    angle = np.deg2rad(degrees)
    a, b = ab
    return torch.stack((np.cos(angle) * a - np.sin(angle) * b, np.sin(angle) * a + np.cos(angle) * b))


_HUES = {
    word: hue_of(word) or 0.0 for word in ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
}
_PLAIN = {"tan": "orange", "brown": "orange", "golden": "yellow", "beige": "orange", "violet": "purple"}


def rotated_words(caption: str, degrees: float) -> str:
    """The caption with every hue word replaced by the nearest basic one after the turn; neutrals stay."""
    words = caption.split(" ")
    for i, word in enumerate(words):
        plain = _PLAIN.get(word, word)
        hue = _hue(plain)
        if hue is not None:
            words[i] = min(_HUES, key=lambda name: abs((_HUES[name] - hue - degrees + 180) % 360 - 180))
    return " ".join(words)


def recolored(ab: Tensor, caption: str, rng: np.random.Generator) -> tuple[Tensor, str]:
    """One hue of the picture turned to another or to gray, in a*b* [2, h, w] and in the caption.

    Regions are what has the hue of a colour word. So the word of one noun comes to decide about that noun only. Both
    are unchanged where the caption names no hue, or the picture does not show it.
    """
    words = [word for word in caption.split(" ") if _hue(_PLAIN.get(word, word)) is not None]
    if not words:
        return ab, caption
    hue = _hue(_PLAIN.get(word := str(rng.choice(words)), word)) or 0.0
    wanted = str(rng.choice([*(n for n, other in _HUES.items() if abs(_turn(other, hue)) > 40), "gray", "white"]))
    chroma, angle = ab.norm(dim=0), torch.rad2deg(torch.atan2(ab[1], ab[0]))
    share = ((45 - _turn(angle, hue).abs()) / 15).clamp(0, 1) * ((chroma - 3) / 4).clamp(0, 1)
    if share.mean() < 0.02:
        return ab, caption
    turned = torch.deg2rad(torch.tensor(_HUES.get(wanted, hue)) + 0.5 * _turn(angle, hue))
    strength = chroma.clamp(min=18) if wanted in _HUES else 0.1 * chroma
    other = torch.stack((strength * turned.cos(), strength * turned.sin()))
    spoken = [wanted if word in words and abs(_turn(_hue(_PLAIN.get(word, word)) or 0.0, hue)) < 30 else word
              for word in caption.split(" ")]  # fmt: skip
    return ab + share * (other - ab), " ".join(spoken)


def _turn(angle: Any, start: float) -> Any:
    """From `start` to `angle`, degrees in [-180, 180)."""
    return (angle - start + 180) % 360 - 180


def _hue(word: str) -> float | None:
    try:
        return hue_of(word)
    except KeyError:
        return None


def is_color_word(word: str) -> bool:
    """Whether a word of a caption names a colour, neutral ones too."""
    try:
        hue_of(word)
    except KeyError:
        return False
    return True


def draw_caption(photo: Photo, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption and whether it tells colours: a generic one or none 30%, without 20%, with colour words 50%.

    Up to half of the words are left out, for a whole caption is a fingerprint by which a photograph can be learned by
    heart.
    """
    draw = rng.random()
    if draw < 0.3:
        return str(rng.choice(("", GENERIC_PROMPT))), False
    caption, colored = (photo.context, False) if draw < 0.5 or not photo.target else (photo.target, True)
    left_out = rng.uniform(0, 0.5)
    return " ".join(word for word in caption.split(" ") if rng.random() >= left_out), colored


def captioned(photos: Sequence[Photo], ab: Tensor, rng: np.random.Generator) -> list[str]:
    """A caption for each photograph. Some that tell colours tell others, and `ab` [B, 2, h, w] is changed to those."""
    captions = []
    for i, photo in enumerate(photos):
        caption, colored = draw_caption(photo, rng)
        while colored and rng.random() < 0.5:
            ab[i], caption = recolored(ab[i], caption, rng)
        captions.append(caption)
    return captions


def captions_of(photos: Sequence[Photo]) -> list[str]:
    """Every caption there is."""
    return [text for photo in photos for text in (photo.context, photo.target) if text]
