import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffcolor_scans.color_names import exact_chroma
from diffcolor_study.cases import draw_cases
from diffcolor_study.pictures import lab_of
from diffcolor_study.scenes import asked_colors, reference_colors
from diffcolor_study.scores import _without_rim, exact_scores, leakage, region_right, region_scores


def test_the_truth_scores_as_its_own_caption_says():
    right, wrong_before_the_edit = [], []
    for case in draw_cases("edit", 10, 4, 128):
        own = replace(case, asked=tuple(asked_colors(case.scene.spec)))
        scores = region_scores(own, lab_of(case.truth))
        right.append(scores["all_right_per_image"])
        if case.asked[case.edited] != own.asked[case.edited]:
            wrong_before_the_edit.append(not region_right(case, lab_of(case.truth), case.edited))
    assert np.mean(right) >= 0.9
    assert len(wrong_before_the_edit) >= 5
    assert all(wrong_before_the_edit)


def test_wrong_pixels_at_borders_are_counted():
    case = next(draw_cases("full-prompt", 1, 4, 128))
    references = reference_colors()
    right = torch.zeros(3, 128, 128)
    for word, mask in zip(case.asked, case.scene.masks, strict=True):
        right[1:, mask > 0.5] = torch.tensor(references[word]).view(2, 1)
    assert region_scores(case, right)["border_wrong"] == 0
    halo = right.clone()
    mask = case.scene.masks[-1]  # the wall
    covered = mask > 0.99
    rim = covered & ~_without_rim(mask, 2)
    halo[1:, rim] = -right[1:, rim]
    share = region_scores(case, halo)["border_wrong"]
    assert 0.05 < share < 0.9
    assert region_scores(case, halo)["all_right_per_image"] == 1
    centre = right.clone()
    centre[1:, _without_rim(mask, 3)] *= -1
    assert region_scores(case, centre)["border_wrong"] == 0


def test_leakage_counts_the_outside_only():
    before, after = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    mask = torch.zeros(64, 64)
    mask[20:40, 20:40] = 1
    after[1, 20:40, 20:40] = 50
    assert leakage(before, after, mask) == (0.0, 0.0)
    after[1, 41] = 10
    outside, band = leakage(before, after, mask)
    assert 0 < outside < band


def test_exact_scores_know_the_code():
    lab = torch.zeros(3, 8, 8)
    lab[1], lab[2] = 0.0, 20.0  # a hue of 90 degrees
    wanted = exact_chroma("#8b0000")
    scores = exact_scores("a #8b0000 ball on a table", lab, torch.ones(8, 8))
    hue = math.degrees(math.atan2(wanted[1], wanted[0]))
    assert scores["hue_error_degrees"] == pytest.approx(90 - hue)
    assert scores["chroma_share"] == pytest.approx(20 / math.hypot(*wanted))
