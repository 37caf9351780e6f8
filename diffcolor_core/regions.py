"""Regions [O]: which part of a picture each noun names, and one prompt for each part.

The regions come from the network's own cross-attention (after DAAM, Tang et al. 2022), without a segmenter.
Where a checkpoint brings `noun_regions` they come from there.
Joining several prompts in one picture follows MultiDiffusion (Bar-Tal et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffcolor_core.color_prior import enlarged
from diffcolor_core.color_terms import ColoredPhrase, color_words, spoken
from diffcolor_core.diffusion import Predict, add_noise
from diffcolor_core.models import Checkpoint
from diffcolor_core.prompts import NounPhrase
from diffcolor_scans.images import gray_input, upsample_guided

TIMESTEPS = (50, 100, 200)
"""Noise levels at which cross-attention is read: low ones, where the picture still shows what is where."""

HALF_SURE, HALF_OF_LARGEST, SHARPNESS = 0.35, 0.55, 12.0
"""The share of `noun_regions` that is taken as half, as it is and beside the largest, and how steep that is."""


@torch.no_grad()
def phrase_regions(
    checkpoint: Checkpoint, lightness: Tensor, prompt: str, phrases: Sequence[NounPhrase], generator: torch.Generator
) -> Tensor:
    """Which part of the gray picture each noun phrase of the prompt names: [P, h, w], summing to 1 over P.

    lightness: [1, h, w], 0..100. The base UNet sees the gray picture with a little noise; a cell belongs to the
    phrases by how much it attends to their nouns. The shares are then brought to [h, w] along the picture's edges.
    """
    positions = checkpoint.token_positions(prompt, [(phrase.noun_start, phrase.end) for phrase in phrases])
    embeds = checkpoint.encode_prompts([prompt])
    z = checkpoint.encode(gray_input(lightness)[None].to(checkpoint.device))  # [1, C, h/f, w/f]
    eps = torch.randn((len(TIMESTEPS), *z.shape[1:]), generator=generator).to(z)
    t = torch.tensor(TIMESTEPS, device=z.device)
    z_t = add_noise(checkpoint.scheduler, z.expand_as(eps), eps, t)
    height, width = z.shape[-2:]
    heat = torch.zeros(len(phrases), height, width)
    for grid in checkpoint.word_maps(z_t, t, embeds.expand(len(t), -1, -1)):
        nouns = torch.stack([grid.cpu()[list(tokens)].mean(dim=0) for tokens in positions])  # [P, rows, columns]
        heat += F.interpolate(nouns[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    share = (heat / heat.sum(dim=0).clamp(min=1e-12)) ** 4  # sharpened: the strongest noun takes most of a cell
    share = share / share.sum(dim=0).clamp(min=1e-12)
    rows = slice(0, lightness.shape[-2])
    small_guide = F.adaptive_avg_pool2d(lightness, (height, width))
    full = upsample_guided(share, small_guide, lightness, rows, lightness.shape[-2])
    return full / full.sum(dim=0)


def noun_text(prompt: str, item: ColoredPhrase, color: str | None) -> str:
    """The words of a noun phrase with no colour but `color`."""
    phrase = item.phrase
    words = [word for word in prompt[phrase.start : phrase.noun_start].split() if not color_words(word)]
    return " ".join([*([color] if color else []), *words, prompt[phrase.noun_start : phrase.end]])


def word_ids(tokenizer: CLIPTokenizer, texts: Sequence[Sequence[str]]) -> Tensor:
    """Token ids [B, P, T] of the nouns of B pictures, filled up with -1."""
    ids = [[tokenizer(spoken(text), add_special_tokens=False).input_ids for text in nouns] for nouns in texts]
    longest = max((len(tokens) for nouns in ids for tokens in nouns), default=1)
    full = torch.full((len(ids), max(map(len, ids)), longest), -1)
    for row, nouns in zip(full, ids, strict=True):
        for place, tokens in zip(row, nouns, strict=False):
            place[: len(tokens)] = torch.tensor(tokens)
    return full


@torch.no_grad()
def named_regions(checkpoint: Checkpoint, lightness: Tensor, nouns: Sequence[str], told: Tensor) -> Tensor:
    """The same as `phrase_regions` from the checkpoint's `noun_regions`: [P, h, w], at most 1 over P.

    It is the mean of what the picture and its mirror image give, sharpened, as shares are cautious. told: [P], whether
    a noun comes with the colour that it has. Such a noun is there, so that its shares count beside its largest.
    """
    assert checkpoint.noun_regions is not None  # the caller has looked
    both = torch.stack((lightness, lightness.flip(-1))).to(checkpoint.device)
    words = word_ids(checkpoint.tokenizer, [nouns]).to(checkpoint.device)
    with checkpoint.autocast():
        seen, mirrored = checkpoint.noun_regions(both, words.expand(2, -1, -1)).exp()
    share = enlarged(((seen + mirrored.flip(-1)) / 2)[None, :-1], lightness)[0].cpu()
    largest = share.flatten(1).quantile(0.97, dim=1)[:, None, None]
    steep = torch.where(told[:, None, None], share / (largest + 0.05) - HALF_OF_LARGEST, share - HALF_SURE)
    sharp = torch.sigmoid(SHARPNESS * steep)
    return sharp / sharp.sum(dim=0).clamp(min=1)


@dataclass(frozen=True)
class RegionalPrompts:
    """Several prompts for one picture, each for its own part of it.

    owners: [R], the index of the picture that each row of prompt_embeds is for. masks: [R, h, w] at any size;
    those of one picture sum to 1.
    """

    owners: Tensor
    masks: Tensor

    def predict(self, predict: Predict, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """`predict` for every row, joined by the masks into one raw output for every picture.

        z_t: [B, C, h, w], one latent for each picture. For guidance as many unconditional ones may stand before
        them, with as many rows of prompt_embeds before the others.
        """
        plain = len(prompt_embeds) - len(self.owners)
        rows = torch.cat((torch.arange(plain), plain + self.owners)).to(z_t.device)
        shares = F.interpolate(self.masks[:, None], size=z_t.shape[-2:], mode="area").to(z_t)  # [R, 1, h, w]
        shares = torch.cat((torch.ones_like(shares[:1]).expand(plain, -1, -1, -1), shares))
        outputs = predict(z_t[rows], t[rows], prompt_embeds)
        return torch.zeros_like(z_t).index_add(0, rows, outputs * shares)
