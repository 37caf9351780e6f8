"""What the method costs on a GPU, at true sizes with random weights: is it right, how fast, is the GPU kept busy?

python -m benchmarks.gpu correct --json benchmarks/results/gpu.json
python -m benchmarks.gpu speed --json benchmarks/results/gpu.json
python -m benchmarks.gpu busy --json benchmarks/results/gpu.json       (needs an S3 server; see support/s3_server.py)

No GPU was at hand when this was written, so the times that the commands take are not known. With `--device cpu` they
run on a CPU too, to test them. References: R0 is the paper's recipe in float32, one photograph at a time; R1 the same
in bfloat16 with TF32. The presets have a tiny VAE beside the checkpoint, which the references do not use.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import fsspec
import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny

from benchmarks.flops import Counter, meta_checkpoint
from diffcolor_core import DiffColor, Picture, preset
from diffcolor_core.colorizer import ToFit
from diffcolor_core.config import Settings
from diffcolor_core.fits import Fit
from diffcolor_core.models import load_checkpoint
from diffcolor_study.methods import scaled_steps
from support.checkpoints import build_networks, save_architecture
from support.pictures import gray_picture
from support.record import record
from support.s3_server import serving
from tasks.manifest import query
from tasks.storage import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
JsonOption = Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")]
DeviceOption = Annotated[str, typer.Option(help="cuda or cpu.")]
ScaleOption = Annotated[float, typer.Option(help="Width of SD 1.5's networks; 1 is their true size.")]
SizeOption = Annotated[int | None, typer.Option(help="Working size in pixels; by default the model's own, 512.")]

CONTEXT, TARGET = "a ball on a table", "a red ball on a blue table"
PACKAGES = ("torch", "diffusers", "transformers")
BUSY_SQL = """
    select count(*), sum(computing), epoch(max(finished)) - epoch(min(started)) from (
        select max(stage1_seconds + stage2_seconds) + sum(sampling_seconds) as computing,
            min(started_at) as started, max(finished_at) as finished
        from results where status = 'ok' group by image_key
    )
"""


class Contender(NamedTuple):
    """A preset, what it computes in, whether float32 products may round to TF32, and whether steps are compiled.

    parts: a photograph is measured at these parts of its steps. Its time grows evenly with them, which gives that of
    all steps; if the second part is 1, that is what was measured.
    """

    preset: str
    dtype: torch.dtype
    tf32: bool = True
    parts: tuple[float, float] = (0.0, 1.0)
    compiled: bool = False


CONTENDERS = {
    "R0": Contender("paper", torch.float32, tf32=False, parts=(0.0, 0.04)),
    "R1": Contender("paper", torch.bfloat16, parts=(0.0, 0.04)),
    "standard": Contender("standard", torch.bfloat16, parts=(0.0, 0.25)),
    "standard, compiled": Contender("standard", torch.bfloat16, parts=(0.0, 0.25), compiled=True),
    "fast": Contender("fast", torch.bfloat16),
    "fast, compiled": Contender("fast", torch.bfloat16, compiled=True),
    "instant": Contender("instant", torch.bfloat16),
}


def synchronize(device: str) -> None:
    """Wait for the device, so that a time is that of the work and not of its launch."""
    if device == "cuda":
        torch.cuda.synchronize()


def scan(number: int, height_px: int = 512, width_px: int = 512) -> bytes:
    """A gray picture as PNG."""
    pixels = gray_picture(height_px, width_px, seed=number)
    return Picture(np.repeat(pixels[..., None], 3, axis=-1)).encode_png()


def save_model(folder: Path, scale: float) -> Path:
    """SD 1.5 with random weights, and beside it a tiny VAE as large as TAESD."""
    AutoencoderTiny().save_pretrained(save_architecture(folder, "1.5", scale) / "tiny_vae")
    return folder


def fit_all(pipe: DiffColor, photographs: Sequence[ToFit]) -> list[Fit]:
    """One alone, several as a batch. Raises DivergedError."""
    if len(photographs) == 1:
        return [pipe.fit(*photographs[0][:2], seed=photographs[0].seed)]
    fits = []
    for fit in pipe.fit_batch(photographs):
        if not isinstance(fit, Fit):
            raise fit
        fits.append(fit)
    return fits


@app.command()
def correct(
    model: Annotated[str, typer.Option(help="A model that has learned colours.")] = "demo",
    steps: Annotated[float, typer.Option(help="Part of the steps of preset `standard` that is taken.")] = 0.1,
    device: DeviceOption = "cuda",
    json_file: JsonOption = None,
) -> None:
    """Same bits with other neighbours? How far from a fit alone, in bfloat16 from float32, compiled from plain?"""
    settings = scaled_steps(preset("standard", {"stage1.stop_below": 0.0}), steps)
    photographs = [ToFit(scan(number), CONTEXT, number) for number in range(4)]

    def chromas(dtype: torch.dtype, *asked: int, compiled: bool = False) -> list[torch.Tensor]:
        pipe = DiffColor(replace(load_checkpoint(model, device=device, dtype=dtype), compiled=compiled), settings)
        fits = fit_all(pipe, [photographs[number] for number in asked])
        return [pipe.recolor(fit, TARGET).chroma for fit in fits]

    exact = chromas(torch.float32, 0, 1)
    neighbours, alone = chromas(torch.float32, 0, 2), chromas(torch.float32, 0)
    rough, compiled = chromas(torch.bfloat16, 0, 1), chromas(torch.float32, 0, 1, compiled=True)
    figures = {
        "same_bits_with_other_neighbours": bool(torch.equal(exact[0], neighbours[0])),
        "delta_e_alone": float((exact[0] - alone[0]).norm(dim=0).mean()),
        "delta_e_bfloat16": float((exact[0] - rough[0]).norm(dim=0).mean()),
        "delta_e_compiled": float((exact[0] - compiled[0]).norm(dim=0).mean()),
        "delta_e_other_photograph": float((exact[0] - exact[1]).norm(dim=0).mean()),
    }
    record(json_file, "correct", {"device": device, **figures}, *PACKAGES, gpu=gpu_name(device))


@app.command()
def speed(
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Sizes of batches; 1, 4, 8, 16 by default.")
    ] = None,
    contenders: Annotated[list[str] | None, typer.Option("--of", help="R0, R1 or presets; all by default.")] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each, one after the other in turns.")] = 5,
    peak_tflops: Annotated[float, typer.Option(help="Nominal, dense, bfloat16; an H200's by default.")] = 989,
    scale: ScaleOption = 1.0,
    size_px: SizeOption = None,
    device: DeviceOption = "cuda",
    json_file: JsonOption = None,
) -> None:
    """Seconds a photograph, peak memory and MFU of each preset and reference, and the latency of a recolour.

    A photograph is a fit and one new prompt, after the scan is decoded and before it is assembled. `fast` and `instant`
    are measured in full. One whole run of `standard` checks the times that are worked out from a part of the steps.
    """
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    matmul = matmul_tflops(device)
    chosen = contenders or list(CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), scale)
        for _ in range(repeats):
            for name in chosen:
                for batch in batches or (1, 4, 8, 16):
                    if batch == 1 or CONTENDERS[name].preset != "paper":  # all weights: one at a time
                        row = measured(Path(folder), CONTENDERS[name], batch, size_px, device)
                        rows.setdefault((name, batch), []).append(row)
                        print(name, batch, row, flush=True)
        in_full = CONTENDERS["standard"]._replace(parts=(0.0, 1.0))
        whole = measured(Path(folder), in_full, 1, size_px, device)
    with torch.device("meta"):
        counter = Counter(meta_checkpoint(build_networks("1.5", scale), tiny_vae=AutoencoderTiny()), size_px)
    of_batches: dict[str, dict[str, dict[str, float]]] = {name: {} for name in chosen}
    for (name, batch), found in rows.items():
        median = {key: statistics.median(row[key] for row in found) for key in found[0]}
        median["photographs_per_hour"] = 3600 / median["seconds"]
        # what is computed a second time to save memory is no use of the GPU
        stages = counter.stages(preset(CONTENDERS[name].preset, {f"stage{n}.recompute": False for n in (1, 2)}))
        tflop = batch * sum(stages[s].flop for s in ("stage 1", "embedding", "fine-tune")) / 1e12
        if tflop:
            achieved = tflop / median["steps_seconds"]
            median |= {"mfu_nominal": achieved / peak_tflops, "mfu_measured": achieved / matmul}
        of_batches[name][str(batch)] = median
    best = {name: max(row["photographs_per_hour"] for row in found.values()) for name, found in of_batches.items()}
    over = {
        name: {f"over_{reference}": best[name] / best[reference] for reference in ("R0", "R1") if reference in best}
        for name in chosen
    }
    figures = {"device": device, "scale": scale, "repeats": repeats, "matmul_tflops": matmul}
    figures |= {name: of_batches[name] | over[name] for name in chosen} | {"standard_in_full": whole}
    record(json_file, "speed", figures, *PACKAGES, gpu=gpu_name(device))


def measured(folder: Path, contender: Contender, batch: int, size_px: int | None, device: str) -> dict[str, float]:
    """Seconds and bytes of a photograph, in a batch of this size."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = contender.tf32
    checkpoint = load_checkpoint(str(folder), device=device, dtype=contender.dtype)
    pipe = DiffColor(replace(checkpoint, compiled=contender.compiled))
    settings = preset(contender.preset, {"stage1.stop_below": 0.0, "working_size_px": size_px})
    photographs = [ToFit(scan(number), CONTEXT, number) for number in range(batch)]

    def seconds_of(settings: Settings) -> tuple[float, float, Fit]:
        pipe.settings = settings
        synchronize(device)
        start = time.perf_counter()
        fits = fit_all(pipe, photographs)
        synchronize(device)
        middle = time.perf_counter()
        for fit in fits:
            pipe.recolor(fit, TARGET)
        synchronize(device)
        return middle - start, time.perf_counter() - middle, fits[-1]

    parts = contender.parts
    seconds_of(scaled_steps(settings, 0.01))  # warms up
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    few, recolor, _ = seconds_of(scaled_steps(settings, parts[0]))
    more, _, fit = seconds_of(scaled_steps(settings, parts[1]))
    start = time.perf_counter()
    pipe.recolor(fit, TARGET)
    synchronize(device)
    one_recolor = time.perf_counter() - start
    steps_seconds = (more - few) / (parts[1] - parts[0])
    fit_seconds = few + steps_seconds * (1 - parts[0])
    return {
        "seconds": (fit_seconds + recolor) / batch,
        "steps_seconds": steps_seconds,
        "recolor_seconds": one_recolor,
        "fit_over_recolor": fit_seconds / batch / one_recolor,
    } | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


def matmul_tflops(device: str, side: int = 8192) -> float:
    """What the device reaches in one large matrix product in bfloat16: the peak that can be had."""
    side = side if device == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return float(2 * side**3 / min(times) / 1e12)


def gpu_name(device: str) -> str | None:
    """As its driver calls it; None for a CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


@app.command()
def busy(
    images: Annotated[int, typer.Option(help="Scans of 24 megapixels.")] = 24,
    preset_name: Annotated[str, typer.Option("--preset", help="Settings of the run.")] = "fast",
    batch: Annotated[int, typer.Option(help="Photographs in a batch.")] = 8,
    side_px: Annotated[int, typer.Option(help="Longer side of a scan.")] = 6000,
    scale: ScaleOption = 1.0,
    size_px: SizeOption = None,
    device: DeviceOption = "cuda",
    json_file: JsonOption = None,
) -> None:
    """The part of a run's time, S3 to S3 with one actor, in which the actor fits or samples. By the run's manifest."""
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary, "server"), "busy"):
        s3 = fsspec.filesystem("s3")
        for number in range(images):
            s3.pipe_file(f"busy/archive/{number}.png", scan(number, side_px * 2 // 3, side_px))
        model = save_model(Path(temporary, "model"), scale)
        working_size = [] if size_px is None else ["--set", f"working_size_px={size_px}"]
        command = [
            sys.executable,
            "-c",
            "from flows.cli import app; app()",
            "run",
            "s3://busy/archive",
            "s3://busy/out",
        ]
        command += ["--model", str(model), "--preset", preset_name, "--batch", str(batch), "--prompt", CONTEXT]
        command += ["--num-actors", "1", "--no-report", "--device", device, *working_size]
        subprocess.run(command, check=True)
        ((done, computing, span),) = query(Store("s3://busy/out"), BUSY_SQL).fetchall()
    figures = {
        "device": device,
        "scale": scale,
        "images": done,
        "megapixels": side_px**2 * 2 / 3e6,
        "preset": preset_name,
    }
    figures |= {"batch": batch, "seconds": span, "busy_fraction": computing / span}
    record(json_file, "busy", figures, *PACKAGES, gpu=gpu_name(device))


if __name__ == "__main__":
    app()
