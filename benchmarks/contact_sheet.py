"""One picture of a run: scan, primary and target of each result, with its prompt. Draws docs/demo.jpg.

make demo && python -m benchmarks.contact_sheet out/photographs docs/demo.jpg --truth out/truth     (seconds)
"""

import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from diffcolor_core.color import lightness_to_gray
from diffcolor_core.images import read_scan, resize
from tasks.manifest import query
from tasks.storage import Store

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib import image as mpimg

SQL = """select image_key, input_uri, primary_uri, target_prompt, output_uri from results
         where status = 'ok' order by image_key, target_prompt nulls first"""


def main(
    output: Annotated[str, typer.Argument(help="Folder that `diffcolor run` wrote to.")],
    sheet: Annotated[Path, typer.Argument(help="PNG or JPEG to write.")],
    columns: Annotated[int, typer.Option(help="Results in each line.")] = 2,
    limit: Annotated[int, typer.Option(help="Draw at most this many results.")] = 24,
    truth: Annotated[Path | None, typer.Option(help="Folder of the originals, by the scans' keys.")] = None,
) -> None:
    """Draw the contact sheet."""
    rows = query(Store(output), SQL).fetchall()[:limit]
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, 3 * columns, figsize=(5.6 * columns, 2.35 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (key, input_uri, primary_uri, target, output_uri) in enumerate(rows):
        line, first = number // columns, 3 * (number % columns)
        scan = read_scan(input_uri)
        gray = lightness_to_gray(resize(scan.lightness, (256, max(1, 256 * scan.width_px // scan.height_px))))[0]
        axes[line, first].imshow(gray, cmap="gray", vmin=0, vmax=1)
        axes[line, first].set_title(f"scan: {key[:28]}", fontsize=7)
        axes[line, first + 1].imshow(mpimg.imread(primary_uri))
        axes[line, first + 1].set_title("primary (no colours given)", fontsize=7)
        last, title = (output_uri, target or "") if truth is None else (truth / key, "original")
        axes[line, first + 2].imshow(mpimg.imread(last))
        axes[line, first + 2].set_title("\n".join(textwrap.wrap(title, 42)[:4]), fontsize=6)
    figure.tight_layout()
    figure.savefig(sheet, dpi=100)


if __name__ == "__main__":
    typer.run(main)
