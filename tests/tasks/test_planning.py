from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from diffcolor_core import preset
from tasks.archive import ImageWork, Variant, variant_name
from tasks.planning import RunConfig, plan_shards

CONFIG = RunConfig(
    run_id="r1",
    archive="in",
    output="out",
    model="demo",
    model_id="demo",
    model_revision="sha256:1",
    settings=preset("demo"),
    seed=0,
    device="cpu",
)


def image(number: int, targets=("red", "blue")) -> ImageWork:
    variants = tuple(Variant(variant_name("c", t), t) for t in targets)
    return ImageWork(f"{number:04d}.png", "v1", "c", variants)


def manifest(work, status="ok", config=CONFIG, attempt=1):
    return [
        {
            "image_key": w.image_key,
            "variant": v.name,
            "status": status,
            "attempt": attempt,
            "config_sha256": config.config_sha256(w.context_prompt, v.target_prompt),
            "input_version": w.version,
        }
        for w in work
        for v in w.variants
    ]


@given(st.integers(0, 60), st.integers(1, 20))
def test_shards_hold_every_image_once_in_order(count, shard_size):
    work = [image(i) for i in range(count)]
    plan = plan_shards(work, [], CONFIG, shard_size)
    assert [p.work for s in plan.shards for p in s.images] == work
    assert all(len(s.images) <= shard_size for s in plan.shards)
    assert [s.number for s in plan.shards] == list(range(len(plan.shards)))
    assert plan.num_images == count


@pytest.mark.parametrize("status", ["ok", "quarantined"])
def test_what_is_done_is_left_out(status):
    work = [image(0), image(1)]
    plan = plan_shards(work, manifest(work[:1], status), CONFIG, 10)
    assert [p.work for s in plan.shards for p in s.images] == work[1:]
    assert plan.done_before == {status: 2}


def test_what_failed_is_tried_again_and_counted_on():
    work = [image(0)]
    plan = plan_shards(work, manifest(work, "failed", attempt=2), CONFIG, 10)
    assert plan.shards[0].images[0].attempts == (3, 3)


def test_of_an_image_only_the_missing_variants_are_planned():
    plan = plan_shards([image(0, ("red", "blue", "green"))], manifest([image(0, ("red", "green"))]), CONFIG, 10)
    assert [v.target_prompt for v in plan.shards[0].images[0].work.variants] == ["blue"]
    assert plan.shards[0].images[0].attempts == (1,)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"model_revision": "sha256:2"},
        {"settings": preset("paper")},
    ],
)
def test_a_changed_configuration_is_new_work(changed):
    work = [image(0)]
    plan = plan_shards(work, manifest(work), replace(CONFIG, **changed), 10)
    assert plan.num_images == 1
    assert plan.shards[0].images[0].attempts == (1, 1)


def test_changed_content_is_new_work_and_another_run_is_not():
    work = [image(0)]
    assert plan_shards([replace(work[0], version="v2")], manifest(work), CONFIG, 10).num_images == 1
    assert plan_shards(work, manifest(work), replace(CONFIG, run_id="r2", output="elsewhere"), 10).num_images == 0


def test_a_shard_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        plan_shards([], [], CONFIG, 0)
