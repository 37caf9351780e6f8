"""How many optimisation steps pay: each loss over the steps, on noise that was not trained on.

python -m benchmarks.steps --json benchmarks/results/steps.json      (4 minutes)

The demo model with adapters of rank 4, on rendered scenes: equation (3) on the gray scan, then (5) and (6) on the
scene's true colours. Every loss is measured on the same held-out draws of timesteps and noise. The `gain` of a step is
the part of the whole decrease that it has reached.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from diffcolor_core import DiffColor, preset
from diffcolor_core.adapters import trainable_copy
from diffcolor_core.colorizer import _chroma_at_working_size
from diffcolor_core.models import load_checkpoint
from diffcolor_core.optimising import optimise
from diffcolor_core.stage1 import Texts, prior_loss
from diffcolor_core.stage2 import reconstruction_loss
from diffcolor_scans.images import gray_input, read_scan
from diffcolor_study.about import about
from diffcolor_study.cases import Case, draw_cases

STEPS = (0, 5, 10, 20, 40, 80, 160)
RANK = {"stage1.adapter_rank": 4, "stage2.adapter_rank": 4}
RATES = {"stage 1": 4e-4, "embedding": 1e-2, "model": 1e-3}
"""Twenty times the preset's rates of full weights, which suits adapters on this model; the embedding's own."""


def curve(
    loss_of: Callable[[torch.Generator], Tensor], held_out: Callable[[], Tensor], trained: list[Tensor], rate: float
) -> list[float]:
    """The held-out loss before the first step and after each of `STEPS`."""
    with torch.no_grad():
        found = [float(held_out())]
    draws = torch.Generator().manual_seed(1)

    def watch(step: int, _: int) -> None:
        if step in STEPS:
            with torch.no_grad():
                found.append(float(held_out()))

    optimise(trained, rate, STEPS[-1], lambda: (loss_of(draws),), ("loss",), [draws], watch)
    return found


def curves(pipe: DiffColor, case: Case) -> dict[str, list[float]]:
    """The three curves of one scene."""
    checkpoint, settings = pipe.checkpoint, pipe.settings
    many = settings.model_copy(update={"batch_size": 16})
    scan, c = read_scan(case.gray.encode_png()), case.context_prompt
    lightness, content_px = pipe._at_working_size(scan)

    z = checkpoint.encode(gray_input(lightness)[None])
    texts = Texts(
        checkpoint.encode_prompts([c]),
        checkpoint.clip_text_features([c]),
        checkpoint.clip_text_features(settings.stage1.anti_color_prompts),
    )
    unet = trainable_copy(checkpoint.unet, 4, [torch.Generator().manual_seed(0)])
    trained = [p for p in unet.parameters() if p.requires_grad]
    found = {
        "stage 1": curve(
            lambda draws: prior_loss(checkpoint, unet, z, texts, settings, [draws])[0],
            lambda: prior_loss(checkpoint, unet, z, texts, many, [torch.Generator().manual_seed(2)])[0],
            trained,
            RATES["stage 1"],
        )
    }

    chroma = _chroma_at_working_size(case.truth, scan, lightness.shape[-2:], content_px)
    z_pri = checkpoint.encode_colored(lightness, chroma[None])
    e_opt = checkpoint.encode_prompts([c]).requires_grad_(True)
    for name in ("embedding", "model"):
        fitted = checkpoint.unet
        trained = [e_opt]
        if name == "model":
            fitted = trainable_copy(checkpoint.unet, 4, [torch.Generator().manual_seed(0)])
            trained = [p for p in fitted.parameters() if p.requires_grad]
        loss = partial(reconstruction_loss, checkpoint, fitted, z_pri, e_opt)
        found[name] = curve(
            lambda draws, loss=loss: loss(settings.batch_size, [draws]),
            lambda loss=loss: loss(64, [torch.Generator().manual_seed(2)]),
            trained,
            RATES[name],
        )
        e_opt.requires_grad_(False)
    return found


def main(
    num: Annotated[int, typer.Option(help="Scenes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 500,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
) -> None:
    """Print the mean loss over scenes after each number of steps, and the gain that it is."""
    checkpoint = load_checkpoint("demo")
    pipe = DiffColor(checkpoint, preset("demo", RANK))
    found: dict[str, list[list[float]]] = {}
    for case in draw_cases("full-prompt", num, seed, 2 * checkpoint.native_size_px):
        for name, losses in curves(pipe, case).items():
            found.setdefault(name, []).append(losses)
            print(name, [round(loss, 4) for loss in losses], flush=True)
    figures = {}
    for name, rows in found.items():
        losses = torch.tensor(rows).mean(dim=0)
        gain = (losses[0] - losses) / (losses[0] - losses.min())
        figures[name] = {
            str(step): {"loss": round(float(loss), 4), "gain": round(float(part), 3)}
            for step, loss, part in zip(STEPS, losses, gain, strict=True)
        }
        print(name, json.dumps(figures[name]), flush=True)
    if json_file is not None:
        record = {"scenes": num, "seed": seed, "rates": RATES, "model": checkpoint.model_revision, **about("torch")}
        json_file.write_text(json.dumps({"about": record, "curves": figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
