"""Distill a tiny VAE from the VAE of a checkpoint, on rendered scenes and on mixtures of their latents.

python -m diffcolor_training.tiny_vae demo out/demo-tiny        (40 minutes beside other work; resumes)

Writes a copy of the checkpoint with `tiny_vae` in its folder. For Stable Diffusion there are published ones (TAESD).
"""

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.model_files import resolve
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_training.dataset import cached_pictures
from diffcolor_training.loop import fit_part, step_rng

WIDTH, BATCH = 32, 8


def build_tiny_vae(checkpoint: Checkpoint) -> AutoencoderTiny:
    """An AutoencoderTiny for the latents of this checkpoint, with two blocks at each size."""
    levels = len(checkpoint.vae.config.block_out_channels)
    widths, blocks = (WIDTH,) * levels, (2,) * (levels - 1)
    return AutoencoderTiny(
        latent_channels=checkpoint.vae.config.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *blocks),
        num_decoder_blocks=(*blocks, 1),
    )


def distill(checkpoint: Checkpoint, pictures: np.ndarray, steps: int, seed: int, folder: Path) -> AutoencoderTiny:
    """Train a tiny VAE to encode and decode as the checkpoint's. pictures: [N, 3, h, w], uint8."""
    torch.manual_seed(seed)
    tiny = build_tiny_vae(checkpoint)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "batch", step)
        chosen = pictures[np.sort(rng.choice(len(pictures), BATCH, replace=False))]
        x = torch.from_numpy(chosen).float() / 127.5 - 1
        with torch.no_grad():
            z = checkpoint.encode(x)
            share = torch.from_numpy(rng.uniform(size=(BATCH, 1, 1, 1))).float()
            mixed = torch.cat((z, share * z + (1 - share) * z.roll(1, dims=0)))  # no picture's, as in early steps
            decoded = checkpoint.decode(mixed)
        return F.l1_loss(tiny.decode(mixed).sample, decoded) + F.l1_loss(tiny.encode(x).latents, z)

    fit_part(
        *("tiny_vae", tiny, [{"params": list(tiny.parameters()), "lr": 2e-3}], loss_of),
        seed=seed,
        num_steps=steps,
        checkpoints=folder,
    )
    return tiny


def main(
    model: Annotated[str, typer.Argument(help="`demo`, or the folder of a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The copy with a tiny VAE is written here.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = 2000,
    scenes: Annotated[int, typer.Option(help="Rendered scenes to train on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of scenes, weights and order.")] = 0,
) -> None:
    """Distill, and tell how far pictures and latents are from the VAE's own."""
    checkpoint = load_checkpoint(model)
    work = out.with_name(f"{out.name}-training")
    work.mkdir(parents=True, exist_ok=True)
    pictures = cached_pictures(work, seed=seed, num_scenes=scenes + 64)
    tiny = distill(checkpoint, pictures[:scenes], steps, seed, work)
    shutil.copytree(resolve(model)[0], out, dirs_exist_ok=True)
    tiny.save_pretrained(out / "tiny_vae")
    x = torch.from_numpy(np.array(pictures[scenes:])).float() / 127.5 - 1
    with torch.no_grad():
        z = checkpoint.encode(x)
        of_pictures = (tiny.decode(z).sample - checkpoint.decode(z)).abs().mean() * 127.5
        of_latents = (tiny.encode(x).latents - z).abs().mean() / z.std()
    print(
        f"pictures differ by {of_pictures:.2f} of 255, latents by {of_latents:.3f} of their deviation, on unseen scenes"
    )


if __name__ == "__main__":
    typer.run(main)
