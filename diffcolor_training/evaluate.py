"""Does the demo model obey its words? `python -m diffcolor_core.demo.evaluate --num 40 --seed 7`.

Fresh scenes with colours drawn anew; the gray scene is coloured under each caption as the preset
`demo` does it, but with nothing fitted to it, and every region (objects, table, wall) is scored by the
named hue nearest to the median a*, b* of its eroded mask. The swap test asks for two objects' colours
both ways round: both pictures must have both objects right.
"""

import json
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.color import srgb_to_lab
from diffcolor_core.colorizer import DiffColor
from diffcolor_core.config import Settings, preset
from diffcolor_core.demo.scenes import (
    NEUTRALS,
    Scene,
    SceneSpec,
    caption,
    draw_scene,
    nearest_color,
    objects_swapped,
    recolored,
    render,
)
from diffcolor_core.images import Picture
from diffcolor_core.models import load_checkpoint


def picture_of(rgb: Tensor) -> Picture:
    """[3, H, W] in [0, 1] as an 8-bit picture."""
    return Picture((rgb * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def lab_of(picture: Picture) -> Tensor:
    """L*a*b* [3, H, W] of an 8-bit picture."""
    return srgb_to_lab(torch.from_numpy(picture.pixels[..., :3]).permute(2, 0, 1).double() / 255)


def region_colors(picture: Picture, scene: Scene) -> list[str]:
    """The colour word nearest to each region of a picture."""
    lab = lab_of(picture)
    return [nearest_color(*lab[1:, eroded(mask)].median(dim=1).values.tolist()) for mask in scene.masks]


def eroded(mask: Tensor, radius: int = 1) -> Tensor:
    """Where a mask [H, W] is full all around; the mask itself where nothing would be left."""
    size = 2 * radius + 1
    inner = -F.max_pool2d(-mask[None, None], size, stride=1, padding=radius)[0, 0] > 0.99
    return inner if bool(inner.any()) else mask > 0.5


def asked_colors(spec: SceneSpec) -> list[str]:
    """The colour each region was captioned with; the neutrals are one, since L* tells them apart."""
    return ["neutral" if region.color in NEUTRALS else region.color for region in spec.regions]


def without_fit(settings: Settings) -> Settings:
    """The settings with nothing optimised: what remains is the model, and how it is sampled."""
    fields = settings.model_dump()
    fields["stage1"]["enabled"] = False
    fields["stage2"] |= {"embedding_steps": 0, "model_steps": 0, "keep_unchanged": False}
    return Settings.model_validate(fields)


def draw_pictures(pipe: DiffColor, scene: Scene, specs: list[SceneSpec], seed: int) -> list[Picture]:
    """The gray scene, not fitted, coloured by the caption of each of `specs`."""
    gray = picture_of(scene.gray.expand(3, -1, -1)).encode_png()
    fit = pipe.fit(gray, caption(scene.spec, colors=False), seed=seed)
    return [result.image for result in pipe.recolor(fit, [caption(spec) for spec in specs])]


def evaluate(
    model: Annotated[str, typer.Option(help="Model to test.")] = "demo",
    num: Annotated[int, typer.Option(help="Scenes.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of scenes, colours and noise.")] = 7,
    regional: Annotated[
        bool, typer.Option(help="Each noun's region under its own colour, as the preset has it.")
    ] = True,
) -> None:
    """Print region accuracy and the swap test as JSON."""
    settings = without_fit(preset("demo"))
    stage2 = settings.stage2.model_copy(update={"regional_prompts": regional})
    pipe = DiffColor(load_checkpoint(model), settings.model_copy(update={"stage2": stage2}))
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {"object": [], "table": [], "wall": []}
    both: list[bool] = []
    for number in range(num):
        spec = recolored(draw_scene(rng, num_objects=2, style="photo"), rng)
        while asked_colors(spec)[0] == asked_colors(spec)[1]:
            spec = recolored(spec, rng)
        scene, pair = render(spec, pipe.checkpoint.native_size_px), [spec, objects_swapped(spec)]
        found = [region_colors(picture, scene) for picture in draw_pictures(pipe, scene, pair, seed + number)]
        asked = [asked_colors(s) for s in pair]
        for region, was, wanted in zip(spec.regions, found[0], asked[0], strict=True):
            kind = region.noun if region.noun in right else "object"
            right[kind].append(was == wanted)
        both.append(all(f[:2] == a[:2] for f, a in zip(found, asked, strict=True)))
    every = [r for kind in right.values() for r in kind]
    figures = {f"{kind}_accuracy": sum(r) / len(r) for kind, r in right.items()}
    figures["region_accuracy"] = sum(every) / len(every)
    figures["swap_both_right"] = sum(both) / len(both)
    print(json.dumps({"scenes": num, "seed": seed, "regional": regional, **figures}, indent=2))


if __name__ == "__main__":
    typer.run(evaluate)
