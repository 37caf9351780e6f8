"""What fine-tuning trains: all weights of a copy of the UNet [P], or low-rank adapters on its attention [O].

With adapters (LoRA, Hu et al. 2021, from peft) a fit takes a few megabytes instead of the whole UNet.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor


def trainable_copy(unet: UNet2DConditionModel, rank: int | None, generator: torch.Generator) -> UNet2DConditionModel:
    """A copy of `unet` with float32 weights to train; with a `rank`, those are new adapters' on the shared weights."""
    if rank is None:
        return copy.deepcopy(unet).float().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return _with_adapter(unet, rank)


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
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    fitted = copy.deepcopy(unet, shared)
    fitted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in fitted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return fitted
