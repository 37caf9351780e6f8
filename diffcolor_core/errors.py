"""Every exception that the core raises under a name of its own. All else is ValueError, or a bug."""


class ModelError(ValueError):
    """A checkpoint that is missing, not pinned, not the one expected, or of an architecture that we do not serve."""


class FitError(ValueError):
    """A fit that is missing, damaged, of another format, model or photograph, or made for the primary only."""


class UnreadableImageError(ValueError):
    """A file that is not a picture we can read: broken, a decompression bomb, of another type."""


class DivergedError(RuntimeError):
    """An optimisation or a sampling that left the finite numbers."""
