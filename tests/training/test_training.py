"""The demo world: its scenes, its captions, and a training that resumes."""

import numpy as np
import pytest
import torch

from diffcolor_core.color import srgb_to_lab
from diffcolor_core.demo.dataset import draw_caption, scene_spec, swap_colors
from diffcolor_core.demo.evaluate import asked_colors, picture_of, region_colors
from diffcolor_core.demo.scenes import (
    COLOR_WORDS,
    HUES,
    NEUTRALS,
    caption,
    draw_scene,
    nearest_color,
    objects_swapped,
    recolored,
    reference_colors,
    render,
)


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


def test_hard_negatives_differ_in_colour_words_only():
    rng = np.random.default_rng(0)
    for spec in scenes(50, style="photo"):
        text = draw_caption(spec, rng)
        negative = swap_colors(text, rng)
        assert [w for w in text.split() if w not in COLOR_WORDS] == [
            w for w in negative.split() if w not in COLOR_WORDS
        ]


def test_named_hues_are_well_apart():
    references = reference_colors()
    for word, ab in references.items():
        assert nearest_color(*ab) == word
    points = list(references.values())
    apart = [np.hypot(a - c, b - d) for i, (a, b) in enumerate(points) for c, d in points[:i]]
    assert min(apart) > 25
    assert set(NEUTRALS) & set(references) == set()


@pytest.mark.timeout(300)
def test_training_resumes_where_it_stopped(tmp_path):
    """Stopped after step 2 and gone on with, the weights are those of an unbroken training."""
    from diffcolor_core.demo.loop import fit_part

    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def train(folder, *stops):
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(1)
            module = torch.nn.Linear(8, 8)

            def loss_of(step, module=module, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                return (module(data + torch.randn_like(data)) - data).pow(2).mean()

            groups = [{"params": list(module.parameters()), "lr": 1e-2}]
            try:
                fit_part("part", module, groups, loss_of, seed=0, num_steps=6, checkpoints=folder, checkpoint_every=1)
            except KeyboardInterrupt:
                continue
        return module.weight

    whole = train(tmp_path / "whole", None)
    broken = train(tmp_path / "broken", 2, 5, None)
    assert torch.equal(whole, broken)
    assert torch.equal(train(tmp_path / "again", None, None), whole)  # a finished part only loads


# ------------------------------------------------------------------ what teaches binding


@pytest.fixture(scope="module")
def tokenizer():
    from diffcolor_core.demo.parts import build_tokenizer

    rng = np.random.default_rng(0)
    return build_tokenizer([draw_caption(scene_spec(0, i), rng) for i in range(50)])


def test_colour_words_and_nouns_are_one_token_each(tokenizer):
    from diffcolor_core.demo.train import NOUNS, noun_positions, tokenize, word_tables

    colors, nouns = word_tables(tokenizer, torch.device("cpu"))
    assert sorted(colors[colors > 0].tolist()) == list(range(1, len(COLOR_WORDS) + 1))
    assert sorted(nouns[nouns >= 0].tolist()) == list(range(len(NOUNS)))
    ids = tokenize(tokenizer, ["a red ball and a blue box on a table before a wall", "", "a cone"], 32)
    positions = noun_positions(ids, nouns, 4)
    assert [tokenizer.decode([i]) for i in ids[0, positions[0]]] == ["ball", "box", "table", "wall"]
    assert positions[1].tolist() == [-1] * 4
    assert (positions[2] >= 0).tolist() == [True, False, False, False]


def test_grounding_is_rewarded_where_a_cell_looks_at_its_own_noun():
    from diffcolor_core.demo.train import grounding_loss

    regions = torch.zeros(1, 2, 4, 4)
    regions[0, 0, :2] = 1
    regions[0, 1, 2:] = 1
    tokens = torch.tensor([[3, 5]])
    right = torch.full((1, 16, 8), 0.01)
    right[0, :8, 3] = right[0, 8:, 5] = 0.9
    assert grounding_loss([right], regions, tokens) < 0.05
    assert grounding_loss([right.flip(1)], regions, tokens) > 2
    assert grounding_loss([right], regions, torch.tensor([[-1, -1]])) == 0


def test_confusing_exchanges_two_regions_colours_and_keeps_luminance():
    from diffcolor_core.demo.train import confuse_objects

    luminance = torch.tensor([1.0, 0.0, 0.0])
    regions = torch.tensor([[[0, 0, 1], [0, 2, 1]]])
    z = torch.zeros(1, 3, 2, 3)
    z[:, 0] = torch.arange(6.0).view(2, 3)
    z[0, 1, regions[0] == 0], z[0, 2, regions[0] == 1] = 5.0, 7.0
    confused = confuse_objects(z, regions, luminance)
    assert torch.equal(confused[:, 0], z[:, 0])
    torch.testing.assert_close(confused[0, 1:, 0, 0], torch.tensor([0.0, 7.0]))
    torch.testing.assert_close(confused[0, 1:, 1, 2], torch.tensor([5.0, 0.0]))
    assert torch.equal(confused[0, :, 1, 1], z[0, :, 1, 1])  # the table
    torch.testing.assert_close(confuse_objects(confused, regions, luminance), z)


def test_emphasising_luminance_leaves_the_pictures_as_they_were():
    from diffcolor_core.demo.parts import build_vae
    from diffcolor_core.demo.train import emphasise_luminance

    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    x = torch.stack([render(draw_scene(rng), 64).rgb for _ in range(8)]) * 2 - 1
    before = vae.decode(vae.encode(x).latent_dist.mean).sample
    stretch = emphasise_luminance(vae, x, factor=3)
    torch.testing.assert_close(vae.decode(vae.encode(x).latent_dist.mean).sample, before, atol=1e-4, rtol=1e-4)
    assert torch.linalg.eigvalsh(stretch).tolist() == pytest.approx([1, 1, 1, 1, 1, 3], abs=1e-4)
    assert float((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).std()) == pytest.approx(1, abs=1e-3)


def test_swapping_exchanges_the_objects_colours_only():
    rng = np.random.default_rng(3)
    spec = draw_scene(rng, num_objects=2)
    swapped = objects_swapped(spec)
    assert [o.color for o in swapped.objects] == [o.color for o in spec.objects][::-1]
    assert [o.noun for o in swapped.objects] == [o.noun for o in spec.objects]
    assert objects_swapped(swapped) == spec
    single = draw_scene(rng, num_objects=1)
    assert objects_swapped(single) == single
