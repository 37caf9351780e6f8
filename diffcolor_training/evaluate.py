"""Does a model obey its words? `python -m diffcolor_training.evaluate --num 40 --seed 7`.

Fresh scenes get new colours and a caption that names them. The gray scene is coloured under that caption
with the preset `demo`, but with nothing fitted. Every region (object, table, wall) is scored by the
named hue nearest to the median a*, b* of its eroded mask. The swap test exchanges the two objects'
colours in the caption and passes if both pictures have both objects right.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from diffcolor_core.colorizer import DiffColor
from diffcolor_core.config import Settings, preset
from diffcolor_core.models import load_checkpoint
from diffcolor_scans.images import Picture
from diffcolor_study.about import about
from diffcolor_study.pictures import picture_of
from diffcolor_study.scenes import (
    Scene,
    SceneSpec,
    asked_colors,
    caption,
    draw_scene,
    objects_swapped,
    recolored,
    render,
)
from diffcolor_study.scores import region_colors


def without_fit(settings: Settings) -> Settings:
    """The settings with every optimisation off: what remains is the model and its sampling."""
    fields = settings.model_dump()
    fields["stage1"]["enabled"] = False
    fields["stage2"] |= {"embedding_steps": 0, "model_steps": 0, "keep_unchanged": False}
    return Settings.model_validate(fields)


def draw_pictures(pipe: DiffColor, scene: Scene, specs: list[SceneSpec], seed: int) -> list[Picture]:
    """The gray scene coloured by the caption of each of `specs`, without a fit."""
    gray = picture_of(scene.gray.expand(3, -1, -1)).encode_png()
    fit = pipe.fit(gray, caption(scene.spec, colors=False), seed=seed)
    return [result.image for result in pipe.recolor(fit, [caption(spec) for spec in specs])]


def evaluate(pipe: DiffColor, num: int, seed: int) -> dict[str, Any]:
    """Shares of objects, tables, walls and regions with the colour asked for, and of swaps with both objects right."""
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
    figures |= {"region_accuracy": sum(every) / len(every), "swap_both_right": sum(both) / len(both)}
    return {"scenes": num, "seed": seed, **figures}


def main(
    model: Annotated[str, typer.Option(help="The model to test.")] = "demo",
    num: Annotated[int, typer.Option(help="Number of scenes for each seed.")] = 40,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of scenes, colours and noise; repeatable.")] = None,
    regional: Annotated[
        bool, typer.Option(help="Generate each noun's region under its own colour word, as the preset does.")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Print region accuracy and the result of the swap test as JSON."""
    settings = without_fit(preset("demo"))
    stage2 = settings.stage2.model_copy(update={"regional_prompts": regional})
    pipe = DiffColor(load_checkpoint(model), settings.model_copy(update={"stage2": stage2}))
    record = {
        "about": {"model": model, "regional": regional, **about("torch", "diffusers", "transformers")},
        "figures": [evaluate(pipe, num, s) for s in seed or [7]],
    }
    print(json.dumps(record, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
