"""Stage 1, colorization with generative colour prior: equations (1) to (3) of `method.md`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import trainable_copy
from diffcolor_core.config import SamplingSettings, Stage1Settings
from diffcolor_core.diffusion import add_noise, clean_estimate, training_target
from diffcolor_core.models import Checkpoint
from diffcolor_core.sampling import generate

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class PriorResult:
    """x_pri [3, h, w] in [-1, 1], not yet aligned, and the losses of each step, by name."""

    x_pri: Tensor
    losses: dict[str, list[float]]


def contrastive_loss(image: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(1) L_con = -log(e^{s+/tau} / (e^{s+/tau} + sum_k e^{s_k^-/tau})), the mean over pictures.

    image: [B, d]; positive: [1, d]; negatives: [K, d]; all of unit length.
    """
    logits = image @ torch.cat((positive, negatives)).T / temperature  # [B, 1 + K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def random_views(x: Tensor, num_views: int, generator: torch.Generator) -> list[Tensor]:
    """Crops (60 to 100% of each side), half of them mirrored, with faint noise [O]: each [B, 3, h', w']."""
    views = []
    for _ in range(num_views):
        draw = torch.rand(6, generator=generator).tolist()
        h, w = (max(1, round(side * (0.6 + 0.4 * part))) for side, part in zip(x.shape[-2:], draw, strict=False))
        top, left = round((x.shape[-2] - h) * draw[2]), round((x.shape[-1] - w) * draw[3])
        view = x[..., top : top + h, left : left + w]
        view = view.flip(-1) if draw[4] < 0.5 else view
        views.append(view + 0.05 * draw[5] * torch.randn(view.shape, generator=generator).to(view))
    return views


def colorize_with_prior(
    checkpoint: Checkpoint,
    x_gray: Tensor,
    lightness_star: Tensor,
    context_prompt: str,
    settings: Stage1Settings,
    sampling: SamplingSettings,
    *,
    batch_size: int,
    generator: torch.Generator,
    progress: Progress,
) -> PriorResult:
    """x_pri: fine-tune a copy of the UNet under CLIP's guidance, then sample from the noised latent.

    x_gray: [3, h, w] in [-1, 1]; lightness_star: [1, h, w]. The checkpoint's own weights stay as they are.
    """
    # 1. z = s E(x_gray); the texts' embeddings once
    z = checkpoint.encode(x_gray[None].to(checkpoint.device))  # [1, C, h/f, w/f]
    c = checkpoint.encode_prompts([context_prompt])  # [1, tokens, width]
    positive = checkpoint.clip_text_features([context_prompt])
    negatives = checkpoint.clip_text_features(settings.anti_color_prompts)

    # 2. N1 steps of L = w_con L_con + w_diff L_diff, equation (3)
    unet = trainable_copy(checkpoint.unet, settings.adapter_rank, generator)
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=settings.learning_rate)
    num_timesteps = round(len(checkpoint.scheduler.alphas_cumprod) * settings.max_timestep)
    losses: dict[str, list[float]] = {"contrastive": [], "diffusion": []}
    for step in range(settings.num_steps):
        t = torch.randint(num_timesteps, (batch_size,), generator=generator).to(z.device)
        eps = torch.randn((batch_size, *z.shape[1:]), generator=generator).to(z)
        z_t = add_noise(checkpoint.scheduler, z.expand_as(eps), eps, t)
        embeds = c.expand(batch_size, -1, -1)
        output = checkpoint.denoise(unet, z_t, t, embeds)
        if settings.diffusion_target == "noise":
            target = training_target(checkpoint.scheduler, z.expand_as(eps), eps, t)
        else:
            with torch.no_grad():
                target = checkpoint.denoise(checkpoint.unet, z_t, t, embeds)
        diffusion = F.mse_loss(output, target)  # (2)
        loss = settings.diffusion_weight * diffusion
        contrastive = torch.zeros(())
        if settings.contrastive_weight > 0:
            z_0, _ = clean_estimate(checkpoint.scheduler, z_t, t, output)
            x_0 = checkpoint.decode(z_0)
            views = [x_0, *random_views(x_0, settings.num_views, generator)]
            image = torch.cat([checkpoint.clip_image_features(view) for view in views])
            contrastive = contrastive_loss(image, positive, negatives, settings.temperature)  # (1)
            loss = loss + settings.contrastive_weight * contrastive
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses["contrastive"].append(contrastive.item())
        losses["diffusion"].append(diffusion.item())
        progress("stage 1", step + 1, settings.num_steps)
        recent = losses["contrastive"][-5:]
        if len(recent) == 5 and sum(recent) / 5 < settings.stop_below:
            break
    unet.requires_grad_(False)

    # 3. z_T by forward diffusion, DDIM under c, x_pri = D(z)
    strength = sampling.strength if settings.strength is None else settings.strength
    noised = sampling.model_copy(update={"strength": strength})
    x_pri = generate(checkpoint, unet, z, c, lightness_star, noised, generator)[0]
    return PriorResult(x_pri=x_pri.cpu(), losses=losses)
