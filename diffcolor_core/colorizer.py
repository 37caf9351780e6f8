"""DiffColor (arXiv 2308.01655), top to bottom: fit a model to one photograph, then colour it by text."""

import copy
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.alignment import align_chroma
from diffcolor_core.color import lock_luminance, srgb_to_lab
from diffcolor_core.config import Settings, preset
from diffcolor_core.images import Picture, Scan, assemble, gray_input, read_scan, resize
from diffcolor_core.in_context import finetune_model, interpolate, optimise_embedding
from diffcolor_core.metrics import abs_delta_l, colorfulness
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.prior import Progress, colorize_with_prior
from diffcolor_core.prompts import insert_identifiers, rare_tokens
from diffcolor_core.sampling import generate


@dataclass(frozen=True)
class Fit:
    """What stages 1 and 2 (steps 1 to 3) leave: every further prompt starts from here.

    lightness: the scan's L* at working size [1, h, w], of which `content_px` (height, width) is picture
    and the rest padding. primary: x^_pri [3, h, w] in [-1, 1], aligned. prompt_embeds: e_opt
    [1, tokens, width]. unet_weights: theta, the fitted UNet's state. losses: by name, one a step.
    """

    scan: Scan
    lightness: Tensor
    content_px: tuple[int, int]
    primary: Tensor
    prompt_embeds: Tensor
    unet_weights: dict[str, Tensor]
    context_prompt: str
    rewritten_prompt: str
    settings: Settings
    seed: int
    model_id: str
    model_revision: str
    losses: dict[str, list[float]]
    stage1_seconds: float
    stage2_seconds: float

    def assemble(self, x: Tensor) -> Picture:
        """A picture at working size [3, h, w] in [-1, 1] as one at the scan's size, with the scan's L*."""
        height, width = self.content_px
        return assemble(self.scan, _chroma(x)[:, :height, :width])

    @cached_property
    def primary_picture(self) -> Picture:
        """The primary at the scan's size."""
        return self.assemble(self.primary)


@dataclass(frozen=True)
class Result:
    """A colorized picture at the scan's size and bit depth.

    metrics: colorfulness, clip_similarity (guidance CLIP, with the prompt asked for),
    mean_abs_delta_l, p99_abs_delta_l.
    """

    image: Picture
    primary: Picture
    prompt: str
    target_prompt: str | None
    alpha: float | None
    metrics: dict[str, float]
    sampling_seconds: float


def _silent(stage: str, done: int, total: int) -> None: ...


METHOD_VERSION = 1
"""Raised whenever the same inputs would give other pixels: results of different versions are different work."""


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
        progress: Progress = _silent,
    ) -> Fit:
        """Stage 1, and stage 2 up to the fitted model.

        context_prompt says what is in the picture, without or with colours. Raises
        UnreadableImageError for a file that is no picture, ValueError for an empty prompt.
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
        primary = self._align(x_gray, small_lightness, prior.x_pri, generator)  # x^_pri

        # Stage 2: 1. c -> c'; 2. e_opt; 3. theta
        middle = time.perf_counter()
        used = set(context_prompt.lower().split())
        identifiers = [token for token in rare_tokens(checkpoint.tokenizer, 100) if token not in used]
        rewritten = (
            insert_identifiers(context_prompt, identifiers) if settings.stage2.use_identifiers else context_prompt
        )
        z = checkpoint.encode(primary[None].to(checkpoint.device))
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
            **common,
        )
        end = time.perf_counter()
        return Fit(
            scan=scan,
            lightness=small_lightness,
            content_px=content_px,
            primary=primary,
            prompt_embeds=e_opt.cpu(),
            unet_weights={name: tensor.cpu() for name, tensor in unet.state_dict().items()},
            context_prompt=context_prompt,
            rewritten_prompt=rewritten,
            settings=settings,
            seed=seed,
            model_id=checkpoint.model_id,
            model_revision=checkpoint.model_revision,
            losses={**prior.losses, "embedding": embedding_losses, "model": model_losses},
            stage1_seconds=middle - start,
            stage2_seconds=end - middle,
        )

    # ---------------------------------------------------------------- recolor

    def recolor(self, fit: Fit, target_prompt: str | None = None, *, alpha: float | None = None) -> Result:
        """Colour a fitted picture as `target_prompt` says: stage 2, steps 4 and 5, without any fine-tuning.

        Without a target prompt the result is the primary: what stage 1 made of the context prompt.
        alpha: of equation (7), by default the settings'. Raises ValueError for another model's fit.
        """
        checkpoint = self.checkpoint
        if fit.model_revision != checkpoint.model_revision:
            raise ValueError(
                f"this fit belongs to model {fit.model_id} ({fit.model_revision}), not to "
                f"{checkpoint.model_id} ({checkpoint.model_revision}): fit the picture again"
            )
        start = time.perf_counter()
        if target_prompt is None:
            return self._result(fit, fit.primary_picture, None, None, start)

        # 4. e(alpha), equation (7)
        alpha = fit.settings.stage2.alpha if alpha is None else alpha
        e_target, e_empty = checkpoint.encode_prompts([target_prompt]), checkpoint.encode_prompts([""])
        e = interpolate(fit.prompt_embeds.to(checkpoint.device), e_target, e_empty, alpha)
        # 5. generate from the noised latent of x^_pri, decode, align: x_fin
        generator = torch.Generator().manual_seed(fit.seed)
        unet = copy.deepcopy(checkpoint.unet)
        unet.load_state_dict(fit.unet_weights)
        z = checkpoint.encode(fit.primary[None].to(checkpoint.device))
        x = generate(checkpoint, unet, z, e, fit.lightness, fit.settings.sampling, generator)[0].cpu()
        final = self._align(gray_input(fit.lightness), fit.lightness, x, generator)
        return self._result(fit, fit.assemble(final), target_prompt, alpha, start)

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
        chroma = align_chroma(self.checkpoint, x_gray, x, _chroma(x), self.settings.alignment, generator)
        return lock_luminance(chroma, small_lightness) * 2 - 1

    def _result(self, fit: Fit, image: Picture, target_prompt: str | None, alpha: float | None, start: float) -> Result:
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
            alpha=alpha,
            metrics=metrics,
            sampling_seconds=sampling_seconds,
        )

    def _clip_size(self, scan: Scan) -> tuple[int, int]:
        """(width, height) with CLIP's image size as the shorter side."""
        side = int(self.checkpoint.clip.config.vision_config.image_size)
        scale = side / min(scan.height_px, scan.width_px)
        return max(side, round(scan.width_px * scale)), max(side, round(scan.height_px * scale))


def _chroma(x: Tensor) -> Tensor:
    """a*, b* [2, h, w] of a picture [3, h, w] in [-1, 1]."""
    return srgb_to_lab((x.clamp(-1, 1) + 1) / 2)[1:]
