"""Pictures as the study handles them: from tensors, to tensors, to L*a*b*."""

import torch
from torch import Tensor

from diffcolor_scans.color import srgb_to_lab
from diffcolor_scans.images import Picture


def picture_of(rgb: Tensor) -> Picture:
    """An 8-bit picture of sRGB [3, H, W] in [0, 1]; values outside are clipped."""
    return Picture((rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def rgb_of(picture: Picture) -> Tensor:
    """The sRGB of an 8-bit picture: [3, H, W] float64 in [0, 1], without alpha."""
    return torch.from_numpy(picture.pixels[..., :3]).permute(2, 0, 1).double() / 255


def lab_of(picture: Picture) -> Tensor:
    """The L*a*b* of an 8-bit picture: [3, H, W] float64."""
    return srgb_to_lab(rgb_of(picture))
