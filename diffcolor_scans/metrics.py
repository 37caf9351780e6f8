"""Measures of a finished picture."""

import numpy as np
import torch

from diffcolor_scans.color import lightness_of
from diffcolor_scans.decoding import strips
from diffcolor_scans.images import Picture, Scan


def colorfulness(picture: Picture) -> float:
    """Colourfulness after Hasler and Suesstrunk (2003), on the 0..255 scale: 0 is gray, 109 extremely colourful."""
    scale = 257.0 if picture.pixels.dtype == np.uint16 else 1.0
    height, width = picture.pixels.shape[:2]
    sums, squares = np.zeros(2), np.zeros(2)
    for rows in strips(height, width):
        r, g, b = np.moveaxis(picture.pixels[rows, :, :3].astype(np.float64) / scale, -1, 0)
        for i, opponent in enumerate((r - g, (r + g) / 2 - b)):
            sums[i] += opponent.sum()
            squares[i] += (opponent**2).sum()
    mean = sums / (height * width)
    variance = np.clip(squares / (height * width) - mean**2, 0, None)
    return float(np.sqrt(variance.sum()) + 0.3 * np.sqrt((mean**2).sum()))


def abs_delta_l(scan: Scan, picture: Picture) -> tuple[float, float]:
    """Mean and 99th percentile of |L*(scan) - L*(picture)| over all pixels, as a lossless file would hold them."""
    maximum = 65535.0 if picture.pixels.dtype == np.uint16 else 255.0
    difference = np.empty((scan.height_px, scan.width_px), np.float32)
    for rows in strips(scan.height_px, scan.width_px):
        rgb = torch.from_numpy(picture.pixels[rows, :, :3].astype(np.float64) / maximum).permute(2, 0, 1)
        difference[rows] = (lightness_of(rgb)[0] - scan.lightness[0, rows].double()).abs().numpy()
    return float(difference.mean(dtype=np.float64)), float(np.percentile(difference, 99))
