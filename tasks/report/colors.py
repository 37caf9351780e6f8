"""What the page must know to tell which colours a lightness cannot show."""

from functools import cache
from typing import Any

from PIL import ImageColor

HUE_STEP_DEGREES, LIGHTNESS_STEP = 10, 5


@cache
def showable_colors() -> dict[str, Any]:
    """For the page's script: the hue of each colour word, and how much chroma sRGB can show.

    hues: hue angles (degrees) by word; null for neutral colours, which every lightness has. chroma: the largest C*ab,
    a row for each L* (0 to 100) and a column for each hue (0 to 350). full_chroma: what is enough for a colour.
    """
    import torch  # here, as importing it takes seconds

    from diffcolor_core.color_terms import FULL_CHROMA
    from diffcolor_scans.color import fit_gamut
    from diffcolor_scans.color_names import BASIC_HUES, NEUTRAL, hue_of

    lightness = torch.arange(0, 101, LIGHTNESS_STEP, dtype=torch.float64)[:, None]
    hues = torch.arange(0, 360, HUE_STEP_DEGREES, dtype=torch.float64).deg2rad()[None]
    far = torch.stack(torch.broadcast_tensors(lightness, 200 * hues.cos(), 200 * hues.sin()))
    reachable: list[list[float]] = fit_gamut(far)[1:].norm(dim=0).round().tolist()
    words = sorted({*BASIC_HUES, *NEUTRAL, *ImageColor.colormap})
    return {
        "hues": {word: None if (hue := hue_of(word)) is None else round(hue) for word in words},
        "chroma": reachable,
        "hue_step": HUE_STEP_DEGREES,
        "lightness_step": LIGHTNESS_STEP,
        "full_chroma": FULL_CHROMA,
    }
