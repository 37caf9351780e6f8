import shutil

import pytest
import torch
from PIL import Image

from diffcolor_core import DiffColor, ModelError
from diffcolor_core.color_prior import CHROMA_UNIT, ColorPrior, NounRegions, load
from diffcolor_core.color_terms import colored_phrases
from diffcolor_core.config import preset
from diffcolor_core.models import load_checkpoint
from diffcolor_core.regions import named_regions, noun_text, word_ids
from diffcolor_scans.color import x_to_lab
from diffcolor_training.parts import save_beside
from support.pictures import gray_picture


def small_prior(text_width: int = 32) -> ColorPrior:
    torch.manual_seed(0)
    return ColorPrior((8, 8, 8, 16), text_width, num_tokens=12).eval().requires_grad_(False)


def small_regions(num_words: int = 50) -> NounRegions:
    torch.manual_seed(1)
    return NounRegions((8, 8, 8, 16), num_words, width=8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny checkpoint with a colour prior and noun regions of random weights."""
    folder = tmp_path_factory.mktemp("with-prior") / "model"
    shutil.copytree(tiny_folder, folder)
    tiny = load_checkpoint(str(tiny_folder))
    save_beside(small_prior(tiny.text_encoder.config.hidden_size), folder / "color_prior")
    save_beside(small_regions(len(tiny.tokenizer)), folder / "noun_regions")
    return folder


def test_a_saved_prior_is_the_same_up_to_half_precision(tmp_path):
    prior = small_prior()
    save_beside(prior, tmp_path / "prior")
    again = load(ColorPrior, tmp_path / "prior").eval()
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
    with pytest.raises(ModelError, match="cannot load .*color_prior"):
        load_checkpoint(str(damaged))


def test_nouns_and_none_of_them_share_every_cell():
    words = torch.tensor([[[3, 7], [5, -1], [-1, -1]], [[3, 7], [5, -1], [9, 9]]])
    shares = small_regions()(torch.rand(2, 1, 32, 48) * 100, words).exp()
    assert shares.shape == (2, 4, 8, 12)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 8, 12))
    assert float(shares[0, 2].max()) == 0.0  # a noun of no token
    assert float(shares[1, 2].min()) > 0.0


def test_regions_of_a_checkpoint_follow_the_nouns_and_treat_left_and_right_alike(folder):
    checkpoint = load_checkpoint(str(folder))
    lightness = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(1)) * 100
    told = torch.tensor([False, False])
    ball, table = named_regions(checkpoint, lightness, ("ball", "table"), told)
    assert ball.shape == (32, 48)
    assert 0 <= float((ball + table).min()) <= float((ball + table).max()) <= 1 + 1e-6
    swapped = named_regions(checkpoint, lightness, ("table", "ball"), told)
    torch.testing.assert_close(swapped, torch.stack((table, ball)))
    mirrored = named_regions(checkpoint, lightness.flip(-1), ("ball", "table"), told)
    torch.testing.assert_close(mirrored[0].flip(-1), ball, atol=1e-4, rtol=1e-3)


def test_a_noun_with_its_colour_is_somewhere_even_where_its_share_is_small(folder, monkeypatch):
    """With shares set by hand: the noun has 0.2 in the left half and 0.02 in the right."""
    checkpoint = load_checkpoint(str(folder))
    shares = torch.full((2, 2, 8, 12), 0.02)
    shares[0, 0, :, :6], shares[1, 0, :, 6:] = 0.2, 0.2  # the second is the mirror image
    monkeypatch.setattr(checkpoint.noun_regions, "forward", lambda *_: shares.log())
    lightness = torch.full((1, 32, 48), 50.0)
    (unsure,) = named_regions(checkpoint, lightness, ("ball",), torch.tensor([False]))
    (sure,) = named_regions(checkpoint, lightness, ("ball",), torch.tensor([True]))
    assert float(unsure.max()) < 0.2
    assert float(sure[:, :20].min()) > 0.9
    assert float(sure[:, 28:].max()) < 0.1


def test_a_noun_is_said_without_its_colours_or_with_one():
    prompt = "a dark red and white flag on a #8b0000 wall"
    flag, wall = colored_phrases(prompt, "")
    assert noun_text(prompt, flag, None) == "dark and flag"
    assert noun_text(prompt, wall, "blue") == "blue wall"


def test_a_noun_s_code_is_read_as_a_word(folder):
    tokenizer = load_checkpoint(str(folder)).tokenizer
    assert torch.equal(word_ids(tokenizer, [["#4682b4 ball"]]), word_ids(tokenizer, [["blue ball"]]))
    ids = word_ids(tokenizer, [["ball", "red ball"], ["table"]])
    assert ids.shape == (2, 2, 2)
    assert ids[0, 0].tolist() == [ids[0, 1, 1], -1]
    assert ids[1, 1].tolist() == [-1, -1]


def test_the_primary_is_the_prior_s_picture_and_a_target_adds_what_differs(folder, tmp_path):
    pipe = DiffColor.from_pretrained(
        str(folder),
        settings=preset("photo", {"alignment.propagate": False, "stage2.steer_words": False, "prior_gain": 1.5}),
    )
    path = tmp_path / "scan.png"
    Image.fromarray(gray_picture(48, 64, seed=2)).save(path)
    fit = pipe.fit(path, "a ball on a table")
    expected = pipe.checkpoint.prior_chroma(fit.lightness, ["a ball on a table", "a red ball on a table"])
    without = pipe.checkpoint.prior_chroma(fit.lightness, [""])
    z = pipe.checkpoint.encode_colored(fit.lightness, 1.5 * (expected[:1] + without) / 2)
    torch.testing.assert_close(fit.primary, x_to_lab(pipe.checkpoint.decode(z))[0, 1:], atol=0.01, rtol=0)
    result = pipe.recolor(fit, "a red ball on a table", alpha=2.0)
    start = fit.primary + 2 * 1.5 * (expected[1] - expected[0])
    z = pipe.checkpoint.encode_colored(fit.lightness, start[None])
    torch.testing.assert_close(result.generated[1:], x_to_lab(pipe.checkpoint.decode(z))[0, 1:], atol=0.01, rtol=0)
    same = pipe.recolor(fit, "a ball on a table")
    torch.testing.assert_close(same.chroma, fit.primary, atol=1.0, rtol=0)  # one more pass through the VAE
