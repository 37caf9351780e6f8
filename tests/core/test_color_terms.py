import math

import pytest
import torch

from diffcolor_core.color_terms import color_words, colored_phrases, report, spoken, with_color_alone, without_colors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("brown dog", ["brown"]),
        ("dark Red brick house", ["red"]),
        ("dog", []),
        ("navy coat", ["navy"]),
        ("grey and blue-green cat", ["grey", "blue", "green"]),
    ],
)
def test_colour_words(text, words):
    assert color_words(text) == words


def test_a_noun_that_is_a_colours_name_is_no_colour():
    phrases = colored_phrases("an orange and a green plum on a red table", "")
    assert [(p.phrase.noun, p.color) for p in phrases] == [("orange", None), ("plum", "green"), ("table", "red")]


def test_what_changed_is_told_by_the_noun():
    before = "a red dog and a dog on a bench"
    told = [
        (p.phrase.noun, p.color, p.changed) for p in colored_phrases("a bench under a red dog and a blue dog", before)
    ]
    assert told == [("bench", None, False), ("dog", "red", False), ("dog", "blue", True)]
    assert all(p.changed for p in colored_phrases("a red ball", "a table"))


def lab_square(lightness: float, hue: float, chroma: float) -> torch.Tensor:
    angle = math.radians(hue)
    return torch.tensor([lightness, chroma * math.cos(angle), chroma * math.sin(angle)]).view(3, 1, 1).expand(3, 4, 4)


@pytest.mark.parametrize(
    ("prompt", "lab", "agreement"),
    [
        ("a red ball", lab_square(50, 32, 40), 1),
        ("a red ball", lab_square(50, 212, 40), -1),
        ("a red ball", lab_square(50, 32, 10), 0.5),
        ("a white ball", lab_square(50, 32, 0), 1),
        ("a black ball", lab_square(50, 32, 60), -1),
    ],
)
def test_agreement(prompt, lab, agreement):
    (told,) = report(colored_phrases(prompt, ""), torch.ones(1, 4, 4), lab)
    assert told.agreement == pytest.approx(agreement, abs=0.01)
    assert told.feasible


def test_an_infeasible_colour_is_told():
    (told,) = report(colored_phrases("a yellow ball", ""), torch.ones(1, 4, 4), lab_square(8, 95, 5))
    assert not told.feasible
    assert told.achievable_chroma < 20


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        (
            "a yellow bottle and a gray box on a yellow table before a green wall",
            "a bottle and a box on a table before a wall",
        ),
        ("a dog on a bench", "a dog on a bench"),
        ("an orange and a green plum on a red table", "an orange and a plum on a table"),
        ("men in white and blue shirts beside a blue-green car", "men in shirts beside a car"),
    ],
)
def test_no_colour_is_left(prompt, plain):
    assert without_colors(prompt) == plain


def test_one_colour_is_left_alone():
    prompt = "A Red ball, a dog and a blue bluebird on a light blue table"
    phrases = colored_phrases(prompt, "")
    assert with_color_alone(prompt, phrases, "red") == "A Red ball, a dog and a bluebird on a light table"
    assert with_color_alone(prompt, phrases, "blue") == "A ball, a dog and a blue bluebird on a light blue table"


def test_a_hex_code_stands_for_a_colour_word():
    phrases = colored_phrases("a #8B0000 coat on a green chair under a #fffff wall", "a blue coat on a chair")
    assert [(p.phrase.noun, p.color, p.changed, p.before) for p in phrases] == [
        ("coat", "#8b0000", True, "blue"),
        ("chair", "green", True, None),
        ("wall", None, True, None),
    ]
    assert with_color_alone("a #8b0000 coat on a green chair", phrases[:2], None) == "a coat on a chair"


@pytest.mark.parametrize(
    ("code", "word"),
    [("#8b0000", "red"), ("#8B4513", "brown"), ("#ffa500", "orange"), ("#808080", "gray"), ("#101010", "black"),
     ("#fafafa", "white"), ("#4682b4", "blue"), ("#228b22", "green")],
)  # fmt: skip
def test_a_code_is_spoken_as_the_nearest_word(code, word):
    assert spoken(f"a {code} coat") == f"a {word} coat"


def test_a_noun_that_was_not_found_is_not_obeyed():
    red = torch.tensor([50.0, 40.0, 25.0])[:, None, None].expand(3, 4, 4)
    (seen,) = report(colored_phrases("a red boat", ""), torch.full((1, 4, 4), 0.9), red)
    (unseen,) = report(colored_phrases("a red boat", ""), torch.full((1, 4, 4), 0.015), red)
    assert seen.agreement > 0.9
    assert seen.lightness == 50
    assert (unseen.agreement, unseen.achievable_chroma, unseen.lightness) == (0.0, None, None)
