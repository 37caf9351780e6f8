"""One golden test per stage, on the tiny checkpoint with random weights.

`python tests/core/test_golden.py` writes the values anew; do so only for a change that is meant to
change results, together with `_version.METHOD_VERSION`.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).with_name("golden.json")


def gray_square() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    return (20 + 60 * x * y + 15 * (x > 0.5))[None]  # L*, [1, 32, 32]


def numbers(tensor: torch.Tensor) -> list[float]:
    """A slice and two sums: enough to notice any change."""
    flat = tensor.detach().flatten().double()
    return [*flat[:: max(1, len(flat) // 8)][:8].tolist(), flat.mean().item(), flat.std().item()]


def stage1(folder: Path) -> dict[str, list[float]]:
    from diffcolor_core.prior import colorize_with_prior

    from diffcolor_core.config import SamplingSettings, Stage1Settings
    from diffcolor_core.images import gray_input
    from diffcolor_core.models import load_checkpoint

    result = colorize_with_prior(
        load_checkpoint(str(folder)),
        gray_input(gray_square()),
        gray_square(),
        "a ball on a table",
        Stage1Settings(num_steps=4, learning_rate=1e-3, num_views=1, temperature=0.1),
        SamplingSettings(num_steps=5),
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        progress=lambda *_: None,
    )
    return {**result.losses, "x_pri": numbers(result.x_pri)}


def stage2(folder: Path) -> dict[str, list[float]]:
    from diffcolor_core.config import SamplingSettings
    from diffcolor_core.images import gray_input
    from diffcolor_core.models import load_checkpoint
    from diffcolor_core.sampling import generate
    from diffcolor_core.stage2 import finetune_model, interpolate, optimise_embedding

    checkpoint = load_checkpoint(str(folder))
    generator = torch.Generator().manual_seed(4)
    z = checkpoint.encode(gray_input(gray_square())[None])
    common = {"batch_size": 2, "generator": generator, "progress": lambda *_: None}
    e = checkpoint.encode_prompts(["a sks ball on a table"])
    e_opt, embedding = optimise_embedding(checkpoint, z, e, num_steps=4, learning_rate=1e-2, **common)
    unet, model = finetune_model(checkpoint, z, e_opt, num_steps=4, learning_rate=1e-3, adapter_rank=None, **common)
    target = checkpoint.encode_prompts(["a red ball on a blue table"])
    e_alpha = interpolate(e_opt, target, checkpoint.encode_prompts([""]), 1.2)
    x = generate(checkpoint, unet, z, e_alpha, gray_square(), SamplingSettings(num_steps=5), generator)
    return {"embedding": embedding, "model": model, "e_opt": numbers(e_opt), "x_fin": numbers(x)}


@pytest.mark.parametrize("stage", [stage1, stage2], ids=["stage1", "stage2"])
def test_golden(stage, tiny_folder):
    expected = json.loads(GOLDEN.read_text())[stage.__name__]
    found = stage(tiny_folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-3, abs=2e-4), name


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import tempfile

    from tests.conftest import save_tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_checkpoint(Path(folder))
        values = {stage.__name__: stage(Path(folder)) for stage in (stage1, stage2)}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
