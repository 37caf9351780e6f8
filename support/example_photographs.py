"""Write photographs for `make demo`: `python -m support.example_photographs out/demo/photographs out/demo/truth`.

They are those of scikit-image's own package that are in the public domain or CC0: in gray into the first folder, as an
archive without captions, and with their colours into the second.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from skimage import data

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "retina")


def main(
    archive: Annotated[Path, typer.Argument(help="Folder for the gray photographs.")],
    truth: Annotated[Path, typer.Argument(help="Folder for the same in their own colours.")],
) -> None:
    """Write the photographs, those that are there already too."""
    for folder in (archive, truth):
        folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        image = Image.fromarray(np.asarray(getattr(data, name)()))
        image.thumbnail((640, 640), Image.Resampling.LANCZOS)
        image.save(truth / f"{name}.png")
        image.convert("L").save(archive / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
