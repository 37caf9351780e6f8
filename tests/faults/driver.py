"""`diffcolor`, with a preset `demo` of a few steps: what is tested is the pipeline. Run as a process of its own."""

from diffcolor_core import config
from flows.cli import app
from tests.flows.conftest import QUICK

if __name__ == "__main__":
    config.PRESETS["demo"] = QUICK
    app()
