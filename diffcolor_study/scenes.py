"""Rendered scenes: shaded objects on a table before a wall, with masks, true colours and captions.

L* and hue are drawn independently of each other. The gray picture therefore says nothing about the
colours: a model can take them only from the prompt or from its own prior.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcolor_scans.color import fit_gamut, lab_to_srgb, lightness_of, lightness_to_gray

HUES = {"red": 32.0, "yellow": 95.0, "green": 142.0, "turquoise": 200.0, "blue": 280.0, "purple": 322.0}
NEUTRALS = ("black", "gray", "white")
COLOR_WORDS = (*HUES, *NEUTRALS)
OBJECT_KINDS = ("ball", "box", "cone", "bottle", "bowl", "vase")
STYLES = ("photo", "grayscale", "scratched", "brownish")

LIGHTNESS_RANGE = (36.0, 78.0)  # every hue reaches a chroma of 25 within it
REFERENCE_CHROMA = 36.0  # of the reference colours that `nearest_color` compares with


@dataclass(frozen=True)
class Region:
    """One thing that a caption names: its noun, its colour (as a word and in numbers) and its place."""

    noun: str
    color: str
    lightness: float
    """Base L*, before shading."""
    hue_degrees: float
    chroma: float
    center_x: float = 0.5
    base_y: float = 1.0
    width: float = 1.0
    height: float = 1.0
    """Centre, base line and extent, as fractions of the picture's side."""


@dataclass(frozen=True)
class SceneSpec:
    """Everything that determines a rendered picture. `objects` are in the caption's order."""

    objects: tuple[Region, ...]
    table: Region
    wall: Region
    horizon_y: float
    light_x: float
    """Direction of the light: -1 from the left, 1 from the right."""
    style: str
    noise_seed: int

    @property
    def regions(self) -> tuple[Region, ...]:
        """Objects, table, wall: the order of the masks and of the caption's phrases."""
        return (*self.objects, self.table, self.wall)


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    rgb: [3, H, W] sRGB in [0, 1]. gray: [1, H, W], the sRGB gray of the same L*.
    masks: [R, H, W] in [0, 1], the coverage of each region of `spec.regions`, summing to 1.
    """

    spec: SceneSpec
    rgb: Tensor
    gray: Tensor
    masks: Tensor


# ------------------------------------------------------------------ drawing a scene's parameters


def draw_color(rng: np.random.Generator, base_lightness: float, *, neutral_share: float = 0.14) -> dict[str, object]:
    """Draw a colour word with its hue (degrees) and chroma.

    A hue is independent of L*; a neutral's word (black, gray, white) follows from it.
    """
    if rng.random() < neutral_share:
        word = "white" if base_lightness > 68 else "black" if base_lightness < 45 else "gray"
        word = "gray" if rng.random() < 0.3 else word
        return {"color": word, "hue_degrees": float(rng.uniform(0, 360)), "chroma": float(rng.uniform(0, 3))}
    word = str(rng.choice(list(HUES)))
    return {
        "color": word,
        "hue_degrees": HUES[word] + float(rng.uniform(-5, 5)),
        "chroma": float(rng.uniform(36, 62)),
    }


def _draw_region(rng: np.random.Generator, noun: str, **placement: float) -> Region:
    base = float(rng.uniform(*LIGHTNESS_RANGE))
    return Region(noun=noun, lightness=base, **draw_color(rng, base), **placement)  # type: ignore[arg-type]


def draw_scene(rng: np.random.Generator, *, num_objects: int | None = None, style: str | None = None) -> SceneSpec:
    """Draw a scene: 85% have two objects (of different kinds), 9% one of the anti-colour styles."""
    if num_objects is None:
        num_objects = 2 if rng.random() < 0.85 else 1
    if style is None:
        style = str(rng.choice(STYLES, p=(0.91, 0.04, 0.025, 0.025)))
    horizon = float(rng.uniform(0.42, 0.58))
    kinds = rng.choice(OBJECT_KINDS, size=num_objects, replace=False)
    centers = [rng.uniform(0.35, 0.65)] if num_objects == 1 else [rng.uniform(0.22, 0.31), rng.uniform(0.69, 0.78)]
    objects = [
        _draw_region(
            rng,
            str(kind),
            center_x=float(center),
            base_y=float(rng.uniform(max(0.76, horizon + 0.22), 0.95)),
            width=float(rng.uniform(0.37, 0.44)),
            height=float(rng.uniform(0.95, 1.15)),
        )
        for kind, center in zip(kinds, centers, strict=True)
    ]
    rng.shuffle(objects)
    return SceneSpec(
        objects=tuple(objects),
        table=_draw_region(rng, "table"),
        wall=_draw_region(rng, "wall"),
        horizon_y=horizon,
        light_x=float(rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)),
        style=style,
        noise_seed=int(rng.integers(2**31)),
    )


def recolored(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec:
    """The same scene with another colour word for every region."""

    def other(region: Region) -> Region:
        while True:
            color = draw_color(rng, region.lightness)
            if color["color"] != region.color:
                return replace(region, **color)  # type: ignore[arg-type]

    return replace(spec, objects=tuple(other(o) for o in spec.objects), table=other(spec.table), wall=other(spec.wall))


def objects_swapped(spec: SceneSpec) -> SceneSpec:
    """The same scene with its two objects' colours exchanged; a scene of one object is returned unchanged."""
    if len(spec.objects) != 2:
        return spec
    colors: list[dict[str, Any]] = [
        {"color": o.color, "hue_degrees": o.hue_degrees, "chroma": o.chroma} for o in reversed(spec.objects)
    ]
    one, two = spec.objects
    return replace(spec, objects=(replace(one, **colors[0]), replace(two, **colors[1])))


# ------------------------------------------------------------------ captions


def caption(spec: SceneSpec, *, colors: bool | tuple[bool, ...] = True, rng: np.random.Generator | None = None) -> str:
    """Describe a scene.

    colors: whether the colour words are given, for all regions or for each. rng: varies the wording;
    without it the caption reads "a red ball and a blue box on a green table before a yellow wall".
    The anti-colour styles are named ("a grayscale photograph of ...") and get no colour words.
    """
    given = (colors,) * len(spec.regions) if isinstance(colors, bool) else colors
    if spec.style != "photo":
        given = (False,) * len(spec.regions)
    phrases = [
        f"a {region.color} {region.noun}" if show else f"a {region.noun}"
        for region, show in zip(spec.regions, given, strict=True)
    ]
    *things, table, wall = phrases
    joint = "before" if rng is None else str(rng.choice(("before", "in front of")))
    joined = f"{' and '.join(things)} on {table} {joint} {wall}"
    prefix = {
        "photo": ("", "") if rng is None else ("", "a photograph of "),
        "grayscale": ("a grayscale photograph of ", "a grayscale photograph, "),
        "scratched": ("a picture with scratches, ", "a picture with scratches of "),
        "brownish": ("brownish average colors for objects, ", "brownish average colors for "),
    }[spec.style]
    return prefix[0 if rng is None else int(rng.random() < 0.4)] + joined


# ------------------------------------------------------------------ rendering


@lru_cache(maxsize=1)
def _gamut_table() -> Tensor:
    """Largest chroma in sRGB for each whole degree of hue and whole L*: [360, 101]."""
    hue = torch.deg2rad(torch.arange(360.0))
    lab = torch.stack(
        (
            torch.arange(101.0).expand(360, 101),
            (140 * hue.cos())[:, None].expand(360, 101),
            (140 * hue.sin())[:, None].expand(360, 101),
        )
    )
    return fit_gamut(lab)[1:].norm(dim=0)


def _profile(kind: str, t: np.ndarray) -> np.ndarray:
    """Half the width of a solid of revolution at height t (0 base, 1 top), as a fraction of its full width."""
    if kind == "cone":
        return 0.5 * (1 - t) + 0.02
    if kind == "bottle":
        return np.where(t < 0.55, 0.36, np.where(t < 0.72, 0.36 - 0.24 * (t - 0.55) / 0.17, 0.12))
    if kind == "bowl":
        return 0.22 + 0.30 * np.sqrt(np.clip(t, 0, 1))
    if kind == "vase":
        return 0.30 + 0.15 * np.sin(2 * math.pi * (0.95 * t + 0.02))
    raise AssertionError(kind)


_HEIGHT = {"ball": 1.0, "box": 0.95, "cone": 1.25, "bottle": 1.55, "bowl": 0.62, "vase": 1.3}


def _draw_object(region: Region, x: np.ndarray, y: np.ndarray, light_x: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the object covers each sample point (x, y in [0, 1]), and how its shading changes L* there."""
    width = region.width
    height = width * _HEIGHT[region.noun] * region.height
    u = (x - region.center_x) / width  # -0.5 .. 0.5 over the object's width
    t = (region.base_y - y) / height  # 0 .. 1 from base to top
    if region.noun == "ball":
        v = t - 0.5
        inside = u**2 + v**2 <= 0.25
        normal_z = np.sqrt(np.clip(0.25 - u**2 - v**2, 0, None)) * 2
        shade = 24 * (2 * (u * light_x + v * 0.5) * 0.6 + normal_z * 0.7 - 0.55)
        return inside, shade
    if region.noun == "box":
        side = 0.3 * width * (1 if light_x > 0 else -1)
        top = (t > 0.75) & (t <= 1.0)
        slant = np.where(top, (t - 0.75) / 0.25 * 0.2, 0)
        front = (np.abs(u) <= 0.5) & (t >= 0) & (t <= 0.75)
        lid = top & (np.abs(u - slant * np.sign(side)) <= 0.5 - slant * 0.35)
        flank = front & (u * np.sign(side) > 0.28)
        return front | lid, np.where(lid, 9.0, np.where(flank, 4.0, -6.0))
    half = _profile(region.noun, np.clip(t, 0, 1))
    inside = (t >= 0) & (t <= 1) & (np.abs(u) <= half)
    around = np.clip(u / np.maximum(half, 1e-6), -1, 1)
    shade = 20 * (around * light_x * 0.6 + np.sqrt(1 - around**2) * 0.6 - 0.5)
    return inside, shade


def _layout(spec: SceneSpec, side: int) -> tuple[np.ndarray, np.ndarray]:
    """For side x side sample points: the index of their region, and how light and shadow change L* there."""
    x, y = np.meshgrid((np.arange(side) + 0.5) / side, (np.arange(side) + 0.5) / side)
    on_table = y > spec.horizon_y
    ids = np.where(on_table, len(spec.objects), len(spec.objects) + 1)
    spot = np.exp(-(((x - 0.5 - 0.3 * spec.light_x) / 0.5) ** 2 + ((y - 0.2) / 0.5) ** 2))
    delta = np.where(on_table, 8 * (y - spec.horizon_y) - 3, 10 * spot - 5)
    for thing in spec.objects:  # contact shadows
        ellipse = ((x - thing.center_x + 0.06 * spec.light_x) / (0.62 * thing.width)) ** 2
        ellipse = ellipse + ((y - thing.base_y) / 0.055) ** 2
        delta = delta - np.where(on_table, 14 * np.exp(-(ellipse**2)), 0)
    order = sorted(range(len(spec.objects)), key=lambda i: spec.objects[i].base_y)
    for index in order:  # painter's algorithm: nearer objects stand lower in the picture
        inside, shade = _draw_object(spec.objects[index], x, y, spec.light_x)
        ids = np.where(inside, index, ids)
        delta = np.where(inside, shade, delta)
    return ids, delta


def region_cells(spec: SceneSpec, cells: int) -> np.ndarray:
    """The index in `spec.regions` of the region at the centre of each cell: uint8 [cells, cells]."""
    return _layout(spec, cells)[0].astype(np.uint8)


def render(spec: SceneSpec, size_px: int = 64) -> Scene:
    """Render a scene as a square picture of side `size_px`."""
    fine = size_px * 2  # 2 x 2 samples per pixel
    noise = np.random.default_rng(spec.noise_seed)
    ids, delta = _layout(spec, fine)

    def by_region(name: str) -> np.ndarray:
        return np.array([getattr(region, name) for region in spec.regions], dtype=np.float32)[ids]

    grain = noise.normal(0, 0.8, (fine, fine))
    l_star = torch.from_numpy(np.clip(by_region("lightness") + delta + grain, 4, 96).astype(np.float32))
    hue_degrees = torch.from_numpy(by_region("hue_degrees")) % 360
    hue = torch.deg2rad(hue_degrees)
    chroma = torch.from_numpy(by_region("chroma"))
    limit = _gamut_table()[hue_degrees.long() % 360, l_star.long()]
    chroma = torch.minimum(chroma, 0.97 * limit)
    lab = torch.stack((l_star, chroma * hue.cos(), chroma * hue.sin()))
    rgb = torch.nn.functional.avg_pool2d(lab_to_srgb(lab).clamp(0, 1)[None], 2)[0]
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(ids), len(spec.regions)).permute(2, 0, 1).float()
    masks = torch.nn.functional.avg_pool2d(one_hot[None], 2)[0]
    rgb = _apply_style(rgb, spec.style, noise)
    return Scene(spec=spec, rgb=rgb, gray=lightness_to_gray(lightness_of(rgb)).clamp(0, 1), masks=masks)


def _apply_style(rgb: Tensor, style: str, noise: np.random.Generator) -> Tensor:
    gray = lightness_to_gray(lightness_of(rgb)).clamp(0, 1).expand_as(rgb)
    if style == "photo":
        return rgb
    if style == "brownish":
        l_star = lightness_of(rgb)
        brown = torch.cat((l_star, torch.full_like(l_star, 9.0), torch.full_like(l_star, 17.0)))
        return lab_to_srgb(fit_gamut(brown)).clamp(0, 1)
    if style == "grayscale":
        return gray
    scratched = gray.clone()
    side = rgb.shape[-1]
    for _ in range(int(noise.integers(4, 10))):
        column = noise.uniform(0, side) + np.cumsum(noise.normal(0, 0.25, side))
        rows = np.arange(side)[(column >= 0) & (column < side)]
        rows = rows[: int(noise.integers(side // 2, side))]
        scratched[:, rows, column[rows].astype(int)] = float(noise.choice((0.02, 0.97)))
    return scratched


# ------------------------------------------------------------------ reading colours back


def reference_colors() -> dict[str, tuple[float, float]]:
    """a*, b* of each hue and of "neutral". Black, gray and white share the origin: only L* tells them apart."""
    named = {
        word: (REFERENCE_CHROMA * math.cos(math.radians(h)), REFERENCE_CHROMA * math.sin(math.radians(h)))
        for word, h in HUES.items()
    }
    return {**named, "neutral": (0.0, 0.0)}


def nearest_color(a: float, b: float) -> str:
    """The word whose reference colour is nearest to a*, b*: one of HUES, or "neutral"."""
    references = reference_colors()
    return min(references, key=lambda word: math.dist((a, b), references[word]))


def asked_colors(spec: SceneSpec) -> list[str]:
    """For each region the word that its caption gives it, with "neutral" for black, gray and white."""
    return ["neutral" if region.color in NEUTRALS else region.color for region in spec.regions]
