"""Are the quicker presets as good? Presets on the same rendered scenes, each compared with the first one.

python -m benchmarks.presets --json benchmarks/results/presets.json                              (5 hours; resumes)
python -m benchmarks.presets --method paper --method standard --num 16 --json ...                (4 hours; resumes)

The demo model, at learning rates that suit it. Scenes are drawn eight at a time, each eight from a seed of its own.
Their scores go into the JSON file at once, so that several sessions add up; those of which every preset there has the
scores are compared. A preset is *not inferior* in a figure if the whole 95% interval of its paired differences is
better than 3 points less.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from diffcolor_core.config import PRESETS
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_study.methods import METHODS
from diffcolor_study.runner import Scores, run_study, summarise
from support.record import record, recorded

BATCH = 8
FIGURES = ("object_color_accuracy", "all_right_per_image", "edit_success", "leakage")


def scores_of(checkpoint: Checkpoint, task: str, method: str, seed: int, out: Path) -> Scores:
    """The figures of eight scenes, one value per scene."""
    adapters = METHODS[method].derive(PRESETS["demo"]).stage1.adapter_rank
    common: dict[str, Any] = {"task": task, "methods": [method], "num": BATCH, "batch": BATCH if adapters else 1}
    scores = run_study(checkpoint, PRESETS["demo"], seed=seed, folder=out / str(seed), **common)[method]
    return {figure: [round(value, 4) for value in scores[figure]] for figure in FIGURES if figure in scores}


def joined(eights: Iterable[Scores]) -> Scores:
    """The scores of several eights as those of one study."""
    figures: Scores = {}
    for scores in eights:
        for figure, values in scores.items():
            figures.setdefault(figure, []).extend(values)
    return figures


def main(
    num: Annotated[int, typer.Option(help="Scenes of each task, in eights.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first eight; the next eight have the next seed.")] = 7000,
    task: Annotated[list[str] | None, typer.Option(help="By default `full-prompt` and `edit`.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Presets, the reference first; by default `standard`, `fast`, `instant`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures.")] = Path("out/presets"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep scores and figures in this file.")] = None,
) -> None:
    """Run what the file does not hold, then compare each preset with the first, scene by scene."""
    torch.set_num_threads(1)
    checkpoint, methods = load_checkpoint("demo"), method or ["standard", "fast", "instant"]
    for name in task or ("full-prompt", "edit"):
        key = f"{name}, {methods[0]}"
        kept = recorded(json_file).get(key, {}).get("figures", {}).get("scores", {})
        scores: dict[str, dict[str, Scores]] = {one: {} for one in methods} | kept
        for eight in map(str, range(seed, seed + num // BATCH)):
            new = [one for one in methods if eight not in scores[one]]
            for one in new:
                scores[one][eight] = scores_of(checkpoint, name, one, int(eight), out)
            if new:
                shared = sorted(set.intersection(*map(set, scores.values())))
                figures = summarise({one: joined(parts[at] for at in shared) for one, parts in scores.items()})
                record(json_file, key, {"task": name, "methods": figures, "scores": scores}, "torch", "diffusers")


if __name__ == "__main__":
    typer.run(main)
