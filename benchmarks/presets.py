"""Are the quicker presets as good? Presets on the same rendered scenes, each compared with the first one.

python -m benchmarks.presets --json benchmarks/results/presets.json                              (5 hours; resumes)
python -m benchmarks.presets --method paper --method standard --num 16 --json ...                (4 hours; resumes)

The demo model, at learning rates that suit it. Scenes are drawn eight at a time, each eight from a seed of its own, and
their scores are kept in OUT as soon as they are there. A preset is *not inferior* in a figure if the whole 95%
interval of its paired differences is better than 3 points less.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffcolor_core.config import PRESETS
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_study.methods import METHODS
from diffcolor_study.runner import Scores, run_study, summarise
from support.record import record

BATCH = 8
FIGURES = ("object_color_accuracy", "all_right_per_image", "edit_success", "leakage")


def scores_of(checkpoint: Checkpoint, task: str, method: str, seed: int, out: Path) -> Scores:
    """The figures of eight scenes; from OUT if they are there."""
    kept = out / f"{task}-{method}-{seed}.json"
    if not kept.exists():
        adapters = METHODS[method].derive(PRESETS["demo"]).stage1.adapter_rank
        common = {"task": task, "methods": [method], "num": BATCH, "seed": seed, "batch": BATCH if adapters else 1}
        scores = run_study(checkpoint, PRESETS["demo"], folder=out / str(seed), **common)[method]
        kept.write_text(json.dumps({figure: scores[figure] for figure in FIGURES if figure in scores}))
    return json.loads(kept.read_text())


def main(
    num: Annotated[int, typer.Option(help="Scenes of each task, in eights.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first eight; the next eight have the next seed.")] = 7000,
    task: Annotated[list[str] | None, typer.Option(help="By default `full-prompt` and `edit`.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Presets, the reference first; by default `standard`, `fast`, `instant`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and finished parts.")] = Path("out/presets"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")] = None,
) -> None:
    """Run what is not finished, then compare each preset with the first, scene by scene."""
    torch.set_num_threads(1)
    checkpoint, methods = load_checkpoint("demo"), method or ["standard", "fast", "instant"]
    for name in task or ("full-prompt", "edit"):
        scores: dict[str, Scores] = {one: {} for one in methods}
        for eight in range(seed, seed + num // BATCH):
            for one in methods:
                for figure, values in scores_of(checkpoint, name, one, eight, out).items():
                    scores[one].setdefault(figure, []).extend(values)
            print(f"{name}: {(eight - seed + 1) * BATCH} of {num} scenes", flush=True)
        figures = {"seed": seed, "task": name, "methods": summarise(scores)}
        record(json_file, f"{name}, {methods[0]}", figures, "torch", "diffusers")


if __name__ == "__main__":
    typer.run(main)
