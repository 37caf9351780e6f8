"""Are the quicker presets as good? Presets on the same rendered scenes, compared scene by scene.

python -m benchmarks.presets --json benchmarks/results/presets.json                              (5 hours; resumes)
python -m benchmarks.presets --method paper --num 24 --json benchmarks/results/presets.json      (3 hours; resumes)

The demo model, at learning rates that suit it. Scenes are drawn eight at a time, each eight from a seed of its own.
Their scores go into the JSON file at once, so that sessions add up, and so do two processes with other seeds. Each
pair of presets is compared on the scenes that both have. A preset is *not inferior* in a figure if the whole 95%
interval of its paired differences is better than 3 points less.
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
PAIRS = (("paper", "standard"), ("standard", "fast"), ("standard", "instant"))
"""A preset, and a quicker one that is compared with it."""


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


def compared(scores: dict[str, dict[str, Scores]]) -> list[dict[str, Any]]:
    """Each pair's means, and the paired differences, on the eights that both have."""
    pairs = []
    for pair in PAIRS:
        if shared := sorted(set.intersection(*(set(scores.get(name, {})) for name in pair))):
            pairs.append(summarise({name: joined(scores[name][eight] for eight in shared) for name in pair}))
    return pairs


def main(
    num: Annotated[int, typer.Option(help="Scenes of each task, in eights.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first eight; the next eight have the next seed.")] = 7000,
    task: Annotated[list[str] | None, typer.Option(help="By default `full-prompt` and `edit`.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Presets; by default `standard`, `fast` and `instant`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures.")] = Path("out/presets"),
    json_file: Annotated[Path, typer.Option("--json", help="File that keeps scores and figures.")] = Path(
        "out/presets.json"
    ),
) -> None:
    """Run what the file does not hold, and compare."""
    torch.set_num_threads(1)
    checkpoint = load_checkpoint("demo")
    for name in task or ("full-prompt", "edit"):
        for eight in map(str, range(seed, seed + num // BATCH)):
            for one in method or ("standard", "fast", "instant"):
                if eight in _kept(json_file, name).get(one, {}):
                    continue
                new = scores_of(checkpoint, name, one, int(eight), out)
                scores = _kept(json_file, name)  # anew, as another process may have added some
                scores.setdefault(one, {})[eight] = new
                record(json_file, name, {"pairs": compared(scores), "scores": scores}, "torch", "diffusers")


def _kept(json_file: Path, task: str) -> dict[str, dict[str, Scores]]:
    kept: dict[str, dict[str, Scores]] = recorded(json_file).get(task, {}).get("figures", {}).get("scores", {})
    return kept


if __name__ == "__main__":
    typer.run(main)
