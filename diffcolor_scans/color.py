"""Colour spaces in floating point: sRGB, CIE L*a*b*, the sRGB gamut.

Every function takes tensors with the channels at dimension -3 ([..., 3, H, W]) and keeps their dtype.
Everywhere in the core `lightness` is CIE L* [..., 1, H, W] in 0..100, and `chroma` is a*, b* [..., 2, H, W],
unbounded, about -110..110. sRGB is in [0, 1] here; the networks' pictures x are the same in [-1, 1].
Sources: IEC 61966-2-1 (sRGB), CIE 15:2018 (L*a*b*). The white is the sRGB matrix's own D65, so that neutral
pixels have a* = b* = 0 up to rounding.
"""

import math

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


def lightness_of(rgb: Tensor) -> Tensor:
    """The lightness of sRGB [..., 3, H, W]: [..., 1, H, W]."""
    weights = torch.tensor(_SRGB_TO_XYZ[1], dtype=rgb.dtype, device=rgb.device)
    y = torch.einsum("j,...jhw->...hw", weights, srgb_to_linear(rgb)).unsqueeze(-3)
    return 116 * _f(y) - 16


def lightness_to_gray(lightness: Tensor) -> Tensor:
    """The sRGB gray value in [0, 1] that has this lightness: [..., 1, H, W]."""
    return linear_to_srgb(_f_inverse((lightness + 16) / 116))


def x_to_lab(x: Tensor) -> Tensor:
    """L*a*b* of a network's picture [..., 3, H, W] in [-1, 1]. What lies outside is clipped first."""
    return srgb_to_lab((x.clamp(-1, 1) + 1) / 2)


def fit_gamut(lab: Tensor, *, iterations: int = 14) -> Tensor:
    """Bring every colour inside sRGB by reducing its chroma. Lightness and hue stay as they are.

    Bisection finds the largest chroma that fits: 14 halvings leave an error under 0.01 chroma units.
    """
    outside = ~_in_gamut(lab_to_linear(lab))  # [..., H, W]
    if not bool(outside.any()):
        return lab
    unscaled = lab.movedim(-3, 0)[:, outside].unsqueeze(1)  # only the pixels outside: [3, 1, N]
    scaled, scale, halving = unscaled.clone(), torch.zeros_like(unscaled[:1]), 1.0
    for _ in range(iterations):
        halving /= 2
        scaled[1:] = unscaled[1:] * (scale + halving)
        scale.add_(_in_gamut(lab_to_linear(scaled)), alpha=halving)
    fitted = lab.clone()
    fitted.movedim(-3, 0)[1:, outside] = (unscaled[1:] * scale)[:, 0]
    return fitted


def _in_gamut(linear: Tensor) -> Tensor:
    slack = 1e-6
    return (linear.amin(dim=-3) >= -slack) & (linear.amax(dim=-3) <= 1 + slack)


def lock_luminance(chroma: Tensor, lightness: Tensor) -> Tensor:
    """The luminance lock [O]: sRGB [..., 3, H, W] in [0, 1] with exactly this lightness.

    Its chroma is `chroma` wherever sRGB can show that, and the nearest that it can show elsewhere (`fit_gamut`).
    """
    return lab_to_srgb(fit_gamut(torch.cat((lightness, chroma), dim=-3))).clamp(0, 1)


def max_chroma(lightness: float, hue_degrees: float) -> float:
    """The largest chroma C*ab that sRGB can show at one lightness and hue (degrees)."""
    hue = math.radians(hue_degrees)
    far = torch.tensor([lightness, 200 * math.cos(hue), 200 * math.sin(hue)], dtype=torch.float64)
    return float(fit_gamut(far.view(3, 1, 1), iterations=24)[1:].norm())
