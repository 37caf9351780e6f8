"""Write the sample archive: `python -m diffcolor_training.sample_archive examples/archive`.

The archive holds gray renderings: PNGs, a sepia-toned JPEG and a 16-bit TIFF. Its catalog says what
each picture shows and which colours to give; the first two pictures have two target prompts.
"""

import csv
from pathlib import Path
from typing import Annotated

import numpy as np
import tifffile
import torch
import typer
from PIL import Image

from diffcolor_scans.color import fit_gamut, lab_to_srgb, lightness_of, lightness_to_gray
from diffcolor_study.scenes import Scene, caption, draw_scene, recolored, render


def _write(scene: Scene, path: Path) -> None:
    if path.suffix == ".tif":
        l_star = lightness_of(scene.rgb.double())
        samples = (lightness_to_gray(l_star)[0] * 65535).round().numpy().astype(np.uint16)
        tifffile.imwrite(path, samples, photometric="minisblack", compression="zlib")
    elif path.suffix == ".jpg":
        l_star = lightness_of(scene.rgb)
        sepia = torch.cat((l_star, torch.full_like(l_star, 6.0), torch.full_like(l_star, 14.0)))
        pixels = (lab_to_srgb(fit_gamut(sepia)).clamp(0, 1) * 255).round().byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=92)
    else:
        Image.fromarray((scene.gray[0] * 255).round().byte().numpy()).save(path)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    num: Annotated[int, typer.Option(help="Number of pictures.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of scenes and colours.")] = 2026,
) -> None:
    """Write `num` pictures and their catalog."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with (out / "catalog.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "context_prompt", "target_prompt"))
        for number in range(num):
            spec = draw_scene(rng, num_objects=2, style="photo")
            suffix = {num - 2: ".jpg", num - 1: ".tif"}.get(number, ".png")
            things = "-and-".join(thing.noun for thing in spec.objects)
            path = out / f"{number + 1:02d}-{things}{suffix}"
            _write(render(spec, 256 if suffix == ".png" else 320), path)
            for _ in range(2 if number < 2 else 1):
                spec = recolored(spec, rng)
                writer.writerow((path.name, caption(spec, colors=False), caption(spec)))


if __name__ == "__main__":
    typer.run(main)
