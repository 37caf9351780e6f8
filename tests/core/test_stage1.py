import copy
import math

import pytest
import torch
from torch.nn import functional as F

from diffcolor_core.config import AlignmentSettings, SamplingSettings, Settings, Stage1Settings
from diffcolor_core.models import load_checkpoint
from diffcolor_core.optimising import Photograph
from diffcolor_core.stage1 import Texts, colorize_with_prior, contrastive_loss, prior_loss, random_views

CONTEXT, ANTI_COLOR = "a ball on a table", ("a grayscale photograph", "a picture with scratches")


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


@pytest.fixture(scope="module")
def trained(checkpoint, tiny_folder):
    """A UNet other than the base one, so that (2) is not zero against the frozen model."""
    unet = load_checkpoint(str(tiny_folder)).unet
    with torch.no_grad():
        for number, parameter in enumerate(unet.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return unet


def units(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_is_equation_1():
    image, positive, negatives, tau = units(3, 3), units(1, 1), units(4, 4), 0.2
    by_hand = []
    for row in image:
        up = torch.exp(row @ positive[0] / tau)
        by_hand.append(-torch.log(up / (up + sum(torch.exp(row @ n / tau) for n in negatives))))
    torch.testing.assert_close(contrastive_loss(image, positive, negatives, tau), torch.stack(by_hand).mean())


@pytest.mark.parametrize("target", ["noise", "prior"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_equation_3(tiny_folder, tiny_v_folder, trained, kind, target):
    """Recomputed draw by draw from the paper's formulas, with no function of the stage."""
    checkpoint = load_checkpoint(str(tiny_folder if kind == "epsilon" else tiny_v_folder))
    stage1 = Stage1Settings(
        contrastive_weight=0.7,
        diffusion_weight=1.3,
        temperature=0.05,
        max_timestep=0.6,
        diffusion_target=target,
        anti_color_prompts=ANTI_COLOR,
    )
    z = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(5))
    c = checkpoint.encode_prompts([CONTEXT])
    f_t = [checkpoint.clip_text_features([text])[0] for text in (CONTEXT, *ANTI_COLOR)]
    texts = Texts(c, f_t[0][None], torch.stack(f_t[1:]))
    settings = Settings(batch_size=3, stage1=stage1)
    with torch.no_grad():
        found = prior_loss(checkpoint, trained, z, texts, settings, [torch.Generator().manual_seed(8)])

        draws = torch.Generator().manual_seed(8)
        timesteps = torch.randint(600, (3,), generator=draws).tolist()
        noises = torch.randn(3, 4, 16, 12, generator=draws)
        diffusion, contrastive = [], []
        for t, eps in zip(timesteps, noises, strict=True):
            abar = float(checkpoint.scheduler.alphas_cumprod[t])
            z_t = math.sqrt(abar) * z[0] + math.sqrt(1 - abar) * eps
            ours, base = (u(z_t[None], t, encoder_hidden_states=c).sample[0] for u in (trained, checkpoint.unet))
            wanted = eps if kind == "epsilon" else math.sqrt(abar) * eps - math.sqrt(1 - abar) * z[0]
            difference = ours - (wanted if target == "noise" else base)
            diffusion.append(sum(value**2 for value in difference.flatten().tolist()) / difference.numel())
            if kind == "epsilon":
                z_0 = (z_t - math.sqrt(1 - abar) * ours) / math.sqrt(abar)
            else:
                z_0 = math.sqrt(abar) * z_t - math.sqrt(1 - abar) * ours
            f_i = checkpoint.clip_image_features(checkpoint.decode(z_0[None]))[0]
            s = [float(f_i @ f) / 0.05 for f in f_t]
            contrastive.append(-math.log(math.exp(s[0]) / sum(map(math.exp, s))))
    l_diff, l_con = sum(diffusion) / 3, sum(contrastive) / 3
    assert l_diff > 1e-4
    assert [float(x) for x in found] == pytest.approx([0.7 * l_con + 1.3 * l_diff, l_con, l_diff], rel=1e-3)


def test_the_gradient_is_that_of_the_whole_loss(checkpoint, trained):
    """The decoder's part of it is taken for one photograph after the other."""
    unet = copy.deepcopy(trained).requires_grad_(True)
    z = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(5))
    f_t = checkpoint.clip_text_features([CONTEXT, "a cat", *ANTI_COLOR])
    texts = Texts(checkpoint.encode_prompts([CONTEXT, "a cat"]), f_t[:2], f_t[2:])
    stage1 = Stage1Settings(diffusion_weight=0, temperature=0.05)
    seeds = (8, 9)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    loss, *_ = prior_loss(checkpoint, unet, z, texts, Settings(stage1=stage1), generators)
    found = torch.autograd.grad(loss.sum(), list(unet.parameters()), allow_unused=True)

    whole = []
    for i, seed in enumerate(seeds):
        draws = torch.Generator().manual_seed(seed)
        t, eps = torch.randint(1000, (1,), generator=draws), torch.randn(1, 4, 16, 12, generator=draws)
        abar = checkpoint.scheduler.alphas_cumprod[t]
        z_t = abar.sqrt() * z[i] + (1 - abar).sqrt() * eps
        output = checkpoint.predict(unet, z_t, t, texts.context[i : i + 1])
        x_0 = checkpoint.decode((z_t - (1 - abar).sqrt() * output) / abar.sqrt())
        whole.append(0.5 * contrastive_loss(checkpoint.clip_image_features(x_0), f_t[i : i + 1], f_t[2:], 0.05))
    expected = torch.autograd.grad(sum(whole), list(unet.parameters()), allow_unused=True)
    torch.testing.assert_close(loss.sum(), sum(whole))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert sum(float(b.abs().sum()) for _, b in pairs) > 0
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_views_are_seen_besides_the_picture(checkpoint, trained):
    """With views (1) is the mean over all of them, the whole picture included."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    f_t = checkpoint.clip_text_features([CONTEXT, *ANTI_COLOR])
    texts = Texts(checkpoint.encode_prompts([CONTEXT]), f_t[:1], f_t[1:])
    stage1 = Stage1Settings(temperature=0.05, num_views=2)
    with torch.no_grad():
        _, found, _ = prior_loss(
            checkpoint, trained, z, texts, Settings(stage1=stage1), [torch.Generator().manual_seed(8)]
        )
        draws = torch.Generator().manual_seed(8)
        t, eps = torch.randint(1000, (1,), generator=draws), torch.randn(z.shape, generator=draws)
        abar = checkpoint.scheduler.alphas_cumprod[t]
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        output = checkpoint.predict(trained, z_t, t, texts.context)
        x_0 = checkpoint.decode((z_t - (1 - abar).sqrt() * output) / abar.sqrt())
        losses = [
            contrastive_loss(checkpoint.clip_image_features(x), f_t[:1], f_t[1:], 0.05)
            for x in (x_0, *random_views(x_0, 2, draws))
        ]
    assert len(losses) == 3
    torch.testing.assert_close(found[0], torch.stack(losses).mean())


def test_a_view_is_a_crop_perhaps_mirrored():
    x = torch.arange(20 * 30, dtype=torch.float32).view(1, 1, 20, 30).expand(1, 3, -1, -1) * 10
    mirrored = []
    for view in random_views(x, 40, torch.Generator().manual_seed(0)):
        h, w = view.shape[-2:]
        assert 0.6 * 20 <= h <= 20
        assert 0.6 * 30 <= w <= 30
        corners = (view / 10).round().long()[0, 0]  # the noise is far below the step of 10
        mirrored.append(bool(corners[0, 0] > corners[0, -1]))
        plain = corners.flip(-1) if mirrored[-1] else corners
        top, left = divmod(int(plain[0, 0]), 30)
        torch.testing.assert_close(plain.float() * 10, x[0, 0, top : top + h, left : left + w])
    assert {True, False} == set(mirrored)


def stage1(checkpoint, seed: int = 0, **changes):
    settings = Settings(
        stage1=Stage1Settings(**{"num_steps": 12, "learning_rate": 1e-3, "temperature": 0.1} | changes),
        sampling=SamplingSettings(num_steps=3),
        alignment=AlignmentSettings(enabled=False),
    )
    lightness = torch.linspace(10, 90, 32).expand(1, 32, 32)
    seen = []
    photograph = Photograph(lightness, CONTEXT, torch.Generator().manual_seed(seed))
    [prior] = colorize_with_prior(checkpoint, [photograph], settings, lambda *told: seen.append(told))
    return prior, seen


def test_training_lowers_the_loss(checkpoint, trained):
    """On the same draws before and after, which differ from those of the training."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    f_t = checkpoint.clip_text_features([CONTEXT, *ANTI_COLOR])
    texts = Texts(checkpoint.encode_prompts([CONTEXT]), f_t[:1], f_t[1:])
    settings = Settings(batch_size=16, stage1=Stage1Settings(temperature=0.1, max_timestep=0.5))
    unet = copy.deepcopy(trained).requires_grad_(True)

    @torch.no_grad()
    def losses() -> list[float]:
        return [float(x) for x in prior_loss(checkpoint, unet, z, texts, settings, [torch.Generator().manual_seed(9)])]

    before = losses()
    optimizer, draws = torch.optim.Adam(unet.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        prior_loss(checkpoint, unet, z, texts, settings, [draws])[0].backward()
        optimizer.step()
    assert all(after < 0.99 * earlier for after, earlier in zip(losses(), before, strict=True))


def test_recomputing_changes_no_bit(checkpoint, trained):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    f_t = checkpoint.clip_text_features([CONTEXT, *ANTI_COLOR])
    texts = Texts(checkpoint.encode_prompts([CONTEXT]), f_t[:1], f_t[1:])
    found = []
    for recompute in (False, True):
        unet = copy.deepcopy(trained).requires_grad_(True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            settings = Settings(stage1=Stage1Settings(recompute=recompute))
            loss = prior_loss(checkpoint, unet, z, texts, settings, [torch.Generator().manual_seed(8)])[0]
            num_kept = sum(kept)
        loss.backward()
        found.append((num_kept, loss.detach(), [p.grad for p in unet.parameters()]))
    (plain, loss, gradients), (less, again, same) = found
    assert less < 0.7 * plain
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert not checkpoint.vae.is_gradient_checkpointing


def test_every_step_is_told(checkpoint):
    _, seen = stage1(checkpoint, num_steps=3)
    assert seen == [("stage 1", 1, 3), ("stage 1", 2, 3), ("stage 1", 3, 3)]


def test_without_alignment_the_primary_is_the_generated_chroma(checkpoint):
    prior, _ = stage1(checkpoint, num_steps=1)
    assert prior.generated.shape == (3, 32, 32)
    assert torch.equal(prior.chroma, prior.generated[1:])


def test_it_stops_once_the_contrastive_loss_is_low(checkpoint):
    prior, _ = stage1(checkpoint, stop_below=100.0)
    assert len(prior.losses["contrastive"]) == 5  # the mean of five steps counts
    prior, _ = stage1(checkpoint, stop_below=1e-6)
    assert len(prior.losses["contrastive"]) == 12


def test_without_the_contrastive_loss_nothing_stops_early(checkpoint):
    prior, _ = stage1(checkpoint, stop_below=0.1, contrastive_weight=0.0)
    assert prior.losses["contrastive"] == [0.0] * 12


def test_towards_its_own_prior_equation_2_starts_at_its_minimum(checkpoint):
    prior, _ = stage1(checkpoint, num_steps=1, diffusion_target="prior")
    assert prior.losses["diffusion"][0] < 1e-9
