"""Train the photo model: `python -m diffcolor_training.photo --data ../shared/data/photos --out out/photo-model`.

Parts, one after the other: tokenizer, VAE (set up, not trained), text tower, UNet (with the tower), guidance CLIP. Each
checkpoints into OUT/checkpoints and resumes from there. Every draw comes from a generator seeded by
(seed, part, step). The result is OUT/bundle, an ordinary diffusers folder in fp16.

What a photograph needs that scenes did not: half of the UNet's inputs are the gray picture, with the
coloured one as the target, so that its clean estimate from gray is a colorizer of its own; grays come
from random emulsions; and some pictures have all their hues turned, with the colour words of their
caption turned too, so that the words are needed.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffcolor_core.color_terms import ColoredPhrase, colored_phrases
from diffcolor_training.loop import fit_part, step_rng
from diffcolor_training.parts import IMAGE_MEAN, IMAGE_STD, build_scheduler, build_tokenizer, save_bundle
from diffcolor_training.photos import (
    Photo,
    captions_of,
    draw_caption,
    is_color_word,
    joined,
    load_photos,
    random_crop,
    random_lightness,
    rotated,
    rotated_words,
)

SIDE_PX = 96
LATENT_CHANNELS = 12
CHROMA_CHANNELS = 2  # the first ones
TEXT_WIDTH = 160
MAX_LENGTH = 77
SHORT_LENGTH = 32  # tokens: enough for nearly every caption of the data
PLATE_SHARE = 0.75
_OPPONENT = torch.tensor([[0.299, 0.587, 0.114], [-0.5, 1.0, -0.5], [0.5, 0.0, -0.5]])


def build_vae(codec: Tensor) -> AutoencoderKL:
    """An AutoencoderKL whose latents are `codec` [12, 18] times the cell: 16 pixels of Y, mean U and mean V.

    The networks are set up to be linear, not trained: a VAE of this size trained from nothing on these
    photographs for as long as there was lost most of the chroma. Residual branches end in zeros, so what is
    left are convolutions that gather a 4 x 4 cell; SiLU is undone by pairs, silu(x) - silu(-x) = x; group
    normalisation is held still by two large constant channels. The decoder gives back the cell's mean
    colour in all of its pixels: luminance is never taken from it, and chroma must survive many passes.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=SIDE_PX,
        scaling_factor=1.0,
    ).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in.weight[:3, :, 1, 1] = _OPPONENT
    gather = encoder.down_blocks[0].downsamplers[0].conv.weight
    for dy in (0, 1):
        for dx in (0, 1):
            gather[2 * dy + dx, 0, dy, dx] = 1
            gather[4, 1, dy, dx] = gather[5, 2, dy, dx] = 0.25
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[:6, :6, 0, 0] = torch.eye(6)
    gather = encoder.down_blocks[1].downsamplers[0].conv.weight
    for dy in (0, 1):
        for dx in (0, 1):
            for y in (0, 1):
                for x in (0, 1):
                    gather[4 * (2 * dy + y) + 2 * dx + x, 2 * y + x, dy, dx] = 1
            gather[16, 4, dy, dx] = gather[17, 5, dy, dx] = 0.25
    _pairs(encoder.down_blocks[2].resnets[0].conv_shortcut, codec)
    _undo(encoder.conv_norm_out, LATENT_CHANNELS)
    for k in range(LATENT_CHANNELS):
        encoder.conv_out.weight[k, 2 * k : 2 * k + 2, 1, 1] = torch.tensor([1.0, -1.0])
    nn.init.constant_(encoder.conv_out.bias[LATENT_CHANNELS:], -12.0)  # logarithm of the posterior's variance
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * LATENT_CHANNELS)
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(LATENT_CHANNELS)

    means = torch.zeros(3, 18)  # of Y, U, V in a cell
    means[0, :16] = 1 / 16
    means[1, 16] = means[2, 17] = 1
    decoder.conv_in.weight[:3, :, 1, 1] = torch.linalg.inv(_OPPONENT) @ means @ torch.linalg.pinv(codec)
    for block in decoder.up_blocks[:2]:
        width = block.upsamplers[0].conv.weight.shape[0]
        block.upsamplers[0].conv.weight[:, :, 1, 1] = torch.eye(width)
    width = decoder.up_blocks[1].resnets[0].conv_shortcut.weight.shape[0]
    decoder.up_blocks[1].resnets[0].conv_shortcut.weight[:, :width, 0, 0] = torch.eye(width)
    _pairs(decoder.up_blocks[2].resnets[0].conv_shortcut, torch.eye(3))
    _undo(decoder.conv_norm_out, 3)
    for k in range(3):
        decoder.conv_out.weight[k, 2 * k : 2 * k + 2, 1, 1] = torch.tensor([1.0, -1.0])
    return vae.eval()


_STILL = 100.0  # of the two constant channels


def _pairs(conv: nn.Conv2d, matrix: Tensor) -> None:
    """A 1 x 1 convolution that gives each row of `matrix` twice, with both signs, and the constant channels."""
    rows, columns = matrix.shape
    conv.weight[: 2 * rows, :columns, 0, 0] = torch.stack((matrix, -matrix), dim=1).flatten(0, 1)
    assert conv.bias is not None
    conv.bias[2 * rows : 2 * rows + 2] = torch.tensor([_STILL, -_STILL])


def _undo(norm: nn.GroupNorm, num_values: int) -> None:
    """Scale what the constant channels have made the normalisation divide by."""
    norm.weight.zero_()
    norm.weight[: 2 * num_values] = (2 * _STILL**2 / norm.num_channels) ** 0.5


def cells_of(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as cells [B, 18, H/4, W/4]: 16 pixels of Y, mean U and mean V."""
    yuv = torch.einsum("ij,bjhw->bihw", _OPPONENT.to(x), x)
    return torch.cat((F.pixel_unshuffle(yuv[:, :1], 4), F.avg_pool2d(yuv[:, 1:], 4)), dim=1)


def fit_codec(x: Tensor) -> Tensor:
    """The map [12, 18] from cells to latents, from pictures [N, 3, H, W] in [-1, 1].

    First the two of chroma with unit variance, decorrelated; then the ten first principal components of
    luminance, with a standard deviation of 3 for the first and less for detail: luminance outlasts colour
    in the noise, as it does in large VAEs.
    """
    rows = cells_of(x).movedim(1, -1).flatten(0, 2).double()
    codec = torch.zeros(LATENT_CHANNELS, 18, dtype=torch.float64)
    ab = torch.linalg.svd(rows[:, 16:].T @ rows[:, 16:] / len(rows))
    codec[:CHROMA_CHANNELS, 16:] = (ab.U / ab.S.sqrt()).T
    luminance = rows[:, :16] - rows[:, :16].mean()
    spread = torch.linalg.svd(luminance.T @ luminance / len(rows))
    deviations = spread.S.sqrt()[: LATENT_CHANNELS - CHROMA_CHANNELS]
    wanted = 3 * (deviations / deviations[0]).sqrt().clamp(min=0.25)
    codec[CHROMA_CHANNELS:, :16] = (spread.U[:, : len(wanted)] * (wanted / deviations)).T
    return codec.float()


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


def build_unet() -> UNet2DConditionModel:
    """Text attended to at 12 x 12 and 6 x 6."""
    return UNet2DConditionModel(
        sample_size=SIDE_PX // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in this class's older naming: the number of heads
        norm_num_groups=16,
        dropout=0.1,
    )


def draw_photos(photos: list[Photo], rng: np.random.Generator, size: int) -> list[Photo]:
    """A batch, `PLATE_SHARE` of it plates."""
    plates = [p for p in photos if p.plate]
    others = [p for p in photos if not p.plate]
    return [
        group[int(rng.integers(len(group)))]
        for group in (plates if rng.random() < PLATE_SHARE else others for _ in range(size))
    ]


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


class ConditionedUNet(nn.Module):
    """The UNet and its text tower as one module, so that they train and checkpoint together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids [B, length], padded, cut off at `length`."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def encode(codec: Tensor, rgb: Tensor) -> Tensor:
    """Latents [B, 12, h/4, w/4] of sRGB [B, 3, h, w] in [0, 1]: what the VAE of this codec gives."""
    return torch.einsum("ij,bjhw->bihw", codec.to(rgb), cells_of(rgb * 2 - 1))


def train_unet(
    model: ConditionedUNet,
    codec: Tensor,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    photos: list[Photo],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
    batch_size: int = 32,
    after: Callable[[int], None] | None = None,
) -> None:
    """v-prediction; 60% of the noised inputs are gray, 16% carry wrong chroma; the target never does.

    Gray inputs are learned in the clean estimate (its squared error), the others with min-SNR's cap of 5.
    Chroma's channels count four times luminance's, which sampling projects anyway.
    """
    abar = scheduler.alphas_cumprod.to(device)
    channel_weight = torch.full((LATENT_CHANNELS, 1, 1), 0.25, device=device)
    channel_weight[:CHROMA_CHANNELS] = 1.0
    model.requires_grad_(True)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "unet", step)
        batch = draw_photos(photos, rng, batch_size)
        crops = torch.stack([random_crop(p, SIDE_PX, rng) for p in batch])
        gray, ab = random_lightness(crops, rng), crops[:, 4:].clone()
        captions, seen_ab = [], torch.zeros_like(ab)
        is_gray = torch.from_numpy(rng.random(batch_size) < 0.6)
        for i, photo in enumerate(batch):
            caption, colored = draw_caption(photo, rng)
            if colored and rng.random() < 0.25:
                degrees = rng.uniform(60, 300)
                ab[i], caption = rotated(ab[i], degrees), rotated_words(caption, degrees)
            captions.append(caption)
            if not is_gray[i]:
                seen_ab[i] = ab[i]
                if rng.random() < 0.4:
                    wrong = rotated(ab[i], rng.uniform(60, 300)) if colored and rng.random() < 0.5 else ab[i]
                    seen_ab[i] = rng.uniform(0, 1) * wrong
        z, seen = encode(codec, joined(torch.cat((gray, gray)), torch.cat((ab, seen_ab))).to(device)).chunk(2)
        low = is_gray.numpy() & (rng.random(batch_size) < 0.7)
        timesteps = np.where(low, rng.integers(0, 250, batch_size), rng.integers(0, 1000, batch_size))
        t = torch.from_numpy(timesteps).to(device)
        length = SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH
        ids = tokenize(tokenizer, captions, length).to(device)
        eps = torch.randn(z.shape, device=device)
        a = abar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * seen + (1 - a).sqrt() * eps
        with torch.autocast(device.type, torch.bfloat16):
            embeds = model.text_encoder(ids).last_hidden_state
            v = model.unet(z_t.to(memory_format=torch.channels_last), t, embeds).sample.float()
        error = (a.sqrt() * z_t - (1 - a).sqrt() * v - z).pow(2)  # of the clean estimate
        snr = a / (1 - a)
        weight = torch.where(is_gray.to(device).view(-1, 1, 1, 1), 2.0, snr.clamp(max=5))
        return (error * weight * channel_weight).mean()

    decayed = [p for p in model.unet.parameters() if p.ndim > 1]
    plain = [p for p in model.unet.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": 1.5e-3, "weight_decay": 0.1},
        {"params": plain, "lr": 1.5e-3, "weight_decay": 0.0},
        {"params": list(model.text_encoder.parameters()), "lr": 4e-4, "weight_decay": 0.01},
    ]
    fit_part("unet", model, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


CLIP_WIDTH = 128
GRAY_CAPTIONS = ("A grayscale photograph", "A black and white photograph", "A gray photograph of {}")
BROWN_CAPTIONS = ("Brownish average colors for objects", "A sepia photograph", "A brownish photograph of {}")


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The guidance CLIP: two towers of three layers. It shares nothing with the UNet's text tower."""
    common = {"hidden_size": CLIP_WIDTH, "intermediate_size": 4 * CLIP_WIDTH, "num_hidden_layers": 3}
    text = {
        **common,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": CLIP_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **common,
        "num_attention_heads": 4,
        "image_size": SIDE_PX,
        "patch_size": 12,
        "projection_dim": CLIP_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_WIDTH))


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    photos: list[Photo],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Contrastive training; each picture also faces its own caption in other colours.

    A tenth of the pictures are gray and a tenth brownish, under captions that say so: what the anti-colour
    prompts of equation (1) mean must be known.
    """
    captioned = [p for p in photos if p.context]

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "clip", step)
        batch = draw_photos(captioned, rng, 64)
        crops = torch.stack([random_crop(p, SIDE_PX, rng) for p in batch])
        gray, ab = random_lightness(crops, rng), crops[:, 4:].clone()
        captions, negatives = [], []
        for i, photo in enumerate(batch):
            caption = photo.target if photo.target and rng.random() < 0.8 else photo.context
            kind = rng.random()
            if kind < 0.2:
                wordings = GRAY_CAPTIONS if kind < 0.1 else BROWN_CAPTIONS
                other = caption
                caption = str(rng.choice(wordings)).format(photo.context)
                tint = torch.tensor([7.0, 18.0]) * float(rng.uniform(0.5, 1.2))
                ab[i] = 0.0 if kind < 0.1 else 0.15 * ab[i] + tint[:, None, None]
            else:
                if photo.target and rng.random() < 0.3:
                    degrees = rng.uniform(60, 300)
                    ab[i], caption = rotated(ab[i], degrees), rotated_words(caption, degrees)
                other = recolored_caption(caption, rng)[0]
            captions.append(caption)
            negatives.append(other)
        ids = tokenize(tokenizer, captions + negatives, SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH).to(device)
        x = joined(gray, ab).to(device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        with torch.autocast(device.type, torch.bfloat16):
            image = clip.get_image_features(pixel_values=(x - mean) / std).pooler_output
            text = clip.get_text_features(input_ids=ids).pooler_output
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # [B, 2B]
        same = torch.tensor([[a == b for b in captions + negatives] for a in captions], device=device)
        same &= ~torch.eye(len(captions), 2 * len(captions), dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(len(captions), device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(captions)].T, target)) / 2

    groups: list[dict[str, Any]] = [{"params": list(clip.parameters()), "lr": 1e-3, "weight_decay": 0.1}]
    fit_part("clip", clip, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


def _tokenizer_in(checkpoints: Path, captions: list[str]) -> CLIPTokenizer:
    """The tokenizer of an earlier call, else a new one: its trainer breaks ties in another order each time."""
    folder = checkpoints / "tokenizer"
    if not folder.exists():
        build_tokenizer(captions).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def train(
    data: Annotated[Path, typer.Option(help="Folder of photographs with its catalog.csv.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished bundle.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of crops, captions, weights and noise.")] = 0,
    text_steps: int = 600,
    unet_steps: int = 5000,
    clip_steps: int = 800,
) -> None:
    """Train the photo model from nothing, or go on where an earlier call was stopped."""
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    photos = load_photos(data, "train")
    captions = captions_of(photos)
    print(f"{len(photos)} photographs, {len(captions)} captions", flush=True)
    torch.manual_seed(seed)
    tokenizer = _tokenizer_in(checkpoints, captions)
    rng = np.random.default_rng(seed)
    sample = torch.stack([random_crop(p, SIDE_PX, rng) for p in draw_photos(photos, rng, 512)])
    codec = fit_codec(sample[:, :3] * 2 - 1)
    save_file({"codec": codec}, checkpoints / "codec.safetensors")
    model = ConditionedUNet(build_unet(), build_text_tower(tokenizer)).to(where)
    print(f"tokenizer {len(tokenizer)}, parameters: " + ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}M"
        for name, part in (("unet", model.unet), ("text", model.text_encoder))
    ), flush=True)  # fmt: skip
    common: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints, "device": where}
    train_text(model.text_encoder, tokenizer, captions, num_steps=text_steps, **common)
    model.unet.to(memory_format=torch.channels_last)
    model.unet.set_attn_processor(AttnProcessor())  # for so few cells a quarter faster than the fused one
    train_unet(model, codec, tokenizer, build_scheduler(), photos, num_steps=unet_steps, **common)
    torch.manual_seed(seed + 1)
    clip = build_clip(tokenizer).to(where)
    train_clip(clip, tokenizer, photos, num_steps=clip_steps, **common)
    save_bundle(out / "bundle", tokenizer, build_vae(codec), clip, model.unet, model.text_encoder, build_scheduler())
    print(f"bundle: {out / 'bundle'}")


if __name__ == "__main__":
    typer.run(train)
