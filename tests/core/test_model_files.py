import shutil

import pytest

from diffcolor_core import model_files
from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import PINNED, identify, resolve
from diffcolor_core.models import load_checkpoint


def test_hub_ids_come_with_a_pinned_revision():
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert resolve(name) == (name, PINNED[name])
    commit = "0123456789abcdef" * 2 + "01234567"
    assert resolve(f"someone/model@{commit}") == ("someone/model", commit)
    assert all(len(pin) == 40 for pin in PINNED.values())
    for moving in ("someone/model", "someone/model@main", "someone/model@v1.0", f"someone/model@{commit[:8]}"):
        with pytest.raises(ModelError, match="needs a pinned revision"):
            resolve(moving)
    with pytest.raises(ModelError, match="no model 'nonsense'"):
        resolve("nonsense")


def test_a_folders_revision_is_the_hash_of_its_weights(tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    assert identify(str(folder))[1] == identify(str(tiny_folder))[1]
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert identify(str(folder))[1] != identify(str(tiny_folder))[1]


def test_a_known_revision_is_not_hashed_again(tiny_folder, monkeypatch):
    model_id, revision = identify(str(tiny_folder))
    monkeypatch.setattr(model_files.hashlib, "file_digest", lambda *_: pytest.fail("the whole folder is read again"))
    checkpoint = load_checkpoint(str(tiny_folder), revision=revision)
    assert (checkpoint.model_id, checkpoint.model_revision) == (model_id, revision)


def test_a_large_file_that_differs_inside_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    weights, num_bytes = folder / "unet" / "diffusion_pytorch_model.safetensors", 64 * 2**20
    weights.write_bytes(bytes(num_bytes))
    _, revision = identify(str(folder))
    with weights.open("r+b") as file:  # one layer of a fine-tuned model: 1 MiB amid 64
        file.seek(num_bytes // 3)
        file.write(b"\1" * 2**20)
    assert weights.stat().st_size == num_bytes
    with pytest.raises(ModelError, match="not at sha256"):
        identify(str(folder), revision)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_another_folder_than_the_known_one_is_refused(tiny_folder, tmp_path, part):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    _, revision = identify(str(folder))
    data = (folder / part).read_bytes()
    (folder / part).write_bytes(data[:-2] + b" " + data[-1:])  # as long as before
    with pytest.raises(ModelError, match="not at sha256"):
        identify(str(folder), revision)


def test_a_hub_models_known_revision_is_its_commit():
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert identify(name, PINNED[name]) == (name, PINNED[name])
    with pytest.raises(ModelError, match="not at 0000"):
        identify(name, "0" * 40)
