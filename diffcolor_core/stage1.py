"""Stage 1 of the paper, colorization with a generative colour prior: equations (1) to (3).

Symbols as in `docs/method.md`:

    x_gray   gray_input(lightness)     z, z_t, eps, t   latent, noised latent, noise, timestep
    c, c_k^- context prompt, anti-colour prompts        f_I, f_T   CLIP's image and text features
    x0^      decode(z_0), the one-step clean estimate   x_pri      `generated`, the sampled picture
    x^_pri   `chroma` beside the scan's lightness: x_pri after alignment, equation (4)

[P] marks what is the paper's, [A] its author's prototype's, [O] ours.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import trainable_copy
from diffcolor_core.alignment import align_chroma
from diffcolor_core.config import Settings
from diffcolor_core.diffusion import add_noise, clean_estimate, training_target
from diffcolor_core.images import gray_input
from diffcolor_core.models import Checkpoint
from diffcolor_core.progress import Progress
from diffcolor_core.sampling import generate


@dataclass(frozen=True)
class Texts:
    """Embeds of the texts: T(c) [1, tokens, width], f_T(c) [1, d] and f_T(c_k^-) [K, d]."""

    context: Tensor
    positive: Tensor
    negatives: Tensor


@dataclass(frozen=True)
class Prior:
    """What stage 1 gives. chroma: x^_pri, [2, h, w]. generated: x_pri before alignment, L*a*b* [3, h, w].

    losses: of each step, "contrastive" for equation (1) and "diffusion" for equation (2).
    """

    chroma: Tensor
    generated: Tensor
    losses: dict[str, list[float]]


def colorize_with_prior(
    checkpoint: Checkpoint,
    lightness: Tensor,
    context_prompt: str,
    settings: Settings,
    generator: torch.Generator,
    progress: Progress,
) -> Prior:
    """Fine-tune a copy of the UNet under CLIP's guidance, sample from the noised gray latent, align.

    lightness: [1, h, w], 0..100, at working size. The checkpoint's own weights are not changed.
    """
    stage1 = settings.stage1

    # 1. z = s E(x_gray), and the embeddings of all texts
    z = checkpoint.encode(gray_input(lightness)[None].to(checkpoint.device))  # [1, C, h/f, w/f]
    texts = Texts(
        checkpoint.encode_prompts([context_prompt]),
        checkpoint.clip_text_features([context_prompt]),
        checkpoint.clip_text_features(stage1.anti_color_prompts),
    )

    # 2. N1 steps on equation (3)
    unet = trainable_copy(checkpoint.unet, stage1.adapter_rank, generator)
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=stage1.learning_rate)
    losses: dict[str, list[float]] = {"contrastive": [], "diffusion": []}
    for step in range(stage1.num_steps):
        optimizer.zero_grad()  # frees the last gradients before the forward pass takes memory
        loss, contrastive, diffusion = prior_loss(checkpoint, unet, z, texts, settings, generator)
        loss.backward()
        optimizer.step()
        losses["contrastive"].append(contrastive.item())
        losses["diffusion"].append(diffusion.item())
        progress("stage 1", step + 1, stage1.num_steps)
        recent = losses["contrastive"][-5:]
        if stage1.contrastive_weight > 0 and len(recent) == 5 and sum(recent) / 5 < stage1.stop_below:
            break
    unet.requires_grad_(False)

    # 3. z_T by forward diffusion of z [P] or of the colour prior's picture [O], K-step DDIM under c, x_pri = D(z)
    if settings.color_prior:
        expected = checkpoint.prior_chroma(lightness, ["", context_prompt]).mean(dim=0, keepdim=True)
        z = checkpoint.encode_colored(lightness, expected)
    strength = settings.sampling.strength if stage1.strength is None else stage1.strength
    sampling = settings.sampling.model_copy(update={"strength": strength})
    generated = generate(checkpoint, unet, z, texts.context, lightness, sampling, generator)[0]

    # 4. equation (4): x_pri aligned to x_gray
    chroma = align_chroma(checkpoint, lightness, generated, settings.alignment, generator)
    return Prior(chroma, generated, losses)


def prior_loss(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    texts: Texts,
    settings: Settings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """(3) L = w_con L_con + w_diff L_diff for one draw of `batch_size` timesteps and noises: L, L_con, L_diff."""
    stage1, schedule = settings.stage1, checkpoint.scheduler
    num_timesteps = round(len(schedule.alphas_cumprod) * stage1.max_timestep)
    t = torch.randint(num_timesteps, (settings.batch_size,), generator=generator).to(z.device)
    eps = torch.randn((settings.batch_size, *z.shape[1:]), generator=generator).to(z)
    z = z.expand_as(eps)
    z_t = add_noise(schedule, z, eps, t)
    context = texts.context.expand(settings.batch_size, -1, -1)
    output = checkpoint.predict(unet, z_t, t, context)

    # (2) L_diff: distance to the drawn noise [P] or to the frozen model's own prediction [O]
    if stage1.diffusion_target == "noise":
        target = training_target(schedule, z, eps, t)
    else:
        with torch.no_grad():
            target = checkpoint.predict(checkpoint.unet, z_t, t, context)
    diffusion = F.mse_loss(output, target)
    if stage1.contrastive_weight == 0:
        return stage1.diffusion_weight * diffusion, torch.zeros(()), diffusion

    # (1) L_con: CLIP on the one-step clean estimate, and on views of it [O]
    z_0, _ = clean_estimate(schedule, z_t, t, output)
    x_0 = checkpoint.decode(z_0)  # [B, 3, h, w]
    views = [x_0, *random_views(x_0, stage1.num_views, generator)]
    image = torch.cat([checkpoint.clip_image_features(view) for view in views])  # [B * (1 + views), d]
    contrastive = contrastive_loss(image, texts.positive, texts.negatives, stage1.temperature)
    loss = stage1.contrastive_weight * contrastive + stage1.diffusion_weight * diffusion
    return loss, contrastive, diffusion


def contrastive_loss(image: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(1) L_con = -log(e^{s+/tau} / (e^{s+/tau} + sum_k e^{s_k^-/tau})), the mean over pictures.

    image: f_I(x0^), [B, d]. positive: f_T(c), [1, d]. negatives: f_T(c_k^-), [K, d]. All have unit length, so
    that s = cos is their product.
    """
    logits = image @ torch.cat((positive, negatives)).T / temperature  # [B, 1 + K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def random_views(x: Tensor, num_views: int, generator: torch.Generator) -> list[Tensor]:
    """Crops of x [B, 3, h, w], 60 to 100% of each side, half of them mirrored, with faint noise [O]."""
    views = []
    for _ in range(num_views):
        draw = torch.rand(6, generator=generator).tolist()
        h, w = (max(1, round(side * (0.6 + 0.4 * part))) for side, part in zip(x.shape[-2:], draw, strict=False))
        top, left = round((x.shape[-2] - h) * draw[2]), round((x.shape[-1] - w) * draw[3])
        view = x[..., top : top + h, left : left + w]
        view = view.flip(-1) if draw[4] < 0.5 else view
        views.append(view + 0.05 * draw[5] * torch.randn(view.shape, generator=generator).to(view))
    return views
