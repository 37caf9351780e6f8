import pytest

from diffcolor_core import preset
from diffcolor_study.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_change_of_settings(name):
    before = preset("photo" if name in ("unet", "no-gain", "no-steering", "alpha-0.5") else "demo")
    once = METHODS[name].derive(before)
    assert (once == before) == (name == "full")
    assert (METHODS[name].derive(once) == once) != name.endswith("-steps")


def test_no_two_methods_are_the_same():
    derived = [
        (m.derive(preset("demo")).sha256(), m.derive(preset("photo")).sha256(), m.fit_on_target)
        for m in METHODS.values()
    ]
    assert len(set(derived)) == len(METHODS)
