"""Train the colour prior of the photo model: `python -m diffcolor_training.prior --data ... --out out/photo-model`.

A small network that knows which colours things have: from a gray photograph's latents and its caption
to chroma, in one step. It is the regression that the diffusion model is measured against, and what
stage 1 may start from. It shares the photo model's tokenizer and VAE, and has a text tower of its own.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffcolor_training.loop import fit_part, step_rng
from diffcolor_training.photo import (
    LATENT_CHANNELS,
    MAX_LENGTH,
    SHORT_LENGTH,
    SIDE_PX,
    TEXT_WIDTH,
    ConditionedUNet,
    build_text_tower,
    draw_photos,
    encode,
    tokenize,
    train_text,
)
from diffcolor_training.photos import (
    Photo,
    captions_of,
    draw_caption,
    joined,
    load_photos,
    random_crop,
    random_lightness,
    rotated,
    rotated_words,
)

CHROMA_UNIT = 20.0  # of the network's output, in a*b*


def build_prior() -> UNet2DConditionModel:
    """Latents of the gray picture in, a*b* / 20 out; text attended to at 12 x 12 and 6 x 6."""
    return UNet2DConditionModel(
        sample_size=SIDE_PX // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 160),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in this class's older naming: the number of heads
        norm_num_groups=16,
        dropout=0.1,
    )


def train_prior(
    model: ConditionedUNet,
    codec: Tensor,
    tokenizer: CLIPTokenizer,
    photos: list[Photo],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
    batch_size: int = 32,
) -> None:
    """Squared error of chroma; a robust loss gave a third of the true chroma. Captions and grays as for the UNet."""
    model.requires_grad_(True)
    zero = torch.zeros(batch_size, dtype=torch.long, device=device)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "prior", step)
        batch = draw_photos(photos, rng, batch_size)
        crops = torch.stack([random_crop(p, SIDE_PX, rng) for p in batch])
        gray, ab = random_lightness(crops, rng), F.avg_pool2d(crops[:, 4:], 4)
        captions = []
        for i, photo in enumerate(batch):
            caption, colored = draw_caption(photo, rng)
            if colored and rng.random() < 0.1:
                degrees = rng.uniform(60, 300)
                ab[i], caption = rotated(ab[i], degrees), rotated_words(caption, degrees)
            captions.append(caption)
        z = encode(codec, joined(gray, torch.zeros(batch_size, 2, SIDE_PX, SIDE_PX))).to(device)
        ids = tokenize(tokenizer, captions, SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            embeds = model.text_encoder(ids).last_hidden_state
            out = model.unet(z.to(memory_format=torch.channels_last), zero, embeds).sample.float()
        return F.mse_loss(out, ab.to(device) / CHROMA_UNIT)

    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.unet.parameters() if p.ndim > 1], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [p for p in model.unet.parameters() if p.ndim <= 1], "lr": 2e-3, "weight_decay": 0.0},
        {"params": list(model.text_encoder.parameters()), "lr": 4e-4, "weight_decay": 0.01},
    ]
    fit_part("prior", model, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


def train(
    data: Annotated[Path, typer.Option(help="Folder of photographs with its catalog.csv.")],
    out: Annotated[Path, typer.Option(help="Folder that `diffcolor_training.photo` trains in.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of crops, captions, weights and noise.")] = 0,
    steps: int = 3000,
) -> None:
    """Train the colour prior, or go on where an earlier call was stopped."""
    checkpoints, where = out / "checkpoints", torch.device(device)
    photos = load_photos(data, "train")
    tokenizer = CLIPTokenizer.from_pretrained(checkpoints / "tokenizer")
    codec = load_file(checkpoints / "codec.safetensors")["codec"]
    torch.manual_seed(seed)
    model = ConditionedUNet(build_prior(), build_text_tower(tokenizer)).to(where)
    size = sum(p.numel() for p in model.unet.parameters()) / 1e6
    print(f"prior {size:.2f}M parameters", flush=True)
    # The tower starts from what the photo model's has learned of colour words: a finished part only loads.
    common: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints, "device": where}
    train_text(model.text_encoder, tokenizer, captions_of(photos), num_steps=0, **common)
    model.unet.to(memory_format=torch.channels_last)
    model.unet.set_attn_processor(AttnProcessor())
    train_prior(model, codec, tokenizer, photos, num_steps=steps, **common)


if __name__ == "__main__":
    typer.run(train)
