"""The command `diffcolor`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Colorize black-and-white photographs by text (DiffColor, arXiv 2308.01655).

    `colorize` does one picture, `run` a whole archive, `query` and `status` read what a run has left.

    Exit codes: **0** all done; **1** failed; **2** wrong usage; **3** a run finished, but some of its
    images were quarantined or failed: `diffcolor query OUTPUT "select image_key, error_message from
    results where status <> 'ok'"` names them.""",
)
console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option(help="`demo`, a local diffusers folder, or a hub id at a commit: `owner/name@commit`.")
]
PresetOption = Annotated[
    str, typer.Option(help="`demo`: seconds on a CPU, for the demo model. `paper`: 1500/500/1000 steps, a GPU's work.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of every random draw: same seed, same bytes.")]
NumActorsOption = Annotated[int, typer.Option(min=1, help="Ray actors: images worked on at a time.")]
GpusOption = Annotated[float, typer.Option(min=0, help="GPUs for each; 0 runs on the CPU.")]
RayOption = Annotated[str | None, typer.Option(help="An existing Ray cluster. Default: a local Ray for this run.")]
RunIdOption = Annotated[str | None, typer.Option(help="Name of the run in the manifest. Default: its start time.")]
OutputArgument = Annotated[str, typer.Argument(help="The folder (or fsspec URL) that `diffcolor run` wrote to.")]


def _fail(error: Exception, code: int) -> typer.Exit:
    errors.print(f"diffcolor: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


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
    from diffcolor_core import DiffColor, preset as settings_preset, read_scan
    from diffcolor_core.formats import SUFFIX, encode

    targets = target or []
    try:
        settings = settings_preset(preset)
        scan = read_scan(image)
        pipe = DiffColor.from_pretrained(model, settings=settings, device=device)
    except (ValueError, OSError) as error:
        raise _fail(error, 2) from error
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
            raise _fail(error, 2) from error
        if save_fit is not None:
            fit.save(save_fit)
        results = {f"primary{SUFFIX[image_format]}": pipe.recolor(fit)}
        for number, text in enumerate(targets, 1):
            show("recolor", number - 1, len(targets))
            results[f"target-{number}{SUFFIX[image_format]}"] = pipe.recolor(fit, text)
            show("recolor", number, len(targets))
    table = Table("file", "prompt", "colorfulness", "CLIP", "p99 |ΔL*|", "seconds")
    for name, result in results.items():
        (out / name).write_bytes(encode(result.image, image_format, fit.provenance(result.prompt), scan.metadata))
        m = result.metrics
        figures = (f"{m['colorfulness']:.1f}", f"{m['clip_similarity']:.3f}", f"{m['p99_abs_delta_l']:.3f}")
        table.add_row(str(out / name), result.prompt, *figures, f"{result.sampling_seconds:.1f}")
    console.print(table)
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
        float | None, typer.Option(min=1, help="Seconds after which an image's actor is killed. Default: never.")
    ] = None,
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
    from tasks.storage import Store

    try:
        settings_preset(preset)
        identify(model)
        if not Store(archive).exists():
            raise FileNotFoundError(f"there is no archive at {archive!r}")
        for _ in read_catalog(Store(archive), catalog) or ():
            pass
    except (ValueError, OSError) as error:
        raise _fail(error, 2) from error
    _run_flow(
        colorize_archive,
        archive=archive,
        output=output,
        catalog=catalog,
        prompt=prompt,
        model=model,
        preset=preset,
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

    Adds variants to the manifest. Archive, model, preset and seed are those of the last run. An image
    without a fit is fitted first.

    Example: `diffcolor recolor out/demo --catalog new_targets.csv`
    """
    _quiet_prefect()
    from flows.recolor_archive import recolor_archive
    from tasks.archive import RECOLOR_COLUMNS, read_catalog
    from tasks.storage import Store

    try:
        for _ in read_catalog(Store(output), catalog, RECOLOR_COLUMNS) or ():
            pass
    except (ValueError, OSError) as error:
        raise _fail(error, 2) from error
    how = {"num_actors": num_actors, "gpus_per_actor": gpus_per_actor, "ray_address": ray_address, "run_id": run_id}
    _run_flow(recolor_archive, output=output, catalog=catalog, **how)


def _quiet_prefect() -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")  # the progress bar tells the rest
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def _run_flow(flow: Any, *, output: str, **parameters: Any) -> None:
    """Run a flow in this process, print its summary, end with its exit code."""
    from flows.stopping import stoppable
    from tasks.archive import CatalogError
    from tasks.manifest import ManifestError

    try:
        with stoppable():
            summary = flow(output=output, **parameters)
    except (CatalogError, ManifestError) as error:
        raise _fail(error, 2) from error
    except Exception as error:  # the flow has logged its own trace
        raise _fail(error, 1) from error
    console.print(
        f"{summary['ok']} ok, {summary['quarantined']} quarantined, {summary['failed']} failed "
        f"({summary['done_before']} of them done before)"
    )
    console.print(f"images and manifest: {output}", markup=False, soft_wrap=True)
    if summary["quarantined"] or summary["failed"]:
        raise typer.Exit(3)


@app.command()
def query(
    output: OutputArgument,
    sql: Annotated[str, typer.Argument(help="One SELECT over the views `results` and `attempts`.")],
    format: Annotated[Literal["table", "json", "csv"], typer.Option(help="How to print the answer.")] = "table",
) -> None:
    """Ask the manifest a question in SQL (DuckDB, read-only).

    View `results` has the latest row of each image and variant, `attempts` every row ever written;
    `describe results` lists the columns.

    Example: `diffcolor query out/demo "select image_key, target_prompt, colorfulness from results"`
    """
    from tasks.manifest import ManifestError, query as ask
    from tasks.storage import Store

    try:
        relation = ask(Store(output), sql)
        rows = relation.fetchall()
    except ManifestError as error:
        raise _fail(error, 2) from error
    names = relation.columns
    if format == "json":
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
    elif format == "csv":
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        _print_table(names, rows)


def _print_table(names: list[str], rows: list[tuple[Any, ...]]) -> None:
    from rich.markup import escape

    table = Table(*map(escape, names))
    for row in rows:
        table.add_row(
            *(
                "" if value is None else escape(f"{value:.4g}" if isinstance(value, float) else str(value))
                for value in row
            )
        )
    console.print(table)


@app.command()
def status(output: OutputArgument) -> None:
    """What has been done in OUTPUT: counts by run and status, the errors, the time it took."""
    from tasks.manifest import ManifestError, query as ask
    from tasks.storage import Store

    store = Store(output)
    questions = (
        """select run_id as run, status, count(*) as variants, count(distinct image_key) as images,
               min(started_at)::timestamp(0) as started, max(finished_at)::timestamp(0) as finished,
               avg(total_seconds) as seconds_each
           from results group by all order by started, status""",
        """select error_class as error, count(*) as variants, any_value(image_key) as for_example,
               any_value(error_message) as message
           from results where status <> 'ok' group by all order by variants desc limit 20""",
        """select count(*) as fits_kept, sum(bytes) / 1e6 as megabytes
           from (select max(fit_bytes) as bytes from attempts where fit_uri is not null group by fit_uri)
           having count(*) > 0""",
    )
    try:
        for sql in questions:
            relation = ask(store, sql)
            rows = relation.fetchall()
            if rows:
                _print_table(relation.columns, rows)
    except ManifestError as error:
        raise _fail(error, 2) from error


@app.command()
def verify(
    output: OutputArgument,
    repair: Annotated[bool, typer.Option(help="Queue again what is missing or changed, for the next `run`.")] = False,
    read_files: Annotated[bool, typer.Option(help="Compare every image's hash, not only its existence.")] = True,
) -> None:
    """Does OUTPUT hold what its manifest says? Every row's file with its hash, every file with its row.

    Exit code 3 if anything is not as it must be. Extra files are named, never deleted.

    Example: `diffcolor verify out/demo --repair && diffcolor run examples/archive out/demo`
    """
    from tasks.lease import OutputBusyError
    from tasks.manifest import ManifestError
    from tasks.storage import Store
    from tasks.verify import repair as mend, verify as check

    try:
        findings = list(check(Store(output), read_files=read_files))
        if findings:
            _print_table(["finding", "file", "what"], [(f.kind, f.key, f.detail) for f in findings])
        queued = mend(Store(output), findings) if repair and findings else 0
    except (ManifestError, OutputBusyError) as error:
        raise _fail(error, 2) from error
    console.print(f"{len(findings)} findings, {queued} variants queued again" if findings else "all is as it must be")
    if findings and not repair:
        raise typer.Exit(3)


@app.command()
def compact(output: OutputArgument) -> None:
    """Write OUTPUT's manifest anew into few parts, for faster queries; the rows stay the same.

    Runs and readers may go on meanwhile. The replaced parts are deleted by the next compaction.

    Example: `diffcolor compact s3://museum/colorized`
    """
    from tasks.manifest import ManifestError, compact as shrink
    from tasks.storage import Store

    try:
        done = shrink(Store(output))
    except ManifestError as error:
        raise _fail(error, 2) from error
    console.print(
        f"{done.rows} rows: {done.parts_before} parts are now {done.parts_after}; {done.deleted} replaced ones deleted"
    )


@app.command()
def expire_fits(
    output: OutputArgument,
    older_than_days: Annotated[float, typer.Option(min=0, help="Since a variant was last made from the fit.")],
) -> None:
    """Delete kept fits that have not been used for so long; `status` tells their size.

    Images and rows stay. A new prompt for such an image fits again.

    Example: `diffcolor expire-fits out/demo --older-than-days 90`
    """
    from tasks.manifest import ManifestError
    from tasks.storage import Store
    from tasks.verify import expire_fits as expire

    try:
        done = expire(Store(output), older_than_days)
    except ManifestError as error:
        raise _fail(error, 2) from error
    console.print(f"{done.num_fits} fits deleted, {done.num_bytes / 1e6:.1f} MB")


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
        settings = settings_preset(preset)
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
        raise _fail(error, 2) from error
    summary = summarise(figures)
    for name, values in summary.items():
        table = Table("figure", "mean", "95% interval", "scenes", title=f"{name}: {METHODS[name].description}")
        for figure, value in values.items():
            table.add_row(
                figure, f"{value['mean']:.4g}", f"{value['low']:.4g} to {value['high']:.4g}", str(value["scenes"])
            )
        console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    app()
