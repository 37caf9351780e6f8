"""The weights of the photo model: their size, that they load, what they come from, and that they beat gray."""

import csv
import io
import re
from pathlib import Path

import torch
from PIL import Image

from diffcolor_core import DiffColor
from diffcolor_core.config import preset
from diffcolor_core.model_files import BUNDLES
from diffcolor_core.models import load_checkpoint
from diffcolor_study.photographs import run_photographs

PHOTO = BUNDLES["photo"].parent
ROOT = Path(__file__).parents[2]


def test_the_bundle_is_small_and_loads_in_diffusers_own_pipeline():
    from diffusers import StableDiffusionPipeline

    files = [path for path in BUNDLES["photo"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    pipe = StableDiffusionPipeline.from_pretrained(BUNDLES["photo"], use_safetensors=True, torch_dtype=torch.float32)
    image = pipe("a river under a sky", num_inference_steps=2, height=96, width=96, output_type="np").images[0]
    assert image.shape == (96, 96, 3)


def test_the_card_has_the_true_sizes():
    checkpoint = load_checkpoint("photo")
    card = (PHOTO / "MODEL_CARD.md").read_text()
    for name in ("color_prior", "noun_regions", "text_encoder", "vae", "unet", "clip"):
        millions = sum(p.numel() for p in getattr(checkpoint, name).parameters()) / 1e6
        (row,) = re.findall(rf"^\| `{name}` \|.*$", card, re.MULTILINE)
        assert f"| {millions:.1f} M |" in row


def test_the_notice_counts_the_sources():
    with (PHOTO / "sources.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    notice = (ROOT / "NOTICE").read_text()
    assert f"from {len(rows):,} photographs" in notice
    counts = [int(number.replace(",", "")) for number in re.findall(r"^ +([\d,]+)  ", notice, re.MULTILINE)]
    assert sum(counts) == len(rows)
    assert all(row["source"] and row["licence"] for row in rows)


def test_colours_are_better_than_none_on_plates_that_trained_nothing(shared_data, tmp_path):
    figures = run_photographs(
        load_checkpoint("photo"), preset("photo"), shared_data / "photos",
        task="automatic", methods=["full"], num=12, seed=0, folder=tmp_path,
    )["full"]  # fmt: skip
    assert sum(figures["better_than_gray"]) >= 8
    assert sum(figures["delta_e"]) < 0.9 * sum(figures["delta_e_of_gray"])


@torch.no_grad()
def test_a_word_turns_the_sky_and_leaves_the_ground():
    """The middle of sky and ground of a drawn landscape: the model has seen neither."""
    y = torch.linspace(0, 1, 96)[:, None].expand(96, 128)
    texture = 6 * torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    gray = torch.where(y < 0.45, 85 - 10 * y, 35 + 20 * y + texture).clamp(0, 100)
    scan = io.BytesIO()
    Image.fromarray((gray * 2.55).to(torch.uint8).numpy()).save(scan, "png")
    pipe = DiffColor.from_pretrained("photo")
    fit = pipe.fit(scan.getvalue(), "a field under a sky")
    blue = pipe.recolor(fit, "a green field under a blue sky")
    pink = pipe.recolor(fit, "a green field under a pink sky", base=blue)
    change, middle = pink.chroma - blue.chroma, fit.content_px[0] // 2
    assert float(pink.chroma[0, 8 : middle - 24].mean()) > 8  # a*: towards red
    assert float(change[:, 8 : middle - 24].norm(dim=0).mean()) > 4 * float(change[:, middle + 24 :].norm(dim=0).mean())
