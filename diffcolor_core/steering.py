"""Steering [O]: the region of a noun gets the very colour that the prompt gives it.

Exact colours always do, within what the scan's luminance allows: the gamut is kept at assembly. Words do where a
model hardly obeys them (`stage2.steer_words`) and what it made contradicts them.
"""

import math

import torch
from torch import Tensor

from diffcolor_core.color_terms import ColoredPhrase, median_inside
from diffcolor_scans.color_names import exact_chroma, hue_of

WORD_CHROMA = 16.0
"""C*ab of a word's colour: the mean of what the captions of 1,000 glass plates call red, green, blue and so on."""
FAR_DEGREES = 60.0
"""A picture's hue so far from a word's contradicts it."""


def steered_to(item: ColoredPhrase, region: Tensor, chroma: Tensor, *, words: bool) -> Tensor | None:
    """The a*b* [2] that a noun's region is to have; None where what the model made stays.

    region: [h, w], 0..1. chroma: [2, h, w], what the model made. words: steer by words too: where the earlier prompt
    gave the noun another one, or the picture shows a far hue.
    """
    if item.color is None or not item.changed:
        return None
    exact = exact_chroma(item.color)
    if exact is not None:
        return torch.tensor(exact)
    hue = hue_of(item.color)
    if not words or (item.before is None and not _contradicts(hue, region, chroma)):
        return None
    if hue is None:
        return torch.zeros(2)
    return WORD_CHROMA * torch.tensor((math.cos(math.radians(hue)), math.sin(math.radians(hue))))


def _contradicts(hue: float | None, region: Tensor, chroma: Tensor) -> bool:
    medians = median_inside(region, chroma)
    if hue is None or medians is None:
        return False
    a, b = medians
    return abs((math.degrees(math.atan2(b, a)) - hue + 180) % 360 - 180) > FAR_DEGREES
