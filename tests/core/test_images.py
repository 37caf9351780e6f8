import contextlib
import csv
import io

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from diffcolor_core import images, metrics
from diffcolor_core.color import lightness
from diffcolor_core.images import Picture, Scan, UnreadableImageError, assemble, read_scan


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def tiff(samples: np.ndarray, **kwargs) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **kwargs)
    return buffer.getvalue()


def l_star_of(samples: np.ndarray, maximum: int) -> torch.Tensor:
    rgb = samples[..., None].repeat(3, -1) if samples.ndim == 2 else samples
    return lightness(torch.from_numpy(rgb.astype(np.float64) / maximum).permute(2, 0, 1)).float()


RAMP8 = np.linspace(0, 255, 48 * 64).reshape(48, 64).round().astype(np.uint8)
RAMP16 = np.linspace(0, 65535, 48 * 64).reshape(48, 64).round().astype(np.uint16)
TONED16 = np.stack((RAMP16, RAMP16 // 2 + 9000, RAMP16 // 3), -1)


@pytest.mark.parametrize(
    ("data", "samples", "maximum"),
    [
        (encoded(Image.fromarray(RAMP8)), RAMP8, 255),
        (encoded(Image.fromarray(RAMP8), "TIFF"), RAMP8, 255),
        (encoded(Image.fromarray(RAMP16)), RAMP16, 65535),
        (encoded(Image.fromarray(RAMP16), "TIFF"), RAMP16, 65535),
        (tiff(RAMP16, photometric="miniswhite"), 65535 - RAMP16, 65535),
        (tiff(TONED16, photometric="rgb"), TONED16, 65535),
        (tiff(np.moveaxis(TONED16, -1, 0).copy(), photometric="rgb", planarconfig="separate"), TONED16, 65535),
        (tiff(TONED16, photometric="rgb", compression="zlib"), TONED16, 65535),
        (imagecodecs.png_encode(TONED16), TONED16, 65535),
        (tiff((RAMP16 / 65535).astype(np.float32)), RAMP16, 65535),
    ],
    ids=[
        "png8",
        "tiff8",
        "png16",
        "tiff16",
        "tiff16-white-is-zero",
        "tiff16-rgb",
        "tiff16-planar",
        "tiff16-zip",
        "png16-rgb",
        "tiff-float",
    ],
)
def test_lightness_is_that_of_the_samples_at_full_depth(data, samples, maximum):
    scan = read_scan(data)
    assert scan.bit_depth == (16 if maximum == 65535 else 8)
    torch.testing.assert_close(scan.lightness, l_star_of(samples, maximum), atol=2e-3, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "PNG16", "TIFF16-RGB"])
def test_pictures_come_upright(orientation, kind):
    upright = np.zeros((40, 64), np.uint8)
    upright[:20, :32] = 250  # light top left corner
    upright[:20, 32:] = 120
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    turned = np.ascontiguousarray(turned)
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "TIFF16-RGB":
        deep = turned.astype(np.uint16)[..., None].repeat(3, -1) * 257
        data = tiff(deep, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    elif kind == "PNG16":
        data = encoded(Image.fromarray(turned.astype(np.uint16) * 257), "PNG", exif=exif)
    else:
        data = encoded(Image.fromarray(turned), kind, exif=exif)
    scan = read_scan(data)
    assert (scan.height_px, scan.width_px) == (40, 64)
    assert float((scan.lightness - l_star_of(upright, 255)).abs().median()) < 0.5


def test_alpha_is_kept():
    alpha = RAMP8[::-1].copy()
    for image in (
        Image.fromarray(np.stack((RAMP8, alpha), -1)),
        Image.fromarray(np.stack((RAMP8,) * 3 + (alpha,), -1)),
    ):
        scan = read_scan(encoded(image))
        np.testing.assert_array_equal(scan.alpha, alpha)
        picture = assemble(scan, torch.zeros(2, 8, 8))
        np.testing.assert_array_equal(picture.pixels[..., 3], alpha)
    deep = np.concatenate((TONED16, RAMP16[..., None]), -1)
    scan = read_scan(imagecodecs.png_encode(deep))
    assert scan.bit_depth == 16
    np.testing.assert_array_equal(scan.alpha, RAMP16)


def test_a_palette_picture_and_a_bilevel_one():
    palette = Image.fromarray(RAMP8).convert("P")
    torch.testing.assert_close(read_scan(encoded(palette)).lightness, l_star_of(RAMP8, 255), atol=0.5, rtol=0)
    bilevel = read_scan(encoded(Image.fromarray(RAMP8).convert("1"), "TIFF"))
    assert set(bilevel.lightness.unique().tolist()) == {0.0, 100.0}


def test_a_colour_profile_is_converted_through():
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    assert linear  # littleCMS is there
    wide = ImageCms.createProfile("sRGB")
    data = encoded(Image.fromarray(TONED8), "PNG", icc_profile=ImageCms.ImageCmsProfile(wide).tobytes())
    torch.testing.assert_close(read_scan(data).lightness, l_star_of(TONED8, 255), atol=0.6, rtol=0)
    damaged = encoded(Image.fromarray(TONED8), "PNG", icc_profile=b"no profile at all")
    torch.testing.assert_close(read_scan(damaged).lightness, l_star_of(TONED8, 255), atol=1e-3, rtol=0)


TONED8 = (TONED16 >> 8).astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (encoded(Image.fromarray(RAMP8))[:-40], "truncated|Truncated|broken"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (encoded(Image.new("L", (20000, 9000)), "PNG", compress_level=1), "exceed"),
    ],
)
def test_what_is_no_picture_says_why(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        read_scan(data)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_damage_anywhere_is_an_unreadable_image_or_a_picture(noise, place):
    whole = encoded(Image.fromarray(RAMP8), "TIFF")
    data = whole[:place] + noise + whole[place + len(noise) :]
    with contextlib.suppress(UnreadableImageError):
        assert read_scan(data).lightness.isfinite().all()


def test_hostile_files_agree_with_their_index(shared_data):
    wrong = []
    with (shared_data / "hostile" / "index.csv").open() as file:
        for row in csv.DictReader(file):
            try:
                read_scan(shared_data / "hostile" / row["file"])
                found = "decodes"
            except UnreadableImageError:
                found = "must be rejected"
            if found != row["expected"]:
                wrong.append((row["file"], row["expected"], found))
    assert wrong == []


# ------------------------------------------------------------------ out


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


def test_strips_do_not_show(monkeypatch):
    scan = Scan(torch.rand(1, 60, 50, generator=torch.Generator().manual_seed(0)) * 100, None, 16, "L")
    chroma = torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(1)) * 20
    whole = assemble(scan, chroma).pixels
    monkeypatch.setattr(images, "STRIP_PIXELS", 150)
    assert np.abs(assemble(scan, chroma).pixels.astype(int) - whole).max() <= 1


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
