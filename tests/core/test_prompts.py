import os

import pytest

from diffcolor_core.prompts import insert_identifiers, noun_phrases, rare_tokens

MARK = ["[*]"] * 30


@pytest.mark.parametrize(
    ("prompt", "rewritten"),
    [
        (  # the paper's own example
            "A dog sitting on a wooden bench, with grassland and sky",
            "A [*] dog sitting on a [*] wooden bench, with [*] grassland and [*] sky",
        ),
        (
            "a red ball and a blue box in front of a yellow wall",
            "a [*] red ball and a [*] blue box in front of a [*] yellow wall",
        ),
        ("three men in white and dark blue shirts", "three [*] men in [*] white and dark blue shirts"),
        (
            "a large red brick university building behind a green lawn",
            "a [*] large red brick university building behind a [*] green lawn",
        ),
        ("", ""),
        ("!!! ,,,", "!!! ,,,"),
    ],
)
def test_identifiers_stand_before_every_noun_phrase(prompt, rewritten):
    assert insert_identifiers(prompt, MARK) == rewritten


def test_noun_phrases_name_their_place_and_noun():
    phrases = noun_phrases("a Brown dog on a wooden bench")
    assert [(p.text, p.noun) for p in phrases] == [("Brown dog", "dog"), ("wooden bench", "bench")]
    assert all("a Brown dog on a wooden bench"[p.start : p.end] == p.text for p in phrases)


def test_more_noun_phrases_than_identifiers_is_an_error():
    with pytest.raises(ValueError, match="2 noun phrases"):
        insert_identifiers("a ball and a box", ["one"])


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


def test_rare_tokens_are_one_token_each(tiny_folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    tokens = rare_tokens(tokenizer, 20)
    assert len(set(tokens)) == 20
    for token in tokens:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
