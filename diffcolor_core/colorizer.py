"""DiffColor (arXiv 2308.01655), top to bottom: fit a model to one photograph, then colour it by text.

`docs/method.md` explains the method. Between the steps travel the chroma (a*, b*) [2, h, w] of a picture and the
scan's lightness (L*) [1, h, w], both at working size. Pictures in sRGB are made only where the VAE needs one, and
at the end.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import check_ranks, fitted_state, fitted_unet
from diffcolor_core.color_terms import ColorReport
from diffcolor_core.config import Settings, preset, preset_for
from diffcolor_core.errors import DivergedError, FitError, ModelError
from diffcolor_core.fits import Fit, load_fit, scan_sha256
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.optimising import Photograph
from diffcolor_core.progress import Progress, silent
from diffcolor_core.stage1 import colorize_with_prior
from diffcolor_core.stage2 import FittedModel, InContextFit, fit_in_context, recolor, with_identifiers
from diffcolor_scans.color import srgb_to_lab
from diffcolor_scans.images import Picture, Scan, read_scan, resize
from diffcolor_scans.metrics import abs_delta_l, colorfulness

DIVERGED = "the optimisation has diverged to values that are not finite: lower the learning rates"


class ToFit(NamedTuple):
    """A photograph of a batch: what `fit` takes of it."""

    image: Scan | bytes | str | Path
    context_prompt: str
    seed: int = 0
    primary: Picture | None = None


@dataclass(frozen=True)
class Result:
    """A colorized photograph. Its pictures and metrics are computed when they are first read.

    prompt: the target prompt, or the context prompt if there is none, and then the result is the primary. alpha:
    that of equation (7); None for the primary. chroma: [2, h, w] at working size. generated: what the model made,
    before alignment and luminance lock, L*a*b* [3, h, w]; None for a primary that was not made here. nouns: whether
    each noun got the colour that the prompt gives it. sampling_seconds: of the sampling and the alignment; the
    prompts of one call share its time equally.
    """

    fit: Fit
    checkpoint: Checkpoint = field(repr=False)
    target_prompt: str | None
    alpha: float | None
    chroma: Tensor
    generated: Tensor | None
    nouns: tuple[ColorReport, ...]
    sampling_seconds: float

    @property
    def prompt(self) -> str:
        """The prompt that the colours belong to."""
        return self.fit.context_prompt if self.target_prompt is None else self.target_prompt

    @cached_property
    def image(self) -> Picture:
        """The picture at the scan's size and bit depth. Raises FitError for a fit that was loaded without its scan."""
        return self.fit.primary_picture if self.target_prompt is None else self.fit.assemble(self.chroma)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """colorfulness, clip_similarity (of the guidance CLIP, with `prompt`), mean_abs_delta_l, p99_abs_delta_l."""
        image, scan, checkpoint = self.image, self.fit.scan, self.checkpoint
        assert scan is not None  # `image` was assembled from it
        # The shorter side gets CLIP's size. The longer is limited, as CLIP sees at most 8 squares of an extreme strip.
        side = int(checkpoint.clip.config.vision_config.image_size)
        scale = side / min(scan.height_px, scan.width_px)
        size = [min(max(side, round(px * scale)), 64 * side) for px in (scan.width_px, scan.height_px)]
        small = torch.from_numpy(np.array(image.to_pil().convert("RGB").resize(size))).permute(2, 0, 1)  # [3, h, w]
        features = checkpoint.clip_image_features((small.float() / 127.5 - 1)[None].to(checkpoint.device))
        mean_delta, p99_delta = abs_delta_l(scan, image)
        return {
            "colorfulness": colorfulness(image),
            "clip_similarity": float(features @ checkpoint.clip_text_features([self.prompt]).T),
            "mean_abs_delta_l": mean_delta,
            "p99_abs_delta_l": p99_delta,
        }


class DiffColor:
    """The two-stage method on one checkpoint, whose own weights are never changed.

    The same picture, prompts, settings, seed and machine give the same bytes: every random draw comes from a
    CPU generator that the call's seed seeds. Raises ModelError for settings that need a colour prior and a checkpoint
    without one, and for settings without adapters on SDXL.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings | None = None) -> None:
        self.checkpoint = checkpoint
        self.settings = settings or preset(preset_for(checkpoint.model_id))
        if self.settings.color_prior and checkpoint.color_prior is None:
            raise ModelError(f"model {checkpoint.model_id!r} has no colour prior: choose another preset than `photo`")
        check_ranks(checkpoint.unet, self.settings.stage1.adapter_rank, self.settings.stage2.adapter_rank)
        self._last_fitted: FittedModel | None = None  # so that many prompts load theta once

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        clip: str | None = None,
        settings: Settings | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
    ) -> "DiffColor":
        """Load "photo", "demo", a diffusers folder, or a hub model at a pinned commit ("owner/name@commit").

        clip: the guidance CLIP, by default the folder's own `clip` or OpenAI's ViT-B/32. settings: a record or a
        preset's name; by default the one that suits the model (`preset_for`). dtype: what the networks compute in, as
        `models.compute_dtype` takes it; what is trained stays float32. revision: what `identify(model)` gave before, so
        that a folder is not hashed again. Raises ModelError (see `models.load_checkpoint`), and
        ValueError for an unknown preset or dtype.
        """
        chosen = preset(settings) if isinstance(settings, str) else settings
        return cls(load_checkpoint(model, clip=clip, device=device, dtype=dtype, revision=revision), chosen)

    def fit(
        self,
        image: Scan | bytes | str | Path,
        context_prompt: str,
        *,
        seed: int = 0,
        primary: Picture | None = None,
        primary_only: bool = False,
        progress: Progress = silent,
    ) -> Fit:
        """Fit the model to one photograph: stage 1, and stage 2 up to the fitted model.

        context_prompt: what is in the picture, with or without colours. primary: the picture in colours that it
        has already, of the scan's size; it takes the place of stage 1's. primary_only: leave out stage 2; such a
        fit gives the primary, the same as with stage 2, but takes no target prompt and cannot be saved. Raises
        UnreadableImageError if the file is not a picture, ValueError for an empty prompt or a primary of another
        size, DivergedError if the optimisation leaves the finite numbers.
        """
        [fit] = self._fit([ToFit(image, context_prompt, seed, primary)], primary_only, progress)
        if isinstance(fit, DivergedError):
            raise fit
        return fit

    def fit_batch(
        self, photographs: Sequence[ToFit], *, primary_only: bool = False, progress: Progress = silent
    ) -> Iterator[Fit | DivergedError]:
        """Fit the model to several photographs at once, each with adapters of its own [O].

        Gives for each, in their order, what `fit` gives or raises. A fit is the same whatever its neighbours in the
        batch are; on one CPU thread also wherever it stands among them, if the channels of the networks'
        layers are multiples of 32, as Stable Diffusion's are. It differs in the last digits from that of
        another batch size, so fill a batch up if that matters. Raises ValueError, when the first is asked for, for
        settings without adapters, and for photographs that differ in working size, or whose prompts differ in their
        number of chunks (77 tokens): see `batch_key`. Also if some have a primary and others do not.
        """
        return self._fit(photographs, primary_only, progress)

    def batch_key(self, photograph: ToFit) -> tuple[int, ...]:
        """What the photographs of one batch have in common: working height and width, numbers of chunks of c and c'.

        Raises UnreadableImageError if the file is not a picture, and ValueError for a prompt with more noun phrases
        than there are identifiers.
        """
        scan = photograph.image if isinstance(photograph.image, Scan) else read_scan(photograph.image)
        _, size = self._working_size(scan)
        prompts = [photograph.context_prompt]
        if self.settings.stage2.use_identifiers:
            prompts.append(with_identifiers(self.checkpoint.tokenizer, photograph.context_prompt))
        return (*size, *map(self.checkpoint.num_chunks, prompts))

    def _fit(
        self, photographs: Sequence[ToFit], primary_only: bool, progress: Progress
    ) -> Iterator[Fit | DivergedError]:
        if not all(one.context_prompt.strip() for one in photographs):
            raise ValueError("the context prompt is empty: say what is in the picture")
        primaries = [one.primary for one in photographs if one.primary is not None]
        if primaries and len(primaries) < len(photographs):
            raise ValueError("some photographs of the batch have a primary and others do not: fit them apart")
        settings, checkpoint, num = self.settings, self.checkpoint, len(photographs)
        self._last_fitted = None  # frees its memory before this fit takes as much
        scans = [one.image if isinstance(one.image, Scan) else read_scan(one.image) for one in photographs]

        # Stage 1: colours from the generative prior, aligned with the scan
        start = time.perf_counter()
        sizes = [self._at_working_size(scan) for scan in scans]
        shapes = {tuple(lightness.shape[-2:]) for lightness, _ in sizes}
        if len(shapes) > 1:
            raise ValueError(f"the photographs of one batch have one working size, but these have {sorted(shapes)}")
        told = [
            Photograph(lightness, one.context_prompt, torch.Generator().manual_seed(one.seed))
            for one, (lightness, _) in zip(photographs, sizes, strict=True)
        ]
        losses: list[dict[str, list[float]]] = [{} for _ in told]
        generated: list[Tensor | None] = [None] * num
        if primaries:
            each = zip(primaries, scans, sizes, strict=True)
            chromas = [_chroma_at_working_size(p, scan, x.shape[-2:], content) for p, scan, (x, content) in each]
        elif not settings.stage1.enabled:
            chromas = [torch.zeros(2, *one.lightness.shape[-2:]) for one in told]
        else:
            priors = colorize_with_prior(checkpoint, told, settings, progress)
            chromas, losses = [prior.chroma for prior in priors], [prior.losses for prior in priors]
            generated = [prior.generated for prior in priors]
        diverged = [not _is_finite(chroma) for chroma in chromas]

        # Stage 2, steps 1 to 3: the embedding and the model that reproduce these colours
        middle = time.perf_counter()
        made: Sequence[InContextFit | None] = [None] * num
        if not (primary_only or all(diverged)):
            made = fit_in_context(checkpoint, told, chromas, settings, progress)
        stage1_seconds, stage2_seconds = (middle - start) / num, (time.perf_counter() - middle) / num
        for i, (one, in_context) in enumerate(zip(photographs, made, strict=True)):
            state = None if in_context is None else fitted_state(in_context.unet, settings.stage2.adapter_rank)
            trained = () if in_context is None or state is None else (in_context.prompt_embeds, *state.values())
            if diverged[i] or not _is_finite(*trained):
                yield DivergedError(DIVERGED)
                continue
            fit = Fit(
                scan=scans[i],
                scan_sha256=scan_sha256(scans[i]),
                lightness=told[i].lightness,
                content_px=sizes[i][1],
                primary=chromas[i],
                rewritten_prompt=None if in_context is None else in_context.rewritten_prompt,
                prompt_embeds=None if in_context is None else in_context.prompt_embeds,
                unet_state=state,
                context_prompt=one.context_prompt,
                settings=settings,
                seed=one.seed,
                model_id=checkpoint.model_id,
                model_revision=checkpoint.model_revision,
                losses=losses[i] if in_context is None else losses[i] | in_context.losses,
                stage1_seconds=stage1_seconds,
                stage2_seconds=stage2_seconds,
                generated=generated[i],
            )
            self._last_fitted = None if in_context is None else FittedModel(checkpoint, fit, in_context.unet)
            yield fit

    def load_fit(self, url: str, image: Scan | bytes | str | Path | None = None) -> Fit:
        """Read a fit that `Fit.save` wrote. image: the scan, needed if the fit was saved without it.

        Raises FitError if the fit is missing, damaged, or of another format, model or picture.
        """
        scan = image if image is None or isinstance(image, Scan) else read_scan(image)
        fit = load_fit(url, scan)
        self._check_model(fit)
        return fit

    @overload
    def recolor(
        self, fit: Fit, target_prompt: str | None = None, *, alpha: float | None = None, base: Result | None = None
    ) -> Result: ...

    @overload
    def recolor(
        self, fit: Fit, target_prompt: list[str], *, alpha: float | None = None, base: Result | None = None
    ) -> list[Result]: ...

    def recolor(
        self,
        fit: Fit,
        target_prompt: str | list[str] | None = None,
        *,
        alpha: float | None = None,
        base: Result | None = None,
    ) -> Result | list[Result]:
        """Colour a fitted photograph as `target_prompt` says: stage 2, steps 4 and 5, without any fine-tuning.

        A list of prompts is generated in batches and gives a list. Without a target prompt the result is the
        primary. alpha: that of equation (7), by default the settings'. base: an earlier result of this fit to
        start from instead of the primary. Raises FitError for another model's fit and for a target prompt on a
        fit that was made for the primary only, DivergedError if the sampling leaves the finite numbers.
        """
        start = time.perf_counter()
        if target_prompt is None:
            return Result(fit, self.checkpoint, None, None, fit.primary, fit.generated, (), 0.0)
        prompts = [target_prompt] if isinstance(target_prompt, str) else target_prompt
        alpha = fit.settings.stage2.alpha if alpha is None else alpha
        base_chroma, base_prompt = (fit.primary, fit.context_prompt) if base is None else (base.chroma, base.prompt)
        if self._last_fitted is None or self._last_fitted.fit is not fit:
            self._check_model(fit)
            if fit.unet_state is None:
                raise FitError("this fit was made for the primary only (primary_only): fit again for target prompts")
            self._last_fitted = None  # frees its memory before the next copy is made
            unet = fitted_unet(self.checkpoint.unet, fit.settings.stage2.adapter_rank, fit.unet_state)
            self._last_fitted = FittedModel(self.checkpoint, fit, unet)
        recolorings = recolor(self._last_fitted, prompts, alpha, base_chroma, base_prompt)
        if not _is_finite(*(recoloring.chroma for recoloring in recolorings)):
            raise DivergedError(DIVERGED)
        seconds = (time.perf_counter() - start) / max(1, len(prompts))
        results = [
            Result(fit, self.checkpoint, prompt, alpha, made.chroma, made.generated, made.nouns, seconds)
            for prompt, made in zip(prompts, recolorings, strict=True)
        ]
        return results[0] if isinstance(target_prompt, str) else results

    def _check_model(self, fit: Fit) -> None:
        checkpoint = self.checkpoint
        if fit.model_revision != checkpoint.model_revision:
            raise FitError(
                f"this fit belongs to model {fit.model_id} ({fit.model_revision}), not to "
                f"{checkpoint.model_id} ({checkpoint.model_revision}): fit the picture again"
            )

    def _at_working_size(self, scan: Scan) -> tuple[Tensor, tuple[int, int]]:
        """The scan's lightness at working size [1, h, w], and (height, width) of the part that is picture.

        Its right and bottom edges are repeated as far as there is padding.
        """
        content_px, size = self._working_size(scan)
        small = resize(scan.lightness, content_px)
        padding = (0, size[1] - content_px[1], 0, size[0] - content_px[0])
        return F.pad(small[None], padding, mode="replicate")[0], content_px

    def _working_size(self, scan: Scan) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of a scan at working size, and of that with its padding.

        The picture keeps its aspect and gets the area of the model's native square. It is then padded up to the
        multiple that the networks need.
        """
        side = self.settings.working_size_px or self.checkpoint.native_size_px
        multiple = self.checkpoint.size_multiple_px
        scale = side / (scan.height_px * scan.width_px) ** 0.5
        scale = min(scale, 4 * side / max(scan.height_px, scan.width_px))  # limits the long side of extreme strips
        height, width = (max(1, round(length * scale)) for length in (scan.height_px, scan.width_px))
        return (height, width), (height + -height % multiple, width + -width % multiple)


def _chroma_at_working_size(picture: Picture, scan: Scan, size: tuple[int, ...], content_px: tuple[int, int]) -> Tensor:
    """The chroma [2, *size] of a finished picture, padded like the scan's lightness."""
    if picture.pixels.shape[:2] != (scan.height_px, scan.width_px):
        size_px = f"{picture.pixels.shape[1]} x {picture.pixels.shape[0]} px"
        raise ValueError(f"the picture in colours has {size_px}, but the scan {scan.width_px} x {scan.height_px} px")
    maximum = float(np.iinfo(picture.pixels.dtype).max)
    rgb = torch.from_numpy(picture.pixels[..., :3].astype(np.float32) / maximum).permute(2, 0, 1)
    padding = (0, size[1] - content_px[1], 0, size[0] - content_px[0])
    return srgb_to_lab(F.pad(resize(rgb, content_px)[None], padding, mode="replicate")[0])[1:]


def _is_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
