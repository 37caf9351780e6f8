"""Train the photo model: `python -m diffcolor_training.photo --data ../shared/data/photos --out out/photo-model`.

Parts, one after the other: tokenizer, VAE (set up, not trained), text tower, colour prior (with the tower), noun
regions, guidance CLIP, UNet. Each checkpoints into OUT/checkpoints and resumes from there. Every draw comes from a
generator seeded by (seed, part, step). The result is OUT/bundle, an ordinary diffusers folder in fp16 with a colour
prior and noun regions beside.

What a photograph needs that scenes did not: grays come from random emulsions; some pictures have one of their hues
turned, with the colour words of their caption turned too, so that the words are needed; and the UNet also sees
pictures in the prior's colours, with the true ones as the target.
"""

import csv
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffcolor_core.color_prior import FACTOR
from diffcolor_training.codec import CHROMA_CHANNELS, LATENT_CHANNELS, build_vae, encode, fit_codec
from diffcolor_training.loop import fit_part, step_rng
from diffcolor_training.parts import IMAGE_MEAN, IMAGE_STD, build_scheduler, build_tokenizer, save_beside, save_bundle
from diffcolor_training.photos import (
    SIDE_PX,
    Photo,
    captioned,
    captions_of,
    draw_photos,
    joined,
    load_photos,
    random_crop,
    random_lightness,
    rotated,
    rotated_words,
)
from diffcolor_training.prior import PromptedPrior, build_prior, train_prior
from diffcolor_training.regions import build_regions, train_regions
from diffcolor_training.text import (
    MAX_LENGTH,
    SHORT_LENGTH,
    TEXT_WIDTH,
    build_text_tower,
    recolored_caption,
    tokenize,
    train_text,
)


def build_unet() -> UNet2DConditionModel:
    """A UNet of 5.4 million parameters. Text is attended to at 12 x 12 and 6 x 6."""
    return UNet2DConditionModel(
        sample_size=SIDE_PX // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in this class's older naming: the number of heads
        norm_num_groups=16,
    )


def train_unet(
    unet: UNet2DConditionModel,
    prompted: PromptedPrior,
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
) -> None:
    """v-prediction with min-SNR's cap of 5, under the embeddings of the frozen text tower.

    The noised pictures have their true colours (half), those of the prior (a third) or none; the target always has
    the true ones. Chroma's channels count four times luminance's, which sampling projects anyway.
    """
    abar = scheduler.alphas_cumprod.to(device)
    channel_weight = torch.full((LATENT_CHANNELS, 1, 1), 0.25, device=device)
    channel_weight[:CHROMA_CHANNELS] = 1.0
    unet.requires_grad_(True)
    prompted.eval().requires_grad_(False)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "unet", step)
        batch = draw_photos(photos, rng, batch_size)
        crops = torch.stack([random_crop(p, SIDE_PX, rng) for p in batch])
        gray, ab = random_lightness(crops, rng), crops[:, 4:].clone()
        captions = captioned(batch, ab, rng)
        ids = tokenize(tokenizer, captions, SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            embeds = prompted.text_encoder(ids).last_hidden_state
            expected = prompted.prior(gray.to(device, memory_format=torch.channels_last), embeds)
        expected = F.interpolate(expected, scale_factor=FACTOR, mode="bilinear", align_corners=False).cpu()
        kind = torch.from_numpy(rng.random(batch_size)).view(-1, 1, 1, 1)
        seen_ab = torch.where(kind < 0.5, ab, torch.where(kind < 0.83, expected, 0.0))
        z, seen = encode(codec, joined(torch.cat((gray, gray)), torch.cat((ab, seen_ab))).to(device)).chunk(2)
        t = torch.from_numpy(rng.integers(0, len(abar), batch_size)).to(device)
        eps = torch.randn(z.shape, device=device)
        a = abar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * seen + (1 - a).sqrt() * eps
        with torch.autocast(device.type, torch.bfloat16):
            v = unet(z_t.to(memory_format=torch.channels_last), t, embeds).sample.float()
        error = (a.sqrt() * z_t - (1 - a).sqrt() * v - z).pow(2)  # of the clean estimate
        return (error * (a / (1 - a)).clamp(max=5) * channel_weight).mean()

    groups: list[dict[str, Any]] = [
        {"params": [p for p in unet.parameters() if p.ndim > 1], "lr": 1.5e-3, "weight_decay": 0.1},
        {"params": [p for p in unet.parameters() if p.ndim <= 1], "lr": 1.5e-3, "weight_decay": 0.0},
    ]
    fit_part("unet", unet, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


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


def write_sources(catalog: Path, file: Path) -> None:
    """Source and licence of each photograph of the training split, as the licences ask for."""
    with catalog.open(newline="", encoding="utf-8") as rows, file.open("w", newline="", encoding="utf-8") as sources:
        writer = csv.DictWriter(sources, ("source", "licence"), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted((r for r in csv.DictReader(rows) if r["split"] == "train"), key=lambda r: r["source"]))


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
    text_steps: int = 500,
    prior_steps: int = 6000,
    regions_steps: int = 600,
    clip_steps: int = 800,
    unet_steps: int = 3000,
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
    prompted = PromptedPrior(build_prior(), build_text_tower(tokenizer)).to(where)
    unet, clip = build_unet().to(where), build_clip(tokenizer).to(where)
    parts = {"text": prompted.text_encoder, "prior": prompted.prior, "unet": unet, "clip": clip}
    sizes = (f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}M" for name, part in parts.items())
    print(f"vocabulary {len(tokenizer)}, parameters: {', '.join(sizes)}", flush=True)
    common: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints, "device": where}
    train_text(prompted.text_encoder, tokenizer, captions, num_steps=text_steps, **common)
    for part in (prompted.prior, unet):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_prior(prompted, tokenizer, photos, num_steps=prior_steps, **common)
    regions = build_regions(prompted.prior, len(tokenizer)).to(where)
    train_regions(regions, tokenizer, photos, num_steps=regions_steps, **common)
    train_clip(clip, tokenizer, photos, num_steps=clip_steps, **common)
    unet.set_attn_processor(AttnProcessor())  # for so few cells a quarter faster than the fused one
    train_unet(unet, prompted, codec, tokenizer, build_scheduler(), photos, num_steps=unet_steps, **common)
    bundle = out / "bundle"
    save_bundle(bundle, tokenizer, build_vae(codec), clip, unet, prompted.text_encoder, build_scheduler())
    save_beside(prompted.prior, bundle / "color_prior")
    save_beside(regions, bundle / "noun_regions")
    write_sources(data / "catalog.csv", out / "sources.csv")
    print(f"bundle: {bundle}")


if __name__ == "__main__":
    typer.run(train)
