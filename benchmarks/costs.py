"""What fits, recolourings and large scans cost in time and memory.

python -m benchmarks.costs recolor --json benchmarks/results/costs.json                          (3 minutes)
python -m benchmarks.costs recolor --preset paper --scenes 1 --json benchmarks/results/costs.json  (8 minutes)
python -m benchmarks.costs large --json benchmarks/results/costs.json                            (3 minutes)
python -m benchmarks.costs assembly --json benchmarks/results/costs.json                         (3 minutes)
python -m benchmarks.costs batch --json benchmarks/results/costs.json                            (8 minutes)
python -m benchmarks.costs true-sizes --json benchmarks/results/costs.json    (10 minutes, 20 GB of memory)
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from diffcolor_core import DiffColor, Picture, preset
from diffcolor_core.adapters import trainable_copy
from diffcolor_core.config import Settings
from diffcolor_core.models import Checkpoint, load_checkpoint
from diffcolor_core.optimising import optimise
from diffcolor_core.stage1 import Texts, prior_loss
from diffcolor_core.stage2 import reconstruction_loss
from diffcolor_scans.color import lab_to_linear, srgb_to_lab
from diffcolor_scans.formats import encode
from diffcolor_scans.images import Scan, assemble, resize
from diffcolor_study.cases import draw_cases
from support.checkpoints import save_architecture
from support.plain_assembly import plain_assemble
from support.record import record

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
JsonOption = Annotated[Path | None, typer.Option("--json", help="Store the figures in this file.")]

LARGE = {"scan 6000 x 4000": (6000, 4000), "panorama 12600 x 2200": (12600, 2200)}
BATCH = 8
PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow")


@app.command()
def recolor(
    name: Annotated[str, typer.Option("--preset", help="Settings of the fits.")] = "demo",
    scenes: Annotated[int, typer.Option(help="Number of scenes; the figures are medians over them.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Seconds of a fit, of one new prompt, and of one in a batch of eight, on the same scenes; demo model."""
    pipe = DiffColor.from_pretrained("demo", settings=preset(name))
    cases = list(draw_cases("full-prompt", max(scenes, BATCH), 0, pipe.checkpoint.native_size_px))
    targets = [case.prompt or "" for case in cases[:BATCH]]
    fits, ones, batches = [], [], []
    for case in cases[:scenes]:
        fit = pipe.fit(case.gray.encode_png(), case.context_prompt)
        fits.append(fit.stage1_seconds + fit.stage2_seconds)
        pipe.recolor(fit, case.prompt)  # loads the fitted weights into the UNet, once for all prompts
        ones.append(seconds_of(lambda f=fit, t=case.edited_prompt: pipe.recolor(f, t)))
        batches.append(seconds_of(lambda f=fit: pipe.recolor(f, targets)) / BATCH)
        print(f"{name}: fit {fits[-1]:.1f} s, recolor {ones[-1]:.2f} s, of {BATCH} {batches[-1]:.2f} s", flush=True)
    fit_seconds, one, batch = map(statistics.median, (fits, ones, batches))
    figures = {
        "scenes": scenes,
        "fit_seconds": fit_seconds,
        "recolor_seconds": one,
        "recolor_seconds_in_batch": batch,
        "fit_over_recolor": fit_seconds / one,
        "fit_over_recolor_in_batch": fit_seconds / batch,
    }
    record(json_file, name, figures, *PACKAGES)


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@app.command()
def large(json_file: JsonOption = None) -> None:
    """Peak memory and time of a large scan and a panorama, each in its own process; demo model."""
    fresh = multiprocessing.get_context("spawn")
    for name, (width, height) in LARGE.items():
        with fresh.Pool(1) as pool:
            record(json_file, name, pool.apply(large_scan, (width, height)), *PACKAGES)


def large_scan(width_px: int, height_px: int) -> dict[str, float]:
    """Peak memory of this process with the model loaded, and after a scan from bytes to bytes.

    The fit takes a few steps only: its memory depends on the working size, not on their number.
    """
    pipe = DiffColor.from_pretrained("demo", settings=few_steps(preset("demo"), 2))
    loaded = peak_bytes()
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (height_px // 8, width_px // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    data = Picture(np.repeat(gray[..., None], 3, axis=-1)).encode_png()
    del gray
    start = time.perf_counter()
    fit = pipe.fit(data, "a ball on a table")
    result = pipe.recolor(fit, "a red ball on a blue table")
    encode(result.image, "png", fit.provenance(result.prompt))
    return {
        "peak_bytes": peak_bytes(),
        "peak_bytes_model_loaded": loaded,
        "seconds": time.perf_counter() - start,
        "p99_abs_delta_l": result.metrics["p99_abs_delta_l"],
    }


@app.command()
def assembly(json_file: JsonOption = None) -> None:
    """CPU seconds of one thread to assemble a scan of 6000 x 4000 px, against the plain form with the same bytes.

    The chroma is that of a rendered scene, as it is (8 bit) and five times as strong (16 bit). Also with chroma that is
    solved for along the scan's edges.
    """
    torch.set_num_threads(1)
    case = next(draw_cases("full-prompt", 1, 0, 512))
    lab = srgb_to_lab(case.scene.rgb)
    grain = torch.randn(1, 4000, 6000, generator=torch.Generator().manual_seed(0))
    lightness = (resize(lab[:1], (4000, 6000)) + grain).clamp(0, 100)
    figures = {}
    for bit_depth, strength in ((8, 1.0), (16, 5.0)):
        scan, chroma = Scan(lightness, None, bit_depth, "L"), lab[1:] * strength
        start = time.process_time()
        picture = assemble(scan, chroma)
        middle = time.process_time()
        plain = plain_assemble(scan, chroma)
        seconds, plain_seconds = middle - start, time.process_time() - middle
        assert np.array_equal(picture.pixels, plain)
        again = time.process_time()
        assemble(scan, chroma, propagated=True)
        propagated_seconds = time.process_time() - again
        linear = lab_to_linear(torch.cat((resize(lightness, chroma.shape[-2:]), chroma)))
        figures[f"{bit_depth} bit"] = {
            "out_of_gamut": float(((linear < 0) | (linear > 1)).any(dim=0).float().mean()),
            "seconds": seconds,
            "plain_seconds": plain_seconds,
            "ratio": plain_seconds / seconds,
            "propagated_seconds": propagated_seconds,
        }
    record(json_file, "assembly", figures, "torch")


@app.command()
def batch(
    steps: Annotated[int, typer.Option(help="Steps of each measurement.")] = 4,
    repeats: Annotated[int, typer.Option(help="Measurements of each, alternating.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """CPU seconds of an optimisation step per photograph on one thread: one by one, eight in a batch, that compiled.

    The demo model with adapters of rank 4, one draw a step: the steps of equations (3), (5) and (6).
    """
    torch.set_num_threads(1)
    plain = load_checkpoint("demo")
    ways = {"alone": (plain, 1), "in_batch": (plain, BATCH), "compiled": (replace(plain, compiled=True), BATCH)}
    figures = {}
    for name in ("stage 1", "embedding", "model"):
        rounds = [{way: step_seconds(*of, name, steps) for way, of in ways.items()} for _ in range(repeats + 1)]
        rounds = rounds[1:]  # the first warms up, and compiles
        figures[name] = {f"{way}_seconds": statistics.median(one[way] for one in rounds) for way in ways}
        figures[name] |= {
            "ratio": statistics.median(one["alone"] / one["in_batch"] for one in rounds),
            "compiled_ratio": statistics.median(one["in_batch"] / one["compiled"] for one in rounds),
        }
        print(name, figures[name], flush=True)
    record(json_file, "batch", {"photographs": BATCH, **figures}, "torch", "diffusers")


def step_seconds(checkpoint: Checkpoint, count: int, name: str, steps: int) -> float:
    """CPU seconds of one step per photograph, the mean of `steps`, with `count` photographs in a batch."""
    rank = {"stage1.adapter_rank": 4, "stage2.adapter_rank": 4}
    settings = preset("demo", {"batch_size": 1, "stage1.num_views": 0, **rank})
    side = checkpoint.native_size_px // checkpoint.vae_factor
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    z = torch.randn(count, int(checkpoint.unet.config.in_channels), side, side, generator=generators[0])
    e = checkpoint.encode_apart(["a ball and a box on a table"] * count)
    unet = checkpoint.unet if name == "embedding" else trainable_copy(checkpoint.unet, 4, generators)
    trained = [p for p in unet.parameters() if p.requires_grad] or [e.requires_grad_(True)]
    f = checkpoint.clip_text_features(["a ball"])
    texts = Texts(e, f.expand(count, -1), f)

    def losses_of() -> tuple[torch.Tensor, ...]:
        if name == "stage 1":
            return prior_loss(checkpoint, unet, z, texts, settings, generators)
        return (reconstruction_loss(checkpoint, unet, z, e, 1, generators),)

    start = time.process_time()
    optimise(trained, 1e-4, steps, losses_of, ("loss",), generators, lambda *_: None)
    return (time.process_time() - start) / steps / count


def few_steps(settings: Settings, steps: int, **both_stages: Any) -> Settings:
    """The settings with `steps` of each optimisation, and further fields of both stages."""
    fields = settings.model_dump()
    fields["stage1"] |= {"num_steps": steps, **both_stages}
    fields["stage2"] |= {"embedding_steps": steps, "model_steps": steps, **both_stages}
    return Settings.model_validate(fields)


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@app.command()
def true_sizes(
    version: Annotated[str, typer.Option(help="Stable Diffusion 1.5 or 2.1.")] = "1.5",
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of each optimisation.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapters; 0 trains all weights.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Time and memory of one fit at Stable Diffusion's true sizes, with random weights.

    The colours mean nothing; what counts is that the method runs, and what it costs. Needs 5 GB of disk.
    """
    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32  # bfloat16 is slow on most CPUs
    settings = few_steps(preset("paper"), steps, adapter_rank=rank or None)
    settings = settings.model_copy(update={"sampling": settings.sampling.model_copy(update={"num_steps": 5})})
    with tempfile.TemporaryDirectory() as folder:
        save_architecture(Path(folder), version)
        start = time.perf_counter()
        pipe = DiffColor.from_pretrained(folder, settings=settings, device=device, dtype=dtype)
    loaded = time.perf_counter()
    gray = (np.linspace(0, 255, size)[None] * np.linspace(0.3, 1, size)[:, None]).astype(np.uint8)
    scan = Picture(np.repeat(gray[..., None], 3, axis=-1)).encode_png()
    fit = pipe.fit(scan, "a ball on a table")
    fitted = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fit.save(folder, with_scan=False)
        fit_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    result = pipe.recolor(fit, "a red ball on a blue table")
    done = time.perf_counter()
    figures = {
        "version": version,
        "size_px": size,
        "steps_each": steps,
        "sampling_steps": 5,
        "adapter_rank": rank or None,
        "dtype": str(dtype),
        "unet_parameters": sum(p.numel() for p in pipe.checkpoint.unet.parameters()),
        "load_seconds": loaded - start,
        "fit_seconds": fitted - loaded,
        "recolor_seconds": done - fitted,
        "fit_bytes_without_scan": fit_bytes,
        "p99_abs_delta_l": result.metrics["p99_abs_delta_l"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes(),
    }
    gpu = torch.cuda.get_device_name() if cuda else None
    record(json_file, f"SD {version}", figures, *PACKAGES, gpu=gpu)


if __name__ == "__main__":
    app()
