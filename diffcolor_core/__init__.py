"""DiffColor (arXiv 2308.01655): object-level colorization of photographs by text.

Each name below is imported when it is first used, so that planning, queries and `--help` start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffcolor_core._version import __version__ as __version__

if TYPE_CHECKING:
    from diffcolor_core.color_terms import ColorReport as ColorReport
    from diffcolor_core.colorizer import DiffColor as DiffColor, Result as Result, ToFit as ToFit
    from diffcolor_core.config import PRESETS as PRESETS, Settings as Settings, preset as preset
    from diffcolor_core.errors import DivergedError as DivergedError, FitError as FitError, ModelError as ModelError
    from diffcolor_core.fits import Fit as Fit
    from diffcolor_scans.errors import UnreadableImageError as UnreadableImageError
    from diffcolor_scans.images import (
        Picture as Picture,
        Scan as Scan,
        read_picture as read_picture,
        read_scan as read_scan,
    )

_MODULES = {
    "diffcolor_core.color_terms": ("ColorReport",),
    "diffcolor_core.colorizer": ("DiffColor", "Result", "ToFit"),
    "diffcolor_core.config": ("PRESETS", "Settings", "preset"),
    "diffcolor_core.errors": ("DivergedError", "FitError", "ModelError", "UnreadableImageError"),
    "diffcolor_core.fits": ("Fit",),
    "diffcolor_scans.images": ("Picture", "Scan", "read_picture", "read_scan"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
