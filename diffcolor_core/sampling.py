"""From the noised latent of a picture to a coloured picture: what both stages end with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.color import lock_luminance, srgb_to_lab
from diffcolor_core.config import SamplingSettings
from diffcolor_core.diffusion import Denoiser, add_noise, ddim_sample, ddim_timesteps
from diffcolor_core.models import Checkpoint


def fill_up(e: Tensor, e_empty: Tensor, num_tokens: int) -> Tensor:
    """Embeds [B, n, width] filled up to `num_tokens` with the empty prompt's `e_empty` [1, one chunk, width]."""
    num_chunks = (num_tokens - e.shape[1]) // e_empty.shape[1]
    return torch.cat((e, *[e_empty.expand(len(e), -1, -1)] * num_chunks), dim=1)


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


@dataclass(frozen=True)
class Regional:
    """Several prompts for one picture, each for its own part [O] (after MultiDiffusion, Bar-Tal et al. 2023).

    owners: [R], the picture that each row of prompt_embeds belongs to; masks: [R, h, w] at any size,
    summing to 1 over the rows of a picture.
    """

    owners: Tensor
    masks: Tensor

    def denoise(self, denoiser: Denoiser, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The rows' outputs joined by their masks; z_t may hold as many unconditional pictures in front."""
        plain = len(prompt_embeds) - len(self.owners)
        rows = torch.cat((torch.arange(plain), plain + self.owners)).to(z_t.device)
        shares = F.interpolate(self.masks[:, None], size=z_t.shape[-2:], mode="area").to(z_t)
        shares = torch.cat((torch.ones_like(shares[:1]).expand(plain, -1, -1, -1), shares))
        outputs = denoiser(z_t[rows], t[rows], prompt_embeds)
        return torch.zeros_like(z_t).index_add(0, rows, outputs * shares)


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    prompt_embeds: Tensor,
    lightness_star: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
    negative_prompt: str | None = None,
    regional: Regional | None = None,
) -> Tensor:
    """x: forward-diffuse z to the starting noise level, then DDIM under the prompt: [B, 3, h, w] in [-1, 1].

    z: [1, C, h/f, w/f]; prompt_embeds: [B, tokens, width]; lightness_star: [1, h, w]. All B pictures
    start from the same noise, so that only the prompt tells them apart. negative_prompt: instead of
    the settings'. regional: which rows of prompt_embeds make up which picture; by default each its own.
    """
    timesteps = ddim_timesteps(checkpoint.scheduler, settings.num_steps, settings.strength)
    eps = torch.randn(z.shape, generator=generator).to(z)
    z_t = add_noise(checkpoint.scheduler, z, eps, timesteps[:1].to(z.device))
    count = len(prompt_embeds) if regional is None else int(regional.owners.max()) + 1
    denoiser = partial(checkpoint.denoise, unet)
    negative = checkpoint.encode_prompts([settings.negative_prompt if negative_prompt is None else negative_prompt])
    e_empty, most = checkpoint.encode_prompts([""]), max(negative.shape[1], prompt_embeds.shape[1])
    negative, prompt_embeds = fill_up(negative, e_empty, most), fill_up(prompt_embeds, e_empty, most)
    z_0 = ddim_sample(
        denoiser if regional is None else partial(regional.denoise, denoiser),
        checkpoint.scheduler,
        z_t.expand(count, -1, -1, -1),
        timesteps,
        prompt_embeds,
        negative.expand(count, -1, -1),
        guidance_scale=settings.guidance_scale,
        correct_clean=luminance_projection(checkpoint, lightness_star) if settings.project_luminance else None,
    )
    return checkpoint.decode(z_0).clamp(-1, 1)
