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
    from diffcolor_core.config import SamplingSettings, Settings, Stage1Settings
    from diffcolor_core.models import load_checkpoint
    from diffcolor_core.optimising import Photograph
    from diffcolor_core.progress import silent
    from diffcolor_core.stage1 import colorize_with_prior

    settings = Settings(
        batch_size=2,
        stage1=Stage1Settings(num_steps=4, learning_rate=1e-3, num_views=1, temperature=0.1),
        sampling=SamplingSettings(num_steps=5),
    )
    checkpoint, generator = load_checkpoint(str(folder)), torch.Generator().manual_seed(3)
    photograph = Photograph(gray_square(), "a ball on a table", generator)
    [prior] = colorize_with_prior(checkpoint, [photograph], settings, silent)
    return {**prior.losses, "x_pri": numbers(prior.generated), "aligned": numbers(prior.chroma)}


def stage2(folder: Path) -> dict[str, list[float]]:
    from diffcolor_core.config import SamplingSettings, Settings, Stage2Settings
    from diffcolor_core.models import load_checkpoint
    from diffcolor_core.optimising import Photograph
    from diffcolor_core.progress import silent
    from diffcolor_core.sampling import generate
    from diffcolor_core.stage2 import fit_in_context, interpolate

    settings = Settings(
        batch_size=2,
        stage2=Stage2Settings(embedding_steps=4, embedding_learning_rate=1e-2, model_steps=4, model_learning_rate=1e-3),
        sampling=SamplingSettings(num_steps=5),
    )
    checkpoint, generator = load_checkpoint(str(folder)), torch.Generator().manual_seed(4)
    lightness = gray_square()
    chroma = torch.stack((lightness[0] - 50, 30 - lightness[0].T)) / 2
    photograph = Photograph(lightness, "a ball on a table", generator)
    [(_, e_opt, unet, losses)] = fit_in_context(checkpoint, [photograph], [chroma], settings, silent)
    target = checkpoint.encode_prompts(["a red ball on a blue table"])
    e_alpha = interpolate(e_opt, target, checkpoint.encode_prompts([""]), 1.2)
    z = checkpoint.encode(torch.zeros(1, 3, 32, 32))
    x = generate(checkpoint, unet, z, e_alpha, lightness, settings.sampling, generator)
    return {**losses, "e_opt": numbers(e_opt), "x_fin": numbers(x)}


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

    from support.checkpoints import save_tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_checkpoint(Path(folder))
        values = {stage.__name__: stage(Path(folder)) for stage in (stage1, stage2)}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
