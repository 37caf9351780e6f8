"""The command `diffcolor`."""

from flows.cli import captions, coloring, outputs, report, study  # each adds its commands
from flows.cli.common import app

__all__ = ["app", "captions", "coloring", "outputs", "report", "study"]
