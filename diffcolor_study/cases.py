"""The questions put to a method: gray scenes with prompts whose colours are unrelated to the truth."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffcolor_scans.color import lab_to_srgb, max_chroma
from diffcolor_scans.images import Picture
from diffcolor_study.pictures import picture_of
from diffcolor_study.scenes import (
    Scene,
    SceneSpec,
    asked_colors,
    caption,
    draw_color,
    draw_scene,
    recolored,
    render,
)

TASKS = ("automatic", "full-prompt", "edit", "exact")


@dataclass(frozen=True)
class Case:
    """One scene and one question about it.

    gray, truth: the scene in gray and in its own colours, uint8. start: the coloured picture to edit
    (tasks "edit" and "exact"). asked: the colour word wanted for each region, None where any colour will do.
    edited: the index of the region whose colour word changes, from `prompt` to `edited_prompt` or, in
    those tasks, from `start` to `prompt`.
    """

    scene: Scene
    gray: Picture
    truth: Picture
    start: Picture | None
    context_prompt: str
    prompt: str | None
    edited_prompt: str | None
    asked: tuple[str | None, ...]
    edited: int | None


def draw_cases(task: str, num: int, seed: int, size_px: int) -> Iterator[Case]:
    """Draw `num` scenes of two objects, a table and a wall from `seed`, each `size_px` square.

    automatic: the caption names no colours. full-prompt: the context names none, the target names a new
    one for every region. edit: the picture starts in its true colours, and one of the four is to change. exact: the
    same, to a hex code that sRGB can show at the region's lightness.
    Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join(TASKS)}")
    rng = np.random.default_rng(seed)
    for _ in range(num):
        spec = draw_scene(rng, num_objects=2, style="photo")
        scene = render(spec, size_px)
        gray, truth = (picture_of(x) for x in (scene.gray.expand(3, -1, -1), scene.rgb))
        edited = int(rng.integers(len(spec.regions)))
        plain = caption(spec, colors=False)
        if task == "automatic":
            nothing = (None,) * len(spec.regions)
            yield Case(scene, gray, truth, None, plain, None, None, nothing, None)
        elif task == "full-prompt":
            target = recolored(spec, rng)
            again = one_recolored(target, edited, rng)
            asked = tuple(asked_colors(target))
            yield Case(scene, gray, truth, None, plain, caption(target), caption(again), asked, edited)
        elif task == "exact":
            target = _with(spec, edited, color=exact_code(spec.regions[edited].lightness, rng))
            nothing = (None,) * len(spec.regions)
            yield Case(scene, gray, truth, truth, caption(spec), caption(target), None, nothing, edited)
        else:
            target = one_recolored(spec, edited, rng)
            asked = tuple(asked_colors(target))
            yield Case(scene, gray, truth, truth, caption(spec), caption(target), None, asked, edited)


def one_recolored(spec: SceneSpec, index: int, rng: np.random.Generator) -> SceneSpec:
    """The same scene with another colour word for region `index`."""
    region = spec.regions[index]
    color: dict[str, Any] = {"color": region.color}
    while color["color"] == region.color:
        color = draw_color(rng, region.lightness)
    return _with(spec, index, **color)


def _with(spec: SceneSpec, index: int, **changes: Any) -> SceneSpec:
    changed = replace(spec.regions[index], **changes)
    if index < len(spec.objects):
        return replace(spec, objects=tuple(changed if i == index else o for i, o in enumerate(spec.objects)))
    return replace(spec, table=changed) if index == len(spec.objects) else replace(spec, wall=changed)


def exact_code(lightness: float, rng: np.random.Generator) -> str:
    """The hex code of a random hue at a lightness, with as much chroma as sRGB has there, at most 40."""
    hue = float(rng.uniform(0, 360))
    chroma = min(40.0, max_chroma(lightness, hue))
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    rgb = lab_to_srgb(torch.tensor([lightness, a, b], dtype=torch.float64).view(3, 1, 1)).clamp(0, 1).flatten()
    return "#" + "".join(f"{round(255 * float(value)):02x}" for value in rgb)
