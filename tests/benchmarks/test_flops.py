"""The counted costs are those of the code's own steps: counted on the demo model, and on it with real tensors."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.flops import VERSIONS, Counter, PeakBytes, count_flop, meta_checkpoint
from diffcolor_core import DiffColor, Picture, preset
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_training.tiny_vae import build_tiny_vae
from support.checkpoints import Networks, build_networks
from support.pictures import gray_picture

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "flops.json"
FEW = {"stage1.num_steps": 2, "stage2.embedding_steps": 2, "stage2.model_steps": 2, "stage1.num_views": 0}


@pytest.fixture(scope="module")
def demo():
    """The demo model, with an untrained tiny VAE."""
    checkpoint = load_checkpoint("demo")
    return replace(checkpoint, tiny_vae=build_tiny_vae(checkpoint).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def counter(demo):
    networks = Networks(*(copy.deepcopy(n) for n in (demo.unet, demo.vae, demo.text_encoder, demo.clip)))
    return Counter(meta_checkpoint(networks, alike=demo, tiny_vae=copy.deepcopy(demo.tiny_vae)))


@pytest.fixture
def text_flop(monkeypatch):
    """What the text towers cost while a test runs, call by call."""
    costs = []

    def counted(method):
        def call(*arguments):
            with count_flop() as counter:
                result = method(*arguments)
            costs.append(counter.get_total_flops())
            return result

        return call

    for name in ("encode_prompts", "clip_text_features"):
        monkeypatch.setattr(Checkpoint, name, counted(getattr(Checkpoint, name)))
    return costs


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"stage1.adapter_rank": 4, "stage2.adapter_rank": 4, "stage1.diffusion_target": "noise", "batch_size": 1}
        | {"alignment.enabled": False, "sampling.project_luminance": False}
        | {"stage1.contrastive_weight": 0, "stage2.regional_prompts": False, "sampling.guidance_scale": 1},
        {"stage1.tiny_decoder": True, "sampling.tiny_projection": True},
    ],
)
def test_a_photograph_costs_what_the_table_says(demo, counter, overrides, text_flop):
    settings = preset("demo", FEW | overrides)
    pipe = DiffColor(demo, settings)
    scan = Picture(np.repeat(gray_picture(64, 64)[..., None], 3, axis=-1)).encode_png()
    with count_flop() as real:
        fit = pipe.fit(scan, "a ball and a box on a table")
        pipe.recolor(fit, "a red ball and a blue box on a green table")
    counted = sum(stage.flop for stage in counter.stages(settings).values())
    assert 0 < sum(text_flop) < 0.2 * counted  # here, where steps are few and small
    # the matrix products of colour conversions, which depend on the pixels, are not counted
    assert counted == pytest.approx(real.get_total_flops() - sum(text_flop), rel=1e-3)


def test_peak_bytes_are_those_that_live_at_once():
    layer = torch.nn.Linear(100, 100, bias=False, device="meta")
    with PeakBytes(layer) as memory:
        x = torch.empty(1000, 100, device="meta")
        view = x[:10]
        y = layer(x)
        del x, y  # the view still holds x
        z = torch.empty(500, 100, device="meta")
    assert memory.peak == 4 * (100 * 100 + 2 * 1000 * 100)
    assert memory.live == 4 * (100 * 100 + 1000 * 100 + 500 * 100)
    assert view.shape == (10, 100)
    assert z.shape == (500, 100)


@pytest.mark.parametrize("size", VERSIONS)
def test_the_committed_table_is_of_this_code(size):
    with torch.device("meta"):
        counter = Counter(meta_checkpoint(build_networks(VERSIONS[size])))

    @cache
    def flop(recompute: bool) -> float:
        return counter.reconstruction_step(1, "embedding", None, recompute).flop

    for row, committed in json.loads(TABLE.read_text())[size].items():
        settings = preset(row.removesuffix(", tiny VAE"))
        flop_of_all = settings.stage2.embedding_steps * settings.batch_size * flop(settings.stage2.recompute)
        assert committed["tflop_by_stage"]["embedding"] == pytest.approx(flop_of_all / 1e12, rel=1e-4), row


def test_the_presets_for_real_checkpoints_cost_what_is_promised():
    sd15 = json.loads(TABLE.read_text())["sd15"]
    for name, divisor in (("standard", 5), ("fast", 25), ("instant", 100)):
        assert sd15[name]["tflop"] <= sd15["paper"]["tflop"] / divisor
        assert sd15[f"{name}, tiny VAE"]["tflop"] < 0.9 * sd15[name]["tflop"]
    assert sd15["standard"]["peak_gib"]["1"] <= 10
    assert sd15["standard"]["peak_gib"]["8"] <= 16
