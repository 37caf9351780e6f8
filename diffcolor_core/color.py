"""Colour spaces in floating point: sRGB, CIE L*a*b*, the sRGB gamut.

Every function takes torch tensors with the three channels at dimension -3 ([..., 3, H, W]) and
keeps their dtype. sRGB is in [0, 1]; L* in [0, 100]; a* and b* unbounded, about [-110, 110].
Sources: IEC 61966-2-1 (sRGB), CIE 15:2018 (L*a*b*), both with the D65 white of the sRGB matrix
itself, so that a neutral pixel has a* = b* = 0 to rounding.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

_SRGB_TO_XYZ = (
    (0.4123907992659595, 0.357584339383878, 0.1804807884018343),
    (0.21263900587151036, 0.715168678767756, 0.07219231536073371),
    (0.019330818715591835, 0.11919477979462598, 0.9505321522496607),
)
_DELTA = 6 / 29  # the knee of CIE's f(t)


def _matrix_to_white_scaled_xyz(like: Tensor) -> Tensor:
    matrix = torch.tensor(_SRGB_TO_XYZ, dtype=torch.float64)
    return (matrix / matrix.sum(dim=1, keepdim=True)).to(like)


def srgb_to_linear(rgb: Tensor) -> Tensor:
    """Undo the sRGB transfer curve. Values outside [0, 1] follow the linear toe or the power law."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Apply the sRGB transfer curve. Negative values stay on the linear toe."""
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _f(t: Tensor) -> Tensor:
    return torch.where(t > _DELTA**3, t.clamp(min=_DELTA**3) ** (1 / 3), t / (3 * _DELTA**2) + 4 / 29)


def _f_inverse(t: Tensor) -> Tensor:
    return torch.where(t > _DELTA, t**3, 3 * _DELTA**2 * (t - 4 / 29))


def srgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] to L*a*b*, both [..., 3, H, W]."""
    linear = srgb_to_linear(rgb)
    x, y, z = _f(torch.einsum("ij,...jhw->...ihw", _matrix_to_white_scaled_xyz(rgb), linear)).unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-3)


def lab_to_linear(lab: Tensor) -> Tensor:
    """L*a*b* to *linear* sRGB, unclipped: out-of-gamut colours leave [0, 1]."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    xyz = _f_inverse(torch.stack((y + a / 500, y, y - b / 200), dim=-3))
    inverse = torch.linalg.inv(_matrix_to_white_scaled_xyz(lab).double()).to(lab)
    return torch.einsum("ij,...jhw->...ihw", inverse, xyz)


def lab_to_srgb(lab: Tensor) -> Tensor:
    """L*a*b* to sRGB, unclipped."""
    return linear_to_srgb(lab_to_linear(lab))


def lightness(rgb: Tensor) -> Tensor:
    """CIE L* in [0, 100] of sRGB [..., 3, H, W]: [..., 1, H, W]."""
    weights = torch.tensor(_SRGB_TO_XYZ[1], dtype=rgb.dtype, device=rgb.device)
    y = torch.einsum("j,...jhw->...hw", weights, srgb_to_linear(rgb)).unsqueeze(-3)
    return 116 * _f(y) - 16


def lightness_to_gray(lightness_star: Tensor) -> Tensor:
    """L* [..., 1, H, W] to the sRGB gray value with that L*, in [0, 1]."""
    return linear_to_srgb(_f_inverse((lightness_star + 16) / 116))


def fit_gamut(lab: Tensor, *, iterations: int = 14) -> Tensor:
    """Bring every colour inside sRGB by losing chroma at constant L* and hue.

    L* itself is never changed (`method.md`, luminance lock). The largest chroma that fits is found
    by bisection: 14 halvings leave an error under 0.01 chroma units.
    """
    slack = 1e-6
    neutral = lab[..., :1, :, :]
    chroma = lab[..., 1:, :, :]

    def fits(scale: Tensor) -> Tensor:
        linear = lab_to_linear(torch.cat((neutral, chroma * scale), dim=-3))
        return ((linear >= -slack) & (linear <= 1 + slack)).all(dim=-3, keepdim=True)

    low = torch.zeros_like(neutral)
    high = torch.ones_like(neutral)
    inside = fits(high)
    if bool(inside.all()):
        return lab
    for _ in range(iterations):
        middle = (low + high) / 2
        fit = fits(middle)
        low, high = torch.where(fit, middle, low), torch.where(fit, high, middle)
    return torch.cat((neutral, chroma * torch.where(inside, 1.0, low)), dim=-3)


def lock_luminance(chroma: Tensor, lightness_star: Tensor) -> Tensor:
    """Join a*, b* [..., 2, H, W] to the scan's own L* [..., 1, H, W] and return sRGB in [0, 1]."""
    return lab_to_srgb(fit_gamut(torch.cat((lightness_star, chroma), dim=-3))).clamp(0, 1)


@lru_cache(maxsize=1024)  # the same region is asked about several times on the way to a result
def max_chroma(lightness_star: float, hue_degrees: float) -> float:
    """The largest chroma C*ab that sRGB can show at one L* and hue (degrees)."""
    hue = math.radians(hue_degrees)
    far = torch.tensor([lightness_star, 200 * math.cos(hue), 200 * math.sin(hue)], dtype=torch.float64)
    return float(fit_gamut(far.view(3, 1, 1), iterations=24)[1:].norm())
