"""DiffColor (arXiv 2308.01655): object-level colorization of photographs by text."""

from diffcolor_core._version import __version__
from diffcolor_core.color_terms import ColorReport
from diffcolor_core.colorizer import DiffColor, Result
from diffcolor_core.config import PRESETS, Settings, preset
from diffcolor_core.fits import Fit, FitError
from diffcolor_core.images import Picture, Scan, UnreadableImageError, read_picture, read_scan

__all__ = [
    "PRESETS",
    "ColorReport",
    "DiffColor",
    "Fit",
    "FitError",
    "Picture",
    "Result",
    "Scan",
    "Settings",
    "UnreadableImageError",
    "__version__",
    "preset",
    "read_picture",
    "read_scan",
]
