"""Fidelity on colour photographs: each is turned gray, coloured again and compared with its original."""

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffcolor_core.color import lightness_of
from diffcolor_core.colorizer import DiffColor
from diffcolor_core.config import Settings
from diffcolor_core.formats import encode
from diffcolor_core.images import Picture, gray_input, read_picture, read_scan, resize
from diffcolor_core.metrics import colorfulness
from diffcolor_core.models import Checkpoint
from diffcolor_study.methods import chosen_methods
from diffcolor_study.perceptual import Perceptual
from diffcolor_study.pictures import picture_of, rgb_of
from diffcolor_study.runner import Scores, judged


def run_photographs(
    checkpoint: Checkpoint,
    settings: Settings,
    photos: Path,
    *,
    methods: Iterable[str],
    num: int,
    seed: int,
    folder: Path,
    longest_px: int = 512,
    judge: Checkpoint | None = None,
    perceptual: Perceptual | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Scores]:
    """Scores per method and figure over the first `num` photographs in `photos`/catalog.csv.

    The catalog's columns are image, context_prompt and, optionally, target_prompt. Each photograph is
    first reduced so that its longer side is at most `longest_px`. judge: a checkpoint whose CLIP guided
    no method. perceptual: adds lpips, fid and kid. Raises ValueError for a catalog without these columns
    and for an unknown method.
    """
    with (photos / "catalog.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:num]
    if not rows or not {"image", "context_prompt"} <= rows[0].keys():
        raise ValueError(
            f"{photos / 'catalog.csv'} needs rows with the columns image and context_prompt (target_prompt is optional)"
        )
    chosen = chosen_methods(methods)
    figures: dict[str, Scores] = {name: {} for name in chosen}
    done = 0
    for row in rows:
        truth = _reduced(read_picture(photos / row["image"]), longest_px)
        gray = encode(_gray_of(truth), "png")
        place = folder / "photographs" / Path(row["image"]).stem
        place.mkdir(parents=True, exist_ok=True)
        truth.save(place / "truth.png")
        for name, method in chosen.items():
            pipe = DiffColor(checkpoint, method.derive(settings))
            target = row.get("target_prompt") or None
            context = target if method.fit_on_target and target else row["context_prompt"]
            fit = pipe.fit(gray, context, seed=seed)
            result = pipe.recolor(fit, None if method.fit_on_target else target)
            result.image.save(place / f"{name}.png")
            saved = read_picture(place / f"{name}.png")
            scores = fidelity(truth, saved)
            if judge is not None:
                scores |= judged(judge, saved, target or context, context, pipe.settings.stage1.anti_color_prompts)
            if perceptual is not None:
                scores["lpips"] = perceptual.distance(rgb_of(saved), rgb_of(truth))
            for figure, value in scores.items():
                figures[name].setdefault(figure, []).append(value)
            done += 1
            progress(name, done, len(rows) * len(chosen))
    if perceptual is not None and len(rows) > 1:
        places = [folder / "photographs" / Path(row["image"]).stem for row in rows]
        truths = [rgb_of(read_picture(place / "truth.png")) for place in places]
        for name in chosen:
            pictures = [rgb_of(read_picture(place / f"{name}.png")) for place in places]
            figures[name] |= {key: [value] for key, value in perceptual.set_distances(truths, pictures).items()}
    return figures


def fidelity(truth: Picture, picture: Picture) -> dict[str, float]:
    """PSNR (dB) and SSIM of sRGB, SSIM of L*, colourfulness, and its distance to the truth's as a share of that."""
    x, y = rgb_of(picture)[None], rgb_of(truth)[None]
    ssim = structural_similarity_index_measure(x, y, data_range=1.0)
    ssim_l = structural_similarity_index_measure(lightness_of(x) / 100, lightness_of(y) / 100, data_range=1.0)
    psnr = float(peak_signal_noise_ratio(x, y, data_range=1.0))
    own, true = colorfulness(picture), colorfulness(truth)
    assert isinstance(ssim, Tensor)
    assert isinstance(ssim_l, Tensor)
    return {
        "psnr": psnr if math.isfinite(psnr) else 100.0,
        "ssim": float(ssim),
        "ssim_l": float(ssim_l),
        "colorfulness": own,
        "colorfulness_distance": abs(own - true) / max(true, 1e-6),
    }


def _reduced(picture: Picture, longest_px: int) -> Picture:
    rgb = torch.from_numpy(np.array(picture.to_pil().convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = min(1.0, longest_px / max(rgb.shape[-2:]))
    return picture_of(resize(rgb, (round(rgb.shape[-2] * scale), round(rgb.shape[-1] * scale))))


def _gray_of(picture: Picture) -> Picture:
    return picture_of((gray_input(read_scan(encode(picture, "png")).lightness) + 1) / 2)
