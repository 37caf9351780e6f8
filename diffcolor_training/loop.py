"""A training loop that checkpoints and resumes."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def step_rng(seed: int, part: str, step: int) -> np.random.Generator:
    """The generator of one training step, the same whether training was interrupted or not."""
    return np.random.default_rng((seed, *part.encode(), step))


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.rename(path)


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
    """Minimise `loss_of(step)` with AdamW, a warm-up and a linear fall; leave the EMA weights in `module`.

    The checkpoint holds weights, EMA and both Adam moments as safetensors. A finished part only loads.
    """
    path = checkpoints / f"{name}.safetensors"
    optimizer = torch.optim.AdamW(parameter_groups, betas=(0.9, 0.99), weight_decay=1e-4)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    parameters = dict(module.named_parameters())
    ema = {key: p.detach().clone() for key, p in parameters.items()}
    start = 0
    if path.exists():
        with safe_open(path, "pt") as file:
            start = int(file.metadata()["step"])
            for key, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight.{key}"))
                ema[key].copy_(file.get_tensor(f"ema.{key}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(start)),
                    "exp_avg": file.get_tensor(f"m.{key}").to(parameter),
                    "exp_avg_sq": file.get_tensor(f"v.{key}").to(parameter),
                }

    def save(step: int) -> None:
        tensors = {f"weight.{key}": p for key, p in parameters.items()} | {f"ema.{key}": t for key, t in ema.items()}
        for key, parameter in parameters.items():
            state = optimizer.state[parameter]
            tensors |= {f"m.{key}": state["exp_avg"], f"v.{key}": state["exp_avg_sq"]}
        _save(path, tensors, {"step": str(step)})

    log = checkpoints / f"{name}.losses.csv"
    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=num_steps, completed=start)
        recent: list[float] = []
        for step in range(start, num_steps):
            torch.manual_seed(int(step_rng(seed, name, step).integers(2**62)))
            warm, fall = min(1.0, (step + 1) / 200), 1 - step / num_steps
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * warm * fall
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
            recent.append(loss.item())
            done = step + 1
            if done % 50 == 0 or done == num_steps:
                with log.open("a") as file:
                    file.write(f"{done},{sum(recent) / len(recent):.6f},{time.time():.0f}\n")
                progress.update(bar, completed=done, description=f"{name} {sum(recent) / len(recent):.4f}")
                recent = []
            if done % checkpoint_every == 0 or done == num_steps:
                save(done)
    for key, parameter in parameters.items():
        parameter.data.copy_(ema[key])
    module.eval().requires_grad_(False)
