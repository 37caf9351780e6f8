import pytest
import torch
from diffusers import DDIMScheduler

from diffcolor_core.diffusion import add_noise, clean_estimate, ddim_sample, ddim_timesteps, training_target

KINDS = ("epsilon", "v_prediction", "sample")


def schedule(kind: str, **kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=kind,
        **kwargs,
    )


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return z, eps, torch.tensor([5, 400, 950])


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_output_gives_back_clean_latents_and_noise(kind, draws):
    z, eps, t = draws
    s = schedule(kind)
    z_t = add_noise(s, z, eps, t)
    torch.testing.assert_close(z_t, s.add_noise(z, eps, t))
    z_0, noise = clean_estimate(s, z_t, t, training_target(s, z, eps, t))
    torch.testing.assert_close(z_0, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noise, eps, atol=1e-4, rtol=1e-4)


def test_velocity_agrees_with_diffusers(draws):
    z, eps, t = draws
    s = schedule("v_prediction")
    torch.testing.assert_close(training_target(s, z, eps, t), s.get_velocity(z, eps, t))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_agrees_with_diffusers_ddim(kind):
    """The independent oracle: diffusers' own DDIM steps, guided by hand, over the same timesteps."""
    s = schedule(kind, timestep_spacing="trailing", set_alpha_to_one=True)
    torch.manual_seed(0)
    mix = torch.randn(4, 4) * 0.5

    def predict(z_t, t, e):
        return torch.einsum("ij,bjhw->bihw", mix, z_t) * 0.3 + e.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    z_t = torch.randn(2, 4, 8, 8)
    e, negative = torch.randn(2, 5, 6), torch.zeros(2, 5, 6)
    timesteps = ddim_timesteps(s, 10, 1.0)
    ours = ddim_sample(predict, s, z_t, timesteps, e, negative, guidance_scale=3.0)

    s.set_timesteps(10)
    theirs = z_t
    assert [abs(int(a) - int(b)) <= 1 for a, b in zip(timesteps, s.timesteps, strict=True)] == [True] * 10
    for i, t in enumerate(timesteps):
        plain, guided = predict(theirs, t, negative), predict(theirs, t, e)
        output = plain + 3.0 * (guided - plain)
        previous = timesteps[i + 1] if i + 1 < len(timesteps) else torch.tensor(-1)
        s.num_inference_steps = 1  # so that diffusers' "previous" is exactly the next of our timesteps
        s.config.num_train_timesteps, keep = int(t - previous), s.config.num_train_timesteps
        theirs = s.step(output, t, theirs).prev_sample
        s.config.num_train_timesteps = keep
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("strength", "count", "first"), [(1.0, 20, 999), (0.5, 10, 500), (0.01, 1, 50)])
def test_timesteps_start_at_the_strength(strength, count, first):
    t = ddim_timesteps(schedule("epsilon"), 20, strength)
    assert len(t) == count
    assert int(t[0]) == first
    assert (t.diff() < 0).all()


def test_correct_clean_is_what_ends_the_sampling():
    s = schedule("epsilon")
    z_0 = ddim_sample(
        lambda z, t, e: z,
        s,
        torch.randn(1, 4, 4, 4),
        ddim_timesteps(s, 4, 0.5),
        torch.zeros(1, 2, 3),
        torch.zeros(1, 2, 3),
        guidance_scale=1.0,
        correct_clean=lambda z: torch.full_like(z, 0.25),
    )
    assert torch.equal(z_0, torch.full_like(z_0, 0.25))
