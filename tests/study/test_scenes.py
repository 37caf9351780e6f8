import numpy as np
import torch

from diffcolor_scans.color import srgb_to_lab
from diffcolor_study.pictures import picture_of
from diffcolor_study.scenes import (
    COLOR_WORDS,
    HUES,
    NEUTRALS,
    asked_colors,
    caption,
    draw_scene,
    nearest_color,
    objects_swapped,
    recolored,
    reference_colors,
    render,
)
from diffcolor_study.scores import region_colors


def scenes(count: int, **kwargs):
    rng = np.random.default_rng(11)
    return [draw_scene(rng, **kwargs) for _ in range(count)]


def test_luminance_does_not_give_the_colour_away():
    """Over many regions, the mean L* of every hue is the same within its standard error."""
    regions = [r for s in scenes(1500, style="photo") for r in s.regions if r.color in HUES]
    every = np.array([r.lightness for r in regions])
    for hue in HUES:
        ours = np.array([r.lightness for r in regions if r.color == hue])
        assert len(ours) > 300
        assert abs(ours.mean() - every.mean()) < 4 * every.std() / len(ours) ** 0.5


def test_the_gray_picture_has_the_colour_pictures_luminance_and_the_masks_cover_it():
    for spec in scenes(8):
        scene = render(spec)
        torch.testing.assert_close(scene.masks.sum(dim=0), torch.ones(64, 64))
        assert len(scene.masks) == len(spec.regions)
        gray = srgb_to_lab(scene.gray.expand(3, -1, -1).double())
        torch.testing.assert_close(gray[0], srgb_to_lab(scene.rgb.double())[0], atol=0.05, rtol=0)


def test_regions_show_the_colour_of_their_word():
    right = total = 0
    for spec in scenes(60, style="photo"):
        scene = render(spec)
        found = region_colors(picture_of(scene.rgb), scene)
        right += sum(f == a for f, a in zip(found, asked_colors(spec), strict=True))
        total += len(found)
    assert right / total > 0.98


def test_the_same_spec_renders_the_same_picture_and_another_colour_the_same_luminance():
    rng = np.random.default_rng(2)
    spec = draw_scene(rng, num_objects=2, style="photo")
    assert torch.equal(render(spec).rgb, render(spec).rgb)
    other = recolored(spec, rng)
    assert all(a.color != b.color for a, b in zip(spec.regions, other.regions, strict=True))
    delta = srgb_to_lab(render(spec).rgb.double())[0] - srgb_to_lab(render(other).rgb.double())[0]
    assert float(delta.abs().median()) < 0.5


def test_captions():
    spec = scenes(1, num_objects=2, style="photo")[0]
    text = caption(spec)
    assert all(f"{r.color} {r.noun}" in text for r in spec.regions)
    plain = caption(spec, colors=False)
    assert not any(word in plain.split() for word in COLOR_WORDS)
    gray = scenes(1, style="grayscale")[0]
    assert caption(gray).startswith("a grayscale photograph")
    one, two = spec.objects
    other = objects_swapped(spec)
    assert (other.objects[0].color, other.objects[1].color) == (two.color, one.color)


def test_named_hues_are_well_apart():
    references = reference_colors()
    for word, ab in references.items():
        assert nearest_color(*ab) == word
    points = list(references.values())
    apart = [np.hypot(a - c, b - d) for i, (a, b) in enumerate(points) for c, d in points[:i]]
    assert min(apart) > 25
    assert set(NEUTRALS) & set(references) == set()


def test_swapping_exchanges_the_objects_colours_only():
    rng = np.random.default_rng(3)
    spec = draw_scene(rng, num_objects=2)
    swapped = objects_swapped(spec)
    assert [o.color for o in swapped.objects] == [o.color for o in spec.objects][::-1]
    assert [o.noun for o in swapped.objects] == [o.noun for o in spec.objects]
    assert objects_swapped(swapped) == spec
    single = draw_scene(rng, num_objects=1)
    assert objects_swapped(single) == single
