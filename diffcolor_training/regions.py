"""Training of the photo model's noun regions, from photographs whose captions tell colours.

Nobody has outlined anything. But where a caption says "a green roof under a blue sky", the green pixels are the roof
and the blue ones the sky. Nouns of one colour share its pixels, and the other captions tell them apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffcolor_core.color_prior import FACTOR, ColorPrior, NounRegions
from diffcolor_core.color_terms import ColoredPhrase, colored_phrases
from diffcolor_core.regions import noun_text, word_ids
from diffcolor_scans.color_names import hue_of
from diffcolor_training.loop import fit_part, recalibrate, step_rng
from diffcolor_training.photos import SIDE_PX, Photo, random_crop, random_lightness
from diffcolor_training.prior import WIDTHS

MAX_NOUNS = 8  # of a caption; later ones are left out


def build_regions(prior: ColorPrior, num_words: int) -> NounRegions:
    """The network as it is trained: 5.3 million parameters. It starts from the prior's trunk, without its text."""
    regions = NounRegions(WIDTHS, num_words, dropout=0.2)
    regions.load_state_dict(prior.state_dict(), strict=False)
    nn.init.normal_(regions.words.weight, std=0.5)
    return regions


def shares_by_color(colors: Sequence[str | None], lab: Tensor) -> dict[str, Tensor]:
    """Which pixels of L*a*b* [3, h, w] have each of the colours: [h, w] for each, together at most 1."""
    angle, chroma = torch.rad2deg(torch.atan2(lab[2], lab[1])), lab[1:].norm(dim=0)
    found = {}
    for color in dict.fromkeys(color for color in colors if color is not None):
        hue = hue_of(color)
        if hue is not None:
            turn = ((angle - hue + 180) % 360 - 180).abs()
            share = ((45 - turn) / 10).clamp(0, 1) * ((chroma - 4) / 4).clamp(0, 1)
        else:
            share = ((10 - chroma) / 4).clamp(0, 1)
            if color == "white":
                share = share * ((lab[0] - 50) / 15).clamp(0, 1)
            if color == "black":
                share = share * ((45 - lab[0]) / 15).clamp(0, 1)
        found[color] = share
    total = sum(found.values(), torch.zeros(())).clamp(min=1)
    return {color: share / total for color, share in found.items()}


def regions_loss(log_shares: Tensor, colors: Sequence[str | None], lab: Tensor) -> Tensor:
    """Cross-entropy of log_shares [P + 1, h, w] with what the colours of L*a*b* [3, h, w] tell.

    Pixels of a colour belong to the nouns of that colour together, all others to the nouns without one or to none.
    """
    wanted = shares_by_color(colors, lab)
    uncolored = [i for i, color in enumerate(colors) if color is None] + [len(log_shares) - 1]
    loss = -(1 - sum(wanted.values(), torch.zeros(()))) * torch.logsumexp(log_shares[uncolored], dim=0)
    for color, share in wanted.items():
        nouns = [i for i, other in enumerate(colors) if other == color]
        loss = loss - share * torch.logsumexp(log_shares[nouns], dim=0)
    return loss.mean()


def train_regions(
    regions: NounRegions,
    tokenizer: CLIPTokenizer,
    photos: list[Photo],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
    batch_size: int = 24,
) -> None:
    """Few steps, or it learns the photographs by heart: held-out loss is lowest near step 500."""
    told: list[tuple[Photo, list[ColoredPhrase]]] = []
    for photo in photos:
        phrases = colored_phrases(photo.target, "")[:MAX_NOUNS]
        if any(phrase.color for phrase in phrases):
            told.append((photo, phrases))

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, Tensor, list[list[ColoredPhrase]], Tensor]:
        drawn = [told[int(rng.integers(len(told)))] for _ in range(batch_size)]
        crops = torch.stack([random_crop(photo, SIDE_PX, rng) for photo, _ in drawn])
        texts = [[_said(photo.target, phrase, rng) for phrase in phrases] for photo, phrases in drawn]
        return (
            random_lightness(crops, rng),
            word_ids(tokenizer, texts),
            [phrases for _, phrases in drawn],
            F.avg_pool2d(crops[:, 3:], FACTOR),
        )

    def loss_of(step: int) -> Tensor:
        lightness, words, phrases, lab = batch_of(step_rng(seed, "regions", step))
        with torch.autocast(device.type, torch.bfloat16):
            log_shares = regions(lightness.to(device), words.to(device)).cpu()
        losses = []
        for shares, items, picture in zip(log_shares, phrases, lab, strict=True):
            kept = torch.cat((shares[: len(items)], shares[-1:]))
            losses.append(regions_loss(kept, [item.color for item in items], picture))
        return torch.stack(losses).mean()

    heads = nn.ModuleList((regions.per_level, regions.cells, regions.words, regions.nouns))
    new = {id(parameter) for parameter in heads.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": list(heads.parameters()), "lr": 1.5e-3, "weight_decay": 0.2},
        {"params": [p for p in regions.parameters() if id(p) not in new], "lr": 6e-4, "weight_decay": 0.3},
    ]
    fit_part("regions", regions, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)
    drawn = (batch_of(step_rng(seed, "recalibrate", step)) for step in range(60))
    recalibrate(regions, ((lightness.to(device), words.to(device)) for lightness, words, *_ in drawn))


def _said(caption: str, phrase: ColoredPhrase, rng: np.random.Generator) -> str:
    """The noun as it may be asked for: with its colour in six of ten draws, a quarter of the words left out."""
    text = noun_text(caption, phrase, phrase.color if rng.random() < 0.6 else None)
    words = text.split(" ")
    return " ".join(word for word in words if rng.random() >= 0.25) or words[-1]
