"""Checkpoints: loaded, and what their networks compute.

A checkpoint is a diffusers folder of Stable Diffusion or Stable Diffusion XL (`vae`, `unet`, `text_encoder`,
`tokenizer`, `scheduler`; XL has second ones of the text) and a CLIP for guidance: the folder's own `clip` if it has
one, else OpenAI's ViT-B/32. A local folder may have a `tiny_vae`, a `color_prior` and `noun_regions` too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffcolor_core.attention import recorded_attention
from diffcolor_core.color_prior import FACTOR, ColorPrior, NounRegions, load
from diffcolor_core.color_terms import spoken
from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import DEFAULT_CLIP, folder_of, identify, resolve, variant_to_load
from diffcolor_scans.color import lock_luminance


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: frozen, in evaluation mode. This class itself is Stable Diffusion 1.x and 2.x.

    The method knows an architecture by these members, and a subclass overrides those that differ: `encode_chunks`
    (what a prompt becomes), `predict`, `word_maps` and `features` (what the network makes of it, and knows), the two
    sizes in pixels, and `scheduler`, which `diffusion.py` alone reads. prompt_embeds are [B, tokens, width] for all:
    chunks of tokens can be joined, prompts mixed, and what a token holds is the subclass's own business.

    model_id, model_revision: as `identify` gives them. dtype: of the weights, and what the networks compute in
    (autocast). All inputs and outputs are float32, and so are the weights of colour prior and noun regions. compiled:
    whether the UNet is compiled where it has a gradient, which is in the optimisation's steps.
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
    tiny_vae: AutoencoderTiny | None = None
    color_prior: ColorPrior | None = None
    noun_regions: NounRegions | None = None
    compiled: bool = False
    coarsest_map: ClassVar[int] = 2
    """Latent cells along a side of the largest cells of `word_maps`: larger ones do not tell things apart."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple_px(self) -> int:
        """A picture's sides must be multiples of this, since VAE and UNet halve them several times."""
        return self.vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def native_size_px(self) -> int:
        """The side of the square pictures that the checkpoint was trained on."""
        return int(self.unet.config.sample_size) * self.vae_factor

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the networks run. float32 means none."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def vae_or_tiny(self, tiny: bool) -> AutoencoderKL | AutoencoderTiny:
        """The tiny VAE if it is asked for and there, else the VAE."""
        return self.tiny_vae if tiny and self.tiny_vae is not None else self.vae

    def encode(self, x: Tensor, tiny: bool = False) -> Tensor:
        """z = s E(x): pictures [B, 3, H, W] in [-1, 1] to latents [B, C, H/f, W/f], the posterior's mean.

        tiny: by the tiny VAE, if there is one.
        """
        vae = self.vae_or_tiny(tiny)
        with self.autocast():
            encoded = vae.encode(x)
            z: Tensor = encoded.latents if vae is self.tiny_vae else encoded.latent_dist.mean
        return z.float() * vae.config.scaling_factor

    def encode_colored(self, lightness: Tensor, chroma: Tensor) -> Tensor:
        """The latents [B, C, h/f, w/f] of pictures with lightness [1, h, w] and chroma [B, 2, h, w]."""
        locked = lock_luminance(chroma, lightness.expand(len(chroma), -1, -1, -1))
        return self.encode(locked.to(self.device) * 2 - 1)

    def decode(self, z: Tensor, tiny: bool = False) -> Tensor:
        """x = D(z / s): latents to pictures [B, 3, H, W], about [-1, 1] and not clipped. tiny: as for `encode`."""
        vae = self.vae_or_tiny(tiny)
        with self.autocast():
            x: Tensor = vae.decode(z / vae.config.scaling_factor).sample
        return x.float()

    def predict(self, unet: Callable[..., Any], z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The raw output (eps or v) of `unet`, which is the base one or a fitted copy: like z_t, float32."""
        if self.compiled and torch.is_grad_enabled():
            unet = partial(compiled_call(), unet)
        with self.autocast():
            output: Tensor = unet(z_t, t, encoder_hidden_states=prompt_embeds).sample
        return output.float()

    def word_maps(self, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> list[Tensor]:
        """How much cells attend to tokens, the mean of batch and heads: [tokens, h', w'] of each layer that is fine."""
        with recorded_attention(self.unet) as recorder:
            self.predict(self.unet, z_t, t, prompt_embeds)
        (height, width), maps = z_t.shape[-2:], []
        for attention in recorder.maps:  # [B, cells, tokens]
            reduction = round((height * width / attention.shape[1]) ** 0.5)
            if reduction <= self.coarsest_map:
                maps.append(attention.mean(dim=0).T.unflatten(1, (-(-height // reduction), -(-width // reduction))))
        return maps

    def features(self, z_t: Tensor, t: Tensor, prompt_embeds: Tensor, block: int) -> Tensor:
        """The activations of one up block of the base UNet: [B, D, hf, wf]. Raises ValueError if it is not there."""
        blocks, caught = self.unet.up_blocks, list[Tensor]()
        if block >= len(blocks):
            raise ValueError(f"alignment.up_block is {block}, but this UNet has {len(blocks)} up blocks")
        hook = blocks[block].register_forward_hook(lambda _module, _args, output: caught.append(output))
        try:
            self.predict(self.unet, z_t, t, prompt_embeds)
        finally:
            hook.remove()
        return caught[0]

    @torch.no_grad()
    def prior_chroma(self, lightness: Tensor, prompts: Sequence[str]) -> Tensor:
        """The chroma that the colour prior expects under each prompt: [B, 2, h, w].

        lightness: [1, h, w], 0..100. It is the mean of what the picture and its mirror image give. Each prompt is
        alone in its batch, so that no prompt depends on its neighbours.
        """
        assert self.color_prior is not None  # `DiffColor` refuses settings that need one
        both = torch.stack((lightness, lightness.flip(-1))).to(self.device)
        rows = []
        for prompt in prompts:
            embeds = self.encode_prompts([prompt])
            if len(self.tokenizer(spoken(prompt), verbose=False).input_ids) <= self.color_prior.num_tokens:
                embeds = embeds[:, : self.color_prior.num_tokens]
            with self.autocast():
                seen, mirrored = self.color_prior(both, embeds.expand(2, -1, -1))
            rows.append((seen + mirrored.flip(-1)) / 2)
        return F.interpolate(torch.stack(rows), scale_factor=FACTOR, mode="bilinear", align_corners=False).cpu()

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """T(c): prompts to prompt_embeds [B, chunks x max_length, width].

        Nothing is cut off: a prompt that is too long for the text tower is encoded in chunks, which are then
        joined. The shorter prompts of one call are padded with the empty prompt's chunks. Hex codes are read as words.
        """
        chunked = [_chunks(self.tokenizer, spoken(prompt)) for prompt in prompts]
        most, empty = max(map(len, chunked)), _chunks(self.tokenizer, "")
        ids = torch.stack([torch.cat((chunks, empty.expand(most - len(chunks), -1))) for chunks in chunked])
        with torch.no_grad(), self.autocast():
            embeds = self.encode_chunks(ids.flatten(0, 1).to(self.device))
        return embeds.float().view(len(prompts), -1, embeds.shape[-1])  # [B, chunks * length, width]

    def encode_chunks(self, ids: Tensor) -> Tensor:
        """Chunks of token ids [C, length] to [C, length, width]."""
        embeds: Tensor = self.text_encoder(ids).last_hidden_state
        return embeds

    def encode_apart(self, prompts: Sequence[str]) -> Tensor:
        """T(c) of each prompt alone, so that none depends on the others: [B, chunks x max_length, width].

        Raises ValueError for prompts that differ in their number of chunks.
        """
        embeds = [self.encode_prompts([prompt]) for prompt in prompts]
        if len({e.shape for e in embeds}) > 1:
            chunks = [e.shape[1] // int(self.tokenizer.model_max_length) for e in embeds]
            raise ValueError(f"the prompts of one batch have equally many chunks of tokens, but these have {chunks}")
        return torch.cat(embeds)

    def num_chunks(self, prompt: str) -> int:
        """In how many chunks `encode_prompts` encodes a prompt."""
        return len(_chunks(self.tokenizer, spoken(prompt)))

    def token_positions(self, prompt: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """For each part prompt[start:end], the positions of its tokens in `encode_prompts([prompt])`."""
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = int(self.tokenizer.model_max_length) - 2  # in a chunk, beside its start and end tokens
        places = [(1 + i + 2 * (i // room), *span) for i, span in enumerate(encoded.offset_mapping)]
        return [[place for place, first, last in places if first < end and last > start] for start, end in spans]

    @torch.no_grad()
    def clip_text_features(self, prompts: Sequence[str]) -> Tensor:
        """f_T: prompts to unit vectors [B, d]. A long prompt gives the mean of its chunks."""
        rows = []
        for prompt in prompts:
            ids = _chunks(self.clip_tokenizer, spoken(prompt)).to(self.device)
            features = self.clip.get_text_features(input_ids=ids).pooler_output.float()
            rows.append(F.normalize(features, dim=-1).mean(dim=0))
        return F.normalize(torch.stack(rows), dim=-1)

    def clip_image_features(self, x: Tensor) -> Tensor:
        """f_I: pictures [B, 3, H, W] in [-1, 1] to unit vectors [B, d], differentiable.

        CLIP sees squares. Any other shape gives the mean over evenly spaced square crops: as many as cover the
        picture, but at most 8.
        """
        side = int(self.clip.config.vision_config.image_size)
        short, long = sorted(x.shape[-2:])
        count = min(8, -(-long // short))
        starts = [round(i * (long - short) / max(1, count - 1)) for i in range(count)]
        wide = x.shape[-1] == long
        crops = [x[..., s : s + short] if wide else x[..., s : s + short, :] for s in starts]
        squares = torch.cat([F.interpolate(crop, (side, side), mode="bicubic", antialias=True) for crop in crops])
        mean, std = torch.tensor((self.clip_image_mean, self.clip_image_std), device=x.device)[:, :, None, None]
        pixels = ((squares.clamp(-1, 1) + 1) / 2 - mean) / std
        with self.autocast():
            features = self.clip.get_image_features(pixel_values=pixels).pooler_output
        features = F.normalize(features.float(), dim=-1).view(count, len(x), -1).mean(dim=0)
        return F.normalize(features, dim=-1)


@dataclass(frozen=True, kw_only=True)
class XLCheckpoint(Checkpoint):
    """Stable Diffusion XL: two text encoders, a pooled embed of the prompt, and the picture's size as a condition.

    A token of prompt_embeds holds its embeds by both encoders, and then the pooled embed of its chunk, of which the
    UNet gets the first chunk's. Equation (5) optimises the former only; (7) mixes both. second_padding: the id with
    which the second encoder's tokenizer fills up. empty_is_zero: whether the empty prompt is all zeros, as in training.
    """

    text_encoder_2: CLIPTextModelWithProjection
    second_padding: int
    empty_is_zero: bool
    coarsest_map = 4  # as fine a grid as Stable Diffusion's, on latents of twice the side

    def encode_chunks(self, ids: Tensor) -> Tensor:
        """Chunks of token ids [C, length] to [C, length, width + pooled width]."""
        is_end = ids == self.tokenizer.eos_token_id
        is_padding = is_end.cumsum(dim=1) > is_end.int()  # what follows the first end
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids.masked_fill(is_padding, self.second_padding), output_hidden_states=True)
        pooled = second.text_embeds[:, None].expand(-1, ids.shape[1], -1)
        embeds = torch.cat((first.hidden_states[-2], second.hidden_states[-2], pooled), dim=-1)
        return embeds.masked_fill(is_end[:, 1, None, None], 0) if self.empty_is_zero else embeds

    def predict(self, unet: Callable[..., Any], z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """As for any checkpoint. The picture is told to be whole, and of the size that it is made in."""
        time_ids = z_t.new_zeros(len(z_t), 6)  # original height and width, top and left of the crop, height and width
        time_ids[:, 0::4], time_ids[:, 1::4] = (side * self.vae_factor for side in z_t.shape[-2:])
        width = self.unet.config.cross_attention_dim
        more = {"text_embeds": prompt_embeds[:, 0, width:].detach(), "time_ids": time_ids}
        return super().predict(partial(unet, added_cond_kwargs=more), z_t, t, prompt_embeds[..., :width])


@cache
def compiled_call() -> Callable[..., Any]:
    """A call of any UNet by torch.compile, which does its work once for each shape and for each kind of training.

    All photographs' copies share it, and what is on the disk (TORCHINDUCTOR_CACHE_DIR) all processes that come later.
    """
    torch._dynamo.config.recompile_limit = 128  # 25 shapes of aspects up to 4, kinds of steps: no more is compiled
    right: dict[str, Any] = {"layout_optimization": False}  # with it, torch 2.13 gives wrong gradients on a CPU
    return torch.compile(lambda unet, *inputs, **named: unet(*inputs, **named), dynamic=False, options=right)


@contextmanager
def recomputing(*networks: AutoencoderKL | AutoencoderTiny | UNet2DConditionModel) -> Iterator[None]:
    """Graphs that are built here keep nothing inside the networks' blocks: the backward pass computes them again."""
    for network in networks:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for network in networks:
            network.disable_gradient_checkpointing()


def pad_embeds(e: Tensor, e_empty: Tensor, num_tokens: int) -> Tensor:
    """Embeds [B, n, width] padded to `num_tokens` with the empty prompt's `e_empty` [1, one chunk, width]."""
    num_chunks = (num_tokens - e.shape[1]) // e_empty.shape[1]
    return torch.cat((e, *[e_empty.expand(len(e), -1, -1)] * num_chunks), dim=1)


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> Tensor:
    """A prompt's token ids in chunks [chunks, length], each with its own start and end token."""
    split = {"truncation": True, "return_overflowing_tokens": True, "padding": "max_length"}
    ids: Tensor = tokenizer(prompt, return_tensors="pt", verbose=False, **split).input_ids
    return ids


def compute_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16, by torch's name or as text; "auto" is bfloat16 on a GPU that has it, else float32.

    Raises ValueError for any other, with the reason.
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        reason = "; Stable Diffusion's VAE overflows in it, and small gradients vanish" if name == "float16" else ""
        raise ValueError(f"dtype {name!r}{reason}: give auto, float32 or bfloat16")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def load_checkpoint(
    model: str,
    *,
    clip: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
) -> Checkpoint:
    """Load a checkpoint and its guidance CLIP.

    model, clip: a local folder, a hub id that `PINNED` lists, or "owner/name@commit"; model may also be a bundled one,
    or a single .safetensors file with a folder of its name beside it that has the configurations and the tokenizer.
    dtype: as `compute_dtype` takes it. revision: what `identify(model)` gave, for instance in the process that
    planned a run: a folder is then not hashed again. Raises ModelError if a model is missing, not pinned, not at
    `revision`, or of an architecture that we do not serve, and ValueError for an unknown dtype.
    """
    device = torch.device(device)
    dtype = compute_dtype(dtype, device)
    source, commit = resolve(model)
    folder = folder_of(source)
    for logging in (transformers_logging, diffusers_logging):
        logging.disable_progress_bar()  # for copying weights; downloads keep theirs
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(folder, revision=commit)
        kind = index.get("_class_name", "a checkpoint of no named class")
        is_xl = kind == "StableDiffusionXLPipeline"
        if kind != "StableDiffusionPipeline" and not is_xl:
            known = "only StableDiffusionPipeline (1.x and 2.x) and StableDiffusionXLPipeline checkpoints are served"
            raise ModelError(f"{model!r} is {kind}, but {known}: refiners, inpainting and later models need more")

        def of(network: str) -> dict[str, Any]:
            found = {"subfolder": network, "variant": variant_to_load(source, network), "revision": commit}
            return found | {"use_safetensors": True, "dtype": dtype}

        if folder != source:
            vae, unet, text_encoder = _from_single_file(source, folder, dtype, is_xl)
        else:
            vae = AutoencoderKL.from_pretrained(source, **of("vae"))
            unet = UNet2DConditionModel.from_pretrained(source, **of("unet"))
            text_encoder = CLIPTextModel.from_pretrained(source, **of("text_encoder"))
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", revision=commit)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", revision=commit)
        xl: dict[str, Any] = {}
        if is_xl:
            second = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2", revision=commit)
            encoder = CLIPTextModelWithProjection.from_pretrained(source, **of("text_encoder_2"))
            empty_is_zero = index.get("force_zeros_for_empty_prompt", True)
            xl = {"text_encoder_2": encoder, "second_padding": second.pad_token_id, "empty_is_zero": empty_is_zero}
            taken = (unet.config.addition_embed_type, unet.config.projection_class_embeddings_input_dim)
            if taken != ("text_time", encoder.config.projection_dim + 6 * (unet.config.addition_time_embed_dim or 0)):
                raise ModelError(f"{model!r} has a UNet without SDXL's six sizes as input: refiners are not served")
            if tokenizer.get_vocab() != second.get_vocab():
                raise ModelError(f"{model!r} has two tokenizers of different vocabularies, unlike SDXL")

        tiny = Path(folder, "tiny_vae")
        tiny_vae = AutoencoderTiny.from_pretrained(tiny, use_safetensors=True, dtype=dtype) if tiny.is_dir() else None
        inner = str(Path(folder, "clip"))
        clip_source, clip_commit = resolve(clip or (inner if Path(inner).is_dir() else DEFAULT_CLIP))
        clip_model = CLIPModel.from_pretrained(clip_source, revision=clip_commit, use_safetensors=True, dtype=dtype)
        clip_tokenizer = CLIPTokenizer.from_pretrained(clip_source, revision=clip_commit)
        processor = AutoImageProcessor.from_pretrained(clip_source, revision=clip_commit, backend="pil")
    except OSError as error:
        raise ModelError(f"cannot load {model!r}: {error}") from error
    if unet.config.in_channels != vae.config.latent_channels:
        channels = f"{unet.config.in_channels} input channels for latents with {vae.config.latent_channels}"
        raise ModelError(f"{model!r} has a UNet with {channels}: inpainting and depth checkpoints are not served")
    if vae.config.latents_mean or vae.config.shift_factor:
        raise ModelError(f"{model!r} has a VAE whose latents are shifted, which is not served: another kind of noise")
    if len({(v.config.latent_channels, len(v.config.block_out_channels)) for v in (vae, tiny_vae or vae)}) > 1:
        raise ModelError(f"{model!r} has a tiny VAE whose latents have another shape than the VAE's: take its own")
    model_id, model_revision = identify(model, revision)
    color_prior = load(ColorPrior, beside) if (beside := Path(folder, "color_prior")).is_dir() else None
    noun_regions = load(NounRegions, beside) if (beside := Path(folder, "noun_regions")).is_dir() else None
    checkpoint = (XLCheckpoint if is_xl else Checkpoint)(
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
        tiny_vae=tiny_vae,
        color_prior=color_prior,
        noun_regions=noun_regions,
        **xl,
    )
    for part in vars(checkpoint).values():
        if isinstance(part, nn.Module):
            part.to(device).eval().requires_grad_(False)
    return checkpoint


def _from_single_file(
    path: str, folder: str, dtype: torch.dtype, is_xl: bool
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """The networks of a checkpoint in one file, configured as `folder` says. Raises ModelError if they do not fit."""
    if is_xl:
        remedy = "convert it into a folder: StableDiffusionXLPipeline.from_single_file(...).save_pretrained(...)"
        raise ModelError(f"{path!r} is SDXL in a single file, which is not read: {remedy}")
    left_out = {"safety_checker": None, "feature_extractor": None, "tokenizer": None, "scheduler": None}
    try:
        parts = diffusers.StableDiffusionPipeline.from_single_file(
            path, config=folder, local_files_only=True, dtype=dtype, **left_out
        )
    except (ValueError, RuntimeError, KeyError, AttributeError, SingleFileComponentError) as error:
        lacks_weights = "meta tensor" in str(error)
        reason = "it does not have all weights" if lacks_weights else str(error)
        raise ModelError(f"{path!r} is no Stable Diffusion as {folder!r} configures it: {reason}") from error
    if any(parameter.is_meta for parameter in parts.text_encoder.parameters()):
        raise ModelError(f"{path!r} does not have all weights of the text encoder that {folder!r} configures")
    return parts.vae, parts.unet, parts.text_encoder
