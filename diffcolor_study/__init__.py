"""The benchmark with known truth: rendered scenes, prompts that name other colours, scores of the saved files.

Nothing is imported here, so that `scenes` needs none of the study's own packages (scipy, torchmetrics).
"""
