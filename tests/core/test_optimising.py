"""A batch of photographs: each is fitted as if its neighbours were not there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffcolor_core import DiffColor, DivergedError, Picture, Settings, ToFit
from diffcolor_core.adapters import fitted_copies, fitted_state, trainable_copy
from diffcolor_core.config import SamplingSettings, Stage1Settings, Stage2Settings
from diffcolor_core.optimising import mse_of_each, noised, optimise
from diffcolor_scans.images import Scan

SETTINGS = Settings(
    batch_size=2,
    stage1=Stage1Settings(num_steps=3, learning_rate=1e-2, adapter_rank=2, temperature=0.1, num_views=1),
    stage2=Stage2Settings(embedding_steps=2, model_steps=3, model_learning_rate=1e-2, adapter_rank=2),
    sampling=SamplingSettings(num_steps=2),
)
PROMPTS = ("a ball on a table", "a red ball", "a box on a table", "a blue table")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads divide a batch among them, and where they cut it shows in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return DiffColor.from_pretrained(str(tiny_folder), settings=SETTINGS)


def photograph(number: int) -> ToFit:
    lightness = 100 * torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(number))
    return ToFit(Scan(lightness, None, 8, "L"), PROMPTS[number], seed=number)


def red(side: int) -> Picture:
    return Picture(np.full((side, side, 3), (200, 40, 40), np.uint8))


def bits(fit) -> dict[str, torch.Tensor]:
    return fit.unet_state | {"e_opt": fit.prompt_embeds, "primary": fit.primary}


def assert_same_bits(fit, other):
    assert fit.losses == other.losses
    assert bits(fit).keys() == bits(other).keys()
    for name, tensor in bits(fit).items():
        assert torch.equal(tensor, bits(other)[name]), name


@pytest.fixture(scope="module")
def fits(pipe):
    return list(pipe.fit_batch([photograph(0), photograph(1), photograph(2)]))


def test_neighbours_and_place_change_no_bit(pipe, fits):
    others = list(pipe.fit_batch([photograph(3), photograph(2), photograph(0)]))
    assert_same_bits(others[2], fits[0])
    assert_same_bits(others[1], fits[2])


def test_a_photograph_of_nan_changes_no_bit_of_the_others(pipe, fits):
    broken = photograph(1)
    broken = broken._replace(image=replace(broken.image, lightness=torch.full((1, 32, 32), torch.nan)))
    first, second, third = pipe.fit_batch([photograph(0), broken, photograph(2)])
    assert isinstance(second, DivergedError)
    assert_same_bits(first, fits[0])
    assert_same_bits(third, fits[2])


def test_a_batch_gives_what_each_photograph_gives_alone(pipe, fits):
    """Up to rounding: a batch adds up in another order."""
    for number, fit in enumerate(fits):
        one = photograph(number)
        alone = pipe.fit(one.image, one.context_prompt, seed=one.seed)
        for name, tensor in bits(alone).items():
            torch.testing.assert_close(bits(fit)[name], tensor, rtol=1e-2, atol=2e-3, msg=name)
        for name, losses in alone.losses.items():
            assert fit.losses[name] == pytest.approx(losses, rel=1e-3), name
    assert not torch.equal(fits[0].primary, fits[1].primary)


def test_each_photograph_of_a_batch_may_have_a_primary_of_its_own(pipe):
    gray = Picture(np.full((32, 32, 3), 90, np.uint8))
    first, second = pipe.fit_batch([photograph(0)._replace(primary=red(32)), photograph(1)._replace(primary=gray)])
    alone = pipe.fit(photograph(0).image, PROMPTS[0], seed=0, primary=red(32))
    assert torch.equal(first.primary, alone.primary)
    assert first.primary[0].mean() > 40
    assert second.primary.abs().max() < 1


def test_a_fit_of_a_batch_is_kept_and_recoloured_like_any_other(pipe, fits, tmp_path):
    fits[1].save(str(tmp_path / "fit"))
    loaded = pipe.load_fit(str(tmp_path / "fit"))
    chroma = [pipe.recolor(fit, "a blue ball").chroma for fit in (fits[1], loaded)]
    assert torch.equal(*chroma)
    assert not torch.equal(chroma[0], pipe.recolor(fits[2], "a blue ball").chroma)


@pytest.mark.parametrize(
    ("others", "settings", "reason"),
    [
        ([ToFit(Scan(torch.rand(1, 32, 64), None, 8, "L"), "a ball")], SETTINGS, "one working size"),
        ([ToFit(photograph(1).image, "a ball " * 90)], SETTINGS, "equally many chunks"),
        ([photograph(1)._replace(context_prompt=" ")], SETTINGS, "prompt is empty"),
        ([photograph(1)._replace(primary=red(32))], SETTINGS, "fit them apart"),
        (
            [photograph(1)],
            SETTINGS.model_copy(update={"stage1": Stage1Settings(num_steps=1)}),
            "set stage1.adapter_rank",
        ),
    ],
)
def test_what_cannot_be_a_batch_is_refused(pipe, others, settings, reason):
    with pytest.raises(ValueError, match=reason):
        list(DiffColor(pipe.checkpoint, settings).fit_batch([photograph(0), *others]))


def test_photographs_with_one_key_can_be_a_batch(pipe):
    key = pipe.batch_key(photograph(0))
    assert key == pipe.batch_key(photograph(1))
    assert key != pipe.batch_key(photograph(1)._replace(image=Scan(torch.rand(1, 32, 64), None, 8, "L")))
    assert key[:2] == tuple(next(pipe.fit_batch([photograph(0)] * 2, primary_only=True)).lightness.shape[-2:])
    room = int(pipe.checkpoint.tokenizer.model_max_length) - 2
    full = photograph(0)._replace(context_prompt=" ".join(["a ball"] + ["on"] * (room - 2)))
    assert pipe.batch_key(full)[2:] == (1, 2), "its identifier is one token too many"


@pytest.mark.parametrize("read_every", [1, 2])
def test_an_early_stop_ends_the_training_of_one_photograph_and_its_draws(read_every):
    """Three photographs of one number each, which learn their target; the second stops after two steps."""
    x = torch.zeros(3, requires_grad=True)
    target = torch.tensor([1.0, 2.0, 3.0])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    after_two = torch.Generator().manual_seed(1)
    drawn = [torch.randn((), generator=after_two) for _ in range(2)]
    seen = []

    def losses_of():
        draws = torch.stack([torch.randn((), generator=g) for g in generators])
        seen.append((x.detach().clone(), draws))
        return ((x - target - 0.1 * draws) ** 2,)

    first = (0.0 - 2.0 - 0.1 * float(drawn[0])) ** 2
    losses = optimise(
        *([x], 0.1, 5, losses_of, ("loss",), generators, lambda *_: None),
        lambda known: len(known["loss"]) == 2 and known["loss"][0] == pytest.approx(first),
        read_every,
    )
    assert [len(known["loss"]) for known in losses] == [5, 2, 5]
    assert x.tolist()[1] == float(seen[2][0][1])
    assert torch.equal(generators[1].get_state(), after_two.get_state())
    assert x.tolist()[::2] != seen[-1][0].tolist()[::2]


def test_draws_belong_to_their_photograph(pipe):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    schedule = pipe.checkpoint.scheduler
    together = noised(schedule, z, 2, 600, generators)
    alone = noised(schedule, z[1:2], 2, 600, [torch.Generator().manual_seed(6)])
    for both, one in zip(together, alone, strict=True):
        assert torch.equal(both.chunk(3)[1], one)
    assert torch.equal(mse_of_each(together.z_t, together.z, 3)[1:2], mse_of_each(alone.z_t, alone.z, 1))


def test_stacked_adapters_are_those_that_each_photograph_gets_alone(pipe):
    unet = pipe.checkpoint.unet
    trained = trainable_copy(unet, 2, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
    trainable = [p for p in trained.parameters() if p.requires_grad]
    assert {len(p) for p in trainable} == {2}
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.05 * torch.arange(2).view(2, 1, 1)  # the first photograph's stay as they were drawn
    copies = list(fitted_copies(trained, unet, 2, 2))
    drawn = fitted_state(trainable_copy(unet, 2, [torch.Generator().manual_seed(5)]), 2)
    state = fitted_state(copies[0], 2)
    assert state.keys() == drawn.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in drawn.items())
    z, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([400, 10, 400, 10])
    e = pipe.checkpoint.encode_prompts(["a ball"]).expand(4, -1, -1)
    with torch.no_grad():
        together = pipe.checkpoint.predict(trained, z, t, e)
        for i, fitted in enumerate(copies):
            rows = slice(2 * i, 2 * i + 2)
            torch.testing.assert_close(together[rows], pipe.checkpoint.predict(fitted, z[rows], t[rows], e[rows]))
        assert not torch.allclose(*(pipe.checkpoint.predict(fitted, z[:2], t[:2], e[:2]) for fitted in copies))
