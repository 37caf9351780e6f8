"""Stage 2, in-context controllable colorization: equations (5) to (7) of `method.md`."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import trainable_copy
from diffcolor_core.diffusion import add_noise, training_target
from diffcolor_core.models import Checkpoint
from diffcolor_core.prior import Progress
from diffcolor_core.sampling import fill_up


def reconstruction_loss(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    prompt_embeds: Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """E ||eps - eps_theta(z_t, t, e)||^2 over `batch_size` draws of t and eps: the loss of (5) and of (6)."""
    t = torch.randint(len(checkpoint.scheduler.alphas_cumprod), (batch_size,), generator=generator).to(z.device)
    eps = torch.randn((batch_size, *z.shape[1:]), generator=generator).to(z)
    z = z.expand_as(eps)
    z_t = add_noise(checkpoint.scheduler, z, eps, t)
    output = checkpoint.denoise(unet, z_t, t, prompt_embeds.expand(batch_size, -1, -1))
    return F.mse_loss(output, training_target(checkpoint.scheduler, z, eps, t))


def optimise_embedding(
    checkpoint: Checkpoint,
    z: Tensor,
    prompt_embeds: Tensor,
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, list[float]]:
    """(5) e_opt = argmin_e E ||eps - eps_theta(z_t, t, e)||^2, from e = T(c'), the UNet frozen.

    z: [1, C, h/f, w/f], the latent of the aligned primary; prompt_embeds: [1, tokens, width].
    Returns e_opt and the loss of each step.
    """
    e = prompt_embeds.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([e], lr=learning_rate)
    losses = []
    for step in range(num_steps):
        loss = reconstruction_loss(checkpoint, checkpoint.unet, z, e, batch_size, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress("stage 2, embedding", step + 1, num_steps)
    return e.detach(), losses


def finetune_model(
    checkpoint: Checkpoint,
    z: Tensor,
    prompt_embeds: Tensor,
    *,
    num_steps: int,
    learning_rate: float,
    adapter_rank: int | None,
    batch_size: int,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[UNet2DConditionModel, list[float]]:
    """(6) theta = argmin E ||eps - eps_theta(z_t, t, e_opt)||^2, on a copy of the base UNet [O: not of stage 1's].

    With `adapter_rank`, low-rank adapters are trained instead of all weights. Returns the fitted copy,
    frozen, and the loss of each step.
    """
    unet = trainable_copy(checkpoint.unet, adapter_rank, generator)
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(num_steps):
        loss = reconstruction_loss(checkpoint, unet, z, prompt_embeds, batch_size, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress("stage 2, model", step + 1, num_steps)
    return unet.requires_grad_(False), losses


def interpolate(e_opt: Tensor, e_target: Tensor, e_empty: Tensor, alpha: float) -> Tensor:
    """(7) e(alpha) = (1 - alpha) e_opt + alpha T(c^).

    e_opt: [1, tokens, width]; e_target: [B, tokens', width]. Where one has more chunks than the
    other, the shorter is filled up with the empty prompt's embeds `e_empty` [1, one chunk, width].
    """
    most = max(e_opt.shape[1], e_target.shape[1])
    return (1 - alpha) * fill_up(e_opt, e_empty, most) + alpha * fill_up(e_target, e_empty, most)


def exaggerate(e: Tensor, e_empty: Tensor, tokens: list[int], weight: float) -> Tensor:
    """Prompt weighting [O]: `tokens` of e [1, n, width] moved `weight` times as far from the empty prompt's."""
    neutral = fill_up(e_empty, e_empty, e.shape[1])
    weighted = e.clone()
    weighted[:, tokens] = neutral[:, tokens] + weight * (e - neutral)[:, tokens]
    return weighted
