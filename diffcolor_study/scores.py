"""Scores of a finished picture against a scene whose masks and colours are known."""

import math

from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.demo.evaluate import eroded
from diffcolor_core.demo.scenes import nearest_color, reference_colors
from diffcolor_core.study.cases import Case

BAND_PX = 3  # width of the ring around a region, at a picture side of 64


def region_scores(case: Case, lab: Tensor) -> dict[str, float]:
    """How the asked colours came out. NaN where nothing of the kind was asked.

    object_color_accuracy: regions with a hue asked whose median a*b* is nearest to it.
    neutral_accuracy: the same for black, gray and white. all_right_per_image: 1 if every region is.
    ab_distance: median a*b* to the reference colour; chroma: of the regions with a hue asked.
    """
    references = reference_colors()
    hues: list[bool] = []
    neutrals: list[bool] = []
    distances: list[float] = []
    chromas: list[float] = []
    for word, mask in zip(case.asked, case.scene.masks, strict=True):
        if word is None:
            continue
        a, b = lab[1:, eroded(mask)].median(dim=1).values.tolist()
        (neutrals if word == "neutral" else hues).append(nearest_color(a, b) == word)
        distances.append(math.dist((a, b), references[word]))
        if word != "neutral":
            chromas.append(math.hypot(a, b))
    every = [*hues, *neutrals]
    return {
        "object_color_accuracy": _mean(hues),
        "neutral_accuracy": _mean(neutrals),
        "all_right_per_image": float(all(every)) if every else math.nan,
        "ab_distance": _mean(distances),
        "chroma": _mean(chromas),
    }


def leakage(before: Tensor, after: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean chroma change (Delta E_ab of a*b* alone) outside a region [H, W], and in a thin band around it."""
    change = (after - before)[1:].norm(dim=0)
    outside = mask < 0.01
    reach = max(1, round(BAND_PX * mask.shape[-1] / 64))
    wide = F.max_pool2d(mask[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0.01
    return float(change[outside].mean()), float(change[outside & wide].mean())


def region_right(case: Case, lab: Tensor, index: int) -> bool:
    """Whether one region has the colour asked."""
    a, b = lab[1:, eroded(case.scene.masks[index])].median(dim=1).values.tolist()
    return nearest_color(a, b) == case.asked[index]


def _mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
