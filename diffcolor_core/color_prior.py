"""Two small networks beside a checkpoint [O]: which colours things have, and where the things are.

A checkpoint may bring them in its folders `color_prior` and `noun_regions`. From the lightness of a photograph and the
embeds of a prompt the first gives chroma in one step, the mean of what is likely. Stage 1 then starts from that
picture instead of the gray one. The second says which part of the photograph each noun of the prompt names.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffcolor_core.errors import ModelError

FACTOR = 4
"""Pixels per cell of the chroma along a side."""
CHROMA_UNIT = 20.0  # of the network's output, in a*b*
Network = TypeVar("Network", "ColorPrior", "NounRegions")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] to the same."""
        return F.relu(x + self.body(x))


class TextAttention(nn.Module):
    """Cross-attention from cells to the tokens of the prompt, beside an identity."""

    def __init__(self, width: int, text_width: int, dropout: float, num_heads: int = 4) -> None:
        super().__init__()
        self.dropout = nn.Dropout1d(dropout)  # of the prompt's tokens
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        """x [B, width, h, w] and prompt_embeds [B, tokens, text_width] to [B, width, h, w]."""
        cells = x.flatten(2).mT
        k, v = self.key_value(self.dropout(prompt_embeds)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.query(self.norm(cells)), k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # [B, heads, cells, tokens]
        return x + self.out((weights @ v).transpose(1, 2).flatten(2)).mT.unflatten(-1, x.shape[-2:])


class Trunk(nn.Module):
    """An encoder of four levels and a decoder with skips, from lightness to features.

    widths: of the levels at 1/2, 1/4, 1/8 and 1/16 of the side. text_width: of the prompt's embeds, which are attended
    to at the two coarsest levels; without it there is no text.
    """

    def __init__(self, widths: Sequence[int], text_width: int | None, dropout: float) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.encode_half = nn.Sequential(_down(1, first), nn.Conv2d(first, first, 3, padding=1), nn.ReLU())
        self.encode_quarter = nn.Sequential(_down(first, second), Residual(second, dropout))
        self.encode_eighth = nn.Sequential(_down(second, third), Residual(third, dropout))
        self.encode_sixteenth = nn.Sequential(_down(third, fourth), Residual(fourth, dropout))
        self.whole = nn.Linear(fourth, fourth)
        self.last = Residual(fourth, dropout)
        self.up_to_eighth = nn.Conv2d(fourth, third, 1)
        self.decode_eighth = Residual(third, dropout)
        self.up_to_quarter = nn.Conv2d(third, second, 1)
        self.decode_quarter = Residual(second, dropout)
        if text_width is not None:
            self.sixteenth_text = TextAttention(fourth, text_width, dropout)
            self.decode_text = TextAttention(third, text_width, dropout)

    def levels(self, lightness: Tensor, prompt_embeds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 1/4, 1/8 and 1/16 of the side; lightness: [B, 1, h, w], 0..100."""
        quarter = self.encode_quarter(self.encode_half(lightness / 50 - 1))
        eighth = self.encode_eighth(quarter)
        sixteenth = self.encode_sixteenth(eighth)
        if prompt_embeds is not None:
            sixteenth = self.sixteenth_text(sixteenth, prompt_embeds)
        sixteenth = self.last(sixteenth + self.whole(sixteenth.mean(dim=(2, 3)))[:, :, None, None])
        eighth = self.decode_eighth(eighth + enlarged(self.up_to_eighth(sixteenth), eighth))
        if prompt_embeds is not None:
            eighth = self.decode_text(eighth, prompt_embeds)
        return self.decode_quarter(quarter + enlarged(self.up_to_quarter(eighth), quarter)), eighth, sixteenth


class ColorPrior(Trunk):
    """Lightness and prompt to chroma.

    num_tokens: prompts of at most so many tokens are cut to them, since their padding says nothing; longer ones are
    taken whole.
    """

    def __init__(self, widths: Sequence[int], text_width: int, num_tokens: int, dropout: float = 0.0) -> None:
        super().__init__(widths, text_width, dropout)
        self.config = {"widths": list(widths), "text_width": text_width, "num_tokens": num_tokens}
        self.num_tokens = num_tokens
        self.chroma = nn.Conv2d(widths[1], 2, 3, padding=1)

    def forward(self, lightness: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Chroma a*b* [B, 2, h/4, w/4].

        lightness: [B, 1, h, w], 0..100, with sides that are multiples of 4. prompt_embeds: [B, tokens, text_width].
        """
        return CHROMA_UNIT * self.chroma(self.levels(lightness, prompt_embeds)[0]).float()


class NounRegions(Trunk):
    """Lightness and nouns to the part of the picture that each names.

    A cell's features are compared with each noun's; the nouns and "none of them" then share the cell. num_words: of
    the tokenizer's vocabulary.
    """

    def __init__(self, widths: Sequence[int], num_words: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__(widths, None, dropout)
        self.config = {"widths": list(widths), "num_words": num_words, "width": width}
        self.per_level = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths[:0:-1])
        self.cells = nn.Sequential(
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width + 1, 1),  # the last channel is the logit of none
        )
        self.words = nn.Embedding(num_words, width)
        self.nouns = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width + 1))  # the last: a bias

    def forward(self, lightness: Tensor, words: Tensor) -> Tensor:
        """Logarithms of the shares [B, P + 1, h/4, w/4]; that of none of the nouns is the last.

        lightness: [B, 1, h, w], 0..100. words: token ids [B, P, T], filled up with -1. A noun of no token gets nothing.
        """
        levels = self.levels(lightness)[::-1]
        parts = [enlarged(reduce(x), levels[-1]) for reduce, x in zip(self.per_level, levels, strict=True)]
        cells = self.cells(sum(parts))
        there = (words >= 0).float()[..., None]  # [B, P, T, 1]
        mean = (self.words(words.clamp(min=0)) * there).sum(dim=2) / there.sum(dim=2).clamp(min=1)
        nouns = self.nouns(mean)
        logits = torch.einsum("bdhw,bpd->bphw", cells[:, :-1], nouns[..., :-1]) / nouns.shape[-1] ** 0.5
        logits = (logits + nouns[..., -1:, None]).masked_fill(there.sum(dim=2)[..., None] == 0, -1e4)
        return torch.cat((logits, cells[:, -1:]), dim=1).float().log_softmax(dim=1)


def load(kind: type[Network], folder: Path) -> Network:
    """Read a configuration and weights, as float32. Raises ModelError if it is missing or damaged."""
    try:
        network = kind(**json.loads((folder / CONFIG).read_text()))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {str(folder)!r}: {error}") from error
    return network


def _down(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, h, w] at the size of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
