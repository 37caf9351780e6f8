import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from diffcolor_core import preset
from diffcolor_core.prompts import GENERIC_PROMPT
from tasks.archive import CatalogRow, variant_name
from tasks.compaction import compact
from tasks.errors import CatalogError, MissingImageError
from tasks.manifest import commit_part
from tasks.options import RunOptions
from tasks.planning import open_plan, output_below, shard_sizes
from tasks.records import RunConfig
from tasks.storage import Store
from tests.tasks.test_manifest import row

CONFIG = RunConfig(
    options=RunOptions(archive="in", output="out"),
    run_id="r1",
    model_id="demo",
    model_revision="sha256:1",
    settings=preset("demo"),
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


def with_options(config=CONFIG, **options):
    return replace(config, options=config.options.model_copy(update=options))


@contextmanager
def filled(archive, output, catalog=RED_AND_BLUE, config=CONFIG, whole_archive=True, **options):
    """A plan of what a run of these options has to do."""
    config = with_options(config, archive=archive.url, output=output.url, **options)
    with open_plan(catalog) as plan:
        plan.fill(replace(config, whole_archive=whole_archive))
        yield plan


def planned(archive, output, catalog=RED_AND_BLUE, config=CONFIG, shard_size=10, **options):
    """(image, targets, attempts) of every planned image, and what was done before."""
    with filled(archive, output, catalog, config, **options) as plan:
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
@given(
    count=st.integers(0, 30),
    shard_size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 40),
    num_actors=st.integers(1, 50),
)
def test_shards_hold_every_image_once_in_order(tmp_path_factory, count, shard_size, limit, num_actors):
    folder = tmp_path_factory.mktemp("plan")
    archive, output = Store(str(folder / "archive")), Store(str(folder / "out"))
    for number in range(count):
        archive.write(f"{number:04d}.png", b"x")
    with filled(archive, output, None, prompt="a thing", limit=limit) as plan:
        shards = list(plan.shards(shard_size, num_actors))
        assert [s.number for s in shards] == list(range(len(shards)))
        assert all(0 < len(s.images) <= shard_size for s in shards)
        keys = [p.work.image_key for s in shards for p in s.images]
        assert keys == [f"{number:04d}.png" for number in range(count)][:limit]
        assert plan.num_images == len(keys)


def test_images_and_prompts_are_joined(archive, output):
    for key in ("unlisted.jpg", "letter.doc", ".hidden", "notes.txt"):
        archive.write(key, b"x")
    catalog = [*RED_AND_BLUE, CatalogRow(3, "0.png", "another", None), CatalogRow(4, "gone.png", "c", None)]
    with filled(archive, output, catalog) as plan:
        (shard,) = plan.shards(10)
        work = [p.work for p in shard.images]
    assert [(w.image_key, w.context_prompt, [v.target_prompt for v in w.variants]) for w in work] == [
        ("0.png", "another", [None]),
        ("0.png", "c", ["red", "blue"]),
        ("gone.png", "c", [None]),
        ("letter.doc", GENERIC_PROMPT, [None]),
        ("unlisted.jpg", GENERIC_PROMPT, [None]),
    ]
    assert [w.image_key for w in work if isinstance(w.problem, MissingImageError)] == ["gone.png"]
    assert [w.problem for w in work].count(None) == 4
    assert "catalog row 4" in str(work[2].problem)
    assert planned(archive, output, catalog[:2], whole_archive=False)[0] == [("0.png", ["red", "blue"], (1, 1))]
    assert len(planned(archive, output, catalog, prompt="a thing")[0]) == 5


def test_a_repeated_catalog_row_is_refused(archive, output):
    with (
        pytest.raises(CatalogError, match="row 3 repeats row 1 "),
        open_plan([*RED_AND_BLUE, replace(RED_AND_BLUE[0], number=3)]),
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
    assert planned(archive, output, retry="quarantined") == ([("0.png", ["red", "blue"], (4, 4))], {})


def test_of_an_image_only_the_missing_variants_are_planned(archive, output):
    commit(archive, output)
    catalog = [*RED_AND_BLUE, CatalogRow(3, "0.png", "c", "green")]
    assert planned(archive, output, catalog) == ([("0.png", ["green"], (1,))], {"ok": 2})


@pytest.mark.parametrize(
    "changed",
    [
        {"options": CONFIG.options.model_copy(update={"seed": 1})},
        {"model_revision": "sha256:2"},
        {"settings": preset("paper")},
    ],
)
def test_a_changed_configuration_is_new_work(archive, output, changed):
    commit(archive, output)
    assert planned(archive, output, config=replace(CONFIG, **changed)) == ([("0.png", ["red", "blue"], (1, 1))], {})


def test_another_run_is_not_new_work(archive, output):
    commit(archive, output)
    assert planned(archive, output, config=replace(CONFIG, run_id="r2", generation=7))[0] == []


def test_of_named_images_the_context_is_the_one_they_had(archive, output):
    commit(archive, output)
    catalog = [CatalogRow(1, "0.png", None, "green"), CatalogRow(2, "0.png", None, "red")]
    assert planned(archive, output, catalog, whole_archive=False) == ([("0.png", ["green"], (1,))], {"ok": 1})


def earlier_of(archive, output, catalog=RED_AND_BLUE, **options):
    with filled(archive, output, catalog, **options) as plan:
        (shard,) = plan.shards(10)
        (image,) = shard.images
        return [[(e["image_key"], e["input_sha256"], e["target_prompt"]) for e in rows] for rows in image.earlier]


def test_a_touched_or_renamed_file_brings_its_earlier_rows_along(archive, output):
    commit(archive, output)
    os.utime(f"{archive.root}/0.png", ns=(1, 1))
    assert earlier_of(archive, output) == [[("0.png", "sha", "red")], [("0.png", "sha", "blue")]]
    commit(archive, output, name="again", generation=2)
    os.rename(f"{archive.root}/0.png", f"{archive.root}/moved.png")
    catalog = [replace(r, image="moved.png") for r in RED_AND_BLUE]
    assert earlier_of(archive, output, catalog) == [[("0.png", "sha", "red")], [("0.png", "sha", "blue")]]
    archive.write("moved.png", b"another")
    assert earlier_of(archive, output, catalog) == [[], []]


def test_settings_that_are_changed_back_bring_their_rows_along(archive, output):
    commit(archive, output, generation=1)
    commit(archive, output, name="q", config=with_options(seed=1), generation=2)
    assert planned(archive, output)[0] == [("0.png", ["red", "blue"], (1, 1))]
    assert earlier_of(archive, output) == [[("0.png", "sha", "red")], [("0.png", "sha", "blue")]]
    compact(output)
    assert earlier_of(archive, output) == [[("0.png", "sha", "red")], [("0.png", "sha", "blue")]]


def test_content_that_is_changed_back_brings_the_rows_of_both_contents_along(archive, output):
    commit(archive, output, generation=1, input_sha256="one")
    archive.write("0.png", b"changed")
    commit(archive, output, name="q", generation=2, input_sha256="two")
    archive.write("0.png", b"zero")
    os.utime(f"{archive.root}/0.png", ns=(1, 1))
    earlier = earlier_of(archive, output, RED_AND_BLUE[:1])
    assert sorted(earlier[0]) == [("0.png", "one", "red"), ("0.png", "two", "red")]


def test_files_with_one_token_bring_one_row_each_along(archive, output):
    for name in ("1.png", "2.png", "3.png"):
        archive.write(name, b"zero")
        os.utime(f"{archive.root}/{name}", ns=(1, 1))
    commit(archive, output, [CatalogRow(1, f"{number}.png", "c", "red") for number in (1, 2, 3)])
    archive.write("4.png", b"zero")
    os.utime(f"{archive.root}/4.png", ns=(1, 1))
    earlier = earlier_of(archive, output, [CatalogRow(1, "4.png", "c", "red")], whole_archive=False)
    assert earlier == [[("1.png", "sha", "red")]]


def test_a_file_whose_name_is_not_unicode_is_planned_under_an_escaped_key(archive, output):
    try:
        with open(os.fsencode(archive.root) + b"/bad\xff.png", "wb"):
            pass
    except OSError:
        pytest.skip("this disk has Unicode names only")
    assert [key for key, *_ in planned(archive, output, prompt="c")[0]] == ["0.png", "bad\\udcff.png"]


@pytest.mark.parametrize("urls", [("/a/in", "/a"), ("/a/in", "/a/in"), ("memory://a/in", "memory://a")])
def test_an_archive_in_its_output_is_refused(urls):
    with pytest.raises(ValueError, match="lies in the output"):
        output_below(*map(Store, urls))


@pytest.mark.parametrize("output_url", ["/a/in-out", "/a/out", "memory:///a/in/out"])
def test_an_output_beside_the_archive_is_not_below_it(output_url):
    assert output_below(Store("/a/in"), Store(output_url)) is None


def test_the_pictures_of_an_output_below_the_archive_are_no_scans(archive):
    output = Store(f"{archive.url}/colored/now")
    output.write("images/1.png", b"a picture")
    archive.write("colored/2.png", b"a scan")
    work, _ = planned(archive, output, None, prompt="a ball")
    assert [image for image, _, _ in work] == ["0.png", "colored/2.png"]


def test_shards_shrink_towards_the_end_so_that_no_actor_waits_for_another():
    assert list(shard_sizes(9, 4, 1)) == [4, 4, 1]
    assert list(shard_sizes(20, 4, 3)) == [4, 4, 4, 3, 2, 1, 1, 1]
    many = [*shard_sizes(10_000_000, 32, 1000)]
    assert (len(many), sum(many), many[-1]) == (315_557, 10_000_000, 1)


@pytest.mark.parametrize("whole_archive", [True, False])
def test_what_verify_has_queued_is_done_again_whoever_had_asked_for_it(archive, output, whole_archive):
    asked = [CatalogRow(1, "0.png", "c", "green")]
    commit(archive, output, [*asked, *RED_AND_BLUE], name="p")
    queued = {"status": "failed", "error_class": "MissingOutputError", "generation": 2}
    commit(archive, output, asked, name="q", **queued)
    work, _ = planned(archive, output, whole_archive=whole_archive)
    assert [(image, targets, attempts) for image, targets, attempts in work if image == "0.png"] == [
        ("0.png", ["green"], (2,))
    ]


def test_the_folder_of_a_plan_outlives_a_killed_run_only_until_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / "diffcolor-plan-dead"
    dead.mkdir()
    (dead / "lock").touch()
    with open_plan(None):
        (mine,) = tmp_path.glob("diffcolor-plan-*")
        assert mine != dead
        with open_plan(None):
            assert len([*tmp_path.glob("diffcolor-plan-*")]) == 2, "a plan that is in use stays"
    assert not [*tmp_path.glob("diffcolor-plan-*")]


def test_a_shard_of_nothing_is_refused(archive, output):
    with (
        filled(archive, output) as plan,
        pytest.raises(ValueError, match="at least 1"),
    ):
        next(plan.shards(0))


def catalog_columns(archive, output, catalog, **options):
    with filled(archive, output, catalog, **options) as plan:
        (shard,) = plan.shards(10)
        return {v.target_prompt: v.catalog_columns for image in shard.images for v in image.work.variants}


def test_each_variant_keeps_the_other_columns_of_its_own_catalog_row(archive, output):
    archive.write("1.png", b"one")
    catalog = [
        replace(RED_AND_BLUE[0], extra='{"id": "A 1"}'),
        replace(RED_AND_BLUE[1], extra='{"id": "A 2"}'),
        CatalogRow(3, "0.png", "c", "green"),
    ]
    assert catalog_columns(archive, output, catalog, prompt="c") == {
        "red": '{"id": "A 1"}',
        "blue": '{"id": "A 2"}',
        "green": None,
        None: None,
    }


def test_other_columns_of_the_catalog_alone_are_no_new_work(archive, output):
    commit(archive, output, [replace(row, extra='{"id": "old"}') for row in RED_AND_BLUE])
    changed = [replace(row, extra='{"id": "new"}') for row in RED_AND_BLUE]
    assert planned(archive, output, changed) == ([], {"ok": 2})


def test_work_that_verify_has_queued_keeps_the_other_columns_that_it_had(archive, output):
    queued = {"status": "failed", "error_class": "MissingOutputError", "catalog_columns": '{"id": "A 1"}'}
    commit(archive, output, RED_AND_BLUE[:1], **queued)
    assert catalog_columns(archive, output, None, whole_archive=False) == {"red": '{"id": "A 1"}'}
    named = [replace(RED_AND_BLUE[0], extra='{"id": "now"}')]
    assert catalog_columns(archive, output, named) == {"red": '{"id": "now"}'}
