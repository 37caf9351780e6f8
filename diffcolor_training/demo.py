"""Train the demo model: `python -m diffcolor_training.demo --out out/demo-model`.

Trains six parts in turn: tokenizer, VAE, guidance CLIP, text tower, UNet (together with the text
tower), and a second CLIP that judges pictures which the first has guided.
Each part checkpoints into OUT/checkpoints and resumes from there; a finished part is not repeated.
Every draw comes from a generator seeded by (seed, part, step), so a resumed training equals an
unbroken one. The result is OUT/bundle, an ordinary diffusers folder in fp16 with the guidance CLIP in
its subfolder `clip`, and OUT/judge.

The hard part is binding: which word colours which object. Four things teach it. The text tower first
learns which colour word belongs to which noun. Luminance outlasts colour in the noised latents.
Cross-attention is told where each noun lies. Some noised inputs have the objects' colours exchanged,
so that only the caption tells the right ones.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from diffcolor_core.attention import RecordedAttention, recorded_attention
from diffcolor_scans.color import lightness_of
from diffcolor_study.scenes import COLOR_WORDS, OBJECT_KINDS, objects_swapped
from diffcolor_training.dataset import cached_pictures, cached_region_cells, draw_caption, scene_spec, swap_colors
from diffcolor_training.loop import fit_part, step_rng
from diffcolor_training.parts import (
    IMAGE_MEAN,
    IMAGE_STD,
    MAX_LENGTH,
    build_clip,
    build_scheduler,
    build_text_tower,
    build_tokenizer,
    build_unet,
    build_vae,
    save_bundle,
    save_clip,
)

SHORT_LENGTH = 32  # tokens; most batches are padded to this length only, the others to all 77
NOUNS = (*OBJECT_KINDS, "table", "wall")


def _batch(pictures: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sort(rng.choice(len(pictures), size=size, replace=False))


def _pixels(pictures: np.ndarray, indices: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(pictures[indices]).to(device).float() / 127.5 - 1  # [B, 3, 64, 64] in [-1, 1]


def train_vae(
    vae: AutoencoderKL, pictures: np.ndarray, *, seed: int, num_steps: int, checkpoints: Path, device: torch.device
) -> None:
    """Train for reconstruction (squared error) with a faint KL term."""

    def loss_of(step: int) -> Tensor:
        x = _pixels(pictures, _batch(pictures, step_rng(seed, "vae", step), 32), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            reconstruction = vae.decode(z).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(reconstruction, x) + 2e-5 * kl

    groups = [{"params": list(vae.parameters()), "lr": 3e-3}]
    fit_part("vae", vae, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints, ema_decay=0.995)


@torch.no_grad()
def emphasise_luminance(vae: AutoencoderKL, x: Tensor, factor: float = 3.0) -> Tensor:
    """Stretch the latents by `factor` along the direction that encodes L*; returns that map, [C, C].

    Luminance then outlasts colour in the noise, as it does in large VAEs. At some timesteps shapes show
    and colours do not, and only there does the model need the caption to tell whose colour is whose. The
    map is folded into the 1 x 1 convolutions on both sides of the latents, so pictures pass through the
    VAE unchanged. Sets `scaling_factor` so that the latents have unit variance.
    """
    z = vae.encode(x).latent_dist.mean  # [B, C, h, w]
    cells = F.adaptive_avg_pool2d(lightness_of((x + 1) / 2), z.shape[-2:])  # [B, 1, h, w]
    rows = (z - z.mean(dim=(0, 2, 3), keepdim=True)).movedim(1, -1).flatten(0, 2)  # [N, C]
    readout = torch.linalg.lstsq(rows, (cells - cells.mean()).flatten()[:, None]).solution[:, 0]
    u = F.normalize(readout, dim=0)
    stretch = torch.eye(len(u), device=u.device) + (factor - 1) * torch.outer(u, u)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[: len(u)] = torch.einsum("ij,jkhw->ikhw", stretch, quant.weight[: len(u)])
    quant.bias[: len(u)] = stretch @ quant.bias[: len(u)]
    post_quant.weight.copy_(torch.einsum("ijhw,jk->ikhw", post_quant.weight, torch.linalg.inv(stretch)))
    vae.register_to_config(scaling_factor=round(1 / float(vae.encode(x).latent_dist.mean.std()), 5))
    return stretch


def train_clip(
    name: str,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Train contrastively. Each picture's own caption with two colours exchanged is one more negative."""

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, name, step)
        indices = _batch(pictures, rng, 96)
        captions = [draw_caption(scene_spec(seed, int(i)), rng) for i in indices]
        negatives = [swap_colors(text, rng) for text in captions]
        length = SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH
        ids = tokenize(tokenizer, captions + negatives, length).to(device)
        x = (_pixels(pictures, indices, device) + 1) / 2
        if rng.random() < 0.5:
            x = x.flip(-1)
        x = x + 0.03 * float(rng.random()) * torch.randn_like(x)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        with torch.autocast(device.type, torch.bfloat16):
            image = clip.get_image_features(pixel_values=(x - mean) / std).pooler_output
            text = clip.get_text_features(input_ids=ids).pooler_output
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # [B, 2B]
        # A hard negative may equal another picture's caption or, without colour words, its own: mask those.
        same = torch.tensor([[a == b for b in captions + negatives] for a in captions], device=device)
        same &= ~torch.eye(len(captions), 2 * len(captions), dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(len(captions), device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(captions)].T, target)) / 2

    groups = [{"params": list(clip.parameters()), "lr": 1e-3}]
    fit_part(name, clip, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids [B, length], padded or truncated to `length`."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class PhraseReader(nn.Module):
    """A text tower with two heads that read, from a noun's embedding, the noun and the colour word before it."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.color = nn.Linear(width, 1 + len(COLOR_WORDS))
        self.noun = nn.Linear(width, len(NOUNS))


def train_text(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Teach the text tower to encode, at each noun, which noun it is and which colour word precedes it.

    A pretrained text tower knows this already; one trained by the diffusion loss alone did not learn it.
    """
    reader = PhraseReader(text_encoder).to(device)
    color_of, noun_of = word_tables(tokenizer, device)

    def loss_of(step: int) -> Tensor:
        rng = step_rng(seed, "text", step)
        captions = [draw_caption(scene_spec(seed, int(i)), rng) for i in rng.integers(1 << 30, size=64)]
        length = SHORT_LENGTH if rng.random() < 0.75 else MAX_LENGTH
        ids = tokenize(tokenizer, captions, length).to(device)
        nouns = noun_of[ids[:, 1:]] >= 0  # a caption never starts with a noun
        embeds = reader.text_encoder(ids).last_hidden_state[:, 1:][nouns]
        colors = F.cross_entropy(reader.color(embeds), color_of[ids[:, :-1][nouns]])
        return colors + F.cross_entropy(reader.noun(embeds), noun_of[ids[:, 1:][nouns]])

    groups = [{"params": list(reader.parameters()), "lr": 1e-3}]
    fit_part("text", reader, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints, ema_decay=0.99)


def word_tables(tokenizer: CLIPTokenizer, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token id the number of its colour word (0: none) and of its noun (-1: none), both [V]."""
    colors = torch.zeros(len(tokenizer), dtype=torch.long, device=device)
    nouns = torch.full((len(tokenizer),), -1, dtype=torch.long, device=device)
    for table, words, first in ((colors, COLOR_WORDS, 1), (nouns, NOUNS, 0)):
        for number, word in enumerate(words, start=first):
            (token,) = tokenizer(word, add_special_tokens=False).input_ids
            table[token] = number
    return colors, nouns


class UNetAndText(nn.Module):
    """The UNet and its text tower as one module, so that they train and checkpoint together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def grounding_loss(maps: list[Tensor], region_cells: Tensor, noun_tokens: Tensor) -> Tensor:
    """Cross-entropy between each cell's region and the noun it attends to (after TokenCompose, arXiv 2312.03626).

    maps: attention, [B, s*s, L] each. region_cells: [B, R, S, S], each region's share of each cell.
    noun_tokens: [B, R], the position of each region's noun in the caption; -1 where it is not named.
    """
    present = noun_tokens >= 0
    losses = []
    for attention in maps:
        side = round(attention.shape[1] ** 0.5)
        wanted = F.adaptive_avg_pool2d(region_cells, side).flatten(2)  # [B, R, s*s]
        index = noun_tokens.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)
        given = attention.gather(2, index).mT * present[..., None]  # [B, R, s*s]
        share = given / given.sum(dim=1, keepdim=True).clamp(min=1e-6)
        losses.append(
            -(wanted * (share + 1e-4).log())[present].sum(dim=0).mean() / present.any(dim=1).sum().clamp(min=1)
        )
    return torch.stack(losses).mean()


def confuse_objects(z: Tensor, regions: Tensor, luminance: Tensor) -> Tensor:
    """Exchange the mean colours of the first two regions in latents [B, C, h, w]; luminance stays.

    regions: [B, h, w], the index of each cell's region. luminance: [C], the unit vector that encodes L*.
    """
    masks = torch.stack([(regions == i).float() for i in (0, 1)])  # [2, B, h, w]
    means = torch.einsum("bchw,nbhw->nbc", z, masks) / masks.sum(dim=(2, 3)).clamp(min=1)[..., None]
    means = means - torch.einsum("nbc,c,d->nbd", means, luminance, luminance)
    shift = (means[1] - means[0])[:, :, None, None]
    return z + shift * masks[0][:, None] - shift * masks[1][:, None]


def noun_positions(ids: Tensor, noun_of: Tensor, most: int) -> Tensor:
    """The positions of the first `most` nouns in token ids [B, L], in order: [B, most], -1 where there are fewer."""
    is_noun = noun_of[ids] >= 0
    order = torch.where(is_noun, torch.arange(ids.shape[1], device=ids.device), ids.shape[1]).sort(dim=1).values
    return torch.where(order < ids.shape[1], order, -1)[:, :most]


def train_unet(
    unet_and_text: UNetAndText,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    latents: Tensor,
    region_cells: np.ndarray,
    stretch: Tensor,
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Train on v-prediction over cached latents [N, 6, 16, 16] and on grounded attention.

    - 10% of the captions are empty, for classifier-free guidance.
    - 65% of the timesteps are at least 600, where a thing's shape shows and its colour does not.
    - Cells that objects cover count three times.
    - Errors are measured before the `stretch` [6, 6] of `emphasise_luminance`, so that colour counts as
      much as luminance.
    - The weight of faint noise is capped (min-SNR, gamma 5, on v-prediction's own weighting).
    - In 40% of the pictures whose caption tells the two objects' colours apart (at t >= 300), the noised
      input has them exchanged and the target has not. In sampling, too, the colours that shine through
      the noise may be an earlier mistake; the model learns to trust the caption instead.
    """
    abar = scheduler.alphas_cumprod.to(device)
    shrink = torch.linalg.inv(stretch).to(device)
    luminance = torch.linalg.eigh(stretch).eigenvectors[:, -1].to(device)
    noun_of = word_tables(tokenizer, device)[1]
    most = region_cells.max() + 1
    unet_and_text.requires_grad_(True)

    def loss_of(step: int, recorder: RecordedAttention) -> Tensor:
        rng = step_rng(seed, "unet", step)
        indices = np.sort(rng.choice(len(latents), size=32, replace=False))
        t = torch.from_numpy(rng.integers(np.where(rng.random(len(indices)) < 0.65, 600, 0), 1000)).to(device)
        specs = [scene_spec(seed, int(i)) for i in indices]
        captions: list[str] = []
        confused: list[int] = []
        for row, spec in enumerate(specs):
            draws = int(rng.integers(2**62))
            wordings = [draw_caption(s, np.random.default_rng(draws)) for s in (spec, objects_swapped(spec))]
            captions.append("" if rng.random() < 0.1 else wordings[0])
            if captions[-1] and wordings[0] != wordings[1] and t[row] >= 300 and rng.random() < 0.4:
                confused.append(row)
        length = SHORT_LENGTH if rng.random() < 0.75 else MAX_LENGTH
        ids = tokenize(tokenizer, captions, length).to(device)
        z = latents[indices].to(device).float()
        regions = torch.from_numpy(region_cells[indices]).to(device).long()
        seen = z.clone()
        seen[confused] = confuse_objects(z[confused], regions[confused], luminance)
        eps = torch.randn(z.shape, device=device)
        a = abar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * seen + (1 - a).sqrt() * eps
        target = (a.sqrt() * z_t - z) / (1 - a).sqrt()  # the v whose clean estimate is z
        recorder.maps.clear()
        with torch.autocast(device.type, torch.bfloat16):
            embeds = unet_and_text.text_encoder(ids).last_hidden_state
            prediction = unet_and_text.unet(z_t, t, embeds).sample.float()
        error = torch.einsum("ij,bjhw->bihw", shrink, prediction - target).pow(2)
        num_objects = torch.tensor([len(spec.objects) for spec in specs], device=device).view(-1, 1, 1)
        on_object = (regions < num_objects).float()[:, None]
        cells = (1 + 2 * on_object) / (1 + 2 * on_object).mean()
        weight = (6 / (a / (1 - a) + 1)).clamp(max=1) * cells
        shares = F.one_hot(regions, most).movedim(-1, 1).float() * cells
        grounding = grounding_loss(recorder.maps, shares, noun_positions(ids, noun_of, most))
        return (error * weight).mean() + 0.3 * grounding

    groups = [
        {"params": list(unet_and_text.unet.parameters()), "lr": 2e-3},
        {"params": list(unet_and_text.text_encoder.parameters()), "lr": 6e-4},
    ]
    with recorded_attention(unet_and_text.unet) as recorder:
        loss_at = partial(loss_of, recorder=recorder)
        fit_part("unet", unet_and_text, groups, loss_at, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


def _tokenizer_in(checkpoints: Path, seed: int) -> CLIPTokenizer:
    """The tokenizer of an earlier call, or a new one. It is kept because its trainer breaks ties at random."""
    folder = checkpoints / "tokenizer"
    if not folder.exists():
        rng = np.random.default_rng(seed)
        build_tokenizer([draw_caption(scene_spec(seed, i), rng) for i in range(2000)]).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def _encode_all(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    def chunks() -> Iterator[Tensor]:
        for start in range(0, len(pictures), 256):
            x = _pixels(pictures, np.arange(start, min(start + 256, len(pictures))), device)
            yield (vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu()

    return torch.cat(list(chunks()))


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, cache and the finished bundle.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of scenes, captions, weights and noise.")] = 0,
    num_scenes: Annotated[int, typer.Option(help="Number of scenes to render for training.")] = 32_000,
    vae_steps: int = 1200,
    clip_steps: int = 1000,
    text_steps: int = 600,
    unet_steps: int = 5800,
    judge_steps: int = 700,
) -> None:
    """Train the demo model from scratch, or continue where an earlier call stopped."""
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    print(f"scenes: rendering {num_scenes} (cached in {out})", flush=True)
    pictures = cached_pictures(out, seed=seed, num_scenes=num_scenes)
    torch.manual_seed(seed)
    tokenizer = _tokenizer_in(checkpoints, seed)
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    vae, clip = build_vae().to(where), build_clip(tokenizer).to(where)
    unet_and_text = UNetAndText(build_unet(), build_text_tower(tokenizer)).to(where)
    scheduler = build_scheduler()

    common: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints, "device": where}
    train_vae(vae, pictures, num_steps=vae_steps, **common)
    stretch = emphasise_luminance(vae, _pixels(pictures, np.arange(512), where))
    train_clip("clip", clip, tokenizer, pictures, num_steps=clip_steps, **common)
    train_text(unet_and_text.text_encoder, tokenizer, num_steps=text_steps, **common)
    latents = _encode_all(vae, pictures, where)
    cells = cached_region_cells(out, seed=seed, num_scenes=num_scenes, cells=latents.shape[-1])
    train_unet(unet_and_text, tokenizer, scheduler, latents, cells, stretch, num_steps=unet_steps, **common)
    save_bundle(out / "bundle", tokenizer, vae, clip, unet_and_text.unet, unet_and_text.text_encoder, scheduler)
    torch.manual_seed(seed + 1)  # the judge starts from other weights; its name gives it other batches
    judge = build_clip(tokenizer).to(where)
    train_clip("judge", judge, tokenizer, pictures, num_steps=judge_steps, **common)
    save_clip(out / "judge", tokenizer, judge)
    print(f"bundle: {out / 'bundle'}, judge: {out / 'judge'}")


if __name__ == "__main__":
    typer.run(train)
