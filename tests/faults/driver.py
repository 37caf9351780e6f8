"""`diffcolor`, with a preset `demo` of a few steps: what is tested is the pipeline. Run as a process of its own."""

import os

from diffcolor_core import config
from flows.cli import app
from tasks import colorize
from tests.faults.poison import PoisonedWorker
from tests.flows.conftest import QUICK

if __name__ == "__main__":
    config.PRESETS["demo"] = QUICK
    if "DIFFCOLOR_POISON" in os.environ:
        colorize.ImageWorker = PoisonedWorker  # type: ignore[misc]
    app()
