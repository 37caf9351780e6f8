"""Assembly in its plainest form: the reference for the bytes and the time of `diffcolor_scans.images.assemble`.

Every pixel is bisected, inside the gamut or not, and every value is gathered for every pixel.
"""

import numpy as np
import torch
from torch import Tensor

from diffcolor_scans.color import lab_to_linear, lab_to_srgb
from diffcolor_scans.images import Scan, resize

STRIP_PIXELS = 2_000_000


def plain_fit_gamut(lab: Tensor, iterations: int = 14) -> Tensor:
    """What `color.fit_gamut` gives, by bisecting all pixels."""
    lightness, chroma = lab[..., :1, :, :], lab[..., 1:, :, :]

    def fits(scale: Tensor) -> Tensor:
        linear = lab_to_linear(torch.cat((lightness, chroma * scale), dim=-3))
        return ((linear >= -1e-6) & (linear <= 1 + 1e-6)).all(dim=-3, keepdim=True)

    low, high = torch.zeros_like(lightness), torch.ones_like(lightness)
    inside = fits(high)
    for _ in range(iterations):
        middle = (low + high) / 2
        fit = fits(middle)
        low, high = torch.where(fit, middle, low), torch.where(fit, high, middle)
    return torch.cat((lightness, chroma * torch.where(inside, 1.0, low)), dim=-3)


def plain_upsample(values: Tensor, small_guide: Tensor, guide: Tensor, rows: slice, height_px: int) -> Tensor:
    """What `images.upsample_guided` gives where the sizes differ."""
    h, w = values.shape[-2:]
    width = guide.shape[-1]
    y = (torch.arange(rows.start, rows.stop, dtype=values.dtype) + 0.5) * h / height_px - 0.5
    x = (torch.arange(width, dtype=values.dtype) + 0.5) * w / width - 0.5
    total, weight = torch.zeros((len(values), *guide.shape[-2:]), dtype=values.dtype), torch.zeros_like(guide)
    for dy in range(-1, 3):
        yi = y.floor().long() + dy
        for dx in range(-1, 3):
            xi = x.floor().long() + dx
            near = torch.exp(-((y - yi)[:, None] ** 2 + (x - xi)[None] ** 2) / 1.0)
            rows_in, columns_in = yi.clamp(0, h - 1), xi.clamp(0, w - 1)
            difference = small_guide[:, rows_in][:, :, columns_in] - guide
            like = torch.exp(-(difference**2) / (2 * 5.0**2)) + 1e-4
            total += near * like * values[:, rows_in][:, :, columns_in]
            weight += near * like
    return total / weight


def plain_assemble(scan: Scan, chroma: Tensor) -> np.ndarray:
    """The pixels [H, W, 3] that `images.assemble` gives for a scan without alpha."""
    maximum = 65535 if scan.bit_depth == 16 else 255
    small_guide = resize(scan.lightness, chroma.shape[-2:])
    num_rows = max(1, STRIP_PIXELS // scan.width_px)
    done = []
    for start in range(0, scan.height_px, num_rows):
        rows = slice(start, min(start + num_rows, scan.height_px))
        lightness = scan.lightness[:, rows]
        full = plain_upsample(chroma, small_guide, lightness, rows, scan.height_px)
        lab = torch.cat((lightness.double(), full.double()))
        rgb = (lab_to_srgb(plain_fit_gamut(lab)).clamp(0, 1) * maximum).round()
        done.append(rgb.permute(1, 2, 0).numpy().astype(np.uint16 if scan.bit_depth == 16 else np.uint8))
    return np.concatenate(done)
