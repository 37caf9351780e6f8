"""Does the demo model obey its words? `python -m diffcolor_core.demo.evaluate --num 40 --seed 7`.

Fresh scenes with colours drawn anew; the gray scene's latent is noised and sampled under each caption
as the preset `demo` does it (`--strength 1` from noise alone), and every region (objects, table, wall)
is scored by the named hue nearest to the median a*, b* of its eroded mask. So that the masks fit the
picture, sampling holds the luminance to the gray scene's: where things stand is given, every colour is
the words'.
"""

import json
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.color import srgb_to_lab
from diffcolor_core.config import SamplingSettings, preset
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
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.sampling import generate


def region_colors(x: Tensor, scene: Scene) -> list[str]:
    """The colour word nearest to each region of a picture [3, H, W] in [-1, 1]."""
    lab = srgb_to_lab((x.clamp(-1, 1) + 1) / 2)
    return [nearest_color(*lab[1:, eroded(mask)].median(dim=1).values.tolist()) for mask in scene.masks]


def eroded(mask: Tensor, radius: int = 1) -> Tensor:
    """Where a mask [H, W] is full all around; the mask itself where nothing would be left."""
    size = 2 * radius + 1
    inner = -F.max_pool2d(-mask[None, None], size, stride=1, padding=radius)[0, 0] > 0.99
    return inner if bool(inner.any()) else mask > 0.5


def asked_colors(spec: SceneSpec) -> list[str]:
    """The colour each region was captioned with; the neutrals are one, since L* tells them apart."""
    return ["neutral" if region.color in NEUTRALS else region.color for region in spec.regions]


def draw_pictures(
    checkpoint: Checkpoint, scene: Scene, prompts: list[str], sampling: SamplingSettings, generator: torch.Generator
) -> Tensor:
    """One picture per prompt, [B, 3, H, W] in [-1, 1], from the noised latent of the gray scene."""
    z = checkpoint.encode((scene.gray.expand(3, -1, -1) * 2 - 1)[None])
    lightness_star = srgb_to_lab(scene.rgb)[:1]
    embeds = checkpoint.encode_prompts(prompts)
    return generate(checkpoint, checkpoint.unet, z, embeds, lightness_star, sampling, generator)


def evaluate(
    model: Annotated[str, typer.Option(help="Model to test.")] = "demo",
    num: Annotated[int, typer.Option(help="Scenes.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of scenes, colours and noise.")] = 7,
    strength: Annotated[float, typer.Option(help="Starting noise level.")] = preset("demo").sampling.strength,
    project: Annotated[bool, typer.Option(help="Luminance projection while sampling.")] = True,
) -> None:
    """Print region accuracy and the swap test as JSON."""
    checkpoint = load_checkpoint(model)
    size = checkpoint.native_size_px
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    changes = {"strength": strength, "project_luminance": project}
    sampling = preset("demo").sampling.model_copy(update=changes)
    right: dict[str, list[bool]] = {"object": [], "table": [], "wall": []}
    both: list[bool] = []
    for _ in range(num):
        spec = recolored(draw_scene(rng, num_objects=2, style="photo"), rng)
        while asked_colors(spec)[0] == asked_colors(spec)[1]:
            spec = recolored(spec, rng)
        scene, pair = render(spec, size), [spec, objects_swapped(spec)]
        x = draw_pictures(checkpoint, scene, [caption(s) for s in pair], sampling, generator)
        found = [region_colors(picture, scene) for picture in x]
        asked = [asked_colors(s) for s in pair]
        for region, was, wanted in zip(spec.regions, found[0], asked[0], strict=True):
            kind = region.noun if region.noun in right else "object"
            right[kind].append(was == wanted)
        both.append(all(f[:2] == a[:2] for f, a in zip(found, asked, strict=True)))
    every = [r for kind in right.values() for r in kind]
    figures = {f"{kind}_accuracy": sum(r) / len(r) for kind, r in right.items()}
    figures["region_accuracy"] = sum(every) / len(every)
    figures["swap_both_right"] = sum(both) / len(both)
    print(json.dumps({"scenes": num, "seed": seed, "strength": strength, **figures}, indent=2))


if __name__ == "__main__":
    typer.run(evaluate)
