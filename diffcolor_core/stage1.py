"""Stage 1 of the paper, colorization with a generative colour prior: equations (1) to (3).

Symbols as in `docs/method.md`:

    x_gray   gray_input(lightness)     z, z_t, eps, t   latent, noised latent, noise, timestep
    c, c_k^- context prompt, anti-colour prompts        f_I, f_T   CLIP's image and text features
    x0^      decode(z_0), the one-step clean estimate   x_pri      `generated`, the sampled picture
    x^_pri   `chroma` beside the scan's lightness: x_pri after alignment, equation (4)

[P] marks what is the paper's, [A] its author's prototype's, [O] ours.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import fitted_copies, trainable_copy
from diffcolor_core.alignment import align_chroma
from diffcolor_core.config import Settings, Stage1Settings
from diffcolor_core.diffusion import clean_estimate, training_target
from diffcolor_core.models import Checkpoint, recomputing
from diffcolor_core.optimising import Photograph, mse_of_each, noised, optimise
from diffcolor_core.progress import Progress
from diffcolor_core.sampling import generate
from diffcolor_scans.images import gray_input


@dataclass(frozen=True)
class Texts:
    """Embeds of the texts: T(c) [N, tokens, width] and f_T(c) [N, d] of each photograph, f_T(c_k^-) [K, d]."""

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
    checkpoint: Checkpoint, photographs: Sequence[Photograph], settings: Settings, progress: Progress
) -> list[Prior]:
    """Fine-tune a copy of the UNet under CLIP's guidance, sample from the noised gray latent, align.

    photographs: one, or several of one shape whose prompts have equally many chunks, each with an adapter of its
    own. The checkpoint's own weights are not changed. Raises ValueError for several without adapters.
    """
    stage1 = settings.stage1
    prompts, generators = [p.context_prompt for p in photographs], [p.generator for p in photographs]

    # 1. z = s E(x_gray), and the embeddings of all texts
    z = torch.cat([checkpoint.encode(gray_input(p.lightness)[None].to(checkpoint.device)) for p in photographs])
    texts = Texts(
        checkpoint.encode_apart(prompts),
        checkpoint.clip_text_features(prompts),
        checkpoint.clip_text_features(stage1.anti_color_prompts),
    )

    # 2. N1 steps on equation (3)
    def flat(losses: dict[str, list[float]]) -> bool:
        recent = losses["contrastive"][-5:]
        return stage1.contrastive_weight > 0 and len(recent) == 5 and sum(recent) / 5 < stage1.stop_below

    trained = trainable_copy(checkpoint.unet, stage1.adapter_rank, generators)
    losses = optimise(
        [p for p in trained.parameters() if p.requires_grad],
        stage1.learning_rate,
        stage1.num_steps,
        lambda: prior_loss(checkpoint, trained, z, texts, settings, generators),
        ("contrastive", "diffusion"),
        generators,
        partial(progress, "stage 1"),
        flat,
    )

    # 3. z_T by forward diffusion of z [P] or of the colour prior's picture [O], K-step DDIM under c, x_pri = D(z)
    strength = settings.sampling.strength if stage1.strength is None else stage1.strength
    sampling = settings.sampling.model_copy(update={"strength": strength})
    priors = []
    for i, unet in enumerate(fitted_copies(trained, checkpoint.unet, stage1.adapter_rank, len(photographs))):
        lightness, prompt, generator = photographs[i]
        start = z[i : i + 1]
        if settings.color_prior:
            expected = checkpoint.prior_chroma(lightness, ["", prompt]).mean(dim=0, keepdim=True)
            start = checkpoint.encode_colored(lightness, settings.prior_gain * expected)
        context = texts.context[i : i + 1]
        generated = generate(checkpoint, unet, start, context, lightness, sampling, generator)[0]

        # 4. equation (4): x_pri aligned to x_gray
        chroma = align_chroma(checkpoint, lightness, generated, settings.alignment, generator)
        priors.append(Prior(chroma, generated, losses[i]))
    return priors


def prior_loss(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    texts: Texts,
    settings: Settings,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor]:
    """(3) L = w_con L_con + w_diff L_diff for `batch_size` draws of t and eps: L, L_con, L_diff of each photograph.

    z: [N, C, h/f, w/f]. The results are [N].
    """
    stage1, schedule = settings.stage1, checkpoint.scheduler
    num_timesteps = round(len(schedule.alphas_cumprod) * stage1.max_timestep)
    draws = noised(schedule, z, settings.batch_size, num_timesteps, generators)
    context = texts.context.repeat_interleave(settings.batch_size, dim=0)
    contrastive = torch.zeros(len(z))
    with recomputing(unet, checkpoint.vae_or_tiny(stage1.tiny_decoder)) if stage1.recompute else nullcontext():
        output = checkpoint.predict(unet, draws.z_t, draws.t, context)
        if stage1.contrastive_weight > 0:  # (1) L_con, on the one-step clean estimate
            z_0, _ = clean_estimate(schedule, draws.z_t, draws.t, output)
            each = zip(z_0.chunk(len(z)), texts.positive.split(1), generators, strict=True)
            contrastive = torch.stack([contrastive_of(checkpoint, *one, texts.negatives, stage1) for one in each])

    # (2) L_diff: distance to the drawn noise [P] or to the frozen model's own prediction [O]
    if stage1.diffusion_target == "noise":
        target = training_target(schedule, draws.z, draws.eps, draws.t)
    else:
        with torch.no_grad():
            target = checkpoint.predict(checkpoint.unet, draws.z_t, draws.t, context)
    diffusion = mse_of_each(output, target, len(z))
    loss = stage1.contrastive_weight * contrastive.to(diffusion) + stage1.diffusion_weight * diffusion
    return loss, contrastive.to(diffusion), diffusion


def contrastive_of(
    checkpoint: Checkpoint,
    z_0: Tensor,
    positive: Tensor,
    generator: torch.Generator,
    negatives: Tensor,
    stage1: Stage1Settings,
) -> Tensor:
    """(1) for one photograph's clean estimates z_0 [B, C, h/f, w/f]: CLIP on D(z_0), and on views of it [O].

    The gradient by z_0 is taken here and stands in for the decoder's and CLIP's graphs: of all photographs in a batch
    only one has these in memory at a time.
    """
    leaf = z_0.detach().requires_grad_()
    with torch.enable_grad():
        x_0 = checkpoint.decode(leaf, stage1.tiny_decoder)  # x0^, [B, 3, h, w]
        pictures = (x_0, *random_views(x_0, stage1.num_views, generator))
        features = torch.cat([checkpoint.clip_image_features(x) for x in pictures])  # [B * (1 + views), d]
        loss = contrastive_loss(features, positive, negatives, stage1.temperature)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + ((z_0 - z_0.detach()) * gradient).sum()


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
