"""Plot a bundled model's loss curves: `python -m diffcolor_training.plot_losses CHECKPOINTS OUT.png`."""

import csv
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("agg")
import matplotlib.pyplot as plt

PARTS = {
    "vae": "VAE: squared error",
    "prior": "colour prior: squared error",
    "regions": "noun regions: cross entropy",
    "clip": "guidance CLIP: cross entropy",
    "unet": "UNet: v error",
}


def main(
    checkpoints: Annotated[Path, typer.Argument(help="Folder with the .losses.csv files that training writes.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
) -> None:
    """Draw one panel for each part that has a curve."""
    parts = {part: title for part, title in PARTS.items() if (checkpoints / f"{part}.losses.csv").exists()}
    figure, axes = plt.subplots(1, len(parts), figsize=(2.8 * len(parts), 2.8))
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        with (checkpoints / f"{part}.losses.csv").open() as file:
            curve = {int(step): float(loss) for step, loss, _ in csv.reader(file)}  # a resumed step counts once
        steps = sorted(curve)
        axis.plot(steps, [curve[step] for step in steps])
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    typer.run(main)
