"""DiffColor (arXiv 2308.01655), top to bottom: fit a model to one photograph, then colour it by text."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.adapters import fitted_state, fitted_unet
from diffcolor_core.alignment import align_chroma
from diffcolor_core.color import lock_luminance, srgb_to_lab
from diffcolor_core.color_terms import ColorReport, colored_phrases
from diffcolor_core.config import Settings, preset
from diffcolor_core.fits import Fit, FitError, chroma_of, load_fit, scan_sha256
from diffcolor_core.images import Picture, Scan, check_finite, gray_input, read_scan, resize
from diffcolor_core.in_context import finetune_model, optimise_embedding
from diffcolor_core.metrics import abs_delta_l, colorfulness
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.painter import Choice, FittedModel, Painter
from diffcolor_core.prior import Progress, colorize_with_prior
from diffcolor_core.prompts import insert_identifiers, rare_tokens


@dataclass(frozen=True)
class Result:
    """A colorized picture at the scan's size and bit depth.

    metrics: colorfulness, clip_similarity (guidance CLIP, with the prompt asked for),
    mean_abs_delta_l, p99_abs_delta_l. alpha_scores: of each alpha that was tried. nouns: what became
    of each noun's colour word. generated: the picture at working size before alignment and luminance
    lock, working: after them, both [3, h, w] in [-1, 1]; of a primary that was not made here there is no former.
    """

    image: Picture
    primary: Picture
    prompt: str
    target_prompt: str | None
    alpha: float | None
    metrics: dict[str, float]
    sampling_seconds: float
    working: Tensor
    generated: Tensor | None
    alpha_scores: dict[float, float] = field(default_factory=dict)
    nouns: tuple[ColorReport, ...] = ()


def _silent(stage: str, done: int, total: int) -> None: ...


class DiffColor:
    """The two-stage method on one checkpoint. The checkpoint's own weights are never changed.

    The same picture, prompts, settings, seed and machine give the same bytes: every random draw
    comes from one CPU generator per call, seeded with the call's seed.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings | None = None) -> None:
        self.checkpoint = checkpoint
        self.settings = (
            settings if settings is not None else preset("demo" if checkpoint.model_id == "demo" else "paper")
        )
        self._last_fitted: FittedModel | None = None  # many prompts, one loading of theta

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        clip: str | None = None,
        settings: Settings | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DiffColor":
        """Load "demo", a diffusers folder, or a hub id at a pinned revision ("owner/name@commit").

        clip: the guidance CLIP, by default the folder's own `clip` or OpenAI's ViT-B/32. settings: a
        preset's name or a Settings record; by default `demo` for the demo model, else `paper`.
        dtype: what the networks compute in; weights stay float32. Raises ModelError.
        """
        chosen = preset(settings) if isinstance(settings, str) else settings
        return cls(load_checkpoint(model, clip=clip, device=device, dtype=dtype), chosen)

    # ---------------------------------------------------------------- fit

    def fit(
        self,
        image: Scan | bytes | str | Path,
        context_prompt: str,
        *,
        seed: int = 0,
        primary: Picture | None = None,
        progress: Progress = _silent,
    ) -> Fit:
        """Stage 1, and stage 2 up to the fitted model.

        context_prompt says what is in the picture, without or with colours. primary: the picture
        coloured already (same size); it takes the place of stage 1's, to be edited by `recolor`.
        Raises UnreadableImageError for a file that is no picture, ValueError for an empty prompt,
        DivergedError if no finite fit is found.
        """
        if not context_prompt.strip():
            raise ValueError("the context prompt is empty: say what is in the picture")
        scan = image if isinstance(image, Scan) else read_scan(image)
        settings, checkpoint = self.settings, self.checkpoint
        generator = torch.Generator().manual_seed(seed)

        # Stage 1: colours from the generative prior, brought to the scan's own structure
        start = time.perf_counter()
        small_lightness, content_px = self._at_working_size(scan)
        x_gray = gray_input(small_lightness)
        losses: dict[str, list[float]] = {}
        generated = None
        if primary is not None:
            x_primary = _working_primary(scan, primary, small_lightness, content_px)
        elif not settings.stage1.enabled:
            x_primary = x_gray
        else:
            prior = colorize_with_prior(
                checkpoint,
                x_gray,
                small_lightness,
                context_prompt,
                settings.stage1,
                settings.sampling,
                batch_size=settings.batch_size,
                generator=generator,
                progress=progress,
            )
            generated = prior.x_pri
            x_primary = self._align(x_gray, small_lightness, generated, generator)  # x^_pri
            losses |= prior.losses

        # Stage 2: 1. c -> c'; 2. e_opt; 3. theta
        middle = time.perf_counter()
        used = set(context_prompt.lower().split())
        identifiers = [token for token in rare_tokens(checkpoint.tokenizer, 100) if token not in used]
        rewritten = (
            insert_identifiers(context_prompt, identifiers) if settings.stage2.use_identifiers else context_prompt
        )
        z = checkpoint.encode(x_primary[None].to(checkpoint.device))
        common: dict[str, Any] = {"batch_size": settings.batch_size, "generator": generator, "progress": progress}
        e_opt, embedding_losses = optimise_embedding(
            checkpoint,
            z,
            checkpoint.encode_prompts([rewritten]),
            num_steps=settings.stage2.embedding_steps,
            learning_rate=settings.stage2.embedding_learning_rate,
            **common,
        )
        unet, model_losses = finetune_model(
            checkpoint,
            z,
            e_opt,
            num_steps=settings.stage2.model_steps,
            learning_rate=settings.stage2.model_learning_rate,
            adapter_rank=settings.stage2.adapter_rank,
            **common,
        )
        unet_state = fitted_state(unet, settings.stage2.adapter_rank)
        check_finite(x_primary, e_opt, *unet_state.values())
        end = time.perf_counter()
        fit = Fit(
            scan=scan,
            scan_sha256=scan_sha256(scan),
            lightness=small_lightness,
            content_px=content_px,
            primary=x_primary,
            prompt_embeds=e_opt.cpu(),
            unet_state=unet_state,
            context_prompt=context_prompt,
            rewritten_prompt=rewritten,
            settings=settings,
            seed=seed,
            model_id=checkpoint.model_id,
            model_revision=checkpoint.model_revision,
            losses={**losses, "embedding": embedding_losses, "model": model_losses},
            stage1_seconds=middle - start,
            stage2_seconds=end - middle,
            generated=generated,
        )
        self._last_fitted = FittedModel(fit, unet.requires_grad_(False))
        return fit

    def load_fit(self, url: str, image: Scan | bytes | str | Path | None = None) -> Fit:
        """Read a fit that `Fit.save` wrote. image: the scan, needed if the fit was saved without it.

        Raises FitError for a fit that is not there, damaged, or of another model or picture.
        """
        scan = image if image is None or isinstance(image, Scan) else read_scan(image)
        fit = load_fit(url, scan)
        self._check_model(fit)
        return fit

    # ---------------------------------------------------------------- recolor

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
        """Colour a fitted picture as `target_prompt` says: stage 2, steps 4 and 5, without any fine-tuning.

        Several prompts are generated in one batch and give a list. Without a target prompt the result
        is the primary: what stage 1 made of the context prompt. alpha: of equation (7), by default
        the best of the settings'. base: an earlier result of this fit to start from instead of the
        primary. Raises FitError for another model's fit.
        """
        self._check_model(fit)
        start = time.perf_counter()
        if target_prompt is None:
            return self._result(fit, fit.primary_picture, None, start, fit.primary, fit.generated)
        prompts = [target_prompt] if isinstance(target_prompt, str) else target_prompt
        before, before_prompt = (fit.primary, fit.context_prompt) if base is None else (base.working, base.prompt)
        if self._last_fitted is None or self._last_fitted.fit is not fit:
            self._last_fitted = None  # before the next copy is made
            unet = fitted_unet(self.checkpoint.unet, fit.settings.stage2.adapter_rank, fit.unet_state)
            self._last_fitted = FittedModel(fit, unet)
        painter = Painter(self.checkpoint, self._last_fitted, before)
        results = []
        phrases = [colored_phrases(prompt, before_prompt) for prompt in prompts]
        choices = painter.choose(prompts, phrases, fit.settings.stage2.alphas if alpha is None else (alpha,))
        shared_seconds = (time.perf_counter() - start) / max(1, len(prompts))
        for prompt, items, choice in zip(prompts, phrases, choices, strict=True):
            start = time.perf_counter() - shared_seconds
            aligned = self._align(
                gray_input(fit.lightness), fit.lightness, choice.generated, torch.Generator().manual_seed(fit.seed)
            )
            final = painter.keep_unchanged(aligned, prompt, items)
            nouns = painter.reports(final, prompt, items)
            picture = fit.assemble(final)
            results.append(self._result(fit, picture, prompt, start, final, choice.generated, choice, nouns))
        return results[0] if isinstance(target_prompt, str) else results

    def _check_model(self, fit: Fit) -> None:
        checkpoint = self.checkpoint
        if fit.model_revision != checkpoint.model_revision:
            raise FitError(
                f"this fit belongs to model {fit.model_id} ({fit.model_revision}), not to "
                f"{checkpoint.model_id} ({checkpoint.model_revision}): fit the picture again"
            )

    # ---------------------------------------------------------------- between the two sizes

    def _at_working_size(self, scan: Scan) -> tuple[Tensor, tuple[int, int]]:
        """The scan's L* at the model's size [1, h, w], aspect kept, and how much of it is picture.

        The area is that of the model's native square. The right and bottom are padded with their
        edge to the multiple that the UNet needs: nothing is squashed.
        """
        side = self.settings.working_size_px or self.checkpoint.native_size_px
        multiple = self.checkpoint.size_multiple_px
        scale = side / (scan.height_px * scan.width_px) ** 0.5
        scale = min(scale, 4 * side / max(scan.height_px, scan.width_px))  # of extreme strips, the long side counts
        height, width = (max(1, round(length * scale)) for length in (scan.height_px, scan.width_px))
        small = resize(scan.lightness, (height, width))
        padding = (0, -width % multiple, 0, -height % multiple)
        return F.pad(small[None], padding, mode="replicate")[0], (height, width)

    def _align(self, x_gray: Tensor, small_lightness: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Generated picture [3, h, w] to one with the scan's structure and L*, in [-1, 1]."""
        chroma = align_chroma(self.checkpoint, x_gray, x, chroma_of(x), self.settings.alignment, generator)
        return lock_luminance(chroma, small_lightness) * 2 - 1

    def _result(
        self,
        fit: Fit,
        image: Picture,
        target_prompt: str | None,
        start: float,
        working: Tensor,
        generated: Tensor | None,
        choice: Choice | None = None,
        nouns: tuple[ColorReport, ...] = (),
    ) -> Result:
        assert fit.scan is not None  # `image` was assembled from it
        prompt = fit.context_prompt if target_prompt is None else target_prompt
        sampling_seconds = time.perf_counter() - start
        small = torch.from_numpy(np.array(image.to_pil().convert("RGB").resize(self._clip_size(fit.scan)))).permute(
            2, 0, 1
        )
        x = (small.float() / 127.5 - 1)[None].to(self.checkpoint.device)
        similarity = self.checkpoint.clip_image_features(x) @ self.checkpoint.clip_text_features([prompt]).T
        mean_delta, p99_delta = abs_delta_l(fit.scan, image)
        metrics = {
            "colorfulness": colorfulness(image),
            "clip_similarity": float(similarity),
            "mean_abs_delta_l": mean_delta,
            "p99_abs_delta_l": p99_delta,
        }
        return Result(
            image=image,
            primary=fit.primary_picture,
            prompt=prompt,
            target_prompt=target_prompt,
            alpha=None if choice is None else choice.alpha,
            metrics=metrics,
            sampling_seconds=sampling_seconds,
            working=working,
            generated=generated,
            alpha_scores={} if choice is None else choice.scores,
            nouns=nouns,
        )

    def _clip_size(self, scan: Scan) -> tuple[int, int]:
        """(width, height) with CLIP's image size as the shorter side, and at most 64 times that as the longer.

        CLIP sees 8 squares of a long picture: what is squeezed here is a line of pixels, not a scene.
        """
        side = int(self.checkpoint.clip.config.vision_config.image_size)
        scale = side / min(scan.height_px, scan.width_px)
        width, height = (min(max(side, round(px * scale)), 64 * side) for px in (scan.width_px, scan.height_px))
        return width, height


def _working_primary(scan: Scan, primary: Picture, small_lightness: Tensor, content_px: tuple[int, int]) -> Tensor:
    """A finished picture's colours at working size, [3, h, w] in [-1, 1]."""
    if primary.pixels.shape[:2] != (scan.height_px, scan.width_px):
        raise ValueError(
            f"the coloured picture is {primary.pixels.shape[1]} x {primary.pixels.shape[0]} px, "
            f"the scan {scan.width_px} x {scan.height_px}: they must be of one size"
        )
    maximum = float(np.iinfo(primary.pixels.dtype).max)
    rgb = torch.from_numpy(primary.pixels[..., :3].astype(np.float32) / maximum).permute(2, 0, 1)
    (height, width), (inner_height, inner_width) = small_lightness.shape[-2:], content_px
    padding = (0, width - inner_width, 0, height - inner_height)
    padded = F.pad(resize(rgb, content_px)[None], padding, mode="replicate")[0]
    return lock_luminance(srgb_to_lab(padded)[1:], small_lightness) * 2 - 1
