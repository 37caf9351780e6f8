import math

import pytest
import torch

from diffcolor_core.color_terms import colored_phrases
from diffcolor_core.steering import WORD_CHROMA, steered_to
from diffcolor_scans.color_names import exact_chroma, hue_of


def of_hue(degrees: float, chroma: float = 20.0) -> torch.Tensor:
    """a*b* [2, 4, 4] of one colour."""
    angle = math.radians(degrees)
    return torch.tensor((chroma * math.cos(angle), chroma * math.sin(angle)))[:, None, None].expand(2, 4, 4)


def steered(prompt: str, before: str, made: torch.Tensor, *, words: bool = True) -> torch.Tensor | None:
    return steered_to(colored_phrases(prompt, before)[0], torch.ones(4, 4), made, words=words)


def hue(chroma: torch.Tensor) -> float:
    return math.degrees(math.atan2(chroma[1], chroma[0])) % 360


@pytest.mark.parametrize("words", [False, True])
def test_exact_colours_are_steered_to_always(words):
    for code in ("#8b0000", "crimson"):
        target = steered(f"a {code} roof", "a roof", of_hue(20), words=words)
        assert target.tolist() == pytest.approx(exact_chroma(code))


def test_words_are_steered_to_where_the_picture_contradicts_them():
    target = steered("a green roof", "a roof", of_hue(30))
    assert hue(target) == pytest.approx(hue_of("green"))
    assert float(target.norm()) == pytest.approx(WORD_CHROMA)
    assert steered("a green roof", "a roof", of_hue(hue_of("green") + 50)) is None
    assert steered("a green roof", "a roof", of_hue(30), words=False) is None


def test_a_word_that_replaces_another_is_steered_to_whatever_the_picture_shows():
    near = of_hue(hue_of("orange"))
    assert hue(steered("an orange roof", "a red roof", near)) == pytest.approx(hue_of("orange"))
    assert steered("a gray roof", "a red roof", near).tolist() == [0.0, 0.0]
    assert steered("a red roof", "a red roof", of_hue(180)) is None
    assert steered("a roof", "a red roof", near) is None
