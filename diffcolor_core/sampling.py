"""From the noised latent of a picture to a coloured picture: what both stages end with."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffcolor_core.color import lock_luminance, srgb_to_lab
from diffcolor_core.config import SamplingSettings
from diffcolor_core.diffusion import add_noise, ddim_sample, ddim_timesteps
from diffcolor_core.models import Checkpoint


def repeat_chunks(prompt_embeds: Tensor, num_tokens: int) -> Tensor:
    """Embeds [B, n, d] repeated along their tokens up to `num_tokens`, a multiple of n."""
    return prompt_embeds.repeat(1, num_tokens // prompt_embeds.shape[1], 1)


def luminance_projection(checkpoint: Checkpoint, lightness_star: Tensor) -> Callable[[Tensor], Tensor]:
    """The map of a clean estimate to the one with the scan's L* [O]: decode, exchange L*, encode.

    lightness_star: [1, h, w] at working size.
    """

    def project(z_0: Tensor) -> Tensor:
        x = checkpoint.decode(z_0)
        chroma = srgb_to_lab((x.clamp(-1, 1) + 1) / 2)[:, 1:]
        locked = lock_luminance(chroma, lightness_star.to(x).expand(len(x), -1, -1, -1))
        return checkpoint.encode(locked * 2 - 1)

    return project


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    prompt_embeds: Tensor,
    lightness_star: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
) -> Tensor:
    """x: forward-diffuse z to the starting noise level, then DDIM under the prompt: [B, 3, h, w] in [-1, 1].

    z: [1, C, h/f, w/f]; prompt_embeds: [B, tokens, width]; lightness_star: [1, h, w]. All B pictures
    start from the same noise, so that only the prompt tells them apart.
    """
    timesteps = ddim_timesteps(checkpoint.scheduler, settings.num_steps, settings.strength)
    eps = torch.randn(z.shape, generator=generator).to(z)
    z_t = add_noise(checkpoint.scheduler, z, eps, timesteps[:1].to(z.device))
    count = len(prompt_embeds)
    negative = repeat_chunks(checkpoint.encode_prompts([settings.negative_prompt]), prompt_embeds.shape[1])
    z_0 = ddim_sample(
        lambda z_t, t, e: checkpoint.denoise(unet, z_t, t, e),
        checkpoint.scheduler,
        z_t.expand(count, -1, -1, -1),
        timesteps,
        prompt_embeds,
        negative.expand(count, -1, -1),
        guidance_scale=settings.guidance_scale,
        correct_clean=luminance_projection(checkpoint, lightness_star) if settings.project_luminance else None,
    )
    return checkpoint.decode(z_0).clamp(-1, 1)
