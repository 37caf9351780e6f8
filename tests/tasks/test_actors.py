"""What becomes of an image whose actor goes; the actors themselves are tested in tests/flows."""

from contextlib import contextmanager

import pytest

from tasks.actors import MAX_NODE_LOSSES, ActorGoneError, colorize_on, placement
from tasks.options import MachineOptions
from tasks.records import ImageWork, PlannedImage, Variant
from tests.tasks.test_planning import with_options

PLANNED = PlannedImage(ImageWork("a.png", "v", "a ball", (Variant("primary", None),)), (1,))


def config(max_attempts):
    return with_options(max_attempts=max_attempts, image_timeout_seconds=10)


class Pool:
    """Lends one actor, which is gone for each of the given reasons and then does its work."""

    def __init__(self, *reasons: ActorGoneError) -> None:
        self.reasons, self.told, self.pauses = list(reasons), [], []

    @contextmanager
    def borrow(self):
        yield self

    def pause(self, tries):
        self.pauses.append(tries)

    def colorize(self, planned, timeout_seconds, smaller_because):
        assert timeout_seconds == 10
        self.told.append(smaller_because)
        if self.reasons:
            raise self.reasons.pop(0)
        return [{"status": "ok"}]


def test_what_ran_out_of_memory_is_tried_smaller():
    pool = Pool(ActorGoneError("killed"), ActorGoneError("out of memory", out_of_memory=True))
    assert colorize_on(pool, config(3), PLANNED) == [{"status": "ok"}]
    assert pool.told == [None, None, "out of memory"]
    assert pool.pauses == [1, 2]


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_an_image_may_kill_its_actor_so_often(max_attempts):
    pool = Pool(*[ActorGoneError(f"death {number}") for number in range(9)])
    (row,) = colorize_on(pool, config(max_attempts), PLANNED)
    assert (row["status"], row["error_class"]) == ("quarantined", "DeadlyImageError")
    assert len(pool.told) == max_attempts
    assert f"{max_attempts}. death {max_attempts - 1}" in row["error_message"]


def test_a_lost_node_is_not_the_images_fault_but_not_for_ever():
    lost = [ActorGoneError("node lost", node_lost=True) for _ in range(MAX_NODE_LOSSES + 1)]
    assert colorize_on(Pool(*lost[1:]), config(1), PLANNED) == [{"status": "ok"}]
    assert colorize_on(Pool(*lost), config(1), PLANNED)[0]["status"] == "quarantined"


@pytest.mark.parametrize(
    ("asked", "num_gpus", "placed"),
    [
        ({}, 0, (1, 0.0)),
        ({}, 2, (2, 1.0)),
        ({"device": "cpu"}, 2, (1, 0.0)),
        ({"device": "cpu", "num_actors": 3}, 2, (3, 0.0)),
        ({"device": "cuda"}, 3, (3, 1.0)),
        ({"num_actors": 1}, 2, (1, 1.0)),
        ({"num_actors": 8}, 2, (8, 0.25)),
        ({"gpus_per_actor": 0.5}, 2, (4, 0.5)),
        ({"gpus_per_actor": 0}, 2, (1, 0.0)),
        ({"num_actors": 4, "gpus_per_actor": 1}, 0, (4, 1)),  # a cluster may grow; a machine is checked afterwards
    ],
)
def test_actors_take_the_gpus_that_are_there_unless_told_otherwise(asked, num_gpus, placed):
    assert placement(MachineOptions(**asked), num_gpus) == placed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "cuda"}, "sees no GPU"),
        ({"device": "cpu", "gpus_per_actor": 1}, "contradict"),
        ({"device": "cuda", "gpus_per_actor": 0}, "contradict"),
    ],
)
def test_a_device_that_cannot_be_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        placement(MachineOptions(**asked), 0)
