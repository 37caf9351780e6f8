"""How long-running functions of the core report their progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(what is being done, steps done, steps in all)."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
