"""The photo model's text tower, and its first training: which colour word stands before which noun."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffcolor_core.color_terms import ColoredPhrase, colored_phrases
from diffcolor_training.loop import fit_part, step_rng
from diffcolor_training.photos import is_color_word

TEXT_WIDTH = 160
MAX_LENGTH = 77
SHORT_LENGTH = 32  # tokens: enough for nearly every caption of the data


def build_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The UNet's text tower: three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids [B, length], padded, cut off at `length`."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class PhraseReader(nn.Module):
    """A text tower with a head that names the colour of the phrase that each noun ends."""

    def __init__(self, text_encoder: CLIPTextModel, num_colors: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.color = nn.Linear(TEXT_WIDTH, 1 + num_colors)


COLOR_WORDS = ("green", "white", "blue", "brown", "gray", "tan", "red", "yellow", "black", "pink", "turquoise",
               "purple", "orange")  # fmt: skip


@cache
def _phrases(caption: str) -> list[ColoredPhrase]:
    return colored_phrases(caption, "")


def recolored_caption(caption: str, rng: np.random.Generator) -> tuple[str, list[tuple[int, int]]]:
    """The caption with a random colour word, or none, before each noun: text, and (end of noun, colour number)."""
    pieces, nouns, last = [], [], 0
    for item in _phrases(caption):
        phrase = item.phrase
        words = [w for w in caption[phrase.start : phrase.noun_start].split() if not is_color_word(w.lower())]
        number = int(rng.integers(1, len(COLOR_WORDS) + 1)) if rng.random() < 0.7 else 0
        words = [*([COLOR_WORDS[number - 1]] if number else []), *words, caption[phrase.noun_start : phrase.end]]
        pieces += [caption[last : phrase.start], " ".join(words)]
        nouns.append((sum(map(len, pieces)), number))
        last = phrase.end
    return "".join([*pieces, caption[last:]]), nouns


def train_text(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Teach the text tower which colour word stands before which noun, on captions coloured at random."""
    reader = PhraseReader(text_encoder, len(COLOR_WORDS)).to(device)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "text", step)
        drawn = [recolored_caption(captions[int(i)], rng) for i in rng.integers(len(captions), size=48)]
        length = SHORT_LENGTH if rng.random() < 0.75 else MAX_LENGTH
        encoded = tokenizer(
            [text for text, _ in drawn],
            padding="max_length", max_length=length, truncation=True, return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        labels = torch.full(encoded.input_ids.shape, -1)
        for row, (_, nouns) in enumerate(drawn):
            for end, number in nouns:
                hits = (encoded.offset_mapping[row, :, 1] == end).nonzero()
                if len(hits):
                    labels[row, hits[0, 0]] = number
        here = labels >= 0
        hidden = reader.text_encoder(encoded.input_ids.to(device)).last_hidden_state
        return F.cross_entropy(reader.color(hidden[here.to(device)]), labels[here].to(device))

    groups = [{"params": list(reader.parameters()), "lr": 1e-3}]
    fit_part("text", reader, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints, ema_decay=0.99)
