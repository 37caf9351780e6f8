import os
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from diffcolor_core import preset
from tasks.archive import CatalogError, CatalogRow, MissingImageError, MissingPromptError, variant_name
from tasks.manifest import commit_part, compact
from tasks.planning import RunConfig, open_plan
from tasks.storage import Store
from tests.tasks.test_manifest import row

CONFIG = RunConfig(
    run_id="r1",
    archive="in",
    output="out",
    model="demo",
    model_id="demo",
    model_revision="sha256:1",
    preset="demo",
    settings=preset("demo"),
    seed=0,
    device="cpu",
)
RED_AND_BLUE = [CatalogRow(1, "0.png", "c", "red"), CatalogRow(2, "0.png", "c", "blue")]


@pytest.fixture
def archive(tmp_path):
    store = Store(str(tmp_path / "archive"))
    store.write("0.png", b"zero")
    return store


@pytest.fixture
def output(tmp_path):
    return Store(str(tmp_path / "out"))


def planned(archive, output, catalog=RED_AND_BLUE, config=CONFIG, shard_size=10, **options):
    """(image, targets, attempts) of every planned image, and what was done before."""
    with open_plan(archive, output, config, catalog, **options) as plan:
        images = [image for shard in plan.shards(shard_size) for image in shard.images]
        assert plan.num_images == len(images)
        return [(p.work.image_key, [v.target_prompt for v in p.work.variants], p.attempts) for p in images], (
            plan.done_before
        )


def commit(archive, output, catalog=RED_AND_BLUE, status="ok", config=CONFIG, name="p", **values):
    versions = dict(archive.list())
    commit_part(
        output,
        name,
        [
            row(
                image=r.image,
                variant=variant_name(r.context_prompt, r.target_prompt),
                status=status,
                context_prompt=r.context_prompt,
                target_prompt=r.target_prompt,
                config_sha256=config.config_sha256(r.context_prompt, r.target_prompt),
                input_version=versions[r.image],
                input_sha256="sha",
            )
            | values
            for r in catalog
        ],
    )


@settings(deadline=None, max_examples=15)
@given(count=st.integers(0, 30), shard_size=st.integers(1, 12), limit=st.none() | st.integers(1, 40))
def test_shards_hold_every_image_once_in_order(tmp_path_factory, count, shard_size, limit):
    folder = tmp_path_factory.mktemp("plan")
    archive, output = Store(str(folder / "archive")), Store(str(folder / "out"))
    for number in range(count):
        archive.write(f"{number:04d}.png", b"x")
    with open_plan(archive, output, CONFIG, None, prompt="a thing", limit=limit) as plan:
        shards = list(plan.shards(shard_size))
        assert [s.number for s in shards] == list(range(len(shards)))
        assert all(0 < len(s.images) <= shard_size for s in shards)
        keys = [p.work.image_key for s in shards for p in s.images]
        assert keys == [f"{number:04d}.png" for number in range(count)][:limit]
        assert plan.num_images == len(keys)


def test_images_and_prompts_are_joined(archive, output):
    for key in ("unlisted.jpg", "letter.doc", ".hidden", "notes.txt"):
        archive.write(key, b"x")
    catalog = [*RED_AND_BLUE, CatalogRow(3, "0.png", "another", None), CatalogRow(4, "gone.png", "c", None)]
    with open_plan(archive, output, CONFIG, catalog, prompt=None) as plan:
        (shard,) = plan.shards(10)
        work = [p.work for p in shard.images]
    assert [(w.image_key, w.context_prompt, [v.target_prompt for v in w.variants]) for w in work] == [
        ("0.png", "another", [None]),
        ("0.png", "c", ["red", "blue"]),
        ("gone.png", "c", [None]),
        ("letter.doc", None, [None]),
        ("unlisted.jpg", None, [None]),
    ]
    assert [type(w.problem) for w in work] == [
        type(None),
        type(None),
        MissingImageError,
        MissingPromptError,
        MissingPromptError,
    ]
    assert "catalog row 4" in str(work[2].problem)
    assert planned(archive, output, catalog[:2], whole_archive=False)[0] == [("0.png", ["red", "blue"], (1, 1))]
    assert len(planned(archive, output, catalog, prompt="a thing")[0]) == 5


def test_a_repeated_catalog_row_is_refused(archive, output):
    with (
        pytest.raises(CatalogError, match="row 3 repeats row 1 "),
        open_plan(archive, output, CONFIG, [*RED_AND_BLUE, replace(RED_AND_BLUE[0], number=3)]),
    ):
        pass


@pytest.mark.parametrize("status", ["ok", "quarantined"])
def test_what_is_done_is_left_out(archive, output, status):
    archive.write("1.png", b"one")
    commit(archive, output, status=status)
    assert planned(archive, output, prompt="c") == ([("1.png", [None], (1,))], {status: 2})
    compact(output)
    assert planned(archive, output, prompt="c") == ([("1.png", [None], (1,))], {status: 2})


def test_what_failed_is_tried_again_and_counted_on_and_the_quarantined_on_demand(archive, output):
    commit(archive, output, status="failed", attempt=2)
    assert planned(archive, output) == ([("0.png", ["red", "blue"], (3, 3))], {})
    commit(archive, output, status="quarantined", attempt=3, name="q", generation=2)
    assert planned(archive, output) == ([], {"quarantined": 2})
    assert planned(archive, output, retry_quarantined=True) == ([("0.png", ["red", "blue"], (4, 4))], {})


def test_of_an_image_only_the_missing_variants_are_planned(archive, output):
    commit(archive, output)
    catalog = [*RED_AND_BLUE, CatalogRow(3, "0.png", "c", "green")]
    assert planned(archive, output, catalog) == ([("0.png", ["green"], (1,))], {"ok": 2})


@pytest.mark.parametrize("changed", [{"seed": 1}, {"model_revision": "sha256:2"}, {"settings": preset("paper")}])
def test_a_changed_configuration_is_new_work(archive, output, changed):
    commit(archive, output)
    assert planned(archive, output, config=replace(CONFIG, **changed)) == ([("0.png", ["red", "blue"], (1, 1))], {})


def test_another_run_is_not_new_work(archive, output):
    commit(archive, output)
    assert planned(archive, output, config=replace(CONFIG, run_id="r2", output="elsewhere"))[0] == []


def test_of_named_images_the_context_is_the_one_they_had(archive, output):
    commit(archive, output)
    catalog = [CatalogRow(1, "0.png", None, "green"), CatalogRow(2, "0.png", None, "red")]
    assert planned(archive, output, catalog, whole_archive=False) == ([("0.png", ["green"], (1,))], {"ok": 1})


def earlier_of(archive, output, catalog=RED_AND_BLUE):
    with open_plan(archive, output, CONFIG, catalog) as plan:
        (shard,) = plan.shards(10)
        (image,) = shard.images
        return [None if e is None else (e["image_key"], e["input_sha256"], e["target_prompt"]) for e in image.earlier]


def test_a_touched_or_renamed_file_brings_its_earlier_rows_along(archive, output):
    commit(archive, output)
    os.utime(f"{archive.root}/0.png", ns=(1, 1))
    assert earlier_of(archive, output) == [("0.png", "sha", "red"), ("0.png", "sha", "blue")]
    commit(archive, output, name="again", generation=2)
    os.rename(f"{archive.root}/0.png", f"{archive.root}/moved.png")
    catalog = [replace(r, image="moved.png") for r in RED_AND_BLUE]
    assert earlier_of(archive, output, catalog) == [("0.png", "sha", "red"), ("0.png", "sha", "blue")]
    archive.write("moved.png", b"another")
    assert earlier_of(archive, output, catalog) == [None, None]


def test_a_shard_of_nothing_is_refused(archive, output):
    with (
        open_plan(archive, output, CONFIG, RED_AND_BLUE) as plan,
        pytest.raises(ValueError, match="at least 1"),
    ):
        next(plan.shards(0))
