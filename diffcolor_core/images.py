"""Scans in, pictures out: decoding with limits, the scan's own L*, encoding at its own bit depth.

Pillow decodes; where it would reduce 16-bit colour to 8 bits, tifffile (TIFF) and imagecodecs (PNG)
read the samples instead. Whatever a decoder raises, the caller sees `UnreadableImageError`.
"""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffcolor_core.color import lightness, lightness_to_gray, lock_luminance

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")  # JPEG includes MPO
_KEPT_TAGS = (270, 271, 272, 305, 306, 315, 33432)  # description, make, model, software, date, artist, copyright
MAX_PIXELS = 178_956_970  # Pillow's own error limit: larger pictures are refused as decompression bombs
STRIP_PIXELS = 2_000_000  # full-size work goes through in strips of about this many pixels


class UnreadableImageError(ValueError):
    """A file that is no picture we can read: broken, a bomb, of another type. Never a fault of the machine."""


@dataclass(frozen=True)
class SourceMetadata:
    """What an input file says of itself, to be kept: EXIF (upright, without its thumbnail) and XMP, as bytes."""

    exif: bytes | None = None
    xmp: bytes | None = None


@dataclass(frozen=True)
class Scan:
    """A decoded input, upright.

    lightness: [1, H, W] float32, CIE L* in [0, 100]. alpha: [H, W] uint8 or uint16, or None.
    bit_depth: 8 or 16, that of the output. mode: the decoder's name for the pixel layout.
    num_pages: of the file; the first one is what was read.
    """

    lightness: Tensor
    alpha: np.ndarray | None
    bit_depth: int
    mode: str
    metadata: SourceMetadata = SourceMetadata()
    num_pages: int = 1

    @property
    def height_px(self) -> int:
        """Upright height."""
        return int(self.lightness.shape[-2])

    @property
    def width_px(self) -> int:
        """Upright width."""
        return int(self.lightness.shape[-1])


@dataclass(frozen=True)
class Picture:
    """A finished picture: `pixels` [H, W, 3 or 4], uint8 or uint16, sRGB with straight alpha."""

    pixels: np.ndarray

    def encode_png(self) -> bytes:
        """Lossless PNG of the same bit depth. The bytes depend on nothing but the pixels."""
        return bytes(imagecodecs.png_encode(self.pixels, level=6))

    def save(self, path: str | Path) -> None:
        """Write a PNG. Raises ValueError for another file name ending."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"cannot write {str(path)!r}: pictures are saved as PNG, so give a name ending in .png")
        Path(path).write_bytes(self.encode_png())

    def to_pil(self) -> Image.Image:
        """An 8-bit Pillow image, for showing."""
        return Image.fromarray((self.pixels >> 8).astype(np.uint8) if self.pixels.dtype == np.uint16 else self.pixels)


# ------------------------------------------------------------------ in


class _Decoded(NamedTuple):
    """Samples [H, W, 1 to 4] (gray, gray + alpha, RGB, RGBA) as uint8 or uint16, and what is known of them."""

    samples: np.ndarray
    maximum: int
    mode: str
    metadata: SourceMetadata
    num_pages: int


def read_scan(source: bytes | str | Path) -> Scan:
    """Decode a picture (its first frame or page), turn it upright and take its L*.

    Raises UnreadableImageError, with the decoder's reason, for anything that is not a whole picture
    of at most `MAX_PIXELS` in one of `FORMATS`; FileNotFoundError for a path that is not there.
    """
    samples, maximum, mode, metadata, num_pages = _samples_of(source)
    color = samples[..., : 1 if samples.shape[-1] <= 2 else 3]
    alpha = samples[..., -1] if samples.shape[-1] in (2, 4) else None
    return Scan(
        lightness=_lightness_of(color, maximum),
        alpha=None if alpha is None else np.ascontiguousarray(alpha),
        bit_depth=16 if maximum > 255 else 8,
        mode=mode,
        metadata=metadata,
        num_pages=num_pages,
    )


def read_picture(source: bytes | str | Path) -> Picture:
    """Decode a coloured picture as `read_scan` does a scan, colours kept. Raises the same errors."""
    samples, *_ = _samples_of(source)
    if samples.shape[-1] <= 2:  # gray
        samples = np.concatenate((np.repeat(samples[..., :1], 3, axis=-1), samples[..., 1:]), axis=-1)
    return Picture(np.array(samples, order="C"))  # a decoder's array may be read-only


def _samples_of(source: bytes | str | Path) -> _Decoded:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return _decode(data)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes) -> _Decoded:
    if not data:
        raise UnreadableImageError("the file is empty")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata is not a damaged picture
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(
                    f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}: a decompression bomb?"
                )
            layout = _sixteen_bit_color(image, data)
            if layout is None:
                image.load()
            mode = image.mode
            about = (_metadata(image), _num_pages(image))  # after loading: reading EXIF can hide a broken end
            if layout is not None:
                return _Decoded(_upright(layout, image), 65535, f"{mode};16", *about)
            if mode in ("I", "F") or mode.startswith("I;16"):
                return _Decoded(_upright(_deep_gray(image)[..., None], image), 65535, mode, *about)
            return _Decoded(_eight_bit(image), 255, mode, *about)


def _num_pages(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged list of pages: the first one may be whole
        return 1


def _metadata(image: Image.Image) -> SourceMetadata:
    """EXIF as an upright picture has it, and XMP. Damaged metadata is none."""
    try:
        exif = image.getexif()
        tags = {tag: value for tag, value in exif.items() if tag in _KEPT_TAGS and isinstance(value, str)}
        kept = Image.Exif()
        kept.update(tags)
        ifds = {ifd: exif.get_ifd(ifd) for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
        for ifd, values in ifds.items():
            kept.get_ifd(ifd).update(values)
        encoded = kept.tobytes() if tags or any(ifds.values()) else None
    except Exception:  # EXIF is a TIFF in itself, and as often damaged
        encoded = None
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    return SourceMetadata(encoded, xmp.encode() if isinstance(xmp, str) else xmp)


def _sixteen_bit_color(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The uint16 samples of 16-bit colour (or gray + alpha), which Pillow would reduce to 8 bits; else None."""
    if image.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):  # IHDR: bit depth, colour type
        return np.asarray(imagecodecs.png_decode(data))
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, photometric = tags.get(258, (1,)), tags.get(262)
        if len(bits) >= 2 and set(bits) == {16} and photometric in (0, 1, 2):
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                page = file.pages[0]
                assert isinstance(page, tifffile.TiffPage)
                samples = page.asarray()
                if page.planarconfig == 2:  # one plane after the other
                    samples = np.moveaxis(samples, 0, -1)
                num_colors = 3 if photometric == 2 else 1
                samples = samples[..., : num_colors + 1]
                if samples.shape[-1] > num_colors and 1 in page.extrasamples:  # colours multiplied by alpha
                    alpha = samples[..., -1:].astype(np.float64) / 65535
                    colors = np.divide(samples[..., :-1], alpha, out=np.zeros(samples[..., :-1].shape), where=alpha > 0)
                    samples = np.concatenate((colors.clip(0, 65535).round(), samples[..., -1:]), -1).astype(np.uint16)
                if photometric == 0:
                    samples[..., 0] = 65535 - samples[..., 0]
                return np.ascontiguousarray(samples)
    return None


def _deep_gray(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits, scaled (never clipped) to the whole of uint16: [H, W]."""
    values = np.asarray(image).astype(np.float64)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UnreadableImageError("floating-point samples outside [0, 1]: rescale them before archiving")
        return (values * 65535).round().astype(np.uint16)
    bits = min(tags.get(258, (16,))[0], 16)
    if values.max() > 65535:  # 32-bit integers, signed unless they show otherwise
        bits = 32 if values.max() >= 2**31 else 31
    limit = float(2**bits - 1)
    values = values.clip(0, None) / limit * 65535
    if tags.get(262) == 0:  # white is zero: Pillow inverts this for 8 bits only
        values = 65535 - values
    return values.clip(0, 65535).round().astype(np.uint16)


def _eight_bit(image: Image.Image) -> np.ndarray:
    """Any other picture as uint8 gray, gray + alpha, RGB or RGBA, through its colour profile if it has a sound one."""
    image = _transposed(image)
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return np.asarray(_lab_to_rgb(image))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif "transparency" in image.info and image.mode in ("L", "RGB", "1"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    elif image.mode in ("1", "La", "RGBa"):
        image = image.convert({"1": "L", "La": "LA", "RGBa": "RGBA"}[image.mode])
    if profile:
        image = _through_profile(image, profile)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    samples = np.asarray(image)
    return samples if samples.ndim == 3 else samples[..., None]


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return _expect_image(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB through an embedded profile. A profile that does not fit the picture is passed over."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    color = image.convert(image.mode[:-1]) if alpha is not None else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        color = _expect_image(
            ImageCms.profileToProfile(color, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if alpha is not None:
        color.putalpha(alpha)
    return color


def _expect_image(converted: Image.Image | None) -> Image.Image:
    assert converted is not None  # only in-place conversion returns None
    return converted


def _transposed(image: Image.Image) -> Image.Image:
    """Turned upright by EXIF. (Pillow has already applied a TIFF's orientation; damaged EXIF says nothing.)"""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is a TIFF in itself, and as often damaged
        return image


def _upright(samples: np.ndarray, image: Image.Image) -> np.ndarray:
    """`samples` turned as EXIF or the TIFF tag says, unless loading the image has already done it."""
    if image.format == "TIFF" and samples.dtype == np.uint16 and samples.shape[-1] == 1:
        return samples  # decoded by Pillow, which has turned it
    try:
        orientation = image.getexif().get(274, 1)
    except Exception:  # damaged EXIF
        orientation = 1
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


def _lightness_of(samples: np.ndarray, maximum: int) -> Tensor:
    height, width, channels = samples.shape
    if channels == 1:
        values = torch.linspace(0, 1, maximum + 1, dtype=torch.float64).view(1, 1, -1)
        table = lightness(values.expand(3, -1, -1)).flatten().float()
        return table[torch.from_numpy(samples[..., 0].astype(np.int32))][None]
    result = torch.empty(1, height, width)
    for rows in strips(height, width):
        rgb = torch.from_numpy(samples[rows].astype(np.float64) / maximum).permute(2, 0, 1)
        result[:, rows] = lightness(rgb).float()
    return result


def gray_input(lightness_star: Tensor) -> Tensor:
    """x_gray of the method: L* [1, h, w] as sRGB gray, three equal channels in [-1, 1]: [3, h, w]."""
    return (lightness_to_gray(lightness_star).clamp(0, 1) * 2 - 1).expand(3, -1, -1).contiguous()


# ------------------------------------------------------------------ out


def assemble(scan: Scan, chroma: Tensor) -> Picture:
    """The scan's own L* with a*, b* given at working size: the picture at the scan's size and bit depth.

    chroma: [2, h, w]. It is brought to full size along the scan's own edges (`upsample_guided`); the
    gamut costs chroma, never L* (`lock_luminance`).
    """
    maximum = 65535 if scan.bit_depth == 16 else 255
    dtype = np.uint16 if scan.bit_depth == 16 else np.uint8
    height, width = scan.height_px, scan.width_px
    pixels = np.empty((height, width, 3 if scan.alpha is None else 4), dtype)
    small_lightness = resize(scan.lightness, chroma.shape[-2:])
    for rows in strips(height, width):
        l_star = scan.lightness[:, rows]
        full = upsample_guided(chroma, small_lightness, l_star, rows, height)
        rgb = lock_luminance(full.double(), l_star.double()) * maximum
        pixels[rows, :, :3] = rgb.round().permute(1, 2, 0).numpy().astype(dtype)
    if scan.alpha is not None:
        pixels[..., 3] = scan.alpha
    return Picture(pixels)


def resize(image: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize with antialiasing: [C, H, W] to [C, *size]."""
    return torch.nn.functional.interpolate(
        image[None], size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )[0]


def upsample_guided(
    image: Tensor, small_lightness: Tensor, lightness_star: Tensor, rows: slice, height_px: int
) -> Tensor:
    """Joint bilateral upsampling (Kopf et al. 2007) of a strip, the full-size L* as guide.

    image [C, h, w] (chroma, or regions) and small_lightness [1, h, w] at working size;
    lightness_star [1, R, W], the strip `rows` of a picture of `height_px`. Each pixel takes the
    mean of the 4 x 4 samples around it, weighted by nearness and by likeness of L*: colour stops
    where the scan's own edges are.
    At working size = full size it is the identity. Returns [C, R, W].
    """
    h, w = image.shape[-2:]
    width = lightness_star.shape[-1]
    if (h, w) == (height_px, width):
        return image[:, rows]
    y = (torch.arange(rows.start, rows.stop, dtype=image.dtype) + 0.5) * h / height_px - 0.5
    x = (torch.arange(width, dtype=image.dtype) + 0.5) * w / width - 0.5
    total = torch.zeros((len(image), *lightness_star.shape[-2:]), dtype=image.dtype)
    weight = torch.zeros_like(lightness_star)
    for dy in range(-1, 3):
        yi = y.floor().long() + dy
        for dx in range(-1, 3):
            xi = x.floor().long() + dx
            near = torch.exp(-((y - yi)[:, None] ** 2 + (x - xi)[None] ** 2) / 1.0)
            rows_in, columns_in = yi.clamp(0, h - 1), xi.clamp(0, w - 1)
            guide = small_lightness[:, rows_in][:, :, columns_in]
            like = torch.exp(-((guide - lightness_star) ** 2) / (2 * 5.0**2)) + 1e-4
            total += near * like * image[:, rows_in][:, :, columns_in]
            weight += near * like
    return total / weight
