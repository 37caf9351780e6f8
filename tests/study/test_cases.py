import re

import numpy as np
import pytest
import torch
from PIL import ImageColor

from diffcolor_core.prompts import HEX
from diffcolor_scans.color import srgb_to_lab
from diffcolor_study.cases import TASKS, draw_cases
from diffcolor_study.scenes import COLOR_WORDS


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


def test_an_exact_case_names_a_code_that_its_region_can_show():
    for case in draw_cases("exact", 10, 4, 64):
        (code,) = re.findall(HEX, case.prompt)
        region = case.scene.spec.regions[case.edited]
        assert f"a {code} {region.noun}" in case.prompt
        assert len(words(case.prompt)) == len(words(case.context_prompt)) - 1
        rgb = torch.tensor(ImageColor.getrgb(code), dtype=torch.float64).view(3, 1, 1) / 255
        assert float(srgb_to_lab(rgb)[0]) == pytest.approx(region.lightness, abs=1)
