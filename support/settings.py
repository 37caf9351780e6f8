"""Settings for tests of everything but the method."""

from diffcolor_core import Settings
from diffcolor_core.config import SamplingSettings, Stage1Settings, Stage2Settings

QUICK = Settings(
    stage1=Stage1Settings(num_steps=2, learning_rate=1e-3),
    stage2=Stage2Settings(embedding_steps=2, model_steps=2),
    sampling=SamplingSettings(num_steps=3),
)
"""Two steps of each optimisation and three of sampling: a fit takes a second."""
