"""Decodes picture files with limits, at the file's own depth.

Pillow decodes samples of 8 bits. It would reduce, wrap or refuse deeper ones, so tifffile (TIFF) and imagecodecs
(PNG, JPEG 2000, AVIF) read those. Whatever a decoder raises, the caller sees `UnreadableImageError`.

Which formats are read, and why others are not, is in docs/semantics.md.
"""

import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from diffcolor_scans.errors import UnreadableImageError

FORMATS = (
    *("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"),  # JPEG includes MPO
    *("AVIF", "PSD", "PCX", "SGI", "SUN", "QOI"),
)
_KEPT_TAGS = (270, 271, 272, 305, 306, 315, 33432)  # description, make, model, software, date, artist, copyright
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNSIGNED, _SIGNED, _FLOAT = (1, 4), 2, 3  # TIFF's SampleFormat; 4, "undefined", is read as unsigned
MAX_PIXELS = 178_956_970  # Pillow's own error limit: larger pictures are refused as decompression bombs
MAX_SIDE_PX = 1_000_000  # libpng's limit: the result of a longer scan could not be written
MAX_PAGES = 1_000  # frames or pages of a file; a list of millions is an attack
STRIP_PIXELS = 64_000  # full-size work is done in strips of about this size, which a core's cache holds
_PSD_EXIF, _PSD_XMP, _PSD_RESOLUTION, _PSD_VERSION_INFO = 1058, 1060, 1005, 1057  # Photoshop's image resources
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # the manifest row of a damaged file has the reason


@dataclass(frozen=True)
class SourceMetadata:
    """The metadata of an input file that the output keeps: EXIF (upright, without its thumbnail) and XMP, as bytes."""

    exif: bytes | None = None
    xmp: bytes | None = None


class Decoded(NamedTuple):
    """Samples [H, W, 1 to 4] (gray, gray + alpha, RGB, RGBA) as uint8 or uint16, and where they come from.

    maximum: the value of full intensity, 255 or 65535. mode: the pixel layout as the decoder names it.
    """

    samples: np.ndarray
    maximum: int
    mode: str
    metadata: SourceMetadata
    num_pages: int


def decode(data: bytes) -> Decoded:
    """The samples of a file's first frame or page, upright and in sRGB, with its metadata.

    Raises UnreadableImageError, with the decoder's reason, for anything that is not a whole picture of at most
    `MAX_PIXELS` in one of `FORMATS`.
    """
    with _refusing():
        return _decode(data)


def read_size(file: IO[bytes]) -> tuple[int, int]:
    """Width and height of a file's first frame or page as stored, by its header: no sample is decoded.

    Raises UnreadableImageError for what `decode` refuses by the header. A file whose samples are damaged passes.
    """
    with _refusing():
        try:
            with Image.open(file, formats=FORMATS) as image:
                size = image.size
        except UnidentifiedImageError:  # some deep TIFFs, which Pillow does not know
            file.seek(0)
            if file.read(4) not in _TIFF_SIGNATURES:
                raise
            file.seek(0)
            page = tifffile.TiffFile(file).pages[0]
            size = int(page.imagewidth), int(page.imagelength)
        _check_size(*size)
        return size


@contextmanager
def _refusing() -> Iterator[None]:
    """What decoders raise, as UnreadableImageError with the reason."""
    try:
        yield
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes) -> Decoded:
    if not data:
        raise UnreadableImageError("the file is empty")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata does not make a picture unreadable
        tiff = _open_tiff(data)
        if tiff is not None and _is_deep(tiff):
            return _decode_deep_tiff(data, tiff)
        if data[:4] == b"8BPS":
            _check_psd(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            if not isinstance(image.info.get("xmp", b""), bytes):  # a TIFF's tag 700 of another type: not XMP
                del image.info["xmp"]
            deep = _deep_samples(image, data)
            if deep is None:
                image.load()
            if image.format == "PSD":
                _read_psd_resources(image)
            num_pages = _num_pages(image, data, tiff)
            exif = _exif(image)  # after loading: reading EXIF can hide a broken end
            xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
            metadata = _metadata(exif, xmp, image.info.get("dpi"))
            if deep is not None:
                samples = _sixteen_bit(deep, _profile_of(image.info, deep.num_colors == 1))
                return Decoded(_upright(samples, exif), 65535, deep.name, metadata, num_pages)
            picture = _without_selection(image, data) if image.format == "PSD" else image
            return Decoded(_upright(_eight_bit(picture), exif), 255, image.mode, metadata, num_pages)


def _check_size(width_px: int, height_px: int) -> None:
    size = f"{width_px} x {height_px} pixels exceed the limit of"
    if width_px * height_px > MAX_PIXELS:
        raise UnreadableImageError(f"{size} {MAX_PIXELS}: a decompression bomb?")
    if max(width_px, height_px) > MAX_SIDE_PX:
        raise UnreadableImageError(f"{size} {MAX_SIDE_PX} a side: cut it into parts")


# ------------------------------------------------------------------ Photoshop


def _check_psd(data: bytes) -> None:
    """Refuse by name what Pillow cannot read of a PSD: other depths than 1 and 8 bits, and PSB."""
    version, _, _, _, _, bits, mode = struct.unpack_from(">H6sHIIHH", data, 4)
    if version != 1:
        raise UnreadableImageError("a large Photoshop document (PSB): save it as TIFF")
    if bits not in (1, 8):
        raise UnreadableImageError(f"PSD with {bits} bits a sample, of which only 8 are read: save it as TIFF")
    if mode == 7:
        raise UnreadableImageError("PSD in multichannel mode: save it as gray or RGB")


def _read_psd_resources(image: Image.Image) -> None:
    """Put a PSD's metadata where Pillow has other formats'. Raises UnreadableImageError if it has only layers."""
    resources = {number: data for number, _, data in getattr(image, "resources", ())}
    if resources.get(_PSD_VERSION_INFO, b"\0\0\0\0\1")[4:5] == b"\0":  # hasRealMergedData
        raise UnreadableImageError(
            "PSD without a flattened picture: save it with the option to maximize compatibility, or as TIFF"
        )
    if _PSD_EXIF in resources:
        image.info["exif"] = b"Exif\0\0" + resources[_PSD_EXIF]
    if _PSD_XMP in resources:
        image.info["xmp"] = resources[_PSD_XMP]
    if len(resolution := resources.get(_PSD_RESOLUTION, b"")) >= 12:
        x, y = struct.unpack_from(">I", resolution, 0)[0], struct.unpack_from(">I", resolution, 8)[0]
        image.info["dpi"] = (x / 65536, y / 65536)


def _without_selection(image: Image.Image, data: bytes) -> Image.Image:
    """A PSD's picture. Its fourth channel is transparency only if the layer count is negative, else a selection."""
    if image.mode != "RGBA":
        return image
    at = 26
    for _ in range(2):  # over colour table and resources, to the layers
        at += 4 + struct.unpack_from(">I", data, at)[0]
    section_bytes, layers_bytes = struct.unpack_from(">II", data, at)
    count = struct.unpack_from(">h", data, at + 8)[0] if section_bytes and layers_bytes else 0
    return image if count < 0 else image.convert("RGB")


# ------------------------------------------------------------------ pages


def _num_pages(image: Image.Image, data: bytes, tiff: tifffile.TiffFile | None) -> int:
    """How many pages or frames an opened file has. A damaged list of them counts as one: the first may be whole."""
    if image.format == "PSD":  # its frames are the layers of the one picture
        return 1
    if image.format == "TIFF":  # Pillow takes quadratic time
        return 1 if tiff is None else _num_tiff_pages(data, tiff)
    try:
        number = int(getattr(image, "n_frames", 1))
    except Exception:
        return 1
    return _check_pages(number)


def _num_tiff_pages(data: bytes, tiff: tifffile.TiffFile) -> int:
    """How many pages a TIFF lists. They are counted to one past the limit."""
    layout, offset = tiff.tiff, tiff.pages.first.offset
    seen: set[int] = set()  # a damaged list may form a circle
    while offset and offset not in seen and len(seen) <= MAX_PAGES:
        try:
            (num_tags,) = struct.unpack_from(layout.tagnoformat, data, offset)
            seen.add(offset)
            after = offset + layout.tagnosize + num_tags * layout.tagsize
            (offset,) = struct.unpack_from(layout.offsetformat, data, after)
        except struct.error:  # the list leaves the file
            break
    return _check_pages(len(seen))


def _check_pages(number: int) -> int:
    if number > MAX_PAGES:
        raise UnreadableImageError(
            f"more than {MAX_PAGES} frames or pages, the limit for one file: split it, or keep only its first page"
        )
    return number


# ------------------------------------------------------------------ metadata


def _exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # EXIF is a TIFF in itself, and as often damaged
        return Image.Exif()


def _metadata(exif: Image.Exif, xmp: object, dpi: tuple[float, float] | None = None) -> SourceMetadata:
    """EXIF of the upright picture, and XMP. Damaged metadata is left out.

    dpi: the resolution that the container itself states, for files whose EXIF states none.
    """
    try:
        kept = Image.Exif()
        tags = {tag: _tag_value(value) for tag, value in exif.items() if tag in _KEPT_TAGS and isinstance(value, str)}
        kept.update(tags | _resolution(exif, dpi))
        ifds = {ifd: exif.get_ifd(ifd) for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
        for ifd, values in ifds.items():
            kept.get_ifd(ifd).update({tag: _tag_value(value) for tag, value in values.items()})
        encoded = kept.tobytes() if len(kept) or any(ifds.values()) else None
    except Exception:  # EXIF is a TIFF in itself, and as often damaged
        encoded = None
    if isinstance(xmp, str):
        xmp = xmp.encode(errors="replace")
    return SourceMetadata(encoded, xmp if isinstance(xmp, bytes) and xmp else None)


def _tag_value(value: object) -> object:
    """Text beyond ASCII as its original bytes: Pillow reads it as Latin-1, and would write question marks."""
    return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value


def _resolution(exif: Image.Exif, dpi: tuple[float, float] | None) -> dict[int, float]:
    """XResolution, YResolution and ResolutionUnit of the upright picture, if they are plausible."""
    x, y, unit = exif.get(282), exif.get(283), exif.get(296, 2)
    if x is None and dpi is not None and tuple(dpi) != (72, 72):  # 72: Pillow's default
        (x, y), unit = dpi, 2
    try:
        x, y = float(x), float(y)  # type: ignore[arg-type]
    except (TypeError, ValueError, ArithmeticError):  # missing, or not numbers
        return {}
    if unit not in (1, 2, 3) or not (min(x, y) > 0.1 and max(x, y) < 25_000):  # JPEG's header ends at 65,535 dpi
        return {}
    if exif.get(274) in (5, 6, 7, 8):
        x, y = y, x
    return {282: x, 283: y, 296: unit}


# ------------------------------------------------------------------ samples of more than 8 bits


class _Deep(NamedTuple):
    """Samples as a file holds them, [H, W, 1 to 4] (gray, gray + alpha, RGB, RGBA), and what they mean."""

    samples: np.ndarray
    full_scale: float  # the value of full intensity: 2^bits - 1, or 1 of floating-point samples
    name: str
    white_is_zero: bool = False
    premultiplied: bool = False

    @property
    def num_colors(self) -> int:
        return 1 if self.samples.shape[-1] <= 2 else 3


def _deep(samples: np.ndarray, bits: int, **meaning: bool) -> _Deep:
    samples = samples if samples.ndim == 3 else samples[..., None]
    floating = samples.dtype.kind == "f"
    name = ("F" if floating else "I", "LA", "RGB", "RGBA")[samples.shape[-1] - 1]
    return _Deep(samples, 1.0 if floating else 2.0**bits - 1, f"{name};{bits}", **meaning)


def _sixteen_bit(deep: _Deep, profile: bytes | None) -> np.ndarray:
    """The samples as uint16 sRGB over the full range, scaled (never clipped), with straight alpha: [H, W, 1 to 4]."""
    height, width, _ = deep.samples.shape
    done = []
    for rows in strips(height, width):
        values = deep.samples[rows].astype(np.float64) / deep.full_scale
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise UnreadableImageError("floating-point samples outside [0, 1]: rescale them before archiving")
        color, alpha = values[..., : deep.num_colors], values[..., deep.num_colors :]
        if deep.premultiplied:
            color = np.divide(color, alpha, out=np.zeros_like(color), where=alpha > 0).clip(0, 1)
        if deep.white_is_zero:
            color = 1 - color
        if profile is not None:
            color = _to_srgb(color, profile)
        done.append((np.concatenate((color, alpha), axis=-1) * 65535).round().astype(np.uint16))
    return np.concatenate(done)


def _to_srgb(color: np.ndarray, profile: bytes) -> np.ndarray:
    """Gray, RGB or CMYK to sRGB, either uint8 or in [0, 1]. A profile that does not fit the picture is ignored.

    Deep samples are converted in floating point: littleCMS's 16-bit tables are 14 L* off in the shadows of a linear
    profile.
    """
    space = {1: "gray", 3: "rgb", 4: "cmyk"}[color.shape[-1]]
    values = color[..., 0] if space == "gray" else color
    try:
        srgb = imagecodecs.cms_transform(
            values, profile, imagecodecs.cms_profile("srgb"), colorspace=space, outcolorspace="rgb"
        )
    except (imagecodecs.CmsError, ValueError):
        return color
    return srgb if srgb.dtype == np.uint8 else srgb.clip(0, 1)


def _profile_of(info: dict[str | tuple[int, int], Any], gray: bool) -> bytes | None:
    """The colour profile of a picture. A PNG that states only its gamma gets a profile with that gamma."""
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if profile or not gamma or "srgb" in info or abs(gamma * 2.2 - 1) < 0.05:  # 1/2.2: how encoders write sRGB
        return profile or None
    if gray:
        return bytes(imagecodecs.cms_profile("gray", gamma=1 / gamma))
    white_x, white_y, *primaries = info.get("chromaticity", (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
    return bytes(imagecodecs.cms_profile("rgb", gamma=1 / gamma, whitepoint=(white_x, white_y), primaries=primaries))


def _deep_samples(image: Image.Image, data: bytes) -> _Deep | None:
    """The samples of an opened PNG, JPEG 2000, AVIF or PPM of more than 8 bits; None for other files.

    Refuses what Pillow would reduce to 8 bits with a loss that nobody expects.
    """
    if image.format == "SGI" and data[3] != 1:
        raise UnreadableImageError("SGI of more than 8 bits: convert it to TIFF or PNG")
    if image.format == "PNG" and data[24] == 16:  # IHDR: bit depth
        return _deep(imagecodecs.png_decode(data), 16)
    if image.format == "JPEG2000":
        return _deep_jpeg2000(image, data)
    if image.format == "AVIF":
        return _deep_avif(image, data)
    if image.format == "PPM" and image.mode in ("I", "F"):  # Pillow has scaled integers to 16 bits
        return _deep(np.asarray(image), 16 if image.mode == "I" else 32)
    return None


def _deep_jpeg2000(image: Image.Image, data: bytes) -> _Deep | None:
    size = data.index(b"\xff\x4f\xff\x51")  # the codestream starts with its size and components
    x1, y1, x0, y0 = struct.unpack_from(">4I", data, size + 8)
    (num_components,) = struct.unpack_from(">H", data, size + 40)
    kinds = set(data[size + 42 : size + 42 + 3 * num_components : 3])  # bits - 1, and 128 for signed ones
    if all(kind & 127 < 8 for kind in kinds):
        return None
    if len(kinds) > 1 or max(kinds) >= 128 or image.mode not in ("I;16", "LA", "RGB", "RGBA"):
        raise UnreadableImageError(
            f"JPEG 2000 ({image.mode}) of more than 8 bits with signed, mixed or other than gray and RGB components: "
            "convert it to unsigned gray or RGB"
        )
    if (x1 - x0, y1 - y0) != image.size:
        raise UnreadableImageError(f"JPEG 2000 of {x1 - x0} x {y1 - y0} pixels that states {image.size}: damaged")
    return _deep(imagecodecs.jpeg2k_decode(data), kinds.pop() + 1)


def _deep_avif(image: Image.Image, data: bytes) -> _Deep | None:
    if re.search(rb"colrnclx..\0[\x10\x12]", data, re.DOTALL):  # the transfer function, in its colour box
        raise UnreadableImageError("AVIF with high dynamic range (PQ or HLG): convert it to sRGB")
    depths = [flags[0] & 0x60 for flags in re.findall(rb"av1C..(.)", data, re.DOTALL)]  # 0x40: over 8 bits, 0x20: 12
    if not any(depths):
        return None
    if getattr(image, "n_frames", 1) > 1:  # imagecodecs 2026.3 corrupts memory when it reads one frame of several
        raise UnreadableImageError("AVIF sequence of more than 8 bits: keep one picture, or convert it to TIFF")
    samples = imagecodecs.avif_decode(data)
    if samples.shape[:2] != (image.height, image.width):
        raise UnreadableImageError(f"AVIF of {samples.shape} samples that states {image.size}: damaged")
    return _deep(samples, 12 if max(depths) == 0x60 else 10) if samples.dtype == np.uint16 else None


def _open_tiff(data: bytes) -> tifffile.TiffFile | None:
    """A TIFF whose first page can be read; None for other files, of which Pillow gives the reason."""
    if data[:4] not in _TIFF_SIGNATURES:
        return None
    try:
        tiff = tifffile.TiffFile(io.BytesIO(data))
        assert isinstance(tiff.pages[0], tifffile.TiffPage)
    except Exception:
        return None
    return tiff


def _is_deep(tiff: tifffile.TiffFile) -> bool:
    """Whether a TIFF is gray or RGB with more than 8 bits, or with samples other than unsigned integers."""
    page = tiff.pages.first
    return page.photometric in (0, 1, 2) and (page.bitspersample > 8 or page.sampleformat not in _UNSIGNED)


def _decode_deep_tiff(data: bytes, tiff: tifffile.TiffFile) -> Decoded:
    page = tiff.pages.first
    _check_size(int(page.imagewidth), int(page.imagelength))  # int: a damaged tag may be a tuple of millions
    num_pages = _num_tiff_pages(data, tiff)
    exif = _tiff_exif(data, tiff, page)
    deep = _tiff_samples(page)
    samples = _upright(_sixteen_bit(deep, page.iccprofile), exif)
    return Decoded(samples, 65535, deep.name, _metadata(exif, page.tags.valueof(700)), num_pages)


def _tiff_exif(data: bytes, file: tifffile.TiffFile, page: tifffile.TiffPage) -> Image.Exif:
    """A TIFF's tags in Pillow's form, also of files that Pillow does not open."""
    exif = Image.Exif()
    exif.endian, exif.bigtiff = file.byteorder, file.is_bigtiff
    try:
        exif.load_from_fp(io.BytesIO(data), page.offset)
    except Exception:  # damaged tags
        return Image.Exif()
    return exif


def _tiff_samples(page: tifffile.TiffPage) -> _Deep:
    """Gray or RGB and alpha of a TIFF. Other extra samples, such as a film scanner's infrared, are left out."""
    if page.sampleformat not in (*_UNSIGNED, _FLOAT):
        raise UnreadableImageError(
            f"TIFF with {'signed' if page.sampleformat == _SIGNED else 'complex'} samples (SampleFormat "
            f"{page.sampleformat}): their white is not defined, so convert them to unsigned integers"
        )
    num_colors, num_samples = 3 if page.photometric == 2 else 1, page.samplesperpixel
    if not num_colors <= num_samples <= num_colors + 2:
        raise UnreadableImageError(
            f"TIFF with {num_samples} samples a pixel, {num_colors} of them colour: at most 2 others are read"
        )
    if len(page.databytecounts) != math.prod(page.chunked) or 0 in page.databytecounts:
        raise UnreadableImageError("TIFF with missing strips or tiles: damaged, or never finished")
    if page.planarconfig == 2 and num_samples > 1:  # one plane after the other
        samples = np.moveaxis(page.asarray().reshape(num_samples, page.imagelength, page.imagewidth), 0, -1)
    else:
        samples = page.asarray().reshape(page.imagelength, page.imagewidth, num_samples)
    extra = page.extrasamples or (2,) * (num_samples - num_colors)  # if not stated: alpha, as in Pillow
    alpha = [num_colors + i for i, kind in enumerate(extra) if kind in (1, 2)][:1]
    return _deep(
        samples[..., [*range(num_colors), *alpha]],
        page.bitspersample,
        white_is_zero=page.photometric == 0,
        premultiplied=bool(alpha) and extra[alpha[0] - num_colors] == 1,
    )


# ------------------------------------------------------------------ samples of 8 bits


def _eight_bit(image: Image.Image) -> np.ndarray:
    """An 8-bit picture as uint8 gray, gray + alpha, RGB or RGBA, converted through its colour profile."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise UnreadableImageError(f"a damaged {image.format or 'file'} of samples deeper than 8 bits ({image.mode})")
    colors = "L" if image.mode in ("1", "L", "LA", "La") else "CMYK" if image.mode == "CMYK" else "RGB"
    profile = _profile_of(image.info, colors == "L")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image, profile = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image), None
    alpha = "A" if image.has_transparency_data and colors != "CMYK" else ""
    samples = np.asarray(image.convert(colors + alpha))
    samples = samples if samples.ndim == 3 else samples[..., None]
    color, alphas = samples[..., : len(colors)], samples[..., len(colors) :]
    if profile is not None:
        color = _to_srgb(color, profile)
    if color.shape[-1] == 4:  # CMYK without a profile that fits it
        color = np.asarray(image.convert("RGB"))
    return np.concatenate((color, alphas), axis=-1)


def _upright(samples: np.ndarray, exif: Image.Exif) -> np.ndarray:
    """`samples` turned as EXIF or the TIFF tag says."""
    orientation = exif.get(274, 1)
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return np.ascontiguousarray(samples)


def strips(height_px: int, width_px: int) -> Iterator[slice]:
    """Row ranges that cut a picture into pieces of about `STRIP_PIXELS`."""
    rows = max(1, STRIP_PIXELS // max(1, width_px))
    for start in range(0, height_px, rows):
        yield slice(start, min(start + rows, height_px))
