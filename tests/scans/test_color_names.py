import pytest

from diffcolor_scans.color_names import exact_chroma, hue_of


def test_hues():
    assert hue_of("crimson") == pytest.approx(hue_of("red"), abs=15)
    assert hue_of("white") is hue_of("gainsboro") is None
    with pytest.raises(KeyError):
        hue_of("dog")


def test_codes_are_exact_and_basic_terms_are_not():
    assert hue_of("#8b0000") == pytest.approx(39, abs=0.1)
    assert exact_chroma("#8b0000") == pytest.approx((51.0, 41.3), abs=0.1)  # CIELAB of sRGB, D65
    assert exact_chroma("red") is exact_chroma("gray") is exact_chroma("tan") is None


def test_names_of_things_are_not_exact():
    assert exact_chroma("wheat") is None
    assert hue_of("wheat") == pytest.approx(82, abs=8)
    assert exact_chroma("crimson") is not None
