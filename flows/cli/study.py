"""The command that measures the method."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from flows.cli.common import (
    ModelOption,
    PresetOption,
    SeedOption,
    SetOption,
    app,
    console,
    errors,
    fail,
    overrides_of,
)


@app.command()
def study(
    task: Annotated[
        Literal["automatic", "full-prompt", "edit"],
        typer.Option(help="`automatic`: no colours given. `full-prompt`: all of them. `edit`: one of them changed."),
    ] = "full-prompt",
    method: Annotated[
        list[str] | None, typer.Option(help="Repeat it: `full`, `img2img`, `imagic`, ... `--method list` names all.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Scenes.")] = 20,
    seed: SeedOption = 0,
    model: ModelOption = "demo",
    preset: PresetOption = "demo",
    set_: SetOption = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda` or `cuda:1`.")] = "cpu",
    judge: Annotated[
        str | None,
        typer.Option(
            help="A CLIP that no method was optimised with: folder or `owner/name@commit`. `demo` has one of its own."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, with intervals.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the pictures in this folder.")] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="Instead of scenes: a folder of colour photographs with a catalog.csv, turned gray first."),
    ] = None,
    perceptual: Annotated[
        bool, typer.Option(help="With --photos: LPIPS, FID and KID too (torchvision, torch-fidelity, their weights).")
    ] = False,
) -> None:
    """Measure the method and its rivals on rendered scenes whose colours are known.

    Scenes and prompts are drawn from the seed, the prompts' colours unrelated to the scene's own; the
    saved files are scored. Means with bootstrap 95% intervals.

    Example: `diffcolor study --task full-prompt --method full --method img2img --num 20 --json out/study.json`
    """
    import tempfile

    from diffcolor_core import preset as settings_preset
    from diffcolor_core.models import DEMO_JUDGE, load_checkpoint
    from diffcolor_core.study import METHODS, run_photographs, run_study, summarise
    from diffcolor_core.study.perceptual import Perceptual

    methods = method or ["full", "img2img", "imagic", "text-to-image", "stage1"]
    if methods == ["list"]:
        for name, known in METHODS.items():
            typer.echo(f"{name:22}{known.description}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        if perceptual and photos is None:
            raise ValueError("--perceptual compares photographs: give --photos")
        networks = Perceptual.load() if perceptual else None
        settings = settings_preset(preset, overrides_of(set_))
        checkpoint = load_checkpoint(model, device=device)
        judge = judge or (str(DEMO_JUDGE) if model == "demo" else None)
        judging = None if judge is None else load_checkpoint(model, clip=judge, device=device)
        with tempfile.TemporaryDirectory() as temporary, Progress(*columns, TimeElapsedColumn(), console=errors) as bar:
            line = bar.add_task("study", total=num * len(methods))

            def show(name: str, done: int, total: int) -> None:
                bar.update(line, description=name, completed=done, total=total)

            common: dict[str, Any] = {"methods": methods, "num": num, "seed": seed, "progress": show}
            common |= {"folder": keep or Path(temporary), "judge": judging}
            if photos is not None:
                figures = run_photographs(checkpoint, settings, photos, perceptual=networks, **common)
            else:
                figures = run_study(checkpoint, settings, task=task, **common)
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    summary = summarise(figures)
    for name, values in summary.items():
        title = f"{name}: {METHODS[name].description}"
        others = ("mean", "95% interval", "scenes", f"less {methods[0]}, 95% interval")
        table = Table(Column("figure", no_wrap=True), *others, title=title)
        for figure, value in values.items():
            difference = (
                f"{value['difference']['mean']:.4g} ({_range(value['difference'])})" if "difference" in value else ""
            )
            table.add_row(figure, f"{value['mean']:.4g}", _range(value), str(value["scenes"]), difference)
        console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(summary, indent=1) + "\n")


def _range(value: dict[str, Any]) -> str:
    return f"{value['low']:.4g} to {value['high']:.4g}"
