"""Commands that make colours: for one picture, for an archive, and new ones for an archive."""

import json
import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from diffcolor_core.prompts import GENERIC_PROMPT
from flows.cli.common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    OutputArgument,
    PresetOption,
    SeedOption,
    SetOption,
    app,
    console,
    device_of,
    errors_told,
    fail,
    notes,
    print_table,
)
from flows.cli.options import checked, flag, overrides_of, with_flags
from tasks.layout import REPORT_PAGE
from tasks.logs import log_as_json
from tasks.options import RecolorOptions, RunOptions, flow_arguments
from tasks.records import RunConfig

BEFORE = "Before a run"
"""The panel of flags that only tell what a run would do."""
SAMPLES = Path(__file__).parents[2] / "examples"
DEMO_MODEL = (
    "the model `demo` has seen nothing but six kinds of solids on a table, so on other pictures its colours mean "
    "nothing. For real photographs leave --model out, or give a larger model, for example "
    "stable-diffusion-v1-5/stable-diffusion-v1-5"
)


@app.command()
def colorize(
    image: Annotated[Path, typer.Argument(help="The scan: PNG, JPEG, TIFF, WebP, JPEG 2000, PGM, ...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results. It is made if need be.")],
    prompt: Annotated[
        str, typer.Option(help="What is in it: `a church behind trees beside a river`.")
    ] = GENERIC_PROMPT,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Colours to give: 'a *red* ball and a *blue* box ...'. Repeatable: one fit serves all."),
    ] = None,
    model: ModelOption = "photo",
    preset: PresetOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_format: Annotated[
        Literal["png", "tiff", "jpeg", "webp"],
        typer.Option("--format", help="`png` and `tiff` keep every bit; `jpeg` and `webp` are 8-bit access copies."),
    ] = "png",
    save_fit: Annotated[
        str | None, typer.Option(help="Keep the fit in this folder or URL, for later colours without fitting again.")
    ] = None,
) -> None:
    """Colorize one picture, without Prefect or Ray.

    Writes primary.png (colours from the prompt alone) and target-1.png, target-2.png, ... into OUTPUT,
    each with the scan's metadata and marked as machine-colorized.

    Example: `diffcolor colorize scan.jpg --prompt "a wooden church on a hill under a sky" --target
    "a brown wooden church on a green hill under a blue sky" -o out/one`
    """
    if not image.exists():
        raise fail(f"there is no picture at '{image}'", 2)
    from diffcolor_core import DiffColor, DivergedError, preset as settings_preset, read_scan
    from diffcolor_core.config import preset_for
    from diffcolor_scans.formats import SUFFIX, encode

    targets = target or []
    try:
        settings = settings_preset(preset or preset_for(model), overrides_of(set_))
        scan = read_scan(image)
        pipe = DiffColor.from_pretrained(model, settings=settings, device=device_of(device), dtype=dtype)
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    _warn_of_demo(model, str(image))
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notes) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        try:
            fit = pipe.fit(scan, prompt, seed=seed, progress=show)
        except ValueError as error:
            raise fail(error, 2) from error
        except DivergedError as error:
            raise fail(error, 1) from error
        if save_fit is not None:
            fit.save(save_fit)
        results = {f"primary{SUFFIX[image_format]}": pipe.recolor(fit)}
        for number, text in enumerate(targets, 1):
            show("recolor", number - 1, len(targets))
            results[f"target-{number}{SUFFIX[image_format]}"] = pipe.recolor(fit, text)
            show("recolor", number, len(targets))
    rows = []
    for name, result in results.items():
        (output / name).write_bytes(encode(result.image, image_format, fit.provenance(result.prompt), scan.metadata))
        m = result.metrics
        figures = (f"{m['colorfulness']:.1f}", f"{m['clip_similarity']:.3f}", f"{m['p99_abs_delta_l']:.3f}")
        rows.append((output / name, result.prompt, *figures, f"{result.sampling_seconds:.1f}"))
    print_table(["file", "prompt", "colorfulness", "CLIP", "p99 |ΔL*|", "seconds"], rows)
    notes.print(f"fitted in {fit.stage1_seconds + fit.stage2_seconds:.1f} s as: {fit.rewritten_prompt}", markup=False)


@app.command()
@with_flags(RunOptions)
def run(
    context: typer.Context,
    archive: Annotated[
        str | None, typer.Argument(metavar="ARCHIVE", help="Folder or URL of the scans.", show_default=False)
    ] = None,
    destination: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT", help="Folder or URL for the results; the same as -o.", show_default=False),
    ] = None,
    output: Annotated[str | None, flag("output")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell what the run would do and cost; write nothing.", rich_help_panel=BEFORE),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: colorize three images on trial, here.", rich_help_panel=BEFORE),
    ] = False,
    seconds_per_image: Annotated[
        float | None,
        typer.Option(min=0, help="With --dry-run: seconds of an image on one actor.", rich_help_panel=BEFORE),
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="With --dry-run: tells the cost too.", rich_help_panel=BEFORE)
    ] = None,
    **flags: Any,
) -> None:
    """Colorize an archive: the Prefect flow `colorize-archive` in this process, on local Ray by default.

    Running the same command again does only what is not done. Ctrl-C commits what is finished and stops; a second
    one stops at once. Without PREFECT_API_URL, a Prefect server runs as long as the run does.

    `--dry-run` reads the headers of what is to be done and takes seconds and bytes from what OUTPUT has measured: as a
    table on a terminal, else as one JSON object.

    Exit codes: **0** all done; **1** failed; **2** wrong usage; **3** done with quarantined or failed images; **130**
    stopped by Ctrl-C; **143** stopped by SIGTERM or `--max-hours`.

    Example: `diffcolor run examples/archive out/demo --dry-run && diffcolor run examples/archive out/demo`
    """
    if destination and context.get_parameter_source("output").name == "COMMANDLINE":  # type: ignore[union-attr]
        raise fail(f"the output is given twice, as {destination!r} and as -o {output!r}: give one", 2)
    what = {"archive": archive, "output": destination or output}
    for name, value in what.items():
        if not value:
            raise fail(f"no {name}: write `diffcolor run ARCHIVE OUTPUT`, or set {name} in diffcolor.toml", 2)
    if dry_run:
        _tell_estimate(what | flags, probe, seconds_per_image, price_per_gpu_hour)
        return
    if probe or seconds_per_image is not None or price_per_gpu_hour is not None:
        raise fail("--probe, --seconds-per-image and --price-per-gpu-hour go with --dry-run: add it", 2)
    _run_flow("colorize_archive", RunOptions, **what, **flags)


@app.command()
@with_flags(RecolorOptions)
def recolor(output: OutputArgument, **flags: Any) -> None:
    """Give images of an output new colours from their kept fits: the Prefect flow `recolor-archive`.

    Adds variants to the manifest. Archive, model, settings and seed are those of the last run. An image without a
    fit is fitted first.

    Example: `diffcolor recolor out/demo --catalog new_targets.csv`
    """
    _run_flow("recolor_archive", RecolorOptions, output=output, **flags)


def _tell_estimate(
    given: dict[str, Any], probe: bool, seconds_per_image: float | None, price_per_gpu_hour: float | None
) -> None:
    """Print what a run would do and cost."""
    from tasks.progress import counted
    from tasks.runs import open_run

    with errors_told(), open_run(checked(RunOptions, **given)) as run, counted(notes, "reading headers") as show:
        from tasks.estimate import estimate

        _warn_of_demo(run.config.options.model, run.config.options.archive)
        told = estimate(
            run,
            probe=probe,
            seconds_per_image=seconds_per_image,
            price_per_gpu_hour=price_per_gpu_hour,
            progress=show,
        )
    if console.is_terminal:
        print_table(["", ""], [(name.replace("_", " "), value) for name, value in vars(told).items()])
    else:
        typer.echo(json.dumps(vars(told)))


def _run_flow(name: str, kind: type[RunOptions | RecolorOptions], **given: Any) -> None:
    """Check what is asked for, run the flow in this process, print its summary, end with its exit code."""
    from flows.stopping import stoppable
    from tasks.errors import ManifestError
    from tasks.runs import open_run
    from tasks.storage import Store

    with stoppable() as stop, ExitStack() as stack:
        try:
            if given.get("log_format") == "json":
                log_as_json(given.get("run_id"), stray_lines=True)
            options = checked(kind, **given)
            run = stack.enter_context(open_run(options))
        except (ValueError, OSError) as error:
            raise fail(error, 2) from error
        _warn_of_demo(run.config.options.model, run.config.options.archive)
        if kind is RunOptions:  # a recolouring keeps the fits that there are
            _tell_size_of_fits(run.config)
        from flows.local_prefect import start_prefect

        try:
            wait_for_prefect = start_prefect()
            flow = getattr(import_module(f"flows.{name}"), name)  # slow: Prefect, while its server starts
            wait_for_prefect()
            summary = flow(**flow_arguments(options))
        except ManifestError as error:
            raise fail(error, 2) from error
        except KeyboardInterrupt:
            raise typer.Exit(stop.exit_code or 130) from None
        except Exception as error:  # the flow has logged its own trace
            raise fail(error, stop.exit_code or 1) from error
    notes.print(
        f"{summary['ok']} ok, {summary['quarantined']} quarantined, {summary['failed']} failed "
        f"({summary['done_before']} of them done before)"
    )
    notes.print(f"images and manifest: {options.output}", markup=False, soft_wrap=True)
    if options.report and (output := Store(options.output)).has(REPORT_PAGE):
        notes.print(f"to look at: {output.uri(REPORT_PAGE)}", markup=False, soft_wrap=True)
    if summary["quarantined"] or summary["failed"]:
        raise typer.Exit(3)


def _tell_size_of_fits(config: RunConfig) -> None:
    """Say what the fits will take, or why none are kept although nobody said so."""
    size = f"{config.fit_bytes / 1e6:,.0f} MB"
    if config.options.keep_fits:
        notes.print(f"each image's fit takes {size} of the output; --no-keep-fits keeps none", highlight=False)
    else:
        notes.print(f"no fits are kept; with --keep-fits each image's takes {size}", highlight=False)


def _warn_of_demo(model: str, scans: str) -> None:
    """Say what the demo model is, unless the scans are those that it was made for."""
    if model == "demo" and SAMPLES not in Path(os.path.realpath(scans)).parents:
        notes.print(f"diffcolor: {DEMO_MODEL}", style="yellow", markup=False, highlight=False, soft_wrap=True)
