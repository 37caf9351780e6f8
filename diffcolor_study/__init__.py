"""The benchmark with known truth: scenes with masks, counterfactual prompts, scores of the saved files."""

from diffcolor_core.study.cases import TASKS
from diffcolor_core.study.methods import METHODS
from diffcolor_core.study.photographs import run_photographs
from diffcolor_core.study.runner import run_study, summarise

__all__ = ["METHODS", "TASKS", "run_photographs", "run_study", "summarise"]
