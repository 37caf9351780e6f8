"""Actors that die, hang or do not start, on a real Ray. What becomes of an image is in test_actors.py."""

from contextlib import contextmanager

import pytest

from support.waiting import wait_for
from tasks import actors
from tasks.actors import colorize_all_on, ray_actors
from tasks.records import ImageWork, PlannedImage, Variant
from tests.tasks import workers
from tests.tasks.test_planning import with_options


@pytest.fixture
def working(local_ray, monkeypatch, tmp_path):
    """Opens a pool of workers of a class; what it gives has them do images, and returns the row of each."""

    @contextmanager
    def open_pool(worker, **options):
        monkeypatch.setattr(actors, "ImageWorker", worker)
        config = with_options(output=str(tmp_path / "out"), **options)

        def colorize(*images):
            variant = Variant("primary", None)
            planned = [PlannedImage(ImageWork(image, "v", "a ball", (variant,)), (1,)) for image in images]
            return {image.work.image_key: row for image, (row,) in colorize_all_on(pool, config, planned)}

        with ray_actors(config) as pool:
            yield colorize

    return open_pool


def told(row):
    return row["status"], row.get("error_class")


def test_an_image_that_kills_its_actor_is_quarantined_and_the_others_are_done(working):
    with working(workers.DeadlyWorker, max_attempts=2) as colorize:
        rows = colorize("a.png", "deadly.png", "failing.png", "b.png")
    assert {image: told(row) for image, row in rows.items()} == {
        "a.png": ("ok", None),
        "deadly.png": ("quarantined", "DeadlyImageError"),
        "failing.png": ("failed", "RuntimeError"),
        "b.png": ("ok", None),
    }
    assert "its worker died 2 times on this image: 1. " in rows["deadly.png"]["error_message"]
    assert rows["failing.png"]["error_message"] == "the store is away"


def test_an_image_that_kills_the_actor_of_its_batch_is_quarantined_alone(working):
    with working(workers.DeadlyWorker, batch=4, max_attempts=1) as colorize:
        rows = colorize("a.png", "deadly.png", "b.png", "c.png")
    assert {image for image, row in rows.items() if told(row) == ("ok", None)} == {"a.png", "b.png", "c.png"}
    assert told(rows["deadly.png"]) == ("quarantined", "DeadlyImageError")
    assert "died 1 times on this image" in rows["deadly.png"]["error_message"]


def test_an_image_that_takes_too_long_is_quarantined(working):
    with working(workers.HangingWorker, image_timeout_seconds=2, max_attempts=1) as colorize:
        rows = colorize("a.png", "endless.png", "b.png")
    assert [told(row) for row in rows.values()] == [("ok", None), ("quarantined", "DeadlyImageError"), ("ok", None)]
    assert "1. no result within 2 s" in rows["endless.png"]["error_message"]


def test_a_run_without_any_actor_fails_and_says_why(working):
    with working(workers.BrokenWorker) as colorize, pytest.raises(Exception, match="no model on this machine"):
        colorize("a.png")


def test_an_actor_that_cannot_be_started_is_left_out(working, caplog):
    with working(workers.HalfBrokenWorker, num_actors=2) as colorize:
        wait_for(lambda: "an actor cannot be started" in caplog.text, seconds=60)
        assert [told(row) for row in colorize("a.png", "b.png").values()] == [("ok", None)] * 2
