"""What fine-tuning trains: all weights of a copy of the UNet [P], or low-rank adapters on its attention [O].

With adapters (LoRA, Hu et al. 2021, from peft) a fit takes a few megabytes instead of the whole UNet.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from diffcolor_core.errors import ModelError

_A, _B = ".lora_A.weight", ".lora_B.weight"
"""How peft's names of an adapter's matrices end."""


class PerPhotographLinear(nn.Module):
    """A frozen linear layer with an adapter for each of N photographs: rows of the i-th photograph get the i-th's.

    a: [N, rank, width in], b: [N, width out, rank], as peft's `lora_A` and `lora_B`. Inputs are [N * B, ..., width in].
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, with each photograph's own change."""
        rows = x.reshape(len(self.a), -1, x.shape[-1])
        change = rows @ self.a.mT @ self.b.mT  # [N, rows, width out]
        y: Tensor = self.base(x)
        return y + change.view_as(y)


def check_ranks(unet: UNet2DConditionModel, *ranks: int | None) -> None:
    """Raise ModelError if all weights of Stable Diffusion XL's UNet would be trained."""
    if unet.config.get("addition_embed_type") == "text_time" and None in ranks:
        raise ModelError(
            "SDXL is served with adapters only, as training all its weights takes 50 GB before any picture: choose the "
            "preset standard, fast or instant, or set stage1.adapter_rank and stage2.adapter_rank"
        )


def trainable_copy(
    unet: UNet2DConditionModel, rank: int | None, generators: Sequence[torch.Generator]
) -> UNet2DConditionModel:
    """A copy of `unet` with float32 weights to train; with a `rank`, those are new adapters' on the shared weights.

    generators: one for each photograph that it is trained for. Of several, each gets the adapter that it would get
    alone; all are stacked in the trained tensors, [N, ...]. Raises ValueError for several without a `rank`, and
    ModelError as `check_ranks` does.
    """
    check_ranks(unet, rank)
    if rank is None:
        if len(generators) > 1:
            raise ValueError("photographs in a batch need adapters: set stage1.adapter_rank and stage2.adapter_rank")
        return copy.deepcopy(unet).float().requires_grad_(True)
    copies = []
    for generator in generators:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            copies.append(_with_adapter(unet, rank))
    if len(copies) == 1:
        return copies[0]
    states = [get_peft_model_state_dict(fitted) for fitted in copies]
    together = copy.deepcopy(unet, _shared(unet))
    for place in [name.removesuffix(_A) for name in states[0] if name.endswith(_A)]:
        a, b = (torch.stack([state[place + matrix] for state in states]) for matrix in (_A, _B))
        together.set_submodule(place, PerPhotographLinear(together.get_submodule(place), a, b))
    return together


def fitted_copies(
    trained: UNet2DConditionModel, unet: UNet2DConditionModel, rank: int | None, num_photographs: int
) -> Iterator[UNet2DConditionModel]:
    """What `trainable_copy` gave, after its training: a frozen UNet for each photograph."""
    if num_photographs == 1:
        yield trained.requires_grad_(False)
        return
    layers = {place: layer for place, layer in trained.named_modules() if isinstance(layer, PerPhotographLinear)}
    for i in range(num_photographs):
        state = {place + _A: layer.a.detach()[i].clone() for place, layer in layers.items()}
        state |= {place + _B: layer.b.detach()[i].clone() for place, layer in layers.items()}
        yield fitted_unet(unet, rank, state)


def fitted_state(fitted: UNet2DConditionModel, rank: int | None) -> dict[str, Tensor]:
    """The weights that fine-tuning may have changed, on the CPU."""
    state = fitted.state_dict() if rank is None else get_peft_model_state_dict(fitted)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def fitted_unet(unet: UNet2DConditionModel, rank: int | None, state: dict[str, Tensor]) -> UNet2DConditionModel:
    """A frozen UNet with a fit's weights `state`, as `fitted_state` gives them. Adapters share those of `unet`."""
    if rank is None:
        fitted = copy.deepcopy(unet).float()
        fitted.load_state_dict(state)
    else:
        fitted = _with_adapter(unet, rank)
        set_peft_model_state_dict(fitted, state)
        fitted.to(unet.device)
    return fitted.requires_grad_(False)


def _with_adapter(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """A copy of the frozen `unet` that shares its weights, with a new float32 adapter."""
    fitted = copy.deepcopy(unet, _shared(unet))
    fitted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in fitted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return fitted


def _shared(unet: UNet2DConditionModel) -> dict[int, Tensor]:
    """What `copy.deepcopy` must take for copied already, so that the copy shares it."""
    return {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
