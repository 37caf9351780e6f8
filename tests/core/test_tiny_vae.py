"""A tiny VAE beside a checkpoint stands in for its VAE where the preset says so."""

import shutil

import pytest
import torch
from diffusers import AutoencoderTiny

from diffcolor_core import DiffColor, ModelError, preset
from diffcolor_core.config import SamplingSettings, Stage1Settings
from diffcolor_core.model_files import identify
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.sampling import luminance_projection
from diffcolor_core.stage1 import contrastive_of
from diffcolor_scans.color import lightness_of
from tests.core.test_colorizer import CONTEXT, TARGET, scan_bytes

Z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def folder_with(tiny_folder, tmp_path, **config):
    """The tiny checkpoint with a tiny VAE of random weights beside it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    torch.manual_seed(3)
    tiny = AutoencoderTiny(**sizes | blocks | config)
    tiny.decoder.layers[-1].bias.data += 0.5  # grays in the middle of the range
    tiny.save_pretrained(folder / "tiny_vae")
    return folder


@pytest.fixture
def checkpoint(tiny_folder, tmp_path):
    return load_checkpoint(str(folder_with(tiny_folder, tmp_path)))


def test_it_gives_other_pictures_and_latents_of_the_same_shapes(checkpoint):
    x, rough = checkpoint.decode(Z), checkpoint.decode(Z, tiny=True)
    assert x.shape == rough.shape == (1, 3, 32, 32)
    assert not torch.allclose(x, rough, atol=0.05)
    assert checkpoint.encode(x, tiny=True).shape == Z.shape


def test_without_one_the_vae_does_it(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    assert torch.equal(checkpoint.decode(Z, tiny=True), checkpoint.decode(Z))
    lightness = torch.full((1, 32, 32), 50.0)
    projected = [luminance_projection(checkpoint, lightness, tiny)(Z) for tiny in (False, True)]
    assert torch.equal(*projected)


def test_a_picture_that_has_the_scans_luminance_already_stays(checkpoint):
    """However much the tiny VAE loses, it loses it of both pictures."""
    with torch.no_grad():
        own = lightness_of((checkpoint.decode(Z, tiny=True).clamp(-1, 1) + 1) / 2)[0]
        project = luminance_projection(checkpoint, own, tiny=True)
        darker = luminance_projection(checkpoint, 0.5 * own, tiny=True)
        stays, moves = (float((change(Z) - Z).abs().max()) for change in (project, darker))
    assert stays < 0.05 * moves


def test_clip_sees_what_it_decodes(checkpoint):
    """And the gradient is that of CLIP on its picture."""
    features = checkpoint.clip_text_features(["a ball", "gray"])
    settings = Stage1Settings(tiny_decoder=True, temperature=0.1)
    z = Z.clone().requires_grad_()
    loss = contrastive_of(checkpoint, z, features[:1], torch.Generator(), features[1:], settings)
    loss.backward()
    seen = checkpoint.clip_image_features(checkpoint.decode(leaf := Z.clone().requires_grad_(), tiny=True))
    expected = torch.nn.functional.cross_entropy(seen @ features.T / 0.1, torch.tensor([0]))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z.grad, leaf.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tiny", [True, False])
def test_the_vae_decodes_only_pictures_that_are_kept(checkpoint, monkeypatch, tiny):
    calls = []
    plain = Checkpoint.decode

    def decode(self, z, wanted=False):
        calls.append(wanted)
        return plain(self, z, wanted)

    monkeypatch.setattr(Checkpoint, "decode", decode)
    few = {"stage1.num_steps": 2, "stage2.embedding_steps": 1, "stage2.model_steps": 1, "sampling.num_steps": 4}
    settings = preset("standard", few | {"stage1.tiny_decoder": tiny, "sampling.tiny_projection": tiny})
    pipe = DiffColor(checkpoint, settings)
    result = pipe.recolor(pipe.fit(scan_bytes(), CONTEXT), TARGET)
    assert result.metrics["p99_abs_delta_l"] <= 0.5
    steps = 4 + round(4 * SamplingSettings().strength)
    assert calls.count(False) == 2 + (0 if tiny else 2 + steps)
    assert calls.count(True) == (2 + steps if tiny else 0)


def test_it_is_part_of_what_the_model_is(tiny_folder, tmp_path):
    assert identify(str(folder_with(tiny_folder, tmp_path)))[1] != identify(str(tiny_folder))[1]


def test_one_for_other_latents_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="another shape"):
        load_checkpoint(str(folder_with(tiny_folder, tmp_path, latent_channels=6)))


def test_damaged_weights_are_an_error_of_the_model(tiny_folder, tmp_path):
    folder = folder_with(tiny_folder, tmp_path)
    (folder / "tiny_vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="tiny_vae"):
        load_checkpoint(str(folder))
