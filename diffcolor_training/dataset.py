"""Training data of the demo model: scenes are rendered once into a cache, captions drawn anew at each use."""

import multiprocessing
from pathlib import Path

import numpy as np

from diffcolor_study.scenes import HUES, NEUTRALS, SceneSpec, caption, draw_scene, region_cells, render

SIZE_PX = 64


def scene_spec(seed: int, index: int) -> SceneSpec:
    """Scene `index` of data set `seed`. The same two numbers always give the same scene."""
    return draw_scene(np.random.default_rng((seed, index)))


def _render_chunk(job: tuple[int, int, int]) -> np.ndarray:
    import torch

    torch.set_num_threads(1)
    seed, start, stop = job
    pictures = [render(scene_spec(seed, i), SIZE_PX).rgb for i in range(start, stop)]
    return (torch.stack(pictures) * 255).round().byte().numpy()


def cached_pictures(folder: Path, *, seed: int, num_scenes: int, num_processes: int = 2) -> np.ndarray:
    """The rendered scenes as uint8 [N, 3, 64, 64]; rendered once, then read from `folder`."""
    path = folder / f"pictures-{seed}-{num_scenes}.npy"
    if not path.exists():
        chunk = 500
        jobs = [(seed, start, min(start + chunk, num_scenes)) for start in range(0, num_scenes, chunk)]
        with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
            pictures = np.concatenate(pool.map(_render_chunk, jobs, chunksize=1))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pictures)
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def cached_region_cells(folder: Path, *, seed: int, num_scenes: int, cells: int) -> np.ndarray:
    """The index in `spec.regions` of the region at the centre of each latent cell: uint8 [N, cells, cells]."""
    path = folder / f"regions-{seed}-{num_scenes}-{cells}.npy"
    if not path.exists():
        regions = np.stack([region_cells(scene_spec(seed, i), cells) for i in range(num_scenes)])
        partial = path.with_suffix(".partial.npy")
        np.save(partial, regions)
        partial.rename(path)
    return np.load(path)


def draw_caption(spec: SceneSpec, rng: np.random.Generator) -> str:
    """A training caption: 8% have no colour words, in the others each word is kept with probability 0.88."""
    given = rng.random(len(spec.regions)) < (0.88 if rng.random() < 0.92 else 0.0)
    return caption(spec, colors=tuple(bool(g) for g in given), rng=rng)


def swap_colors(text: str, rng: np.random.Generator) -> str:
    """A hard negative: the caption with two different colour words exchanged, or with one replaced.

    A caption without colour words is returned unchanged.
    """
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word in HUES or word in NEUTRALS]
    if not places:
        return text
    first = int(rng.choice(places))
    others = [i for i in places if words[i] != words[first]]
    if others and rng.random() < 0.7:
        second = int(rng.choice(others))
        words[first], words[second] = words[second], words[first]
    else:
        words[first] = str(rng.choice([word for word in HUES if word != words[first]]))
    return " ".join(words)
