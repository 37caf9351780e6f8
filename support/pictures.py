"""Small gray pictures, and an archive of them."""

from pathlib import Path

import numpy as np
from PIL import Image


def gray_picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A smooth gray gradient with one edge and some noise: uint8 [H, W]."""
    rng = np.random.default_rng(seed)
    x = np.linspace(40, 200, width)[None] + np.linspace(0, 40, height)[:, None]
    x[:, width // 2 :] *= 0.6
    return (x + rng.normal(0, 2, x.shape)).clip(0, 255).astype(np.uint8)


def make_archive(folder: Path, num_images: int) -> Path:
    """`num_images` small scans and one broken file, with a catalog that gives the first scan two target prompts."""
    folder.mkdir(parents=True)
    lines = ["image,context_prompt,target_prompt"]
    for number in range(num_images):
        Image.fromarray(gray_picture(seed=number)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,a ball on a table,a red ball on a green table")
    lines.append("0.png,a ball on a table,a blue ball on a green table")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    lines.append("broken.jpg,a cone on a table,")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n")
    return folder
