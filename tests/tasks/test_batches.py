"""Runs with `--batch`: what the neighbours in a batch change of an image's bytes and rows, which is nothing.

In batches of four, as the tiny checkpoint has layers of eight channels: torch computes 32 numbers at a time, and what
is left over at the end of a batch in another way.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffcolor_core import Settings
from diffcolor_core.config import SamplingSettings, Stage1Settings, Stage2Settings
from support.pictures import gray_picture
from tasks.actors import BATCHES_AT_A_TIME, ActorGoneError, colorize_all_on
from tasks.archive import CatalogRow
from tasks.colorize import ImageWorker
from tasks.errors import AcceleratorFaultError
from tasks.manifest import commit_part
from tasks.options import RunOptions
from tasks.planning import open_plan, shard_sizes
from tasks.records import ImageWork, PlannedImage, RunConfig, Variant
from tasks.runs import open_run
from tasks.storage import Store
from tests.tasks.test_planning import CONFIG, with_options

ADAPTERS = Settings(
    stage1=Stage1Settings(num_steps=1, learning_rate=1e-3, adapter_rank=2),
    stage2=Stage2Settings(embedding_steps=1, model_steps=2, model_learning_rate=1e-2, adapter_rank=2),
    sampling=SamplingSettings(num_steps=2),
)
NAMES = ["0.png", "1.png", "2.png", "3.png", "4.png", "upright.png"]
CATALOG = [CatalogRow(i, name, "a ball on a table", "a red ball") for i, name in enumerate(NAMES, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As an actor has that fits batches on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_in(folder, tiny_folder):
    """Five scans of one shape and one of another, in batches of four."""
    from diffcolor_core.model_files import identify

    (folder / "in").mkdir()
    for seed, name in enumerate(NAMES):
        size = (56, 40) if name == "upright.png" else (40, 56)
        Image.fromarray(gray_picture(*size, seed=seed)).save(folder / "in" / name)
    model_id, model_revision = identify(str(tiny_folder))
    options = RunOptions(archive=str(folder / "in"), output=str(folder / "out"), model=str(tiny_folder), batch=4)
    return RunConfig(
        options=options, run_id="r", model_id=model_id, model_revision=model_revision, settings=ADAPTERS, generation=1
    )


@pytest.fixture
def config(tmp_path, tiny_folder):
    return config_in(tmp_path, tiny_folder)


def planned(config, catalog=CATALOG):
    with open_plan(catalog) as plan:
        plan.fill(config)
        return list(plan.images())


def in_batches(worker, images):
    """The rows by image, and how many photographs each batch had."""
    sizes, fit_batch = [], worker.pipe.fit_batch

    def counting(photographs, **more):
        sizes.append(len(photographs))
        return fit_batch(photographs, **more)

    worker.pipe.fit_batch = counting
    try:
        return {images[i].work.image_key: rows for i, rows in worker.colorize_batch(images)}, sizes
    finally:
        worker.pipe.fit_batch = fit_batch


def made(row):
    """What has to be the same: the hash of the picture, and the fitted weights."""
    return row["output_sha256"], row["primary_sha256"], (Path(row["fit_uri"]) / "fit.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_folder):
    config = config_in(tmp_path_factory.mktemp("undisturbed"), tiny_folder)
    rows, sizes = in_batches(ImageWorker(config), planned(config))
    assert sizes == [4, 4, 4], "four scans, one with three copies of itself, and the upright one with three"
    assert {row["status"] for (row,) in rows.values()} == {"ok"}
    return {name: made(row) for name, (row,) in rows.items()}


def test_neighbours_order_and_copies_change_no_bit_of_an_image(config, undisturbed, tmp_path):
    images = planned(config)
    others, sizes = in_batches(ImageWorker(config), [images[i] for i in (4, 5, 2, 0)])
    assert sizes == [4, 4]
    assert {name: made(row) for name, (row,) in others.items()} == {n: m for n, m in undisturbed.items() if n in others}

    alone = ImageWorker(with_options(config, output=str(tmp_path / "alone")))
    for number in (1, 3):
        (row,) = alone.colorize(images[number])
        assert made(row) == undisturbed[NAMES[number]]
        assert row.get("fallback") is None
    (row,) = ImageWorker(with_options(config, output=str(tmp_path / "one"), batch=1)).colorize(images[3])
    assert made(row)[2] != undisturbed["3.png"][2], "a batch of one is another batch: this test would see a difference"


def test_a_photograph_that_diverges_fails_alone(config, undisturbed):
    worker = ImageWorker(config)
    fit_batch = worker.pipe.fit_batch

    def broken(photographs, **more):
        scan = replace(photographs[1].image, lightness=torch.full_like(photographs[1].image.lightness, torch.nan))
        return fit_batch([photographs[0], photographs[1]._replace(image=scan), *photographs[2:]], **more)

    worker.pipe.fit_batch = broken
    rows = dict(worker.colorize_batch(planned(config)[:4]))
    assert [rows[i][0]["status"] for i in range(4)] == ["ok", "failed", "ok", "ok"]
    assert (rows[1][0]["error_class"], rows[1][0].get("fit_uri")) == ("DivergedError", None)
    assert [made(rows[i][0]) for i in (0, 2, 3)] == [undisturbed[NAMES[i]] for i in (0, 2, 3)]


def test_what_cannot_be_a_batch_is_tried_one_by_one(config, undisturbed):
    """Each with copies of itself, so that it makes no difference."""
    worker = ImageWorker(config)
    fit_batch, tries = worker.pipe.fit_batch, []

    def fail_once(photographs, **more):
        tries.append(len(photographs))
        if len(tries) == 1:
            raise RuntimeError("the second of them is too strange")
        yield from fit_batch(photographs, **more)

    worker.pipe.fit_batch = fail_once
    rows = dict(worker.colorize_batch(planned(config)[:4]))
    assert tries == [4, 4, 4, 4, 4]
    assert [made(rows[i][0]) for i in range(4)] == [undisturbed[name] for name in NAMES[:4]]


def test_a_batch_that_runs_out_of_memory_is_done_in_batches_of_one(config):
    worker = ImageWorker(config)

    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    worker.pipe.fit_batch = lambda *_, **__: map(run_out, [0])
    rows = dict(worker.colorize_batch(planned(config)[:2]))
    for (row,) in rows.values():
        assert (row["status"], row.get("fit_uri")) == ("ok", None)
        assert row["fallback"] == "batch of 1: CUDA out of memory. Tried to allocate 9 GiB"
    worker.pipe.fit = run_out
    (row,) = worker.colorize(planned(config)[0])
    assert row["fallback"].startswith("working size 24 px, batch size 1: CUDA out of memory")


def test_a_fault_of_the_gpu_ends_the_batch(config):
    worker = ImageWorker(config)

    def fault(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    worker.pipe.fit_batch = lambda *_, **__: map(fault, [0])
    with pytest.raises(AcceleratorFaultError, match="^CUDA error: an illegal memory access was encountered$"):
        list(worker.colorize_batch(planned(config)))


def test_what_needs_no_fit_shares_no_batch(config, tmp_path):
    (first,) = ImageWorker(config).colorize(planned(config)[0])
    commit_part(Store(config.options.output), "000001", [first])
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    catalog = [
        CatalogRow(1, "0.png", "a ball on a table", "a blue ball"),
        CatalogRow(2, "broken.png", "a ball", None),
        CatalogRow(3, "1.png", " and ".join(["a ball"] * 101), None),
        CatalogRow(4, "2.png", "a ball", None),
        CatalogRow(5, "3.png", "a ball " * 60, None),  # two chunks of tokens
    ]
    images = planned(replace(config, generation=2, whole_archive=False), catalog)
    rows, sizes = in_batches(ImageWorker(config), images)
    assert sizes == [4, 4]
    assert {name: row["status"] for name, (row,) in rows.items()} == {
        "0.png": "ok",
        "1.png": "quarantined",
        "2.png": "ok",
        "3.png": "ok",
        "broken.png": "quarantined",
    }
    assert rows["0.png"][0]["fit_reused"] is True
    assert "101 noun phrases" in rows["1.png"][0]["error_message"]


def test_the_time_of_an_image_is_its_share_of_the_batch(config):
    rows, _ = in_batches(ImageWorker(config), planned(config)[:3])
    fits = [row["stage1_seconds"] + row["stage2_seconds"] for (row,) in rows.values()]
    assert fits == [fits[0]] * 3
    assert all(row["total_seconds"] > fits[0] + row["sampling_seconds"] for (row,) in rows.values())


def test_the_size_of_the_batch_is_part_of_the_hashes():
    hashes = {with_options(batch=batch).fit_sha256("a ball") for batch in (1, 2, 4)}
    assert len(hashes) == 3
    assert CONFIG.fit_sha256("a ball") == with_options(batch=1).fit_sha256("a ball")
    assert with_options(batch=4).config_sha256("a", "b") != CONFIG.config_sha256("a", "b")


@pytest.mark.parametrize("overrides", [None, {"stage1.adapter_rank": 4}, {"stage2.adapter_rank": 4}])
def test_a_batch_without_adapters_is_refused_before_the_run(tmp_path, tiny_folder, overrides):
    options = RunOptions(archive=str(tmp_path), output=str(tmp_path / "out"), model=str(tiny_folder), batch=4)
    options = options.model_copy(update={"preset": "paper", "overrides": overrides})
    with pytest.raises(ValueError, match="--batch 4: .* take --preset standard or fast, or --set"), open_run(options):
        pass


def test_compiling_is_refused_where_nothing_is_optimised(tmp_path, tiny_folder):
    options = RunOptions(archive=str(tmp_path), output=str(tmp_path / "out"), model=str(tiny_folder), compile=True)
    options = options.model_copy(update={"preset": "instant"})
    with pytest.raises(ValueError, match="no step of optimisation"), open_run(options):
        pass


def test_shards_hold_whole_batches():
    assert list(shard_sizes(37, 10, 1, 4)) == [8, 8, 8, 8, 5]
    assert list(shard_sizes(37, 8, 4, 4)) == [8, 8, 8, 4, 4, 4, 1]
    assert list(shard_sizes(10, 2, 1, 4)) == [4, 4, 2]


class Pool:
    """Lends one actor. A batch ends as it is told; an image alone is done, or kills the actor if it is deadly."""

    def __init__(self, *ends: Exception | None, deadly: str = "", done_each_time: int = 1) -> None:
        self.ends, self.deadly, self.done_each_time = list(ends), deadly, done_each_time
        self.batches, self.alone, self.pauses = [], [], []

    @contextmanager
    def borrow(self):
        yield self

    def pause(self, tries):
        self.pauses.append(tries)

    def colorize_batch(self, images, timeout_seconds):
        assert timeout_seconds == 20
        self.batches.append([p.work.image_key for p in images])
        end = self.ends.pop(0) if self.ends else None
        done = range(len(images)) if end is None else range(len(images))[-self.done_each_time :]
        for position in done:
            yield position, [{"status": "ok", "key": images[position].work.image_key}]
        if end is not None:
            raise end

    def colorize(self, planned, timeout_seconds, smaller_because):
        assert timeout_seconds == 20
        self.alone.append(planned.work.image_key)
        if planned.work.image_key == self.deadly:
            raise ActorGoneError("it died")
        return [{"status": "ok", "key": planned.work.image_key}]


def shard_of(num_images, *problems):
    works = [
        ImageWork(f"{i}", "v", "a ball", (Variant("primary", None),), problem)
        for i, problem in enumerate((*problems, *[None] * (num_images - len(problems))))
    ]
    return [PlannedImage(work, (1,)) for work in works]


def outcome(pool, num_images, *problems):
    """The status of each image, which has one row."""
    config = with_options(batch=2, image_timeout_seconds=10.0, max_attempts=2)
    finished = [(p.work.image_key, rows) for p, rows in colorize_all_on(pool, config, shard_of(num_images, *problems))]
    assert sorted(key for key, _ in finished) == sorted(map(str, range(num_images)))
    assert all(row.get("key", row.get("image_key")) == key for key, (row,) in finished)
    return {key: row["status"] for key, (row,) in finished}


def test_a_shard_goes_to_an_actor_in_windows_of_some_batches():
    pool = Pool()
    assert set(outcome(pool, 20).values()) == {"ok"}
    assert list(map(len, pool.batches)) == [2 * BATCHES_AT_A_TIME, 2 * BATCHES_AT_A_TIME, 4]
    assert pool.alone == []


def test_after_a_death_the_culprit_alone_is_blamed():
    pool = Pool(ActorGoneError("segfault"), deadly="1")
    assert outcome(pool, 5) == {"0": "ok", "1": "quarantined", "2": "ok", "3": "ok", "4": "ok"}
    assert pool.batches == [["0", "1", "2", "3", "4"]]
    assert pool.alone == ["0", "1", "1", "2", "3"], (
        "the last had its row already; the death of the batch does not count"
    )


def test_after_the_loss_of_a_node_what_is_left_is_a_batch_again():
    pool = Pool(ActorGoneError("gone", node_lost=True), ActorGoneError("gone", node_lost=True))
    assert set(outcome(pool, 4).values()) == {"ok"}
    assert pool.batches == [["0", "1", "2", "3"], ["0", "1", "2"], ["0", "1"]]
    assert (pool.alone, pool.pauses) == ([], [1, 2])


def test_an_error_of_the_worker_leaves_the_images_to_be_tried_alone():
    from ray.exceptions import RayTaskError  # late: tests of flows set how Ray starts before they import it

    error = RayTaskError("colorize_batch", "traceback", RuntimeError("a bug"))
    pool = Pool(error)
    assert set(outcome(pool, 3).values()) == {"ok"}
    assert pool.alone == ["0", "1"]


def test_an_image_that_is_not_there_shares_no_batch():
    pool = Pool()
    assert outcome(pool, 3, ValueError("not in the archive")) == {"0": "quarantined", "1": "ok", "2": "ok"}
    assert pool.batches == [["1", "2"]]
