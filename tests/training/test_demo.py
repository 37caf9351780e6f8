import numpy as np
import pytest
import torch

from diffcolor_study.scenes import COLOR_WORDS, draw_scene, render
from diffcolor_training.dataset import draw_caption, scene_spec, swap_colors
from diffcolor_training.demo import (
    NOUNS,
    confuse_objects,
    emphasise_luminance,
    grounding_loss,
    noun_positions,
    tokenize,
    word_tables,
)
from diffcolor_training.parts import build_tokenizer, build_vae


def test_hard_negatives_differ_in_colour_words_only():
    rng = np.random.default_rng(0)
    for index in range(50):
        text = draw_caption(scene_spec(11, index), rng)
        negative = swap_colors(text, rng)
        assert [w for w in text.split() if w not in COLOR_WORDS] == [
            w for w in negative.split() if w not in COLOR_WORDS
        ]


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    return build_tokenizer([draw_caption(scene_spec(0, i), rng) for i in range(50)])


def test_colour_words_and_nouns_are_one_token_each(tokenizer):
    colors, nouns = word_tables(tokenizer, torch.device("cpu"))
    assert sorted(colors[colors > 0].tolist()) == list(range(1, len(COLOR_WORDS) + 1))
    assert sorted(nouns[nouns >= 0].tolist()) == list(range(len(NOUNS)))
    ids = tokenize(tokenizer, ["a red ball and a blue box on a table before a wall", "", "a cone"], 32)
    positions = noun_positions(ids, nouns, 4)
    assert [tokenizer.decode([i]) for i in ids[0, positions[0]]] == ["ball", "box", "table", "wall"]
    assert positions[1].tolist() == [-1] * 4
    assert (positions[2] >= 0).tolist() == [True, False, False, False]


def test_grounding_is_rewarded_where_a_cell_looks_at_its_own_noun():
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
    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    x = torch.stack([render(draw_scene(rng), 64).rgb for _ in range(8)]) * 2 - 1
    before = vae.decode(vae.encode(x).latent_dist.mean).sample
    stretch = emphasise_luminance(vae, x, factor=3)
    torch.testing.assert_close(vae.decode(vae.encode(x).latent_dist.mean).sample, before, atol=1e-4, rtol=1e-4)
    assert torch.linalg.eigvalsh(stretch).tolist() == pytest.approx([1, 1, 1, 1, 1, 3], abs=1e-4)
    assert float((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).std()) == pytest.approx(1, abs=1e-3)
