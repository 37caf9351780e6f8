import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffcolor_core import Picture, preset
from diffcolor_core.config import Stage2Settings
from diffcolor_core.demo.evaluate import asked_colors, lab_of
from diffcolor_core.demo.scenes import COLOR_WORDS
from diffcolor_core.models import load_checkpoint
from diffcolor_core.study import METHODS, TASKS, run_photographs, run_study, summarise
from diffcolor_core.study.cases import draw_cases
from diffcolor_core.study.perceptual import Perceptual
from diffcolor_core.study.photographs import fidelity
from diffcolor_core.study.scores import leakage, region_right, region_scores
from tests.core.test_colorizer import QUICK


def words(prompt: str) -> list[str]:
    return [word for word in prompt.split() if word in COLOR_WORDS]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_draws_the_same_cases(task):
    one, two = (list(draw_cases(task, 3, 5, 64)) for _ in range(2))
    assert [(c.context_prompt, c.prompt, c.edited) for c in one] == [
        (c.context_prompt, c.prompt, c.edited) for c in two
    ]
    assert all(np.array_equal(a.gray.pixels, b.gray.pixels) for a, b in zip(one, two, strict=True))


def test_a_full_prompt_names_colours_the_scene_does_not_have():
    for case in draw_cases("full-prompt", 10, 1, 64):
        assert words(case.context_prompt) == []
        asked, true = words(case.prompt), [region.color for region in case.scene.spec.regions]
        assert all(a != t for a, t in zip(asked, true, strict=True))
        differing = [i for i, (a, b) in enumerate(zip(asked, words(case.edited_prompt), strict=True)) if a != b]
        assert differing == [case.edited]


def test_an_edit_changes_one_word():
    for case in draw_cases("edit", 10, 2, 64):
        before, after = words(case.context_prompt), words(case.prompt)
        assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [case.edited]
        np.testing.assert_array_equal(case.start.pixels, case.truth.pixels)


def test_an_automatic_case_asks_for_nothing():
    (case,) = draw_cases("automatic", 1, 3, 64)
    assert words(case.context_prompt) == []
    assert set(case.asked) == {None}


def test_the_truth_scores_as_its_own_caption_says():
    right = []
    for case in draw_cases("edit", 10, 4, 128):
        own = type(case)(**{**vars(case), "asked": tuple(asked_colors(case.scene.spec))})
        scores = region_scores(own, lab_of(case.truth))
        right.append(scores["all_right_per_image"])
        assert (
            not region_right(case, lab_of(case.truth), case.edited) or case.asked[case.edited] == own.asked[case.edited]
        )
    assert np.mean(right) >= 0.9


def test_leakage_counts_the_outside_only():
    before, after = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    mask = torch.zeros(64, 64)
    mask[20:40, 20:40] = 1
    after[1, 20:40, 20:40] = 50
    assert leakage(before, after, mask) == (0.0, 0.0)
    after[1, 41] = 10
    outside, band = leakage(before, after, mask)
    assert 0 < outside < band


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_setting(name):
    derived = METHODS[name].derive(preset("paper"))
    assert METHODS[name].derive(derived) == derived or name.endswith("-steps")
    opposite = {"adapter_rank": 2, "use_identifiers": True, "keep_unchanged": False, "alpha": 0.5}
    other = preset("demo").model_copy(update={"stage2": preset("demo").stage2.model_copy(update=opposite)})
    off = other.model_copy(update={"stage1": other.stage1.model_copy(update={"enabled": False})})
    on = preset("demo").model_copy(
        update={"stage2": Stage2Settings(negative_context=True, regional_prompts=True, keep_unchanged=True)}
    )
    changes = [METHODS[name].derive(settings) != settings for settings in (preset("paper"), other, off, on)]
    assert any(changes) == (name != "full")


@pytest.mark.parametrize("task", TASKS)
def test_a_study_runs_and_scores_saved_files(tiny_folder, tmp_path, task):
    checkpoint = load_checkpoint(str(tiny_folder))
    told = []
    figures = run_study(
        checkpoint,
        QUICK,
        task=task,
        methods=["full", "img2img", "stage1"],
        num=2,
        seed=3,
        folder=tmp_path,
        judge=checkpoint,
        progress=lambda *a: told.append(a),
    )
    assert told[-1][1:] == (6, 6)
    summary = summarise(figures)
    assert set(summary) == {"full", "img2img", "stage1"}
    for method in summary:
        assert len(list((tmp_path / task).rglob(f"{method}.png"))) == 2
        assert summary[method]["p99_abs_delta_l"]["mean"] <= 0.5
        assert summary[method]["mean_abs_delta_l_before_lock"]["mean"] > 1e-3
        assert len(figures[method]["clip_similarity"]) == 2
    assert ("edit_success" in summary["full"]) == (task == "edit")
    assert ("leakage" in summary["full"]) == (task != "automatic")
    assert ("clip_margin_of_truth" in summary["full"]) == (task == "automatic")
    margins, looks = figures["full"]["clip_margin"], figures["full"]["anti_color_look"]
    assert [float(margin < 0) for margin in margins] == looks


def test_photographs_are_compared_with_what_they_were(tiny_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    picture = Picture(pixels)
    assert fidelity(picture, picture) == {
        "psnr": 100.0,
        "ssim": pytest.approx(1),
        "ssim_l": pytest.approx(1),
        "colorfulness": pytest.approx(fidelity(picture, picture)["colorfulness"]),
        "colorfulness_distance": 0.0,
    }
    picture.save(tmp_path / "one.png")
    (tmp_path / "catalog.csv").write_text("image,context_prompt,target_prompt\none.png,a ball,a red ball\n")
    checkpoint = load_checkpoint(str(tiny_folder))
    common = {"methods": ["full"], "num": 5, "seed": 0, "folder": tmp_path / "out"}
    figures = run_photographs(checkpoint, QUICK, tmp_path, judge=checkpoint, **common)
    assert figures["full"]["ssim_l"][0] > 0.99
    assert len(figures["full"]["clip_similarity"]) == 1
    (tmp_path / "catalog.csv").write_text("file\none.png\n")
    with pytest.raises(ValueError, match="needs rows"):
        run_photographs(load_checkpoint(str(tiny_folder)), QUICK, tmp_path, methods=[], num=1, seed=0, folder=tmp_path)


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

    monkeypatch.setattr("diffcolor_core.study.perceptual.LearnedPerceptualImagePatchSimilarity", missing)
    with pytest.raises(ValueError, match="pip install torchvision torch-fidelity.*No module named"):
        Perceptual.load()


def test_unknown_names_are_refused_with_the_known_ones(tiny_folder, tmp_path):
    common = {"num": 1, "seed": 0, "folder": tmp_path}
    checkpoint = load_checkpoint(str(tiny_folder))
    with pytest.raises(ValueError, match="img2img"):
        run_study(checkpoint, QUICK, task="edit", methods=["best"], **common)
    with pytest.raises(ValueError, match="full-prompt"):
        run_study(checkpoint, QUICK, task="all", methods=["full"], **common)


def test_intervals_leave_out_what_does_not_apply():
    figures = {"full": {"some": [1.0, math.nan, 0.0, 1.0], "none": [math.nan] * 4, "same": [2.0] * 4}}
    (summary,) = summarise(figures).values()
    assert set(summary) == {"some", "same"}
    assert summary["some"]["mean"] == pytest.approx(2 / 3)
    assert summary["some"]["low"] <= summary["some"]["mean"] <= summary["some"]["high"]
    assert summary["same"] == {"mean": 2, "low": 2, "high": 2, "scenes": 4}


def test_methods_are_compared_scene_by_scene_with_the_first():
    scenes = np.random.default_rng(0).normal(size=20) * 10  # their spread hides what each scene shows
    figures = {"full": {"some": list(scenes)}, "other": {"some": list(scenes + 1), "own": [1.0] * 20}}
    summary = summarise(figures)
    assert "difference" not in summary["full"]["some"]
    assert summary["other"]["some"]["low"] < summary["full"]["some"]["high"]
    assert summary["other"]["some"]["difference"]["low"] == pytest.approx(1)
    assert summary["other"]["some"]["difference"]["high"] == pytest.approx(1)
    assert "difference" not in summary["other"]["own"]
