"""The checkpoint: loaded through `from_pretrained` from a hub id at a pinned revision or a local folder.

A checkpoint is a Stable-Diffusion-shaped diffusers folder (`vae`, `unet`, `text_encoder`,
`tokenizer`, `scheduler`) and a CLIP for guidance: the folder's own `clip` where it has one, else
OpenAI's ViT-B/32. Only safetensors are read.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

DEMO_FOLDER = Path(__file__).parent / "demo" / "bundle"
DEMO_JUDGE = Path(__file__).parent / "demo" / "judge"
"""A CLIP of the demo model's kind that guided nothing: it judges."""
PINNED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    # The commit that holds model.safetensors; the main branch has the pickle only.
    "openai/clip-vit-base-patch32": "c237dc49a33fc61debc9276459120b7eac67e7ef",
}
DEFAULT_CLIP = "openai/clip-vit-base-patch32"


class ModelError(ValueError):
    """A checkpoint that is missing, unpinned or of another architecture."""


def weights_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers of a module, names included."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve(model: str) -> tuple[str, str | None]:
    """(folder or hub id, revision) of "demo", a folder, "id" with a known pin, or "id@commit".

    Raises ModelError for a hub id without a commit.
    """
    if model == "demo":
        if not DEMO_FOLDER.is_dir():
            raise ModelError(f"the demo model is not in this installation: {DEMO_FOLDER} is missing")
        return str(DEMO_FOLDER), None
    if Path(model).is_dir():
        return model, None
    name, _, revision = model.partition("@")
    revision = revision or PINNED.get(name, "")
    if name.count("/") != 1:
        raise ModelError(f"no model {model!r}: give 'demo', a diffusers folder, or a hub id as 'owner/name@revision'")
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch or a tag moves, and what is called the same is not
        raise ModelError(
            f"hub model {name!r} needs a pinned revision, so that a result can be made again: "
            f"'{name}@<commit hash of 40 digits>' (its page lists the commits), not {revision!r}"
        )
    return name, revision


def _folder_revision(folder: Path) -> str:
    """What a local checkpoint is: a hash of its weights and configurations."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt"):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def identify(model: str) -> tuple[str, str]:
    """(model_id, model_revision) as the manifest records them, without loading weights."""
    source, revision = resolve(model)
    return ("demo" if model == "demo" else source), revision or _folder_revision(Path(source))


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, frozen and in evaluation mode.

    `model_revision` is the hub commit, or "sha256:..." over a local folder's files.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    clip: CLIPModel
    clip_tokenizer: CLIPTokenizer
    clip_image_mean: tuple[float, ...]
    clip_image_std: tuple[float, ...]
    model_id: str
    model_revision: str
    device: torch.device
    dtype: torch.dtype
    """Weights are float32; the networks compute in this type (autocast), float32 meaning no autocast."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side, read from the VAE: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple_px(self) -> int:
        """What a picture's sides must be multiples of, for the UNet to halve its way down and back."""
        return self.vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def native_size_px(self) -> int:
        """The side of the squares that the checkpoint was trained on."""
        return int(self.unet.config.sample_size) * self.vae_factor

    # ---------------------------------------------------------------- latents

    def autocast(self) -> torch.autocast:
        """The context in which the networks run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        """z = s E(x): x [B, 3, H, W] in [-1, 1] to latents [B, C, H/f, W/f], the posterior's mean."""
        with self.autocast():
            mean: Tensor = self.vae.encode(x).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """x = D(z): latents to pictures [B, 3, H, W], about [-1, 1], not clipped."""
        with self.autocast():
            x: Tensor = self.vae.decode(z / self.vae.config.scaling_factor).sample
        return x.float()

    def denoise(self, unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The raw output of `unet` (the base one or a fitted copy of it), float32."""
        with self.autocast():
            output: Tensor = unet(z_t, t, encoder_hidden_states=prompt_embeds).sample
        return output.float()

    # ---------------------------------------------------------------- text

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """T(c): prompts to prompt_embeds [B, chunks x max_length, width].

        A prompt longer than the text tower is encoded in chunks set one after another, and shorter
        prompts of the same call are filled up with empty chunks: nothing is cut off.
        """
        chunked = [_chunks(self.tokenizer, prompt) for prompt in prompts]
        most = max(len(chunks) for chunks in chunked)
        empty = _chunks(self.tokenizer, "")[0]
        ids = torch.stack([torch.stack([*chunks, *[empty] * (most - len(chunks))]) for chunks in chunked])
        with torch.no_grad(), self.autocast():
            embeds = self.text_encoder(ids.flatten(0, 1).to(self.device)).last_hidden_state
        return embeds.float().view(len(prompts), -1, embeds.shape[-1])  # [B, chunks * length, width]

    def token_positions(self, prompt: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """For each part prompt[start:end], where its tokens stand in `encode_prompts([prompt])`."""
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = int(self.tokenizer.model_max_length) - 2  # of a chunk, without its start and end tokens
        return [
            [
                1 + index + 2 * (index // room)
                for index, (first, last) in enumerate(encoded.offset_mapping)
                if first < end and last > start
            ]
            for start, end in spans
        ]

    # ---------------------------------------------------------------- guidance CLIP

    @torch.no_grad()
    def clip_text_features(self, prompts: Sequence[str]) -> Tensor:
        """f_T: prompts to unit vectors [B, d]; a long prompt is the mean of its chunks."""
        rows = []
        for prompt in prompts:
            ids = torch.stack(_chunks(self.clip_tokenizer, prompt)).to(self.device)
            features = self.clip.get_text_features(input_ids=ids).pooler_output.float()
            rows.append(F.normalize(features, dim=-1).mean(dim=0))
        return F.normalize(torch.stack(rows), dim=-1)

    def clip_image_features(self, x: Tensor) -> Tensor:
        """f_I: pictures [B, 3, H, W] in [-1, 1] to unit vectors [B, d], differentiably.

        CLIP sees squares: a picture that is not square is the mean of evenly spaced square crops,
        as many as cover it but at most 8.
        """
        side = int(self.clip.config.vision_config.image_size)
        short, long = sorted(x.shape[-2:])
        count = min(8, -(-long // short))
        starts = [round(i * (long - short) / max(1, count - 1)) for i in range(count)]
        wide = x.shape[-1] == long
        crops = [x[..., s : s + short] if wide else x[..., s : s + short, :] for s in starts]
        squares = torch.cat([
            F.interpolate(crop, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
            for crop in crops
        ])  # fmt: skip
        mean, std = (
            torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.clip_image_mean, self.clip_image_std)
        )
        pixels = ((squares.clamp(-1, 1) + 1) / 2 - mean) / std
        with self.autocast():
            features = self.clip.get_image_features(pixel_values=pixels).pooler_output
        features = F.normalize(features.float(), dim=-1).view(count, len(x), -1).mean(dim=0)
        return F.normalize(features, dim=-1)


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[Tensor]:
    """Token ids of a prompt in pieces of the tokenizer's length, each with its start and end tokens: [[length]]."""
    length = int(tokenizer.model_max_length)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    pieces = [ids[i : i + length - 2] for i in range(0, max(1, len(ids)), length - 2)]
    padded = [
        [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (length - 2 - len(piece))]
        for piece in pieces
    ]
    return [torch.tensor(row) for row in padded]


def _frozen(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device).eval().requires_grad_(False)


def load_checkpoint(
    model: str, *, clip: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Load a checkpoint and its guidance CLIP.

    model, clip: "demo" (model only), a local folder, a hub id with a pin of ours, or "id@revision".
    Raises ModelError for an unpinned id, an architecture we do not serve, or files that are not there.
    """
    source, revision = resolve(model)
    transformers_logging.disable_progress_bar()  # of copying weights into modules; downloads keep theirs
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(source, revision=revision)
        kind = index.get("_class_name", "a checkpoint of no named class")
        if kind != "StableDiffusionPipeline":
            raise ModelError(
                f"{model!r} is {kind}: only StableDiffusionPipeline checkpoints are served (Stable Diffusion 1.x "
                "and 2.x). SDXL and later ones condition on a second text encoder and picture sizes."
            )
        common: dict[str, Any] = {"revision": revision, "use_safetensors": True, "torch_dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", **common)
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **common)
        text: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
        text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", revision=revision, **text)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision)
        scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler", revision=revision)

        inner = Path(source, "clip")
        clip_source, clip_revision = (
            (str(inner), None) if clip is None and inner.is_dir() else resolve(clip or DEFAULT_CLIP)
        )
        clip_model = CLIPModel.from_pretrained(clip_source, revision=clip_revision, **text)
        clip_tokenizer = CLIPTokenizer.from_pretrained(clip_source, revision=clip_revision)
        processor = AutoImageProcessor.from_pretrained(clip_source, revision=clip_revision, backend="pil")
    except OSError as error:
        raise ModelError(f"cannot load {model!r}: {error}") from error
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"{model!r} has a UNet of {unet.config.in_channels} input channels on latents of "
            f"{vae.config.latent_channels}: inpainting and depth checkpoints are not served"
        )
    device = torch.device(device)
    _frozen((vae, unet, text_encoder, clip_model), device)
    model_id, model_revision = identify(model)
    return Checkpoint(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        clip=clip_model,
        clip_tokenizer=clip_tokenizer,
        clip_image_mean=tuple(processor.image_mean),
        clip_image_std=tuple(processor.image_std),
        model_id=model_id,
        model_revision=model_revision,
        device=device,
        dtype=dtype,
    )
