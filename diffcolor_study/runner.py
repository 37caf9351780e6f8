"""Run methods over cases, save their pictures, score the saved files, and summarise the scores."""

import math
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from diffcolor_core.colorizer import DiffColor, Result, ToFit
from diffcolor_core.config import Settings
from diffcolor_core.errors import DivergedError
from diffcolor_core.fits import Fit
from diffcolor_core.model_files import BUNDLES
from diffcolor_core.models import Checkpoint
from diffcolor_scans.images import Picture, read_picture
from diffcolor_scans.metrics import colorfulness
from diffcolor_study.cases import Case, draw_cases
from diffcolor_study.methods import Method, chosen_methods
from diffcolor_study.pictures import lab_of
from diffcolor_study.scores import exact_scores, leakage, region_right, region_scores

DEMO_JUDGE = BUNDLES["demo"].parent / "judge"
"""A CLIP trained like the demo model's that guides nothing, so that it can judge results."""
Scores = dict[str, list[float]]
EDIT_LEAKAGE = 3.0  # an edit succeeds only if the rest of the picture changes by at most this Delta E_ab


def run_study(
    checkpoint: Checkpoint,
    settings: Settings,
    *,
    task: str,
    methods: Iterable[str],
    num: int,
    seed: int,
    folder: Path,
    judge: Checkpoint | None = None,
    batch: int = 1,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Scores]:
    """Scores per method and figure, one value per scene (NaN where a figure does not apply).

    Every picture is saved as PNG below `folder` and scored as read back. judge: a checkpoint whose CLIP
    guided no method; it adds the figures of `judged`. batch: so many scenes are fitted together, which needs
    adapters if it is more than 1. progress: called with (method, done, total) after each picture. Raises ValueError
    for an unknown task or method, DivergedError if an optimisation leaves the finite numbers.
    """
    chosen = chosen_methods(methods)
    figures: dict[str, Scores] = {name: {} for name in chosen}
    done, total = 0, num * len(chosen)
    drawn = enumerate(draw_cases(task, num, seed, 2 * checkpoint.native_size_px))
    while cases := dict(islice(drawn, batch)):
        places = {number: folder / task / f"{number:04d}" for number in cases}
        for number, case in cases.items():
            places[number].mkdir(parents=True, exist_ok=True)
            case.gray.save(places[number] / "gray.png")
            case.truth.save(places[number] / "truth.png")
        for name, method in chosen.items():
            pipe = DiffColor(checkpoint, method.derive(settings))
            for number, fit in zip(cases, _fits(pipe, method, cases, seed, batch), strict=True):
                scores = _score_one(pipe, method, cases[number], fit, places[number] / name, judge)
                for figure, value in scores.items():
                    figures[name].setdefault(figure, []).append(value)
                done += 1
                progress(name, done, total)
    return figures


def _fits(pipe: DiffColor, method: Method, cases: Mapping[int, Case], seed: int, batch: int) -> Iterator[Fit]:
    """Of each case, seeded by its number."""
    asked = []
    for number, case in cases.items():
        context = case.prompt if method.fit_on_target and case.prompt is not None else case.context_prompt
        # In the edit task the picture is coloured already, so stage 1 is skipped.
        asked.append(ToFit(case.gray.encode_png(), context, seed + number, case.start))
    only = all(_target(pipe, method, case) is None and case.edited is None for case in cases.values())
    if batch == 1:
        [one] = asked
        yield pipe.fit(one.image, one.context_prompt, seed=one.seed, primary=one.primary, primary_only=only)
        return
    for fit in pipe.fit_batch(asked, primary_only=only):
        if isinstance(fit, DivergedError):
            raise fit
        yield fit


def _target(pipe: DiffColor, method: Method, case: Case) -> str | None:
    target = None if method.fit_on_target and case.start is None else case.prompt
    if target is None and not pipe.settings.stage1.enabled:
        return case.context_prompt  # without stage 1 the fit is gray: its own caption colours it
    return target


def _score_one(
    pipe: DiffColor, method: Method, case: Case, fit: Fit, stem: Path, judge: Checkpoint | None
) -> dict[str, float]:
    result = pipe.recolor(fit, _target(pipe, method, case))
    lab = lab_of(_saved(result.image, stem))
    own = lab_of(case.gray)
    delta = (lab[0] - own[0]).abs()
    truth = colorfulness(case.truth)
    figures = region_scores(case, lab) | _before_lock(result, fit.lightness)
    figures |= {
        "mean_abs_delta_l": float(delta.mean()),
        "p99_abs_delta_l": float(delta.quantile(0.99)),
        "colorfulness": result.metrics["colorfulness"],
        "colorfulness_distance": abs(result.metrics["colorfulness"] - truth) / truth,
        "fit_seconds": fit.stage1_seconds + fit.stage2_seconds,
        "recolor_seconds": result.sampling_seconds,
        "peak_memory_bytes": _peak_memory_bytes(pipe.checkpoint.device),
    }
    if judge is not None:
        anti_color = pipe.settings.stage1.anti_color_prompts
        figures |= judged(judge, result.image, case.prompt or case.context_prompt, case.context_prompt, anti_color)
        if case.prompt is None:  # the truth and the gray scan show the range that the judge can tell apart
            for name, picture in (("truth", case.truth), ("gray", case.gray)):
                known = judged(judge, picture, case.context_prompt, case.context_prompt, anti_color)
                figures |= {f"{figure}_of_{name}": known[figure] for figure in ("clip_similarity", "clip_margin")}
    if case.edited is None:
        return figures
    mask = case.scene.masks[case.edited]
    if case.start is None:  # change one word: once starting from the finished picture, once from the gray scan
        assert case.edited_prompt is not None
        edited = stem.with_name(stem.name + "-edited")
        if method.fit_on_target:  # the fit fixes its colours, so another prompt needs another fit
            again = pipe.fit(case.gray.encode_png(), case.edited_prompt, seed=fit.seed)
            changed = anew = pipe.recolor(again)
        else:
            changed, anew = (pipe.recolor(fit, case.edited_prompt, base=base) for base in (result, None))
        outside, band = leakage(lab, lab_of(_saved(changed.image, edited)), mask)
        return figures | {
            "leakage": outside,
            "leakage_band": band,
            "leakage_anew": leakage(lab, lab_of(anew.image), mask)[0],
        }
    outside, band = leakage(lab_of(case.start), lab, mask)
    if case.asked[case.edited] is None:  # an exact colour
        assert case.prompt is not None
        return figures | {"leakage": outside, "leakage_band": band} | exact_scores(case.prompt, lab, mask)
    right = region_right(case, lab, case.edited)
    success = float(right and outside <= EDIT_LEAKAGE)
    edit = {"leakage": outside, "leakage_band": band, "edited_right": float(right), "edit_success": success}
    return figures | edit


def _saved(picture: Picture, stem: Path) -> Picture:
    path = stem.with_name(stem.name + ".png")
    picture.save(path)
    return read_picture(path)


def _before_lock(result: Result, lightness: Tensor) -> dict[str, float]:
    """Mean and p99 |Delta L*| between the model's own output and the scan, at working size, before the lock."""
    if result.generated is None:  # the picture was coloured before the study began
        return {}
    delta = (result.generated[:1] - lightness).abs()
    return {
        "mean_abs_delta_l_before_lock": float(delta.mean()),
        "p99_abs_delta_l_before_lock": float(delta.quantile(0.99)),
    }


def _peak_memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@torch.no_grad()
def judged(
    judge: Checkpoint, picture: Picture, prompt: str, context_prompt: str, anti_color: tuple[str, ...]
) -> dict[str, float]:
    """How the judge's CLIP rates a picture.

    clip_similarity: cosine similarity to `prompt`. clip_margin: similarity to the context prompt minus
    that to the best-fitting anti-colour prompt, the two sides of equation (1). anti_color_look: 1 if the
    margin is negative, else 0.
    """
    x = torch.from_numpy(picture.pixels[..., :3]).permute(2, 0, 1)[None].float().to(judge.device) / 127.5 - 1
    text = judge.clip_text_features([prompt, context_prompt, *anti_color])
    similarity = (judge.clip_image_features(x) @ text.T)[0]
    margin = float(similarity[1] - similarity[2:].max())
    return {"clip_similarity": float(similarity[0]), "clip_margin": margin, "anti_color_look": float(margin < 0)}


def summarise(figures: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """The mean of each figure with its bootstrap 95% interval (percentile, 2,000 resamples, seed 0).

    Every method after the first also gets `difference`: mean and interval of the per-scene differences
    to the first method. Paired differences can be significant where the separate intervals overlap.
    """
    first = next(iter(figures.values()), {})
    summary = {}
    for method, scores in figures.items():
        known = {name: np.array(values) for name, values in scores.items() if not _all_nan(values)}
        summary[method] = {name: _interval(values) for name, values in known.items()}
        for name in () if scores is first else known.keys() & first.keys():
            pairs = known[name] - np.array(first[name])
            if not np.isnan(pairs).all():
                summary[method][name]["difference"] = _interval(pairs)
    return summary


def _all_nan(values: list[float]) -> bool:
    return all(math.isnan(value) for value in values)


def _interval(values: np.ndarray) -> dict[str, Any]:
    values = values[~np.isnan(values)]
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean, "scenes": len(values)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns about degenerate resamples
        interval = bootstrap(
            (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    return {"mean": mean, "low": float(interval.low), "high": float(interval.high), "scenes": len(values)}
