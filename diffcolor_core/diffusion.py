"""The diffusion process: forward noising, one-step clean estimate, DDIM sampling.

Symbols as in `docs/method.md`: z latents [B, C, h, w]; t timesteps 0..T-1; abar the cumulative noise
schedule `alphas_cumprod`; eps standard Gaussian noise; e prompt_embeds [B, tokens, width].
A network's raw output is eps, v or z_0 ("sample"), depending on the checkpoint. Only `training_target` and
`clean_estimate` know which, and only `_levels` knows the schedule, so that another kind of noise is a case of these
three. Everything else works with z, z_0 and eps.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t [B, C, h, w], t [B], prompt_embeds [B, tokens, width]) -> the UNet's raw output, shaped like z_t."""


def _levels(schedule: DDIMScheduler, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """How much of z and of eps is in z_t: sqrt(abar_t) and sqrt(1 - abar_t), [B, 1, 1, 1] each."""
    abar = schedule.alphas_cumprod.to(like)[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(schedule: DDIMScheduler, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps."""
    signal, noise = _levels(schedule, t, z)
    return signal * z + noise * eps


def training_target(schedule: DDIMScheduler, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The raw output that (2), (5) and (6) ask for: eps, v = sqrt(abar_t) eps - sqrt(1 - abar_t) z, or z."""
    if schedule.config.prediction_type == "sample":
        return z
    if schedule.config.prediction_type == "v_prediction":
        signal, noise = _levels(schedule, t, z)
        return signal * eps - noise * z
    return eps


def clean_estimate(schedule: DDIMScheduler, z_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The one-step estimate of z_0, and the eps that goes with it, from the network's raw output."""
    signal, noise = _levels(schedule, t, z_t)
    if schedule.config.prediction_type == "sample":
        return output, implied_noise(schedule, z_t, output, t)
    if schedule.config.prediction_type == "v_prediction":
        return signal * z_t - noise * output, signal * output + noise * z_t
    return (z_t - noise * output) / signal, output


def implied_noise(schedule: DDIMScheduler, z_t: Tensor, z_0: Tensor, t: Tensor) -> Tensor:
    """The eps with which z_0 becomes z_t."""
    signal, noise = _levels(schedule, t, z_t)
    return (z_t - signal * z_0) / noise


def ddim_timesteps(schedule: DDIMScheduler, num_steps: int, strength: float) -> Tensor:
    """The timesteps to visit, from the noisiest down.

    Of `num_steps` spread evenly over the schedule these are the lowest part, `strength` (0..1) of them and at
    least one, but none at strength 0. At strength 1 the first is the last of the schedule.
    """
    total = len(schedule.alphas_cumprod)
    steps = torch.linspace(0, total - 1, num_steps + 1).round().long()[1:]
    return steps[: max(1, round(num_steps * strength)) if strength > 0 else 0].flip(0)


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    schedule: DDIMScheduler,
    z_t: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    *,
    guidance_scale: float,
    correct_clean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta 0) with classifier-free guidance, from z_t to z_0.

    z_t: latents [B, C, h, w] at the noise level of `timesteps[0]`. Both embeds are [B, tokens, width].
    correct_clean: replaces each clean estimate, as the luminance projection does; eps is changed to match.
    guidance_scale: 1 means no guidance, and the negative prompt is then not used. Raises ValueError without
    timesteps.
    """
    for i, t in enumerate(timesteps):
        t_batch = t.expand(len(z_t)).to(z_t.device)
        if guidance_scale > 1:
            output = predict(
                torch.cat((z_t, z_t)), torch.cat((t_batch, t_batch)), torch.cat((negative_prompt_embeds, prompt_embeds))
            )
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        else:
            output = predict(z_t, t_batch, prompt_embeds)
        z_0, eps = clean_estimate(schedule, z_t, t_batch, output)
        if correct_clean is not None:
            z_0 = correct_clean(z_0)
            eps = implied_noise(schedule, z_t, z_0, t_batch)
        if i + 1 == len(timesteps):
            return z_0
        z_t = add_noise(schedule, z_0, eps, timesteps[i + 1].expand(len(z_t)).to(z_t.device))
    raise ValueError("no timesteps to sample")
