import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from diffcolor_scans import decoding, images, metrics
from diffcolor_scans.images import Picture, Scan, assemble, read_scan
from support.plain_assembly import plain_assemble


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(np.float32, (1, 21, 34), elements=st.floats(0, 100, width=32)),
    st.sampled_from([8, 16]),
    st.integers(0, 2**31),
)
def test_the_saved_file_has_the_scans_luminance(l_star, bit_depth, seed):
    scan = Scan(torch.from_numpy(l_star), None, bit_depth, "L")
    chroma = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(seed)) * 50
    picture = assemble(scan, chroma)
    again = read_scan(picture.encode_png())
    assert again.bit_depth == bit_depth
    delta = (again.lightness - scan.lightness).abs()
    mean, p99 = metrics.abs_delta_l(scan, picture)
    assert p99 <= (0.5 if bit_depth == 8 else 0.02)
    assert float(np.percentile(delta.numpy(), 99)) == pytest.approx(p99, abs=1e-3)
    assert float(delta.mean()) == pytest.approx(mean, abs=1e-3)


def test_colour_stops_at_the_scans_own_edge():
    """8 x 8 chroma, its colour edge beside the scan's: at 128 px the colour follows the scan."""
    l_star = torch.full((1, 128, 128), 30.0)
    l_star[..., 56:] = 75.0
    chroma = torch.zeros(2, 8, 8)
    chroma[0, :, :4], chroma[0, :, 4:] = 40.0, -40.0  # the edge between columns 63 and 64
    guided = images.upsample_guided(chroma, images.resize(l_star, (8, 8)), l_star, slice(0, 128), 128)
    assert float(guided[0, :, :50].mean()) > 35
    assert float(guided[0, :, 72:].mean()) < -35


def test_at_working_size_upsampling_is_the_identity():
    chroma, l_star = torch.randn(2, 9, 13), torch.rand(1, 9, 13) * 100
    assert torch.equal(images.upsample_guided(chroma, l_star, l_star, slice(2, 5), 9), chroma[:, 2:5])


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("spread", [15.0, 200.0])
@pytest.mark.parametrize(("size", "working_size"), [((310, 473), (40, 56)), ((37, 41), (64, 64)), ((200, 90), (16, 8))])
@pytest.mark.parametrize("strip_pixels", [1500, 64_000])
def test_assembly_is_bitwise_the_plain_one(monkeypatch, strip_pixels, size, working_size, spread, bit_depth):
    monkeypatch.setattr(decoding, "STRIP_PIXELS", strip_pixels)
    generator = torch.Generator().manual_seed(0)
    scan = Scan(torch.rand(1, *size, generator=generator) * 100, None, bit_depth, "L")
    chroma = torch.randn(2, *working_size, generator=generator) * spread
    assert np.array_equal(assemble(scan, chroma).pixels, plain_assemble(scan, chroma))


def test_pictures_are_saved_as_png_only(tmp_path):
    with pytest.raises(ValueError, match="ending in .png"):
        Picture(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a.jpg")


def test_colorfulness_of_known_pictures():
    """By hand: a gray picture has none; half red, half blue has the value of the formula."""
    assert metrics.colorfulness(Picture(np.full((4, 4, 3), 90, np.uint8))) == 0
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, :, 0] = pixels[1, :, 2] = 255
    # rg: 255, 0; yb: 127.5, -255
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, -63.75)
    assert metrics.colorfulness(Picture(pixels)) == pytest.approx(expected)
    deep = Picture(pixels.astype(np.uint16) * 257)
    assert metrics.colorfulness(deep) == pytest.approx(expected)
