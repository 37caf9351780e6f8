"""Scores of a finished picture against a scene whose masks and colours are known."""

import math
import re

from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.prompts import HEX
from diffcolor_scans.color_names import exact_chroma
from diffcolor_scans.images import Picture
from diffcolor_study.cases import Case
from diffcolor_study.pictures import lab_of
from diffcolor_study.scenes import Scene, nearest_color, reference_colors

BAND_PX = 3  # width of the ring around a region in a picture of side 64; scaled with the side
BORDER_PX = 3  # so near to a region's border colours are those of halos


def eroded(mask: Tensor, radius: int = 1) -> Tensor:
    """The pixels of a mask [H, W] whose whole neighbourhood is covered; all its pixels if there are none."""
    inner = _without_rim(mask, radius)
    return inner if bool(inner.any()) else mask > 0.5


def _without_rim(mask: Tensor, width_px: int) -> Tensor:
    size = 2 * width_px + 1
    return -F.max_pool2d(-mask[None, None], size, stride=1, padding=width_px)[0, 0] > 0.99


def region_colors(picture: Picture, scene: Scene) -> list[str]:
    """For each region the colour word nearest to the median a*, b* of its eroded mask."""
    lab = lab_of(picture)
    return [nearest_color(*lab[1:, eroded(mask)].median(dim=1).values.tolist()) for mask in scene.masks]


def region_scores(case: Case, lab: Tensor) -> dict[str, float]:
    """How well the picture, L*a*b* [3, H, W], shows the colours asked for.

    object_color_accuracy: share of the regions with a hue asked whose median a*b* is nearest to it.
    neutral_accuracy: the same for black, gray and white. all_right_per_image: 1 if every region is right.
    ab_distance: mean distance from a region's median a*b* to the reference colour. chroma: mean of the
    regions with a hue asked. border_wrong: share of the pixels within `BORDER_PX` inside a region's border whose
    own colour is not the one asked for. A figure is NaN where nothing of its kind was asked.
    """
    references = reference_colors()
    hues: list[bool] = []
    neutrals: list[bool] = []
    distances: list[float] = []
    chromas: list[float] = []
    at_border: list[bool] = []
    for word, mask in zip(case.asked, case.scene.masks, strict=True):
        if word is None:
            continue
        a, b = lab[1:, eroded(mask)].median(dim=1).values.tolist()
        (neutrals if word == "neutral" else hues).append(nearest_color(a, b) == word)
        distances.append(math.dist((a, b), references[word]))
        if word != "neutral":
            chromas.append(math.hypot(a, b))
        rim = (mask > 0.99) & ~_without_rim(mask, BORDER_PX)
        at_border += [nearest_color(a, b) != word for a, b in lab[1:, rim].T.tolist()]
    every = [*hues, *neutrals]
    return {
        "object_color_accuracy": _mean(hues),
        "neutral_accuracy": _mean(neutrals),
        "all_right_per_image": float(all(every)) if every else math.nan,
        "ab_distance": _mean(distances),
        "chroma": _mean(chromas),
        "border_wrong": _mean(at_border),
    }


def leakage(before: Tensor, after: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean change of a*b* (Delta E_ab without L*) outside a region [H, W], and in a thin band around it."""
    change = (after - before)[1:].norm(dim=0)
    outside = mask < 0.01
    reach = max(1, round(BAND_PX * mask.shape[-1] / 64))
    wide = F.max_pool2d(mask[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0.01
    return float(change[outside].mean()), float(change[outside & wide].mean())


def region_right(case: Case, lab: Tensor, index: int) -> bool:
    """Whether region `index` has the colour asked for."""
    a, b = lab[1:, eroded(case.scene.masks[index])].median(dim=1).values.tolist()
    return nearest_color(a, b) == case.asked[index]


def exact_scores(prompt: str, lab: Tensor, mask: Tensor) -> dict[str, float]:
    """How near a region of L*a*b* [3, H, W] comes to the hex code in the prompt.

    hue_error_degrees: of the median a*b* of the region. hue_within_10_degrees: 1 if it is at most 10. chroma_share: of
    the code's chroma.
    """
    (code,) = re.findall(HEX, prompt)
    wanted = exact_chroma(code)
    assert wanted is not None  # a hex code is exact
    a, b = lab[1:, eroded(mask)].median(dim=1).values.tolist()
    turn = math.degrees(math.atan2(b, a) - math.atan2(wanted[1], wanted[0]))
    error = abs((turn + 180) % 360 - 180)
    return {
        "hue_error_degrees": error,
        "hue_within_10_degrees": float(error <= 10),
        "chroma_share": math.hypot(a, b) / math.hypot(*wanted),
    }


def _mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
