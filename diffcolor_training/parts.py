"""Builders of the demo model's parts, and its diffusers folder."""

import json
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffcolor_core.color_prior import CONFIG, WEIGHTS, ColorPrior, NounRegions
from diffcolor_training.dataset import SIZE_PX

WIDTH = 128  # of both text towers
MAX_LENGTH = 77
IMAGE_MEAN = [0.5, 0.5, 0.5]
IMAGE_STD = [0.25, 0.25, 0.25]


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE like CLIP's, learned from `captions` and from a list of words that describe photographs."""
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
    """A VAE with six latent channels at a quarter of the picture's side."""
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
    """A CLIP of two towers with three layers each. It shares nothing with the UNet's text tower."""
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


def build_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The UNet's text tower, three layers."""
    return CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer)))


def build_unet() -> UNet2DConditionModel:
    """A UNet of 4.4 million parameters with cross-attention at 16 x 16, 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=6,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # despite its name, this class takes the number of heads here
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def save_bundle(
    folder: Path,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    clip: CLIPModel,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
) -> None:
    """Write the diffusers folder in fp16, with the guidance CLIP in its subfolder `clip`."""
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    for name, model in parts.items():
        model.half().save_pretrained(folder / name, safe_serialization=True)
        model.float()
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    save_clip(folder / "clip", tokenizer, clip)
    save_model_index(folder)


def save_clip(folder: Path, tokenizer: CLIPTokenizer, clip: CLIPModel) -> None:
    """Write a CLIP with its tokenizer and image processor, in fp16."""
    clip.half().save_pretrained(folder, safe_serialization=True)
    clip.float()
    tokenizer.save_pretrained(folder)
    side = int(clip.config.vision_config.image_size)
    CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    ).save_pretrained(folder)


def save_model_index(folder: Path) -> None:
    """Write the `model_index.json` that `StableDiffusionPipeline.save_pretrained` would."""
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


def save_beside(network: ColorPrior | NounRegions, folder: Path) -> None:
    """Write a network of a checkpoint's folder: its configuration and its weights, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(network.config, indent=1) + "\n")
    halves = {name: x.half() if x.is_floating_point() else x for name, x in network.state_dict().items()}
    save_file({name: x.contiguous() for name, x in halves.items()}, folder / WEIGHTS)
