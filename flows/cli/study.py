"""The command that measures the method on scenes whose colours are known, or on colour photographs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from flows.cli.common import (
    DeviceOption,
    PresetOption,
    SeedOption,
    SetOption,
    app,
    console,
    device_of,
    errors,
    fail,
    overrides_of,
)
from flows.cli.options import flag


@app.command()
def study(
    task: Annotated[
        Literal["uncaptioned", "automatic", "full-prompt", "edit", "exact"],
        typer.Option(
            help="Colours in the prompt. `automatic`: none. `full-prompt`: all. `edit`: one is changed. "
            "`exact` (scenes): one is changed to a hex code. `uncaptioned` (with --photos): no caption at all."
        ),
    ] = "full-prompt",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method to measure, e.g. `full` or `img2img`; repeatable. `--method list` lists all."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of scenes, or of photographs at most.")] = 20,
    seed: SeedOption = 0,
    model: Annotated[str | None, flag("model")] = None,
    preset: PresetOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    judge: Annotated[
        str | None,
        typer.Option(
            help="A CLIP that guided no method, for CLIP scores: a folder or `owner/name@commit`. `demo` has its own."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures and their intervals to this file.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the pictures in this folder.")] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="Measure colour photographs, turned gray, instead of scenes: a folder with a catalog.csv."),
    ] = None,
    perceptual: Annotated[
        bool,
        typer.Option(help="With --photos: also LPIPS, FID and KID. Needs torchvision, torch-fidelity and weights."),
    ] = False,
) -> None:
    """Measure the method and its rivals on rendered scenes whose colours are known.

    Scenes and prompts are drawn from the seed; the prompts name colours unrelated to the scene's own.
    The saved files are scored. Prints means with bootstrap 95% intervals.

    Needs the extra `study`: `pip install 'diffcolor-archive[study]'`.

    Example: `diffcolor study --task full-prompt --method full --method img2img --num 20 --json out/study.json`
    """
    import tempfile

    import torch

    try:
        from diffcolor_study.about import about
        from diffcolor_study.methods import METHODS
        from diffcolor_study.perceptual import Perceptual
        from diffcolor_study.photographs import FLAT, run_photographs
        from diffcolor_study.runner import DEMO_JUDGE, run_study, summarise
    except ModuleNotFoundError as error:
        raise fail(f"`study` needs {error.name}: pip install 'diffcolor-archive[study]'", 2) from error
    from diffcolor_core import __version__, preset as settings_preset
    from diffcolor_core.config import preset_for
    from diffcolor_core.models import load_checkpoint

    methods = method or ["full", "img2img", "imagic", "text-to-image", "stage1"]
    if methods == ["list"]:
        for name, described in FLAT.items():
            typer.echo(f"{name:22}with --photos: {described}")
        for name, known in METHODS.items():
            typer.echo(f"{name:22}{known.description}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        if perceptual and photos is None:
            raise ValueError("--perceptual compares photographs: give --photos")
        networks = Perceptual.load() if perceptual else None
        model = model or ("demo" if photos is None else "photo")
        preset = preset or preset_for(model)
        settings = settings_preset(preset, overrides_of(set_))
        checkpoint = load_checkpoint(model, device=device_of(device))
        judge = judge or (str(DEMO_JUDGE) if model == "demo" else None)
        judging = None if judge is None else load_checkpoint(model, clip=judge, device=device_of(device))
        with tempfile.TemporaryDirectory() as temporary, Progress(*columns, TimeElapsedColumn(), console=errors) as bar:
            line = bar.add_task("study", total=num * len(methods))

            def show(name: str, done: int, total: int) -> None:
                bar.update(line, description=name, completed=done, total=total)

            common: dict[str, Any] = {"methods": methods, "num": num, "seed": seed, "progress": show}
            common |= {"folder": keep or Path(temporary), "judge": judging}
            if photos is not None:
                figures = run_photographs(checkpoint, settings, photos, task=task, perceptual=networks, **common)
            else:
                figures = run_study(checkpoint, settings, task=task, **common)
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    summary = summarise(figures)
    for name, values in summary.items():
        title = f"{name}: {METHODS[name].description if name in METHODS else FLAT[name]}"
        others = ("mean", "95% interval", "scenes", f"minus {methods[0]}, 95% interval")
        table = Table(Column("figure", no_wrap=True), *others, title=title)
        for figure, value in values.items():
            difference = (
                f"{value['difference']['mean']:.4g} ({_range(value['difference'])})" if "difference" in value else ""
            )
            table.add_row(figure, f"{value['mean']:.4g}", _range(value), str(value["scenes"]), difference)
        console.print(table)
    if json_file is not None:
        gpu = torch.cuda.get_device_name(checkpoint.device) if checkpoint.device.type == "cuda" else None
        record: dict[str, Any] = {
            "task": task if photos is None else f"photographs, {task}",
            "seed": seed,
            "preset": preset,
            "settings": settings.model_dump(mode="json"),
            "model": f"{checkpoint.model_id} {checkpoint.model_revision}",
            "software_version": __version__,
            **about("torch", "diffusers", "transformers", "peft", gpu=gpu),
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"about": record, "methods": summary}, indent=1) + "\n")


def _range(value: dict[str, Any]) -> str:
    return f"{value['low']:.4g} to {value['high']:.4g}"
