"""What becomes of an image whose actor goes; the actors themselves are tested in tests/flows."""

from contextlib import contextmanager

import pytest

from tasks.actors import MAX_NODE_LOSSES, ActorGoneError, colorize_on
from tasks.archive import ImageWork, Variant
from tasks.planning import PlannedImage
from tests.tasks.test_planning import CONFIG

PLANNED = PlannedImage(ImageWork("a.png", "v", "a ball", (Variant("primary", None),)), (1,))


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
        self.told.append(smaller_because)
        if self.reasons:
            raise self.reasons.pop(0)
        return [{"status": "ok"}]


def test_what_ran_out_of_memory_is_tried_smaller():
    pool = Pool(ActorGoneError("killed"), ActorGoneError("out of memory", out_of_memory=True))
    assert colorize_on(pool, CONFIG, PLANNED, 10, 3) == [{"status": "ok"}]
    assert pool.told == [None, None, "out of memory"]
    assert pool.pauses == [1, 2]


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_an_image_may_kill_its_actor_so_often(max_attempts):
    pool = Pool(*[ActorGoneError(f"death {number}") for number in range(9)])
    (row,) = colorize_on(pool, CONFIG, PLANNED, 10, max_attempts)
    assert (row["status"], row["error_class"]) == ("quarantined", "DeadlyImageError")
    assert len(pool.told) == max_attempts
    assert f"{max_attempts}. death {max_attempts - 1}" in row["error_message"]


def test_a_lost_node_is_not_the_images_fault_but_not_for_ever():
    lost = [ActorGoneError("node lost", node_lost=True) for _ in range(MAX_NODE_LOSSES + 1)]
    assert colorize_on(Pool(*lost[1:]), CONFIG, PLANNED, 10, 1) == [{"status": "ok"}]
    assert colorize_on(Pool(*lost), CONFIG, PLANNED, 10, 1)[0]["status"] == "quarantined"
