"""Training of the photo model's colour prior.

The prior is a regression from gray photographs and their captions to chroma (`diffcolor_core.color_prior`). The text
tower is trained with it and is then the photo model's own: the UNet reads the same embeddings.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from diffcolor_core.color_prior import CHROMA_UNIT, FACTOR, ColorPrior
from diffcolor_training.loop import fit_part, recalibrate, step_rng
from diffcolor_training.photos import (
    SIDE_PX,
    Photo,
    captioned,
    draw_photos,
    random_crop,
    random_lightness,
)
from diffcolor_training.text import MAX_LENGTH, SHORT_LENGTH, TEXT_WIDTH, tokenize

WIDTHS = (32, 64, 128, 320)


class PromptedPrior(nn.Module):
    """The prior and the text tower as one module, so that they train and checkpoint together."""

    def __init__(self, prior: ColorPrior, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.prior = prior
        self.text_encoder = text_encoder

    def forward(self, lightness: Tensor, ids: Tensor) -> Tensor:
        """L* [B, 1, h, w] and token ids [B, tokens] to a*b* [B, 2, h/4, w/4]."""
        embeds = self.text_encoder(ids).last_hidden_state
        chroma: Tensor = self.prior(lightness.to(memory_format=torch.channels_last), embeds)
        return chroma


def build_prior() -> ColorPrior:
    """The prior as it is trained: 5.4 million parameters."""
    return ColorPrior(WIDTHS, TEXT_WIDTH, SHORT_LENGTH, dropout=0.1)


def draw_batch(
    photos: list[Photo], tokenizer: CLIPTokenizer, rng: np.random.Generator, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """L* [B, 1, 96, 96], token ids [B, tokens], a*b* [B, 2, 24, 24]."""
    batch = draw_photos(photos, rng, size)
    crops = torch.stack([random_crop(photo, SIDE_PX, rng) for photo in batch])
    lightness, ab = random_lightness(crops, rng), F.avg_pool2d(crops[:, 4:], FACTOR)
    captions = captioned(batch, ab, rng)
    length = SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH
    return lightness, tokenize(tokenizer, captions, length), ab


def train_prior(
    model: PromptedPrior,
    tokenizer: CLIPTokenizer,
    photos: list[Photo],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
    batch_size: int = 32,
) -> None:
    """Squared error of chroma: a robust loss gave a third of the true chroma."""
    model.requires_grad_(True)

    def loss_of(step: int) -> Tensor:
        lightness, ids, ab = draw_batch(photos, tokenizer, step_rng(seed, "prior", step), batch_size)
        with torch.autocast(device.type, torch.bfloat16):
            chroma = model(lightness.to(device), ids.to(device))
        return F.mse_loss(chroma / CHROMA_UNIT, ab.to(device) / CHROMA_UNIT)

    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.prior.parameters() if p.ndim > 1], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [p for p in model.prior.parameters() if p.ndim <= 1], "lr": 2e-3, "weight_decay": 0.0},
        {"params": list(model.text_encoder.parameters()), "lr": 4e-4, "weight_decay": 0.01},
    ]
    fit_part("prior", model, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)
    drawn = (draw_batch(photos, tokenizer, step_rng(seed, "recalibrate", step), 32) for step in range(60))
    recalibrate(model, ((lightness.to(device), ids.to(device)) for lightness, ids, _ in drawn))
