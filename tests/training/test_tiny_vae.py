import numpy as np
import pytest
import torch

from diffcolor_core.models import load_checkpoint
from diffcolor_training.tiny_vae import build_tiny_vae, distill


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


def test_it_learns_what_the_vae_encodes_and_decodes(checkpoint, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (24, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    x = torch.from_numpy(pictures[16:]).float() / 127.5 - 1

    @torch.no_grad()
    def errors(tiny):
        z = checkpoint.encode(x)
        of_pictures = (tiny.decode(z).sample - checkpoint.decode(z)).abs().mean()
        return float(of_pictures), float((tiny.encode(x).latents - z).abs().mean())

    torch.manual_seed(0)
    untrained = errors(build_tiny_vae(checkpoint))
    trained = errors(distill(checkpoint, pictures[:16], 60, 0, tmp_path))
    assert trained[0] < 0.7 * untrained[0]
    assert trained[1] < 0.7 * untrained[1]
