"""From the noised latent of a picture to new colours: the last step of both stages.

Symbols as in `docs/method.md`: z latent of the picture to start from, z_T the same after forward diffusion.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffcolor_core.config import SamplingSettings
from diffcolor_core.diffusion import add_noise, ddim_sample, ddim_timesteps
from diffcolor_core.models import Checkpoint, pad_embeds
from diffcolor_core.regions import RegionalPrompts
from diffcolor_scans.color import lock_luminance, x_to_lab


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    prompt_embeds: Tensor,
    lightness: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
    negative_prompt: str = "",
    regional: RegionalPrompts | None = None,
) -> Tensor:
    """Forward-diffuse z to the starting noise level, then DDIM under the prompt: L*a*b* [B, 3, h, w].

    z: [1 or B, C, h/f, w/f]. prompt_embeds: [R, tokens, width]. lightness: [1, h, w], the scan's. All pictures start
    from the same noise, so that only their prompts tell them apart. regional: which rows of prompt_embeds make
    up which picture; without it each row makes one. The result's L* is what the model made, near the scan's.
    """
    timesteps = ddim_timesteps(checkpoint.scheduler, settings.num_steps, settings.strength)
    num_pictures = len(prompt_embeds) if regional is None else int(regional.owners.max()) + 1
    if not len(timesteps):
        return x_to_lab(checkpoint.decode(z.expand(num_pictures, -1, -1, -1))).cpu()
    eps = torch.randn(z[:1].shape, generator=generator).to(z)
    z_t = add_noise(checkpoint.scheduler, z, eps, timesteps[:1].to(z.device))  # z_T
    predict = partial(checkpoint.predict, unet)
    e_empty, e_negative = checkpoint.encode_prompts([""]), checkpoint.encode_prompts([negative_prompt])
    num_tokens = max(e_negative.shape[1], prompt_embeds.shape[1])
    projection = luminance_projection(checkpoint, lightness, settings.tiny_projection)
    z_0 = ddim_sample(
        predict if regional is None else partial(regional.predict, predict),
        checkpoint.scheduler,
        z_t.expand(num_pictures, -1, -1, -1),
        timesteps,
        pad_embeds(prompt_embeds, e_empty, num_tokens),
        pad_embeds(e_negative, e_empty, num_tokens).expand(num_pictures, -1, -1),
        guidance_scale=settings.guidance_scale,
        correct_clean=projection if settings.project_luminance else None,
    )
    return x_to_lab(checkpoint.decode(z_0)).cpu()


def luminance_projection(checkpoint: Checkpoint, lightness: Tensor, tiny: bool = False) -> Callable[[Tensor], Tensor]:
    """The map from a clean estimate z_0 to the one with the scan's luminance [O]: decode, replace L*, encode.

    tiny: with the tiny VAE, if there is one. What it loses, it loses of both pictures, so z_0 keeps that.
    """

    def project(z_0: Tensor) -> Tensor:
        x_0 = checkpoint.decode(z_0, tiny)
        chroma = x_to_lab(x_0)[:, 1:]
        locked = lock_luminance(chroma, lightness.to(chroma).expand(len(chroma), -1, -1, -1)) * 2 - 1
        if not (tiny and checkpoint.tiny_vae):
            return checkpoint.encode(locked)
        return z_0 + checkpoint.encode(locked, tiny) - checkpoint.encode(x_0, tiny)

    return project
