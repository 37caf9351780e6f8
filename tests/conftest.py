"""Shared fixtures: a tiny checkpoint of the real classes, small scans, the shared data where it is."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.storage import Store
from tests import s3_server

os.environ["DO_NOT_TRACK"] = "1"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs that lies beside the checkout where we develop."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The variables of a real S3 server on loopback; they are this process's too."""
    folder = tmp_path_factory.mktemp("s3")
    try:
        variables = s3_server.start(folder, s3_server.free_port(), install="DIFFCOLOR_TEST_S3" in os.environ)
    except s3_server.NoServerError as error:
        pytest.skip(f"no S3 server: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("diffcolor-tests")
        yield variables
    s3_server.stop(folder)


@pytest.fixture
def s3_url(s3_environment) -> str:
    """An empty folder on the real S3 server."""
    return f"s3://diffcolor-tests/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> Store:
    """An empty folder on a disk, in memory, on an S3 server."""
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_url"))
    return Store(str(tmp_path / "it's out") if request.param == "local" else f"memory://{tmp_path}")


def save_tiny_checkpoint(folder: Path, prediction_type: str = "epsilon", *, clip: bool = True) -> Path:
    """A Stable-Diffusion-shaped checkpoint with random weights, saved by diffusers itself."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel

    from diffcolor_core.demo.parts import build_tokenizer, save_model_index

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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny-v"), "v_prediction")


def gray_picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Smooth gray with an edge: uint8 [H, W]."""
    rng = np.random.default_rng(seed)
    x = np.linspace(40, 200, width)[None] + np.linspace(0, 40, height)[:, None]
    x[:, width // 2 :] *= 0.6
    return (x + rng.normal(0, 2, x.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def small_archive(tmp_path: Path) -> Path:
    """Three small scans with a catalog (one of them asked for twice) and a broken file."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(gray_picture(seed=number)).save(folder / f"scan {number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (folder / "catalog.csv").write_text(
        "image,context_prompt,target_prompt,source\n"
        "scan 0.png,a ball on a table,a red ball on a green table,somewhere\n"
        "scan 0.png,a ball on a table,a blue ball on a green table,somewhere\n"
        "scan 1.png,a box on a table,a yellow box on a blue table,\n"
        "scan 2.png,a vase on a table,,\n"
        "broken.jpg,a cone on a table,a red cone on a table,\n",
        encoding="utf-8",
    )
    return folder


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    """Return once `condition` holds; fail the test if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        pause.wait(0.2)
