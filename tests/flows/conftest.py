from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from diffcolor_core import config
from support.in_process import InProcessPool
from support.settings import QUICK


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of the tests' own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session", autouse=True)
def ray_is_there(local_ray: None) -> None:
    """The flow uses a Ray that is there already."""


@pytest.fixture(autouse=True)
def quick_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """All presets with a few steps: what is tested here is the pipeline."""
    for name in config.PRESETS:
        monkeypatch.setitem(config.PRESETS, name, QUICK)


@pytest.fixture
def without_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are colorized in this process, as an actor takes 15 s to start: for tests of what is around actors."""
    monkeypatch.setattr("flows.colorize_archive.ray_actors", lambda config: nullcontext(InProcessPool(config)))
