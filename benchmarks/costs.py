"""What a fit costs, what new colours from it cost, and what a large scan costs in memory.

python -m benchmarks.costs --json benchmarks/results/costs.json     (about 12 minutes on 2 CPU cores)

Times are ratios within one process: recolouring against fitting the same scene, with the demo model. The
large scans are fitted with a few steps, as the memory of a fit depends on the working size alone.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from diffcolor_core import DiffColor, Picture, preset
from diffcolor_core.config import Settings
from diffcolor_core.formats import encode
from diffcolor_study.cases import draw_cases
from support.record import record

LARGE = {"scan 6000 x 4000": (6000, 4000), "panorama 12600 x 2200": (12600, 2200)}
BATCH = 8


def recolor_against_fit(name: str, num_scenes: int) -> dict[str, float]:
    """Median seconds of a fit, of one new prompt, and of one in a batch of `BATCH`; and their ratios."""
    pipe = DiffColor.from_pretrained("demo", settings=preset(name))
    cases = list(draw_cases("full-prompt", max(num_scenes, BATCH), 0, pipe.checkpoint.native_size_px))
    targets = [case.prompt or "" for case in cases[:BATCH]]
    fits, ones, batches = [], [], []
    for case in cases[:num_scenes]:
        fit = pipe.fit(case.gray.encode_png(), case.context_prompt)
        fits.append(fit.stage1_seconds + fit.stage2_seconds)
        pipe.recolor(fit, case.prompt)  # loads the fitted weights into the UNet, once for all prompts
        ones.append(seconds_of(lambda f=fit, t=case.edited_prompt: pipe.recolor(f, t)))
        batches.append(seconds_of(lambda f=fit: pipe.recolor(f, targets)) / BATCH)
        print(f"{name}: fit {fits[-1]:.1f} s, recolor {ones[-1]:.2f} s, of {BATCH} {batches[-1]:.2f} s", flush=True)
    fit_seconds, one, batch = map(statistics.median, (fits, ones, batches))
    return {
        "scenes": num_scenes,
        "fit_seconds": fit_seconds,
        "recolor_seconds": one,
        "recolor_seconds_in_batch": batch,
        "fit_over_recolor": fit_seconds / one,
        "fit_over_recolor_in_batch": fit_seconds / batch,
    }


def seconds_of(call: Callable[[], object]) -> float:
    """How long it took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def large_scan(width_px: int, height_px: int) -> dict[str, float]:
    """Peak resident memory of this process with the model loaded, and after a scan from bytes to bytes."""
    settings = preset("demo").model_dump()
    settings["stage1"] |= {"num_steps": 2}
    settings["stage2"] |= {"embedding_steps": 2, "model_steps": 2}
    pipe = DiffColor.from_pretrained("demo", settings=Settings.model_validate(settings))
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


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Put the figures here.")] = None,
    scenes: Annotated[int, typer.Option(help="For the demo preset; the paper's gets one.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="demo, large or paper; repeat it.")] = None,
) -> None:
    """Measure one after the other; a process of its own for each large scan."""
    packages = ("torch", "diffusers", "transformers", "pillow")
    wanted = only or ["demo", "large", "paper"]
    if "demo" in wanted:
        record(json_file, "demo", recolor_against_fit("demo", scenes), *packages)
    if "large" in wanted:
        fresh = multiprocessing.get_context("spawn")
        for name, (width, height) in LARGE.items():
            with fresh.Pool(1) as pool:
                record(json_file, name, pool.apply(large_scan, (width, height)), *packages)
    if "paper" in wanted:
        record(json_file, "paper", recolor_against_fit("paper", 1), *packages)


if __name__ == "__main__":
    typer.run(main)
