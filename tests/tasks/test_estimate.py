import os
import tarfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from diffcolor_core import preset
from support.pictures import gray_picture
from support.settings import QUICK
from tasks.archive import CatalogRow
from tasks.errors import EstimateError
from tasks.estimate import estimate
from tasks.layout import CATALOG, FIT_FILES, fit_folder
from tasks.lease import hold_output
from tasks.manifest import commit_part
from tasks.planning import open_plan
from tasks.runs import Run
from tasks.storage import Store
from tests.tasks.test_manifest import START, row
from tests.tasks.test_planning import with_options

SMALL, LARGE = 40 * 56, 400 * 560
"""Pixels of the scans."""


@pytest.fixture
def archive(tmp_path):
    """Two small scans, one with a hundred times the pixels, and one that is none."""
    store = Store(str(tmp_path / "scans"))
    for number, scale in enumerate((1, 1, 10)):
        store.write(f"{number}.png", b"")
        Image.fromarray(gray_picture(40 * scale, 56 * scale, seed=number)).save(store.uri(f"{number}.png"))
    store.write("broken.jpg", b"\xff\xd8\xff\xe0 not a picture")
    return store


@pytest.fixture
def output(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture
def config(archive, output):
    config = with_options(archive=archive.url, output=output.url, prompt="a ball", keep_fits=True)
    return replace(config, fit_bytes=500)


def told(config, catalog=None, **options):
    with open_plan(catalog) as plan:
        return estimate(Run(config.options, config, plan), **options)


def has_run(output, config, *rows):
    """A run of this configuration that has written these rows."""
    with hold_output(output, config.record()) as lease:
        commit_part(output, f"{lease.generation:06d}-0", [r | {"generation": lease.generation} for r in rows])
        lease.end({})


def measured(image="old.png", pixels=SMALL, fit=60.0, sampling=10.0, other=5.0, **values):
    """A row of an image with one variant that took so many seconds."""
    wall = timedelta(seconds=other + sampling + (0 if values.get("fit_reused") else fit))
    took = {"stage1_seconds": fit / 3, "stage2_seconds": fit * 2 / 3, "sampling_seconds": sampling}
    size = {"width_px": pixels // 40, "height_px": 40, "output_bytes": 2 * pixels, "fit_bytes": 1000}
    what = {"fit_reused": False, "output_uri": f"/out/images/{image}/p.png"}
    return row(image, started_at=START, finished_at=START + wall) | took | size | what | values


def test_without_anything_measured_it_tells_what_is_to_be_done_and_what_to_give(config, output):
    estimated = told(config)
    assert (estimated.images_new, estimated.images_retried, estimated.images_unusable) == (4, 0, 1)
    ((image, reason),) = [entry.values() for entry in estimated.unusable]
    assert (image, reason.partition(":")[0]) == ("broken.jpg", "UnreadableImageError")
    assert (estimated.variants_to_do, estimated.variants_done) == (4, {})
    assert (estimated.seconds, estimated.gpu_hours, estimated.ends_at, estimated.cost) == (None, None, None, None)
    assert "--probe or --seconds-per-image" in estimated.seconds_from
    assert estimated.picture_bytes == 6 * (2 * SMALL + LARGE)
    assert "upper bound" in estimated.picture_bytes_from
    assert (estimated.fit_bytes, estimated.fit_bytes_from) == (3 * 500, "the weights that are trained")
    assert told(with_options(config, keep_fits=False)).fit_bytes == 0
    assert not output.exists()


def test_the_medians_of_the_nearest_size_count(config, output):
    rows = [measured(f"{n}.old", fit=fit) for n, fit in enumerate((1.0, 60.0, 1000.0))]  # the median is 60
    has_run(output, config, *rows)
    assert told(config).seconds == pytest.approx(3 * 75)
    has_run(output, config, measured("large.old", LARGE, fit=600.0, sampling=100.0, other=50.0))
    before = sorted(output.walk())
    estimated = told(config)
    assert estimated.seconds == pytest.approx(2 * 75 + 750)
    assert estimated.picture_bytes == 2 * (2 * SMALL + LARGE)
    assert estimated.fit_bytes == 3000
    assert estimated.seconds_from.startswith("this output's medians")
    assert sorted(output.walk()) == before


def test_each_variant_is_sampled_and_the_primary_is_written_beside_targets(config, output):
    has_run(output, config, measured())
    targets = [CatalogRow(n, "0.png", "a ball", f"a {color} ball") for n, color in enumerate(("red", "blue"), 1)]
    estimated = told(replace(config, whole_archive=False), targets)
    assert estimated.seconds == pytest.approx(60 + 2 * 10 + 5)
    assert estimated.picture_bytes == 3 * 2 * SMALL


def test_hours_end_and_cost_are_those_of_the_machines(config, output):
    has_run(output, config, measured())
    now = datetime.now(UTC)
    estimated = told(with_options(config, num_actors=5, gpus_per_actor=0.5), price_per_gpu_hour=4.0)
    assert (estimated.num_actors, estimated.gpus_per_actor) == (5, 0.5)
    assert estimated.gpu_hours == pytest.approx(3 * 75 / 3600 / 2)
    assert estimated.cost == pytest.approx(estimated.gpu_hours * 4)
    left = datetime.fromisoformat(estimated.ends_at) - now
    assert left.total_seconds() == pytest.approx(3 * 75 / 5, abs=30)
    assert told(with_options(config, device="cpu")).gpu_hours == 0


def test_a_run_in_another_dtype_tells_nothing(config, output):
    has_run(output, with_options(config, dtype="bfloat16"), measured())
    assert told(config).seconds is None


def test_an_image_of_a_batch_counts_with_its_own_time(config, output):
    """It waits for its neighbours: from when it was read until it was done takes longer than its share of the batch."""
    batched = with_options(config, batch=4)
    has_run(output, batched, measured(other=300.0, total_seconds=75.0))
    assert told(batched).seconds == pytest.approx(3 * 75)
    assert told(config).seconds is None, "a run without batches takes another time"


@pytest.mark.parametrize("change", [{"settings": preset("paper")}, {"model_revision": "sha256:2"}])
def test_runs_with_another_model_or_other_settings_tell_nothing(config, output, change):
    has_run(output, replace(config, **change), measured())
    estimated = told(config)
    assert estimated.seconds is None
    assert estimated.fit_bytes == 3 * 500
    assert estimated.picture_bytes_from == "pictures there"  # a picture's bytes do not depend on either


def test_what_was_adopted_was_not_measured(config, output):
    has_run(output, config, measured(adopted_from="other.png", fit=7000.0))
    assert told(config).seconds is None


def test_a_kept_fit_saves_its_time_until_it_is_expired(config, archive, output):
    version = dict(archive.list())["0.png"]
    folder = fit_folder("ab" * 32, config.fit_sha256("a ball"))
    fit = {"input_sha256": "ab" * 32, "input_version": version, "context_prompt": "a ball"}
    for name in FIT_FILES:
        output.write(f"{folder}/{name}", b"")
    has_run(output, config, measured("0.png", **fit))
    asked = [CatalogRow(1, "0.png", "a ball", "a red ball")]
    estimated = told(replace(config, whole_archive=False), asked)
    assert estimated.seconds == pytest.approx(10 + 5)
    assert estimated.fit_bytes == 0
    other = replace(with_options(config, seed=1), whole_archive=False)
    assert told(other, asked).seconds == pytest.approx(75)  # another seed, another fit
    output.delete(f"{folder}/{FIT_FILES[0]}")
    assert told(replace(config, whole_archive=False), asked).seconds == pytest.approx(75)


def test_what_is_done_and_what_is_tried_again(config, archive, output):
    versions = dict(archive.list())
    same = {"context_prompt": "a ball", "config_sha256": config.config_sha256("a ball", None)}
    rows = [measured(f"{n}.png", input_version=versions[f"{n}.png"], **same) for n in range(2)]
    rows[1] |= {"status": "failed", "error_class": "E", "error_message": "no room"}
    has_run(output, config, *rows)
    estimated = told(config)
    assert (estimated.images_new, estimated.images_retried) == (2, 1)
    assert estimated.variants_done == {"ok": 1}


def test_seconds_that_are_given_count(config, output):
    has_run(output, config, measured())
    estimated = told(config, seconds_per_image=7.0)
    assert (estimated.seconds, estimated.seconds_from) == (21.0, "--seconds-per-image")


def test_a_file_that_only_the_catalog_names_is_told(config):
    estimated = told(config, [CatalogRow(1, "none.png", "a ball", None)])
    assert estimated.images_unusable == 2
    reasons = {entry["image"]: entry["reason"].partition(":")[0] for entry in estimated.unusable}
    assert reasons == {"none.png": "MissingImageError", "broken.jpg": "UnreadableImageError"}


def test_a_cluster_is_not_asked(config):
    cluster = with_options(config, ray_address="auto")
    with pytest.raises(EstimateError, match="--num-actors"):
        told(cluster)
    estimated = told(with_options(cluster, num_actors=8), seconds_per_image=3600)
    assert (estimated.num_actors, estimated.gpus_per_actor, estimated.gpu_hours) == (8, 1.0, 3.0)


def test_a_trial_measures_three_images_and_leaves_nothing(config, output, tiny_folder):
    from diffcolor_core.model_files import identify

    model_id, model_revision = identify(str(tiny_folder))
    config = with_options(config, model=str(tiny_folder), device="cpu", num_actors=os.cpu_count())
    config = replace(config, model_id=model_id, model_revision=model_revision, settings=QUICK)
    estimated = told(config, probe=True)
    assert estimated.seconds_from == "a trial of 3 images"
    assert estimated.seconds > 0
    assert estimated.fit_bytes > 3000
    assert 0 < estimated.picture_bytes < 6 * (2 * SMALL + LARGE)
    assert not output.exists()


def test_the_headers_in_a_tar_file_are_read_one_by_one(config, archive, tmp_path):
    """Several threads would read at each other's places, and tell good scans as broken."""
    with tarfile.open(tmp_path / "scans.tar", "w") as tar:
        for number in range(60):
            tar.add(archive.uri(f"{number % 3}.png"), f"{number:02d}.png")
    estimated = told(with_options(config, archive=f"tar://::{tmp_path / 'scans.tar'}"))
    assert (estimated.images_new, estimated.images_unusable) == (60, 0)
    assert estimated.picture_bytes == 6 * 20 * (2 * SMALL + LARGE)


def test_what_a_run_has_captioned_counts(config, archive, output):
    output.write(CATALOG, b"image,context_prompt,target_prompt\n0.png,a church,a red church\n")
    version = dict(archive.list())["0.png"]
    done = {"context_prompt": "a church", "target_prompt": "a red church", "variant": "target-1"}
    captioned = with_options(config, caption="some/model")
    has_run(
        output,
        config,
        measured(
            "0.png", config_sha256=config.config_sha256("a church", "a red church"), input_version=version, **done
        ),
    )
    assert told(captioned).variants_done == {"ok": 1}
    assert told(config).variants_done == {}
