"""The study on colour photographs: each is turned gray, coloured again and compared with its original."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffcolor_core.color_terms import FULL_CHROMA, colored_phrases
from diffcolor_core.colorizer import DiffColor
from diffcolor_core.config import Settings
from diffcolor_core.models import Checkpoint
from diffcolor_core.prompts import GENERIC_PROMPT
from diffcolor_scans.color import lightness_of, lock_luminance, max_chroma
from diffcolor_scans.color_names import hue_of
from diffcolor_scans.formats import encode
from diffcolor_scans.images import Picture, gray_input, read_picture, read_scan, resize
from diffcolor_scans.metrics import colorfulness
from diffcolor_study.methods import Method, chosen_methods
from diffcolor_study.perceptual import Perceptual
from diffcolor_study.pictures import lab_of, picture_of, rgb_of
from diffcolor_study.runner import Scores, judged
from diffcolor_study.scores import eroded

TASKS = ("uncaptioned", "automatic", "full-prompt", "edit")
FLAT = {"gray": "the photograph in gray", "flat-tint": "in the mean chroma of the training photographs"}
"""Rivals that need no model."""
TINT_PHOTOS = 300  # so many training photographs give the mean chroma
REGION_HUE = 40.0  # degrees: so near to a word's hue a pixel of the original belongs to the word's region
REGION_SHARE = (0.04, 0.8)  # of the picture, for a region that can be judged
_EDITS = ("red", "yellow", "green", "blue", "purple", "pink", "orange")


@dataclass(frozen=True)
class Photograph:
    """One question: `prompts` are the context and, unless the task is automatic, the target prompt."""

    name: str
    truth: Picture
    gray: bytes
    context: str
    target: str | None


@dataclass(frozen=True)
class Edit:
    """One colour word of a target prompt changed. region: [H, W], where the original has the old colour."""

    prompt: str
    hue_degrees: float
    region: Tensor


def run_photographs(
    checkpoint: Checkpoint,
    settings: Settings,
    photos: Path,
    *,
    task: str,
    methods: Iterable[str],
    num: int,
    seed: int,
    folder: Path,
    longest_px: int = 512,
    judge: Checkpoint | None = None,
    perceptual: Perceptual | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Scores]:
    """Scores per method and figure over `num` photographs of `photos`/catalog.csv, spread evenly over it.

    The catalog's columns are image, context_prompt and, optionally, target_prompt and split; with a split, only rows
    of `test` are measured, and the flat tint comes from those of `train`. task: `uncaptioned` gives a generic prompt,
    `automatic` the context prompt, `full-prompt` the target prompt too, `edit` changes one colour word of that. Each
    photograph is first reduced to a longer side of `longest_px`. judge: a checkpoint whose CLIP guided no method.
    perceptual: adds lpips, fid and kid. Raises ValueError for a catalog without these columns, an unknown task and
    an unknown method.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r} for photographs: choose one of {', '.join(TASKS)}")
    names = list(methods)
    flat = [name for name in names if name in FLAT]
    chosen = chosen_methods(name for name in names if name not in FLAT)
    rows, training = _rows(photos, needs_target=task in ("full-prompt", "edit"))
    rows = [rows[round(i * (len(rows) - 1) / max(1, min(num, len(rows)) - 1))] for i in range(min(num, len(rows)))]
    tint = _mean_chroma(photos, training) if "flat-tint" in flat else torch.zeros(2)
    rng = np.random.default_rng(seed)
    figures: dict[str, Scores] = {name: {} for name in names}
    done, kept = 0, []
    for photograph in _photographs(photos, rows, task, longest_px):
        edit = _draw_edit(photograph, rng) if task == "edit" else None
        if task == "edit" and edit is None:
            done += len(names)
            continue
        place = folder / "photographs" / photograph.name
        place.mkdir(parents=True, exist_ok=True)
        photograph.truth.save(place / "truth.png")
        kept.append(place)
        for name in names:
            if name in chosen:
                pipe = DiffColor(checkpoint, chosen[name].derive(settings))
                picture, scores = _colored(pipe, chosen[name], photograph, edit, seed)
            else:
                pipe = None
                picture, scores = _flat(photograph.gray, tint if name == "flat-tint" else torch.zeros(2)), {}
            picture.save(place / f"{name}.png")
            saved = read_picture(place / f"{name}.png")
            if edit is None:
                scores |= fidelity(photograph.truth, saved)
            if judge is not None and pipe is not None:
                wanted, anti_color = photograph.target or photograph.context, pipe.settings.stage1.anti_color_prompts
                scores |= judged(judge, saved, wanted, photograph.context, anti_color)
            if perceptual is not None:
                scores["lpips"] = perceptual.distance(rgb_of(saved), rgb_of(photograph.truth))
            for figure, value in scores.items():
                figures[name].setdefault(figure, []).append(value)
            done += 1
            progress(name, done, len(rows) * len(names))
    if perceptual is not None and len(kept) > 1:
        truths = [rgb_of(read_picture(place / "truth.png")) for place in kept]
        for name in names:
            pictures = [rgb_of(read_picture(place / f"{name}.png")) for place in kept]
            figures[name] |= {key: [value] for key, value in perceptual.set_distances(truths, pictures).items()}
    return figures


def fidelity(truth: Picture, picture: Picture) -> dict[str, float]:
    """How near a picture comes to the original.

    delta_e: mean Delta E*ab. delta_e_ratio: the same over that of the original's own lightness in gray; below 1 the
    colours are better than none (better_than_gray: 1). psnr (dB) and ssim of sRGB, ssim_l of L*. colorfulness,
    colorfulness_share: of the original's; colorfulness_distance: how far that is from 1.
    """
    x, y = rgb_of(picture)[None], rgb_of(truth)[None]
    ssim = structural_similarity_index_measure(x, y, data_range=1.0)
    ssim_l = structural_similarity_index_measure(lightness_of(x) / 100, lightness_of(y) / 100, data_range=1.0)
    psnr = float(peak_signal_noise_ratio(x, y, data_range=1.0))
    own, true = colorfulness(picture), colorfulness(truth)
    assert isinstance(ssim, Tensor)
    assert isinstance(ssim_l, Tensor)
    lab = lab_of(truth)
    delta_e, of_gray = float((lab_of(picture) - lab).norm(dim=0).mean()), float(lab[1:].norm(dim=0).mean())
    return {
        "delta_e": delta_e,
        "delta_e_of_gray": of_gray,
        "delta_e_ratio": delta_e / max(of_gray, 1e-6),
        "better_than_gray": float(delta_e < of_gray),
        "psnr": psnr if math.isfinite(psnr) else 100.0,
        "ssim": float(ssim),
        "ssim_l": float(ssim_l),
        "colorfulness": own,
        "colorfulness_share": own / max(true, 1e-6),
        "colorfulness_distance": abs(own - true) / max(true, 1e-6),
    }


def _rows(photos: Path, *, needs_target: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows to measure, and those of the training split (all rows where the catalog has no splits)."""
    with (photos / "catalog.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "context_prompt"} <= rows[0].keys():
        raise ValueError(
            f"{photos / 'catalog.csv'} needs rows with the columns image and context_prompt (target_prompt is optional)"
        )
    measured = [row for row in rows if row.get("split", "test") == "test"]
    if needs_target:
        measured = [row for row in measured if row.get("target_prompt")]
    if not measured:
        raise ValueError(f"{photos / 'catalog.csv'} has no row to measure: it needs split 'test', or no column split")
    return measured, [row for row in rows if row.get("split", "train") == "train"]


def _photographs(photos: Path, rows: list[dict[str, str]], task: str, longest_px: int) -> Iterator[Photograph]:
    for row in rows:
        truth = _reduced(read_picture(photos / row["image"]), longest_px)
        context = GENERIC_PROMPT if task == "uncaptioned" else row["context_prompt"]
        target = row.get("target_prompt") if task in ("full-prompt", "edit") else None
        yield Photograph(Path(row["image"]).stem, truth, encode(_gray_of(truth), "png"), context, target)


def _colored(
    pipe: DiffColor, method: Method, photograph: Photograph, edit: Edit | None, seed: int
) -> tuple[Picture, dict[str, float]]:
    """What a method makes of a photograph, and the figures of an edit."""
    target = photograph.target
    context = target if method.fit_on_target and target else photograph.context
    if method.fit_on_target:
        target = None
    elif target is None and not pipe.settings.stage1.enabled:
        target = context  # without stage 1 the fit is gray: its own caption colours it
    fit = pipe.fit(photograph.gray, context, seed=seed, primary_only=target is None)
    result = pipe.recolor(fit, target)
    seconds = {
        "fit_seconds": fit.stage1_seconds + fit.stage2_seconds,
        "p99_abs_delta_l": result.metrics["p99_abs_delta_l"],
    }
    if edit is None:
        return result.image, seconds
    edited = pipe.recolor(fit, edit.prompt, base=result)
    return edited.image, seconds | edit_scores(edit, lab_of(result.image), lab_of(edited.image))


def edit_scores(edit: Edit, before: Tensor, after: Tensor) -> dict[str, float]:
    """What an edit did to a picture, both L*a*b* [3, H, W].

    region_turned: 1 if the median a*b* of the region has a chroma above 5 and the wanted hue within 45 degrees.
    hue_error_degrees: how far that hue is off. delta_e_elsewhere: the mean change of a*b* outside the region.
    """
    a, b = after[1:, eroded(edit.region)].median(dim=1).values.tolist()
    turn = abs((math.degrees(math.atan2(b, a)) - edit.hue_degrees + 180) % 360 - 180)
    return {
        "region_turned": float(turn < 45 and math.hypot(a, b) > 5),
        "hue_error_degrees": turn,
        "delta_e_elsewhere": float((after - before)[1:, edit.region < 0.5].norm(dim=0).mean()),
    }


def _draw_edit(photograph: Photograph, rng: np.random.Generator) -> Edit | None:
    """Another colour for one noun whose region the original shows, and that sRGB can show there. None without one."""
    assert photograph.target is not None
    lab = lab_of(photograph.truth).float()
    angle = torch.rad2deg(torch.atan2(lab[2], lab[1]))
    edits = []
    for item in colored_phrases(photograph.target, ""):
        hue = None if item.color is None else hue_of(item.color)
        if item.color is None or hue is None:
            continue
        near = ((angle - hue + 180) % 360 - 180).abs() < REGION_HUE
        region = (near & (lab[1:].norm(dim=0) > 6)).float()
        if not REGION_SHARE[0] < float(region.mean()) < REGION_SHARE[1]:
            continue
        lightness = float(lab[0, region > 0.5].median())
        start, end = item.phrase.start, item.phrase.noun_start
        for word in _EDITS:
            wanted = hue_of(word) or 0.0
            if abs((wanted - hue + 180) % 360 - 180) < 60 or max_chroma(lightness, wanted) < FULL_CHROMA:
                continue
            words = photograph.target[start:end].replace(item.color, word, 1)
            edits.append(Edit(photograph.target[:start] + words + photograph.target[end:], wanted, region))
    return edits[int(rng.integers(len(edits)))] if edits else None


def _mean_chroma(photos: Path, rows: list[dict[str, str]]) -> Tensor:
    """The mean a*, b* of the training photographs, of at most `TINT_PHOTOS` of them spread evenly."""
    chosen = rows[:: max(1, len(rows) // TINT_PHOTOS)]
    means = [lab_of(_reduced(read_picture(photos / row["image"]), 64))[1:].mean(dim=(1, 2)) for row in chosen]
    return torch.stack(means).mean(dim=0)


def _flat(gray: bytes, chroma: Tensor) -> Picture:
    lightness = read_scan(gray).lightness.double()
    return picture_of(lock_luminance(chroma.double().view(2, 1, 1).expand(2, *lightness.shape[-2:]), lightness))


def _reduced(picture: Picture, longest_px: int) -> Picture:
    rgb = torch.from_numpy(np.array(picture.to_pil().convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = min(1.0, longest_px / max(rgb.shape[-2:]))
    return picture_of(resize(rgb, (round(rgb.shape[-2] * scale), round(rgb.shape[-1] * scale))))


def _gray_of(picture: Picture) -> Picture:
    return picture_of((gray_input(read_scan(encode(picture, "png")).lightness) + 1) / 2)
