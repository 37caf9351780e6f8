"""The command `diffcolor`."""

from flows.cli import coloring, outputs, study  # each adds its commands
from flows.cli.common import app

__all__ = ["app", "coloring", "outputs", "study"]
