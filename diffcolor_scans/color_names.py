"""Names of colours: basic terms ("red"), names of CSS ("crimson") and hex codes ("#8b0000"). The last two are exact."""

import math
from functools import cache

import torch
from PIL import ImageColor

from diffcolor_scans.color import srgb_to_lab

BASIC_HUES = {
    "red": 32.0,
    "orange": 62.0,
    "brown": 60.0,
    "yellow": 95.0,
    "green": 142.0,
    "turquoise": 200.0,
    "blue": 278.0,
    "purple": 320.0,
    "pink": 0.0,
    "tan": 78.4,
}
"""CIELAB hue angles (degrees) at the centres of English basic colour terms, about those of Sturges and Whitfield
(1995). CSS's "blue" and "green" lie elsewhere, as they are corners of the sRGB cube."""
NEUTRAL = ("black", "gray", "grey", "white", "silver")
_THINGS = (
    *("chocolate", "coral", "gold", "honeydew", "ivory", "lavender", "linen", "olive", "orchid", "peru", "plum"),
    *("salmon", "seashell", "sienna", "snow", "thistle", "tomato", "wheat"),
)
"""Names of CSS that are things too: "a wheat field" asks for no exact colour."""


def is_color(word: str) -> bool:
    """Whether a word in lower case is a colour."""
    return word.startswith("#") or word in (*BASIC_HUES, *NEUTRAL) or word in ImageColor.colormap


@cache
def hue_of(word: str) -> float | None:
    """The hue angle (degrees) of a colour, None for a neutral one. Raises KeyError if it is not a colour.

    The basic terms come from the table above, all others from CSS's list of names and from hex codes.
    """
    word = word.lower()
    if word in BASIC_HUES:
        return BASIC_HUES[word]
    if word in NEUTRAL:
        return None
    _, a, b = _lab_of(word)
    return math.degrees(math.atan2(b, a)) % 360 if math.hypot(a, b) > 5 else None


def exact_chroma(color: str) -> tuple[float, float] | None:
    """The a*b* of a hex code or a name of CSS; None for basic terms and names of things, which leave it open."""
    color = color.lower()
    return None if color in (*BASIC_HUES, *NEUTRAL, *_THINGS) else _lab_of(color)[1:]


@cache
def basic_term(color: str) -> str:
    """The basic colour term that is nearest to a colour by hue; its lightness tells black, gray, white and brown."""
    color = color.lower()
    lightness, hue = _lab_of(color)[0], hue_of(color)
    if hue is None:
        return "black" if lightness < 25 else "gray" if lightness < 80 else "white"
    if abs((hue - BASIC_HUES["orange"] + 180) % 360 - 180) < 15:
        return "brown" if lightness < 55 else "orange"  # they share their hue
    terms = (term for term in BASIC_HUES if term not in ("brown", "tan"))
    return min(terms, key=lambda term: abs((hue - BASIC_HUES[term] + 180) % 360 - 180))


def _lab_of(color: str) -> tuple[float, float, float]:
    rgb = ImageColor.getrgb(color if color.startswith("#") else ImageColor.colormap[color])[:3]
    lightness, a, b = srgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(3, 1, 1) / 255).flatten().tolist()
    return lightness, a, b
