"""Does alignment (equation 4) save colour edges where the generated structure has drifted?

python -m benchmarks.drift --json benchmarks/results/drift.json --figure docs/drift.png      (2 minutes)

1. Known drift: a scene is moved sideways by some pixels, colours and structure together. Alignment brings
   its colours back; the error is the mean Delta E_ab of a*b* against the truth.
2. Natural drift: pictures are generated from strong noise without luminance projection. The error is the
   share of pixels within 3 px of a region's border whose nearest named colour is not the one asked for.
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.alignment import align_chroma
from diffcolor_core.config import AlignmentSettings, SamplingSettings
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.sampling import generate
from diffcolor_scans.color import lab_to_srgb, lightness_of, lock_luminance, srgb_to_lab
from diffcolor_study.cases import Case, draw_cases
from diffcolor_study.scenes import Scene, nearest_color
from support.record import record

matplotlib.use("agg")
import matplotlib.pyplot as plt

ALIGNMENTS = {
    "none": AlignmentSettings(enabled=False),
    "unet": AlignmentSettings(radius=2),
}


def main(
    num: Annotated[int, typer.Option(help="Number of scenes.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of scenes, prompts and noise.")] = 11,
    strength: Annotated[float, typer.Option(help="Starting noise of the natural drift, 0 to 1.")] = 0.9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the case that alignment helped most, as PNG.")] = None,
) -> None:
    """Measure both kinds of drift and record the figures."""
    checkpoint = load_checkpoint("demo")
    known: dict[str, dict[str, list[float]]] = {name: {} for name in ALIGNMENTS}
    as_it_comes: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
    gains: list[tuple[float, list[Tensor]]] = []
    for number, case in enumerate(draw_cases("full-prompt", num, seed, checkpoint.native_size_px)):
        scene = case.scene
        for pixels in (0, 2, 4, 6, 8):
            moved = srgb_to_lab(torch.roll(scene.rgb, pixels, dims=2))
            for name, chroma in aligned(checkpoint, scene, moved, seed).items():
                difference = (chroma - srgb_to_lab(scene.rgb)[1:])[..., 8:]  # columns 0 to 7 rolled in from the right
                error = difference.norm(dim=0).mean()
                known[name].setdefault(f"{pixels} px", []).append(float(error))
        x = generated(checkpoint, case, strength, seed + number)
        chromas = aligned(checkpoint, scene, x, seed)
        wrong = {name: wrong_at_borders(case, chroma) for name, chroma in chromas.items()}
        for name, share in wrong.items():
            as_it_comes[name].append(share)
        pictures = [lock_luminance(chromas[name], srgb_to_lab(scene.rgb)[:1]) for name in ("none", "unet")]
        gains.append((wrong["none"] - wrong["unet"], [scene.gray.expand(3, -1, -1), lab_to_srgb(x), *pictures]))
    figures = {
        "known_drift_delta_e": {n: {px: float(np.mean(v)) for px, v in row.items()} for n, row in known.items()},
        "wrong_at_borders": {name: float(np.mean(values)) for name, values in as_it_comes.items()},
        "wrong_at_borders_best_case": max(gains, key=lambda gain: gain[0])[0],
        "scenes": num,
        "seed": seed,
        "strength": strength,
    }
    record(json_file, "drift", figures, "torch", "diffusers")
    if figure is not None:
        draw(max(gains, key=lambda gain: gain[0])[1], figure)


def aligned(checkpoint: Checkpoint, scene: Scene, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The chroma of x, L*a*b* [3, h, w], brought to the scene's structure, with each of ALIGNMENTS."""
    lightness = lightness_of(scene.rgb)
    return {
        name: align_chroma(checkpoint, lightness, x, settings, torch.Generator().manual_seed(seed))
        for name, settings in ALIGNMENTS.items()
    }


def generated(checkpoint: Checkpoint, case: Case, strength: float, seed: int) -> Tensor:
    """The gray scene coloured under the full prompt without luminance projection: L*a*b* [3, h, w]."""
    z = checkpoint.encode((case.scene.gray.expand(3, -1, -1) * 2 - 1)[None])
    sampling = SamplingSettings(num_steps=16, strength=strength, project_luminance=False)
    embeds = checkpoint.encode_prompts([case.prompt or ""])
    star = srgb_to_lab(case.scene.rgb)[:1]
    generator = torch.Generator().manual_seed(seed)
    return generate(checkpoint, checkpoint.unet, z, embeds, star, sampling, generator)[0]


def wrong_at_borders(case: Case, chroma: Tensor, width: int = 3) -> float:
    """Share of the pixels within `width` px of their region's border that do not have the colour asked for."""
    wrong: list[bool] = []
    for word, mask in zip(case.asked, case.scene.masks, strict=True):
        inner = -F.max_pool2d(-mask[None, None], 2 * width + 1, stride=1, padding=width)[0, 0] > 0.99
        rim = (mask > 0.99) & ~inner
        wrong += [nearest_color(a, b) != word for a, b in chroma[:, rim].T.tolist()]
    return sum(wrong) / len(wrong)


def draw(pictures: list[Tensor], path: Path) -> None:
    """Draw the scan, the generated picture, and its colours on the scan without and with alignment."""
    titles = ("scan", "generated", "its colours, not aligned", "aligned")
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.5))
    for axis, title, x in zip(axes, titles, pictures, strict=True):
        axis.imshow(x.clamp(0, 1).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
