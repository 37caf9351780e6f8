import pytest
import torch

from diffcolor_core.adapters import fitted_state, fitted_unet, trainable_copy
from diffcolor_core.models import load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "adapters"])
def test_the_state_of_a_trained_copy_makes_the_same_unet_again(checkpoint, rank):
    unet = trainable_copy(checkpoint.unet, rank, [torch.Generator().manual_seed(0)])
    trained = [p for p in unet.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    state = fitted_state(unet, rank)
    again = fitted_unet(checkpoint.unet, rank, state)
    assert not any(p.requires_grad for p in again.parameters())
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([400])
    e = checkpoint.encode_prompts(["a ball"])
    with torch.no_grad():
        base, one, two = (checkpoint.predict(u, z, t, e) for u in (checkpoint.unet, unet, again))
    torch.testing.assert_close(one, two)
    assert float((one - base).abs().max()) > 1e-3


def test_new_adapters_change_nothing_and_are_all_that_trains(checkpoint):
    unet = trainable_copy(checkpoint.unet, 2, [torch.Generator().manual_seed(0)])
    names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 4 * 8  # two matrices for each of four projections in eight attention layers
    assert all("lora" in name for name in names)
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([400])
    e = checkpoint.encode_prompts(["a ball"])
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.predict(unet, z, t, e), checkpoint.predict(checkpoint.unet, z, t, e))


def test_adapters_share_the_frozen_weights(checkpoint):
    base = {parameter.data_ptr() for parameter in checkpoint.unet.parameters()}
    unet = trainable_copy(checkpoint.unet, 2, [torch.Generator()])
    again = fitted_unet(checkpoint.unet, 2, fitted_state(unet, 2))
    for copied in (unet, again):
        assert {p.data_ptr() for name, p in copied.named_parameters() if "lora" not in name} == base
        assert base.isdisjoint({p.data_ptr() for name, p in copied.named_parameters() if "lora" in name})


def test_the_same_seed_draws_the_same_adapters(checkpoint):
    states = [
        fitted_state(trainable_copy(checkpoint.unet, 2, [torch.Generator().manual_seed(seed)]), 2) for seed in (3, 3, 4)
    ]
    drawn = [torch.cat([t.flatten() for name, t in state.items() if "lora_A" in name]) for state in states]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
