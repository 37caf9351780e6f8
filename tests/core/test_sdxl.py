"""Stable Diffusion XL: what differs from Stable Diffusion, against diffusers' own pipeline, and the whole method."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffcolor_core import DiffColor, ModelError, Settings, ToFit
from diffcolor_core.config import SamplingSettings, Stage1Settings, Stage2Settings, preset
from diffcolor_core.models import load_checkpoint, pad_embeds
from support.checkpoints import save_tiny_xl_checkpoint
from tests.core.test_colorizer import CONTEXT, TARGET, scan_bytes, weights_sha256

SETTINGS = Settings(
    stage1=Stage1Settings(num_steps=2, learning_rate=1e-2, adapter_rank=2, recompute=True),
    stage2=Stage2Settings(
        embedding_steps=2,
        embedding_learning_rate=1e-2,
        model_steps=2,
        model_learning_rate=1e-2,
        adapter_rank=2,
        negative_context=True,
        regional_prompts=True,
        keep_unchanged=True,
    ),
    sampling=SamplingSettings(num_steps=2),
)
TOKENS, POOLED = 16 + 24, 12
"""Widths of what a token of prompt_embeds holds in the tiny checkpoint."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that a photograph's place in a batch changes no digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tiny_xl_folder):
    return DiffColor.from_pretrained(str(tiny_xl_folder), settings=SETTINGS)


@pytest.fixture(scope="module")
def fit(pipe):
    return pipe.fit(scan_bytes(), CONTEXT, seed=5)


@pytest.fixture(scope="module")
def theirs(tiny_xl_folder):
    return StableDiffusionXLPipeline.from_pretrained(
        tiny_xl_folder, use_safetensors=True, torch_dtype=torch.float32, add_watermarker=False
    )


def test_prompts_are_encoded_as_diffusers_does(pipe, theirs):
    embeds = pipe.checkpoint.encode_prompts(["a red ball", ""])
    tokens, empty, pooled, empty_pooled = theirs.encode_prompt("a red ball", do_classifier_free_guidance=True)
    torch.testing.assert_close(embeds[:, :, :TOKENS], torch.cat((tokens, empty)))
    torch.testing.assert_close(embeds[:, 0, TOKENS:], torch.cat((pooled, empty_pooled)))


def test_the_empty_prompt_is_encoded_where_the_checkpoint_says_so(tiny_xl_folder, tmp_path, theirs):
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    tokens, _, pooled, _ = theirs.encode_prompt("", do_classifier_free_guidance=False)
    embeds = load_checkpoint(str(folder)).encode_prompts([""])
    torch.testing.assert_close(embeds[:, :, :TOKENS], tokens)
    torch.testing.assert_close(embeds[:, 0, TOKENS:], pooled)


def test_long_prompts_are_chunked_and_the_first_chunk_gives_the_pooled_embed(pipe):
    checkpoint, long = pipe.checkpoint, "a ball and " * 60
    embeds = checkpoint.encode_prompts(["a red ball", long])
    assert embeds.shape == (2, 3 * 77, TOKENS + POOLED)
    short = checkpoint.encode_prompts(["a red ball"])
    torch.testing.assert_close(embeds[:1], pad_embeds(short, checkpoint.encode_prompts([""]), 3 * 77))
    z, t = torch.randn(1, 4, 8, 12), torch.tensor([500])
    other = embeds[1:].clone()
    other[:, 77:, TOKENS:] = 7  # the pooled embeds of later chunks
    with torch.no_grad():
        one, two = (checkpoint.predict(checkpoint.unet, z, t, e) for e in (embeds[1:], other))
    assert torch.equal(one, two)


def test_sampling_is_diffusers_own(pipe, theirs):
    """The pooled embed and the size reach the UNet as in its pipeline, for a picture that is not a square."""
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    seen = []

    def look(unet, args, kwargs):
        seen.append((args, kwargs))

    hook = theirs.unet.register_forward_pre_hook(look, with_kwargs=True)
    theirs.set_progress_bar_config(disable=True)
    expected = []
    also = theirs.unet.register_forward_hook(lambda _module, _args, output: expected.append(output[0]))
    theirs("a red ball", height=16, width=24, num_inference_steps=1, guidance_scale=3.0, output_type="latent")
    hook.remove()
    also.remove()
    [((z_t, t), kwargs)] = seen
    checkpoint = pipe.checkpoint
    embeds = torch.cat([checkpoint.encode_prompts([prompt]) for prompt in ("", "a red ball")])
    with torch.no_grad():
        ours = checkpoint.predict(checkpoint.unet, z_t, t.expand(2), embeds)
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    torch.testing.assert_close(ours, expected[0])


def test_sizes_and_scaling_are_the_checkpoints(pipe, theirs):
    checkpoint = pipe.checkpoint
    assert (checkpoint.vae_factor, checkpoint.size_multiple_px, checkpoint.native_size_px) == (2, 4, 32)
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.encode(x), 0.13025 * theirs.vae.encode(x).latent_dist.mean)


def test_a_photograph_is_fitted_and_recoloured(pipe, fit):
    parts = (pipe.checkpoint.unet, pipe.checkpoint.text_encoder, pipe.checkpoint.text_encoder_2)
    before = [weights_sha256(part) for part in parts]
    again = pipe.fit(scan_bytes(), CONTEXT, seed=5)
    results = pipe.recolor(fit, [TARGET, "a green ball on a table"])
    assert [weights_sha256(part) for part in parts] == before
    assert results[0].image.encode_png() == pipe.recolor(again, [TARGET])[0].image.encode_png()
    assert results[0].image.encode_png() != results[1].image.encode_png()
    assert results[0].metrics["p99_abs_delta_l"] <= 0.5
    assert [noun.noun for noun in results[0].nouns] == ["ball", "table"]


def test_the_tokens_are_optimised_and_the_pooled_embed_stays_that_of_the_prompt(pipe, fit):
    start = pipe.checkpoint.encode_prompts([fit.rewritten_prompt])
    assert torch.equal(fit.prompt_embeds[..., TOKENS:], start[..., TOKENS:])
    assert not torch.equal(fit.prompt_embeds[..., :TOKENS], start[..., :TOKENS])


def test_a_saved_fit_recolours_to_the_same_bytes(pipe, fit, tmp_path):
    fit.save(str(tmp_path))
    loaded = pipe.load_fit(str(tmp_path))
    assert pipe.recolor(loaded, TARGET).image.encode_png() == pipe.recolor(fit, TARGET).image.encode_png()
    assert load_file(tmp_path / "fit.safetensors")["prompt_embeds"].shape == (1, 77, TOKENS + POOLED)


def test_a_batch_gives_each_what_it_gets_alone(pipe):
    asked = [ToFit(scan_bytes(), prompt, seed) for seed, prompt in enumerate(("a ball on a table", "a red box"))]
    together = list(pipe.fit_batch(asked))
    swapped = list(pipe.fit_batch(asked[::-1]))[::-1]
    for one, other, alone in zip(together, swapped, asked, strict=True):
        single = pipe.fit(alone.image, alone.context_prompt, seed=alone.seed)
        assert torch.equal(one.primary, other.primary)
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
        assert all(torch.equal(one.unet_state[name], other.unet_state[name]) for name in one.unet_state)
        assert one.unet_state.keys() == single.unet_state.keys()
        torch.testing.assert_close(one.losses, single.losses, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_and_what_is_trained_stays_float32(tiny_xl_folder):
    pipe = DiffColor.from_pretrained(str(tiny_xl_folder), settings=SETTINGS, dtype="bfloat16")
    assert pipe.checkpoint.text_encoder_2.dtype == torch.bfloat16
    fit = pipe.fit(scan_bytes(), CONTEXT)
    assert {tensor.dtype for tensor in (fit.prompt_embeds, *fit.unet_state.values())} == {torch.float32}
    assert pipe.recolor(fit, TARGET).metrics["p99_abs_delta_l"] <= 0.5


def test_words_are_read_from_all_layers_that_are_fine_enough(pipe):
    checkpoint = pipe.checkpoint
    z, t = torch.randn(2, 4, 16, 12), torch.tensor([100, 100])
    with torch.no_grad():
        maps = checkpoint.word_maps(z, t, checkpoint.encode_prompts(["a red ball"]).expand(2, -1, -1))
    assert sorted({tuple(grid.shape) for grid in maps}) == [(77, 8, 6), (77, 16, 12)]
    for grid in maps:
        torch.testing.assert_close(grid.sum(dim=0), torch.ones(grid.shape[1:]))


@pytest.mark.parametrize("overrides", [{"stage1.adapter_rank": None}, {"stage2.adapter_rank": None}])
def test_all_weights_are_not_trained(pipe, overrides):
    with pytest.raises(ModelError, match="adapters only"):
        DiffColor(pipe.checkpoint, preset("standard", overrides))


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("unet", {"addition_embed_type": None}, "refiners are not served"),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "VAE whose latents are shifted"),
        (None, {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "StableDiffusionXLImg2ImgPipeline, but only"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(tiny_xl_folder, tmp_path, part, changes, reason):
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "model")
    path = folder / "model_index.json" if part is None else folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=reason):
        load_checkpoint(str(folder))


def test_a_refiner_is_refused_whatever_it_calls_itself(tmp_path):
    with pytest.raises(ModelError, match="refiners are not served"):
        load_checkpoint(str(save_tiny_xl_checkpoint(tmp_path, num_sizes=5)))


def test_without_its_second_text_encoder_a_checkpoint_is_refused(tiny_xl_folder, tmp_path):
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ModelError, match="cannot load"):
        load_checkpoint(str(folder))


def test_a_single_file_is_refused_with_the_remedy(tiny_xl_folder, tmp_path):
    shutil.copytree(tiny_xl_folder, tmp_path / "one")
    shutil.copy(tiny_xl_folder / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="convert it into a folder"):
        load_checkpoint(str(tmp_path / "one.safetensors"))
