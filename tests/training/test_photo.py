"""The parts that the photo model's training adds: the linear VAE, captions with their hues turned, random grays."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from diffcolor_scans.color import lightness_of, srgb_to_lab
from diffcolor_training.codec import CHROMA_CHANNELS, build_vae, encode, fit_codec
from diffcolor_training.photos import (
    Photo,
    draw_caption,
    joined,
    load_photos,
    random_crop,
    random_lightness,
    rotated,
    rotated_words,
)
from diffcolor_training.regions import regions_loss, shares_by_color
from diffcolor_training.text import COLOR_WORDS, recolored_caption


def pictures(count: int, side: int = 48) -> torch.Tensor:
    """Soft random colours under gray texture, sRGB [N, 3, side, side] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = 0.2 + 0.6 * torch.rand(count, 3, 6, 6, generator=generator)
    texture = 0.1 * torch.randn(count, 1, side, side, generator=generator).clamp(-1.9, 1.9)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False) + texture


@pytest.fixture(scope="module")
def codec() -> torch.Tensor:
    return fit_codec(pictures(32) * 2 - 1)


@torch.no_grad()
def test_the_vae_computes_the_codec_and_gives_back_the_chroma(codec):
    vae, rgb = build_vae(codec), pictures(4)
    z = vae.encode(rgb * 2 - 1).latent_dist.mean
    cells = (rgb * 2 - 1).unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, h, w, 4, 4]
    y = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1, 1) * cells).sum(dim=1)
    u, v = cells[:, 1] - (cells[:, 0] + cells[:, 2]) / 2, (cells[:, 0] - cells[:, 2]) / 2
    values = torch.cat((y.flatten(-2), u.mean((-2, -1))[..., None], v.mean((-2, -1))[..., None]), dim=-1)
    by_hand = (values @ codec.T).movedim(-1, 1)
    torch.testing.assert_close(encode(codec, rgb), by_hand, atol=1e-3, rtol=0)
    torch.testing.assert_close(z, by_hand, atol=0.02, rtol=0.01)

    means = torch.nn.functional.avg_pool2d(rgb, 4)
    decoded = (vae.decode(z).sample + 1) / 2
    assert float((srgb_to_lab(decoded[..., ::4, ::4]) - srgb_to_lab(means))[:, 1:].abs().mean()) < 0.5


def test_chroma_has_the_first_channels_and_unit_variance(codec):
    rgb = pictures(32)
    gray = joined(lightness_of(rgb), torch.zeros(32, 2, 48, 48))
    z, z_gray = encode(codec, rgb), encode(codec, gray)
    assert float(z_gray[:, :CHROMA_CHANNELS].abs().max()) < 1e-3
    torch.testing.assert_close(z[:, :CHROMA_CHANNELS].pow(2).mean((0, 2, 3)), torch.ones(CHROMA_CHANNELS))
    assert float(z[:, CHROMA_CHANNELS].std()) == pytest.approx(3, rel=0.01)


def test_hues_turn_with_their_words():
    ab = torch.tensor([[[10.0]], [[0.0]]])
    torch.testing.assert_close(rotated(ab, 90), torch.tensor([[[0.0]], [[10.0]]]), atol=1e-5, rtol=0)
    assert rotated_words("a dark green roof under a white sky", 0) == "a dark green roof under a white sky"
    assert rotated_words("a blue lake and a tan path", 180) == "a yellow lake and a blue path"


def test_captions_are_recoloured_before_their_nouns():
    text, nouns = recolored_caption("a church on a hill", np.random.default_rng(1))
    assert [text[:end].rsplit(" ", 1)[-1] for end, _ in nouns] == ["church", "hill"]
    for end, number in nouns:
        before = text[:end].split(" ")[-2]
        assert before == (COLOR_WORDS[number - 1] if number else "a")


def test_captions_without_colours_say_so(tmp_path):
    photo = Photo(
        "x", torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).half(), "a hill", "a red hill", True
    )
    drawn = [draw_caption(photo, np.random.default_rng(seed)) for seed in range(200)]
    assert {"", "a photograph", "a hill", "a red hill", "a red"} <= {caption for caption, _ in drawn}
    assert all(colored for caption, colored in drawn if caption == "a red hill")


def test_only_the_split_is_loaded_and_neighbouring_plates_stay_together(tmp_path):
    rows = [("plates/plate-0001.jpg", "train"), ("plates/plate-0013.jpg", "train"), ("scenes/s.jpg", "train")]
    rows.append(("plates/plate-0500.jpg", "test"))
    for name, _ in rows:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (200, 180), (200, 40, 40)).save(tmp_path / name)
    with (tmp_path / "catalog.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "split", "context_prompt", "target_prompt"))
        writer.writerows((name, split, "a wall", "a red wall") for name, split in rows)
    names = {split: [p.name for p in load_photos(tmp_path, split)] for split in ("train", "validation", "test")}
    assert names["train"] == ["plates/plate-0013.jpg", "scenes/s.jpg"]
    assert names["validation"] == ["plates/plate-0001.jpg"]  # of block 0
    assert names["test"] == ["plates/plate-0500.jpg"]

    photo = load_photos(tmp_path, "test")[0]
    crop = random_crop(photo, 32, np.random.default_rng(0))
    torch.testing.assert_close(crop[3:], srgb_to_lab(crop[:3]), atol=0.2, rtol=0)
    grays = random_lightness(crop.expand(20, -1, -1, -1), np.random.default_rng(0))
    assert grays.shape == (20, 1, 32, 32)
    assert float(grays.min()) >= 0
    assert float(grays.max()) <= 100
    assert float(grays.mean((1, 2, 3)).std()) > 5  # emulsions differ


def green_over_blue() -> torch.Tensor:
    """L*a*b* [3, 4, 4]: the upper half green, the lower blue."""
    lab = torch.full((3, 4, 4), 50.0)
    lab[1, :2], lab[2, :2] = -16.0, 12.0
    lab[1, 2:], lab[2, 2:] = 3.0, -20.0
    return lab


def test_pixels_of_a_colour_belong_to_its_nouns():
    shares = shares_by_color(["green", None, "blue", "white"], green_over_blue())
    assert list(shares) == ["green", "blue", "white"]
    torch.testing.assert_close(shares["green"][:, 0], torch.tensor([1.0, 1, 0, 0]))
    torch.testing.assert_close(shares["blue"][:, 0], torch.tensor([0.0, 0, 1, 1]))
    assert float(shares["white"].max()) == 0.0
    gray = torch.stack((torch.full((4, 4), 80.0), torch.zeros(4, 4), torch.zeros(4, 4)))
    assert float(shares_by_color(["white", "gray"], gray)["white"].min()) == 0.5  # two words for the same pixels
    assert float(shares_by_color(["black"], gray)["black"].max()) == 0.0


def test_the_loss_is_least_where_nouns_lie_on_their_colours():
    lab, colors = green_over_blue(), ["green", "blue", "green", None]

    def loss_of(rows: dict[int, torch.Tensor]) -> float:
        shares = torch.full((5, 4, 4), 1e-6)
        for noun, half in rows.items():
            shares[noun] += half
        return float(regions_loss((shares / shares.sum(dim=0)).log(), colors, lab))

    upper = torch.zeros(4, 4)
    upper[:2] = 1
    right = loss_of({0: upper, 1: 1 - upper})
    assert right == pytest.approx(0, abs=1e-4)
    assert loss_of({2: upper, 1: 1 - upper}) == pytest.approx(right, abs=1e-4)  # the other green noun
    assert loss_of({0: 1 - upper, 1: upper}) > 5
    assert loss_of({3: upper, 1: 1 - upper}) > 2  # a noun without a colour
