import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcolor_core import read_scan
from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import PINNED, identify
from diffcolor_core.prompts import CAPTION_MODEL
from tasks import captioner as captioning
from tasks.captioner import MAX_SIDE_PX, caption_input, load_captioner, without_medium


def picture(value: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_a_caption_for_each_picture_of_a_batch_in_its_order(tiny_blip):
    captioner = load_captioner(str(tiny_blip))
    church, boat = "a church on a hill", "a boat on a river"
    pictures = [picture(30), picture(230), picture(230, 9, 400), picture(30, 400, 9), picture(35)]
    assert captioner.captions(pictures) == [church, boat, boat, church, church]
    assert captioner.captions(pictures[:1]) == [church]
    assert captioner.model_id == str(tiny_blip)
    assert captioner.model_revision == identify(str(tiny_blip))[1]
    assert not any(parameter.requires_grad for parameter in captioner.model.parameters())


def test_a_model_sees_the_scan_in_gray_and_not_larger_than_it_needs(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / "color.png")
    seen = caption_input(read_scan(tmp_path / "color.png"))
    assert seen.shape == (30, 40, 3)
    np.testing.assert_array_equal(seen[..., 0], seen[..., 2])
    gray = np.linspace(0, 65535, 600, dtype=np.uint16)[None].repeat(2, 0)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    np.testing.assert_allclose(caption_input(read_scan(tmp_path / "deep.png"))[..., 1], gray / 257, atol=1)
    Image.fromarray(np.full((1, 5000), 77, np.uint8)).save(tmp_path / "long.png")
    long = caption_input(read_scan(tmp_path / "long.png"))
    assert long.shape == (1, MAX_SIDE_PX, 3)
    assert set(long.flatten()) == {77}


@pytest.mark.parametrize(
    ("caption", "rest"),
    [
        ("there is a black and white photo of a man on a hill", "a man on a hill"),
        ("an old black and white photograph of  a church.", "a church"),
        ("a picture of two dogs", "two dogs"),
        ("a black and white dog with a photo of a cat", "a black and white dog with a photo of a cat"),
        ("a man takes a picture of a dog", "a man takes a picture of a dog"),
        ("", ""),
    ],
)
def test_that_it_is_a_photograph_is_left_out(caption, rest):
    assert without_medium(caption) == rest


def test_the_default_is_asked_for_at_its_pinned_commit_and_as_safetensors(monkeypatch):
    asked = {}

    def from_pretrained(source, **options):
        asked[source] = options
        raise OSError("no network here")

    monkeypatch.setattr(captioning.AutoProcessor, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(captioning.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="cannot load .*no network here"):
        load_captioner(CAPTION_MODEL)
    options = asked[CAPTION_MODEL]
    assert options["revision"] == PINNED[CAPTION_MODEL]
    assert options["use_safetensors"] is True
    assert options["trust_remote_code"] is False
    with pytest.raises(ModelError, match="needs a pinned revision"):
        load_captioner("someone/captions")


def test_pickled_weights_and_code_of_a_model_are_not_run(tiny_blip, tmp_path):
    folder = Path(shutil.copytree(tiny_blip, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_captioner(str(folder))

    folder = Path(shutil.copytree(tiny_blip, tmp_path / "code"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForImageTextToText": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load"):
        load_captioner(str(folder))
    assert not (tmp_path / "ran").exists()


def test_models_of_other_kinds_are_refused_by_name(tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="'photo' gives colours, not captions"):
        load_captioner("photo")
    for other in (tiny_folder, tiny_folder / "clip", tmp_path):
        with pytest.raises(ModelError, match=f"cannot load '{other}' as an image-to-text model"):
            load_captioner(str(other))
