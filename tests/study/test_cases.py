import numpy as np
import pytest

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
