"""Spatial alignment, equation (4): move generated colour to where the scan has the same things.

Features phi are activations of the frozen UNet at one low-noise timestep (DIFT, Tang et al. 2023),
of the *luminance* of both pictures. The search stays in a small window [O]: the pictures are nearly
registered, and the full matrix is a gigabyte at 512 x 512. The weights are found per feature cell
and applied to full-resolution chroma shifted by whole cells [O], so that chroma keeps its detail.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.color import lightness
from diffcolor_core.config import AlignmentSettings
from diffcolor_core.diffusion import add_noise
from diffcolor_core.images import gray_input
from diffcolor_core.models import Checkpoint


@torch.no_grad()
def align_chroma(
    checkpoint: Checkpoint,
    x_gray: Tensor,
    x_generated: Tensor,
    chroma: Tensor,
    settings: AlignmentSettings,
    generator: torch.Generator,
) -> Tensor:
    """Warp `chroma` [2, h, w] of x_generated onto x_gray (both [3, h, w] in [-1, 1]): [2, h, w]."""
    if not settings.enabled:
        return chroma
    gray_of_generated = gray_input(lightness((x_generated.clamp(-1, 1) + 1) / 2))
    both = torch.stack((x_gray, gray_of_generated))
    phi = (
        vae_features(checkpoint, both)
        if settings.features == "vae"
        else unet_features(checkpoint, both, settings, generator)
    )
    weights = window_weights(phi[0], phi[1], settings)
    return shift_by_weights(chroma, weights, settings.radius)


def unet_features(checkpoint: Checkpoint, x: Tensor, settings: AlignmentSettings, generator: torch.Generator) -> Tensor:
    """phi: the activations of one up block for pictures x [B, 3, h, w], each cell of unit length: [B, D, hf, wf]."""
    z = checkpoint.encode(x.to(checkpoint.device))
    eps = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)  # the same noise for both
    t = torch.full((len(z),), settings.timestep, device=z.device)
    caught: list[Tensor] = []
    blocks = checkpoint.unet.up_blocks
    if settings.up_block >= len(blocks):
        raise ValueError(f"alignment.up_block is {settings.up_block}, but this UNet has {len(blocks)} up blocks")
    hook = blocks[settings.up_block].register_forward_hook(lambda _module, _args, output: caught.append(output))
    try:
        embeds = checkpoint.encode_prompts([""]).expand(len(z), -1, -1)
        checkpoint.denoise(checkpoint.unet, add_noise(checkpoint.scheduler, z, eps, t), t, embeds)
    finally:
        hook.remove()
    return F.normalize(caught[0].float(), dim=1)


def vae_features(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    """phi: the last activations of the VAE's encoder, each cell of unit length: [B, D, h/f, w/f]."""
    caught: list[Tensor] = []
    hook = checkpoint.vae.encoder.mid_block.register_forward_hook(lambda _module, _args, output: caught.append(output))
    try:
        checkpoint.encode(x.to(checkpoint.device))
    finally:
        hook.remove()
    return F.normalize(caught[0].float(), dim=1)


def window_weights(phi: Tensor, phi_generated: Tensor, settings: AlignmentSettings) -> Tensor:
    """softmax_j(<phi_i, phi_j> / tau_a) over the window of each cell: [(2r+1)^2, hf, wf].

    phi: [D, hf, wf], unit length. Offsets run row by row, as in `shift_by_weights`. A cell whose
    best match is weaker than `min_similarity` keeps its own position.
    """
    r = settings.radius
    hf, wf = phi.shape[-2:]
    padded = F.pad(phi_generated, (r, r, r, r))
    outside = F.pad(torch.zeros_like(phi[0]), (r, r, r, r), value=-torch.inf)  # beyond the border is no match
    similarity = torch.stack(
        [
            (phi * padded[:, dy : dy + hf, dx : dx + wf]).sum(dim=0) + outside[dy : dy + hf, dx : dx + wf]
            for dy in range(2 * r + 1)
            for dx in range(2 * r + 1)
        ]
    )
    weights = torch.softmax(similarity / settings.temperature, dim=0)
    stay = torch.zeros_like(weights)
    stay[len(stay) // 2] = 1
    return torch.where(similarity.amax(dim=0) >= settings.min_similarity, weights, stay)


def shift_by_weights(chroma: Tensor, weights: Tensor, radius: int) -> Tensor:
    """Sum over the window's offsets of weight x chroma shifted by that many cells.

    chroma: [2, h, w]; weights: [(2r+1)^2, hf, wf], upsampled to [h, w] here.
    """
    h, w = chroma.shape[-2:]
    cell_y, cell_x = round(h / weights.shape[-2]), round(w / weights.shape[-1])
    fine = F.interpolate(weights[None], size=(h, w), mode="bilinear", align_corners=False)[0].to(chroma)
    fine = fine / fine.sum(dim=0)
    pad_y, pad_x = radius * cell_y, radius * cell_x
    padded = F.pad(chroma[None], (pad_x, pad_x, pad_y, pad_y), mode="replicate")[0]
    offsets = [(dy * cell_y, dx * cell_x) for dy in range(2 * radius + 1) for dx in range(2 * radius + 1)]
    shifted = [weight * padded[:, y : y + h, x : x + w] for weight, (y, x) in zip(fine, offsets, strict=True)]
    return torch.stack(shifted).sum(dim=0)
