import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcolor_core import models
from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import PINNED, identify
from diffcolor_core.models import load_checkpoint
from diffcolor_core.prompts import noun_phrases
from support.checkpoints import save_single_file


@pytest.fixture
def single_file(tiny_folder, tmp_path):
    """A checkpoint in one file, beside it a folder without weights but those of the guidance CLIP."""
    shutil.copytree(tiny_folder, tmp_path / "one")
    for part in ("unet", "vae", "text_encoder"):
        for path in (tmp_path / "one" / part).glob("*.safetensors"):
            path.unlink()
    return save_single_file(tiny_folder, tmp_path / "one.safetensors")


def test_a_single_file_is_the_same_model_as_its_folder(single_file, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one, folder = load_checkpoint(str(single_file)), load_checkpoint(str(tiny_folder))
    for part in ("unet", "vae", "text_encoder"):
        found, expected = (getattr(checkpoint, part).state_dict() for checkpoint in (one, folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(one.encode_prompts(["a ball"]), folder.encode_prompts(["a ball"]))


def test_a_single_file_is_identified_by_its_content(single_file):
    name, revision = identify(str(single_file))
    assert name == str(single_file)
    assert identify(str(single_file), revision) == (name, revision)
    scheduler = single_file.with_suffix("") / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert identify(str(single_file))[1] != revision
    data = bytearray(single_file.read_bytes())
    data[-1] ^= 1
    single_file.write_bytes(data)
    with pytest.raises(ModelError, match="is it another model, or changed"):
        identify(str(single_file), revision)


def test_a_single_file_that_cannot_be_loaded_is_refused_with_the_remedy(single_file, tmp_path):
    tensors = load_file(single_file)
    for part, reason in (
        (".middle_block.", "not have all weights"),
        (".mlp.", "weights of the text encoder"),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if part not in name}, single_file)
        with pytest.raises(ModelError, match=reason):
            load_checkpoint(str(single_file))
    save_file({"a": torch.zeros(1)}, single_file)
    with pytest.raises(ModelError, match="is no Stable Diffusion"):
        load_checkpoint(str(single_file))
    shutil.rmtree(single_file.with_suffix(""))
    with pytest.raises(ModelError, match="convert the file into a diffusers folder"):
        load_checkpoint(str(single_file))
    (tmp_path / "one.ckpt").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="only .safetensors are read"):
        load_checkpoint(str(tmp_path / "one.ckpt"))


def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert models.compute_dtype("auto", cpu) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert models.compute_dtype("auto", gpu) == dtype
    assert models.compute_dtype("float32", gpu) == models.compute_dtype(torch.float32, gpu) == torch.float32
    assert models.compute_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "int8"])
def test_other_dtypes_are_refused_with_the_reason(tiny_folder, dtype):
    with pytest.raises(ValueError, match="give auto, float32" if dtype == "int8" else "overflows in it"):
        load_checkpoint(str(tiny_folder), dtype=dtype)


def test_the_hub_is_asked_for_exactly_the_pinned_safetensors(monkeypatch):
    """The same code path as a folder: what reaches `from_pretrained` for a hub id."""
    asked = []

    def load_config(source, revision=None):
        asked.append((source, revision))
        return {"_class_name": "StableDiffusionPipeline"}

    def from_pretrained(source, **kwargs):
        asked.append((source, kwargs))
        raise OSError("no network here")

    monkeypatch.setattr(models.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(models.AutoencoderKL, "from_pretrained", from_pretrained)
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(ModelError, match="cannot load .*no network here"):
        load_checkpoint(name)
    assert asked[0] == (name, PINNED[name])
    assert asked[1][0] == name
    assert asked[1][1]["revision"] == PINNED[name]
    assert asked[1][1]["subfolder"] == "vae"
    assert asked[1][1]["use_safetensors"] is True


@pytest.mark.parametrize("kind", ["StableDiffusionXLInpaintPipeline", "FluxPipeline"])
def test_other_architectures_are_refused_by_name(tiny_folder, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ModelError, match=kind):
        load_checkpoint(str(folder))


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError):
        load_checkpoint(str(folder))


def test_sizes_are_read_from_the_parts(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    assert checkpoint.vae_factor == 2
    assert checkpoint.size_multiple_px == 4
    assert checkpoint.native_size_px == 32
    x = torch.rand(1, 3, 24, 40) * 2 - 1
    z = checkpoint.encode(x)
    assert z.shape == (1, 4, 12, 20)
    assert checkpoint.decode(z).shape == x.shape


def test_a_long_prompt_is_chunked_not_cut(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    words = ["ball", "box", "cone", "vase", "bowl", "bottle", "table", "wall"]
    long = " and a ".join(words * 12)
    other = long + " and a tree"
    embeds = checkpoint.encode_prompts([long, other, "a ball"])
    assert embeds.shape[1] % 77 == 0
    assert embeds.shape[1] > 77
    assert not torch.equal(embeds[0], embeds[1])  # the last word counts
    short = checkpoint.encode_prompts(["a ball"])
    assert short.shape[1] == 77
    torch.testing.assert_close(embeds[2, :77], short[0])
    features = checkpoint.clip_text_features([long, other])
    assert not torch.equal(features[0], features[1])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_clip_preprocessing_agrees_with_its_processor(tiny_folder):
    from PIL import Image
    from transformers import AutoImageProcessor

    checkpoint = load_checkpoint(str(tiny_folder))
    pixels = (torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    processor = AutoImageProcessor.from_pretrained(tiny_folder / "clip", backend="pil")
    prepared = processor(Image.fromarray(pixels.numpy()), return_tensors="pt")
    theirs = checkpoint.clip.get_image_features(**prepared).pooler_output
    ours = checkpoint.clip_image_features(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-4, rtol=0)


def test_clip_sees_all_of_a_panorama(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    x = torch.zeros(1, 3, 16, 64)
    right = x.clone()
    right[..., 60:] = 1
    assert not torch.equal(checkpoint.clip_image_features(x), checkpoint.clip_image_features(right))


def test_tokens_are_found_beyond_the_first_chunk(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    prompt = "a red ball and a blue box on a table " * 12
    phrases = noun_phrases(prompt)
    assert len(phrases) == 36
    ids = models._chunks(checkpoint.tokenizer, prompt).flatten()
    positions = checkpoint.token_positions(prompt, [(phrase.noun_start, phrase.end) for phrase in phrases])
    assert max(map(max, positions)) > 77
    for phrase, tokens in zip(phrases, positions, strict=True):
        assert checkpoint.tokenizer.decode(ids[tokens]).strip() == phrase.noun


def test_embeds_are_padded_with_the_empty_prompt(tiny_folder):
    checkpoint = load_checkpoint(str(tiny_folder))
    short, long = checkpoint.encode_prompts(["a ball"]), checkpoint.encode_prompts(["a ball", "a ball and " * 60])
    assert long.shape[1] == 3 * 77
    e_empty = checkpoint.encode_prompts([""])
    torch.testing.assert_close(models.pad_embeds(short, e_empty, 3 * 77), long[:1])
    assert torch.equal(models.pad_embeds(short, e_empty, 77), short)


def test_a_folder_in_fp16_loads_and_other_variants_do_not_change_what_a_folder_is(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = identify(str(folder))
    plain = load_checkpoint(str(folder))
    for name in ("unet", "vae", "text_encoder"):
        (weights,) = (folder / name).glob("*.safetensors")
        half = {key: tensor.half() for key, tensor in load_file(weights).items()}
        save_file(half, weights.with_suffix(".fp16.safetensors"), {"format": "pt"})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    assert identify(str(folder)) == before
    seen = {before}
    for name in ("unet", "vae", "text_encoder"):  # one after the other: each is loaded in the form that it has
        next(path for path in (folder / name).glob("*.safetensors") if "fp16" not in path.name).unlink()
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink(missing_ok=True)
        half = load_checkpoint(str(folder))
        seen.add((half.model_id, half.model_revision))
    assert len(seen) == 4
    for ours, theirs in zip(half.unet.parameters(), plain.unet.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
