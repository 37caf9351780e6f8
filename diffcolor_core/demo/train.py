"""Train the demo model: `python -m diffcolor_core.demo.train --out out/demo-model`.

Four parts, one after the other: tokenizer, VAE, guidance CLIP, UNet together with its text tower.
Each part checkpoints into OUT/checkpoints and resumes from there; a finished part is not repeated.
Every draw comes from a generator seeded by (seed, part, step), so a resumed training sees exactly
what an unbroken one would have seen. The result is OUT/bundle: an ordinary diffusers folder, fp16,
with the guidance CLIP in its subfolder `clip`.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffcolor_core.demo.dataset import (
    SIZE_PX,
    cached_object_cells,
    cached_pictures,
    draw_caption,
    scene_spec,
    swap_colors,
)

WIDTH = 128  # of both text towers
SHORT_LENGTH = 32  # tokens; three quarters of the batches are padded to this only, a quarter to all 77
MAX_LENGTH = 77


# ------------------------------------------------------------------ the parts, at their sizes


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's kind, learned from our captions and a list of words seen in photographs."""
    words = Path(__file__).with_name("vocabulary.txt").read_text(encoding="utf-8").split()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    pattern = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    bpe.train_from_iterator(captions + [" ".join(words)] * 5, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    pieces = [piece for byte in sorted(alphabet) for piece in (byte, byte + "</w>")] + ["".join(m) for m in merges]
    ordered = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(ordered)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build_vae() -> AutoencoderKL:
    """Six latent channels at a quarter of the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
    )


def _text_settings(tokenizer: CLIPTokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The guidance CLIP: two towers of three layers. It shares nothing with the UNet's text tower."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE_PX,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=_text_settings(tokenizer), vision_config=vision, projection_dim=WIDTH))


def build_unet() -> UNet2DConditionModel:
    """4.4 million parameters, text attended to at 16 x 16, 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=6,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # in this class's older naming: the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


# ------------------------------------------------------------------ a training loop that resumes


def _rng(seed: int, part: str, step: int) -> np.random.Generator:
    return np.random.default_rng((seed, *part.encode(), step))


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.rename(path)


def fit_part(
    name: str,
    module: nn.Module,
    parameter_groups: list[dict[str, object]],
    loss_of: Callable[[int], Tensor],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    checkpoint_every: int = 250,
    ema_decay: float = 0.999,
) -> None:
    """Minimise `loss_of(step)` with AdamW, a warm-up and a linear fall; leave the EMA weights in `module`.

    The checkpoint holds weights, EMA and both Adam moments as safetensors. A finished part only loads.
    """
    path = checkpoints / f"{name}.safetensors"
    optimizer = torch.optim.AdamW(parameter_groups, betas=(0.9, 0.99), weight_decay=1e-4)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    parameters = dict(module.named_parameters())
    ema = {key: p.detach().clone() for key, p in parameters.items()}
    start = 0
    if path.exists():
        with safe_open(path, "pt") as file:
            start = int(file.metadata()["step"])
            for key, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight.{key}"))
                ema[key].copy_(file.get_tensor(f"ema.{key}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(start)),
                    "exp_avg": file.get_tensor(f"m.{key}").to(parameter),
                    "exp_avg_sq": file.get_tensor(f"v.{key}").to(parameter),
                }

    def save(step: int) -> None:
        tensors = {f"weight.{key}": p for key, p in parameters.items()} | {f"ema.{key}": t for key, t in ema.items()}
        for key, parameter in parameters.items():
            state = optimizer.state[parameter]
            tensors |= {f"m.{key}": state["exp_avg"], f"v.{key}": state["exp_avg_sq"]}
        _save(path, tensors, {"step": str(step)})

    log = checkpoints / f"{name}.losses.csv"
    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=num_steps, completed=start)
        recent: list[float] = []
        for step in range(start, num_steps):
            torch.manual_seed(int(_rng(seed, name, step).integers(2**62)))
            warm, fall = min(1.0, (step + 1) / 200), 1 - step / num_steps
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * warm * fall
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
            recent.append(loss.item())
            done = step + 1
            if done % 50 == 0 or done == num_steps:
                with log.open("a") as file:
                    file.write(f"{done},{sum(recent) / len(recent):.6f},{time.time():.0f}\n")
                progress.update(bar, completed=done, description=f"{name} {sum(recent) / len(recent):.4f}")
                recent = []
            if done % checkpoint_every == 0 or done == num_steps:
                save(done)
    for key, parameter in parameters.items():
        parameter.data.copy_(ema[key])
    module.eval().requires_grad_(False)


# ------------------------------------------------------------------ the three losses


def _batch(pictures: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sort(rng.choice(len(pictures), size=size, replace=False))


def _pixels(pictures: np.ndarray, indices: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(pictures[indices]).to(device).float() / 127.5 - 1  # [B, 3, 64, 64] in [-1, 1]


def train_vae(
    vae: AutoencoderKL, pictures: np.ndarray, *, seed: int, num_steps: int, checkpoints: Path, device: torch.device
) -> None:
    """Reconstruction (squared error) with a faint KL term; sets `scaling_factor` to give latents unit variance."""

    def loss_of(step: int) -> Tensor:
        x = _pixels(pictures, _batch(pictures, _rng(seed, "vae", step), 32), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            reconstruction = vae.decode(z).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(reconstruction, x) + 2e-5 * kl

    groups = [{"params": list(vae.parameters()), "lr": 3e-3}]
    fit_part("vae", vae, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints, ema_decay=0.995)
    with torch.no_grad():
        z = vae.encode(_pixels(pictures, np.arange(512), device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(z.std()), 5))


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Contrastive training; each picture also faces a caption of its own with two colours exchanged."""

    def loss_of(step: int) -> Tensor:
        rng = _rng(seed, "clip", step)
        indices = _batch(pictures, rng, 96)
        captions = [draw_caption(scene_spec(seed, int(i)), rng) for i in indices]
        negatives = [swap_colors(text, rng) for text in captions]
        length = SHORT_LENGTH if rng.random() < 0.9 else MAX_LENGTH
        ids = tokenize(tokenizer, captions + negatives, length).to(device)
        x = (_pixels(pictures, indices, device) + 1) / 2
        if rng.random() < 0.5:
            x = x.flip(-1)
        x = x + 0.03 * float(rng.random()) * torch.randn_like(x)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (_IMAGE_MEAN, _IMAGE_STD))
        with torch.autocast(device.type, torch.bfloat16):
            image = clip.get_image_features(pixel_values=(x - mean) / std).pooler_output
            text = clip.get_text_features(input_ids=ids).pooler_output
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # [B, 2B]
        # A picture's hard negative may be another's caption or, with no colour word, its own: mask those.
        same = torch.tensor([[a == b for b in captions + negatives] for a in captions], device=device)
        same &= ~torch.eye(len(captions), 2 * len(captions), dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(len(captions), device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(captions)].T, target)) / 2

    groups = [{"params": list(clip.parameters()), "lr": 1e-3}]
    fit_part("clip", clip, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


_IMAGE_MEAN = [0.5, 0.5, 0.5]
_IMAGE_STD = [0.25, 0.25, 0.25]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids [B, length], padded, cut off at `length`."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class Denoiser(nn.Module):
    """The UNet and its text tower as one module, so that they train and checkpoint together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def train_unet(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    latents: Tensor,
    object_cells: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    device: torch.device,
) -> None:
    """v-prediction on cached latents [N, 6, 16, 16], text tower included, 10% of captions empty.

    Which word colours which object is the hard part to learn, so the loss looks where it is decided:
    half of the timesteps come from the noisiest 40%, where an object's own colour no longer shows;
    cells that objects cover count three times; and the weight of faint noise is capped (min-SNR's
    cap, gamma 5, on v-prediction's own weighting).
    """
    abar = scheduler.alphas_cumprod.to(device)

    def loss_of(step: int) -> Tensor:
        rng = _rng(seed, "unet", step)
        indices = _batch(latents, rng, 32)  # type: ignore[arg-type]
        captions = ["" if rng.random() < 0.1 else draw_caption(scene_spec(seed, int(i)), rng) for i in indices]
        length = SHORT_LENGTH if rng.random() < 0.75 else MAX_LENGTH
        z = latents[indices].to(device).float()
        lowest = np.where(rng.random(len(indices)) < 0.5, 600, 0)
        t = torch.from_numpy(rng.integers(lowest, 1000)).to(device)
        eps = torch.randn(z.shape, device=device)
        a = abar[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            embeds = denoiser.text_encoder(tokenize(tokenizer, captions, length).to(device)).last_hidden_state
            prediction = denoiser.unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, embeds).sample.float()
        target = a.sqrt() * eps - (1 - a).sqrt() * z
        weight = (6 / (a / (1 - a) + 1)).clamp(max=1)
        cells = 1 + 2 * torch.from_numpy(object_cells[indices]).to(device).float()[:, None] / 255
        return ((prediction - target).pow(2) * weight * cells / cells.mean()).mean()

    groups = [
        {"params": list(denoiser.unet.parameters()), "lr": 2e-3},
        {"params": list(denoiser.text_encoder.parameters()), "lr": 6e-4},
    ]
    fit_part("unet", denoiser, groups, loss_of, seed=seed, num_steps=num_steps, checkpoints=checkpoints)


@torch.no_grad()
def _encode_all(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    def chunks() -> Iterator[Tensor]:
        for start in range(0, len(pictures), 256):
            x = _pixels(pictures, np.arange(start, min(start + 256, len(pictures))), device)
            yield (vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu()

    return torch.cat(list(chunks()))


# ------------------------------------------------------------------ the bundle


def save_bundle(
    folder: Path,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    clip: CLIPModel,
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
) -> None:
    """Write the diffusers folder in fp16, the guidance CLIP in `clip`."""
    parts = {"vae": vae, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder, "clip": clip}
    for name, model in parts.items():
        model.half().save_pretrained(folder / name, safe_serialization=True)
        model.float()
    for name in ("tokenizer", "clip"):
        tokenizer.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    size = {"height": SIZE_PX, "width": SIZE_PX}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE_PX}, crop_size=size, image_mean=_IMAGE_MEAN, image_std=_IMAGE_STD
    ).save_pretrained(folder / "clip")
    save_model_index(folder)


def save_model_index(folder: Path) -> None:
    """Name the parts as `StableDiffusionPipeline.save_pretrained` does."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, cache and the finished bundle.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of scenes, captions, weights and noise.")] = 0,
    num_scenes: Annotated[int, typer.Option(help="Scenes rendered for training.")] = 32_000,
    vae_steps: int = 1200,
    clip_steps: int = 1000,
    unet_steps: int = 12_000,
    stop_after: Annotated[str, typer.Option(help="End after this part: vae, clip or unet.")] = "unet",
) -> None:
    """Train the demo model from nothing, or go on where an earlier call was stopped."""
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    print(f"scenes: rendering {num_scenes} (cached in {out})", flush=True)
    pictures = cached_pictures(out, seed=seed, num_scenes=num_scenes)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer([draw_caption(scene_spec(seed, i), rng) for i in range(2000)])
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    vae, clip = build_vae().to(where), build_clip(tokenizer).to(where)
    denoiser = Denoiser(build_unet(), CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer)))).to(where)
    scheduler = build_scheduler()

    common: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints, "device": where}
    train_vae(vae, pictures, num_steps=vae_steps, **common)
    if stop_after == "vae":
        return
    train_clip(clip, tokenizer, pictures, num_steps=clip_steps, **common)
    if stop_after == "clip":
        return
    latents = _encode_all(vae, pictures, where)
    cells = cached_object_cells(out, seed=seed, num_scenes=num_scenes, cells=latents.shape[-1])
    train_unet(denoiser, tokenizer, scheduler, latents, cells, num_steps=unet_steps, **common)
    save_bundle(out / "bundle", tokenizer, vae, clip, denoiser, scheduler)
    print(f"bundle: {out / 'bundle'}")


if __name__ == "__main__":
    typer.run(train)
