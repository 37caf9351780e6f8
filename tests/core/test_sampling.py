import pytest
import torch

from diffcolor_core.config import SamplingSettings
from diffcolor_core.diffusion import add_noise, clean_estimate, ddim_timesteps
from diffcolor_core.models import load_checkpoint
from diffcolor_core.sampling import generate, luminance_projection
from diffcolor_scans.color import lightness_of, x_to_lab


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


LIGHTNESS = torch.linspace(10, 90, 32).expand(1, 32, 32)


def run(checkpoint, prompts, settings, **options):
    embeds = torch.cat([checkpoint.encode_prompts([prompt]) for prompt in prompts])
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return z, generate(checkpoint, checkpoint.unet, z, embeds, LIGHTNESS, settings, generator, **options)


def test_one_step_without_guidance_is_the_clean_estimate(checkpoint):
    settings = SamplingSettings(num_steps=1, strength=1.0, guidance_scale=1.0, project_luminance=False)
    z, found = run(checkpoint, ["a ball"], settings)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([999])
    z_t = add_noise(checkpoint.scheduler, z, eps, t)
    with torch.no_grad():
        output = checkpoint.predict(checkpoint.unet, z_t, t, checkpoint.encode_prompts(["a ball"]))
        x = checkpoint.decode(clean_estimate(checkpoint.scheduler, z_t, t, output)[0])
    torch.testing.assert_close(found, x_to_lab(x), atol=1e-3, rtol=1e-3)


def test_all_pictures_start_from_the_same_noise(checkpoint):
    settings = SamplingSettings(num_steps=3)
    _, (one, two) = run(checkpoint, ["a ball", "a ball"], settings)
    assert torch.equal(one, two)
    _, (alone,) = run(checkpoint, ["a ball"], settings)
    torch.testing.assert_close(one, alone, atol=1e-2, rtol=0)


def test_guidance_away_from_the_prompt_itself_is_no_guidance(checkpoint):
    """With the prompt as negative prompt both branches agree, whatever the scale."""
    settings = [SamplingSettings(num_steps=3, guidance_scale=scale) for scale in (1.0, 7.0)]
    (_, plain), (_, guided) = (run(checkpoint, ["a red ball"], s, negative_prompt="a red ball") for s in settings)
    torch.testing.assert_close(plain, guided, atol=5e-2, rtol=0)
    _, empty = run(checkpoint, ["a red ball"], settings[1])
    assert float((empty - plain).abs().max()) > 0.5


def test_projection_gives_the_vae_the_scans_own_luminance(checkpoint, monkeypatch):
    encoded = []
    plain = type(checkpoint).encode
    monkeypatch.setattr(type(checkpoint), "encode", lambda self, x: encoded.append(x) or plain(self, x))
    z_0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chroma = x_to_lab(checkpoint.decode(z_0))[:, 1:]
        luminance_projection(checkpoint, LIGHTNESS)(z_0)
    (x,) = encoded
    lab = x_to_lab(x)
    assert float((lightness_of((x + 1) / 2) - LIGHTNESS).abs().max()) < 0.01
    assert float((lab[:, 1:].norm(dim=1) - chroma.norm(dim=1)).max()) < 0.01  # the gamut only ever costs chroma


def test_it_is_done_once_a_step(checkpoint, monkeypatch):
    count = []
    plain = type(checkpoint).encode
    monkeypatch.setattr(type(checkpoint), "encode", lambda self, x: count.append(1) or plain(self, x))
    settings = SamplingSettings(num_steps=5, strength=0.8)
    run(checkpoint, ["a ball"], settings)
    assert len(count) == len(ddim_timesteps(checkpoint.scheduler, 5, 0.8)) == 4
    run(checkpoint, ["a ball"], settings.model_copy(update={"project_luminance": False}))
    assert len(count) == 4
