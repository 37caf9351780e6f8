"""Versions, for manifests and metadata."""

__version__ = "0.2.0"
METHOD_VERSION = 8
"""Raised whenever the same inputs would give other pixels: a run does work of another version again."""
