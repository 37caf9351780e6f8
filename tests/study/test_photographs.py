import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from diffcolor_core import Picture
from diffcolor_core.models import load_checkpoint
from diffcolor_study.perceptual import Perceptual
from diffcolor_study.photographs import Photograph, _draw_edit, edit_scores, fidelity, run_photographs
from diffcolor_study.pictures import lab_of
from support.settings import QUICK


def test_photographs_are_compared_with_what_they_were(tiny_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    picture = Picture(pixels)
    same = fidelity(picture, picture)
    assert (same["psnr"], same["delta_e"], same["colorfulness_share"], same["better_than_gray"]) == (100, 0, 1, 1)
    assert same["ssim"] == pytest.approx(1) == same["ssim_l"]
    picture.save(tmp_path / "one.png")
    (tmp_path / "catalog.csv").write_text("image,context_prompt,target_prompt\none.png,a ball,a red ball\n")
    checkpoint = load_checkpoint(str(tiny_folder))
    common = {"num": 5, "seed": 0, "folder": tmp_path / "out"}
    methods = ["full", "gray", "flat-tint"]
    figures = run_photographs(
        checkpoint, QUICK, tmp_path, task="full-prompt", methods=methods, judge=checkpoint, **common
    )
    assert figures["full"]["ssim_l"][0] > 0.99
    assert len(figures["full"]["clip_similarity"]) == 1
    assert figures["gray"]["delta_e_ratio"][0] == pytest.approx(1, abs=0.02)
    assert figures["gray"]["colorfulness_share"][0] < 0.02
    assert figures["flat-tint"]["delta_e_of_gray"] == figures["gray"]["delta_e_of_gray"]
    with pytest.raises(ValueError, match="no task 'colour'"):
        run_photographs(checkpoint, QUICK, tmp_path, task="colour", methods=[], **common)
    (tmp_path / "catalog.csv").write_text("file\none.png\n")
    with pytest.raises(ValueError, match="needs rows"):
        run_photographs(checkpoint, QUICK, tmp_path, task="automatic", methods=[], **common)


def test_an_edit_changes_a_word_whose_region_the_original_shows(tiny_folder, tmp_path):
    """The left half is red, the right half gray: only the red one can be asked for in another colour."""
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:, :32] = (190, 90, 80)
    truth = Picture(pixels)
    photograph = Photograph("one", truth, b"", "a wall and a field", "a red wall and a gray field")
    edits = [_draw_edit(photograph, np.random.default_rng(seed)) for seed in range(8)]
    assert len({edit.prompt for edit in edits}) > 2
    for edit in edits:
        assert edit.prompt.endswith(" wall and a gray field")
        assert (edit.region[:, :32].mean(), edit.region[:, 32:].mean()) == (1, 0)
    assert _draw_edit(replace(photograph, target="a blue wall and a gray field"), np.random.default_rng(0)) is None

    before = lab_of(truth)
    after, everywhere = before.clone(), before.clone()
    angle = math.radians(edits[0].hue_degrees)
    wanted = 20 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=before.dtype).view(2, 1, 1)
    after[1:, :, :32], everywhere[1:] = wanted, wanted
    kept, done, spilt = (edit_scores(edits[0], before, x) for x in (before, after, everywhere))
    assert (kept["region_turned"], kept["delta_e_elsewhere"]) == (0, 0)
    assert (done["region_turned"], done["delta_e_elsewhere"]) == (1, 0)
    assert done["hue_error_degrees"] == pytest.approx(0, abs=0.01)
    assert (spilt["region_turned"], spilt["delta_e_elsewhere"]) == (1, pytest.approx(20, abs=0.5))

    truth.save(tmp_path / "one.png")
    (tmp_path / "catalog.csv").write_text(
        "image,context_prompt,target_prompt,split\none.png,a wall and a field,a red wall and a gray field,test\n"
    )
    checkpoint = load_checkpoint(str(tiny_folder))
    common = {"num": 1, "seed": 0, "folder": tmp_path / "out"}
    figures = run_photographs(checkpoint, QUICK, tmp_path, task="edit", methods=["full"], **common)
    assert [len(figures["full"][name]) for name in kept] == [1, 1, 1]


class MeanColors(torch.nn.Module):
    num_features = 3

    def forward(self, pictures):
        return pictures.double().mean(dim=(2, 3)) / 255


def test_sets_of_pictures_are_compared_by_their_features(tiny_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    one, two = ([torch.rand(3, 8, 8, generator=generator) * s for _ in range(4)] for s in (1.0, 0.5))
    networks = Perceptual(lambda x, y: (x - y).abs().mean(), MeanColors())
    same, other = networks.set_distances(one, one), networks.set_distances(one, two)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    means = [np.array([(x * 255).round().numpy().mean(axis=(1, 2)) / 255 for x in side]) for side in (one, two)]
    covariances = [np.cov(m.T) for m in means]
    gap = ((means[0].mean(0) - means[1].mean(0)) ** 2).sum()
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)  # Heusel et al. 2017, (6)
    assert other["fid"] == pytest.approx(gap + np.trace(covariances[0] + covariances[1]) - 2 * root, rel=1e-3)
    assert other["kid"] > same["kid"]

    for number in range(2):
        Picture(np.full((60, 80, 3), (200, 100, 50 * number), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "catalog.csv").write_text("image,context_prompt\n0.png,a ball\n1.png,a box\n")
    figures = run_photographs(
        load_checkpoint(str(tiny_folder)),
        QUICK,
        tmp_path,
        task="automatic",
        methods=["img2img"],
        num=2,
        seed=0,
        folder=tmp_path / "out",
        perceptual=networks,
    )
    assert {name: len(values) for name, values in figures["img2img"].items() if name in ("lpips", "fid", "kid")} == {
        "lpips": 2,
        "fid": 1,
        "kid": 1,
    }


def test_without_the_pretrained_networks_the_reason_and_the_remedy_are_told(monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr("diffcolor_study.perceptual.LearnedPerceptualImagePatchSimilarity", missing)
    with pytest.raises(ValueError, match="pip install torchvision torch-fidelity.*No module named"):
        Perceptual.load()
