import os

import pytest

from diffcolor_core.prompts import noun_phrases


def test_noun_phrases_name_their_place_and_noun():
    phrases = noun_phrases("a Brown dog on a wooden bench")
    assert [(p.text, p.noun) for p in phrases] == [("Brown dog", "dog"), ("wooden bench", "bench")]
    assert all("a Brown dog on a wooden bench"[p.start : p.end] == p.text for p in phrases)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a ball in front of a box", ["ball", "box"]),
        ("three men in white and dark blue shirts", ["men", "white and dark blue shirts"]),
        ("sitting dogs and a cat", ["dogs", "cat"]),
        ("!!! ,,,", []),
        ("", []),
    ],
)
def test_noun_phrases(prompt, phrases):
    assert [phrase.text for phrase in noun_phrases(prompt)] == phrases


def test_a_model_file_in_the_working_folder_is_not_loaded(tmp_path, monkeypatch):
    """HanTa itself would prefer a file of that name in the working folder, and unpickle it."""
    from diffcolor_core import prompts

    (tmp_path / "morphmodel_en.pgz").write_bytes(b"not the model")
    monkeypatch.chdir(tmp_path)
    prompts._tagger.cache_clear()
    assert [p.noun for p in noun_phrases("a ball")] == ["ball"]
    assert os.listdir(tmp_path) == ["morphmodel_en.pgz"]


def test_a_changed_model_file_is_refused(monkeypatch):
    from diffcolor_core import prompts

    monkeypatch.setattr(prompts, "_MODEL_SHA256", "0" * 64)
    prompts._tagger.cache_clear()
    with pytest.raises(RuntimeError, match="is a pickle"):
        noun_phrases("a ball")
    prompts._tagger.cache_clear()
