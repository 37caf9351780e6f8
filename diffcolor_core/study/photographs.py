"""Fidelity on real colour photographs: turned gray, coloured again, compared with what they were."""

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
from diffcolor_core.study.methods import chosen_methods
from diffcolor_core.study.perceptual import Perceptual
from diffcolor_core.study.runner import Scores, judged


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
    """Scores per method over the first `num` photographs that the catalog.csv in `photos` names.

    Its columns are image, context_prompt, target_prompt (used where given). Each photograph is reduced
    to `longest_px` first. judge: a checkpoint whose CLIP no method was optimised with. perceptual: for
    lpips, fid and kid. Raises ValueError for a catalog without such columns or an unknown method.
    """
    with (photos / "catalog.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:num]
    if not rows or not {"image", "context_prompt"} <= rows[0].keys():
        raise ValueError(f"{photos / 'catalog.csv'} needs rows with the columns image, context_prompt, target_prompt")
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
                scores["lpips"] = perceptual.distance(_unit(saved), _unit(truth))
            for figure, value in scores.items():
                figures[name].setdefault(figure, []).append(value)
            done += 1
            progress(name, done, len(rows) * len(chosen))
    if perceptual is not None and len(rows) > 1:
        places = [folder / "photographs" / Path(row["image"]).stem for row in rows]
        truths = [_unit(read_picture(place / "truth.png")) for place in places]
        for name in chosen:
            pictures = [_unit(read_picture(place / f"{name}.png")) for place in places]
            figures[name] |= {key: [value] for key, value in perceptual.set_distances(truths, pictures).items()}
    return figures


def fidelity(truth: Picture, picture: Picture) -> dict[str, float]:
    """PSNR (dB) and SSIM of sRGB, SSIM of L*, colourfulness and its distance to the truth's as a share of it."""
    x, y = _unit(picture)[None], _unit(truth)[None]
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


def _unit(picture: Picture) -> Tensor:
    return torch.from_numpy(picture.pixels[..., :3]).permute(2, 0, 1).double() / 255


def _picture(rgb: Tensor) -> Picture:
    return Picture((rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _reduced(picture: Picture, longest_px: int) -> Picture:
    rgb = torch.from_numpy(np.array(picture.to_pil().convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = min(1.0, longest_px / max(rgb.shape[-2:]))
    return _picture(resize(rgb, (round(rgb.shape[-2] * scale), round(rgb.shape[-1] * scale))))


def _gray_of(picture: Picture) -> Picture:
    return _picture((gray_input(read_scan(encode(picture, "png")).lightness) + 1) / 2)
