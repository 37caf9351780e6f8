"""The weights of the demo model: their size, that they load, and that they obey words."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffcolor_core import DiffColor
from diffcolor_core.adapters import fitted_unet
from diffcolor_core.config import preset
from diffcolor_core.model_files import BUNDLES
from diffcolor_core.models import load_checkpoint
from diffcolor_core.prompts import noun_phrases
from diffcolor_core.regions import phrase_regions
from diffcolor_core.stage2 import reconstruction_loss
from diffcolor_scans.color import lightness_of, lock_luminance
from diffcolor_study.scenes import asked_colors, caption, draw_scene, recolored, render
from diffcolor_study.scores import region_colors
from diffcolor_training.evaluate import draw_pictures, without_fit


def scenes(count: int):
    rng = np.random.default_rng(31)
    specs = [recolored(draw_scene(rng, num_objects=2, style="photo"), rng) for _ in range(count)]
    return [render(spec) for spec in specs]


def test_the_bundle_is_small_and_half_precision():
    files = [path for path in BUNDLES["demo"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_diffusers_own_pipeline_loads_the_same_folder():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BUNDLES["demo"], use_safetensors=True, torch_dtype=torch.float32)
    image = pipe("a red ball on a table", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_words_colour_the_regions():
    pipe = DiffColor(load_checkpoint("demo"), without_fit(preset("demo")))
    assert (pipe.checkpoint.vae_factor, pipe.checkpoint.native_size_px) == (4, 64)
    right = []
    for scene in scenes(4):
        (picture,) = draw_pictures(pipe, scene, [scene.spec], seed=0)
        right += [f == a for f, a in zip(region_colors(picture, scene), asked_colors(scene.spec), strict=True)]
    assert sum(right) / len(right) >= 0.8  # one word in seven is right by chance


@pytest.mark.timeout(300)
def test_both_stages_with_the_demo_preset():
    scene = scenes(1)[0]
    buffer = io.BytesIO()
    Image.fromarray((scene.gray[0] * 255).round().byte().numpy()).save(buffer, "PNG")
    pipe = DiffColor.from_pretrained("demo")
    fit = pipe.fit(buffer.getvalue(), caption(scene.spec, colors=False))
    checkpoint = pipe.checkpoint
    z = checkpoint.encode(lock_luminance(fit.primary, fit.lightness)[None] * 2 - 1)

    @torch.no_grad()
    def loss(unet, e) -> float:  # over the same draws of t and eps each time
        return float(reconstruction_loss(checkpoint, unet, z, e, 64, [torch.Generator().manual_seed(1)]))

    start = loss(checkpoint.unet, checkpoint.encode_prompts([fit.rewritten_prompt]))
    after_embedding = loss(checkpoint.unet, fit.prompt_embeds)
    after_both = loss(fitted_unet(checkpoint.unet, None, fit.unet_state), fit.prompt_embeds)
    assert after_both < after_embedding < start
    result = pipe.recolor(fit, caption(scene.spec))
    found, asked = region_colors(result.image, scene), asked_colors(scene.spec)
    assert found[2:] == asked[2:]  # table and wall
    assert result.metrics["p99_abs_delta_l"] <= 0.5
    assert result.metrics["colorfulness"] > 20


def test_attention_finds_the_nouns():
    """Regions found on the gray picture by attention alone, against the renderer's masks."""
    checkpoint = load_checkpoint("demo")
    shares = []
    for scene in scenes(4):
        lightness, prompt = lightness_of(scene.rgb), caption(scene.spec, colors=False)
        regions = phrase_regions(checkpoint, lightness, prompt, noun_phrases(prompt), torch.Generator().manual_seed(0))
        shares.append(float((regions.argmax(dim=0) == scene.masks.argmax(dim=0)).float().mean()))
    assert sum(shares) / len(shares) >= 0.8
