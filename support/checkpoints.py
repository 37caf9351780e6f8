"""Checkpoints with random weights, saved by diffusers itself: a tiny one and the published architectures; a BLIP."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffcolor_training.parts import build_tokenizer, save_model_index


def save_tiny_checkpoint(folder: Path, prediction_type: str = "epsilon", *, clip: bool = True) -> Path:
    """A Stable-Diffusion-shaped checkpoint with random weights, saved by diffusers itself."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a red ball and a blue box on a table"])
    _tiny_vae().save_pretrained(folder / "vae")
    _tiny_unet(cross_attention_dim=16).save_pretrained(folder / "unet")
    CLIPTextModel(CLIPTextConfig(**_tiny_text(tokenizer))).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    _scheduler(prediction_type).save_pretrained(folder / "scheduler")
    save_model_index(folder)
    if clip:
        _save_tiny_clip(folder / "clip", tokenizer)
    return folder


def save_tiny_xl_checkpoint(folder: Path, num_sizes: int = 6) -> Path:
    """A tiny SDXL with random weights, saved by diffusers' own pipeline, and a guidance CLIP beside it.

    num_sizes: numbers about the picture's size that the UNet takes; SDXL's refiner takes 5.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a red ball and a blue box on a table"])
    text = {**_tiny_text(tokenizer), "num_hidden_layers": 2}
    larger = text | {"hidden_size": 24, "projection_dim": 12}
    pipeline = StableDiffusionXLPipeline(
        vae=_tiny_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**larger)),
        tokenizer=tokenizer,
        tokenizer_2=_second_tokenizer(tokenizer),
        unet=_tiny_unet(
            cross_attention_dim=16 + 24,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + num_sizes * 8,
        ),
        scheduler=_scheduler("epsilon"),
    )
    pipeline.save_pretrained(folder)
    _save_tiny_clip(folder / "clip", tokenizer)
    return folder


def _second_tokenizer(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The same, but it fills up with another token, as SDXL's second one does."""
    second = copy.deepcopy(tokenizer)
    second.pad_token = "!"
    return second


def _tiny_text(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tiny_vae(**own: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        **own,
    )


def _tiny_unet(**own: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **own,
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )


def _save_tiny_clip(folder: Path, tokenizer: CLIPTokenizer) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    config = CLIPConfig(text_config=_tiny_text(tokenizer), vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def save_tiny_blip(folder: Path) -> Path:
    """A BLIP that knows two captions, saved by transformers itself: seconds of training tell it dark from light.

    Dark pictures are "a black and white photo of a church on a hill", light ones "a boat on a river".
    """
    torch.manual_seed(0)
    captions = ["a black and white photo of a church on a hill", "a boat on a river"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *sorted(set(" ".join(captions).split()))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, bos_token="[DEC]")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64, "projection_dim": 16}
    text |= {"pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": 5}
    vision = {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    model = BlipForConditionalGeneration(BlipConfig(text_config=size | text, vision_config=size | vision))
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)

    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (40, 220)]
    inputs = processor(images=pictures, text=captions, return_tensors="pt", padding=True)
    inputs["labels"] = inputs.input_ids.masked_fill(inputs.input_ids == tokenizer.pad_token_id, -100)
    inputs.input_ids[:, 0] = tokenizer.bos_token_id
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_single_file(folder: Path, path: Path) -> Path:
    """The weights of `save_tiny_checkpoint` in one file, under the names of the original Stable Diffusion."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {f"model.diffusion_model.{_renamed(name, _UNET)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        is_matrix = "attentions" in name and tensor.ndim == 2  # the original has convolutions there
        tensors[f"first_stage_model.{_renamed(name, _VAE)}"] = tensor[..., None, None] if is_matrix else tensor
    for name, tensor in text.items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    positions = text[next(name for name in text if "position_embedding" in name)].shape[0]
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".conv_shortcut.": ".skip_connection.",
}
_VAE = {
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
    "encoder.down_blocks.0.downsamplers.0": "encoder.down.0.downsample",
    "decoder.up_blocks.0.upsamplers.0": "decoder.up.1.upsample",
    "encoder.down_blocks.0.resnets": "encoder.down.0.block",
    "encoder.down_blocks.1.resnets": "encoder.down.1.block",
    "decoder.up_blocks.0.resnets": "decoder.up.1.block",
    "decoder.up_blocks.1.resnets": "decoder.up.0.block",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    ".conv_shortcut.": ".nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}


def _renamed(name: str, names: dict[str, str]) -> str:
    """The name with the first match of a place, and then all that are names within a layer."""
    in_transformer = "transformer_blocks" in name  # whose norms are called as they are in the original
    for old, new in names.items():
        if name.startswith(old) or (old.startswith(".") and not in_transformer) or "mid_block" in old:
            name = name.replace(old, new)
    return name


class Networks(NamedTuple):
    """The networks of a checkpoint. SDXL has a second text encoder."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    clip: CLIPModel
    text_encoder_2: CLIPTextModelWithProjection | None = None


def build_networks(version: str, scale: float = 1.0, **special_tokens: int) -> Networks:
    """Networks with random weights, configured as Stable Diffusion `version` and CLIP ViT-B/32 were published.

    version: "1.5" (epsilon, 512 px), "2.1" (v-prediction, 768 px) or "xl" (epsilon, 1024 px). scale: 1 gives the true
    sizes; less reduces every width and keeps the depth. Under `torch.device("meta")` they take no memory.
    """

    def width(full: int) -> int:
        return max(16, int(full * scale) // 16 * 16)

    full_size, second, xl = scale == 1, version == "2.1", version == "xl"
    text_width = width(1024 if second else 768)
    size_px = {"1.5": 512, "2.1": 768, "xl": 1024}[version]
    own: dict[str, Any] = {"attention_head_dim": 8 if full_size else 2}
    if second and full_size:
        own = {"attention_head_dim": (5, 10, 20, 20)}
    if xl:
        own = {
            "attention_head_dim": (5, 10, 20) if full_size else 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": width(1280) + 6 * 256,
        }
    unet = UNet2DConditionModel(
        sample_size=size_px // 8,
        block_out_channels=tuple(width(full) for full in ((320, 640, 1280) if xl else (320, 640, 1280, 1280))),
        cross_attention_dim=text_width + width(1280) if xl else text_width,
        use_linear_projection=second or xl,
        norm_num_groups=32 if full_size else 8,
        **own,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width(full) for full in (128, 256, 512, 512)),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if full_size else 8,
        sample_size=size_px,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=23 if second else 12,
        num_attention_heads=(16 if second else 12) if full_size else 2,
        hidden_act="gelu" if second else "quick_gelu",
        **special_tokens,
    )
    heads = {"num_attention_heads": 8 if full_size else 2}
    clip_text = {"hidden_size": width(512), "intermediate_size": 4 * width(512), "vocab_size": 49408, **heads}
    vision = {"hidden_size": width(768), "intermediate_size": 4 * width(768)}
    vision |= {"num_attention_heads": 12 if full_size else 2}
    text_encoder = CLIPTextModel(text)
    clip = CLIPConfig(text_config=clip_text | special_tokens, vision_config=vision, projection_dim=width(512))
    text_encoder_2 = None
    if xl:
        second_text = text.to_dict() | {"hidden_size": width(1280), "intermediate_size": 4 * width(1280)}
        second_text |= {"num_hidden_layers": 32, "num_attention_heads": 20 if full_size else 2, "hidden_act": "gelu"}
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second_text | {"projection_dim": width(1280)}))
    return Networks(unet, vae, text_encoder, CLIPModel(clip), text_encoder_2)


def save_architecture(folder: Path, version: str, scale: float = 1.0, seed: int = 0) -> Path:
    """Write Stable Diffusion `version` as `build_networks` makes it to `folder`.

    The tokenizer is ours, because CLIP's vocabulary is not available here.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["a red ball and a blue box on a table before a wall"])
    networks = build_networks(
        version,
        scale,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name, network in networks._asdict().items():
        if network is not None:
            network.save_pretrained(folder / name)
    for name in ("tokenizer", "clip"):
        tokenizer.save_pretrained(folder / name)
    CLIPImageProcessor().save_pretrained(folder / "clip")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if version == "2.1" else "epsilon",
    ).save_pretrained(folder / "scheduler")
    save_model_index(folder)
    if networks.text_encoder_2 is not None:
        _second_tokenizer(tokenizer).save_pretrained(folder / "tokenizer_2")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    return folder
