"""Scans in, pictures out: the scan's own L* and size, colours brought to them."""

from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcolor_core.color import lightness, lightness_to_gray, lock_luminance
from diffcolor_core.decoding import SourceMetadata, decode, strips


class DivergedError(RuntimeError):
    """An optimisation that has left the finite numbers."""


def check_finite(*tensors: Tensor) -> None:
    """Raise DivergedError unless every value is a finite number."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DivergedError("the optimisation has diverged to values that are not finite: lower the learning rates")


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
    metadata: SourceMetadata = field(default_factory=SourceMetadata)
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


def read_scan(source: bytes | str | Path) -> Scan:
    """Decode a picture (its first frame or page), turn it upright and take its L*.

    Raises UnreadableImageError, with the decoder's reason, for anything that is not a whole picture
    of at most `MAX_PIXELS` in one of `FORMATS`; FileNotFoundError for a path that is not there.
    """
    samples, maximum, mode, metadata, num_pages = decode(_bytes_of(source))
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
    samples, *_ = decode(_bytes_of(source))
    if samples.shape[-1] <= 2:  # gray
        samples = np.concatenate((np.repeat(samples[..., :1], 3, axis=-1), samples[..., 1:]), axis=-1)
    return Picture(np.array(samples, order="C"))  # a decoder's array may be read-only


def _bytes_of(source: bytes | str | Path) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


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
    gamut costs chroma, never L* (`lock_luminance`). Raises DivergedError for chroma that is not finite.
    """
    check_finite(chroma)
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
