import gc
import hashlib
import io
import weakref
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffcolor_core import DiffColor, DivergedError, FitError, Picture, Scan, Settings, colorizer, read_picture
from diffcolor_core.config import AlignmentSettings, SamplingSettings, Stage1Settings, Stage2Settings
from diffcolor_core.stage1 import colorize_with_prior
from support.pictures import gray_picture

QUICK = Settings(
    stage1=Stage1Settings(num_steps=3, learning_rate=1e-3, num_views=1),
    alignment=AlignmentSettings(radius=1),
    stage2=Stage2Settings(embedding_steps=3, model_steps=3, model_learning_rate=1e-3, embedding_learning_rate=1e-2),
    sampling=SamplingSettings(num_steps=4),
)
CONTEXT, TARGET = "a ball on a table", "a red ball on a blue table"


def scan_bytes(height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gray_picture(height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def weights_sha256(module: torch.nn.Module) -> str:
    """Hash over the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def pipe(tiny_folder) -> DiffColor:
    return DiffColor.from_pretrained(str(tiny_folder), settings=QUICK)


@pytest.fixture(scope="module")
def fit(pipe):
    return pipe.fit(scan_bytes(), CONTEXT, seed=5)


def test_base_weights_are_untouched(pipe):
    parts = (pipe.checkpoint.unet, pipe.checkpoint.vae, pipe.checkpoint.text_encoder, pipe.checkpoint.clip)
    before = [weights_sha256(part) for part in parts]
    fitted = pipe.fit(scan_bytes(), CONTEXT, seed=1)
    pipe.recolor(fitted, TARGET)
    assert [weights_sha256(part) for part in parts] == before
    base = pipe.checkpoint.unet.state_dict()
    unchanged = [name for name, tensor in base.items() if torch.equal(fitted.unet_state[name], tensor)]
    assert unchanged == []  # a step of Adam moves every weight that has a gradient


def test_same_seed_same_bytes(pipe, fit):
    again = pipe.fit(scan_bytes(), CONTEXT, seed=5)
    one, two = pipe.recolor(fit, TARGET), pipe.recolor(again, TARGET)
    assert one.image.encode_png() == two.image.encode_png()
    assert one.fit.primary_picture.encode_png() == two.fit.primary_picture.encode_png()
    other = pipe.recolor(pipe.fit(scan_bytes(), CONTEXT, seed=6), TARGET)
    assert float((other.chroma - one.chroma).abs().mean()) > 0.1  # another noise, another picture


def test_recolouring_depends_on_the_prompt_not_on_what_was_asked_before(pipe, fit):
    first = pipe.recolor(fit, TARGET)
    between = pipe.recolor(fit, "a green ball on a yellow table", alpha=0.2)
    assert (between.alpha, first.alpha) == (0.2, QUICK.stage2.alpha)
    assert pipe.recolor(fit, TARGET).image.encode_png() == first.image.encode_png()


def test_recolouring_trains_nothing(pipe, fit, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("recolor fine-tunes"))
    pipe.recolor(fit, TARGET)


def test_without_a_target_the_result_is_the_primary(pipe, fit):
    result = pipe.recolor(fit)
    assert (result.alpha, result.nouns, result.target_prompt) == (None, (), None)
    np.testing.assert_array_equal(result.image.pixels, result.fit.primary_picture.pixels)
    assert result.prompt == CONTEXT


@pytest.mark.parametrize("size", [(40, 56), (7, 5), (1, 1), (3, 200), (128, 31)])
def test_the_picture_keeps_its_size_and_luminance(pipe, size):
    result = pipe.recolor(pipe.fit(scan_bytes(*size), CONTEXT), TARGET)
    assert result.image.pixels.shape == (*size, 3)
    assert result.metrics["p99_abs_delta_l"] <= 0.5
    assert result.metrics.keys() == {"colorfulness", "clip_similarity", "mean_abs_delta_l", "p99_abs_delta_l"}


def test_the_aspect_is_kept_at_working_size(pipe):
    small, (height, width) = pipe._at_working_size(Scan(torch.rand(1, 100, 400) * 100, None, 8, "L"))
    assert height / width == pytest.approx(1 / 4, rel=0.05)
    assert height * width == pytest.approx(32 * 32, rel=0.1)
    assert small.shape[-2] % 4 == small.shape[-1] % 4 == 0
    torch.testing.assert_close(
        small[..., height:, :width], small[..., height - 1 : height, :width].expand(1, small.shape[-2] - height, width)
    )


def test_v_prediction_checkpoints_fit_too(tiny_v_folder):
    pipe = DiffColor.from_pretrained(str(tiny_v_folder), settings=QUICK)
    result = pipe.recolor(pipe.fit(scan_bytes(), CONTEXT), TARGET)
    assert result.metrics["p99_abs_delta_l"] <= 0.5


def test_another_models_fit_is_refused(pipe, fit, tiny_v_folder):
    with pytest.raises(ValueError, match="belongs to model"):
        DiffColor.from_pretrained(str(tiny_v_folder), settings=QUICK).recolor(fit, TARGET)


def test_several_prompts_in_one_call_are_what_they_are_alone(pipe, fit):
    prompts = [TARGET, "a green ball on a yellow table"]
    together = pipe.recolor(fit, prompts)
    for result, prompt in zip(together, prompts, strict=True):
        alone = pipe.recolor(fit, prompt)
        assert result.prompt == prompt
        difference = result.image.pixels.astype(int) - alone.image.pixels.astype(int)
        assert np.abs(difference).max() <= 1  # batched sums may round otherwise


def test_unchanged_nouns_keep_their_colour(pipe):
    """With keep_unchanged, a target that changes nothing gives the picture that was there."""
    settings = QUICK.model_copy(update={"stage2": QUICK.stage2.model_copy(update={"keep_unchanged": True})})
    keeping = DiffColor(pipe.checkpoint, settings)
    fit = keeping.fit(scan_bytes(), "a red ball on a blue table")
    same = keeping.recolor(fit, "a red ball on a blue table")
    np.testing.assert_allclose(same.image.pixels, fit.primary_picture.pixels, atol=1)
    edited = keeping.recolor(fit, "a green ball on a blue table")
    assert not torch.equal(edited.chroma, same.chroma)
    again = keeping.recolor(fit, "a green ball on a blue table", base=edited)
    np.testing.assert_allclose(again.image.pixels, edited.image.pixels, atol=1)


def test_a_coloured_picture_takes_stage_1s_place(pipe):
    rgb = np.stack([gray_picture(40, 56)] * 3, -1)
    rgb[..., 2] //= 2
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    fit = pipe.fit(buffer.getvalue(), CONTEXT, primary=read_picture(buffer.getvalue()))
    assert "contrastive" not in fit.losses
    difference = fit.primary_picture.pixels.astype(int) - rgb
    assert np.abs(difference).mean() < 4
    with pytest.raises(ValueError, match="has 56 x 40 px, but the scan 20 x 20 px"):
        pipe.fit(scan_bytes(20, 20), CONTEXT, primary=read_picture(buffer.getvalue()))


def test_without_stage_1_the_gray_picture_is_the_primary(pipe):
    settings = QUICK.model_copy(update={"stage1": Stage1Settings(enabled=False)})
    fit = DiffColor(pipe.checkpoint, settings).fit(scan_bytes(), CONTEXT)
    assert np.ptp(fit.primary_picture.pixels, axis=-1).max() <= 1
    assert fit.generated is None


def test_the_time_of_a_batch_is_shared_by_its_results(pipe, fit, monkeypatch):
    ticks = count()
    monkeypatch.setattr("diffcolor_core.colorizer.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    results = pipe.recolor(fit, [TARGET, "a green ball on a table"])
    assert [result.sampling_seconds for result in results] == [0.5, 0.5]  # half of the call's tick


def test_adapters_train_and_leave_the_base_alone(pipe):
    settings = QUICK.model_copy(update={"stage2": QUICK.stage2.model_copy(update={"adapter_rank": 2})})
    low_rank = DiffColor(pipe.checkpoint, settings)
    before = weights_sha256(pipe.checkpoint.unet)
    fit = low_rank.fit(scan_bytes(), CONTEXT, seed=5)
    again = low_rank.fit(scan_bytes(), CONTEXT, seed=5)
    assert weights_sha256(pipe.checkpoint.unet) == before
    assert all("lora" in name for name in fit.unet_state)
    assert any(bool(tensor.any()) for name, tensor in fit.unet_state.items() if "lora_B" in name)
    assert all(torch.equal(tensor, again.unet_state[name]) for name, tensor in fit.unet_state.items())
    assert low_rank.recolor(fit, TARGET).image.encode_png() == low_rank.recolor(again, TARGET).image.encode_png()


def test_a_fit_that_diverges_is_no_fit(pipe):
    changes = {"stage2": pipe.settings.stage2.model_copy(update={"model_learning_rate": 1e30})}
    wild = DiffColor(pipe.checkpoint, pipe.settings.model_copy(update=changes))
    with pytest.raises(DivergedError, match="learning rates"):
        wild.fit(scan_bytes(), "a ball on a table")


def test_colours_that_are_not_finite_are_no_picture(pipe, fit):
    broken = replace(fit, prompt_embeds=fit.prompt_embeds * float("nan"))
    with pytest.raises(DivergedError):
        pipe.recolor(broken, TARGET, alpha=0.5)


def test_an_empty_prompt_is_refused(pipe):
    with pytest.raises(ValueError, match="context prompt is empty"):
        pipe.fit(scan_bytes(), "  ")


def test_progress_is_told_to_the_end(pipe):
    seen: dict[str, tuple[int, int]] = {}
    pipe.fit(scan_bytes(), CONTEXT, progress=lambda stage, done, total: seen.update({stage: (done, total)}))
    assert seen == {"stage 1": (3, 3), "stage 2, embedding": (3, 3), "stage 2, model": (3, 3)}


def test_a_fit_for_the_primary_alone_does_no_stage_2(pipe, fit, monkeypatch, tmp_path):
    monkeypatch.setattr("diffcolor_core.colorizer.fit_in_context", lambda *_: pytest.fail("stage 2"))
    short = pipe.fit(scan_bytes(), CONTEXT, seed=5, primary_only=True)
    assert (short.rewritten_prompt, short.prompt_embeds, short.unet_state) == (None, None, None)
    assert short.losses.keys() == {"contrastive", "diffusion"}
    assert torch.equal(short.primary, fit.primary)  # what a full fit has
    np.testing.assert_array_equal(pipe.recolor(short).image.pixels, fit.primary_picture.pixels)
    with pytest.raises(FitError, match="primary only"):
        pipe.recolor(short, TARGET)
    with pytest.raises(FitError, match="primary only"):
        short.save(str(tmp_path / "fit"))


def test_pictures_and_metrics_are_computed_when_they_are_read(pipe, fit, monkeypatch):
    assembled = []
    plain = type(fit).assemble
    monkeypatch.setattr(type(fit), "assemble", lambda self, chroma: assembled.append(chroma) or plain(self, chroma))
    anew = replace(fit)  # nothing of it has been read
    result = pipe.recolor(anew, TARGET)
    assert assembled == []
    assert result.metrics is result.metrics
    assert result.image is result.image
    assert [chroma is result.chroma for chroma in assembled] == [True]  # and no primary
    assert result.fit.primary_picture is pipe.recolor(anew).image
    assert len(assembled) == 2


def test_chroma_and_luminance_error_of_what_was_generated_are_kept(pipe, fit):
    result = pipe.recolor(fit, TARGET)
    assert result.chroma.shape == fit.primary.shape == (2, *fit.lightness.shape[-2:])
    assert result.generated.shape == fit.generated.shape == (3, *fit.lightness.shape[-2:])
    assert 0 < float((result.generated[:1] - fit.lightness).abs().mean()) < 50


@pytest.mark.parametrize(("size", "seen"), [((400, 600), (32, 48)), ((126, 10), (403, 32)), ((1, 6500), (32, 64 * 32))])
def test_clip_sees_a_small_picture_of_the_same_shape(pipe, fit, monkeypatch, size, seen):
    """Its shorter side is CLIP's; the longer one of an extreme strip is limited."""
    shapes = []
    plain = type(pipe.checkpoint).clip_image_features
    monkeypatch.setattr(
        type(pipe.checkpoint), "clip_image_features", lambda self, x: shapes.append(x.shape[-2:]) or plain(self, x)
    )
    scan = Scan(torch.full((1, *size), 50.0), None, 8, "L")
    result = pipe.recolor(replace(fit, scan=scan))
    result.__dict__["image"] = Picture(np.full((*size, 3), 119, np.uint8))
    assert result.metrics["p99_abs_delta_l"] < 0.3
    assert shapes == [seen]


@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "adapters"])
def test_in_bfloat16_the_frozen_weights_are_small_and_the_trained_ones_are_not(tiny_folder, rank):
    stages = {name: getattr(QUICK, name).model_copy(update={"adapter_rank": rank}) for name in ("stage1", "stage2")}
    settings = QUICK.model_copy(update=stages)
    pipes = [DiffColor.from_pretrained(str(tiny_folder), settings=settings, dtype=d) for d in ("bfloat16", "float32")]
    fits = [pipe.fit(scan_bytes(40, 56), CONTEXT) for pipe in pipes]
    networks = (pipes[0].checkpoint.unet, pipes[0].checkpoint.vae, pipes[0].checkpoint.clip)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in fits[0].unet_state.values()} == {torch.float32}
    for name, losses in fits[0].losses.items():
        assert losses == pytest.approx(fits[1].losses[name], rel=0.1), name
    chroma = [pipe.recolor(fit, TARGET).chroma for pipe, fit in zip(pipes, fits, strict=True)]
    difference = (chroma[0] - chroma[1]).abs().mean()
    assert 0 < float(difference) < 0.1 * float(chroma[1].abs().mean())


def test_a_fit_frees_the_one_before_it(tiny_folder, monkeypatch):
    pipe = DiffColor.from_pretrained(str(tiny_folder), settings=QUICK)
    pipe.fit(scan_bytes(), CONTEXT)
    before, alive = weakref.ref(pipe._last_fitted.unet), []

    def watched(*arguments):
        alive.append(before() is not None)
        return colorize_with_prior(*arguments)

    monkeypatch.setattr(colorizer, "colorize_with_prior", watched)
    gc.collect()
    pipe.fit(scan_bytes(), CONTEXT)
    assert alive == [False]
