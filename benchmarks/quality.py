"""The whole study: the method, its rivals and its ablations on rendered scenes, for one seed.

python -m benchmarks.quality --num 16 --seed 100      (1.5 hours; resumes; `make study`)

Writes benchmarks/results/quality.json and draws docs/quality.jpg. Each (task, method) is kept in OUT as soon as
it is finished and not run again for the same model, settings, seed and number of scenes.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from diffcolor_core import preset
from diffcolor_core.models import load_checkpoint
from diffcolor_study.about import about
from diffcolor_study.runner import DEMO_JUDGE, run_study, summarise

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib import image as mpimg

RIVALS = {
    "full-prompt": ["full", "img2img", "img2img-projected", "imagic", "text-to-image", "stage1"],
    "edit": ["full", "img2img", "img2img-projected", "imagic", "no-keep"],
    "automatic": ["full", "img2img", "img2img-projected", "text-to-image"],
}
ABLATIONS = {
    "full-prompt": [
        "no-fit",
        "no-regional",
        "negative-empty",
        "no-stage1",
        "untrained-stage1",
        "no-projection",
        "no-alignment",
        "no-identifiers",
        "adapters",
        "half-steps",
        "double-steps",
        "alpha-0.8",
        "alpha-1.2",
    ],
    "edit": ["no-fit", "negative-empty", "adapters"],
    "automatic": [
        "untrained-stage1",
        "no-contrastive",
        "no-anti-color",
        "no-views",
        "no-early-stop",
        "noise-target",
        "all-timesteps",
        "double-steps",
    ],
}


def main(
    num: Annotated[int, typer.Option(help="Scenes for the method and its rivals; ablations get half.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of scenes and prompts.")] = 100,
    preset_name: Annotated[str, typer.Option("--preset", help="Settings that the methods derive from.")] = "demo",
    task: Annotated[list[str] | None, typer.Option(help="Run only this task; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and finished parts.")] = Path("out/quality"),
    results: Annotated[Path, typer.Option("--json", help="Write the figures to this file.")] = Path(
        "benchmarks/results/quality.json"
    ),
    figure: Annotated[Path, typer.Option(help="Draw the picture here.")] = Path("docs/quality.jpg"),
) -> None:
    """Run what is not finished, then write the figures and draw the picture."""
    settings = preset(preset_name)
    checkpoint, judge = load_checkpoint("demo"), load_checkpoint("demo", clip=str(DEMO_JUDGE))
    folder = out / f"{checkpoint.model_revision[7:15]}-{settings.sha256()[:8]}-{num}-{seed}"
    plan = [(t, m, num) for t, methods in RIVALS.items() for m in methods]
    plan += [(t, m, max(2, num // 2)) for t, methods in ABLATIONS.items() for m in methods]
    for name, method, scenes in plan:
        part = folder / f"{name}-{method}.json"
        if part.exists() or name not in (task or RIVALS):
            continue
        start = time.perf_counter()
        common = {"task": name, "num": scenes, "seed": seed, "folder": folder, "judge": judge}
        scores = run_study(checkpoint, settings, methods=[method], **common)
        part.write_text(json.dumps(summarise(scores)[method]))
        print(f"{name} {method}: {time.perf_counter() - start:.0f} s", flush=True)
    tables: dict[str, dict[str, dict[str, dict[str, float]]]] = {name: {} for name in RIVALS}
    for name, method, _ in plan:
        part = folder / f"{name}-{method}.json"
        if part.exists():  # with --task, those that other calls have finished
            tables[name][method] = json.loads(part.read_text())
    record = {
        "seed": seed,
        "preset": preset_name,
        "settings": settings.model_dump(mode="json"),
        "model": f"demo {checkpoint.model_revision}",
        **about("torch", "diffusers", "transformers", "peft"),
    }
    results.write_text(json.dumps({"about": record, **tables}, indent=1) + "\n")
    if set(RIVALS["full-prompt"]) <= tables["full-prompt"].keys():
        draw(folder, figure, RIVALS["full-prompt"], rows=min(num, 5))


def draw(folder: Path, path: Path, methods: list[str], rows: int) -> None:
    """Draw gray, truth and each method side by side, one scene in each row."""
    names = ["gray", "truth", *methods]
    figure, axes = plt.subplots(rows, len(names), figsize=(1.5 * len(names), 1.55 * rows), squeeze=False)
    for row, line in enumerate(axes):
        for name, axis in zip(names, line, strict=True):
            axis.imshow(mpimg.imread(folder / "full-prompt" / f"{row:04d}" / f"{name}.png"))
            axis.axis("off")
            if row == 0:
                axis.set_title(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
