import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from skimage import color as skimage_color

from diffcolor_scans import color
from support.plain_assembly import plain_fit_gamut

unit = st.floats(0, 1)


def pixel(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def test_lab_agrees_with_scikit_image():
    rgb = torch.rand(3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = color.srgb_to_lab(rgb).permute(1, 2, 0).numpy()
    theirs = skimage_color.rgb2lab(rgb.permute(1, 2, 0).numpy())
    # scikit-image rounds the matrix and the white point to four digits
    np.testing.assert_allclose(ours, theirs, atol=0.02)


BRANCHES_MEET = 1e-7  # sRGB's two branches meet at 0.04045 up to 3e-8 only


@given(unit, unit, unit)
def test_lab_and_back(r, g, b):
    rgb = pixel(r, g, b)
    torch.testing.assert_close(color.lab_to_srgb(color.srgb_to_lab(rgb)), rgb, atol=BRANCHES_MEET, rtol=0)


@given(unit)
@example(0.04045)
def test_neutral_has_no_chroma_and_its_own_lightness(value):
    lab = color.srgb_to_lab(pixel(value, value, value))
    assert abs(float(lab[1])) < 1e-9
    assert abs(float(lab[2])) < 1e-9
    gray = color.lightness_to_gray(color.lightness_of(pixel(value, value, value)))
    assert float(gray) == pytest.approx(value, abs=BRANCHES_MEET)


@settings(max_examples=200)
@given(st.floats(0, 100), st.floats(-150, 150), st.floats(-150, 150))
def test_gamut_costs_chroma_only(lightness, a, b):
    lab = pixel(lightness, a, b)
    fitted = color.fit_gamut(lab)
    assert float(fitted[0]) == lightness
    assert float(fitted[1]) * b == pytest.approx(float(fitted[2]) * a, abs=1e-6)  # the same hue
    rgb = color.lab_to_srgb(fitted)
    assert float(rgb.min()) > -1e-4
    assert float(rgb.max()) < 1 + 1e-4
    if float(color.lab_to_linear(lab).min()) > 1e-5 and float(color.lab_to_linear(lab).max()) < 1 - 1e-5:
        assert torch.equal(fitted, lab)


def test_gamut_keeps_as_much_chroma_as_fits():
    fitted = color.fit_gamut(pixel(20, 0, 80), iterations=24)  # yellow at L* 20 is outside sRGB
    assert 15 < float(fitted[2]) < 40
    assert float(color.lab_to_linear(fitted * torch.tensor([1, 1.02, 1.02]).view(3, 1, 1)).min()) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 5.0, 40.0, 150.0, 1e6])
@pytest.mark.parametrize("shape", [(3, 61, 47), (2, 3, 17, 23)])
def test_gamut_is_bitwise_that_of_bisecting_every_pixel(shape, spread, dtype):
    generator = torch.Generator().manual_seed(2)
    lab = torch.randn(shape, dtype=dtype, generator=generator) * spread
    lab[..., 0, :, :] = torch.rand(shape[:-3] + shape[-2:], dtype=dtype, generator=generator) * 100
    lab[..., 0, :2, :3], lab[..., 0, 2:4, :3] = 0.0, 100.0
    lab[..., 1, 5, 5] = torch.nan
    before = lab.clone()
    fitted = color.fit_gamut(lab)
    assert fitted.numpy().tobytes() == plain_fit_gamut(lab).numpy().tobytes()
    assert lab.numpy().tobytes() == before.numpy().tobytes()  # the argument is left alone
    moved = float((fitted != before).any(dim=-3).float().mean())
    assert (moved > 0.2) == (spread > 5)


def test_luminance_lock_is_exact_in_floating_point():
    generator = torch.Generator().manual_seed(1)
    lightness = torch.rand(1, 32, 32, dtype=torch.float64, generator=generator) * 100
    chroma = torch.randn(2, 32, 32, dtype=torch.float64, generator=generator) * 60
    locked = color.lock_luminance(chroma, lightness)
    assert float((color.lightness_of(locked) - lightness).abs().max()) < 1e-3


def test_a_networks_picture_is_clipped_before_its_colours_are_read():
    x = torch.tensor([-1.0, 1.5, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(color.x_to_lab(x), color.srgb_to_lab(torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1)))


@pytest.mark.parametrize("rgb", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_the_corners_of_srgb_have_the_largest_chroma(rgb):
    lightness, a, b = color.srgb_to_lab(pixel(*rgb)).flatten().tolist()
    hue = math.degrees(math.atan2(b, a))
    assert color.max_chroma(lightness, hue) == pytest.approx(math.hypot(a, b), abs=0.1)
    assert color.max_chroma(0.0, hue) == pytest.approx(0, abs=0.1)
