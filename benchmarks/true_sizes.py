"""Memory and time of one fit at the true sizes of Stable Diffusion and CLIP ViT-B/32, with random weights.

python -m benchmarks.true_sizes --json benchmarks/results/true_sizes.json

The colours mean nothing; that the method runs at these sizes, and what it costs, does. Needs the
checkout (tests/architectures.py) and 5 GB of disk for the checkpoint.
"""

import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from diffcolor_core import DiffColor, Picture, preset
from diffcolor_core.config import Settings
from support.checkpoints import save_architecture
from support.record import record


def quick(settings: Settings, steps: int, rank: int | None) -> Settings:
    """The paper's preset cut to `steps` of each kind."""
    fields = settings.model_dump()
    fields["stage1"] |= {"num_steps": steps, "adapter_rank": rank}
    fields["stage2"] |= {"embedding_steps": steps, "model_steps": steps, "adapter_rank": rank}
    fields["sampling"] |= {"num_steps": 5}
    return Settings.model_validate(fields)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    version: Annotated[str, typer.Option(help="1.5 or 2.1.")] = "1.5",
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 512,
    steps: Annotated[int, typer.Option(help="Of each stage.")] = 2,
    rank: Annotated[int, typer.Option(help="Of the adapters; 0 trains all weights.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Save, load, fit, recolour; print what it took."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32  # bfloat16 crawls on most CPUs
    with tempfile.TemporaryDirectory() as folder:
        save_architecture(Path(folder), version)
        start = time.perf_counter()
        pipe = DiffColor.from_pretrained(
            folder, settings=quick(preset("paper"), steps, rank or None), device=device, dtype=dtype
        )
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
    cuda = device.startswith("cuda")
    figures = {
        "version": version,
        "size_px": size,
        "steps_each": steps,
        "adapter_rank": rank or None,
        "dtype": str(dtype),
        "unet_parameters": sum(p.numel() for p in pipe.checkpoint.unet.parameters()),
        "load_seconds": loaded - start,
        "fit_seconds": fitted - loaded,
        "recolor_seconds": done - fitted,
        "fit_bytes_without_scan": fit_bytes,
        "p99_abs_delta_l": result.metrics["p99_abs_delta_l"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }
    record(json_file, f"SD {version}", figures, "torch", "diffusers", "transformers", "peft")


if __name__ == "__main__":
    typer.run(main)
