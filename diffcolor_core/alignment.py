"""Spatial alignment, equation (4): move generated colour to where the scan has the same things.

Symbols as in `docs/method.md`: phi the features of a picture, i a cell of the scan, j one of the generated
picture, tau_a the temperature. The features are activations of the frozen UNet at one low noise level (DIFT,
Tang et al. 2023), for the luminance of both pictures alone. Two departures from the paper [O]: the search stays
in a small window, as the pictures nearly match and the full matrix takes a gigabyte at 512 x 512; and the
weights, found per feature cell, move the chroma at its own resolution by whole cells, so that it keeps its detail.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.config import AlignmentSettings
from diffcolor_core.diffusion import add_noise
from diffcolor_core.models import Checkpoint
from diffcolor_scans.edges import propagate
from diffcolor_scans.images import gray_input


@torch.no_grad()
def align_chroma(
    checkpoint: Checkpoint,
    lightness: Tensor,
    generated: Tensor,
    settings: AlignmentSettings,
    generator: torch.Generator,
) -> Tensor:
    """The chroma of a generated picture, moved onto the scan's structure: [2, h, w].

    lightness: [1, h, w], the scan's. generated: [3, h, w], L*a*b*. Raises ValueError for an up block that the
    UNet does not have.
    """
    chroma = generated[1:]
    if settings.enabled:
        both = torch.stack((gray_input(lightness), gray_input(generated[:1])))
        phi, phi_generated = unet_features(checkpoint, both, settings, generator)
        chroma = shift_by_weights(chroma, window_weights(phi, phi_generated, settings), settings.radius)
    return propagate(chroma, lightness) if settings.propagate else chroma


def unet_features(checkpoint: Checkpoint, x: Tensor, settings: AlignmentSettings, generator: torch.Generator) -> Tensor:
    """phi: the activations of one up block for pictures x [B, 3, h, w], each cell of unit length: [B, D, hf, wf]."""
    z = checkpoint.encode(x.to(checkpoint.device))
    eps = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)  # the same noise for all
    t = torch.full((len(z),), settings.timestep, device=z.device)
    embeds = checkpoint.encode_prompts([""]).expand(len(z), -1, -1)
    phi = checkpoint.features(add_noise(checkpoint.scheduler, z, eps, t), t, embeds, settings.up_block)
    return F.normalize(phi.float(), dim=1)


def window_weights(phi: Tensor, phi_generated: Tensor, settings: AlignmentSettings) -> Tensor:
    """(4) softmax over j of <phi_i, phi_j> / tau_a, j in the window around i: [(2r+1)^2, hf, wf].

    phi, phi_generated: [D, hf, wf], each cell of unit length. The window's offsets run row by row, as in
    `shift_by_weights`. A cell whose best match is weaker than `min_similarity` keeps its own position.
    """
    r = settings.radius
    hf, wf = phi.shape[-2:]
    padded = F.pad(phi_generated, (r, r, r, r))
    outside = F.pad(torch.zeros_like(phi[0]), (r, r, r, r), value=-torch.inf)  # nothing matches beyond the border
    windows = [(slice(dy, dy + hf), slice(dx, dx + wf)) for dy in range(2 * r + 1) for dx in range(2 * r + 1)]
    similarity = torch.stack([(phi * padded[:, y, x]).sum(dim=0) + outside[y, x] for y, x in windows])
    weights = torch.softmax(similarity / settings.temperature, dim=0)
    stay = torch.zeros_like(weights)
    stay[len(stay) // 2] = 1
    return torch.where(similarity.amax(dim=0) >= settings.min_similarity, weights, stay)


def shift_by_weights(chroma: Tensor, weights: Tensor, radius: int) -> Tensor:
    """Sum over the window's offsets of weight x chroma shifted by that many cells: [2, h, w].

    chroma: [2, h, w]. weights: [(2r+1)^2, hf, wf], upsampled to [h, w] here.
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
