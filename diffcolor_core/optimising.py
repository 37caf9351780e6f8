"""The optimisation that both stages share, for one photograph or for several of one shape in a batch.

The photographs of a batch share the frozen networks and nothing else. Each has a generator of its own for all its
draws, its own trained tensors and its own loss. So what a photograph becomes depends on the settings, its shape and
the size of the batch, but not on its neighbours; on one CPU thread not on its place among them either.

Symbols as in `docs/method.md`: N photographs, B draws for each, z latents, t timesteps, eps noise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.diffusion import add_noise


class Photograph(NamedTuple):
    """What a stage is told of a photograph. lightness: [1, h, w], 0..100. generator: of all its draws, on the CPU."""

    lightness: Tensor
    context_prompt: str
    generator: torch.Generator


class Noised(NamedTuple):
    """B draws for each photograph, [N * B, ...], those of one photograph together."""

    z: Tensor
    z_t: Tensor
    t: Tensor
    eps: Tensor


def noised(
    schedule: DDIMScheduler, z: Tensor, num_draws: int, num_timesteps: int, generators: Sequence[torch.Generator]
) -> Noised:
    """Draw t below `num_timesteps` and eps for each latent of z [N, C, h, w], from that photograph's generator."""
    drawn = [
        (torch.randint(num_timesteps, (num_draws,), generator=g), torch.randn((num_draws, *z.shape[1:]), generator=g))
        for g in generators
    ]
    t = torch.cat([t for t, _ in drawn]).to(z.device)
    eps = torch.cat([eps for _, eps in drawn]).to(z)
    z = z.repeat_interleave(num_draws, dim=0)
    return Noised(z, add_noise(schedule, z, eps, t), t, eps)


def mse_of_each(output: Tensor, target: Tensor, num_photographs: int) -> Tensor:
    """The mean squared error over each photograph's draws: [N]."""
    pairs = zip(output.chunk(num_photographs), target.chunk(num_photographs), strict=True)
    return torch.stack([F.mse_loss(one, wanted) for one, wanted in pairs])


def optimise(
    trained: Sequence[Tensor],
    learning_rate: float,
    num_steps: int,
    losses_of: Callable[[], tuple[Tensor, ...]],
    names: Sequence[str],
    generators: Sequence[torch.Generator],
    progress: Callable[[int, int], None],
    stop: Callable[[dict[str, list[float]]], bool] = lambda _: False,
    read_every: int | None = None,
) -> list[dict[str, list[float]]]:
    """Take up to `num_steps` of Adam on the sum of the photographs' losses. Returns each one's losses by name.

    trained: the tensors to train; of several photographs stacked, [N, ...]. losses_of: draws, and gives losses [N],
    of which the first is minimised and the last are called `names`. stop: whether a photograph with these losses is
    done, asked when they are read. It then keeps the tensors and the state of its generator that it has, however long
    the others take. read_every: steps between two readings; by default 25 on a GPU, which a reading waits for, else 1.
    """
    read_every = read_every or (25 if trained[0].is_cuda else 1)
    optimizer = torch.optim.Adam(trained, lr=learning_rate, fused=trained[0].is_cuda or None)
    unread: list[Tensor] = []  # of each step since the last reading, [names, N]
    losses: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in generators]
    done: dict[int, tuple[list[Tensor], Tensor]] = {}
    for step in range(num_steps):
        optimizer.zero_grad()  # frees the last gradients before the forward pass takes memory
        values = losses_of()
        values[0].sum().backward()
        optimizer.step()
        unread.append(torch.stack([value.detach() for value in values[-len(names) :]]))
        progress(step + 1, num_steps)
        if (step + 1) % read_every and step + 1 < num_steps:
            continue
        for name, of_name in zip(names, torch.stack(unread, dim=-1).tolist(), strict=True):
            for i in set(range(len(losses))) - done.keys():
                losses[i][name] += of_name[i]
        unread.clear()
        stopped = [i for i, known in enumerate(losses) if i not in done and stop(known)]
        if len(done) + len(stopped) == len(generators):
            break
        for i in stopped:
            done[i] = [tensor.detach()[i].clone() for tensor in trained], generators[i].get_state()
    with torch.no_grad():
        for i, (kept, state) in done.items():
            generators[i].set_state(state)
            for tensor, value in zip(trained, kept, strict=True):
                tensor[i] = value
    return losses
