"""Versions, for manifests and metadata."""

__version__ = "0.2.0"
METHOD_VERSION = 5
"""Raised whenever the same inputs would give other pixels: results of different versions are different work."""
