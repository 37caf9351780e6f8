import contextlib
import csv
import io
import struct
import time
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageCms

from diffcolor_core.errors import UnreadableImageError
from diffcolor_scans.color import lightness_of
from diffcolor_scans.decoding import read_size
from diffcolor_scans.images import assemble, read_scan


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
    return lightness_of(torch.from_numpy(rgb.astype(np.float64) / maximum).permute(2, 0, 1)).float()


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
    assert read_size(io.BytesIO(data)) == (64, 48)
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
LINEAR_GRAY = imagecodecs.cms_profile("gray", gamma=1.0)
LINEAR_RGB = imagecodecs.cms_profile(
    "rgb", gamma=1.0, whitepoint=(0.3127, 0.329), primaries=(0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
)


def l_star_of_linear(samples: np.ndarray, maximum: int) -> torch.Tensor:
    """CIE L* of linear sRGB, by its own formula."""
    rgb = samples[..., None].repeat(3, -1) if samples.ndim == 2 else samples
    y = (rgb.astype(np.float64) / maximum) @ (0.2126, 0.7152, 0.0722)
    l_star = np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)
    return torch.from_numpy(l_star[None].astype(np.float32))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(samples: np.ndarray, kind: bytes, data: bytes) -> bytes:
    whole = imagecodecs.png_encode(samples)
    return whole[:33] + png_chunk(kind, data) + whole[33:]  # after IHDR


def with_profile(samples: np.ndarray, profile: bytes) -> bytes:
    return png_with(samples, b"iCCP", b"profile\0\0" + zlib.compress(profile))


@pytest.mark.parametrize(
    ("data", "samples", "maximum"),
    [
        (with_profile(RAMP16, LINEAR_GRAY), RAMP16, 65535),
        (with_profile(TONED16, LINEAR_RGB), TONED16, 65535),
        (tiff(RAMP16, iccprofile=LINEAR_GRAY), RAMP16, 65535),
        (tiff(TONED16, photometric="rgb", iccprofile=LINEAR_RGB), TONED16, 65535),
        (png_with(RAMP16, b"gAMA", struct.pack(">I", 100_000)), RAMP16, 65535),
        (png_with(TONED16, b"gAMA", struct.pack(">I", 100_000)), TONED16, 65535),
    ],
    ids=["png-gray", "png-rgb", "tiff-gray", "tiff-rgb", "gamma-gray", "gamma-rgb"],
)
def test_a_linear_scan_is_not_taken_for_srgb(data, samples, maximum):
    torch.testing.assert_close(read_scan(data).lightness, l_star_of_linear(samples, maximum), atol=0.02, rtol=0)


def test_the_gamma_of_an_eight_bit_png_is_undone():
    """To 8 bits and littleCMS's tables for them, which are coarse in the deepest shadows of a linear scan."""
    found = read_scan(png_with(RAMP8, b"gAMA", struct.pack(">I", 100_000))).lightness
    assert float((found - l_star_of_linear(RAMP8, 255)).abs().mean()) < 0.3


@pytest.mark.parametrize("profile", [b"no profile at all", LINEAR_RGB], ids=["damaged", "of another kind"])
def test_a_profile_that_does_not_fit_a_deep_scan_is_passed_over(profile):
    found = read_scan(tiff(RAMP16, iccprofile=profile)).lightness
    torch.testing.assert_close(found, l_star_of(RAMP16, 65535), atol=2e-3, rtol=0)


def test_the_gamma_that_encoders_write_for_srgb_is_srgb():
    data = png_with(RAMP8, b"gAMA", struct.pack(">I", 45455))
    assert torch.equal(read_scan(data).lightness, read_scan(encoded(Image.fromarray(RAMP8))).lightness)


def twelve_bit_tiff(samples: np.ndarray, photometric: int) -> bytes:
    """By hand, since tifffile writes no packed samples."""
    height, width = samples.shape
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    packed = np.packbits(bits.reshape(height, -1), axis=1).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: photometric, 273: 122, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


UNIT = RAMP16 / 65535


@pytest.mark.parametrize(
    ("data", "samples", "maximum"),
    [
        (tiff((UNIT * (2**32 - 1)).astype(np.uint32)), UNIT, 1),
        (tiff((RAMP16 // 4).astype(np.uint32)), RAMP16 // 4, 2**32 - 1),
        (tiff(UNIT.astype(np.float32), photometric="miniswhite"), 1 - UNIT, 1),
        (tiff(TONED16.astype(np.float64) / 65535, photometric="rgb"), TONED16, 65535),
        (twelve_bit_tiff(RAMP16 >> 4, 1), RAMP16 >> 4, 4095),
        (twelve_bit_tiff(RAMP16 >> 4, 0), 4095 - (RAMP16 >> 4), 4095),
        (tiff(RAMP16, byteorder=">", bigtiff=True), RAMP16, 65535),
        (imagecodecs.jpeg2k_encode(RAMP16, level=0), RAMP16, 65535),
        (imagecodecs.jpeg2k_encode(TONED16, level=0), TONED16, 65535),
        (imagecodecs.jpeg2k_encode(TONED16 >> 4, level=0, bitspersample=12), TONED16 >> 4, 4095),
    ],
    ids=[
        "uint32",
        "dark-uint32",
        "float-white-is-zero",
        "float64-rgb",
        "12-bit",
        "12-bit-white-is-zero",
        "big",
        "jp2-gray",
        "jp2-rgb",
        "jp2-12-bit",
    ],
)
def test_white_is_the_full_scale_of_the_files_own_samples(data, samples, maximum):
    torch.testing.assert_close(read_scan(data).lightness, l_star_of(samples, maximum), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (RAMP16.view(np.int16), "signed"),
        (RAMP8.view(np.int8), "signed"),
        (RAMP16.astype(np.int32), "signed"),
        (UNIT.astype(np.complex64), "complex"),
        (RAMP16.astype(np.float32), "outside"),
        (np.where(UNIT > 0.5, np.nan, UNIT).astype(np.float32), "outside"),
    ],
)
def test_samples_without_a_defined_white_are_refused_by_name(samples, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        read_scan(tiff(samples, photometric="minisblack"))


def test_only_what_says_so_is_alpha():
    infrared = np.concatenate((TONED16, RAMP16[::-1, :, None]), -1)
    for samples, maximum in ((infrared, 65535), ((infrared >> 8).astype(np.uint8), 255)):
        scan = read_scan(tiff(samples, photometric="rgb", extrasamples=["unspecified"]))
        assert scan.alpha is None
        torch.testing.assert_close(scan.lightness, l_star_of(samples[..., :3], maximum), atol=2e-3, rtol=0)
    for order in "<>":
        deep = np.stack((RAMP16, RAMP16[::-1]), -1)
        kwargs = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
        scan = read_scan(tiff(deep, byteorder=order, **kwargs))
        np.testing.assert_array_equal(scan.alpha, RAMP16[::-1])
        torch.testing.assert_close(scan.lightness, l_star_of(RAMP16, 65535), atol=2e-3, rtol=0)


def test_the_transparent_gray_of_a_deep_png_is_alpha():
    scan = read_scan(png_with(RAMP16, b"tRNS", struct.pack(">H", RAMP16[5, 7])))
    assert scan.alpha is not None
    np.testing.assert_array_equal(scan.alpha, np.where(RAMP16[5, 7] == RAMP16, 0, 65535))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_deep_tiff_without_all_its_data_is_refused(compression):
    whole = tiff(RAMP16, compression=compression, rowsperstrip=8)
    with pytest.raises(UnreadableImageError):
        read_scan(whole[: len(whole) * 2 // 3])
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        place = file.pages[0].tags[279].valueoffset
    size = 2 if struct.unpack_from("<H", whole, place)[0] and whole[place + 2 : place + 4] != b"\0\0" else 4
    with pytest.raises(UnreadableImageError, match="missing strips"):
        read_scan(whole[:place] + bytes(size) + whole[place + size :])


def test_a_deep_tiff_of_several_widths_is_refused_at_once():
    """Its length times a tuple of widths would fill the memory."""
    data = bytearray(tiff(RAMP16, metadata=None))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        width, length = (file.pages[0].tags[tag].offset for tag in (256, 257))
    struct.pack_into("<HHII", data, width, 256, 4, 16, 8)
    struct.pack_into("<HHII", data, length, 257, 4, 1, 10_000_000)
    with pytest.raises(UnreadableImageError, match="tuple"):
        read_scan(bytes(data))


def test_a_list_of_pages_beyond_the_limit_is_refused_at_once():
    page = tiff(RAMP8[:2, :2], metadata=None)

    def listing(num_pages: int) -> bytes:
        """The first page, then empty ones that lie one after the other."""
        with tifffile.TiffFile(io.BytesIO(page)) as file:
            first = file.pages[0]
            after = first.offset + 2 + 12 * len(first.tags)
        data = bytearray(page)
        struct.pack_into("<I", data, after, len(page))
        for number in range(num_pages - 1):
            last = number == num_pages - 2
            entry = struct.pack("<HHII", 256, 4, 1, 1)
            data += struct.pack("<H", 1) + entry + struct.pack("<I", 0 if last else len(data) + 18)
        return bytes(data)

    assert read_scan(listing(1000)).num_pages == 1000
    start = time.process_time()
    with pytest.raises(UnreadableImageError, match="more than 1000 frames or pages"):
        read_scan(listing(200_000))
    assert time.process_time() - start < 5  # Pillow's own count takes minutes


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encoded(Image.fromarray(RAMP8))[:20],
        encoded(Image.new("1", (1_000_001, 1))),
        b"II*\0" + b"\xff" * 40,
    ],
    ids=["empty", "text", "cut", "too wide", "damaged tiff"],
)
def test_a_header_that_cannot_be_read_is_refused(data):
    with pytest.raises(UnreadableImageError):
        read_size(io.BytesIO(data))


def test_a_side_that_no_png_holds_is_refused():
    with pytest.raises(UnreadableImageError, match="1000000 a side"):
        read_scan(encoded(Image.new("1", (1_000_001, 1)), "TIFF"))


def test_a_tag_of_another_type_is_no_xmp():
    data = tiff(RAMP8, extratags=[(700, 3, 4, (1, 2, 3, 4), True)])
    assert read_scan(data).metadata.xmp is None


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


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [
            encoded(Image.fromarray(RAMP8), "TIFF"),
            tiff(TONED16, photometric="rgb", iccprofile=LINEAR_RGB, compression="zlib"),
            twelve_bit_tiff(RAMP16 >> 4, 0),
            with_profile(RAMP16, LINEAR_GRAY),
            imagecodecs.jpeg2k_encode(TONED16, level=0),
            imagecodecs.avif_encode(TONED16 >> 4, level=90, bitspersample=12),
        ]
    ),
    st.binary(max_size=300),
    st.integers(0, 900),
)
def test_damage_anywhere_is_an_unreadable_image_or_a_picture(whole, noise, place):
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


# ------------------------------------------------------------------ formats beside the common ones


@pytest.mark.parametrize("kind", ["AVIF", "PCX", "SGI"])
@pytest.mark.parametrize("samples", [RAMP8, TONED8], ids=["gray", "rgb"])
def test_formats_that_pillow_writes(kind, samples):
    options = {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    scan = read_scan(encoded(Image.fromarray(samples), kind, **options))
    assert scan.bit_depth == 8
    tolerance = 0.6 if kind == "AVIF" and samples.ndim == 3 else 1e-3  # YCbCr at 8 bits
    torch.testing.assert_close(scan.lightness, l_star_of(samples, 255), atol=tolerance, rtol=0)


def test_an_avif_is_turned_upright_and_keeps_its_metadata():
    exif = Image.Exif()
    exif[274], exif[315] = 6, "A. Photographer"
    data = encoded(Image.fromarray(RAMP8), "AVIF", quality=100, exif=exif, xmp=b"<x:xmpmeta/>")
    scan = read_scan(data)
    assert (scan.width_px, scan.height_px) == (48, 64)
    torch.testing.assert_close(scan.lightness, l_star_of(np.rot90(RAMP8, -1).copy(), 255), atol=1e-3, rtol=0)
    assert scan.metadata.xmp == b"<x:xmpmeta/>"
    assert b"A. Photographer" in scan.metadata.exif


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("samples", [RAMP16, TONED16], ids=["gray", "rgb"])
def test_a_deep_avif_keeps_its_depth(bits, samples):
    deep = samples >> (16 - bits)
    scan = read_scan(imagecodecs.avif_encode(deep, level=100, bitspersample=bits))
    assert scan.bit_depth == 16
    torch.testing.assert_close(scan.lightness, l_star_of(deep, 2**bits - 1), atol=2e-3, rtol=0)


def test_a_deep_avif_sequence_is_refused():
    frames = [Image.fromarray(RAMP8), Image.fromarray(RAMP8[::-1].copy())]
    data = bytearray(encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]))
    data[data.index(b"av1C") + 6] |= 0x40  # claims 10 bits
    with pytest.raises(UnreadableImageError):
        read_scan(bytes(data))


def test_of_an_avif_sequence_the_first_frame_is_read():
    frames = [Image.fromarray(RAMP8), Image.fromarray(RAMP8[::-1].copy())]
    scan = read_scan(encoded(frames[0], "AVIF", quality=100, save_all=True, append_images=frames[1:]))
    assert scan.num_pages == 2
    torch.testing.assert_close(scan.lightness, l_star_of(RAMP8, 255), atol=1e-3, rtol=0)


@pytest.mark.parametrize("transfer", [16, 18])
def test_an_avif_with_high_dynamic_range_is_refused(transfer):
    data = bytearray(encoded(Image.fromarray(RAMP8), "AVIF"))
    data[data.index(b"colrnclx") + 11] = transfer
    with pytest.raises(UnreadableImageError, match="high dynamic range"):
        read_scan(bytes(data))


def test_a_qoi_and_a_sun_raster():
    torch.testing.assert_close(
        read_scan(imagecodecs.qoi_encode(TONED8)).lightness, l_star_of(TONED8, 255), atol=1e-3, rtol=0
    )
    height, width = RAMP8.shape
    header = struct.pack(">8I", 0x59A66A95, width, height, 8, width * height, 1, 0, 0)
    torch.testing.assert_close(read_scan(header + RAMP8.tobytes()).lightness, l_star_of(RAMP8, 255), atol=1e-3, rtol=0)


def test_a_deep_sgi_is_refused():
    data = bytearray(encoded(Image.fromarray(RAMP8), "SGI", bpc=2))
    with pytest.raises(UnreadableImageError, match="more than 8 bits"):
        read_scan(bytes(data))


GRAY, RGB, CMYK, LAB, MULTICHANNEL = 1, 3, 4, 9, 7


def psd(
    planes: list[np.ndarray],
    mode: int,
    *,
    bits: int = 8,
    version: int = 1,
    resources: dict[int, bytes] | None = None,
    num_layers: int | None = None,
) -> bytes:
    """By hand after Adobe's specification, uncompressed. num_layers: what the layer section says, negative if the
    first extra channel is the transparency of the flattened picture."""
    height, width = planes[0].shape
    blocks = b""
    for number, data in (resources or {}).items():
        blocks += b"8BIM" + struct.pack(">HHI", number, 0, len(data)) + data + b"\0" * (len(data) % 2)
    layers = b"" if num_layers is None else struct.pack(">IhI", 8, num_layers, 0)
    return b"".join(
        [
            struct.pack(">4sH6xHIIHH", b"8BPS", version, len(planes), height, width, bits, mode),
            struct.pack(">I", 0),
            struct.pack(">I", len(blocks)) + blocks,
            struct.pack(">I", len(layers)) + layers,
            struct.pack(">H", 0),
            *(plane.astype(f">u{bits // 8}").tobytes() for plane in planes),
        ]
    )


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (psd([RAMP8], GRAY), RAMP8),
        (psd(list(np.moveaxis(TONED8, -1, 0)), RGB), TONED8),
        (psd([255 - plane for plane in (RAMP8 * 0, RAMP8 * 0, RAMP8 * 0, 255 - RAMP8)], CMYK), RAMP8),
    ],
    ids=["gray", "rgb", "cmyk"],
)
def test_the_flattened_picture_of_a_psd(data, samples):
    scan = read_scan(data)
    assert (scan.bit_depth, scan.num_pages, scan.alpha) == (8, 1, None)
    torch.testing.assert_close(scan.lightness, l_star_of(samples, 255), atol=1e-3, rtol=0)


def test_a_psd_in_lab():
    """Neutral, with the lightness that the file states."""
    neutral = np.full_like(RAMP8, 128)
    scan = read_scan(psd([RAMP8, neutral, neutral], LAB))
    expected = torch.from_numpy(RAMP8[None].astype(np.float32) * 100 / 255)
    torch.testing.assert_close(scan.lightness, expected, atol=0.6, rtol=0)


def test_the_fourth_channel_of_a_psd_is_alpha_only_if_the_file_says_so():
    planes = [*np.moveaxis(TONED8, -1, 0), RAMP8[::-1]]
    np.testing.assert_array_equal(read_scan(psd(planes, RGB, num_layers=-1)).alpha, RAMP8[::-1])
    for num_layers in (1, None):
        scan = read_scan(psd(planes, RGB, num_layers=num_layers))
        assert scan.alpha is None
        torch.testing.assert_close(scan.lightness, l_star_of(TONED8, 255), atol=1e-3, rtol=0)


def test_a_psd_keeps_its_metadata():
    exif = Image.Exif()
    exif[315] = "A. Photographer"
    resolution = struct.pack(">IHHIHH", 600 << 16, 1, 1, 600 << 16, 1, 1)
    data = psd([RAMP8], GRAY, resources={1058: exif.tobytes()[6:], 1060: b"<x:xmpmeta/>", 1005: resolution})
    metadata = read_scan(data).metadata
    assert metadata.xmp == b"<x:xmpmeta/>"
    kept = Image.Exif()
    kept.load(metadata.exif)
    assert (kept[315], kept[282]) == ("A. Photographer", 600)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (psd([RAMP16], GRAY, bits=16), "16 bits a sample.*TIFF"),
        (psd([RAMP8], GRAY, version=2), "PSB"),
        (psd([RAMP8], MULTICHANNEL), "multichannel"),
        (psd([RAMP8], GRAY, resources={1057: struct.pack(">IB", 1, 0)}), "maximize compatibility"),
        (psd([RAMP8], GRAY)[:-100], "truncated"),
        (psd([RAMP8], GRAY)[:20], "error"),
    ],
)
def test_a_psd_that_cannot_be_read_says_why(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        read_scan(data)
