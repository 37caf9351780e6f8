"""The colour prior [O]: a small network that knows which colours things have, learned by regression.

A checkpoint may bring one in its folder `color_prior`. From the lightness of a photograph and the embeddings of a
prompt it gives chroma in one step, the mean of what is likely. Stage 1 then starts from that picture instead of the
gray one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffcolor_core.errors import ModelError

FACTOR = 4
"""Pixels per cell of the chroma along a side."""
CHROMA_UNIT = 20.0  # of the network's output, in a*b*
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


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


class ColorPrior(nn.Module):
    """Lightness and prompt to chroma: an encoder of four levels, text at the two coarsest, a decoder with skips.

    widths: of the levels at 1/2, 1/4, 1/8 and 1/16 of the side. num_tokens: prompts of at most so many tokens are
    cut to them, since their padding says nothing; longer ones are taken whole.
    """

    def __init__(self, widths: Sequence[int], text_width: int, num_tokens: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "text_width": text_width, "num_tokens": num_tokens}
        self.num_tokens = num_tokens
        first, second, third, fourth = widths
        self.encode_half = nn.Sequential(_down(1, first), nn.Conv2d(first, first, 3, padding=1), nn.ReLU())
        self.encode_quarter = nn.Sequential(_down(first, second), Residual(second, dropout))
        self.encode_eighth = nn.Sequential(_down(second, third), Residual(third, dropout))
        self.encode_sixteenth = nn.Sequential(_down(third, fourth), Residual(fourth, dropout))
        self.sixteenth_text = TextAttention(fourth, text_width, dropout)
        self.whole = nn.Linear(fourth, fourth)
        self.last = Residual(fourth, dropout)
        self.up_to_eighth = nn.Conv2d(fourth, third, 1)
        self.decode_eighth = Residual(third, dropout)
        self.decode_text = TextAttention(third, text_width, dropout)
        self.up_to_quarter = nn.Conv2d(third, second, 1)
        self.decode_quarter = Residual(second, dropout)
        self.chroma = nn.Conv2d(second, 2, 3, padding=1)

    def forward(self, lightness: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Chroma a*b* [B, 2, h/4, w/4].

        lightness: [B, 1, h, w], 0..100, with sides that are multiples of 4. prompt_embeds: [B, tokens, text_width].
        """
        x = self.encode_half(lightness / 50 - 1)
        quarter = self.encode_quarter(x)
        eighth = self.encode_eighth(quarter)
        x = self.sixteenth_text(self.encode_sixteenth(eighth), prompt_embeds)
        x = self.last(x + self.whole(x.mean(dim=(2, 3)))[:, :, None, None])
        x = self.decode_text(self.decode_eighth(eighth + _enlarged(self.up_to_eighth(x), eighth)), prompt_embeds)
        x = self.decode_quarter(quarter + _enlarged(self.up_to_quarter(x), quarter))
        return CHROMA_UNIT * self.chroma(x).float()

    def save(self, folder: Path) -> None:
        """Write the configuration and the weights, in fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1) + "\n")
        halves = {name: x.half() if x.is_floating_point() else x for name, x in self.state_dict().items()}
        save_file({name: x.contiguous() for name, x in halves.items()}, folder / _WEIGHTS)


def load_color_prior(folder: Path) -> ColorPrior:
    """Read what `ColorPrior.save` wrote, as float32. Raises ModelError if it is missing or damaged."""
    try:
        prior = ColorPrior(**json.loads((folder / _CONFIG).read_text()))
        prior.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the colour prior in {str(folder)!r}: {error}") from error
    return prior


def _down(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
