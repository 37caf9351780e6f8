import numpy as np
import pytest
import torch

from diffcolor_scans import decoding, edges
from diffcolor_scans.edges import ChromaField, propagate
from diffcolor_scans.images import Scan, assemble


def two_halves(height: int, width: int, border: int) -> torch.Tensor:
    """L* of a dark left and a light right part, [1, h, w]."""
    lightness = torch.full((1, height, width), 30.0)
    lightness[..., border:] = 70.0
    return lightness


def test_a_blurred_colour_edge_is_moved_to_the_luminance_edge():
    lightness = two_halves(40, 60, 30)
    x = torch.arange(60.0)
    chroma = torch.zeros(2, 40, 60)
    chroma[0] = 30 * torch.tanh((x - 32) / 3)  # two pixels to the right of the border, and soft
    solved = propagate(chroma, lightness)
    assert float(solved[0, :, :30].max()) < -15
    assert float(solved[0, :, 30:].min()) > 15
    assert float(solved[1].abs().max()) < 1e-4
    assert float((solved - chroma)[:, :, [0, -1]].abs().max()) < 3


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (2, 2), (33, 47)])
def test_constant_values_stay_as_they_are(size):
    lightness = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.tensor([12.0, -7.0, 0.5]).view(3, 1, 1).expand(3, *size)
    torch.testing.assert_close(propagate(values, lightness), values.contiguous(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("solved_px", [10, 10**9])
@pytest.mark.parametrize("size", [(90, 120), (31, 400), (7, 5)])
def test_a_field_follows_the_scan_and_does_not_depend_on_its_strips(monkeypatch, size, solved_px):
    """Solved for at full size, and with interpolated coefficients."""
    monkeypatch.setattr(edges, "SOLVED_PX", solved_px * 100)
    height, width = size
    scan = Scan(two_halves(height, width, width // 2), None, 16, "L")
    chroma = torch.zeros(2, 9, 12)
    chroma[0, :, :6], chroma[0, :, 6:] = 25.0, -25.0
    field = ChromaField(chroma, scan.lightness)
    whole = field.rows(slice(0, height), scan.lightness)
    assert whole.shape == (2, height, width)
    assert float(whole[0, :, : width // 2 - 1].min()) > 15
    assert float(whole[0, :, width // 2 + 1 :].max()) < -15
    picture = assemble(scan, chroma, propagated=True)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 3 * width)
    assert np.array_equal(assemble(scan, chroma, propagated=True).pixels, picture.pixels)


def test_at_its_own_size_a_field_is_the_chroma():
    lightness, chroma = torch.rand(1, 20, 30) * 100, torch.randn(2, 20, 30)
    assert torch.equal(ChromaField(chroma, lightness).rows(slice(3, 9), lightness[:, 3:9]), chroma[:, 3:9])
