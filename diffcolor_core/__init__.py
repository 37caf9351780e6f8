"""DiffColor (arXiv 2308.01655): object-level colorization of photographs by text."""

from diffcolor_core.colorizer import DiffColor, Fit, Result
from diffcolor_core.config import PRESETS, Settings, preset
from diffcolor_core.images import Picture, Scan, UnreadableImageError, read_scan

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "DiffColor",
    "Fit",
    "Picture",
    "Result",
    "Scan",
    "Settings",
    "UnreadableImageError",
    "__version__",
    "preset",
    "read_scan",
]
