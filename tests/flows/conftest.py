import os
from collections.abc import Iterator

import pytest

from diffcolor_core import config
from support.settings import QUICK


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of the tests' own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[None]:
    """One real local Ray for all flow tests: the flow uses a Ray that is there already."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on loopback
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def quick_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """All presets with a few steps: what is tested here is the pipeline."""
    for name in config.PRESETS:
        monkeypatch.setitem(config.PRESETS, name, QUICK)
