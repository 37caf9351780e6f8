"""`diffcolor` with a preset `demo` of a few steps, run as its own process: the pipeline is tested, not the method."""

import os
from unittest.mock import patch

from diffcolor_core import config
from flows.cli import app
from tasks import actors
from tests.faults.poison import PoisonedWorker
from tests.flows.conftest import QUICK

if __name__ == "__main__":
    config.PRESETS["demo"] = QUICK
    worker = PoisonedWorker if "DIFFCOLOR_POISON" in os.environ else actors.ImageWorker
    with patch.object(actors, "ImageWorker", worker):
        app()
