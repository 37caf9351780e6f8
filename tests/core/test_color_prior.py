import shutil

import pytest
import torch
from PIL import Image

from diffcolor_core import DiffColor, ModelError
from diffcolor_core.color import x_to_lab
from diffcolor_core.color_prior import CHROMA_UNIT, ColorPrior, load_color_prior
from diffcolor_core.config import preset
from diffcolor_core.models import load_checkpoint
from diffcolor_core.prompts import noun_phrases
from diffcolor_core.regions import response_regions
from support.pictures import gray_picture


def small_prior(text_width: int = 32) -> ColorPrior:
    torch.manual_seed(0)
    return ColorPrior((8, 8, 8, 16), text_width, num_tokens=12).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny checkpoint with a colour prior of random weights."""
    folder = tmp_path_factory.mktemp("with-prior") / "model"
    shutil.copytree(tiny_folder, folder)
    small_prior(load_checkpoint(str(tiny_folder)).text_encoder.config.hidden_size).save(folder / "color_prior")
    return folder


def test_a_saved_prior_is_the_same_up_to_half_precision(tmp_path):
    prior = small_prior()
    prior.save(tmp_path / "prior")
    again = load_color_prior(tmp_path / "prior").eval()
    lightness, embeds = torch.rand(2, 1, 48, 64) * 100, torch.randn(2, 7, 32)
    chroma = prior(lightness, embeds)
    assert chroma.shape == (2, 2, 12, 16)
    torch.testing.assert_close(again(lightness, embeds), chroma, atol=0.01 * CHROMA_UNIT, rtol=0)


def test_the_prior_of_a_checkpoint_reads_the_prompt_and_treats_left_and_right_alike(folder):
    checkpoint = load_checkpoint(str(folder))
    lightness = torch.rand(1, 48, 64, generator=torch.Generator().manual_seed(1)) * 100
    chroma = checkpoint.prior_chroma(lightness, ["a red ball", "a blue ball", "a red ball"])
    assert chroma.shape == (3, 2, 48, 64)
    torch.testing.assert_close(chroma[0], chroma[2])
    assert float((chroma[0] - chroma[1]).abs().max()) > 1e-3
    mirrored = checkpoint.prior_chroma(lightness.flip(-1), ["a red ball"])
    torch.testing.assert_close(mirrored.flip(-1), chroma[:1], atol=1e-3, rtol=1e-3)
    long = checkpoint.prior_chroma(lightness, [" and ".join(["a red ball"] * 40)])
    assert bool(torch.isfinite(long).all())
    together = checkpoint.prior_chroma(lightness, ["a red ball", " and ".join(["a red ball"] * 40)])
    assert torch.equal(together[0], chroma[0])  # the other prompt of the call is longer


def test_what_is_missing_or_damaged_is_said(folder, tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="has no colour prior"):
        DiffColor.from_pretrained(str(tiny_folder), settings="photo")
    damaged = tmp_path / "model"
    shutil.copytree(folder, damaged)
    weights = damaged / "color_prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load the colour prior in .*color_prior"):
        load_checkpoint(str(damaged))


def test_regions_by_response_share_the_picture(folder):
    lightness = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(1)) * 100
    prompt = "a ball and a box on a table"
    regions = response_regions(load_checkpoint(str(folder)), lightness, prompt, noun_phrases(prompt))
    assert regions.shape == (3, 32, 48)
    assert float(regions.min()) >= 0
    torch.testing.assert_close(regions.sum(dim=0), torch.ones(32, 48))


def test_a_region_is_where_a_noun_s_colour_word_counts(folder, monkeypatch):
    """With a prior set by hand: it colours the left half by the ball's colour word and the right half by the box's."""
    checkpoint = load_checkpoint(str(folder))

    def prior_chroma(lightness, prompts):
        chroma = torch.zeros(len(prompts), 2, *lightness.shape[-2:])
        for row, prompt in zip(chroma, prompts, strict=True):
            for noun, half in (("ball", row[..., :24]), ("box", row[..., 24:])):
                for channel, word in enumerate(("red", "green")):
                    half[channel] = 30.0 * (f"{word} {noun}" in prompt)
        return chroma

    monkeypatch.setattr(type(checkpoint), "prior_chroma", lambda self, *arguments: prior_chroma(*arguments))
    lightness = torch.full((1, 32, 48), 40.0)
    lightness[..., 24:] = 70
    prompt = "a ball and a box"
    ball, box = response_regions(checkpoint, lightness, prompt, noun_phrases(prompt))
    assert float(ball[:, :23].min()) > 0.9
    assert float(box[:, 25:].min()) > 0.9


def test_the_primary_is_the_prior_s_picture_and_a_target_adds_what_differs(folder, tmp_path):
    pipe = DiffColor.from_pretrained(str(folder), settings=preset("photo", {"alignment.propagate": False}))
    path = tmp_path / "scan.png"
    Image.fromarray(gray_picture(48, 64, seed=2)).save(path)
    fit = pipe.fit(path, "a ball on a table")
    expected = pipe.checkpoint.prior_chroma(fit.lightness, ["a ball on a table", "a red ball on a table"])
    without = pipe.checkpoint.prior_chroma(fit.lightness, [""])
    z = pipe.checkpoint.encode_colored(fit.lightness, (expected[:1] + without) / 2)
    torch.testing.assert_close(fit.primary, x_to_lab(pipe.checkpoint.decode(z))[0, 1:], atol=0.01, rtol=0)
    result = pipe.recolor(fit, "a red ball on a table", alpha=2.0)
    start = fit.primary + 2 * (expected[1] - expected[0])
    z = pipe.checkpoint.encode_colored(fit.lightness, start[None])
    torch.testing.assert_close(result.generated[1:], x_to_lab(pipe.checkpoint.decode(z))[0, 1:], atol=0.01, rtol=0)
    same = pipe.recolor(fit, "a ball on a table")
    torch.testing.assert_close(same.chroma, fit.primary, atol=1.0, rtol=0)  # one more pass through the VAE
