"""`python -m support.driver`: the command `diffcolor`, with few steps in all presets.

For tests of the pipeline. DIFFCOLOR_POISON makes three images hang, crash or exhaust the memory.
"""

import os
from unittest.mock import patch

from diffcolor_core import config
from flows.cli import app
from support.poison import PoisonedWorker
from support.settings import QUICK
from tasks import actors

if __name__ == "__main__":
    config.PRESETS |= dict.fromkeys(config.PRESETS, QUICK)
    worker = PoisonedWorker if "DIFFCOLOR_POISON" in os.environ else actors.ImageWorker
    with patch.object(actors, "ImageWorker", worker):
        app()
