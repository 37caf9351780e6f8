"""The software's version, for manifests and metadata."""

__version__ = "0.1.0"
