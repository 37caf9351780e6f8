from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from diffcolor_training.loop import fit_part, rate_factor, step_rng

NUM_STEPS = 6
RATES = (1e-2, 3e-3)


class TwoLayers(torch.nn.Module):
    """Two parts with learning rates of their own, as the UNet and its text tower have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def groups(self):
        parts = zip((self.one, self.two), RATES, strict=True)
        return [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]

    def loss(self):
        data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return (self.two(self.one(data + torch.randn_like(data)).tanh()) - data).pow(2).mean()


def train(folder, *, stop_before=None, **options):
    """The weights after training, or None if it was stopped before a step."""
    folder.mkdir(exist_ok=True)
    module = TwoLayers()

    def loss_of(step):
        if step == stop_before:
            raise KeyboardInterrupt
        return module.loss()

    options = {"seed": 0, "num_steps": NUM_STEPS, "checkpoints": folder, "checkpoint_every": 1} | options
    try:
        fit_part("part", module, module.groups(), loss_of, **options)
    except KeyboardInterrupt:
        return None
    assert not any(p.requires_grad for p in module.parameters())
    return torch.cat([p.flatten() for p in module.parameters()])


def test_an_interrupted_and_resumed_training_equals_an_unbroken_one(tmp_path):
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "broken", stop_before=2) is None
    assert train(tmp_path / "broken", stop_before=5) is None
    assert torch.equal(train(tmp_path / "broken"), whole)
    assert torch.equal(train(tmp_path / "broken"), whole)  # a finished part only loads
    assert not torch.equal(train(tmp_path / "other", seed=1), whole)


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path):
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "broken", stop_before=5, checkpoint_every=2) is None
    with safe_open(tmp_path / "broken" / "part.safetensors", "pt") as file:
        assert file.metadata() == {"step": "4"}
    assert torch.equal(train(tmp_path / "broken"), whole)


@pytest.mark.parametrize("ema_decay", [0.999, 0.2])
def test_weights_are_those_of_a_loop_written_out(tmp_path, ema_decay):
    """An independent loop: AdamW with the rates set by hand, a moving average by its formula."""
    module = TwoLayers()
    optimizer = torch.optim.AdamW(module.groups(), betas=(0.9, 0.99), weight_decay=1e-4)
    average = [p.detach().clone() for p in module.parameters()]
    for step in range(NUM_STEPS):
        torch.manual_seed(int(step_rng(0, "part", step).integers(2**62)))
        for group, peak in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 200) * (1 - step / NUM_STEPS)
        optimizer.zero_grad()
        module.loss().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10)) if step else 0.0
        for mean, p in zip(average, module.parameters(), strict=True):
            mean.copy_(decay * mean + (1 - decay) * p.detach())
    expected = torch.cat([mean.flatten() for mean in average])
    torch.testing.assert_close(train(tmp_path / "a", ema_decay=ema_decay), expected, rtol=1e-5, atol=1e-7)


def test_the_rate_rises_and_falls():
    factors = [rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 200)
    assert max(factors) == factors[199] == pytest.approx(1 - 199 / 1000)
    assert factors[-1] == pytest.approx(1 / 1000)
    assert all(a > b for a, b in pairwise(factors[199:]))
