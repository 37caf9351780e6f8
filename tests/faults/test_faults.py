"""One round of the two most telling faults; `make chaos` injects all of them again and again."""

import random
from dataclasses import replace

import pytest

from support.runs import Bench
from tests.faults.faults import FAULTS


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_folder):
    return Bench.prepare(tmp_path_factory.mktemp("faults"), tiny_folder)


@pytest.mark.timeout(900)
def test_after_a_kill_nothing_is_lost_doubled_changed_or_left_behind(bench, tmp_path):
    inject = FAULTS["SIGKILL of the whole run at a random moment"][0]
    inject(bench, str(tmp_path / "out"), 1, random.Random(1)).check()


@pytest.fixture(scope="module")
def bench_on_s3(bench, s3_environment):
    """The same archive, whose pictures must be those of the undisturbed run on the local disk."""
    return replace(bench, outputs="s3://diffcolor-tests/faults", environment=s3_environment)


@pytest.mark.timeout(900)
def test_answers_that_are_lost_on_their_way_from_s3_double_nothing(bench_on_s3):
    inject = FAULTS["connection cut before the store's answer"][0]
    inject(bench_on_s3, f"{bench_on_s3.outputs}/cut", 1, random.Random(1)).check()
