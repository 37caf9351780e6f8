"""Scans in, pictures out: chroma of working size is joined to the scan's own lightness at its own size."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcolor_scans.color import lightness_of, lightness_to_gray, lock_luminance
from diffcolor_scans.decoding import SourceMetadata, decode, strips
from diffcolor_scans.edges import ChromaField


@dataclass(frozen=True)
class Scan:
    """A decoded photograph, upright.

    lightness: [1, H, W] float32, CIE L* in 0..100. alpha: [H, W] uint8 or uint16, or None.
    bit_depth: 8 or 16; the results have the same. mode: the decoder's name for the pixel layout.
    num_pages: pages or frames in the file, of which the first was read.
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
    """A finished picture: `pixels` [H, W, 3 or 4], uint8 or uint16, sRGB, alpha not premultiplied."""

    pixels: np.ndarray

    def encode_png(self) -> bytes:
        """A lossless PNG of the same bit depth. Its bytes depend on the pixels alone."""
        return bytes(imagecodecs.png_encode(self.pixels, level=6))

    def save(self, path: str | Path) -> None:
        """Write a PNG. Raises ValueError if the path does not end in .png."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"cannot write {str(path)!r}: pictures are saved as PNG, so give a name ending in .png")
        Path(path).write_bytes(self.encode_png())

    def to_pil(self) -> Image.Image:
        """An 8-bit Pillow image to show."""
        return Image.fromarray((self.pixels >> 8).astype(np.uint8) if self.pixels.dtype == np.uint16 else self.pixels)


def read_scan(source: bytes | str | Path) -> Scan:
    """Decode a file's first frame or page, turn it upright and take its lightness.

    Raises UnreadableImageError, with the decoder's reason, unless it is a whole picture of at most `MAX_PIXELS`
    in one of `FORMATS`. Raises FileNotFoundError for a path that does not exist.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    samples, maximum, mode, metadata, num_pages = decode(data)
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
    """Decode a file as `read_scan` does, but keep its colours. Raises the same errors."""
    samples, *_ = decode(source if isinstance(source, bytes) else Path(source).read_bytes())
    if samples.shape[-1] <= 2:  # gray
        samples = np.concatenate((np.repeat(samples[..., :1], 3, axis=-1), samples[..., 1:]), axis=-1)
    return Picture(np.array(samples, order="C"))  # a decoder's array may be read-only


def _lightness_of(samples: np.ndarray, maximum: int) -> Tensor:
    height, width, channels = samples.shape
    if channels == 1:
        values = torch.linspace(0, 1, maximum + 1, dtype=torch.float64).view(1, 1, -1)
        table = lightness_of(values.expand(3, -1, -1)).flatten().float()
        return table[torch.from_numpy(samples[..., 0].astype(np.int32))][None]
    result = torch.empty(1, height, width)
    for rows in strips(height, width):
        rgb = torch.from_numpy(samples[rows].astype(np.float64) / maximum).permute(2, 0, 1)
        result[:, rows] = lightness_of(rgb).float()
    return result


def gray_input(lightness: Tensor) -> Tensor:
    """x_gray of the method: lightness [1, h, w] as a gray picture [3, h, w] in [-1, 1]."""
    return (lightness_to_gray(lightness).clamp(0, 1) * 2 - 1).expand(3, -1, -1).contiguous()


def assemble(scan: Scan, chroma: Tensor, *, propagated: bool = False) -> Picture:
    """The scan's own lightness with chroma [2, h, w] of working size: a picture of the scan's size and bit depth.

    The chroma is brought to full size along the scan's edges: solved for anew if `propagated` (`ChromaField`), else
    by `upsample_guided`. Where sRGB cannot show a colour at the scan's lightness, the chroma gives way and the
    lightness does not (`lock_luminance`).
    """
    maximum = 65535 if scan.bit_depth == 16 else 255
    dtype = np.uint16 if scan.bit_depth == 16 else np.uint8
    height, width = scan.height_px, scan.width_px
    pixels = np.empty((height, width, 3 if scan.alpha is None else 4), dtype)
    if propagated:
        enlarged = ChromaField(chroma, scan.lightness).rows
    else:
        enlarged = partial(upsample_guided, chroma, resize(scan.lightness, chroma.shape[-2:]), height_px=height)
    for rows in strips(height, width):
        lightness = scan.lightness[:, rows]
        full = enlarged(rows=rows, guide=lightness)
        rgb = lock_luminance(full.double(), lightness.double()) * maximum
        pixels[rows, :, :3] = rgb.round().permute(1, 2, 0).numpy().astype(dtype)
    if scan.alpha is not None:
        pixels[..., 3] = scan.alpha
    return Picture(pixels)


def resize(image: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize [C, H, W] to [C, *size], bilinear with antialiasing."""
    return torch.nn.functional.interpolate(
        image[None], size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )[0]


def upsample_guided(values: Tensor, small_guide: Tensor, guide: Tensor, rows: slice, height_px: int) -> Tensor:
    """Joint bilateral upsampling (Kopf et al. 2007) of one strip of a picture: [C, R, W].

    values: [C, h, w], chroma or regions at working size. small_guide: [1, h, w], the lightness there. guide:
    [1, R, W], the lightness of the strip `rows` of a picture of `height_px`. Each pixel takes the mean of the
    4 x 4 values around it, weighted by distance and by difference of lightness, so that colour stops at the
    scan's edges. At equal sizes the values are returned as they are.
    """
    h, w = values.shape[-2:]
    width = guide.shape[-1]
    if (h, w) == (height_px, width):
        return values[:, rows]
    y = (torch.arange(rows.start, rows.stop, dtype=values.dtype) + 0.5) * h / height_px - 0.5
    x = (torch.arange(width, dtype=values.dtype) + 0.5) * w / width - 0.5
    top, left = y.floor().long(), x.floor().long()
    near_rows = slice(max(0, int(top[0]) - 1), int(top[-1]) + 3)  # the rows of working size around the strip
    small = torch.cat((small_guide, values))[:, near_rows]  # [1 + C, r, w]
    total = torch.zeros((len(values), *guide.shape[-2:]), dtype=values.dtype)
    weight = torch.zeros_like(guide)
    columns = [left + dx for dx in range(-1, 3)]
    wide = [small[..., column.clamp(0, w - 1)] for column in columns]  # 4 of [1 + C, r, W]
    for dy in range(-1, 3):
        line = top + dy
        for column, source in zip(columns, wide, strict=True):
            around = source.index_select(1, line.clamp(0, h - 1) - near_rows.start)  # [1 + C, R, W]
            weights = around[:1].sub_(guide).square_().div_(-2 * 5.0**2).exp_().add_(1e-4)  # alike in lightness
            weights *= torch.sub(-((y - line)[:, None] ** 2), (x - column)[None] ** 2).exp_()  # and near
            weight += weights
            total += around[1:].mul_(weights)
    return total.div_(weight)
