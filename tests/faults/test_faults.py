"""One round of the faults that say most; `make chaos` has all of them, again and again."""

import random

import pytest

from tests.faults.faults import FAULTS
from tests.faults.harness import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_folder):
    return Bench.prepare(tmp_path_factory.mktemp("faults"), tiny_folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        "SIGKILL of the actor, mid-image",
        "SIGKILL of the whole run at a random moment",
        "Ctrl-C",
        "a manifest part truncated, then verify --repair",
    ],
)
def test_nothing_is_lost_doubled_changed_or_left_behind(bench, tmp_path, name):
    FAULTS[name](bench, str(tmp_path / "out"), 1, random.Random(1)).check()
