"""Every exception that the core raises under a name of its own. All else is ValueError, or a bug."""

from diffcolor_scans.errors import UnreadableImageError as UnreadableImageError


class ModelError(ValueError):
    """A checkpoint that is missing, not pinned, not the one expected, or of an architecture that we do not serve."""


class FitError(ValueError):
    """A fit that is missing, damaged, of another format, model or photograph, or made for the primary only."""


class DivergedError(RuntimeError):
    """An optimisation or a sampling that left the finite numbers."""
