"""The command `diffcolor`."""

from flows.cli import coloring, outputs, report, study  # each adds its commands
from flows.cli.common import app

__all__ = ["app", "coloring", "outputs", "report", "study"]
