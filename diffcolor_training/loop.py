"""A training loop that checkpoints and resumes exactly.

AdamW's state, its schedule and the moving average are torch's and diffusers'. A checkpoint is one
safetensors file: weights, their average, buffers, and the optimizer's state flattened by parameter name.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

WARM_UP_STEPS = 200
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def step_rng(seed: int, part: str, step: int) -> np.random.Generator:
    """The random generator of one training step. It depends on its arguments only, never on earlier steps."""
    return np.random.default_rng((seed, *part.encode(), step))


def rate_factor(step: int, num_steps: int) -> float:
    """The learning rate at a step (from 0), as a fraction of its peak: a linear warm-up times a linear fall."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, 1 - step / max(num_steps, 1))


def fit_part(
    name: str,
    module: nn.Module,
    parameter_groups: list[dict[str, object]],
    loss_of: Callable[[int], Tensor],
    *,
    seed: int,
    num_steps: int,
    checkpoints: Path,
    checkpoint_every: int = 250,
    ema_decay: float = 0.999,
) -> None:
    """Minimise `loss_of(step)` over `num_steps` of AdamW and leave the averaged weights in `module`, frozen.

    parameter_groups: as torch's optimizers take them, each with its peak "lr". ema_decay: the decay of
    the moving average in later steps; step s has min(ema_decay, (s + 1) / (s + 10)). The part
    checkpoints to `checkpoints`/`name`.safetensors and continues from there; a finished part only loads.
    Global random state is seeded before each step, so a resumed training equals an unbroken one.
    """
    path = checkpoints / f"{name}.safetensors"
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameter_groups, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(parameters.values(), decay=ema_decay, foreach=True)
    start = _load(path, module, optimizer, ema) if path.exists() else 0
    schedule = LambdaLR(optimizer, lambda passed: rate_factor(start + passed, num_steps))
    log = checkpoints / f"{name}.losses.csv"
    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=num_steps, completed=start)
        recent: list[float] = []
        for step in range(start, num_steps):
            torch.manual_seed(int(step_rng(seed, name, step).integers(2**62)))
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.step(parameters.values())
            recent.append(loss.item())
            done = step + 1
            if done % 50 == 0 or done == num_steps:
                with log.open("a") as file:
                    file.write(f"{done},{sum(recent) / len(recent):.6f},{time.time():.0f}\n")
                progress.update(bar, completed=done, description=f"{name} {sum(recent) / len(recent):.4f}")
                recent = []
            if done % checkpoint_every == 0 or done == num_steps:
                _save(path, done, module, optimizer, ema)
    ema.copy_to(parameters.values())
    module.eval().requires_grad_(False)


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Sequence[Tensor]]) -> None:
    """Measure the statistics of batch normalisation anew: those of training are not the averaged weights'."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for batch in batches:
        module(*batch)
    module.eval()


def _save(path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
    """Write the checkpoint under a temporary name first: it is there as a whole or not at all."""
    parameters = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {f"weight.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in zip(parameters, ema.shadow_params, strict=True)}
    tensors |= {f"buffer.{name}": buffer for name, buffer in _buffers(module).items()}
    tensors |= _state_of(get_optimizer_state_dict(module, optimizer, options=_FLAT))
    partial = path.with_suffix(".partial")
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, {"step": str(step)})
    partial.rename(path)


@torch.no_grad()
def _load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> int:
    """Restore a checkpoint; the number of steps it has done."""
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        for (name, parameter), average in zip(module.named_parameters(), ema.shadow_params, strict=True):
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            average.copy_(file.get_tensor(f"ema.{name}"))
        for name, buffer in _buffers(module).items():
            buffer.copy_(file.get_tensor(f"buffer.{name}"))
        ema.optimization_step = step
        fresh = get_optimizer_state_dict(module, optimizer, options=_FLAT)  # with the settings of the groups
        stored = {name: file.get_tensor(name) for name in _state_of(fresh)}
    set_optimizer_state_dict(module, optimizer, fresh | stored, options=_FLAT)
    return step


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}


def _state_of(flat: Mapping[str, object]) -> dict[str, Tensor]:
    """AdamW's tensors in a flattened state dict, without the settings of its parameter groups."""
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}
