"""Commands that make colours: one picture, an archive, new colours for an archive."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cli.common import (
    GpusOption,
    ModelOption,
    NumActorsOption,
    OutputArgument,
    PresetOption,
    RayOption,
    RunIdOption,
    SeedOption,
    SetOption,
    app,
    console,
    errors,
    fail,
    overrides_of,
    print_table,
)


@app.command()
def colorize(
    image: Annotated[Path, typer.Argument(help="The scan: PNG, JPEG, TIFF, WebP, JPEG 2000, PGM, ...")],
    prompt: Annotated[str, typer.Option(help="What is in it: 'a ball and a box on a table before a wall'.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help="Colours to give: 'a *red* ball and a *blue* box ...'. Repeat it: one fit serves all."),
    ] = None,
    model: ModelOption = "demo",
    preset: PresetOption = "demo",
    set_: SetOption = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda` or `cuda:1`.")] = "cpu",
    image_format: Annotated[
        Literal["png", "tiff", "jpeg", "webp"],
        typer.Option("--format", help="`png` and `tiff` keep every bit; `jpeg` and `webp` are 8-bit access copies."),
    ] = "png",
    save_fit: Annotated[
        str | None, typer.Option(help="Keep the fit in this folder or URL, for later colours without fitting again.")
    ] = None,
) -> None:
    """Colorize one picture, without Prefect or Ray.

    Writes primary.png (colours from the prompt alone) and target-1.png, target-2.png, ... into OUT,
    each with the scan's metadata and marked as machine-colorized.

    Example: `diffcolor colorize scan.png --prompt "a ball and a box on a table before a wall" --target
    "a red ball and a blue box on a green table before a yellow wall" --out out/one`
    """
    from diffcolor_core import DiffColor, DivergedError, preset as settings_preset, read_scan
    from diffcolor_core.formats import SUFFIX, encode

    targets = target or []
    try:
        settings = settings_preset(preset, overrides_of(set_))
        scan = read_scan(image)
        pipe = DiffColor.from_pretrained(model, settings=settings, device=device)
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors) as bar:
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
        (out / name).write_bytes(encode(result.image, image_format, fit.provenance(result.prompt), scan.metadata))
        m = result.metrics
        figures = (f"{m['colorfulness']:.1f}", f"{m['clip_similarity']:.3f}", f"{m['p99_abs_delta_l']:.3f}")
        rows.append((out / name, result.prompt, *figures, f"{result.sampling_seconds:.1f}"))
    print_table(["file", "prompt", "colorfulness", "CLIP", "p99 |ΔL*|", "seconds"], rows)
    console.print(f"fitted in {fit.stage1_seconds + fit.stage2_seconds:.1f} s as: {fit.rewritten_prompt}", markup=False)


@app.command()
def run(
    archive: Annotated[str, typer.Argument(help="Folder or fsspec URL of the scans (s3://..., gs://...).")],
    output: Annotated[str, typer.Argument(help="Folder or fsspec URL for images and manifest.")],
    catalog: Annotated[
        str | None,
        typer.Option(
            help="CSV, JSONL or Parquet: image, context_prompt, target_prompt. Default: the archive's catalog.csv."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Context prompt of images for which the catalog has none.")] = None,
    model: ModelOption = "demo",
    preset: PresetOption = "demo",
    set_: SetOption = None,
    num_actors: NumActorsOption = 1,
    gpus_per_actor: GpusOption = 0.0,
    ray_address: RayOption = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per Prefect task.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    seed: SeedOption = 0,
    image_format: Annotated[
        Literal["png", "tiff"], typer.Option("--format", help="Of the pictures: lossless, at the scan's bit depth.")
    ] = "png",
    access_copy: Annotated[
        Literal["jpeg", "webp"] | None, typer.Option(help="Write a small lossy copy beside each picture.")
    ] = None,
    run_id: RunIdOption = None,
    keep_fits: Annotated[
        bool, typer.Option(help="Keep each fit beside the images: later prompts then need no fitting.")
    ] = True,
    retry: Annotated[
        Literal["failed", "quarantined"],
        typer.Option(help="What to try again besides what is not done: `failed`, or `quarantined` as well."),
    ] = "failed",
    commit_every: Annotated[int, typer.Option(min=1, help="Images per manifest part: what a crash may lose.")] = 8,
    image_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which an image's actor is killed: a decoder may hang.")
    ] = 3600.0,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="How often an image may kill its actor before it is quarantined.")
    ] = 3,
) -> None:
    """Colorize an archive: the Prefect flow `colorize-archive` in this process, on local Ray by default.

    Running the same command again does only what is not done. Ctrl-C commits what is finished and
    stops; a second one stops at once. Without PREFECT_API_URL, Prefect starts an embedded server for
    the time of the run.

    Example: `diffcolor run examples/archive out/demo`
    """
    _quiet_prefect()
    from diffcolor_core import preset as settings_preset
    from diffcolor_core.models import identify
    from flows.colorize_archive import colorize_archive
    from tasks.archive import read_catalog
    from tasks.planning import output_below
    from tasks.storage import Store

    try:
        overrides = overrides_of(set_)
        settings_preset(preset, overrides)
        identify(model)
        if not Store(archive).exists():
            raise FileNotFoundError(f"there is no archive at {archive!r}")
        output_below(Store(archive), Store(output))
        for _ in read_catalog(Store(archive), catalog) or ():
            pass
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    _run_flow(
        colorize_archive,
        archive=archive,
        output=output,
        catalog=catalog,
        prompt=prompt,
        model=model,
        preset=preset,
        overrides=overrides or None,
        num_actors=num_actors,
        gpus_per_actor=gpus_per_actor,
        ray_address=ray_address,
        shard_size=shard_size,
        limit=limit,
        seed=seed,
        image_format=image_format,
        access_copy=access_copy,
        run_id=run_id,
        keep_fits=keep_fits,
        retry=retry,
        commit_every=commit_every,
        image_timeout_seconds=image_timeout,
        max_attempts=max_attempts,
    )


@app.command()
def recolor(
    output: OutputArgument,
    catalog: Annotated[
        str, typer.Option(help="CSV, JSONL or Parquet: image, target_prompt; context_prompt where it is another.")
    ],
    num_actors: NumActorsOption = 1,
    gpus_per_actor: GpusOption = 0.0,
    ray_address: RayOption = None,
    run_id: RunIdOption = None,
) -> None:
    """Give images of an output new colours from their kept fits: the Prefect flow `recolor-archive`.

    Adds variants to the manifest. Archive, model, settings and seed are those of the last run. An image
    without a fit is fitted first.

    Example: `diffcolor recolor out/demo --catalog new_targets.csv`
    """
    _quiet_prefect()
    from flows.recolor_archive import recolor_archive
    from tasks.archive import RECOLOR_COLUMNS, read_catalog
    from tasks.lease import last_record
    from tasks.storage import Store

    try:
        last_record(Store(output))  # an address that no store answers at is told before the flow begins
        for _ in read_catalog(Store(output), catalog, RECOLOR_COLUMNS) or ():
            pass
    except (ValueError, OSError) as error:
        raise fail(error, 2) from error
    how = {"num_actors": num_actors, "gpus_per_actor": gpus_per_actor, "ray_address": ray_address, "run_id": run_id}
    _run_flow(recolor_archive, output=output, catalog=catalog, **how)


def _quiet_prefect() -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")  # the progress bar tells the rest
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def _run_flow(flow: Any, *, output: str, **parameters: Any) -> None:
    """Run a flow in this process, print its summary, end with its exit code."""
    from flows.local_prefect import embed_prefect
    from flows.stopping import stoppable
    from tasks.errors import CatalogError, ManifestError

    embed_prefect()
    with stoppable() as stop:
        try:
            summary = flow(output=output, **parameters)
        except (CatalogError, ManifestError) as error:
            raise fail(error, 2) from error
        except KeyboardInterrupt:
            raise typer.Exit(stop.exit_code or 130) from None
        except Exception as error:  # the flow has logged its own trace; after a stop, Prefect's server may be gone
            raise fail(error, stop.exit_code or 1) from error
    console.print(
        f"{summary['ok']} ok, {summary['quarantined']} quarantined, {summary['failed']} failed "
        f"({summary['done_before']} of them done before)"
    )
    console.print(f"images and manifest: {output}", markup=False, soft_wrap=True)
    if summary["quarantined"] or summary["failed"]:
        raise typer.Exit(3)
