"""Checkpoints with random weights, saved by diffusers itself: a tiny one and the published architectures; a BLIP."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
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
    CLIPTokenizer,
)

from diffcolor_training.parts import build_tokenizer, save_model_index


def save_tiny_checkpoint(folder: Path, prediction_type: str = "epsilon", *, clip: bool = True) -> Path:
    """A Stable-Diffusion-shaped checkpoint with random weights, saved by diffusers itself."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a red ball and a blue box on a table"])
    text = {
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
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    save_model_index(folder)
    if clip:
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
            folder / "clip"
        )
        tokenizer.save_pretrained(folder / "clip")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            folder / "clip"
        )
    return folder


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


def save_architecture(folder: Path, version: str, scale: float = 1.0, seed: int = 0) -> Path:
    """Write Stable Diffusion `version` ("1.5": epsilon, 512 px; "2.1": v-prediction, 768 px) to `folder`.

    Configurations as published with Stable Diffusion and OpenAI's CLIP ViT-B/32. scale: 1 gives the
    true sizes; less reduces every width and keeps the depth. The tokenizer is ours, because CLIP's
    vocabulary is not available here.
    """

    def width(full: int) -> int:
        return max(16, int(full * scale) // 16 * 16)

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["a red ball and a blue box on a table before a wall"])
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    second = version == "2.1"
    text_width = width(1024 if second else 768)
    blocks = tuple(width(full) for full in (320, 640, 1280, 1280))
    UNet2DConditionModel(
        sample_size=96 if second else 64,
        block_out_channels=blocks,
        cross_attention_dim=text_width,
        attention_head_dim=(5, 10, 20, 20) if second and scale == 1 else 8 if scale == 1 else 2,
        use_linear_projection=second,
        norm_num_groups=32 if scale == 1 else 8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width(full) for full in (128, 256, 512, 512)),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if scale == 1 else 8,
        sample_size=768 if second else 512,
    ).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=23 if second else 12,
        num_attention_heads=(16 if second else 12) if scale == 1 else 2,
        hidden_act="gelu" if second else "quick_gelu",
        **special,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if second else "epsilon",
    ).save_pretrained(folder / "scheduler")
    save_model_index(folder)
    _save_vit_b_32(folder / "clip", width, scale, tokenizer, special)
    return folder


def _save_vit_b_32(
    folder: Path, width: Callable[[int], int], scale: float, tokenizer: CLIPTokenizer, special: dict[str, int]
) -> None:
    heads = {"num_attention_heads": 8 if scale == 1 else 2}
    text = {"hidden_size": width(512), "intermediate_size": 4 * width(512), "vocab_size": 49408, **heads, **special}
    vision = {"hidden_size": width(768), "intermediate_size": 4 * width(768)}
    vision |= {"num_attention_heads": 12 if scale == 1 else 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width(512))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
